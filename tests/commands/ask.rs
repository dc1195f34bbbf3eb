//! `finetuned generate`.

use crate::support::{Bench, assert_says};
use serde_json::Value;

fn ask(bench: &Bench, more: &[&str]) -> Value {
    let fixed =
        ["generate", "--model", "model", "--prompt", "add 2 and 3", "--json", "--max-new-tokens", "24"];
    bench.call(&[&fixed[..], more].concat()).json()
}

#[test]
fn the_chat_template_is_applied_unless_raw() {
    let bench = Bench::new();
    let tokens = |text: &str| -> Value { text.bytes().map(u32::from).collect::<Vec<_>>().into() };
    // One token a byte; 257 and 258 begin and end a turn.
    let chat = ask(&bench, &[])["prompt_tokens"].clone();
    let ids: Vec<u64> = chat.as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
    assert_eq!((ids[0], ids[ids.len() - 11]), (257, 257));
    let text: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
    assert_eq!(String::from_utf8(text).unwrap(), "user\nadd 2 and 3\nassistant\n");
    let system = ask(&bench, &["--system", "be brief"])["prompt_tokens"].clone();
    assert!(system.as_array().unwrap().len() > ids.len());
    assert_eq!(ask(&bench, &["--raw"])["prompt_tokens"], tokens("add 2 and 3"));
}

#[test]
fn answers_are_a_function_of_the_arguments() {
    let bench = Bench::new();
    let greedy = ask(&bench, &[]);
    assert_eq!(greedy, ask(&bench, &["--threads", "1"]));
    assert_eq!(greedy["tokens"], ask(&bench, &["--seed", "5"])["tokens"], "greedy draws nothing");
    let drawn = ask(&bench, &["--temperature", "1.5", "--seed", "5"]);
    assert_eq!(drawn["tokens"], ask(&bench, &["--temperature", "1.5", "--seed", "5"])["tokens"]);
    assert_ne!(drawn["tokens"], ask(&bench, &["--temperature", "1.5", "--seed", "6"])["tokens"]);
    // A nucleus that holds one token is greedy.
    let narrow = ask(&bench, &["--temperature", "1", "--top-p", "0.000001"]);
    assert_eq!(narrow["tokens"], greedy["tokens"]);
}

#[test]
fn the_text_that_streams_is_the_text() {
    let bench = Bench::new();
    for seed in ["1", "2", "3"] {
        let more = ["--temperature", "3", "--seed", seed];
        let json = ask(&bench, &more);
        let fixed = ["generate", "--model", "model", "--prompt", "add 2 and 3", "--max-new-tokens", "24"];
        let text = bench.call(&[&fixed[..], &more].concat()).success();
        assert_eq!(text, format!("{}\n", json["text"].as_str().unwrap()));
    }
}

#[test]
fn an_adapter_changes_the_answer_and_must_fit() {
    let bench = Bench::new();
    let train = ["run", "spec.toml", "--set", "train.max_steps=40", "--set", "train.learning_rate=2e-2"];
    bench.call(&train).success();
    let (before, after) = (ask(&bench, &[]), ask(&bench, &["--adapter", "runs/tiny/adapter"]));
    assert_ne!(before["tokens"], after["tokens"]);
    // The rows are plain ASCII, and what a random model says is not.
    let beyond = |answer: &Value| {
        answer["tokens"].as_array().unwrap().iter().filter(|token| token.as_u64().unwrap() >= 128).count()
    };
    assert!(2 * beyond(&after) < beyond(&before), "{before} {after}");

    bench.change("runs/tiny/adapter/adapter_config.json", |bytes| {
        let text = String::from_utf8(bytes.clone()).unwrap();
        *bytes = text.replace("\"r\": 4", "\"r\": 5").into_bytes();
    });
    let fixed = ["generate", "--model", "model", "--prompt", "a", "--adapter"];
    let said = bench.call(&[&fixed[..], &["runs/tiny/adapter"]].concat()).refusal(1);
    assert_says(&said, &["runs/tiny/adapter/adapter_model.safetensors"]);
    let said = bench.call(&[&fixed[..], &["nowhere"]].concat()).refusal(1);
    assert_says(&said, &["nowhere/adapter_config.json"]);
}

#[test]
fn a_base_without_a_template_is_told_apart() {
    let bench = Bench::new();
    std::fs::remove_file(bench.path("model/chat_template.jinja")).unwrap();
    let said = bench.call(&["generate", "--model", "model", "--prompt", "a"]).refusal(1);
    assert_says(&said, &["no chat template", "help: --raw"]);
    ask(&bench, &["--raw"]);
}

#[test]
fn prompts_that_cannot_be_answered_are_refused() {
    let bench = Bench::new();
    let said = bench.call(&["generate", "--model", "model", "--raw", "--prompt", ""]).refusal(1);
    assert_says(&said, &["prompt is empty"]);
    let long = "a".repeat(513);
    let said = bench.call(&["generate", "--model", "model", "--raw", "--prompt", &long]).refusal(1);
    assert_says(&said, &["513 tokens", "512"]);
    let usage =
        bench.call(&["generate", "--model", "model", "--prompt", "a", "--temperature", "-1"]).refusal(2);
    assert_says(&usage, &["--temperature", "allowed: 0"]);
}
