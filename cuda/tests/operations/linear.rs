//! Matrix products. The fragments of `mma` hide mistakes well, so beside the comparison with double precision everything that
//! sums in the same order is compared bit for bit: every tile, plain, fused and general.

use crate::dropout::{key_of, philox, sequences};
use crate::harness::{
    Outputs, ReadBack, Values, close, counted, everywhere, poisoned, random, round, rounded_once, same_bits,
    simt, upload, upload_f32,
};
use crate::nf4::{CODES, bytes};
use finetuned_cuda::ops::dropout::Sequences;
use finetuned_cuda::ops::linear::{
    self, Backward, Forward, Lora, LoraBackward, Mask, Matrix, Scratch, forward, forward_with,
    input_gradient, input_gradient_with, scratch_elements,
};
use finetuned_cuda::ops::nf4::Absmax;
use finetuned_cuda::simt::Counters;
use finetuned_cuda::tiles::Row;
use finetuned_cuda::{Buffer, Device, Error};
use half::bf16;
use std::collections::BTreeMap;

/// How a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Dense,
    /// With the size of a block of scales.
    Plain(usize),
    Nested(usize),
}
use Kind::{Dense, Nested, Plain};

/// A layer of a group.
#[derive(Clone, Copy, Debug)]
struct Layer {
    outputs: usize,
    kind: Kind,
    bias: bool,
    rank: Option<usize>,
}

const fn layer(outputs: usize, kind: Kind, bias: bool, rank: Option<usize>) -> Layer {
    Layer { outputs, kind, bias, rank }
}

const SCALE: f32 = 0.75;
const PROBABILITY: f64 = 0.25;
/// Scales of a nested block.
const NESTED: usize = 4;

/// A weight on the host: how it is stored, and what it is.
struct Weight {
    codes: Vec<u8>,
    absmax: Vec<f64>,
    nested: Vec<f64>,
    map: Vec<f64>,
    values: Vec<f64>,
}

fn weight(kind: Kind, outputs: usize, inputs: usize, seed: u64) -> Weight {
    let len = outputs * inputs;
    if kind == Dense {
        let values = random(len, seed);
        return Weight { codes: vec![], absmax: vec![], nested: vec![], map: vec![], values };
    }
    let (Plain(block) | Nested(block)) = kind else { unreachable!() };
    let blocks = len.div_ceil(block);
    let codes = bytes(len.div_ceil(2), seed);
    let (absmax, nested, map) =
        (random(blocks, seed + 1), random(blocks.div_ceil(NESTED), seed + 2), random(256, seed + 3));
    let values = (0..len).map(|i| {
        let code = if i % 2 == 0 { codes[i / 2] >> 4 } else { codes[i / 2] & 15 };
        let b = i / block;
        let scale = match kind {
            Plain(_) => absmax[b] as f32,
            _ => map[usize::from(absmax_code(b))] as f32 * nested[b / NESTED] as f32 + 0.5,
        };
        bf16::from_f32(CODES[usize::from(code)] * scale).to_f64()
    });
    let values = values.collect();
    Weight { codes, absmax, nested, map, values }
}

fn absmax_code(block: usize) -> u8 {
    (block * 37 % 256) as u8
}

impl Weight {
    fn upload(&self, device: &Device, kind: Kind, outputs: usize, inputs: usize) -> Result<Matrix, Error> {
        let (Plain(block) | Nested(block)) = kind else {
            return Matrix::dense(outputs, inputs, upload(device, &self.values));
        };
        let absmax = match kind {
            Plain(_) => Absmax::Plain(upload_f32(device, &self.absmax)),
            _ => Absmax::Nested {
                codes: Buffer::from_slice(
                    device,
                    &(0..self.absmax.len()).map(absmax_code).collect::<Vec<_>>(),
                )?,
                map: upload_f32(device, &self.map),
                nested: upload_f32(device, &self.nested),
                nested_block: NESTED,
                offset: 0.5,
            },
        };
        let packed = poisoned(device, Matrix::packed_bytes(outputs, inputs, block));
        Matrix::nf4(outputs, inputs, block, &Buffer::from_slice(device, &self.codes)?, packed, absmax)
    }
}

/// All numbers of a layer.
struct Data {
    layer: Layer,
    weight: Weight,
    bias: Vec<f64>,
    a: Vec<f64>,
    b: Vec<f64>,
    dy: Vec<f64>,
}

fn data(m: usize, inputs: usize, layers: &[Layer]) -> Vec<Data> {
    let of = |(i, &layer): (usize, &Layer)| {
        let (seed, rank) = (100 * i as u64, layer.rank.unwrap_or(0));
        Data {
            layer,
            weight: weight(layer.kind, layer.outputs, inputs, seed + 1),
            bias: random(layer.outputs, seed + 10),
            a: random(rank * inputs, seed + 11),
            b: random(layer.outputs * rank, seed + 12),
            dy: random(m * layer.outputs, seed + 13),
        }
    };
    layers.iter().enumerate().map(of).collect()
}

