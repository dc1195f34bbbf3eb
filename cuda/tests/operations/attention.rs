use crate::harness::{Outputs, ReadBack, close, everywhere, poisoned, random, relative_error, round, upload};
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

#[test]
fn other_widths_are_those_of_double_precision() {
    for (head_dim, heads, kv_heads) in
        [(4, 2, 1), (5, 3, 3), (16, 14, 2), (80, 2, 2), (96, 4, 1), (256, 1, 1)]
    {
        case(&[17, 1, 40], heads, kv_heads, head_dim).check();
    }
}

/// Lengths on both sides of a tile, packed.
const LENGTHS: [&[usize]; 6] = [&[], &[1], &[17, 1], &[64], &[65, 3, 130], &[0, 130, 0, 1]];

#[test]
fn heads_of_64_and_128_are_those_of_double_precision() {
    for lengths in LENGTHS {
        for (head_dim, heads, kv_heads) in [(64, 2, 1), (128, 1, 1)] {
            case(lengths, heads, kv_heads, head_dim).check();
        }
    }
}
