use crate::harness::{
    ReadBack, Values, counted, everywhere, poisoned, random, relative_error, rounded_once, same_bits, upload,
    upload_f32,
};
use crate::nf4::{CODES, bytes};
use finetuned_cuda::ops::linear::Matrix;
use finetuned_cuda::ops::nf4::{Absmax, dequantize};
use finetuned_cuda::ops::small::{Adapter, logits_row, product};
use finetuned_cuda::{Buffer, Device, Error};
use half::bf16;

/// Rows, inputs, outputs, r (0: no adapter): one element; sizes that divide nothing; runs for bf16 but not for NF4; more than
/// a step of all warps (512 codes, 128 bf16); real ones; nothing at all.
const SHAPES: [(usize, usize, usize, usize); 12] = [
    (1, 1, 1, 1),
    (1, 32, 5, 0),
    (3, 7, 9, 3),
    (8, 64, 33, 4),
    (1, 576, 192, 16),
    (2, 1536, 64, 8),
    (5, 96, 40, 5),
    (1, 40, 35, 16),
    (8, 2112, 50, 64),
    (0, 64, 8, 0),
    (2, 64, 0, 4),
    (2, 0, 40, 17),
];

/// Elements behind the result, which stay as they are.
const BEHIND: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Dense,
    Nf4 { block: usize },
    Nested { block: usize },
}
const KINDS: [Kind; 4] =
    [Kind::Dense, Kind::Nf4 { block: 64 }, Kind::Nf4 { block: 32 }, Kind::Nested { block: 64 }];

const OFFSET: f32 = 0.125_5;
const NESTED_BLOCK: usize = 4;

/// Row-major codes of a weight, and their scales.
fn quantized(device: &Device, kind: Kind, count: usize) -> (usize, Buffer<u8>, Absmax) {
    let codes = Buffer::from_slice(device, &bytes(count.div_ceil(2), 11)).unwrap();
    match kind {
        Kind::Dense => unreachable!("it has no codes"),
        Kind::Nf4 { block } => {
            (block, codes, Absmax::Plain(upload_f32(device, &random(count.div_ceil(block), 12))))
        }
        Kind::Nested { block } => {
            let blocks = count.div_ceil(block);
            let absmax = Absmax::Nested {
                codes: Buffer::from_slice(device, &bytes(blocks, 13)).unwrap(),
                map: upload_f32(device, &random(256, 14)),
                nested: upload_f32(device, &random(blocks.div_ceil(NESTED_BLOCK), 15)),
                nested_block: NESTED_BLOCK,
                offset: OFFSET,
            };
            (block, codes, absmax)
        }
    }
}

fn matrix(device: &Device, kind: Kind, outputs: usize, inputs: usize) -> Matrix {
    if kind == Kind::Dense {
        return Matrix::dense(outputs, inputs, upload(device, &random(outputs * inputs, 10))).unwrap();
    }
    let (block, codes, absmax) = quantized(device, kind, outputs * inputs);
    let packed = poisoned(device, Matrix::packed_bytes(outputs, inputs, block));
    Matrix::nf4(outputs, inputs, block, &codes, packed, absmax).unwrap()
}

/// The elements of the same weight.
fn elements(kind: Kind, count: usize) -> Vec<f64> {
    let (block, scales): (usize, Vec<f32>) = match kind {
        Kind::Dense => return random(count, 10),
        Kind::Nf4 { block } => (block, random(count.div_ceil(block), 12).iter().map(|&v| v as f32).collect()),
        Kind::Nested { block } => {
            let blocks = count.div_ceil(block);
            let (codes, map) = (bytes(blocks, 13), random(256, 14));
            let nested = random(blocks.div_ceil(NESTED_BLOCK), 15);
            let scale =
                |b: usize| map[usize::from(codes[b])] as f32 * nested[b / NESTED_BLOCK] as f32 + OFFSET;
            (block, (0..blocks).map(scale).collect())
        }
    };
    let codes = bytes(count.div_ceil(2), 11);
    let element = |i: usize| {
        let code = codes[i / 2] >> (4 * (1 - i % 2)) & 15;
        bf16::from_f32(CODES[usize::from(code)] * scales[i / block]).to_f64()
    };
    (0..count).map(element).collect()
}

/// `a·bᵀ`, a `[m, k]` and b `[n, k]`.
fn by_rows(m: usize, n: usize, k: usize, a: &[f64], b: &[f64]) -> Vec<f64> {
    let dot = |i: usize, j: usize| a[i * k..][..k].iter().zip(&b[j * k..][..k]).map(|(a, b)| a * b).sum();
    (0..m * n).map(|at| dot(at / n, at % n)).collect()
}