/// Σ_k left[m, k]·right(k, n), in double precision.
fn product(m: usize, n: usize, k: usize, left: &[f64], right: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    let mut out = vec![0.0; m * n];
    for row in 0..m {
        for d in 0..k {
            let x = left[row * k + d];
            for (col, out) in out[row * n..][..n].iter_mut().enumerate() {
                *out += x * right(d, col);
            }
        }
    }
    out
}

fn plus(a: &[f64], b: &[f64], after: fn(f64) -> f64) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| after(a + b)).collect()
}

fn mapped(a: &[f64], f: impl Fn(f64) -> f64) -> Vec<f64> {
    a.iter().map(|&v| f(v)).collect()
}

fn exact(value: f64) -> f64 {
    value
}

/// U and Y of a layer; `after` is what happens to every intermediate result.
fn formula(
    m: usize,
    inputs: usize,
    x: &[f64],
    input: &[f64],
    d: &Data,
    after: fn(f64) -> f64,
) -> [Vec<f64>; 2] {
    let (n, r) = (d.layer.outputs, d.layer.rank.unwrap_or(0));
    let mut y = mapped(&product(m, n, inputs, x, |k, n| d.weight.values[n * inputs + k]), after);
    let u = mapped(&product(m, r, inputs, input, |k, n| d.a[n * inputs + k]), after);
    let u = mapped(&u, |v| after(v * f64::from(SCALE)));
    if r > 0 {
        y = plus(&y, &mapped(&product(m, n, r, &u, |k, n| d.b[n * r + k]), after), after);
    }
    if d.layer.bias {
        let bias: Vec<f64> = (0..m).flat_map(|_| d.bias.clone()).collect();
        y = plus(&y, &bias, after);
    }
    [u, y]
}

fn scratch_for(device: &Device, inputs: usize, layers: &[Layer]) -> Scratch {
    let shapes: Vec<_> = layers.iter().map(|layer| (layer.outputs, inputs)).collect();
    Scratch::new(poisoned(device, scratch_elements(&shapes)))
}

const BEHIND: usize = 24;

/// Runs the forward pass: U and Y of every layer, with what lies behind them.
fn run_forward(
    device: &Device,
    row: Option<&'static Row>,
    m: usize,
    inputs: usize,
    x: &[f64],
    input: Option<&[f64]>,
    data: &[Data],
) -> Result<Outputs, Error> {
    let layers: Vec<Layer> = data.iter().map(|d| d.layer).collect();
    let mut scratch = scratch_for(device, inputs, &layers);
    let x = upload(device, x);
    let input = input.map(|values| upload(device, values));
    let matrices: Vec<Matrix> = data
        .iter()
        .map(|d| d.weight.upload(device, d.layer.kind, d.layer.outputs, inputs))
        .collect::<Result<_, _>>()?;
    let biases: Vec<_> = data.iter().map(|d| upload_f32(device, &d.bias)).collect();
    let adapters: Vec<_> = data.iter().map(|d| (upload(device, &d.a), upload(device, &d.b))).collect();
    let mut results: Vec<(Buffer<bf16>, Buffer<bf16>)> = layers
        .iter()
        .map(|l| {
            (poisoned(device, m * l.rank.unwrap_or(0) + BEHIND), poisoned(device, m * l.outputs + BEHIND))
        })
        .collect();
    let mut parts = Vec::new();
    for (i, (down, y)) in results.iter_mut().enumerate() {
        let lora = layers[i].rank.map(|rank| Lora {
            a: &adapters[i].0,
            b: &adapters[i].1,
            rank,
            scale: SCALE,
            down,
            input: input.as_ref(),
        });
        let bias = layers[i].bias.then_some(&biases[i]);
        parts.push(Forward { weight: &matrices[i], bias, lora, y: Some(y) });
    }
    forward_with(row, m, inputs, &x, &mut parts, &mut scratch)?;
    drop(parts);
    Ok(results.iter().flat_map(|(down, y)| [("u", down.all()), ("y", y.all())]).collect())
}

/// The values of an output without what lies behind them, which has to be NaN still.
#[track_caller]
fn inside(what: &str, values: &Values) -> Vec<f64> {
    let mut values = values.f64();
    let behind = values.split_off(values.len() - BEHIND);
    assert!(behind.iter().all(|v| v.is_nan()), "{what}: written behind the shape");
    values
}

/// Rows, inputs, layers. One element; sizes that divide by no tile; rows of an odd length, blocks of scales that straddle rows;
/// ranks below, at and above a step of 16; narrow k and v beside q.
const CASES: &[(usize, usize, &[Layer])] = &[
    (0, 64, &[layer(32, Plain(64), true, Some(8))]),
    (2, 8, &[layer(0, Dense, true, Some(8))]),
    (33, 256, &[layer(40, Plain(128), true, Some(8))]),
    (1, 1, &[layer(1, Dense, true, Some(1))]),
    (3, 33, &[layer(17, Dense, false, Some(3))]),
    (17, 40, &[layer(24, Dense, true, None)]),
    (17, 48, &[layer(72, Plain(64), true, Some(4))]),
    (64, 96, &[layer(130, Plain(32), false, Some(16)), layer(34, Dense, true, Some(16))]),
    (
        1,
        128,
        &[
            layer(96, Nested(64), true, Some(16)),
            layer(32, Nested(64), true, Some(16)),
            layer(32, Nested(64), true, Some(16)),
        ],
    ),
    (
        17,
        64,
        &[
            layer(70, Plain(64), false, Some(32)),
            layer(20, Plain(64), true, None),
            layer(32, Plain(64), false, Some(8)),
        ],
    ),
    (129, 128, &[layer(136, Nested(64), true, Some(16))]),
    (65, 192, &[layer(64, Plain(64), false, Some(16)), layer(64, Plain(64), false, Some(16))]),
];

