//! Generation: from the tokens of a prompt to the tokens of an answer, with a key-value cache.
//!
//! ```text
//!   prompt ──► prefill, CHUNK tokens at a time ──► logits ──► sampler ──► token ──┬─► end token, or enough: finish
//!                                                    ▲                            │
//!                                                    └── one step over the cache ─┘
//! ```
//!
//! **Sampling.** Temperature 0 takes the most likely token (of equals the one with the lowest id) and draws nothing.
//! Otherwise the probabilities are softmax(logits / temperature), in f64, and the nucleus (arXiv 1904.09751) is kept:
//! the smallest set of most likely tokens whose probabilities sum up to at least `top_p`, the lowest ids first among
//! equals. One of it is chosen by the inverse of the cumulative sum at a number in [0, 1) with 53 random bits: two
//! words of the Philox stream [`STREAM`] of the seed per token. So the answer is a function of (base, adapter, prompt,
//! temperature, top_p, seed), whatever the number of threads.

use super::adapter::{Adapter, AdapterLayout};
use super::decoder::{Decoder, KeyValueCache, Workspace};
use crate::backend::philox::Philox;
use crate::backend::{Backend, Batch};
use std::ops::ControlFlow;

/// Tokens of the prompt that are computed at once: enough to fill the matrix products, little enough memory.
pub const CHUNK: usize = 128;

/// Philox stream of the sampler; LoRA's initial values use the low ones.
pub const STREAM: u64 = u64::MAX;

/// Why nothing can be generated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GenerateError {
    /// There is no token to start from.
    #[error("the prompt is empty: it has no token to start from")]
    Empty,
    /// The prompt does not leave room for an answer.
    #[error(
        "the prompt has {tokens} tokens, the model can see {positions}: shorten it (max_position_embeddings in \
         config.json)"
    )]
    TooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// `max_position_embeddings`.
        positions: usize,
    },
    /// The tokenizer does not belong to the model.
    #[error(
        "the prompt has token {token}, but the model's vocabulary has {vocabulary} entries: tokenizer.json does not \
         belong to this model"
    )]
    Vocabulary {
        /// The id.
        token: u32,
        /// `vocab_size`.
        vocabulary: usize,
    },
    /// The model computes no number.
    #[error("after {tokens} tokens the model's logits are not finite: the base or the adapter is damaged")]
    NotFinite {
        /// Tokens before.
        tokens: usize,
    },
}

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divisor of the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// Probability mass of the nucleus, in (0, 1]; 1 keeps every token.
    pub top_p: f64,
    /// Seed.
    pub seed: u64,
}

impl Sampling {
    /// The most likely token, always.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 0 };
}

/// Chooses tokens.
pub struct Sampler {
    sampling: Sampling,
    random: Philox,
}

impl Sampler {
    /// A sampler at the beginning of its stream.
    pub fn new(sampling: Sampling) -> Self {
        Self { sampling, random: Philox::new(sampling.seed, STREAM) }
    }

    /// The next token, or `None` when the logits hold NaN or +∞, or nothing but −∞.
    pub fn choose(&mut self, logits: &[f32]) -> Option<u32> {
        let mut best = 0;
        for (i, &logit) in logits.iter().enumerate() {
            if logit.is_nan() || logit == f32::INFINITY {
                return None;
            }
            if logit > logits[best] {
                best = i;
            }
        }
        let highest = f64::from(*logits.get(best)?);
        if highest == f64::NEG_INFINITY {
            return None;
        }
        if self.sampling.temperature <= 0.0 {
            return Some(best as u32);
        }
        let weight = |i: u32| ((f64::from(logits[i as usize]) - highest) / self.sampling.temperature).exp();
        let mut tokens: Vec<(u32, f64)> = (0..logits.len() as u32).map(|i| (i, weight(i))).collect();
        tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let total: f64 = tokens.iter().map(|(_, w)| w).sum();
        let mut nucleus = 0.0;
        let kept = tokens
            .iter()
            .position(|(_, w)| {
                nucleus += w;
                nucleus >= self.sampling.top_p * total
            })
            .map_or(tokens.len(), |last| last + 1);
        tokens.truncate(kept);
        let threshold = self.uniform() * nucleus;
        let mut sum = 0.0;
        let chosen = tokens.iter().find(|(_, w)| {
            sum += w;
            sum > threshold
        });
        // Rounding can leave the sum below a threshold just below it.
        chosen.or(tokens.last()).map(|&(token, _)| token)
    }

