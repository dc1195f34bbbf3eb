use crate::harness::{
    Outputs, ReadBack, counted, everywhere, poisoned, random, relative_error, same_bits, upload, upload_f32,
};
use finetuned_cuda::ops::adapter_gradient::{Part, PartShape, adapter_gradients, scratch_elements};
use finetuned_cuda::ops::dropout::Sequences;
use finetuned_cuda::{Buffer, Device, Error};
use half::bf16;
use std::ops::Range;

/// Elements behind each gradient, which stay as they are.
const BEHIND: usize = 5;

/// Lengths of the sequences, inputs, and for each part outputs, r and whether its input is its own.
type Case = (&'static [usize], usize, &'static [(usize, usize, bool)]);

/// One element; sizes that divide nothing; nothing at all; chunks (256 tokens) cut short, whole and several; a group with one
/// X; dropout; more columns than a job has room for; a rank that is no run.
const CASES: [Case; 10] = [
    (&[1], 1, &[(1, 1, false)]),
    (&[3, 5], 7, &[(9, 4, false), (5, 4, false), (3, 4, false)]),
    (&[], 8, &[(8, 4, false)]),
    (&[0, 6, 0], 16, &[(24, 8, false)]),
    (&[300, 1, 40], 72, &[(136, 8, false), (24, 8, false), (24, 8, false)]),
    (&[256, 520], 200, &[(40, 16, true), (64, 16, true)]),
    (&[33], 64, &[(16, 64, false), (16, 32, false), (8, 32, false)]),
    (&[10], 24, &[(12, 100, false)]),
    (&[5, 6], 40, &[(20, 6, false), (20, 5, true)]),
    (&[70], 576, &[(576, 16, false), (192, 16, false), (192, 16, false)]),
];

/// Operands of one part.
struct Layer {
    outputs: usize,
    rank: usize,
    dy: Vec<f64>,
    down: Vec<f64>,
    gradient: Vec<f64>,
    input: Option<Vec<f64>>,
    da: Vec<f64>,
    db: Vec<f64>,
}

struct Group {
    lengths: Vec<usize>,
    inputs: usize,
    x: Vec<f64>,
    layers: Vec<Layer>,
}

fn group(lengths: &[usize], inputs: usize, parts: &[(usize, usize, bool)]) -> Group {
    let tokens: usize = lengths.iter().sum();
    let layer = |i: usize, &(outputs, rank, own): &(usize, usize, bool)| {
        let seed = 10 * i as u64;
        Layer {
            outputs,
            rank,
            dy: random(tokens * outputs, seed + 1),
            down: random(tokens * rank, seed + 2),
            gradient: random(tokens * rank, seed + 3),
            input: own.then(|| random(tokens * inputs, seed + 4)),
            da: random(rank * inputs + BEHIND, seed + 5),
            db: random(outputs * rank + BEHIND, seed + 6),
        }
    };
    let layers = parts.iter().enumerate().map(|(i, part)| layer(i, part)).collect();
    Group { lengths: lengths.to_vec(), inputs, x: random(tokens * inputs, 100), layers }
}

/// `out + aᵀ·b` of a `[tokens, m]` and b `[tokens, n]`.
fn plus_product(out: &[f64], a: &[f64], m: usize, b: &[f64], n: usize) -> Vec<f64> {
    let mut out = out.to_vec();
    for (a, b) in a.chunks_exact(m).zip(b.chunks_exact(n)) {
        for (i, a) in a.iter().enumerate() {
            for (o, b) in out[i * n..].iter_mut().zip(b) {
                *o += a * b;
            }
        }
    }
    out
}

fn sequences(device: &Device, lengths: &[usize]) -> Sequences {
    let mut offsets = vec![0u32];
    for length in lengths {
        offsets.push(offsets[offsets.len() - 1] + *length as u32);
    }
    Sequences {
        offsets: Buffer::from_slice(device, &offsets).unwrap(),
        keys: poisoned(device, lengths.len()),
        count: lengths.len(),
        longest: lengths.iter().copied().max().unwrap_or(0),
        tokens: lengths.iter().sum(),
    }
}