#[test]
fn forward_is_that_of_double_precision() {
    for (m, inputs, layers) in CASES {
        let (m, inputs) = (*m, *inputs);
        let (x, data) = (random(m * inputs, 1), data(m, inputs, layers));
        let of = |after| -> Vec<_> { data.iter().map(|d| formula(m, inputs, &x, &x, d, after)).collect() };
        let (oracle, naive) = (of(exact), of(round));
        everywhere(
            |device| run_forward(device, None, m, inputs, &x, None, &data),
            |device, outputs| {
                for (i, found) in outputs.chunks(2).enumerate() {
                    let what = format!("{device}: {m} × {inputs}, layer {i} of {layers:?}");
                    rounded_once(&format!("u of {what}"), &inside(&what, &found[0].1), &oracle[i][0]);
                    let y = inside(&what, &found[1].1);
                    close(&format!("y of {what}"), &y, &oracle[i][1], &naive[i][1]);
                }
            },
        );
    }
}

/// U is made of the dropped input, Y of the other one.
#[test]
fn a_dropped_input_is_that_of_the_adapter_only() {
    let (m, inputs, layers) = (5, 64, [layer(32, Plain(64), false, Some(16))]);
    let (x, dropped, data) = (random(m * inputs, 1), random(m * inputs, 2), data(m, inputs, &layers));
    let [u, y] = formula(m, inputs, &x, &dropped, &data[0], exact);
    let naive = formula(m, inputs, &x, &dropped, &data[0], round);
    everywhere(
        |device| run_forward(device, None, m, inputs, &x, Some(&dropped), &data),
        |device, outputs| {
            rounded_once(&format!("{device}: u"), &inside("u", &outputs[0].1), &u);
            close(&format!("{device}: y"), &inside("y", &outputs[1].1), &y, &naive[1]);
        },
    );
}

/// What survives dropout, and by how much it grows.
fn mask(lengths: &[usize], inputs: usize, module: u32) -> Vec<f64> {
    let (threshold, keep) = ((PROBABILITY * 4_294_967_296.0) as u64, 1.0 / (1.0 - PROBABILITY));
    let of = |(s, &length): (usize, &usize)| {
        let key = key_of(s);
        (0..length * inputs)
            .map(|e| {
                let words = philox([(e / 4) as u32, 0, module, 0], [key as u32, (key >> 32) as u32]);
                if u64::from(words[e % 4]) >= threshold { keep } else { 0.0 }
            })
            .collect::<Vec<_>>()
    };
    lengths.iter().enumerate().flat_map(of).collect()
}

fn module_of(layer: usize) -> u32 {
    7 + layer as u32
}

/// The G's, then dX.
fn gradient_formula(
    m: usize,
    inputs: usize,
    dropout: Option<&[usize]>,
    data: &[Data],
    after: fn(f64) -> f64,
) -> Vec<Vec<f64>> {
    let (mut results, mut dx) = (Vec::new(), vec![0.0; m * inputs]);
    for (i, d) in data.iter().enumerate() {
        let (n, r) = (d.layer.outputs, d.layer.rank.unwrap_or(0));
        let g = mapped(&product(m, r, n, &d.dy, |k, n| d.b[k * r + n]), after);
        let g = mapped(&g, |v| after(v * f64::from(SCALE)));
        let part = product(m, inputs, n, &d.dy, |k, n| d.weight.values[k * inputs + n]);
        dx = plus(&dx, &mapped(&part, after), after);
        if r > 0 {
            let mut through = mapped(&product(m, inputs, r, &g, |k, n| d.a[k * inputs + n]), after);
            if let Some(lengths) = dropout {
                let mask = mask(lengths, inputs, module_of(i));
                through = through.iter().zip(mask).map(|(v, by)| after(v * by)).collect();
            }
            dx = plus(&dx, &through, after);
        }
        results.push(g);
    }
    results.push(dx);
    results
}

