//! The operations that are measured: their inputs, and what they need by their shapes.

use super::shapes::{Group, Model};
use super::{Bench, Options, Phase, Row, SETS};
use crate::device::Device;
use crate::error::Error;
use crate::memory::Buffer;
use crate::ops::adapter_gradient::{self, Part, PartShape};
use crate::ops::dropout::Sequences;
use crate::ops::linear::{self, Backward, Forward, Lora, LoraBackward, Matrix, Scratch};
use crate::ops::nf4::{self, Absmax};
use crate::ops::{adamw, attention, cross_entropy, rms_norm, rope, swiglu};
use crate::tiles::Row as TileRow;
use crate::tuned::TABLES;
use half::bf16;

/// Everything that can be measured, in the order in which it is.
pub const OPERATIONS: &[&str] = &[
    "nf4-dequantise",
    "linear",
    "linear-without-lora",
    "linear-bf16",
    "linear-bf16-without-lora",
    "input-gradient",
    "input-gradient-bf16",
    "adapter-gradient",
    "logits",
    "logits-gradient",
    "cross-entropy",
    "attention",
    "attention-backward",
    "rms-norm",
    "rms-norm-backward",
    "rope",
    "swiglu",
    "swiglu-backward",
    "adamw",
];

/// Bytes of a weight in NF4 with double quantisation.
const NF4: f64 = (4.0 + 8.0 / 64.0 + 32.0 / (64.0 * 256.0)) / 8.0;
/// Labelled tokens whose logits exist at a time.
const CHUNK: usize = 512;
const EPSILON: f32 = 1e-5;

/// Whether it is over the tokens of a micro-batch.
pub(super) fn has_rows(operation: &str) -> bool {
    !matches!(operation, "nf4-dequantise" | "adamw")
}

fn table(operation: &str) -> Option<&'static [TileRow]> {
    TABLES.iter().find(|(name, _)| *name == operation).map(|(_, table)| *table)
}

/// Whether anything of an operation was asked for.
pub(super) fn may_have(options: &Options, operation: &str) -> bool {
    let kernels = table(operation).unwrap_or_default().iter().map(|row| row.kernel.name);
    options.wants(operation, "") || kernels.into_iter().any(|kernel| options.wants(operation, kernel))
}

/// Measures an operation on the shapes of a model, and adds its rows.
pub(super) fn measure(
    bench: &mut Bench<'_>,
    model: &Model,
    operation: &'static str,
    tokens: usize,
    rows: &mut Vec<Row>,
) -> Result<(), Error> {
    match operation {
        "nf4-dequantise" => dequantise(bench, model, rows),
        "linear" | "linear-without-lora" | "linear-bf16" | "linear-bf16-without-lora" => {
            linears(bench, model, operation, tokens, rows)
        }
        "input-gradient" | "input-gradient-bf16" => gradients(bench, model, operation, tokens, rows),
        "adapter-gradient" => adapters(bench, model, tokens, rows),
        "logits" | "logits-gradient" => logits(bench, model, operation, tokens, rows),
        "cross-entropy" => losses(bench, model, tokens, rows),
        "attention" | "attention-backward" => attentions(bench, model, operation, tokens, rows),
        "rms-norm" | "rms-norm-backward" => norms(bench, model, operation, tokens, rows),
        "rope" => rotations(bench, model, tokens, rows),
        "swiglu" | "swiglu-backward" => gates(bench, model, operation, tokens, rows),
        _ => updates(bench, model, rows),
    }
}

/// One of each input set.
fn sets<T>(mut make: impl FnMut() -> Result<T, Error>) -> Result<Vec<T>, Error> {
    (0..SETS).map(|_| make()).collect()
}