struct Run {
    rows: usize,
    inputs: usize,
    outputs: usize,
    rank: usize,
    bias: bool,
}

impl Run {
    /// Rows `from ..` of y, with what lies behind.
    fn on(&self, device: &Device, kind: Kind, from: usize, rows: usize) -> Result<Buffer<bf16>, Error> {
        let Run { inputs, outputs, rank, .. } = *self;
        let x = random(self.rows * inputs, 1);
        let down = random(self.rows * rank, 2);
        let x = upload(device, &x[from * inputs..(from + rows) * inputs]);
        let down = upload(device, &down[from * rank..(from + rows) * rank]);
        let (b, bias) = (upload(device, &random(outputs * rank, 3)), upload_f32(device, &random(outputs, 4)));
        let weight = matrix(device, kind, outputs, inputs);
        let adapter = (rank > 0).then_some(Adapter { rank, down: &down, b: &b });
        let mut y = poisoned(device, rows * outputs + BEHIND);
        let bias = self.bias.then_some(&bias);
        product(rows, &x, &weight, adapter, bias, &mut y)?;
        Ok(y)
    }

    fn oracle(&self, kind: Kind) -> Vec<f64> {
        let Run { rows, inputs, outputs, rank, bias } = *self;
        let w = elements(kind, outputs * inputs);
        let base = by_rows(rows, outputs, inputs, &random(rows * inputs, 1), &w);
        let up = by_rows(rows, outputs, rank, &random(rows * rank, 2), &random(outputs * rank, 3));
        let biases = random(outputs, 4);
        let of =
            |(i, (base, up)): (usize, (f64, f64))| base + up + if bias { biases[i % outputs] } else { 0.0 };
        base.into_iter().zip(up).enumerate().map(of).collect()
    }
}

#[test]
fn products_are_those_of_double_precision() {
    for (rows, inputs, outputs, rank) in SHAPES {
        for kind in KINDS {
            let run = Run { rows, inputs, outputs, rank, bias: rank != 4 };
            let oracle = run.oracle(kind);
            everywhere(
                |device| Ok(vec![("y", run.on(device, kind, 0, rows)?.all())]),
                |device, outputs_found| {
                    let what = format!("{device}: {rows} × {inputs} by {outputs}, r = {rank}, {kind:?}");
                    let (found, len) = (outputs_found[0].1.f64(), rows * outputs);
                    rounded_once(&what, &found[..len], &oracle);
                    assert!(found[len..].iter().all(|v| v.is_nan()), "{what}: behind y");
                },
            );
        }
    }
}

#[test]
fn a_row_is_the_same_alone() {
    for (inputs, outputs, rank) in [(576, 70, 16), (41, 6, 5)] {
        for kind in KINDS {
            let run = Run { rows: 8, inputs, outputs, rank, bias: true };
            everywhere(
                |device| {
                    let mut rows = vec![("all", run.on(device, kind, 0, 8)?.slice(0, 8 * outputs)?.all())];
                    for (from, count) in [(0, 1), (5, 1), (2, 3)] {
                        let y = run.on(device, kind, from, count)?;
                        rows.push(("some", y.slice(0, count * outputs)?.all()));
                    }
                    Ok(rows)
                },
                |device, found| {
                    let Values::Bf16(all) = &found[0].1 else { unreachable!("y is bf16") };
                    for ((from, count), (_, some)) in [(0, 1), (5, 1), (2, 3)].into_iter().zip(&found[1..]) {
                        let expected = Values::Bf16(all[from * outputs..(from + count) * outputs].to_vec());
                        same_bits(&format!("{device}: rows {from} + {count}, {kind:?}"), some, &expected);
                    }
                },
            );
        }
    }
}

/// One-hot rows read the weight element by element: exactly what dequantisation gives.
#[test]
fn the_weight_is_the_dequantised_one() {
    // 96 inputs are in units with blocks of 32, and row-major with blocks of 64.
    for (inputs, kind) in [(96, KINDS[1]), (96, KINDS[2]), (128, KINDS[1]), (128, KINDS[3])] {
        let outputs = 37;
        everywhere(
            |device| {
                let (block, codes, absmax) = quantized(device, kind, outputs * inputs);
                let weight = matrix(device, kind, outputs, inputs);
                let mut w = poisoned(device, outputs * inputs);
                dequantize(outputs * inputs, block, &codes, &absmax, &mut w)?;
                let w = w.read(outputs * inputs)?;
                let (mut found, mut expected) = (vec![], vec![]);
                for first in (0..inputs).step_by(8) {
                    let mut x = vec![0.0; 8 * inputs];
                    (0..8).for_each(|row| x[row * inputs + first + row] = 1.0);
                    let (x, mut y) = (upload(device, &x), poisoned(device, 8 * outputs));
                    product(8, &x, &weight, None, None, &mut y)?;
                    found.extend(y.read(8 * outputs)?);
                    expected.extend((0..8 * outputs).map(|i| w[i % outputs * inputs + first + i / outputs]));
                }
                // Zeros may differ in their sign.
                let plain =
                    |values: Vec<bf16>| Values::F64(values.iter().map(|v| v.to_f64() + 0.0).collect());
                Ok(vec![("found", plain(found)), ("expected", plain(expected))])
            },
            |device, outputs| same_bits(&format!("{device}: {kind:?}"), &outputs[0].1, &outputs[1].1),
        );
    }
}