/// Runs the input gradient: the G's, then dX, with what lies behind them.
fn run_gradient(
    device: &Device,
    row: Option<&'static Row>,
    m: usize,
    inputs: usize,
    dropout: Option<&Sequences>,
    data: &[Data],
) -> Result<Outputs, Error> {
    let layers: Vec<Layer> = data.iter().map(|d| d.layer).collect();
    let mut scratch = scratch_for(device, inputs, &layers);
    let matrices: Vec<Matrix> = data
        .iter()
        .map(|d| d.weight.upload(device, d.layer.kind, d.layer.outputs, inputs))
        .collect::<Result<_, _>>()?;
    let dys: Vec<_> = data.iter().map(|d| upload(device, &d.dy)).collect();
    let adapters: Vec<_> = data.iter().map(|d| (upload(device, &d.a), upload(device, &d.b))).collect();
    let mut gradients: Vec<Buffer<bf16>> =
        layers.iter().map(|l| poisoned(device, m * l.rank.unwrap_or(0) + BEHIND)).collect();
    let mut dx = poisoned(device, m * inputs + BEHIND);
    let mut parts = Vec::new();
    for (i, gradient) in gradients.iter_mut().enumerate() {
        let lora = layers[i].rank.map(|rank| LoraBackward {
            a: &adapters[i].0,
            b: &adapters[i].1,
            rank,
            scale: SCALE,
            gradient,
            dropout: dropout.map(|sequences| Mask {
                sequences,
                probability: PROBABILITY,
                module: module_of(i),
            }),
        });
        parts.push(Backward { weight: &matrices[i], dy: &dys[i], lora });
    }
    input_gradient_with(row, m, inputs, &mut parts, Some(&mut dx), &mut scratch)?;
    drop(parts);
    Ok(gradients.iter().map(|g| ("g", g.all())).chain([("dx", dx.all())]).collect())
}

#[test]
fn input_gradients_are_those_of_double_precision() {
    for (m, inputs, layers) in CASES {
        let (m, inputs) = (*m, *inputs);
        let data = data(m, inputs, layers);
        let lengths = [m / 3, 0, m - m / 3];
        for dropout in [None, Some(&lengths[..])] {
            if dropout.is_some() && m > 65 {
                continue; // the same code as at 65, more of it
            }
            let of = |after| gradient_formula(m, inputs, dropout, &data, after);
            let (oracle, naive) = (of(exact), of(round));
            everywhere(
                |device| {
                    let sequences = dropout.map(|lengths| sequences(device, lengths, 0));
                    run_gradient(device, None, m, inputs, sequences.as_ref(), &data)
                },
                |device, outputs| {
                    for (i, (name, found)) in outputs.iter().enumerate() {
                        let what = format!("{device}: {name} {i} of {m} × {inputs}, {layers:?}, {dropout:?}");
                        let found = inside(&what, found);
                        match *name {
                            "g" => rounded_once(&what, &found, &oracle[i]),
                            _ => close(&what, &found, &oracle[i], &naive[i]),
                        }
                    }
                },
            );
        }
    }
}

/// Every kernel that a product can be given to.
fn rows(tables: &[&'static [Row]], general: &'static Row) -> Vec<&'static Row> {
    let mut rows: Vec<&'static Row> = tables.iter().flat_map(|table| table.iter()).collect();
    rows.dedup_by_key(|row| row.kernel.name);
    rows.push(general);
    rows
}

const GROUP: [Layer; 3] = [
    layer(160, Nested(64), true, Some(16)),
    layer(48, Plain(32), false, Some(16)),
    layer(32, Plain(64), true, Some(8)),
];

#[test]
fn every_path_gives_the_same_bits() {
    let (m, inputs) = (70, 192);
    let (x, data) = (random(m * inputs, 1), data(m, inputs, &GROUP));
    let Some(simt) = simt() else { return };
    let device = simt.device();
    let mut ran = Vec::new();
    let mut first: Option<Outputs> = None;
    for row in rows(
        &[&linear::FORWARD_NF4, &linear::FORWARD, &linear::FORWARD_NF4_LORA, &linear::FORWARD_LORA],
        &linear::FORWARD_GENERAL,
    ) {
        let outputs = run_forward(&device, Some(row), m, inputs, &x, None, &data).unwrap();
        for ((name, found), (_, expected)) in outputs.iter().zip(first.as_ref().unwrap_or(&outputs)) {
            same_bits(&format!("{name} of {}", row.kernel.name), found, expected);
        }
        first.get_or_insert(outputs);
        ran.push(row.kernel.name);
    }
    for dropout in [false, true] {
        let mut first: Option<Outputs> = None;
        for row in rows(
            &[&linear::GRADIENT_NF4, &linear::GRADIENT, &linear::GRADIENT_NF4_LORA, &linear::GRADIENT_LORA],
            &linear::GRADIENT_GENERAL,
        ) {
            let sequences = dropout.then(|| sequences(&device, &[30, 40], 0));
            let outputs = run_gradient(&device, Some(row), m, inputs, sequences.as_ref(), &data).unwrap();
            for ((name, found), (_, expected)) in outputs.iter().zip(first.as_ref().unwrap_or(&outputs)) {
                same_bits(&format!("{name} of {}, dropout {dropout}", row.kernel.name), found, expected);
            }
            first.get_or_insert(outputs);
            ran.push(row.kernel.name);
        }
    }
    let counters = simt.take_counters();
    assert!(ran.iter().all(|name| counters.contains_key(name)), "{ran:?}, but {:?}", counters.keys());
}

