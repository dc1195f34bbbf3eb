//! What a run will do, counted before it does it: every micro-batch of every step, every evaluation, every checkpoint.

use super::prepare::{self, Prepared};
use crate::backend::Backend;
use crate::checkpoint::AdapterConfig;
use crate::config::spec::{Quantization, Spec};
use crate::data::{EpochPlan, Sequence, TokenRows};
use crate::model::adapter::AdapterLayout;
use crate::model::traffic::{NF4, Traffic};
use crate::model::weights::Base;
use crate::model::work::{Load, Work};
use crate::plan::throughput::{Amount, Setup, Workload};
use std::ops::Range;

/// Epochs that are counted one by one. Later ones differ by the packing of a sequence or two, and count as the last.
const COUNTED: u64 = 4;

/// What determines the speed of this run.
pub fn setup<B: Backend>(
    spec: &Spec,
    backend: &B,
    base: &Base,
    layout: &AdapterLayout,
    recompute: bool,
) -> Setup {
    let AdapterConfig { r, target_modules, layers_to_transform, .. } = prepare::adapter_config(spec);
    let layers = layers_to_transform.map_or(String::new(), |layers| {
        let ends = layers.first().zip(layers.last());
        ends.map_or(String::new(), |(first, last)| format!(" layers {first}..{}", last + 1))
    });
    let dropout = if layout.dropout > 0.0 { " dropout" } else { "" };
    Setup {
        base: base.hash.clone(),
        weights: match (base.quantization, base.double_quant) {
            (Quantization::Nf4, true) => "nf4-double",
            (Quantization::Nf4, false) => "nf4",
            (Quantization::None, _) => "none",
        }
        .into(),
        adapter: format!("r{r} {}{layers}{dropout}", target_modules.join(",")),
        recompute,
        sequence_length: spec.data.sequence_length as u64,
        packing: spec.data.packing,
        micro_batch: spec.train.micro_batch_size as u64,
        backend: backend.identity(),
        device: backend.device(),
        threads: rayon::current_num_threads() as u64,
    }
}

/// What there is to compute in a sequence of a plan, without making it.
fn of_planned(rows: &TokenRows, plan: &EpochPlan, sequence: usize, longest: usize) -> Load {
    let mut load = Load { labelled: plan.labelled(rows, sequence) as u64, ..Load::default() };
    for &row in plan.rows(sequence) {
        let length = rows.row_len(row as usize).min(longest) as u64;
        load.tokens += length;
        load.squares += length * length;
    }
    load
}

/// What there is to compute in some sequences.
pub fn of_sequences<'s>(sequences: impl IntoIterator<Item = &'s Sequence>) -> Load {
    let mut load = Load::default();
    for sequence in sequences {
        load.tokens += sequence.len() as u64;
        load.labelled += sequence.labelled() as u64;
        let ends = sequence.cu_seqlens.windows(2);
        load.squares += ends.map(|ends| u64::from(ends[1] - ends[0]).pow(2)).sum::<u64>();
    }
    load
}

/// The micro-batches of a plan: those of its steps, none over the end of one.
pub fn micro_batches(sequences: usize, per_step: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..sequences).step_by(per_step.max(1)).flat_map(move |first| {
        let last = (first + per_step).min(sequences);
        (first..last).step_by(size.max(1)).map(move |from| from..(from + size).min(last))
    })
}

/// What a micro-batch of a run costs.
struct Costs {
    work: Work,
    traffic: Traffic,
}

impl Costs {
    fn new(prepared: &Prepared, recompute: bool) -> Costs {
        let Prepared { base, layout, .. } = prepared;
        let weight = match base.quantization {
            Quantization::Nf4 => NF4,
            Quantization::None => 2.0,
        };
        Costs {
            work: Work::new(&base.config, layout, recompute),
            traffic: Traffic::new(&base.config, layout, recompute, weight),
        }
    }

    fn train(&self, load: Load) -> Amount {
        Amount { batches: 1, gflop: self.work.train(load), gigabytes: self.traffic.train(load) }
    }

