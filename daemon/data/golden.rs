//! Tokens and masks against transformers.
//!
//! `tests/golden/make_templates.py` says how the values were made. The tiny tokenizer is in the repository; the real
//! ones are read from `tokenizers/` in the folder that `FINETUNED_TEST_DATA` names (default: `../shared/data` beside
//! the repository), and the tests say that they were skipped when it is not there.

use super::example::{self, Example};
use super::record::Record;
use super::tokenizer::ChatTokenizer;
use crate::config::spec::TrainOn;
use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// The folder of this test's fixtures.
pub(super) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/templates")
}

fn read_json(path: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A folder of the shared data, or `None` with a line that says so.
fn shared(part: &str) -> Option<PathBuf> {
    let root = std::env::var_os("FINETUNED_TEST_DATA")
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data"));
    let path = root.join(part);
    if path.exists() {
        return Some(path);
    }
    eprintln!("SKIPPED: {} is not there; set FINETUNED_TEST_DATA", path.display());
    None
}

/// A model directory of the tiny tokenizer with a template and what the golden values say about its config.
fn tiny_model(template: &str, values: &Json) -> (tempfile::TempDir, ChatTokenizer) {
    let dir = tempfile::tempdir().unwrap();
    let mut tokenizer = read_json(&fixtures().join("tiny/tokenizer.json"));
    tokenizer["post_processor"] = values["post_processor"].clone();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), values["config"].to_string()).unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    let tokenizer = ChatTokenizer::load(dir.path()).unwrap();
    (dir, tokenizer)
}

/// The tiny tokenizer with the ChatML template.
pub(super) fn tiny_chatml() -> (tempfile::TempDir, ChatTokenizer) {
    let golden = read_json(&fixtures().join("golden.json"));
    let template = std::fs::read_to_string(fixtures().join("chatml.jinja")).unwrap();
    tiny_model(&template, &golden["templates"]["chatml"])
}

/// The template without its `generation` tags: what they say has to be found then.
fn untag(template: &str) -> String {
    let mut out = template.to_owned();
    for (tag, block) in [("endgeneration", "endif"), ("generation", "if true")] {
        for (left, right) in
            [("{% ", " %}"), ("{%- ", " %}"), ("{%- ", " -%}"), ("{% ", " -%}"), ("{% ", " +%}")]
        {
            out = out.replace(&format!("{left}{tag}{right}"), &format!("{left}{block}{right}"));
        }
    }
    assert!(!out.contains("generation %}") && !out.contains("generation -%}"));
    out
}

fn record(conversation: &Json) -> Record {
    let embedded = |value: &Json| match value {
        Json::String(text) => serde_json::from_str(text).unwrap(),
        other => other.clone(),
    };
    Record::Chat {
        messages: embedded(&conversation["messages"]).as_array().unwrap().clone(),
        tools: conversation.get("tools").map(embedded),
        prompt: 0,
    }
}

/// Half-open ranges of learnt tokens.
fn runs(mask: &[bool]) -> Vec<[usize; 2]> {
    let mut runs: Vec<[usize; 2]> = Vec::new();
    for (t, _) in mask.iter().enumerate().filter(|(_, m)| **m) {
        match runs.last_mut() {
            Some(run) if run[1] == t => run[1] = t + 1,
            _ => runs.push([t, t + 1]),
        }
    }
    runs
}

fn build(tokenizer: &ChatTokenizer, conversation: &Json) -> Result<Example, String> {
    example::build(&record(conversation), tokenizer, TrainOn::Assistant, usize::MAX)
}

fn values(example: &Example) -> Json {
    json!({"ids": example.tokens, "learnt": runs(&example.mask)})
}