/// A token's result is the same in any micro-batch: with it the kernels may change, the order of a sum does not.
#[test]
fn rows_do_not_depend_on_the_rows_beside_them() {
    let (m, inputs) = (70, 128);
    let (x, all) = (random(m * inputs, 1), data(m, inputs, &GROUP));
    let Some(simt) = simt() else { return };
    let device = simt.device();
    let whole = run_forward(&device, None, m, inputs, &x, None, &all).unwrap();
    let back = run_gradient(&device, None, m, inputs, None, &all).unwrap();
    for (start, count) in [(0, 1), (1, 33), (34, 36)] {
        let mut some = data(m, inputs, &GROUP);
        for d in &mut some {
            let n = d.layer.outputs;
            d.dy = d.dy[start * n..][..count * n].to_vec();
        }
        let part = &x[start * inputs..][..count * inputs];
        let outputs = run_forward(&device, None, count, inputs, part, None, &some).unwrap();
        let gradients = run_gradient(&device, None, count, inputs, None, &some).unwrap();
        for ((name, found), (_, all)) in outputs.iter().zip(&whole).chain(gradients.iter().zip(&back)) {
            let (found, all) = (inside(name, found), inside(name, all));
            let width = found.len() / count;
            assert_eq!(found, all[start * width..][..count * width], "{name} of rows {start} + {count}");
        }
    }
}

// ── Counters ──

/// Fragments of a product: 16 rows × 8 columns × 16 deep, over whole tiles.
fn mmas(m: usize, n: usize, k: usize, tile: (usize, usize)) -> u64 {
    (m.next_multiple_of(tile.0) * n.next_multiple_of(tile.1) * k.next_multiple_of(32) / (16 * 8 * 16)) as u64
}

#[track_caller]
fn no_conflicts(counters: &BTreeMap<&'static str, Counters>) {
    for (name, found) in counters {
        assert_eq!(found.bank_conflicts, 0, "{name}");
    }
}

#[test]
fn a_product_reads_its_operands_once_and_without_conflicts() {
    let (m, inputs, outputs, rank) = (256, 256, 256, 16);
    for kind in [Dense, Plain(64)] {
        let layers = [layer(outputs, kind, false, Some(rank))];
        let (x, data) = (random(m * inputs, 1), data(m, inputs, &layers));
        let weight = match kind {
            Dense => 2 * outputs * inputs,
            _ => outputs * inputs / 2 + outputs * inputs / 64 * 4,
        };
        // Without the adapter: left, right, out.
        let main = 2 * m * inputs + weight + 2 * m * outputs;
        let forward_rows: [&[Row]; 2] = match kind {
            Dense => [&linear::FORWARD, &linear::FORWARD_LORA],
            _ => [&linear::FORWARD_NF4[..3], &linear::FORWARD_NF4_LORA[..3]],
        };
        let gradient_rows: [&[Row]; 2] = match kind {
            Dense => [&linear::GRADIENT, &linear::GRADIENT_LORA],
            _ => [&linear::GRADIENT_NF4[..3], &linear::GRADIENT_NF4_LORA[..3]],
        };
        let all = forward_rows.iter().flat_map(|rows| rows.iter()).map(|row| (row, true));
        let all = all.chain(gradient_rows.iter().flat_map(|rows| rows.iter()).map(|row| (row, false)));
        for (row, forward) in all {
            let counters = counted(|device| {
                match forward {
                    true => run_forward(device, Some(row), m, inputs, &x, None, &data),
                    false => run_gradient(device, Some(row), m, inputs, None, &data),
                }
                .map(|_| ())
            });
            let Some(counters) = counters else { return };
            no_conflicts(&counters);
            let (found, name) = (counters[row.kernel.name], row.kernel.name);
            let beside = name.contains("_lora_");
            assert_eq!(beside, counters.keys().all(|name| !name.ends_with("64x16")), "{name}");
            // `down` and `up`; beside the main product `down` is written, and the other half of the adapter read.
            let lora = 2 * rank * if beside { 2 * inputs + m } else { m + outputs };
            assert_eq!(found.bus_bytes(), (main + lora) as u64, "{name}");
            let tile = (row.tile_m, row.tile_n);
            let tail = (m * outputs * rank / (16 * 8 * 16)) as u64;
            let down = mmas(m, rank, inputs, (row.tile_m, 16)) * (outputs / row.tile_n) as u64;
            let down = if beside { down } else { 0 };
            assert_eq!(found.mma, mmas(m, outputs, inputs, tile) + tail + down, "{name}");
            // Whole sectors are written; of `down`, halves.
            let stored = 2 * m * outputs + if beside { 2 * 2 * m * rank } else { 0 };
            assert_eq!(32 * found.global_store_sectors, stored as u64, "{name}");
        }
    }
}

/// Dequantising for a plain product writes each element once.
#[test]
fn dequantising_moves_its_bytes_once_and_without_conflicts() {
    let (m, inputs, outputs) = (8, 256, 96);
    let layers = [layer(outputs, Plain(64), false, None)];
    let (x, data) = (random(m * inputs, 1), data(m, inputs, &layers));
    let row = &linear::FORWARD[0];
    let counters = counted(|device| run_forward(device, Some(row), m, inputs, &x, None, &data).map(|_| ()));
    let Some(counters) = counters else { return };
    no_conflicts(&counters);
    let n = (outputs * inputs) as u64;
    assert_eq!(counters["gemm_pack"].bus_bytes(), n);
    let found = counters["gemm_unpack"];
    assert_eq!(found.bus_bytes(), n / 2 + 2 * n + n / 64 * 4);
    // Codes and values in whole sectors; a warp's four rows find their scales in two more.
    assert_eq!(32 * (found.global_load_sectors + found.global_store_sectors), n / 2 + 2 * n + n / 4);
}