#[test]
fn logits_are_not_rounded() {
    for (hidden, vocabulary, row) in [(1, 3, 2), (64, 300, 0), (72, 41, 1), (576, 129, 3)] {
        for kind in KINDS {
            let h = random(4 * hidden, 1);
            let w = elements(kind, vocabulary * hidden);
            let oracle = by_rows(1, vocabulary, hidden, &h[row * hidden..], &w);
            everywhere(
                |device| {
                    let head = matrix(device, kind, vocabulary, hidden);
                    let (h, mut logits) = (upload(device, &h), poisoned(device, vocabulary + BEHIND));
                    logits_row(row, &h, &head, &mut logits)?;
                    Ok(vec![("logits", logits.all())])
                },
                |device, outputs| {
                    let what = format!("{device}: logits of {vocabulary} × {hidden}, {kind:?}");
                    let found = outputs[0].1.f64();
                    // Products are exact; every addition may cut off a unit in the last place.
                    let error = relative_error(&found[..vocabulary], &oracle);
                    assert!(error <= (hidden + 4) as f64 / f64::from(1 << 23), "{what}: error {error:.3e}");
                    assert!(found[vocabulary..].iter().all(|v| v.is_nan()), "{what}: behind the logits");
                },
            );
        }
    }
}

/// The weight crosses the bus once and whatever the number of rows, with the same products; no bank conflicts.
#[test]
fn traffic_is_the_weight() {
    let (inputs, outputs) = (1024, 128);
    let n = (inputs * outputs) as u64;
    for (kernel, kind, weight) in [
        ("small_dense", Kind::Dense, 2 * n),
        ("small_nf4", Kind::Nf4 { block: 64 }, n / 2 + n / 64 * 4),
        ("small_nf4", Kind::Nested { block: 64 }, n / 2 + n / 64 + n / 64 / NESTED_BLOCK as u64 * 4 + 1024),
    ] {
        for rows in [1, 8] {
            let run = Run { rows, inputs, outputs, rank: 0, bias: false };
            let counters = counted(|device| run.on(device, kind, 0, rows).map(|_| ()));
            let Some(counters) = counters else { return };
            let (found, rows) = (counters[kernel], rows as u64);
            let (x, y) = (2 * rows * inputs as u64, 2 * rows * outputs as u64);
            assert_eq!(found.bus_bytes(), weight + x + y, "{kind:?}");
            assert_eq!(found.mma, n / (16 * 16), "{kind:?}");
            assert_eq!(found.bank_conflicts, 0, "{kind:?}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let Some(simt) = crate::harness::simt() else { return };
    let device = &simt.device();
    let refused = |rows: usize, x: usize, b: usize, y: usize| {
        let (x, y) = (poisoned::<bf16>(device, x), &mut poisoned(device, y));
        let (down, b) = (poisoned(device, 32), poisoned(device, b));
        let adapter = Some(Adapter { rank: 4, down: &down, b: &b });
        let weight = matrix(device, Kind::Nf4 { block: 64 }, 9, 64);
        product(rows, &x, &weight, adapter, None, y).unwrap_err().to_string()
    };
    assert_eq!(refused(9, 9 * 64, 36, 81), "small product: 9 rows, more than 8");
    assert_eq!(refused(8, 511, 36, 72), "small product: x has 511 elements, 512 are needed");
    assert_eq!(refused(8, 512, 35, 72), "small product: b has 35 elements, 36 are needed");
    assert_eq!(refused(8, 512, 36, 71), "small product: y has 71 elements, 72 are needed");
    let (h, mut logits) = (poisoned(device, 64), poisoned(device, 5));
    let error = logits_row(1, &h, &matrix(device, Kind::Dense, 5, 64), &mut logits).unwrap_err().to_string();
    assert_eq!(error, "logits of a row: h has 64 elements, 128 are needed");
}
