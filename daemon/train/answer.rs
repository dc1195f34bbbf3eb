//! Asking a model, with or without an adapter: from a conversation to the text of an answer.
//!
//! The tokens come from [`crate::model::generate`]. Text is told as soon as it is certain: a token may be a part of a
//! character, and what a decoder prints for it may change with the next token, so [`TextStream`] holds back what ends
//! in an incomplete character.

use crate::backend::{Backend, Role};
use crate::checkpoint::{NamedTensor, PeftError, read_adapter};
use crate::config::spec::{LoraSpec, Quantization};
use crate::data::{ChatTokenizer, TokenizerError};
use crate::model::adapter::{Adapter, AdapterLayout, Module};
use crate::model::config::ModelConfig;
use crate::model::decoder::Decoder;
use crate::model::generate::{self, Finish, GenerateError, Limits, Sampler, Sampling};
use crate::model::weights::{Base, WeightsError};
use crate::train::observer::{Event, Observer};
use crate::train::prepare::in_layout_order;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// Tokenizer or chat template.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The base.
    #[error(transparent)]
    Base(#[from] WeightsError),
    /// The adapter's files.
    #[error(transparent)]
    Adapter(#[from] PeftError),
    /// The adapter belongs to another model.
    #[error(
        "the adapter {adapter} does not fit the model {model}: {why}",
        adapter = .adapter.display(),
        model = .model.display()
    )]
    Misfit {
        /// Adapter directory.
        adapter: PathBuf,
        /// Model directory.
        model: PathBuf,
        /// What differs.
        why: String,
    },
    /// The model cannot start or go on.
    #[error(transparent)]
    Generate(#[from] GenerateError),
}

/// What a model is asked with.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// Model directory.
    pub model: &'a Path,
    /// Adapter directory.
    pub adapter: Option<&'a Path>,
    /// How the base's linear weights are held; as in training, or the adapter meets another base.
    pub quantization: Quantization,
    /// Quantise the absmax values too.
    pub double_quant: bool,
}

/// A model that answers.
pub struct Answerer<B: Backend> {
    /// Its tokenizer.
    pub tokenizer: ChatTokenizer,
    decoder: Decoder<B>,
    layout: AdapterLayout,
    adapter: Adapter<B>,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Tokens, without the end token.
    pub tokens: Vec<u32>,
    /// Their text, without special tokens.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
}

impl<B: Backend> Answerer<B> {
    /// Loads base and adapter. Quantised bases are cached below `cache`.
    pub fn load(
        backend: B,
        question: Question<'_>,
        cache: &Path,
        observer: &mut dyn Observer,
    ) -> Result<Self, AnswerError> {
        let Question { model, adapter, quantization, double_quant } = question;
        let config = ModelConfig::load(model).map_err(WeightsError::from)?;
        let tokenizer = ChatTokenizer::load(model)?;
        let (layout, values) = match adapter {
            Some(dir) => adapter_of(dir, model, &config)?,
            None => (AdapterLayout::new(&config, 1, 0.0, 0.0, &[], None), Vec::new()),
        };
        let mut report = |layer: usize, layers: usize| {
            observer.observe(Event::Preparing {
                what: "loading base",
                done: layer as u64,
                total: layers as u64,
            });
        };
        let base = Base::load(model, quantization, double_quant, &cache.join("bases"), &mut report)?;
        let decoder = Decoder::new(backend, base);
        let mut adapter = Adapter::zeros(&decoder.backend, &layout, Role::Weights);
        for (tensor, values) in adapter.tensors.iter_mut().zip(&values) {
            decoder.backend.write(tensor, values);
        }
        Ok(Self { tokenizer, decoder, layout, adapter })
    }