    fn evaluate(&self, load: Load) -> Amount {
        Amount { batches: 1, gflop: self.work.evaluate(load), gigabytes: self.traffic.evaluate(load) }
    }
}

/// The same so many times.
fn many(amount: Amount, times: u64) -> Amount {
    Amount {
        batches: amount.batches.saturating_mul(times),
        gflop: amount.gflop * times as f64,
        gigabytes: amount.gigabytes * times as f64,
    }
}

/// An epoch: tokens and micro-batches up to the end of each of its steps.
struct Epoch(Vec<(u64, Amount)>);

impl Epoch {
    fn count(spec: &Spec, rows: &TokenRows, costs: &Costs, epoch: u64) -> Epoch {
        let data = &spec.data;
        let plan =
            EpochPlan::new(rows, data.sequence_length, data.packing, data.shuffle, spec.run.seed, epoch);
        let (per_step, size) = (prepare::sequences_per_step(spec), spec.train.micro_batch_size);
        let mut steps: Vec<(u64, Amount)> = Vec::new();
        let (mut tokens, mut amount) = (0, Amount::default());
        for batch in micro_batches(plan.len(), per_step, size) {
            let (load, end) = (load(rows, &plan, batch.clone(), data.sequence_length), batch.end);
            tokens += load.tokens;
            amount += costs.train(load);
            if end.is_multiple_of(per_step) || end == plan.len() {
                steps.push((tokens, amount));
            }
        }
        Epoch(steps)
    }

    /// The first so many steps.
    fn until(&self, steps: u64) -> (u64, Amount) {
        let last = steps.min(self.0.len() as u64).checked_sub(1);
        last.and_then(|last| self.0.get(last as usize)).copied().unwrap_or_default()
    }
}

impl Workload {
    fn add(&mut self, (tokens, train): (u64, Amount), times: u64) {
        self.tokens = self.tokens.saturating_add(tokens.saturating_mul(times));
        self.train += many(train, times);
    }
}

/// What there is to compute in a micro-batch of a plan.
pub fn load(rows: &TokenRows, plan: &EpochPlan, batch: Range<usize>, longest: usize) -> Load {
    let mut load = Load::default();
    batch.for_each(|sequence| load += of_planned(rows, plan, sequence, longest));
    load
}

/// Everything that the run does. Costs a pass over the rows' lengths for each of the first `COUNTED` epochs.
pub fn workload(spec: &Spec, prepared: &Prepared, recompute: bool) -> Workload {
    let costs = Costs::new(prepared, recompute);
    let steps = prepare::count_steps(spec, &prepared.data.train).total;
    let mut all = Workload { steps, ..Workload::default() };
    let mut left = steps;
    for number in 0..COUNTED {
        if left == 0 {
            break;
        }
        let epoch = Epoch::count(spec, &prepared.data.train, &costs, number);
        let length = epoch.0.len() as u64;
        if length == 0 {
            break;
        }
        // The last one that is counted stands for all that follow.
        let times = if number + 1 == COUNTED { (left / length).max(1) } else { 1 };
        all.add(epoch.until(left), times);
        left -= left.min(length * times);
        if number + 1 == COUNTED {
            all.add(epoch.until(left), 1);
        }
    }
    if let Some(rows) = prepared.data.eval.as_ref().filter(|rows| !rows.is_empty()) {
        let once = evaluation(spec, rows, &costs);
        all.evaluations = evaluations(spec, steps);
        all.eval = many(once, all.evaluations);
    }
    all.saves = saves(spec, steps, all.evaluations > 0);
    all
}

/// One evaluation.
fn evaluation(spec: &Spec, rows: &TokenRows, costs: &Costs) -> Amount {
    let data = &spec.data;
    let plan = EpochPlan::new(rows, data.sequence_length, data.packing, false, spec.run.seed, 0);
    let size = spec.train.micro_batch_size;
    let mut amount = Amount::default();
    for batch in micro_batches(plan.len(), size, size) {
        let load = load(rows, &plan, batch, data.sequence_length);
        amount += costs.evaluate(load);
    }
    amount
}