/// A weight of random codes, with nested scales.
fn weight(bench: &mut Bench<'_>, outputs: usize, inputs: usize) -> Result<Matrix, Error> {
    let (codes, absmax) = quantised(bench, outputs * inputs)?;
    let packed = Buffer::new(bench.device, Matrix::packed_bytes(outputs, inputs, nf4::BLOCK))?;
    let matrix = Matrix::nf4(outputs, inputs, nf4::BLOCK, &codes, packed, absmax)?;
    // The codes are read until then.
    bench.device.synchronize()?;
    Ok(matrix)
}

fn quantised(bench: &mut Bench<'_>, count: usize) -> Result<(Buffer<u8>, Absmax), Error> {
    let blocks = count.div_ceil(nf4::BLOCK);
    let absmax = Absmax::Nested {
        codes: bench.bytes(blocks)?,
        map: bench.scales(256)?,
        nested: bench.scales(blocks.div_ceil(nf4::NESTED_BLOCK))?,
        nested_block: nf4::NESTED_BLOCK,
        offset: 0.02,
    };
    Ok((bench.bytes(count.div_ceil(2))?, absmax))
}

fn dense(bench: &mut Bench<'_>, outputs: usize, inputs: usize) -> Result<Matrix, Error> {
    let values = bench.halves(outputs * inputs)?;
    Matrix::dense(outputs, inputs, values)
}

fn dequantise(bench: &mut Bench<'_>, model: &Model, rows: &mut Vec<Row>) -> Result<(), Error> {
    let count = model.hidden * model.intermediate;
    let inputs = sets(|| quantised(bench, count))?;
    let mut out = bench.room::<bf16>(count)?;
    let seconds = bench.measure(|phase, set| match (phase, &inputs[set]) {
        (Phase::Restore, _) => Ok(()),
        (Phase::Run, (codes, absmax)) => nf4::dequantize(count, nf4::BLOCK, codes, absmax, &mut out),
    })?;
    rows.push(Row {
        operation: "nf4-dequantise",
        kernel: None,
        model: model.name,
        tokens: 0,
        shape: format!("{}×{}", model.intermediate, model.hidden),
        seconds,
        operations: 0.0,
        bytes: count as f64 * (NF4 + 2.0),
    });
    Ok(())
}

/// The rows of a table that are measured, or one that lets the table choose.
fn kernels(options: &Options, operation: &str) -> Vec<Option<&'static TileRow>> {
    match table(operation) {
        Some(table) => {
            table.iter().filter(|row| options.wants(operation, row.kernel.name)).map(Some).collect()
        }
        None => vec![None],
    }
}

/// Bytes of the weights of a group, as a kernel reads them.
fn weight_bytes(weights: usize, row: Option<&TileRow>, quantised: bool, fused: bool) -> f64 {
    let fused = row.map_or(fused, |row| row.kernel.file == "gemm_nf4.cu");
    weights as f64
        * match (quantised, fused) {
            (false, _) => 2.0,
            (true, true) => NF4,
            (true, false) => NF4 + 2.0 + 2.0,
        }
}

/// What a group of layers multiplies with.
struct Layers {
    weights: Vec<Matrix>,
    a: Vec<Buffer<bf16>>,
    b: Vec<Buffer<bf16>>,
}

impl Layers {
    fn new(bench: &mut Bench<'_>, group: &Group, quantised: bool) -> Result<Layers, Error> {
        let rank = bench.options.rank;
        let mut layers = Layers { weights: Vec::new(), a: Vec::new(), b: Vec::new() };
        for &outputs in &group.outputs {
            layers.weights.push(match quantised {
                true => weight(bench, outputs, group.inputs)?,
                false => dense(bench, outputs, group.inputs)?,
            });
            layers.a.push(bench.halves(rank * group.inputs)?);
            layers.b.push(bench.halves(outputs * rank)?);
        }
        Ok(layers)
    }
}

/// Scratch for a group that is dequantised. It has room for one input set and remembers what it holds; as the sets take
/// turns, every sample dequantises.
fn scratch(device: &Device, group: &Group, quantised: bool) -> Result<Scratch, Error> {
    let shapes: Vec<(usize, usize)> = group.outputs.iter().map(|&outputs| (outputs, group.inputs)).collect();
    let elements = if quantised { linear::scratch_elements(&shapes) } else { 0 };
    Ok(Scratch::new(Buffer::new(device, elements)?))
}