    /// Uniform in [0, 1), 53 bits.
    fn uniform(&mut self) -> f64 {
        let (high, low) = (self.random.next_u32() >> 5, self.random.next_u32() >> 6);
        (f64::from(high) * f64::from(1u32 << 26) + f64::from(low)) / (1u64 << 53) as f64
    }
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Finish {
    /// The model said that it is done; the end token is not part of the answer.
    End,
    /// The answer has as many tokens as were allowed.
    Length,
    /// The model cannot see further.
    Context,
    /// The listener had enough.
    Stopped,
}

/// When an answer ends.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    /// Most tokens of the answer.
    pub max_new_tokens: usize,
    /// Tokens that end it.
    pub end: &'a [u32],
}

/// Answers `prompt`; `listen` gets every token as it is chosen.
///
/// Takes `min(prompt + max_new_tokens, max_position_embeddings)` · layers · 2 · kv_heads · head_dim elements for keys
/// and values, and the activations of [`CHUNK`] tokens.
pub fn generate<B: Backend>(
    decoder: &Decoder<B>,
    layout: &AdapterLayout,
    adapter: &Adapter<B>,
    prompt: &[u32],
    limits: Limits<'_>,
    sampler: &mut Sampler,
    listen: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<(Vec<u32>, Finish), GenerateError> {
    let (positions, vocabulary) = (decoder.config.max_position_embeddings, decoder.config.vocab_size);
    if prompt.is_empty() {
        return Err(GenerateError::Empty);
    }
    if prompt.len() > positions {
        return Err(GenerateError::TooLong { tokens: prompt.len(), positions });
    }
    if let Some(&token) = prompt.iter().find(|&&token| token as usize >= vocabulary) {
        return Err(GenerateError::Vocabulary { token, vocabulary });
    }
    let capacity = positions.min(prompt.len().saturating_add(limits.max_new_tokens));
    let mut cache = KeyValueCache::new(decoder, capacity);
    let mut work = Workspace::for_evaluation(decoder, layout, prompt.len().min(CHUNK));
    let mut step = |tokens: &[u32]| {
        let batch = decoder.batch(continuation(tokens, cache.len()));
        decoder.generate_step(&batch, tokens.len(), layout, adapter, &mut cache, &mut work)
    };
    let mut answer = Vec::new();
    let mut logits = Vec::new();
    for chunk in prompt.chunks(CHUNK) {
        logits = step(chunk);
    }
    loop {
        if answer.len() >= limits.max_new_tokens {
            return Ok((answer, Finish::Length));
        }
        let tokens = prompt.len() + answer.len();
        let token = sampler.choose(&logits).ok_or(GenerateError::NotFinite { tokens })?;
        if limits.end.contains(&token) {
            return Ok((answer, Finish::End));
        }
        answer.push(token);
        if listen(token).is_break() {
            return Ok((answer, Finish::Stopped));
        }
        if tokens + 1 > capacity {
            return Ok((answer, Finish::Context));
        }
        if answer.len() < limits.max_new_tokens {
            logits = step(&[token]);
        }
    }
}

/// Tokens of one text from position `past` on, as a micro-batch.
fn continuation(tokens: &[u32], past: usize) -> Batch {
    let positions: Vec<u32> = (past as u32..).take(tokens.len()).collect();
    let mut batch = Batch::default();
    batch.push(tokens, &vec![-1; tokens.len()], &positions, &[0, tokens.len() as u32], 0);
    batch
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::config::spec::Quantization;
    use crate::model::adapter::Module;
    use crate::model::weights::Base;
    use std::path::PathBuf;

    fn golden(family: &str) -> Decoder<Cpu<f32>> {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models").join(family);
        let cache = tempfile::tempdir().unwrap();
        let base = Base::load(&dir.join("model"), Quantization::Nf4, true, cache.path(), &mut |_, _| {});
        Decoder::new(Cpu::new(), base.unwrap())
    }

    /// An adapter that changes something: both halves random.
    fn adapter(decoder: &Decoder<Cpu<f32>>) -> (AdapterLayout, Adapter<Cpu<f32>>) {
        let layout = AdapterLayout::new(&decoder.config, 4, 2.0, 0.1, &Module::ALL, None);
        let mut adapter = Adapter::zeros(&decoder.backend, &layout, crate::backend::Role::Weights);
        let mut random = Philox::new(3, 4);
        for (i, tensor) in adapter.tensors.iter_mut().enumerate() {
            let len = layout.shape(i).iter().product();
            let values: Vec<f32> = (0..len).map(|_| random.next_f32() - 0.5).collect();
            decoder.backend.write(tensor, &values);
        }
        (layout, adapter)
    }

    /// The truth: every step computes all logits of the whole text, without a cache.
    fn from_scratch(
        decoder: &Decoder<Cpu<f32>>,
        layout: &AdapterLayout,
        adapter: &Adapter<Cpu<f32>>,
        prompt: &[u32],
        new: usize,
    ) -> Vec<u32> {
        let mut text = prompt.to_vec();
        let mut work = Workspace::for_evaluation(decoder, layout, prompt.len() + new);
        for _ in 0..new {
            let batch = decoder.batch(continuation(&text, 0));
            let logits = decoder.all_logits(&batch, text.len(), layout, adapter, &mut work);
            let last = logits.last().unwrap();
            let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b]).then(b.cmp(&a))).unwrap();
            text.push(best as u32);
        }
        text.split_off(prompt.len())
    }

    #[test]
    fn the_cache_changes_no_token() {
        // Mistral has a sliding window, Qwen3 norms per head, Qwen2 biases.
        for family in ["llama", "mistral", "qwen2", "qwen3"] {
            let decoder = golden(family);
            let (layout, adapter) = adapter(&decoder);
            let vocabulary = decoder.config.vocab_size as u32;
            for (length, new) in [(1, 20), (7, 20), (CHUNK + 9, 12)] {
                let prompt: Vec<u32> = (0..length as u32).map(|i| (i * 37 + 11) % vocabulary).collect();
                let expected = from_scratch(&decoder, &layout, &adapter, &prompt, new);
                let mut heard = Vec::new();
                let limits = Limits { max_new_tokens: new, end: &[] };
                let (answer, finish) = generate(
                    &decoder,
                    &layout,
                    &adapter,
                    &prompt,
                    limits,
                    &mut Sampler::new(Sampling::GREEDY),
                    &mut |token| {
                        heard.push(token);
                        ControlFlow::Continue(())
                    },
                )
                .unwrap();
                assert_eq!(answer, expected, "{family}, prompt of {length}");
                assert_eq!((heard, finish), (expected, Finish::Length));
            }
        }
    }

    #[test]
    fn an_answer_ends_for_a_reason() {
        let decoder = golden("llama");
        let (layout, adapter) = adapter(&decoder);
        let positions = decoder.config.max_position_embeddings;
        let run = |prompt: &[u32], max_new_tokens, end: &[u32], enough: usize| {
            let mut heard = 0;
            generate(
                &decoder,
                &layout,
                &adapter,
                prompt,
                Limits { max_new_tokens, end },
                &mut Sampler::new(Sampling::GREEDY),
                &mut |_| {
                    heard += 1;
                    if heard == enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                },
            )
        };
        let (answer, finish) = run(&[1, 2, 3], 6, &[], 0).unwrap();
        assert_eq!((answer.len(), finish), (6, Finish::Length));
        // The same answer, cut before the first occurrence of its fourth token.
        let end = answer[3];
        let cut = answer.iter().position(|&t| t == end).unwrap();
        assert_eq!(run(&[1, 2, 3], 6, &[end], 0).unwrap(), (answer[..cut].to_vec(), Finish::End));
        assert_eq!(run(&[1, 2, 3], 6, &[], 2).unwrap(), (answer[..2].to_vec(), Finish::Stopped));
        assert_eq!(run(&[1, 2, 3], 0, &[], 0).unwrap(), (Vec::new(), Finish::Length));
        // The last token that is chosen needs no place of its own.
        let full = vec![1; positions];
        let (answer, finish) = run(&full[2..], usize::MAX, &[], 0).unwrap();
        assert_eq!((answer.len(), finish), (3, Finish::Context));
        assert_eq!(run(&full, usize::MAX, &[], 0).unwrap().0.len(), 1);
        let tokens = positions + 1;
        assert_eq!(run(&vec![1; tokens], 1, &[], 0), Err(GenerateError::TooLong { tokens, positions }));
        assert_eq!(run(&[], 1, &[], 0), Err(GenerateError::Empty));
        let vocabulary = decoder.config.vocab_size;
        let error = GenerateError::Vocabulary { token: vocabulary as u32, vocabulary };
        assert_eq!(run(&[vocabulary as u32], 1, &[], 0), Err(error));
    }

    #[test]
    fn sampling_follows_the_probabilities() {
        let logits = [0.5f32, 2.0, -1.0, 1.0];
        let weights = logits.map(|l| (f64::from(l) / 0.7).exp());
        let total: f64 = weights.iter().sum();
        let mut sampler = Sampler::new(Sampling { temperature: 0.7, top_p: 1.0, seed: 5 });
        let mut counts = [0.0; 4];
        let draws = 40_000;
        for _ in 0..draws {
            counts[sampler.choose(&logits).unwrap() as usize] += 1.0;
        }
        for (count, weight) in counts.iter().zip(weights) {
            let p = weight / total;
            let deviation = (f64::from(draws) * p * (1.0 - p)).sqrt();
            assert!((count - f64::from(draws) * p).abs() < 5.0 * deviation, "{counts:?}");
        }
    }

    #[test]
    fn the_nucleus_is_the_smallest_set_that_is_enough() {
        // Probabilities 0.5, 0.25, 0.125, 0.125.
        let logits = [0.0f32, -2.0, -1.0, -2.0].map(|l| l * std::f32::consts::LN_2);
        let seen = |top_p| {
            let mut sampler = Sampler::new(Sampling { temperature: 1.0, top_p, seed: 1 });
            let tokens: std::collections::BTreeSet<u32> =
                (0..2000).map(|_| sampler.choose(&logits).unwrap()).collect();
            tokens.into_iter().collect::<Vec<_>>()
        };
        assert_eq!(seen(0.4), [0]);
        assert_eq!(seen(0.6), [0, 2]);
        assert_eq!(seen(0.8), [0, 1, 2]);
        assert_eq!(seen(1.0), [0, 1, 2, 3]);
    }

    #[test]
    fn a_seed_gives_the_same_tokens_again() {
        let draw = |seed| {
            let mut sampler = Sampler::new(Sampling { temperature: 1.0, top_p: 0.9, seed });
            (0..50).map(|_| sampler.choose(&[0.0; 100]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn what_is_no_number_is_noticed() {
        for temperature in [0.0, 1.0] {
            let mut sampler = Sampler::new(Sampling { temperature, top_p: 1.0, seed: 0 });
            assert_eq!(sampler.choose(&[0.0, f32::NAN]), None);
            assert_eq!(sampler.choose(&[0.0, f32::INFINITY]), None);
            assert_eq!(sampler.choose(&[f32::NEG_INFINITY; 2]), None);
            assert_eq!(sampler.choose(&[]), None);
            assert_eq!(sampler.choose(&[f32::NEG_INFINITY, -3.0]), Some(1));
        }
        assert_eq!(Sampler::new(Sampling::GREEDY).choose(&[1.0, 3.0, 3.0]), Some(1));
    }
}