/// Compares one template's values; what differs is added to `wrong`.
fn compare(
    name: &str,
    tokenizer: &ChatTokenizer,
    golden: &Json,
    inputs: &Json,
    unlocatable: &[&str],
    wrong: &mut Vec<String>,
) {
    for (case, expected) in golden["rows"].as_object().unwrap() {
        let got = build(tokenizer, &inputs["conversations"][case]);
        let right = match (&got, expected) {
            (Err(_), Json::Null) => true,
            (Err(e), _) => unlocatable.contains(&case.as_str()) && e.contains("begins"),
            (Ok(got), expected) => &values(got) == expected && !unlocatable.contains(&case.as_str()),
        };
        if !right {
            let got = got.map(|g| values(&g).to_string());
            wrong.push(format!("{name}/{case}:\n  got  {got:?}\n  want {expected}"));
        }
    }
    for (case, expected) in golden["prompts"].as_object().unwrap() {
        // The golden values were made on the fixed date, which `encode_prompt` does not use.
        let Record::Chat { messages, tools, .. } = record(&inputs["conversations"][case]) else {
            unreachable!()
        };
        let got = tokenizer
            .render(&messages, tools.as_ref(), true)
            .and_then(|r| tokenizer.encode_text(&r.text, false))
            .map_or(Json::Null, |ids| json!(ids));
        if &got != expected {
            wrong.push(format!("{name}/{case} (prompt):\n  got  {got}\n  want {expected}"));
        }
    }
    let texts = inputs["texts"].as_array().unwrap();
    for (text, expected) in texts.iter().zip(golden["plain"]["special"].as_array().unwrap()) {
        let got = json!(tokenizer.encode_text(text.as_str().unwrap(), true).unwrap());
        if &got != expected {
            wrong.push(format!("{name} encode_text({text}): got {got}, want {expected}"));
        }
    }
    let texts = texts.iter().map(|t| Record::Text(t.as_str().unwrap().into()));
    let pairs = inputs["pairs"].as_array().unwrap().iter().map(|p| Record::Completion {
        prompt: p[0].as_str().unwrap().into(),
        completion: p[1].as_str().unwrap().into(),
    });
    let expected = golden["plain"]["texts"].as_array().unwrap().iter();
    let expected = expected.chain(golden["plain"]["pairs"].as_array().unwrap());
    for (record, expected) in texts.chain(pairs).zip(expected) {
        let got = example::build(&record, tokenizer, TrainOn::Assistant, usize::MAX);
        // A text of nothing but the end token has nothing that could be learnt.
        let nothing = expected.as_array().unwrap().len() == 1;
        if got.as_ref().ok().map(|e| json!(e.tokens)) != (!nothing).then(|| expected.clone()) {
            wrong.push(format!("{name} {record:?}: got {got:?}, want {expected}"));
        }
    }
}