fn shape(m: usize, group: &Group) -> String {
    let outputs: Vec<String> = group.outputs.iter().map(usize::to_string).collect();
    format!("{} [{m}×{}]·[{}]", group.name, group.inputs, outputs.join("+"))
}

/// Whether the product's own table fuses at so many rows.
fn fuses(device: &Device, m: usize, group: &Group) -> bool {
    let shapes: Vec<(usize, usize)> = group.outputs.iter().map(|&outputs| (outputs, group.inputs)).collect();
    linear::scratch_needed(device, m, nf4::BLOCK, &shapes) == 0
}

/// Operations of a group of layers, and bytes of everything but the weights.
fn needs(m: usize, group: &Group, rank: usize) -> (f64, f64) {
    let outputs: usize = group.outputs.iter().sum();
    let sides: usize = group.outputs.iter().map(|outputs| outputs + group.inputs).sum();
    let operations = 2.0 * m as f64 * (group.weights() + rank * sides) as f64;
    // X and Y; A and B; U written and read.
    let halves = m * (group.inputs + outputs) + rank * sides + 2 * m * rank * group.outputs.len();
    (operations, 2.0 * halves as f64)
}

fn linears(
    bench: &mut Bench<'_>,
    model: &Model,
    operation: &'static str,
    m: usize,
    rows: &mut Vec<Row>,
) -> Result<(), Error> {
    let quantised = !operation.starts_with("linear-bf16");
    let rank = if operation.ends_with("without-lora") { 0 } else { bench.options.rank };
    for group in model.groups() {
        let layers = sets(|| Layers::new(bench, &group, quantised))?;
        let x = sets(|| bench.halves(m * group.inputs))?;
        let mut y: Vec<Buffer<bf16>> =
            group.outputs.iter().map(|outputs| bench.room(m * outputs)).collect::<Result<_, _>>()?;
        let mut down: Vec<Buffer<bf16>> =
            group.outputs.iter().map(|_| bench.room(m * rank.max(1))).collect::<Result<_, _>>()?;
        let mut scratch = scratch(bench.device, &group, quantised)?;
        for row in kernels(bench.options, operation) {
            let seconds = bench.measure(|phase, set| {
                if phase == Phase::Restore {
                    return Ok(());
                }
                let layers = &layers[set];
                let outputs = y.iter_mut().zip(&mut down);
                let mut parts: Vec<Forward<'_>> = (layers.weights.iter().zip(layers.a.iter().zip(&layers.b)))
                    .zip(outputs)
                    .map(|((weight, (a, b)), (y, down))| Forward {
                        weight,
                        bias: None,
                        lora: (rank > 0).then_some(Lora { a, b, rank, scale: 1.0, down, input: None }),
                        y: Some(y),
                    })
                    .collect();
                linear::forward_with(row, m, group.inputs, &x[set], &mut parts, &mut scratch)
            })?;
            let (operations, bytes) = needs(m, &group, rank);
            let fused = fuses(bench.device, m, &group);
            rows.push(Row {
                operation,
                kernel: row.map(|row| row.kernel.name),
                model: model.name,
                tokens: m,
                shape: shape(m, &group),
                seconds,
                operations,
                bytes: bytes + weight_bytes(group.weights(), row, quantised, fused),
            });
        }
    }
    Ok(())
}