impl Group {
    fn shapes(&self) -> Vec<PartShape> {
        let shape = |l: &Layer| PartShape { outputs: l.outputs, rank: l.rank, own_input: l.input.is_some() };
        self.layers.iter().map(shape).collect()
    }

    /// The gradients after one call.
    fn at_once(&self, device: &Device) -> Result<Outputs, Error> {
        self.run(device, std::slice::from_ref(&(0..self.lengths.len())))
    }

    /// The gradients after calls with these sequences each.
    fn run(&self, device: &Device, calls: &[Range<usize>]) -> Result<Outputs, Error> {
        let gradients = |values: fn(&Layer) -> &Vec<f64>| -> Vec<Buffer<f32>> {
            self.layers.iter().map(|layer| upload_f32(device, values(layer))).collect()
        };
        let (mut da, mut db) = (gradients(|layer| &layer.da), gradients(|layer| &layer.db));
        for call in calls {
            let before: usize = self.lengths[..call.start].iter().sum();
            let sequences = sequences(device, &self.lengths[call.clone()]);
            let rows = |values: &[f64], cols: usize| {
                upload(device, &values[before * cols..(before + sequences.tokens) * cols])
            };
            let x = rows(&self.x, self.inputs);
            let buffers: Vec<_> = self
                .layers
                .iter()
                .map(|l| {
                    let input = l.input.as_ref().map(|input| rows(input, self.inputs));
                    (rows(&l.dy, l.outputs), rows(&l.down, l.rank), rows(&l.gradient, l.rank), input)
                })
                .collect();
            let mut parts: Vec<Part<'_>> = self
                .layers
                .iter()
                .zip(&buffers)
                .zip(da.iter_mut().zip(&mut db))
                .map(|((layer, (dy, down, gradient, input)), (da, db))| Part {
                    outputs: layer.outputs,
                    rank: layer.rank,
                    dy,
                    down,
                    gradient,
                    input: input.as_ref(),
                    da: Some(da),
                    db: Some(db),
                })
                .collect();
            let elements = scratch_elements(
                device.properties(),
                sequences.tokens,
                sequences.count,
                self.inputs,
                &self.shapes(),
            );
            let mut scratch = poisoned(device, elements);
            adapter_gradients(&sequences, self.inputs, &x, &mut parts, &mut scratch)?;
        }
        let all = da.iter().zip(&db).flat_map(|(da, db)| [("da", da.all()), ("db", db.all())]);
        Ok(all.collect())
    }
}

/// Products of bf16 are exact in fp32, so what is left is the sum's rounding: the bound is that of every addition cutting off
/// a unit in the last place.
#[track_caller]
fn summed(what: &str, found: &[f64], oracle: &[f64], tokens: usize) {
    let (error, allowed) = (relative_error(found, oracle), (tokens + 4) as f64 / f64::from(1 << 23));
    assert!(error <= allowed, "{what}: error {error:.3e}, allowed are {allowed:.3e}");
}

#[test]
fn gradients_are_those_of_double_precision_and_add() {
    for (lengths, inputs, parts) in CASES {
        let group = group(lengths, inputs, parts);
        let tokens = lengths.iter().sum();
        let oracles: Vec<[Vec<f64>; 2]> = group
            .layers
            .iter()
            .map(|l| {
                let input = l.input.as_ref().unwrap_or(&group.x);
                [
                    plus_product(&l.da, &l.gradient, l.rank, input, inputs),
                    plus_product(&l.db, &l.dy, l.outputs, &l.down, l.rank),
                ]
            })
            .collect();
        everywhere(
            |device| group.at_once(device),
            |device, outputs| {
                for ((name, found), oracle) in outputs.iter().zip(oracles.iter().flatten()) {
                    let what = format!("{device}: {name} of {lengths:?} × {inputs}, {parts:?}");
                    let (found, len) = (found.f64(), oracle.len() - BEHIND);
                    summed(&what, &found[..len], &oracle[..len], tokens);
                    assert_eq!(found[len..], oracle[len..], "{what}: behind the gradient");
                }
            },
        );
    }
}