    /// Answers a prompt of tokens; `listen` gets the text piece by piece and may end it.
    pub fn answer(
        &self,
        prompt: &[u32],
        max_new_tokens: usize,
        sampling: Sampling,
        listen: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Answer, AnswerError> {
        let end = self.tokenizer.eos_ids();
        let mut stream = TextStream::new(&self.tokenizer);
        let (tokens, finish) = generate::generate(
            &self.decoder,
            &self.layout,
            &self.adapter,
            prompt,
            Limits { max_new_tokens, end: &end },
            &mut Sampler::new(sampling),
            &mut |token| match stream.push(token) {
                Some(piece) => listen(&piece),
                None => ControlFlow::Continue(()),
            },
        )?;
        if let Some(piece) = stream.finish() {
            let _ = listen(&piece);
        }
        let text = self.tokenizer.decode(&tokens, true);
        Ok(Answer { tokens, text, finish })
    }
}

/// Layout and values of an adapter for a model.
fn adapter_of(
    dir: &Path,
    model: &Path,
    config: &ModelConfig,
) -> Result<(AdapterLayout, Vec<Vec<f32>>), AnswerError> {
    let (found, mut tensors) = read_adapter(dir)?;
    let misfit = |why| AnswerError::Misfit { adapter: dir.into(), model: model.into(), why };
    let scale = LoraSpec {
        r: found.r,
        alpha: found.alpha,
        dropout: found.dropout,
        target_modules: found.target_modules.clone(),
        use_rslora: found.use_rslora,
        layers: None,
        init_from: None,
    }
    .scale();
    let modules: Vec<Module> =
        Module::ALL.into_iter().filter(|m| found.target_modules.iter().any(|t| t == m.name())).collect();
    let layers = found.layers_to_transform.as_deref();
    let range = layers.and_then(|layers| Some((*layers.iter().min()?, layers.iter().max()?.checked_add(1)?)));
    if let Some((_, last)) = range
        && last > config.layers
    {
        return Err(misfit(format!("it adapts layer {}, the model has {} layers", last - 1, config.layers)));
    }
    let layout = AdapterLayout::new(config, found.r, scale, 0.0, &modules, range);
    // A layout is a range of layers, an adapter any set of them: those between get zeros, which change nothing.
    if let Some(layers) = layers {
        for i in 0..layout.tensors() {
            if !layers.contains(&layout.sites[i / 2].layer) {
                let shape = layout.shape(i);
                let data = vec![0.0; shape.iter().product()];
                tensors.push(NamedTensor { name: layout.name(i), shape: shape.to_vec(), data });
            }
        }
    }
    let values = in_layout_order(&layout, &tensors).map_err(misfit)?;
    Ok((layout, values))
}

/// Text of tokens that come one by one.
///
/// Decoders work on sequences: a token can be a part of a character, and SentencePiece drops the space before the first
/// word of a sequence but not of others. So what is decoded is a short window (the tokens told last and those not told
/// yet), and a piece is what the window's text grew by. The cost per token does not depend on the length of the text.
pub struct TextStream<'t> {
    tokenizer: &'t ChatTokenizer,
    window: Vec<u32>,
    /// Tokens of the window that have been told.
    told: usize,
}

impl<'t> TextStream<'t> {
    /// An empty text. Special tokens are left out.
    pub fn new(tokenizer: &'t ChatTokenizer) -> Self {
        Self { tokenizer, window: Vec::new(), told: 0 }
    }

    /// Adds a token; the text that is certain now, if there is any.
    pub fn push(&mut self, token: u32) -> Option<String> {
        self.window.push(token);
        let piece = self.grown()?;
        if piece.ends_with(char::REPLACEMENT_CHARACTER) {
            return None; // the character may not be complete
        }
        self.window.drain(..self.told);
        self.told = self.window.len();
        Some(piece)
    }

    /// What is left at the end: a character that was never completed.
    pub fn finish(mut self) -> Option<String> {
        let piece = self.grown();
        self.window.clear();
        piece
    }

    /// What the window's text has more than that of its told tokens.
    fn grown(&self) -> Option<String> {
        let before = self.tokenizer.decode(&self.window[..self.told], true);
        let now = self.tokenizer.decode(&self.window, true);
        now.strip_prefix(&before).filter(|piece| !piece.is_empty()).map(str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::collections::BTreeMap;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    /// A tokenizer with one token per byte.
    fn bytes() -> ChatTokenizer {
        let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let vocab: BTreeMap<String, usize> = alphabet.iter().map(|c| c.to_string()).zip(0..).collect();
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let tokenizer = json!({
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        ChatTokenizer::load(dir.path()).unwrap()
    }

    #[test]
    fn characters_are_told_whole() {
        let tokenizer = bytes();
        let text = "a é ← 🤖!";
        let tokens = tokenizer.encode_text(text, false).unwrap();
        assert_eq!(tokens.len(), text.len(), "one token a byte");
        let mut stream = TextStream::new(&tokenizer);
        let pieces: Vec<String> = tokens.iter().filter_map(|&token| stream.push(token)).collect();
        assert_eq!(pieces, ["a", " ", "é", " ", "←", " ", "🤖", "!"]);
        assert_eq!(stream.finish(), None);
    }

    #[test]
    fn a_broken_character_is_told_at_the_end() {
        let tokenizer = bytes();
        let tokens = tokenizer.encode_text("x🤖", false).unwrap();
        let mut stream = TextStream::new(&tokenizer);
        let pieces: Vec<String> = tokens[..3].iter().filter_map(|&token| stream.push(token)).collect();
        assert_eq!(pieces, ["x"]);
        assert_eq!(stream.finish().as_deref(), Some("\u{FFFD}"));
    }
}