fn gradients(
    bench: &mut Bench<'_>,
    model: &Model,
    operation: &'static str,
    m: usize,
    rows: &mut Vec<Row>,
) -> Result<(), Error> {
    let quantised = operation == "input-gradient";
    let rank = bench.options.rank;
    for group in model.groups() {
        let layers = sets(|| Layers::new(bench, &group, quantised))?;
        let dy: Vec<Vec<Buffer<bf16>>> =
            sets(|| group.outputs.iter().map(|outputs| bench.halves(m * outputs)).collect())?;
        let mut dx = bench.room::<bf16>(m * group.inputs)?;
        let mut down: Vec<Buffer<bf16>> =
            group.outputs.iter().map(|_| bench.room(m * rank)).collect::<Result<_, _>>()?;
        let mut scratch = scratch(bench.device, &group, quantised)?;
        for row in kernels(bench.options, operation) {
            let seconds = bench.measure(|phase, set| {
                if phase == Phase::Restore {
                    return Ok(());
                }
                let layers = &layers[set];
                let mut parts: Vec<Backward<'_>> =
                    (layers.weights.iter().zip(layers.a.iter().zip(&layers.b)))
                        .zip(dy[set].iter().zip(&mut down))
                        .map(|((weight, (a, b)), (dy, gradient))| Backward {
                            weight,
                            dy,
                            lora: Some(LoraBackward { a, b, rank, scale: 1.0, gradient, dropout: None }),
                        })
                        .collect();
                linear::input_gradient_with(row, m, group.inputs, &mut parts, Some(&mut dx), &mut scratch)
            })?;
            let (operations, bytes) = needs(m, &group, rank);
            let fused = fuses(bench.device, m, &group);
            rows.push(Row {
                operation,
                kernel: row.map(|row| row.kernel.name),
                model: model.name,
                tokens: m,
                shape: shape(m, &group),
                seconds,
                operations,
                bytes: bytes + weight_bytes(group.weights(), row, quantised, fused),
            });
        }
    }
    Ok(())
}

/// Examples of `longest` tokens, the last one shorter.
fn offsets(m: usize, longest: usize) -> Vec<u32> {
    let mut offsets: Vec<u32> = (0..m).step_by(longest.max(1)).map(|at| at as u32).collect();
    offsets.push(m as u32);
    offsets
}

fn adapters(bench: &mut Bench<'_>, model: &Model, m: usize, rows: &mut Vec<Row>) -> Result<(), Error> {
    let (rank, longest) = (bench.options.rank, bench.options.longest);
    let ends = offsets(m, longest);
    let count = ends.len() - 1;
    let sequences = Sequences {
        offsets: Buffer::from_slice(bench.device, &ends)?,
        keys: Buffer::from_slice(bench.device, &vec![1; count])?,
        count,
        longest: longest.min(m),
        tokens: m,
    };
    for group in model.groups() {
        let x = sets(|| bench.halves(m * group.inputs))?;
        let dy: Vec<Vec<Buffer<bf16>>> =
            sets(|| group.outputs.iter().map(|outputs| bench.halves(m * outputs)).collect())?;
        let thin: Vec<Buffer<bf16>> = sets(|| bench.halves(m * rank))?;
        let mut da: Vec<Buffer<f32>> =
            group.outputs.iter().map(|_| bench.room(rank * group.inputs)).collect::<Result<_, _>>()?;
        let mut db: Vec<Buffer<f32>> =
            group.outputs.iter().map(|outputs| bench.room(rank * outputs)).collect::<Result<_, _>>()?;
        let shapes: Vec<PartShape> =
            group.outputs.iter().map(|&outputs| PartShape { outputs, rank, own_input: false }).collect();
        let elements =
            adapter_gradient::scratch_elements(bench.device.properties(), m, count, group.inputs, &shapes);
        let mut scratch = bench.room::<f32>(elements)?;
        let seconds = bench.measure(|phase, set| {
            if phase == Phase::Restore {
                return Ok(());
            }
            let mut parts: Vec<Part<'_>> = (group.outputs.iter().zip(&dy[set]))
                .zip(da.iter_mut().zip(&mut db))
                .map(|((&outputs, dy), (da, db))| Part {
                    outputs,
                    rank,
                    dy,
                    down: &thin[set],
                    gradient: &thin[1 - set],
                    input: None,
                    da: Some(da),
                    db: Some(db),
                })
                .collect();
            adapter_gradient::adapter_gradients(&sequences, group.inputs, &x[set], &mut parts, &mut scratch)
        })?;
        let outputs: usize = group.outputs.iter().sum();
        let sides: usize = group.outputs.iter().map(|outputs| outputs + group.inputs).sum();
        let read = 2 * (m * (group.inputs + outputs) + 2 * m * rank * group.outputs.len());
        rows.push(Row {
            operation: "adapter-gradient",
            kernel: None,
            model: model.name,
            tokens: m,
            shape: shape(m, &group),
            seconds,
            operations: 2.0 * (m * rank * sides) as f64,
            // The gradients are read and written.
            bytes: (read + 8 * rank * sides) as f64,
        });
    }
    Ok(())
}