// ── What is not computed ──

#[test]
fn the_down_product_can_be_had_alone() {
    let (m, inputs, layers) = (5, 64, [layer(32, Plain(64), false, Some(16))]);
    let (x, data) = (random(m * inputs, 1), data(m, inputs, &layers));
    let Some(simt) = simt() else { return };
    let device = simt.device();
    let whole = run_forward(&device, None, m, inputs, &x, None, &data).unwrap();
    let back = run_gradient(&device, None, m, inputs, None, &data).unwrap();
    simt.take_counters();

    let d = &data[0];
    let weight = d.weight.upload(&device, d.layer.kind, d.layer.outputs, inputs).unwrap();
    let (a, b) = (upload(&device, &d.a), upload(&device, &d.b));
    let mut scratch = Scratch::new(poisoned(&device, 0));
    let mut down = poisoned(&device, m * 16 + BEHIND);
    let lora = Lora { a: &a, b: &b, rank: 16, scale: SCALE, down: &mut down, input: None };
    let mut parts = [Forward { weight: &weight, bias: None, lora: Some(lora), y: None }];
    forward(m, inputs, &upload(&device, &x), &mut parts, &mut scratch).unwrap();
    same_bits("u", &down.all(), &whole[0].1);

    let (dy, mut gradient) = (upload(&device, &d.dy), poisoned(&device, m * 16 + BEHIND));
    let lora = LoraBackward { a: &a, b: &b, rank: 16, scale: SCALE, gradient: &mut gradient, dropout: None };
    let mut parts = [Backward { weight: &weight, dy: &dy, lora: Some(lora) }];
    input_gradient(m, inputs, &mut parts, None, &mut scratch).unwrap();
    same_bits("g", &gradient.all(), &back[0].1);
    let ran: Vec<&str> = simt.take_counters().into_keys().collect();
    assert_eq!(ran, ["gemm_nn_64x16", "gemm_nt_64x16", "gemm_pack"]);
}

/// A copy is made when there is none, found when there is one, and never that of another matrix.
#[test]
fn scratch_knows_what_it_holds() {
    let Some(simt) = simt() else { return };
    let device = simt.device();
    let (m, inputs, outputs) = (3, 64, 32);
    let x = upload(&device, &random(m * inputs, 1));
    let matrix =
        |seed| weight(Plain(64), outputs, inputs, seed).upload(&device, Plain(64), outputs, inputs).unwrap();
    let row = Some(&linear::FORWARD[0]);
    let run = |matrix: &Matrix, scratch: &mut Scratch| {
        let mut y = poisoned(&device, m * outputs);
        let mut parts = [Forward { weight: matrix, bias: None, lora: None, y: Some(&mut y) }];
        forward_with(row, m, inputs, &x, &mut parts, scratch).unwrap();
        y.all()
    };
    // Two fit, and which two is asked for changes.
    let mut scratch = Scratch::new(poisoned(&device, 2 * scratch_elements(&[(outputs, inputs)])));
    let matrices = [matrix(1), matrix(2), matrix(3)];
    let expected: Vec<Values> = matrices
        .iter()
        .map(|matrix| run(matrix, &mut Scratch::new(poisoned(&device, outputs * inputs))))
        .collect();
    simt.take_counters();
    let copies = || simt.take_counters().get("gemm_unpack").map_or(0, |found| found.threads / 256);
    for (i, wanted) in [(0, 1), (0, 0), (1, 1), (0, 0), (1, 0), (2, 1), (0, 1), (2, 0), (1, 1), (1, 0)] {
        same_bits(&format!("matrix {i}"), &run(&matrices[i], &mut scratch), &expected[i]);
        assert_eq!(copies(), wanted, "matrix {i}");
    }
    // A new matrix where an old one was.
    drop(matrices);
    let again = matrix(2);
    same_bits("a new one", &run(&again, &mut scratch), &expected[1]);
    assert_eq!(copies(), 1);
}

// ── Logits ──

/// Rows, hidden, vocabulary, how the head is stored.
const HEADS: [(usize, usize, usize, Kind); 6] = [
    (0, 64, 10, Dense),
    (1, 64, 100, Dense),
    (3, 40, 33, Dense),
    (5, 33, 17, Dense),
    (65, 64, 201, Dense),
    (2, 64, 72, Nested(64)),
];

fn head_scratch(device: &Device, hidden: usize, vocabulary: usize) -> Scratch {
    Scratch::new(poisoned(device, scratch_elements(&[(vocabulary, hidden)])))
}