/// 4 × 1, 2 × 2 and 1 × 4 sequences, and 1 + 3: the same bits.
#[test]
fn the_cut_into_micro_batches_cannot_be_seen() {
    let group = group(&[300, 7, 513, 256], 136, &[(40, 16, false), (24, 16, true)]);
    let splits: [&[Range<usize>]; 4] =
        [&[0..1, 1..2, 2..3, 3..4], &[0..2, 2..4], &[0..4, 4..4], &[0..1, 1..4]];
    everywhere(
        |device| {
            let mut all = vec![];
            for split in splits {
                all.extend(group.run(device, split)?);
            }
            Ok(all)
        },
        |device, outputs| {
            let (one_by_one, others) = outputs.split_at(outputs.len() / splits.len());
            for (i, (name, found)) in others.iter().enumerate() {
                let expected = &one_by_one[i % one_by_one.len()].1;
                same_bits(
                    &format!("{device}: {name} of split {}", 1 + i / one_by_one.len()),
                    found,
                    expected,
                );
            }
        },
    );
}

/// With tiles enough for the device blocks walk all chunks; with fewer each has one. The grid is all that differs.
#[test]
fn whole_and_split_have_one_order() {
    let (lengths, inputs, rank) = ([258, 30], 24, 8);
    let wide = group(&lengths, inputs, &[(31 * 128, rank, false)]);
    let narrow_outputs = 200;
    let layer = &wide.layers[0];
    let columns = |row: &[f64]| row[..narrow_outputs].to_vec();
    let narrow = Group {
        lengths: lengths.to_vec(),
        inputs,
        x: wide.x.clone(),
        layers: vec![Layer {
            outputs: narrow_outputs,
            rank,
            dy: layer.dy.chunks_exact(layer.outputs).flat_map(columns).collect(),
            down: layer.down.clone(),
            gradient: layer.gradient.clone(),
            input: None,
            da: layer.da.clone(),
            db: layer.db[..narrow_outputs * rank].to_vec(),
        }],
    };
    let run = |device: &Device| {
        let tokens = lengths.iter().sum();
        // An Orin in MAXN has 16 SMs; a larger GPU may split both.
        if device.properties().multiprocessors <= 16 {
            assert_eq!(scratch_elements(device.properties(), tokens, 2, inputs, &wide.shapes()), 0);
        }
        assert!(scratch_elements(device.properties(), tokens, 2, inputs, &narrow.shapes()) > 0);
        let (wide, narrow) = (wide.at_once(device)?, narrow.at_once(device)?);
        let whole = |i: usize| wide[i].1.f64();
        let same = narrow[0].1 == wide[0].1 && narrow[1].1.f64()[..] == whole(1)[..narrow_outputs * rank];
        assert!(same, "da or db depends on the grid");
        Ok(())
    };
    if let Some(simt) = crate::harness::simt() {
        run(&simt.device()).unwrap_or_else(|error: Error| panic!("{error}"));
    }
    if let Ok(device) = crate::harness::gpu() {
        run(device).unwrap_or_else(|error: Error| panic!("{error}"));
    }
}

/// X is read once for q, k and v, each dY once; thin operands once for every 128 columns. No bank conflicts.
#[test]
fn traffic_is_that_of_the_head_comment() {
    let (tokens, inputs, rank, outputs) = (256, 512, 16, [512, 128, 128]);
    let group = group(&[tokens], inputs, &outputs.map(|outputs| (outputs, rank, false)));
    let counters = counted(|device| group.at_once(device).map(|_| ()));
    let Some(counters) = counters else { return };
    let found = counters["adapter_gradient"];
    let wide = 2 * tokens * (inputs + outputs.iter().sum::<usize>());
    let tiles = 3 * inputs / 128 + outputs.iter().sum::<usize>() / 128;
    let thin = 2 * tokens * rank * tiles;
    let gradients = 4 * rank * (3 * inputs + outputs.iter().sum::<usize>());
    let offsets = 2 * 4 * 256 * (inputs / 128 + outputs.iter().sum::<usize>() / 128);
    assert_eq!(found.global_load_bytes, (wide + thin + gradients + offsets) as u64);
    assert_eq!(found.global_store_bytes, gradients as u64);
    assert_eq!(found.bank_conflicts, 0);
    // 16 × 8 × 16 products each.
    assert_eq!(found.mma, (rank * (3 * inputs + outputs.iter().sum::<usize>()) * tokens / 2048) as u64);
    assert!(!counters.contains_key("adapter_gradient_sum"));
}