fn logits(
    bench: &mut Bench<'_>,
    model: &Model,
    operation: &'static str,
    tokens: usize,
    rows: &mut Vec<Row>,
) -> Result<(), Error> {
    let (m, hidden, vocabulary) = (tokens.min(CHUNK), model.hidden, model.vocabulary);
    let stride = cross_entropy::stride(vocabulary);
    let head = dense(bench, vocabulary, hidden)?;
    let h = sets(|| bench.halves(m * hidden))?;
    let mut scratch = Scratch::new(Buffer::new(bench.device, 0)?);
    let forward = operation == "logits";
    let mut logits = bench.room::<f32>(m * stride)?;
    let d = if forward { Vec::new() } else { sets(|| bench.floats(m * stride))? };
    let mut dh = bench.room::<bf16>(m * hidden)?;
    for row in kernels(bench.options, operation) {
        let seconds = bench.measure(|phase, set| match (phase, forward) {
            (Phase::Restore, _) => Ok(()),
            (_, true) => {
                linear::logits_with(row, m, hidden, &h[set], &head, &mut logits, stride, &mut scratch)
            }
            (_, false) => linear::logits_gradient(m, hidden, &d[set], stride, &head, &mut dh, &mut scratch),
        })?;
        let logit = if forward { 4 } else { 2 };
        rows.push(Row {
            operation,
            kernel: row.map(|row| row.kernel.name),
            model: model.name,
            tokens,
            shape: format!("[{m}×{hidden}]·[{vocabulary}]"),
            seconds,
            operations: 2.0 * (m * hidden * vocabulary) as f64,
            bytes: (2 * (vocabulary + m) * hidden + logit * m * vocabulary) as f64,
        });
    }
    Ok(())
}

fn losses(bench: &mut Bench<'_>, model: &Model, tokens: usize, rows: &mut Vec<Row>) -> Result<(), Error> {
    let (m, vocabulary) = (tokens.min(CHUNK), model.vocabulary);
    let len = m * cross_entropy::stride(vocabulary);
    let whole = sets(|| bench.floats(len))?;
    let mut logits = bench.room::<f32>(len)?;
    let targets: Vec<i32> = (0..m).map(|i| (i * 7919 % vocabulary) as i32).collect();
    let targets = Buffer::from_slice(bench.device, &targets)?;
    let mut loss = bench.room::<f64>(m)?;
    let seconds = bench.measure(|phase, set| match phase {
        Phase::Restore => logits.copy_from(&whole[set], len, 0),
        Phase::Run => cross_entropy::cross_entropy(m, vocabulary, &mut logits, &targets, &mut loss, true),
    })?;
    rows.push(Row {
        operation: "cross-entropy",
        kernel: None,
        model: model.name,
        tokens,
        shape: format!("[{m}×{vocabulary}]"),
        seconds,
        operations: 0.0,
        // Read twice, and written in bf16; the second read may come from the cache.
        bytes: 10.0 * (m * vocabulary) as f64,
    });
    Ok(())
}