#[test]
fn logits_are_products_in_fp32() {
    for (m, hidden, vocabulary, kind) in HEADS {
        let (h, head) = (random(m * hidden, 1), weight(kind, vocabulary, hidden, 2));
        let oracle = product(m, vocabulary, hidden, &h, |k, n| head.values[n * hidden + k]);
        let stride = vocabulary.next_multiple_of(8);
        for row in linear::LOGITS.iter().chain([&linear::LOGITS_GENERAL]) {
            everywhere(
                |device| {
                    let matrix = head.upload(device, kind, vocabulary, hidden)?;
                    let mut scratch = head_scratch(device, hidden, vocabulary);
                    let (h, mut out) = (upload(device, &h), poisoned(device, m * stride));
                    linear::logits_with(Some(row), m, hidden, &h, &matrix, &mut out, stride, &mut scratch)?;
                    Ok(vec![("logits", out.all())])
                },
                |device, outputs| {
                    let found = outputs[0].1.f64();
                    let rows = found.chunks(stride);
                    assert!(rows.clone().all(|row| row[vocabulary..].iter().all(|v| v.is_nan())));
                    let inside: Vec<f64> = rows.flat_map(|row| row[..vocabulary].to_vec()).collect();
                    // Each product rounded to fp32, and each sum: n·2⁻²⁴ at most, of numbers near √n.
                    for (found, expected) in inside.iter().zip(&oracle) {
                        let what = format!("{device}: {m} × {hidden} × {vocabulary}, {}", row.kernel.name);
                        assert!((found - expected).abs() < 1e-4, "{what}: {found} and not {expected}");
                    }
                },
            );
        }
    }
}

#[test]
fn gradients_of_logits_are_read_where_they_lie() {
    for (m, hidden, vocabulary, kind) in HEADS {
        let (d, head) = (random(m * vocabulary, 1), weight(kind, vocabulary, hidden, 2));
        let oracle = product(m, hidden, vocabulary, &d, |k, n| head.values[k * hidden + n]);
        let stride = vocabulary.next_multiple_of(8);
        // As ops::cross_entropy leaves them: zeros up to the stride, then what is left of the logits.
        let rows: Vec<bf16> = d
            .chunks(vocabulary)
            .flat_map(|row| {
                let mut row: Vec<bf16> = row.iter().map(|&v| bf16::from_f64(v)).collect();
                row.resize(stride, bf16::ZERO);
                row.resize(2 * stride, bf16::NAN);
                row
            })
            .collect();
        let words: Vec<f32> = rows
            .chunks_exact(2)
            .map(|pair| f32::from_bits(u32::from(pair[0].to_bits()) | u32::from(pair[1].to_bits()) << 16))
            .collect();
        for row in linear::GRADIENT.iter().chain([&linear::GRADIENT_GENERAL]) {
            everywhere(
                |device| {
                    let matrix = head.upload(device, kind, vocabulary, hidden)?;
                    let mut scratch = head_scratch(device, hidden, vocabulary);
                    let (d, mut dh) =
                        (Buffer::from_slice(device, &words)?, poisoned(device, m * hidden + BEHIND));
                    linear::logits_gradient_with(
                        Some(row),
                        m,
                        hidden,
                        &d,
                        stride,
                        &matrix,
                        &mut dh,
                        &mut scratch,
                    )?;
                    Ok(vec![("dh", dh.all())])
                },
                |device, outputs| {
                    let what = format!("{device}: {m} × {vocabulary} × {hidden}, {}", row.kernel.name);
                    rounded_once(&what, &inside(&what, &outputs[0].1), &oracle);
                },
            );
        }
    }
}