/// The sum of chunks: each partial is written once and read once.
#[test]
fn scratch_is_written_and_read_once() {
    let (inputs, outputs, rank) = (256, 128, 8);
    let group = group(&[512, 256], inputs, &[(outputs, rank, false)]);
    let counters = counted(|device| group.at_once(device).map(|_| ()));
    let Some(counters) = counters else { return };
    let gradients = (4 * rank * (inputs + outputs)) as u64;
    assert_eq!(counters["adapter_gradient"].global_store_bytes, 3 * gradients);
    let sum = counters["adapter_gradient_sum"];
    assert_eq!(sum.bus_bytes(), (3 + 2) * gradients + 32);
    assert_eq!(32 * sum.global_store_sectors, gradients);
}

/// A gradient that nobody wants is not computed.
#[test]
fn gradients_are_optional() {
    everywhere(
        |device| {
            let (x, dy) = (upload(device, &random(4 * 8, 1)), upload(device, &random(4 * 8, 2)));
            let (down, gradient) = (upload(device, &random(4 * 4, 3)), poisoned(device, 0));
            let (mut db, mut scratch) = (upload_f32(device, &[0.0; 32]), poisoned(device, 0));
            let mut parts = [Part {
                outputs: 8,
                rank: 4,
                dy: &dy,
                down: &down,
                gradient: &gradient,
                input: None,
                da: None,
                db: Some(&mut db),
            }];
            adapter_gradients(&sequences(device, &[4]), 8, &x, &mut parts, &mut scratch)?;
            Ok(vec![("db", db.all())])
        },
        |device, outputs| {
            let oracle = plus_product(&[0.0; 32], &random(4 * 8, 2), 8, &random(4 * 4, 3), 4);
            summed(device, &outputs[0].1.f64(), &oracle, 4);
        },
    );
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let Some(simt) = crate::harness::simt() else { return };
    let device = &simt.device();
    let refused = |dy_len: usize, da_len: usize, scratch_len: usize, count: usize| {
        let dy = poisoned::<bf16>(device, dy_len);
        let thin = poisoned::<bf16>(device, 300 * 4);
        let x = poisoned::<bf16>(device, 300 * 8);
        let mut gradients: Vec<[Buffer<f32>; 2]> =
            (0..count).map(|_| [poisoned(device, da_len), poisoned(device, 32)]).collect();
        let mut parts: Vec<Part<'_>> = gradients
            .iter_mut()
            .map(|[da, db]| Part {
                outputs: 8,
                rank: 4,
                dy: &dy,
                down: &thin,
                gradient: &thin,
                input: None,
                da: Some(da),
                db: Some(db),
            })
            .collect();
        let mut scratch = poisoned(device, scratch_len);
        let sequences = sequences(device, &[300]);
        adapter_gradients(&sequences, 8, &x, &mut parts, &mut scratch).unwrap_err().to_string()
    };
    let enough = 300 * 8;
    assert_eq!(refused(enough - 1, 32, 1000, 1), "adapter_gradients: dy has 2399 elements, 2400 are needed");
    assert_eq!(refused(enough, 31, 1000, 1), "adapter_gradients: da has 31 elements, 32 are needed");
    assert_eq!(refused(enough, 32, 127, 1), "adapter_gradients: scratch has 127 elements, 128 are needed");
    assert_eq!(refused(enough, 32, 1000, 4), "adapter_gradients: 4 parts, more than 3");
}
