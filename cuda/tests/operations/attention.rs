use crate::harness::{
    Outputs, ReadBack, close, counted, everywhere, poisoned, random, relative_error, round, upload,
};
use finetuned_cuda::ops::attention::{Shape, backward, forward, scratch_elements};
use finetuned_cuda::{Buffer, Device, Error};

/// Elements behind the shape, which have to stay as they were.
const BEHIND: usize = 24;

/// A packed batch: the lengths of its examples, and what is computed on it.
#[derive(Clone, Debug)]
struct Case {
    lengths: Vec<usize>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
    /// Standard deviation of q and k; the scores' is its square.
    size: f64,
}

fn case(lengths: &[usize], heads: usize, kv_heads: usize, head_dim: usize) -> Case {
    Case { lengths: lengths.to_vec(), heads, kv_heads, head_dim, window: None, size: 1.0 }
}

/// q, k, v and the gradient of out.
#[derive(Clone)]
struct Inputs {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    dout: Vec<f64>,
}

/// What attention and its gradient give.
#[derive(Default)]
struct Expected {
    out: Vec<f64>,
    log_sum: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

impl Case {
    fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    fn offsets(&self) -> Vec<u32> {
        let ends = self.lengths.iter().scan(0, |end, len| {
            *end += *len as u32;
            Some(*end)
        });
        std::iter::once(0).chain(ends).collect()
    }

    fn shape(&self) -> Shape {
        Shape {
            tokens: self.tokens(),
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: self.scale() as f32,
            window: self.window,
            sequences: self.lengths.len(),
            longest: self.lengths.iter().copied().max().unwrap_or(0),
        }
    }

    fn scale(&self) -> f64 {
        f64::from((1.0 / (self.head_dim as f64).sqrt()) as f32)
    }

    fn inputs(&self) -> Inputs {
        let (queries, keys) =
            (self.tokens() * self.heads * self.head_dim, self.tokens() * self.kv_heads * self.head_dim);
        let sized = |values: Vec<f64>| values.iter().map(|v| round(v * self.size)).collect();
        Inputs {
            q: sized(random(queries, 1)),
            k: sized(random(keys, 2)),
            v: random(keys, 3),
            dout: random(queries, 4),
        }
    }

    /// The same with that window.
    fn within(self, window: usize) -> Case {
        Case { window: Some(window), ..self }
    }

    /// The formula, with `r` applied to what a chain of tensor operations would store: scores, probabilities and
    /// their gradients as T × T matrices, and every result. Products are summed in double precision.
    fn compute(&self, x: &Inputs, r: fn(f64) -> f64) -> Expected {
        let (heads, kv_heads, d) = (self.heads, self.kv_heads, self.head_dim);
        let (scale, group) = (self.scale(), heads / kv_heads);
        let mut e = Expected {
            out: vec![0.0; x.q.len()],
            log_sum: vec![0.0; self.tokens() * heads],
            dq: vec![0.0; x.q.len()],
            dk: vec![0.0; x.k.len()],
            dv: vec![0.0; x.k.len()],
        };
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        for (pair, h) in self.offsets().windows(2).flat_map(|w| (0..heads).map(move |h| ([w[0], w[1]], h))) {
            let (start, len) = (pair[0] as usize, (pair[1] - pair[0]) as usize);
            let q_at = |i: usize| ((start + i) * heads + h) * d..((start + i) * heads + h + 1) * d;
            let k_at = |j: usize| {
                let row = (start + j) * kv_heads + h / group;
                row * d..(row + 1) * d
            };
            let (mut dk, mut dv) = (vec![0.0; len * d], vec![0.0; len * d]);
            for i in 0..len {
                let low = self.window.map_or(0, |w| (i + 1).saturating_sub(w));
                let scores: Vec<f64> =
                    (low..=i).map(|j| r(r(dot(&x.q[q_at(i)], &x.k[k_at(j)])) * scale)).collect();
                let most = scores.iter().copied().fold(f64::MIN, f64::max);
                let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
                e.log_sum[(start + i) * heads + h] = most + total.ln();
                let p: Vec<f64> = scores.iter().map(|s| r((s - most).exp() / total)).collect();
                let dp: Vec<f64> = (low..=i).map(|j| r(dot(&x.dout[q_at(i)], &x.v[k_at(j)]))).collect();
                let delta = dot(&p, &dp);
                for c in 0..d {
                    let sum: f64 = (low..=i).map(|j| p[j - low] * x.v[k_at(j)][c]).sum();
                    e.out[q_at(i)][c] = r(sum);
                }
                for j in low..=i {
                    let ds = r(r(p[j - low] * (dp[j - low] - delta)) * scale);
                    for c in 0..d {
                        e.dq[q_at(i)][c] += ds * x.k[k_at(j)][c];
                        dk[j * d + c] += ds * x.q[q_at(i)][c];
                        dv[j * d + c] += p[j - low] * x.dout[q_at(i)][c];
                    }
                }
                e.dq[q_at(i)].iter_mut().for_each(|v| *v = r(*v));
            }
            for j in 0..len {
                for c in 0..d {
                    let (k, v) = (&mut e.dk[k_at(j)][c], &mut e.dv[k_at(j)][c]);
                    (*k, *v) = (r(*k + r(dk[j * d + c])), r(*v + r(dv[j * d + c])));
                }
            }
        }
        e
    }

