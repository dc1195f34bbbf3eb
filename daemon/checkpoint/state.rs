//! The small part of a checkpoint: counters, sums, history, and what the run was computed from.
//!
//! Integers are exact in JSON. Floats that feed the computation are written with their bits beside the number a person
//! reads, `{"value": 2.31, "bits": "40027ae147ae147b"}`, and read from the bits: a resumed run continues with the very
//! sum that was stored, NaN and −0.0 included.

use serde::{Deserialize, Serialize};

/// Everything of a run that is not a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainingState {
    /// Optimizer steps completed.
    pub step: u64,
    /// Sequences completed within the current step.
    pub micro_step: u64,
    /// Epoch of the cursor, from 0.
    pub epoch: u64,
    /// Next sequence in the plan of that epoch.
    pub sequence_index: u64,
    /// Sum of the losses of the labelled tokens of the current step.
    #[serde(with = "exact")]
    pub loss_sum: f64,
    /// Labelled tokens of the current step so far.
    pub labelled: u64,
    /// Tokens of the current step so far.
    pub tokens_in_step: u64,
    /// Tokens of all steps, the current one included.
    pub total_tokens: u64,
    /// Seconds spent training, over all attempts.
    #[serde(with = "exact")]
    pub total_seconds: f64,
    /// Lowest held-out loss so far.
    #[serde(with = "exact_option")]
    pub best_eval_loss: Option<f64>,
    /// Step at which it was measured.
    pub best_step: Option<u64>,
    /// Evaluations since then.
    pub evals_without_improvement: u64,
    /// Held-out loss before the first step.
    #[serde(with = "exact_option")]
    pub baseline_loss: Option<f64>,
    /// Held-out loss of the latest evaluation.
    #[serde(with = "exact_option")]
    pub last_eval_loss: Option<f64>,
    /// What `trainer_state.json` lists as `log_history`.
    pub log_history: Vec<serde_json::Value>,
    /// What the run is computed from.
    pub identity: Identity,
}

/// Content hashes of everything the result is a function of. A checkpoint may only be continued under the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Weights and configuration of the base.
    pub base: String,
    /// Training and held-out files, in order.
    pub data: String,
    /// Chat template.
    pub template: String,
    /// Tokenizer.
    pub tokenizer: String,
    /// Keys of the spec that determine the result (`Spec::result_hash`).
    pub spec: String,
    /// Adapter the run started from.
    pub init_adapter: Option<String>,
    /// Backend and the kind of arithmetic it does.
    pub backend: String,
}

/// What a run is computed from has changed since the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityMismatch {
    /// `(what, in the checkpoint, now)`.
    pub changes: Vec<(&'static str, String, String)>,
}

impl std::error::Error for IdentityMismatch {}

impl std::fmt::Display for IdentityMismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the checkpoint cannot be continued, because its result would not be that of either run:")?;
        for (what, before, now) in &self.changes {
            write!(f, "\n  {what} changed: the checkpoint has {before}, now it is {now}")?;
        }
        write!(
            f,
            "\nRestore what changed to continue this run, or give another --output to start a new one from the \
             beginning."
        )
    }
}

impl Identity {
    /// Whether a checkpoint with this identity may be continued in a process with `current`.
    pub fn check(&self, current: &Identity) -> Result<(), IdentityMismatch> {
        let none = || "none".to_string();
        let pairs = [
            ("the base model", self.base.clone(), current.base.clone()),
            ("the data", self.data.clone(), current.data.clone()),
            ("the chat template", self.template.clone(), current.template.clone()),
            ("the tokenizer", self.tokenizer.clone(), current.tokenizer.clone()),
            ("the spec", self.spec.clone(), current.spec.clone()),
            (
                "the adapter of lora.init_from",
                self.init_adapter.clone().unwrap_or_else(none),
                current.init_adapter.clone().unwrap_or_else(none),
            ),
            ("the backend", self.backend.clone(), current.backend.clone()),
        ];
        let changes: Vec<_> = pairs.into_iter().filter(|(_, before, now)| before != now).collect();
        if changes.is_empty() { Ok(()) } else { Err(IdentityMismatch { changes }) }
    }
}

/// A float with its bits.
#[derive(Serialize, Deserialize)]
struct Exact {
    /// For people; `null` where JSON has no word for it.
    value: Option<f64>,
    /// IEEE 754 binary64, in hexadecimal, the sign first.
    bits: String,
}

