//! What can be told of a run that is prepared, before it is trained.
//!
//! Where it does not fit in the memory that is available, the smallest change that would is looked for, from what costs
//! nothing but time to what changes the result:
//!
//! 1. recompute activations (same bits, about a third slower);
//! 2. a smaller micro-batch with as many more micro-steps (same bits);
//! 3. shorter sequences (rows are cut: another result).

use super::prepare::{self, Prepared};
use super::workload;
use crate::backend::Backend;
use crate::config::spec::{GradientCheckpointing, Quantization, Spec};
use crate::data::SplitReport;
use crate::model::memory::MemoryPlan;
use crate::plan::page::{
    AdapterFacts, BaseFacts, Change, DataFacts, Facts, Memory, MemoryPart, MicroBatchFacts, Parameters, Rows,
    Steps, Survey,
};
use crate::units::Bytes;
use serde_json::Value;

/// Surveys a run. `available` is the memory that can be had, `prepared_in` the seconds that the preparation took.
pub fn survey<B: Backend>(
    spec: &Spec,
    backend: &B,
    prepared: &Prepared,
    available: Option<Bytes>,
    prepared_in: f64,
) -> Survey {
    let memory = prepare::memory_plan(spec, backend, prepared);
    Survey {
        facts: facts(spec, backend, prepared, &memory, available),
        workload: workload::workload(spec, prepared, memory.recompute),
        setup: workload::setup(spec, backend, &prepared.base, &prepared.layout, memory.recompute),
        prepared_in,
    }
}

fn facts<B: Backend>(
    spec: &Spec,
    backend: &B,
    prepared: &Prepared,
    memory: &MemoryPlan,
    available: Option<Bytes>,
) -> Facts {
    let (base, config) = (&prepared.base, &prepared.base.config);
    let report = &prepared.data.report;
    let steps = prepare::count_steps(spec, &prepared.data.train);
    let batch = prepare::largest_micro_batch(spec, &prepared.data);
    let trainable = prepared.layout.parameters();
    let parameters = base.total_parameters() + trainable;
    let change = available.filter(|available| memory.total() > *available).and_then(|available| {
        let total = |spec: &Spec| prepare::memory_plan(spec, backend, prepared).total();
        smallest_change(spec, memory.recompute, available, total)
    });
    Facts {
        run: spec.run.name.clone(),
        base: BaseFacts {
            path: spec.model.base.display().to_string(),
            hash: base.hash.clone(),
            model_type: config.family.model_type().to_string(),
            layers: config.layers as u64,
            hidden_size: config.hidden_size as u64,
            vocab_size: config.vocab_size as u64,
            quantization: match base.quantization {
                Quantization::Nf4 => "nf4".into(),
                Quantization::None => "none".into(),
            },
            double_quant: base.double_quant,
        },
        adapter: AdapterFacts {
            r: spec.lora.r as u64,
            alpha: spec.lora.alpha,
            target_modules: spec.lora.target_modules.clone(),
            layers: spec.lora.layers.map(|(first, last)| (first as u64, last as u64)),
        },
        parameters: Parameters {
            trainable,
            total: parameters,
            share: trainable as f64 / parameters.max(1) as f64,
        },
        data: DataFacts { train: rows(&report.train), eval: report.eval.as_ref().map(rows) },
        steps: Steps {
            total: steps.total,
            epochs: steps.epochs,
            tokens_per_epoch: steps.tokens_per_epoch,
            sequences_per_epoch: steps.sequences_per_epoch,
            sequences_per_step: prepare::sequences_per_step(spec) as u64,
            micro_batch_size: spec.train.micro_batch_size as u64,
            sequence_length: spec.data.sequence_length as u64,
        },
        memory: Memory {
            parts: memory
                .parts
                .iter()
                .map(|part| MemoryPart { name: part.name.to_string(), bytes: part.bytes })
                .collect(),
            total: memory.total(),
            available,
            fits: available.map(|available| memory.total() <= available),
            recompute: memory.recompute,
            gradient_checkpointing: match spec.train.gradient_checkpointing {
                GradientCheckpointing::Auto => "auto".into(),
                GradientCheckpointing::None => "none".into(),
                GradientCheckpointing::Full => "full".into(),
            },
            micro_batch: MicroBatchFacts {
                tokens: batch.tokens as u64,
                labelled: batch.labelled as u64,
                longest: batch.longest as u64,
            },
        },
        change,
    }
}