    /// out, log_sum, dq, dk, dv, each with [`BEHIND`] elements that are none of its own.
    fn run(&self, device: &Device, x: &Inputs) -> Result<Outputs, Error> {
        let shape = self.shape();
        let offsets = Buffer::from_slice(device, &self.offsets())?;
        let [q, k, v, dout] = [&x.q, &x.k, &x.v, &x.dout].map(|values| upload(device, values));
        let rows = shape.tokens * shape.heads;
        let (mut out, mut log_sum) = (poisoned(device, x.q.len() + BEHIND), poisoned(device, rows + BEHIND));
        forward(shape, &offsets, &q, &k, &v, &mut out, &mut log_sum)?;
        let mut scratch = poisoned(device, scratch_elements(shape.tokens, shape.heads));
        let mut dq = poisoned(device, x.q.len() + BEHIND);
        let (mut dk, mut dv) = (poisoned(device, x.k.len() + BEHIND), poisoned(device, x.k.len() + BEHIND));
        backward(
            shape,
            &offsets,
            &q,
            &k,
            &v,
            &out,
            &log_sum,
            &dout,
            &mut scratch,
            &mut dq,
            &mut dk,
            &mut dv,
        )?;
        Ok(vec![
            ("out", out.all()),
            ("log_sum", log_sum.all()),
            ("dq", dq.all()),
            ("dk", dk.all()),
            ("dv", dv.all()),
        ])
    }