/// Steps below `steps` that are multiples of `every`.
fn multiples(steps: u64, every: u64) -> u64 {
    steps.saturating_sub(1).checked_div(every).unwrap_or(0)
}

/// Evaluations: before the first step, every so many, after the last.
fn evaluations(spec: &Spec, steps: u64) -> u64 {
    1 + multiples(steps, spec.train.evaluate_every) + u64::from(steps > 0)
}

/// Checkpoints: every so many steps, after the last, and after each evaluation, which may find the adapter better.
fn saves(spec: &Spec, steps: u64, evaluates: bool) -> u64 {
    let (regular, evaluation) = (spec.train.checkpoint_every, spec.train.evaluate_every);
    let last = 1;
    if !evaluates {
        return multiples(steps, regular) + last;
    }
    let both = match (regular, evaluation) {
        (0, _) | (_, 0) => 0,
        (a, b) => (a / divisor(a, b)).checked_mul(b).map_or(0, |both| multiples(steps, both)),
    };
    u64::from(steps > 0) + multiples(steps, regular) + multiples(steps, evaluation) - both + last
}

/// The greatest common divisor (Euclid).
fn divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::ModelConfig;
    use crate::model::work::Recompute;
    use crate::model::work::tests::{close, everywhere, llama_1b, llama_3b, llama_8b, qwen_half};
    use crate::plan::roofline::Device;
    use std::path::Path;

    fn orin(mode: &str) -> Device {
        Device::of_board("agx-orin-64gb", Some(mode)).unwrap()
    }

    /// Work and traffic of a micro-batch, with an adapter of rank 16 on every linear layer.
    fn of(config: &ModelConfig, recompute: Recompute, load: Load) -> (f64, f64) {
        let layout = everywhere(config);
        let traffic = Traffic::new(config, &layout, recompute, NF4);
        (Work::new(config, &layout, recompute).train(load), traffic.train(load))
    }

    fn spec(train: &str) -> Spec {
        let text = format!("[model]\nbase = \"b\"\n[data]\ntrain = \"t\"\n[train]\n{train}\n");
        Spec::parse(&text, "a.toml", Path::new("/"), &[]).unwrap()
    }

    #[test]
    fn micro_batches_end_with_their_step_and_cover_the_epoch() {
        let batches: Vec<Range<usize>> = micro_batches(11, 5, 2).collect();
        assert_eq!(batches, [0..2, 2..4, 4..5, 5..7, 7..9, 9..10, 10..11]);
        assert_eq!(micro_batches(0, 5, 2).count(), 0);
    }

    #[test]
    fn evaluations_and_checkpoints_are_those_of_the_loop() {
        for (evaluate, save, steps) in
            [(3, 2, 7), (0, 0, 5), (4, 6, 24), (5, 5, 20), (1, 1, 1), (7, 0, 6), (2, 3, 1000)]
        {
            let spec = spec(&format!("evaluate_every = {evaluate}\ncheckpoint_every = {save}"));
            let due = |every: u64, step: u64| every > 0 && step > 0 && step.is_multiple_of(every);
            let evaluated = |step: &u64| *step == 0 || *step == steps || due(evaluate, *step);
            let expected = (0..=steps).filter(evaluated).count() as u64;
            assert_eq!(evaluations(&spec, steps), expected, "{evaluate} {save} {steps}");
            let saved = |evaluates: bool| {
                let saved = |step: &u64| *step == steps || due(save, *step) || (evaluates && evaluated(step));
                (0..=steps).filter(saved).count() as u64
            };
            assert_eq!(saves(&spec, steps, true), saved(true), "{evaluate} {save} {steps}");
            assert_eq!(saves(&spec, steps, false), saved(false), "{evaluate} {save} {steps}");
        }
    }

    #[test]
    fn a_sequence_is_as_much_work_as_its_plan_says() {
        let row = |n: usize| {
            ((0..n as u32).collect::<Vec<u32>>(), (0..n).map(|t| t > n / 2).collect::<Vec<bool>>())
        };
        let rows = TokenRows::from_examples(&[row(5), row(9), row(3), row(20), row(7)]);
        for packing in [false, true] {
            let plan = EpochPlan::new(&rows, 12, packing, true, 3, 1);
            let mut tokens = 0;
            for i in 0..plan.len() {
                let planned = of_planned(&rows, &plan, i, 12);
                assert_eq!(planned, of_sequences([&plan.sequence(&rows, i)]));
                tokens += planned.tokens;
            }
            assert_eq!(tokens, 5 + 9 + 3 + 12 + 7);
        }
    }

    /// Tokens a second at 2 × 1,024 tokens, r 16 on every linear layer, by hand: with recomputation at the bound; at 60 % of
    /// it with whole blocks computed again, and with nothing computed again; MAXN, then 50 W and 30 W. The clocks of the
    /// hand's count were 828.7 and 624.7 MHz, so its figures are multiplied by 0.985 and 0.980.
    #[test]
    fn tokens_a_second_are_those_that_a_hand_counts() {
        let models = [
            (qwen_half(), 14_397.0, [(8_638.0, 11_714.0), (5_504.0, 7_464.0), (2_075.0, 2_813.0)]),
            (llama_1b(), 5_853.0, [(3_512.0, 4_874.0), (2_238.0, 3_106.0), (843.0, 1_171.0)]),
            (llama_3b(), 2_188.0, [(1_313.0, 1_878.0), (837.0, 1_197.0), (315.0, 451.0)]),
            (llama_8b(), 936.0, [(562.0, 819.0), (358.0, 522.0), (135.0, 197.0)]),
        ];
        let load = Load::full(2, 1024);
        let tokens = load.tokens as f64;
        for (config, ideal, modes) in models {
            // The hand counted arithmetic alone.
            let (again, _) = of(&config, Recompute::Blocks, load);
            let (kept, _) = of(&config, Recompute::Nothing, load);
            close(tokens / orin("MAXN").bound(again, 0.0), ideal);
            for ((mode, by_clock), (with, without)) in
                [("MAXN", 1.0), ("MODE_50W", 0.985), ("MODE_30W", 0.980)].into_iter().zip(modes)
            {
                close(tokens / orin(mode).predict(again, 0.0), with * by_clock);
                close(tokens / orin(mode).predict(kept, 0.0), without * by_clock);
            }
        }
        // H200 through mma.sync: thousands a second.
        let h200 = Device::of_board("H200", None).unwrap();
        close(tokens / h200.predict(of(&llama_1b(), Recompute::Blocks, load).0, 0.0), 51.3e3);
        close(tokens / h200.predict(of(&llama_1b(), Recompute::Nothing, load).0, 0.0), 71.2e3);
    }

    #[test]
    fn few_tokens_are_bound_by_memory() {
        let device = orin("MAXN");
        let (work, bytes) = of(&llama_1b(), Recompute::BlocksButDown, Load::full(1, 16));
        assert_eq!(device.bound(work, bytes), bytes * 1e9 / device.bandwidth);
        assert!(work * 1e9 / device.flops < device.bound(work, bytes));
        // With 2,048 tokens an 8B model is bound by arithmetic, whatever the mode; a 0.5B model that keeps its activations
        // is not quite, at the highest clock: 22.5 GB in 110 ms, 4,470 GFLOP in 105 ms.
        let load = Load::full(2, 1024);
        let (work, bytes) = of(&llama_8b(), Recompute::BlocksButDown, load);
        for mode in ["MAXN", "MODE_50W", "MODE_30W", "MODE_15W"] {
            assert_eq!(orin(mode).bound(work, bytes), orin(mode).bound(work, 0.0), "{mode}");
        }
        let (work, bytes) = of(&qwen_half(), Recompute::Nothing, load);
        close(device.bound(work, 0.0), 0.105);
        close(device.bound(work, bytes), 0.110);
    }
}