// ── Refusals ──

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let Some(simt) = simt() else { return };
    let device = simt.device();
    let bf = |len| poisoned::<bf16>(&device, len);
    let dense = |outputs, inputs| Matrix::dense(outputs, inputs, bf(outputs * inputs)).unwrap();
    let says = |error: Result<(), Error>, expected: &str| {
        assert_eq!(error.unwrap_err().to_string(), expected);
    };
    let mut scratch = Scratch::new(bf(100));

    says(Matrix::dense(4, 8, bf(31)).map(|_| ()), "matrix: values has 31 elements, 32 are needed");
    let nf4 = |inputs, block, codes, packed, absmax| {
        let absmax = Absmax::Plain(poisoned(&device, absmax));
        Matrix::nf4(32, inputs, block, &poisoned(&device, codes), poisoned(&device, packed), absmax)
    };
    says(
        nf4(64, 48, 1024, 1024, 32).map(|_| ()),
        "matrix: blocks of 48 elements, not of a power of two from 32 on",
    );
    says(nf4(64, 64, 1023, 1024, 32).map(|_| ()), "matrix: codes has 1023 elements, 1024 are needed");
    says(nf4(64, 64, 1024, 1000, 32).map(|_| ()), "matrix: packed has 1000 elements, 1024 are needed");
    says(nf4(64, 64, 1024, 1024, 31).map(|_| ()), "matrix: absmax has 31 elements, 32 are needed");

    let weight = dense(8, 16);
    let mut run = |m, x, y: usize, bias: Option<usize>| {
        let (x, mut y, bias) = (bf(x), bf(y), bias.map(|len| poisoned(&device, len)));
        let mut parts = [Forward { weight: &weight, bias: bias.as_ref(), lora: None, y: Some(&mut y) }];
        forward(m, 16, &x, &mut parts, &mut scratch)
    };
    says(run(3, 47, 24, None), "linear: x has 47 elements, 48 are needed");
    says(run(3, 48, 23, None), "linear: y has 23 elements, 24 are needed");
    says(run(3, 48, 24, Some(7)), "linear: bias has 7 elements, 8 are needed");
    says(
        run(usize::MAX / 4, 48, 24, None),
        &format!("linear: [{}, 16] elements are too many", usize::MAX / 4),
    );

    let mut lora = |rank, a, b, down, input: Option<usize>| {
        let (x, a, b, mut down, input) = (bf(48), bf(a), bf(b), bf(down), input.map(bf));
        let lora = Lora { a: &a, b: &b, rank, scale: 1.0, down: &mut down, input: input.as_ref() };
        let mut parts = [Forward { weight: &weight, bias: None, lora: Some(lora), y: None }];
        forward(3, 16, &x, &mut parts, &mut scratch)
    };
    says(lora(0, 64, 32, 12, None), "linear: a LoRA of rank 0");
    says(lora(4, 63, 32, 12, None), "linear: a has 63 elements, 64 are needed");
    says(lora(4, 64, 31, 12, None), "linear: b has 31 elements, 32 are needed");
    says(lora(4, 64, 32, 11, None), "linear: down has 11 elements, 12 are needed");
    says(lora(4, 64, 32, 12, Some(47)), "linear: input of the LoRA has 47 elements, 48 are needed");

    let x = bf(48);
    let mut parts: Vec<Forward<'_>> =
        (0..4).map(|_| Forward { weight: &weight, bias: None, lora: None, y: None }).collect();
    says(forward(3, 16, &x, &mut parts, &mut scratch), "linear: 4 layers in a group, more than 3");
    let narrow = dense(8, 15);
    let mut parts = [Forward { weight: &narrow, bias: None, lora: None, y: None }];
    says(forward(3, 16, &x, &mut parts, &mut scratch), "linear: a weight of 15 inputs in a group of 16");

    let quantized = nf4(64, 64, 1024, 1024, 32).unwrap();
    let (x, mut y) = (bf(64), bf(32));
    let mut parts = [Forward { weight: &quantized, bias: None, lora: None, y: Some(&mut y) }];
    says(
        forward_with(Some(&linear::FORWARD[0]), 1, 64, &x, &mut parts, &mut scratch),
        "linear: the scratch has 100 elements, dequantising these weights needs 2048",
    );
    let (x, mut y) = (bf(16), bf(8));
    let mut parts = [Forward { weight: &weight, bias: None, lora: None, y: Some(&mut y) }];
    says(
        forward_with(Some(&linear::FORWARD_NF4[0]), 1, 16, &x, &mut parts, &mut scratch),
        "linear: gemm_nf4_nt_32x64 takes weights in NF4 only",
    );

    let (a, b, mut down, mut y) = (bf(17 * 16), bf(8 * 17), bf(17), bf(8));
    let lora = Lora { a: &a, b: &b, rank: 17, scale: 1.0, down: &mut down, input: None };
    let mut parts = [Forward { weight: &weight, bias: None, lora: Some(lora), y: Some(&mut y) }];
    says(
        forward_with(Some(&linear::FORWARD_LORA[0]), 1, 16, &x, &mut parts, &mut scratch),
        "linear: gemm_nt_lora_32x64 takes adapters of up to rank 16 on the input itself",
    );

    let mut dx = bf(48);
    says(
        input_gradient(3, 16, &mut [], Some(&mut dx), &mut scratch),
        "input gradient: a group of no layers has no gradient",
    );
    let mut back = |dy, dx: usize, gradient, tokens: Option<(usize, f64)>| {
        let (dy, mut dx, a, b, mut gradient) = (bf(dy), bf(dx), bf(64), bf(32), bf(gradient));
        let sequences = tokens.map(|(tokens, _)| sequences(&device, &[tokens], 0));
        let dropout = sequences.as_ref().zip(tokens).map(|(sequences, (_, probability))| Mask {
            sequences,
            probability,
            module: 0,
        });
        let lora = LoraBackward { a: &a, b: &b, rank: 4, scale: 1.0, gradient: &mut gradient, dropout };
        let mut parts = [Backward { weight: &weight, dy: &dy, lora: Some(lora) }];
        input_gradient(3, 16, &mut parts, Some(&mut dx), &mut scratch)
    };
    says(back(23, 48, 12, None), "input gradient: dy has 23 elements, 24 are needed");
    says(back(24, 47, 12, None), "input gradient: dx has 47 elements, 48 are needed");
    says(back(24, 48, 11, None), "input gradient: gradient of the LoRA has 11 elements, 12 are needed");
    says(back(24, 48, 12, Some((4, 0.1))), "input gradient: sequences of 4 tokens for 3 rows");
    says(back(24, 48, 12, Some((3, 1.0))), "input gradient: the probability is 1, not in [0, 1)");

    let (h, mut out) = (bf(48), poisoned(&device, 24));
    says(
        linear::logits(3, 16, &h, &weight, &mut out, 7, &mut scratch),
        "logits: rows of 7 elements for a vocabulary of 8, which takes 8",
    );
    let mut short = poisoned(&device, 23);
    says(
        linear::logits(3, 16, &h, &weight, &mut short, 8, &mut scratch),
        "logits: out has 23 elements, 24 are needed",
    );
    let (d, mut dh) = (poisoned(&device, 24), bf(47));
    says(
        linear::logits_gradient(3, 16, &d, 8, &weight, &mut dh, &mut scratch),
        "logits gradient: dh has 47 elements, 48 are needed",
    );
}