impl Exact {
    fn new(value: f64) -> Exact {
        Exact { value: value.is_finite().then_some(value), bits: format!("{:016x}", value.to_bits()) }
    }

    fn get<E: serde::de::Error>(&self) -> Result<f64, E> {
        let digits = self.bits.len() == 16 && self.bits.bytes().all(|byte| byte.is_ascii_hexdigit());
        match u64::from_str_radix(&self.bits, 16) {
            Ok(bits) if digits => Ok(f64::from_bits(bits)),
            _ => Err(E::custom(format!("{:?} are not the 16 hexadecimal digits of a float", self.bits))),
        }
    }
}

mod exact {
    use super::Exact;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        Exact::new(*value).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Exact::deserialize(deserializer)?.get()
    }
}

mod exact_option {
    use super::Exact;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
        value.map(Exact::new).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
        Option::<Exact>::deserialize(deserializer)?.map(|exact| exact.get()).transpose()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn identity() -> Identity {
        Identity {
            base: "b0".into(),
            data: "d0".into(),
            template: "t0".into(),
            tokenizer: "k0".into(),
            spec: "s0".into(),
            init_adapter: None,
            backend: "cpu".into(),
        }
    }

    pub(crate) fn state(step: u64, micro_step: u64) -> TrainingState {
        TrainingState {
            step,
            micro_step,
            epoch: 1,
            sequence_index: u64::MAX,
            loss_sum: 0.1 + step as f64,
            labelled: 7,
            tokens_in_step: 9,
            total_tokens: 1 << 60,
            total_seconds: 1.0 / 3.0,
            best_eval_loss: Some(2.5),
            best_step: Some(10),
            evals_without_improvement: 1,
            baseline_loss: None,
            last_eval_loss: Some(f64::MIN_POSITIVE),
            log_history: vec![serde_json::json!({"loss": 0.1 + 0.2, "step": step})],
            identity: identity(),
        }
    }

    proptest! {
        #[test]
        fn floats_come_back_bit_for_bit(bits in any::<u64>(), best in proptest::option::of(any::<u64>())) {
            let mut before = state(3, 0);
            before.loss_sum = f64::from_bits(bits);
            before.best_eval_loss = best.map(f64::from_bits);
            // A float without bits of its own (the history) needs serde_json's `float_roundtrip`.
            let plain = f64::from_bits(bits);
            if plain.is_finite() {
                before.log_history = vec![serde_json::json!({"loss": plain})];
            }
            let after: TrainingState = serde_json::from_str(&serde_json::to_string(&before).unwrap()).unwrap();
            prop_assert_eq!(after.loss_sum.to_bits(), bits);
            prop_assert_eq!(after.best_eval_loss.map(f64::to_bits), best);
            prop_assert_eq!(after.log_history, before.log_history);
        }
    }

    #[test]
    fn damaged_bits_are_refused() {
        for bits in ["", "xyz", "+000000000000001", "00000000000000000"] {
            let text = serde_json::to_string(&state(1, 0)).unwrap();
            let damaged = text.replacen(&format!("{:016x}", 1.1f64.to_bits()), bits, 1);
            assert_ne!(text, damaged);
            assert!(serde_json::from_str::<TrainingState>(&damaged).is_err(), "{bits:?}");
        }
    }

    #[test]
    fn a_changed_identity_names_what_changed_with_both_values() {
        let before = identity();
        assert_eq!(before.check(&identity()), Ok(()));
        let now = Identity { data: "d1".into(), init_adapter: Some("i1".into()), ..identity() };
        let message = before.check(&now).unwrap_err().to_string();
        for part in
            ["the data changed: the checkpoint has d0, now it is d1", "has none, now it is i1", "--output"]
        {
            assert!(message.contains(part), "{message}");
        }
        assert!(!message.contains("the spec"), "{message}");
        let fields: Vec<Identity> = vec![
            Identity { base: "x".into(), ..identity() },
            Identity { data: "x".into(), ..identity() },
            Identity { template: "x".into(), ..identity() },
            Identity { tokenizer: "x".into(), ..identity() },
            Identity { spec: "x".into(), ..identity() },
            Identity { init_adapter: Some("x".into()), ..identity() },
            Identity { backend: "x".into(), ..identity() },
        ];
        for changed in fields {
            assert_eq!(before.check(&changed).unwrap_err().changes.len(), 1, "{changed:?}");
        }
    }
}
