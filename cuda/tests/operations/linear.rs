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
    for row in rows(&[&linear::FORWARD_NF4, &linear::FORWARD], &linear::FORWARD_GENERAL) {
        let outputs = run_forward(&device, Some(row), m, inputs, &x, None, &data).unwrap();
        for ((name, found), (_, expected)) in outputs.iter().zip(first.as_ref().unwrap_or(&outputs)) {
            same_bits(&format!("{name} of {}", row.kernel.name), found, expected);
        }
        first.get_or_insert(outputs);
        ran.push(row.kernel.name);
    }
    for dropout in [false, true] {
        let mut first: Option<Outputs> = None;
        for row in rows(&[&linear::GRADIENT_NF4, &linear::GRADIENT], &linear::GRADIENT_GENERAL) {
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
        let lora = 2 * (m + outputs) * rank;
        let expected = (2 * m * inputs + weight + 2 * m * outputs + lora) as u64;
        let (forward_rows, gradient_rows): (&[Row], &[Row]) = match kind {
            Dense => (&linear::FORWARD, &linear::GRADIENT),
            _ => (&linear::FORWARD_NF4[..3], &linear::GRADIENT_NF4[..3]),
        };
        for (i, row) in forward_rows.iter().chain(gradient_rows).enumerate() {
            let counters = counted(|device| {
                if i < forward_rows.len() {
                    run_forward(device, Some(row), m, inputs, &x, None, &data).map(|_| ())
                } else {
                    run_gradient(device, Some(row), m, inputs, None, &data).map(|_| ())
                }
            });
            let Some(counters) = counters else { return };
            no_conflicts(&counters);
            let found = counters[row.kernel.name];
            assert_eq!(found.bus_bytes(), expected, "{}", row.kernel.name);
            let tile = (row.tile_m, row.tile_n);
            let tail = (m * outputs * rank / (16 * 8 * 16)) as u64;
            assert_eq!(found.mma, mmas(m, outputs, inputs, tile) + tail, "{}", row.kernel.name);
            // Whole sectors are written.
            assert_eq!(32 * found.global_store_sectors, 2 * (m * outputs) as u64, "{}", row.kernel.name);
        }
    }
}
