//! `finetuned demo`: the whole way in about a minute, on any machine, with nothing but this program.
//!
//! Model, data and spec are in the program. They are unpacked, and then it is the real thing: the base is quantised, a
//! baseline is measured, an adapter is trained and saved, and the same prompts are answered before and after.

use super::arguments::{self, ThreadArguments, command_line, shown};
use super::console;
use super::exit::{Exit, Failure};
use super::run::Foreground;
use crate::backend::Backend;
use crate::checkpoint;
use crate::config::spec::Spec;
use crate::model::generate::Sampling;
use crate::train::answer::{AnswerError, Answerer, Question};
use crate::train::device;
use crate::train::observer::Silent;
use clap::Args;
use serde::Deserialize;
use serde_json::json;
use std::ffi::OsString;
use std::fmt::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Arguments of `finetuned demo`.
#[derive(Args, Debug)]
pub struct DemoArguments {
    /// Directory to unpack model and data to, and to train in
    #[arg(long, value_name = "DIR", default_value = "finetuned-demo")]
    output: PathBuf,
    /// Unpack only, and say how to submit the run to the daemon
    #[arg(long)]
    unpack: bool,
    #[command(flatten)]
    threads: ThreadArguments,
}

macro_rules! assets {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("../demo/", $name)))),*]
    };
}

/// The files of the demo (about 3 MB).
const ASSETS: &[(&str, &[u8])] = assets![
    "data/eval.jsonl",
    "data/train.jsonl",
    "demo.toml",
    "model/README.md",
    "model/config.json",
    "model/generation_config.json",
    "model/model.safetensors",
    "model/special_tokens_map.json",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "prompts.json",
];

/// Longest answer; those that were taught have about 20 tokens.
const MAX_NEW_TOKENS: usize = 64;

/// A prompt, and what a robot that has learnt its task answers.
#[derive(Deserialize)]
struct Prompt {
    prompt: String,
    expected: String,
}

/// Runs the command.
pub fn command(arguments: &DemoArguments) -> Result<Exit, Failure> {
    arguments.threads.apply()?;
    let dir = &arguments.output;
    unpack(dir)?;
    let spec_file = dir.join("demo.toml");
    if arguments.unpack {
        let submit: [OsString; 4] =
            ["finetunectl".into(), "submit".into(), spec_file.into(), "--watch".into()];
        console::result(&format!("{}\n", command_line(submit)))?;
        return Ok(Exit::Done);
    }
    let spec = Spec::load(&spec_file, &[])?;
    let prompts = prompts(dir)?;
    let output = free(&dir.join("runs"), &spec.run.name)?;
    console::result(&format!(
        "A tiny language model ({}) that ships with finetuned answers orders to a robot with small talk.\n\
         It is taught to answer with a command in JSON instead, by a LoRA adapter on its frozen 4-bit weights.\n\
         Task: {} ({})\n\n",
        shown(&dir.join("model")),
        shown(&spec_file),
        shown(&dir.join("data/train.jsonl")),
    ))?;
    console::result("Before:\n")?;
    console::result(&conversation(&prompts, &answers(&spec, None, &prompts)?))?;
    console::result("\nTraining:\n")?;
    let again: [OsString; 6] = [
        arguments::program(),
        "run".into(),
        spec_file.clone().into(),
        "--output".into(),
        output.clone().into(),
        "--resume".into(),
    ];
    let run =
        Foreground { submitted: spec_file, spec: spec.clone(), output, resume: false, again: again.to_vec() };
    let done = run.run()?;
    let Some(finished) = done.finished else { return Ok(done.exit) };
    console::result(&finished.report())?;
    console::result("\nAfter, on the same prompts:\n")?;
    let after = answers(&spec, Some(&finished.adapter), &prompts)?;
    console::result(&conversation(&prompts, &after))?;
    let right = prompts.iter().zip(&after).filter(|(prompt, answer)| prompt.expected == **answer).count();
    let example = prompts.first().map_or("Hello", |prompt| &prompt.prompt);
    console::result(&format!(
        "\n{right} of {} as intended. Ask it yourself:\n  {}\n",
        prompts.len(),
        command_line([
            arguments::program(),
            "generate".into(),
            "--model".into(),
            dir.join("model").into(),
            "--adapter".into(),
            finished.adapter.into(),
            "--prompt".into(),
            example.into(),
        ]),
    ))?;
    Ok(done.exit)
}

