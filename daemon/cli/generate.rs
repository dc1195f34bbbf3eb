//! `finetuned generate`: asks a model, with or without an adapter.

use super::arguments::{self, ThreadArguments};
use super::console;
use super::exit::{Exit, Failure};
use super::progress::Progress;
use crate::backend::Backend;
use crate::clock::SystemClock;
use crate::config::spec::{BackendChoice, ComputeDtype, Quantization};
use crate::data::TokenizerError;
use crate::model::generate::{Finish, Sampling};
use crate::train::answer::{AnswerError, Answerer, Question};
use crate::train::device;
use clap::{Args, ValueEnum};
use serde_json::json;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;

/// Arguments of `finetuned generate`.
#[derive(Args, Debug)]
pub struct GenerateArguments {
    /// Directory of the base: a Hugging Face model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Directory of a PEFT adapter, such as runs/NAME/adapter
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// What is said to the model
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: String,
    /// A system message before the prompt
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with = "raw")]
    system: Option<String>,
    /// Most tokens of the answer
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    /// 0 takes the most likely token; 1 draws from the model's own distribution
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = temperature, allow_hyphen_values = true)]
    temperature: f64,
    /// Draw from the most likely tokens that have this much of the probability
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = top_p, allow_hyphen_values = true)]
    top_p: f64,
    /// Seed of the draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// How the base's weights are held; take what the adapter was trained with
    #[arg(long, value_name = "HOW", default_value = "nf4")]
    quantization: Weights,
    /// Where to compute; `auto` takes the GPU where it is usable
    #[arg(long, value_name = "WHERE", default_value = "auto")]
    backend: Where,
    /// Continue the prompt as a plain text, without the chat template
    #[arg(long)]
    raw: bool,
    /// Print one JSON object instead of the text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    threads: ThreadArguments,
}

/// How the base's weights are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Weights {
    /// 4-bit NormalFloat, doubly quantised
    Nf4,
    /// As stored
    None,
}

/// Where to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Where {
    /// On the GPU where it is usable, else on the CPU
    Auto,
    /// On the CPU
    Cpu,
    /// On the GPU
    Cuda,
}

impl From<Where> for BackendChoice {
    fn from(choice: Where) -> BackendChoice {
        match choice {
            Where::Auto => BackendChoice::Auto,
            Where::Cpu => BackendChoice::Cpu,
            Where::Cuda => BackendChoice::Cuda,
        }
    }
}

fn temperature(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "not a number".to_string())?;
    // Below this the division overflows; it is greedy by then.
    let fits = value == 0.0 || (1e-6..=1e3).contains(&value);
    if fits { Ok(value) } else { Err("allowed: 0, or a number from 0.000001 to 1000".into()) }
}

fn top_p(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "not a number".to_string())?;
    if value > 0.0 && value <= 1.0 { Ok(value) } else { Err("allowed: above 0, up to 1".into()) }
}

/// Runs the command.
pub fn command(arguments: &GenerateArguments) -> Result<Exit, Failure> {
    arguments.threads.apply()?;
    let question = Question {
        model: &arguments.model,
        adapter: arguments.adapter.as_deref(),
        quantization: match arguments.quantization {
            Weights::Nf4 => Quantization::Nf4,
            Weights::None => Quantization::None,
        },
        double_quant: true,
    };
    let cache = arguments::cache_dir()?;
    // An answer needs no word on where it comes from; `finetuned run` says it.
    let mut note = |text: String| tracing::info!("{text}");
    let chosen = device::choose(arguments.backend.into(), ComputeDtype::Auto, &cache, &mut note)?;
    device::with_backend!(chosen, backend => {
        let clock = SystemClock::new();
        let mut progress = Progress::of_preparation(&clock);
        let model = Answerer::load(backend, question, &cache, &mut progress)?;
        drop(progress); // the terminal belongs to the answer
        answer(&model, arguments)
    })
}

fn answer<B: Backend>(model: &Answerer<B>, arguments: &GenerateArguments) -> Result<Exit, Failure> {
    let prompt = if arguments.raw {
        model.tokenizer.encode_text(&arguments.prompt, true)
    } else {
        let system = arguments.system.iter().map(|text| json!({"role": "system", "content": text}));
        let user = json!({"role": "user", "content": arguments.prompt});
        let messages: Vec<_> = system.chain([user]).collect();
        model.tokenizer.encode_prompt(&messages, None)
    };
    let prompt = prompt.map_err(AnswerError::from)?;
    let sampling =
        Sampling { temperature: arguments.temperature, top_p: arguments.top_p, seed: arguments.seed };
    let mut written = Ok(());
    let answer = model.answer(&prompt, arguments.max_new_tokens as usize, sampling, &mut |piece| {
        if arguments.json {
            return ControlFlow::Continue(());
        }
        let mut out = io::stdout().lock();
        match out.write_all(piece.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => ControlFlow::Continue(()),
            // The reader has gone: nobody needs the rest.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ControlFlow::Break(()),
            Err(error) => {
                written = Err(error);
                ControlFlow::Break(())
            }
        }
    })?;
    written.map_err(|error| {
        Failure::new(anyhow::Error::from(error).context("cannot write the answer to standard output"))
    })?;
    if arguments.json {
        let object = json!({
            "schema": 1,
            "model": arguments.model,
            "adapter": arguments.adapter,
            "prompt_tokens": prompt,
            "tokens": answer.tokens,
            "text": answer.text,
            "finish": answer.finish,
        });
        console::result(&format!("{object}\n"))?;
    } else {
        console::result("\n")?;
        if answer.finish == Finish::Length {
            tracing::info!("the answer was cut at --max-new-tokens {}", arguments.max_new_tokens);
        }
    }
    Ok(Exit::Done)
}

impl From<AnswerError> for Failure {
    fn from(error: AnswerError) -> Failure {
        if matches!(error, AnswerError::Tokenizer(TokenizerError::NoTemplate)) {
            // The tokenizer's own words are about training rows.
            return Failure::new(anyhow::anyhow!("this model has no chat template"))
                .help("--raw continues the prompt as a plain text")
                .help("for a chat, put the template of the model it was made from into its directory as chat_template.jinja");
        }
        Failure::new(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_outside_their_range_are_usage_errors() {
        for bad in ["-1", "nan", "inf", "1e-9", "x"] {
            assert!(temperature(bad).is_err(), "{bad}");
        }
        for bad in ["0", "-0.5", "1.01", "nan"] {
            assert!(top_p(bad).is_err(), "{bad}");
        }
        assert_eq!((temperature("0"), temperature("0.7"), top_p("1")), (Ok(0.0), Ok(0.7), Ok(1.0)));
    }
}