fn attentions(
    bench: &mut Bench<'_>,
    model: &Model,
    operation: &'static str,
    tokens: usize,
    rows: &mut Vec<Row>,
) -> Result<(), Error> {
    let Model { heads, kv_heads, head_dim, .. } = *model;
    let longest = bench.options.longest.min(tokens);
    let ends = offsets(tokens, longest);
    let squares: f64 = ends.windows(2).map(|ends| f64::from(ends[1] - ends[0]).powi(2)).sum();
    let cu_seqlens = Buffer::from_slice(bench.device, &ends)?;
    let shape = attention::Shape {
        tokens,
        heads,
        kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        window: None,
        sequences: ends.len() - 1,
        longest,
    };
    let (queries, keys) = (tokens * heads * head_dim, tokens * kv_heads * head_dim);
    let inputs = sets(|| Ok((bench.halves(queries)?, bench.halves(keys)?, bench.halves(keys)?)))?;
    let mut out: Vec<Buffer<bf16>> = sets(|| bench.room(queries))?;
    let mut log_sum: Vec<Buffer<f32>> = sets(|| bench.room(tokens * heads))?;
    let dout = bench.halves(queries)?;
    let mut scratch = bench.room::<f32>(attention::scratch_elements(tokens, heads))?;
    let (mut dq, mut dk, mut dv) = (bench.room(queries)?, bench.room(keys)?, bench.room(keys)?);
    let backward = operation == "attention-backward";
    let seconds = bench.measure(|phase, set| {
        let (q, k, v) = &inputs[set];
        let (out, log_sum) = (&mut out[set], &mut log_sum[set]);
        match (phase, backward) {
            (Phase::Restore, false) => Ok(()),
            // The backward pass reads what the forward pass has left.
            (Phase::Restore, true) | (Phase::Run, false) => {
                attention::forward(shape, &cu_seqlens, q, k, v, out, log_sum)
            }
            (Phase::Run, true) => attention::backward(
                shape,
                &cu_seqlens,
                q,
                k,
                v,
                out,
                log_sum,
                &dout,
                &mut scratch,
                &mut dq,
                &mut dk,
                &mut dv,
            ),
        }
    })?;
    let forward = 2.0 * squares * (heads * head_dim) as f64;
    let (operations, halves) = match backward {
        false => (forward, 2 * queries + 2 * keys),
        true => (2.5 * forward, 4 * queries + 4 * keys),
    };
    rows.push(Row {
        operation,
        kernel: None,
        model: model.name,
        tokens,
        shape: format!("{} × {longest}, {heads} heads of {head_dim}, {kv_heads} of keys", ends.len() - 1),
        seconds,
        operations,
        bytes: 2.0 * halves as f64,
    });
    Ok(())
}

fn norms(
    bench: &mut Bench<'_>,
    model: &Model,
    operation: &'static str,
    rows_of: usize,
    rows: &mut Vec<Row>,
) -> Result<(), Error> {
    let shape = rms_norm::Shape { rows: rows_of, cols: model.hidden, epsilon: EPSILON };
    let len = rows_of * model.hidden;
    let (whole, delta) = (sets(|| bench.halves(len))?, sets(|| bench.halves(len))?);
    let weight = bench.floats(model.hidden)?;
    let (mut x, mut y) = (bench.room::<bf16>(len)?, bench.room::<bf16>(len)?);
    let backward = operation == "rms-norm-backward";
    let seconds = bench.measure(|phase, set| match (phase, backward) {
        (Phase::Restore, _) => x.copy_from(&whole[set], len, 0),
        (Phase::Run, false) => rms_norm::rms_norm_residual(shape, &mut x, &delta[set], &weight, &mut y),
        (Phase::Run, true) => {
            rms_norm::rms_norm_backward(shape, &whole[set], &weight, &delta[set], &mut x, true)
        }
    })?;
    rows.push(Row {
        operation,
        kernel: None,
        model: model.name,
        tokens: rows_of,
        shape: format!("[{rows_of}×{}]", model.hidden),
        seconds,
        operations: 0.0,
        bytes: (8 * len + 4 * model.hidden) as f64,
    });
    Ok(())
}