/// Writes the files that are not there. One that is there and differs belongs to the user: it is not overwritten.
fn unpack(dir: &Path) -> Result<(), Failure> {
    let cannot = |path: &Path, error: std::io::Error| {
        let what = format!("cannot unpack the demo to {}", path.display());
        Failure::new(anyhow::Error::from(error).context(what)).help("--output DIR chooses another directory")
    };
    let mut missing = Vec::new();
    for &(name, bytes) in ASSETS {
        let path = dir.join(name);
        match std::fs::read(&path) {
            Ok(found) if found == bytes => {}
            Ok(_) => {
                let problem = format!("{} is not the file of this version's demo", path.display());
                return Err(Failure::new(anyhow::anyhow!(problem))
                    .help("train it as it is with `finetuned run`, or unpack a new demo with --output DIR"));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => missing.push((path, bytes)),
            Err(error) => return Err(cannot(&path, error)),
        }
    }
    for (path, bytes) in missing {
        let parent = path.parent().unwrap_or(dir);
        std::fs::create_dir_all(parent).map_err(|error| cannot(parent, error))?;
        checkpoint::atomic_write(&path, bytes).map_err(Failure::new)?;
    }
    Ok(())
}

fn prompts(dir: &Path) -> Result<Vec<Prompt>, Failure> {
    let path = dir.join("prompts.json");
    let context = || format!("cannot read {}", path.display());
    let text =
        std::fs::read(&path).map_err(|error| Failure::new(anyhow::Error::from(error).context(context())))?;
    serde_json::from_slice(&text).map_err(|error| Failure::new(anyhow::Error::from(error).context(context())))
}

/// The first of `name`, `name-2`, `name-3`, … that does not exist: every demo is a new run.
fn free(dir: &Path, name: &str) -> Result<PathBuf, Failure> {
    let names = (1..=9999).map(|n| if n == 1 { name.to_string() } else { format!("{name}-{n}") });
    names.map(|name| dir.join(name)).find(|path| !path.exists()).ok_or_else(|| {
        Failure::new(anyhow::anyhow!("{} is full of demos", dir.display())).help("remove some of them")
    })
}

/// Greedy answers, with the base held as in training.
fn answers(spec: &Spec, adapter: Option<&Path>, prompts: &[Prompt]) -> Result<Vec<String>, Failure> {
    let question = Question {
        model: &spec.model.base,
        adapter,
        quantization: spec.model.quantization,
        double_quant: spec.model.double_quant,
    };
    let cache = arguments::cache_dir()?;
    // Why it is the CPU was said by the training.
    let chosen = device::choose(spec.train.backend, spec.model.compute_dtype, &cache, &mut |_| {})?;
    device::with_backend!(chosen, backend => {
        answers_on(&Answerer::load(backend, question, &cache, &mut Silent)?, prompts)
    })
}

fn answers_on<B: Backend>(model: &Answerer<B>, prompts: &[Prompt]) -> Result<Vec<String>, Failure> {
    let answer = |prompt: &Prompt| {
        let message = json!({"role": "user", "content": prompt.prompt});
        let tokens = model.tokenizer.encode_prompt(&[message], None)?;
        let go_on = &mut |_: &str| ControlFlow::Continue(());
        Ok(model.answer(&tokens, MAX_NEW_TOKENS, Sampling::GREEDY, go_on)?.text)
    };
    let answers: Result<Vec<String>, AnswerError> = prompts.iter().map(answer).collect();
    Ok(answers?)
}

fn conversation(prompts: &[Prompt], answers: &[String]) -> String {
    let mut text = String::new();
    for (prompt, answer) in prompts.iter().zip(answers) {
        let _ = writeln!(text, "  > {}\n    {}", prompt.prompt, answer.trim());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_of_the_demo_is_in_the_program() {
        fn walk(dir: &Path, root: &Path, found: &mut Vec<String>) {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    walk(&path, root, found);
                } else {
                    found.push(path.strip_prefix(root).unwrap().to_str().unwrap().to_string());
                }
            }
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("daemon/demo");
        let mut found = Vec::new();
        walk(&root, &root, &mut found);
        found.sort();
        let packed: Vec<&str> = ASSETS.iter().map(|(name, _)| *name).collect();
        assert_eq!(found, packed);
    }

    #[test]
    fn unpacking_twice_is_harmless_and_changed_files_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        unpack(dir.path()).unwrap();
        unpack(dir.path()).unwrap();
        std::fs::remove_file(dir.path().join("prompts.json")).unwrap();
        unpack(dir.path()).unwrap();
        assert!(!prompts(dir.path()).unwrap().is_empty());
        std::fs::write(dir.path().join("demo.toml"), "mine").unwrap();
        assert!(unpack(dir.path()).unwrap_err().error.to_string().contains("demo.toml"));
        assert_eq!(std::fs::read(dir.path().join("demo.toml")).unwrap(), b"mine");
    }

    #[test]
    fn every_demo_is_a_new_run() {
        let dir = tempfile::tempdir().unwrap();
        for expected in ["demo", "demo-2", "demo-3"] {
            let path = free(dir.path(), "demo").unwrap();
            assert_eq!(path, dir.path().join(expected));
            std::fs::create_dir(&path).unwrap();
        }
    }
}