    fn check(&self) {
        let x = self.inputs();
        let (oracle, naive) = (self.compute(&x, |v| v), self.compute(&x, round));
        everywhere(
            |device| self.run(device, &x),
            |device, outputs| {
                let of = |e: &Expected| [&e.out, &e.log_sum, &e.dq, &e.dk, &e.dv].map(Clone::clone);
                for (((name, found), oracle), naive) in outputs.iter().zip(of(&oracle)).zip(of(&naive)) {
                    let what = format!("{device}: {name} of {self:?}");
                    let found = found.f64();
                    let (found, behind) = found.split_at(oracle.len());
                    assert!(behind.iter().all(|v| v.is_nan()), "{what}: written behind the shape");
                    if *name == "log_sum" {
                        for (found, oracle) in found.iter().zip(&oracle) {
                            let allowed = 3e-6 * (1.0 + oracle.abs());
                            assert!((found - oracle).abs() <= allowed, "{what}: {found}, {oracle}");
                        }
                    } else if relative_error(&naive, &oracle) == 0.0 {
                        // Every query sees one key: no score matters, and what is left of a difference is rounding.
                        let worst = found.iter().zip(&oracle).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                        assert!(worst <= 1e-5, "{what}: off by {worst:e}");
                    } else {
                        close(&what, found, &oracle, &naive);
                    }
                }
            },
        );
    }
}

/// Lengths on both sides of a tile, packed.
#[test]
fn heads_of_64_and_128_are_those_of_double_precision() {
    for lengths in [&[][..], &[1], &[17, 1], &[64], &[65, 3, 130], &[0, 130, 0, 1]] {
        for (head_dim, heads, kv_heads) in [(64, 2, 1), (128, 1, 1)] {
            case(lengths, heads, kv_heads, head_dim).check();
        }
    }
}

/// Filled up to a tile; and without tiles.
#[test]
fn other_widths_are_those_of_double_precision() {
    for (head_dim, heads, kv_heads) in [(72, 2, 1), (80, 2, 2), (96, 1, 1), (120, 2, 1)] {
        case(&[17, 0, 1, 40], heads, kv_heads, head_dim).check();
    }
    for (head_dim, heads, kv_heads) in
        [(1, 2, 1), (4, 2, 1), (5, 3, 3), (16, 14, 2), (136, 4, 1), (256, 1, 1), (512, 1, 1)]
    {
        case(&[17, 0, 1, 40], heads, kv_heads, head_dim).check();
    }
    case(&[130, 65], 1, 1, 80).check();
    case(&[130, 65], 1, 1, 16).check();
}

/// Query heads share a head of keys, whose gradient is the sum over them.
#[test]
fn heads_of_a_group_are_summed() {
    for (heads, kv_heads, head_dim) in [(4, 2, 128), (4, 1, 64), (14, 2, 64)] {
        case(&[70, 17], heads, kv_heads, head_dim).check();
    }
}

/// A window of one key, windows smaller and larger than a tile; tiles of which a row has seen nothing yet.
#[test]
fn a_window_hides_what_lies_behind_it() {
    for window in [1, 16, 70] {
        for head_dim in [16, 64, 128] {
            case(&[130, 33], 1, 1, head_dim).within(window).check();
        }
    }
    case(&[200], 1, 1, 64).within(usize::MAX).check();
}

/// Scores of several hundred, whose exponentials are no floats.
#[test]
fn large_scores_do_not_overflow() {
    for head_dim in [16, 64, 128] {
        Case { size: 10.0, ..case(&[130, 1], 1, 1, head_dim) }.check();
    }
}

/// More examples than a warp has lanes, some of them empty.
#[test]
fn many_examples_are_found() {
    let lengths: Vec<usize> = (0..50).map(|i| i * 2 % 3).collect();
    for head_dim in [16, 64, 128] {
        case(&lengths, 1, 1, head_dim).check();
    }
}

/// Alone, or anywhere in a batch whose other examples are not even numbers: the same bits.
#[test]
fn a_result_is_a_function_of_its_example() {
    let length = 70;
    for (head_dim, window) in [(64, None), (128, Some(16)), (80, None), (16, Some(16))] {
        let alone = Case { window, ..case(&[length], 2, 1, head_dim) };
        let x = alone.inputs();
        for (before, behind) in [(3, 0), (65, 20)] {
            let batch = Case { lengths: vec![before, length, behind], ..alone.clone() };
            // Rows of so many elements a token.
            let between = |values: &[f64]| {
                let row = values.len() / length;
                [&vec![f64::NAN; before * row][..], values, &vec![f64::NAN; behind * row]].concat()
            };
            let [q, k, v, dout] = [&x.q, &x.k, &x.v, &x.dout].map(|values| between(values));
            let all = Inputs { q, k, v, dout };
            everywhere(
                |device| {
                    let (alone, batch) = (alone.run(device, &x)?, batch.run(device, &all)?);
                    Ok(alone.into_iter().chain(batch).collect())
                },
                |device, outputs| {
                    let (alone, batch) = outputs.split_at(outputs.len() / 2);
                    for ((name, alone), (_, batch)) in alone.iter().zip(batch) {
                        let alone = alone.f64();
                        let of_example = alone.len() - BEHIND;
                        let first = of_example / length * before;
                        let found = &batch.f64()[first..first + of_example];
                        assert!(
                            found
                                .iter()
                                .zip(&alone)
                                .all(|(a, b)| a.to_bits() == b.to_bits() && a.is_finite()),
                            "{device}: {name} of {alone:?} depends on what surrounds it ({before}, {behind})"
                        );
                    }
                },
            );
        }
    }
}

/// A NaN reaches what depends on it, and no earlier query.
#[test]
fn what_is_not_a_number_is_not_hidden() {
    for head_dim in [64, 128, 16] {
        let case = case(&[70], 1, 1, head_dim);
        let mut x = case.inputs();
        x.q[66 * head_dim] = f64::NAN;
        everywhere(
            |device| case.run(device, &x),
            |device, outputs| {
                for row in 0..70 {
                    let out = &outputs[0].1.f64()[row * head_dim..][..head_dim];
                    let log_sum = outputs[1].1.f64()[row];
                    assert!(out.iter().all(|v| v.is_nan() == (row == 66)), "{device}: row {row}");
                    assert!(log_sum.is_nan() == (row == 66), "{device}: row {row}");
                }
            },
        );
    }
}

/// Products are made for tiles that some query of the tile sees, and for no others; each reads a tile of keys and values
/// once; what crosses the bus is every row once; the banks are never in each other's way.
#[test]
fn tiles_that_nobody_sees_are_not_visited() {
    // Tiles of 64 queries × 64 keys; and for the gradient of the keys in heads of 128, of 32 queries × 64 keys.
    for (lengths, window, tiles, narrow_tiles) in [
        (&[256][..], None, 1 + 2 + 3 + 4, 8 + 6 + 4 + 2),
        (&[130, 64], None, 1 + 2 + 3 + 1, 5 + 3 + 1 + 2),
        (&[256], Some(16), 1 + 2 + 2 + 2, 3 + 3 + 3 + 2),
        (&[256], Some(1), 4, 2 + 2 + 2 + 2),
    ] {
        for head_dim in [64, 128] {
            let case = Case { window, ..case(lengths, 2, 1, head_dim) };
            let Some(counters) = counted(|device| case.run(device, &case.inputs()).map(|_| ())) else {
                return;
            };
            let what = format!("{case:?}");
            let name = |kernel: &str| counters[&format!("{kernel}{head_dim}")[..]];
            let (forward, dkv, dq) = (name("attention_"), name("attention_dkv_"), name("attention_dq_"));
            // Of 64 × 64 × head_dim multiplications and additions, 2048 an instruction.
            let product = 2 * head_dim as u64;
            assert_eq!(forward.mma, 2 * 2 * tiles * product, "{what}");
            assert_eq!(dq.mma, 2 * 3 * tiles * product, "{what}");
            let halves = if head_dim == 64 { 2 * tiles } else { narrow_tiles };
            assert_eq!(dkv.mma, 2 * 4 * halves * product / 2, "{what}");
            for (kernel, found) in &counters {
                assert_eq!(found.bank_conflicts, 0, "{kernel} of {what}");
            }
            // A row is 2·head_dim bytes.
            let (row, tokens) = (2 * head_dim as u64, case.tokens() as u64);
            let offsets = 32 * 2;
            // q and out of two heads, k, v; log_sum.
            assert!(forward.bus_bytes() <= tokens * (6 * row + 2 * 4) + offsets, "{what}");
            // k, v, dk, dv, q and dout of two heads; log_sum, delta.
            assert!(dkv.bus_bytes() <= tokens * (8 * row + 2 * 8) + offsets, "{what}");
            // q, dout, dq of two heads, k, v; log_sum, delta.
            assert!(dq.bus_bytes() <= tokens * (8 * row + 2 * 8) + offsets, "{what}");
            // Whole sectors of results are written once.
            assert_eq!(dkv.global_store_sectors, tokens * 2 * row / 32, "{what}");
            assert_eq!(dq.global_store_sectors, tokens * 2 * row / 32, "{what}");
            if lengths == [256] {
                // Four warps (eight) of every block read the offsets.
                let offsets = |warps: u64| 4 * 2 * warps * 8;
                assert_eq!(
                    forward.global_load_bytes,
                    2 * (tokens + tiles * 128) * row + offsets(4),
                    "{what}"
                );
                assert_eq!(
                    dq.global_load_bytes,
                    2 * (2 * tokens + tiles * 128) * row + 2 * tokens * 4 * 8 + offsets(4),
                    "{what}"
                );
                assert_eq!(
                    dkv.global_load_bytes,
                    2 * tokens * row + 2 * halves * 32 * (2 * row + 8) + offsets(8) / 2,
                    "{what}"
                );
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let Some(simt) = crate::harness::simt() else { return };
    let device = simt.device();
    let good = case(&[5], 2, 1, 64).shape();
    let call = |shape: Shape, q: usize, offsets: usize| {
        let offsets = Buffer::from_slice(&device, &vec![0; offsets]).unwrap();
        let [q, k, v] = [q, 320, 320].map(|len| poisoned(&device, len));
        let (mut out, mut log_sum) = (poisoned(&device, 640), poisoned(&device, 10));
        forward(shape, &offsets, &q, &k, &v, &mut out, &mut log_sum).unwrap_err().to_string()
    };
    for (shape, q, offsets, said) in [
        (Shape { heads: 3, kv_heads: 2, ..good }, 640, 2, "3 heads of queries cannot share 2 of keys"),
        (Shape { kv_heads: 0, ..good }, 640, 2, "2 heads of queries cannot share 0"),
        (Shape { head_dim: 0, ..good }, 640, 2, "heads of 0 elements"),
        (Shape { head_dim: 513, ..good }, 640, 2, "heads of 513 elements, not of 1 to 512"),
        (Shape { scale: 0.0, ..good }, 640, 2, "a scale of 0"),
        (Shape { scale: f32::NAN, ..good }, 640, 2, "a scale of NaN"),
        (Shape { window: Some(0), ..good }, 640, 2, "a window of 0"),
        (Shape { tokens: usize::MAX, ..good }, 640, 2, "tokens, more than 2^31 - 1"),
        (Shape { longest: 4, ..good }, 640, 2, "1 examples of at most 4 tokens are not 5"),
        (Shape { sequences: 0, ..good }, 640, 2, "0 examples of at most 5"),
        (good, 639, 2, "q has 639 elements, 640 are needed"),
        (good, 640, 1, "cu_seqlens has 1 elements, 2 are needed"),
    ] {
        let error = call(shape, q, offsets);
        assert!(error.starts_with("attention: ") && error.contains(said), "{error}");
    }
}