fn rotations(bench: &mut Bench<'_>, model: &Model, tokens: usize, rows: &mut Vec<Row>) -> Result<(), Error> {
    let Model { heads, kv_heads, head_dim, .. } = *model;
    let longest = bench.options.longest.min(tokens);
    let frequencies: Vec<f32> =
        (0..head_dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
    let angles = rope::Angles::new(bench.device, longest, &frequencies, 1.0)?;
    let positions: Vec<u32> = (0..tokens).map(|i| (i % longest.max(1)) as u32).collect();
    let positions = Buffer::from_slice(bench.device, &positions)?;
    let (queries, keys) = (tokens * heads * head_dim, tokens * kv_heads * head_dim);
    let mut inputs = sets(|| Ok((bench.halves(queries)?, bench.halves(keys)?)))?;
    let seconds = bench.measure(|phase, set| {
        let (q, k) = &mut inputs[set];
        match phase {
            Phase::Restore => Ok(()),
            Phase::Run => rope::rope(&angles, &positions, tokens, heads, kv_heads, false, q, Some(k)),
        }
    })?;
    rows.push(Row {
        operation: "rope",
        kernel: None,
        model: model.name,
        tokens,
        shape: format!("[{tokens}×({heads}+{kv_heads})×{head_dim}]"),
        seconds,
        operations: 0.0,
        bytes: 4.0 * (queries + keys) as f64,
    });
    Ok(())
}

fn gates(
    bench: &mut Bench<'_>,
    model: &Model,
    operation: &'static str,
    tokens: usize,
    rows: &mut Vec<Row>,
) -> Result<(), Error> {
    let len = tokens * model.intermediate;
    let whole = sets(|| Ok((bench.halves(len)?, bench.halves(len)?)))?;
    let dout = bench.halves(len)?;
    let (mut gate, mut up) = (bench.room::<bf16>(len)?, bench.room::<bf16>(len)?);
    let backward = operation == "swiglu-backward";
    let seconds = bench.measure(|phase, set| match (phase, backward) {
        (Phase::Restore, false) => Ok(()),
        (Phase::Restore, true) => {
            gate.copy_from(&whole[set].0, len, 0)?;
            up.copy_from(&whole[set].1, len, 0)
        }
        (Phase::Run, false) => swiglu::swiglu(len, &whole[set].0, &whole[set].1, &mut gate),
        (Phase::Run, true) => swiglu::swiglu_backward(len, &dout, &mut gate, &mut up),
    })?;
    rows.push(Row {
        operation,
        kernel: None,
        model: model.name,
        tokens,
        shape: format!("[{tokens}×{}]", model.intermediate),
        seconds,
        operations: 0.0,
        bytes: if backward { 10.0 } else { 6.0 } * len as f64,
    });
    Ok(())
}

fn updates(bench: &mut Bench<'_>, model: &Model, rows: &mut Vec<Row>) -> Result<(), Error> {
    let len = model.adapter(bench.options.rank);
    let gradient = sets(|| bench.floats(len))?;
    let mut parameters = adamw::Parameters {
        value: bench.floats(len)?,
        working: bench.room(len)?,
        m: bench.room(len)?,
        v: bench.room(len)?,
    };
    let (mut partial, mut norm) = (bench.room::<f64>(adamw::PARTIALS)?, bench.room::<f64>(1)?);
    let step = adamw::Step {
        learning_rate: 1e-4,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        step: 10,
        scale: 1e-3,
        max_norm: 1.0,
    };
    let seconds = bench.measure(|phase, set| match phase {
        Phase::Restore => Ok(()),
        Phase::Run => adamw::adamw(step, len, &gradient[set], &mut parameters, &mut partial, &mut norm),
    })?;
    rows.push(Row {
        operation: "adamw",
        kernel: None,
        model: model.name,
        tokens: 0,
        shape: format!("{len} parameters"),
        seconds,
        operations: 0.0,
        // The gradients once for their norm.
        bytes: 34.0 * len as f64,
    });
    Ok(())
}