fn rows(report: &SplitReport) -> Rows {
    let more = match serde_json::to_value(report) {
        Ok(Value::Object(mut all)) => {
            ["rows", "tokens", "trainable_tokens"].iter().for_each(|name| drop(all.shift_remove(*name)));
            all
        }
        _ => serde_json::Map::new(),
    };
    Rows { rows: report.rows, tokens: report.tokens, trainable_tokens: report.trainable_tokens, more }
}

/// The smallest change after which `total` is within `available`.
fn smallest_change(
    spec: &Spec,
    recompute: bool,
    available: Bytes,
    total: impl Fn(&Spec) -> Bytes,
) -> Option<Change> {
    let mut changed = spec.clone();
    let mut set = Vec::new();
    let found = |set: &[String], total, same_result| Some(Change { set: set.to_vec(), total, same_result });

    if !recompute {
        changed.train.gradient_checkpointing = GradientCheckpointing::Full;
        set.push("train.gradient_checkpointing=full".to_string());
        let bytes = total(&changed);
        if bytes <= available {
            return found(&set, bytes, true);
        }
    }
    let product = prepare::sequences_per_step(spec);
    let kept = set.clone();
    for size in (1..spec.train.micro_batch_size).rev().filter(|size| product.is_multiple_of(*size)) {
        changed.train.micro_batch_size = size;
        changed.train.gradient_accumulation_steps = product / size;
        set.clone_from(&kept);
        set.push(format!("train.micro_batch_size={size}"));
        set.push(format!("train.gradient_accumulation_steps={}", product / size));
        let bytes = total(&changed);
        if bytes <= available {
            return found(&set, bytes, true);
        }
    }
    // The longest multiple of 64 that fits, by bisection: memory grows with the length.
    const UNIT: usize = 64;
    let mut at = |units: usize| {
        changed.data.sequence_length = units * UNIT;
        total(&changed)
    };
    let (mut fits, mut too_long) = (0, spec.data.sequence_length.div_ceil(UNIT));
    while too_long - fits > 1 {
        let middle = fits + (too_long - fits) / 2;
        if at(middle) <= available {
            fits = middle;
        } else {
            too_long = middle;
        }
    }
    if fits == 0 {
        return None;
    }
    let bytes = at(fits);
    set.push(format!("data.sequence_length={}", fits * UNIT));
    found(&set, bytes, false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// A model of memory: what is kept, times micro-batch, times length.
    fn total(spec: &Spec) -> Bytes {
        let kept = if spec.train.gradient_checkpointing == GradientCheckpointing::Full { 1 } else { 8 };
        Bytes(1000 + (kept * spec.train.micro_batch_size * spec.data.sequence_length) as u64)
    }

    fn change(available: u64) -> Option<(Vec<String>, bool)> {
        let text = "[model]\nbase = \"b\"\n[data]\ntrain = \"t\"\n[train]\nmicro_batch_size = 6\n\
                    gradient_accumulation_steps = 2\n";
        let spec = Spec::parse(text, "a.toml", Path::new("/"), &[]).unwrap();
        let change = smallest_change(&spec, false, Bytes(available), total)?;
        assert!(change.total.0 <= available);
        Some((change.set, change.same_result))
    }

    #[test]
    fn the_smallest_change_is_offered() {
        let set = |texts: &[&str], same| Some((texts.iter().map(|s| s.to_string()).collect(), same));
        let full = "train.gradient_checkpointing=full";
        assert_eq!(change(1000 + 6 * 1024), set(&[full], true));
        // Five micro-batches do not divide the twelve sequences of a step.
        let four = [full, "train.micro_batch_size=4", "train.gradient_accumulation_steps=3"];
        assert_eq!(change(1000 + 6 * 1024 - 1), set(&four, true));
        let one = [full, "train.micro_batch_size=1", "train.gradient_accumulation_steps=12"];
        assert_eq!(change(1000 + 1024), set(&one, true));
        let short = [one[0], one[1], one[2], "data.sequence_length=448"];
        assert_eq!(change(1000 + 500), set(&short, false));
        assert_eq!(change(1000 + 63), None);
    }
}