#[test]
fn tiny_templates_give_the_tokens_and_masks_of_transformers() {
    let golden = read_json(&fixtures().join("golden.json"));
    let mut wrong = Vec::new();
    for (name, values) in golden["templates"].as_object().unwrap() {
        let template = std::fs::read_to_string(fixtures().join(format!("{name}.jinja"))).unwrap();
        let (_dir, tokenizer) = tiny_model(&template, values);
        assert!(tokenizer.template(None).unwrap().has_generation());
        compare(name, &tokenizer, values, &golden, &[], &mut wrong);
        let (_dir, tokenizer) = tiny_model(&untag(&template), values);
        assert!(!tokenizer.template(None).unwrap().has_generation());
        // Without a turn before it and with a generation prompt that says more than a header, there is no guide.
        let unlocatable: &[&str] = if name == "thinking" { &["assistant-first"] } else { &[] };
        compare(&format!("{name} (spans found)"), &tokenizer, values, &golden, unlocatable, &mut wrong);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn real_templates_give_the_tokens_and_masks_of_transformers() {
    let Some(tokenizers) = shared("tokenizers") else { return };
    let inputs = read_json(&fixtures().join("golden.json"));
    let golden = read_json(&fixtures().join("golden_real.json"));
    let mut wrong = Vec::new();
    for (name, values) in golden["tokenizers"].as_object().unwrap() {
        let tokenizer = match values.get("template").and_then(Json::as_str) {
            None => ChatTokenizer::load(&tokenizers.join(name)).unwrap(),
            Some(template) => {
                let dir = tempfile::tempdir().unwrap();
                for file in ["tokenizer.json", "tokenizer_config.json"] {
                    std::fs::copy(tokenizers.join(name).join(file), dir.path().join(file)).unwrap();
                }
                let text = std::fs::read_to_string(fixtures().join(format!("{template}.jinja"))).unwrap();
                std::fs::write(dir.path().join("chat_template.jinja"), untag(&text)).unwrap();
                ChatTokenizer::load(dir.path()).unwrap()
            }
        };
        compare(name, &tokenizer, values, &inputs, &[], &mut wrong);
        for dataset in ["home-robot/train.jsonl", "ha-datasets/function-calling-messages-test.jsonl"] {
            let expected = values.get(dataset.split('/').next().unwrap()).and_then(Json::as_array);
            let (Some(expected), Some(path)) = (expected, shared(&format!("datasets/{dataset}"))) else {
                continue;
            };
            let text = std::fs::read_to_string(path).unwrap();
            for (i, (line, expected)) in text.lines().zip(expected).enumerate() {
                let built = build(&tokenizer, &serde_json::from_str(line).unwrap());
                let got = built.as_ref().map_or("refused".to_owned(), digest);
                if got != expected.as_str().unwrap() {
                    wrong.push(format!(
                        "{name} {dataset}:{}: got {got}, want {expected}: {:?}",
                        i + 1,
                        built.err()
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Eight hex digits over ids and mask, as the script makes them.
fn digest(example: &Example) -> String {
    let ids: Vec<String> = example.tokens.iter().map(u32::to_string).collect();
    let learnt: Vec<String> = runs(&example.mask).iter().map(|[a, b]| format!("{a}-{b}")).collect();
    let text = format!("{};{}", ids.join(","), learnt.join(","));
    super::tokenizer::hex(&Sha256::digest(text)[..4])
}

#[test]
fn real_datasets_are_prepared() {
    use super::{EpochPlan, Marks, inspect, prepare};
    use crate::config::spec::{DataFormat, DataSpec, OnBadRow};
    let (Some(tokenizers), Some(datasets)) = (shared("tokenizers"), shared("datasets")) else { return };
    let cache = tempfile::tempdir().unwrap();
    let spec = |train: &str, eval: Option<&str>| DataSpec {
        train: vec![datasets.join(train)],
        eval: eval.map(|e| datasets.join(e)),
        eval_fraction: 0.0,
        format: DataFormat::Auto,
        sequence_length: 1024,
        packing: true,
        shuffle: true,
        train_on: TrainOn::Assistant,
        on_bad_row: OnBadRow::Refuse,
    };
    let smollm2 = ChatTokenizer::load(&tokenizers.join("smollm2")).unwrap();
    let robot = spec("home-robot/train.jsonl", Some("home-robot/eval.jsonl"));
    let data = prepare(&robot, 42, &smollm2, cache.path(), None, &mut |_| {}).unwrap();
    println!("{}", inspect(&data, &smollm2, 2, Marks::Brackets));
    assert_eq!(data.train.len() as u64 + data.report.train.dropped_overlap, 9360);
    assert_eq!(data.eval.as_ref().unwrap().len(), 400);
    let plan = EpochPlan::new(&data.train, 1024, true, true, 42, 0);
    let filled = data.train.total_tokens() as f64 / (plan.len() * 1024) as f64;
    println!("{} sequences, {:.2} % filled", plan.len(), 100.0 * filled);
    assert!(filled > 0.97);
    assert!(prepare(&robot, 42, &smollm2, cache.path(), None, &mut |_| {}).unwrap().report.cached);

    // `messages` and `tools` as JSON in strings.
    let qwen = ChatTokenizer::load(&tokenizers.join("qwen2.5")).unwrap();
    let home =
        DataSpec { sequence_length: 8192, ..spec("ha-datasets/function-calling-messages-test.jsonl", None) };
    let data = prepare(&home, 42, &qwen, cache.path(), None, &mut |_| {}).unwrap();
    println!("{}", inspect(&data, &qwen, 1, Marks::Brackets));
    assert!(data.report.train.share_masked > 0.9);

    let unknown = prepare(
        &spec("sql-eval/instruct_basic_sqlite.csv", None),
        42,
        &qwen,
        cache.path(),
        None,
        &mut |_| {},
    );
    let refusal = unknown.unwrap_err().to_string();
    assert!(refusal.contains("query_category"), "{refusal}");
}
