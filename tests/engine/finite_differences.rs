//! Every backward operation against central differences in float64, on odd sizes.
//!
//! For a scalar L = Σ wᵢ·yᵢ with random w, the backward pass started from w must give ∂L/∂x; the truth is
//! (L(x + h) − L(x − h))/2h with h = 1e-5, whose own error is about 1e-9 here.

use super::support::*;
use finetuned::backend::cpu::Cpu;
use finetuned::backend::{
    Absmax, AttentionShape, Backend, Batch, Blob, DenseMatrix, Dropout, Dtype, FrozenMatrix, Lora,
    Projection, ProjectionBackward, Role, nf4,
};
use finetuned::model::adapter::{Adapter, AdapterLayout, Module};
use finetuned::model::config::ModelConfig;
use finetuned::model::decoder::{BatchShape, Decoder, Workspace};
use finetuned::model::weights::{Base, BaseLayer, BaseLinear, CacheUse};

type Oracle = Cpu<f64>;

const STEP: f64 = 1e-5;
const TOLERANCE: f64 = 1e-7;

/// Uniform in ±1, reproducible.
fn random(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .collect()
}

fn weighted(y: &[f64], w: &[f64]) -> f64 {
    y.iter().zip(w).map(|(a, b)| a * b).sum()
}

/// Holds `gradient` against differences of `loss` around `x`.
fn check(what: &str, x: &[f64], gradient: &[f64], mut loss: impl FnMut(&[f64]) -> f64) {
    assert_eq!(x.len(), gradient.len());
    let mut moved = x.to_vec();
    let truth: Vec<f64> = (0..x.len())
        .map(|i| {
            moved[i] = x[i] + STEP;
            let above = loss(&moved);
            moved[i] = x[i] - STEP;
            let below = loss(&moved);
            moved[i] = x[i];
            (above - below) / (2.0 * STEP)
        })
        .collect();
    assert!(truth.iter().any(|v| v.abs() > 1e-6), "{what}: the gradient is zero, nothing was tested");
    let error = relative_error(gradient, &truth);
    assert!(error < TOLERANCE, "{what}: off by {error:e}");
}

/// Three sequences, one of them packed from two examples, one of a single token.
fn batch(vocabulary: usize) -> Batch {
    let mut batch = Batch::default();
    let tokens = |n: usize, seed: usize| -> Vec<u32> {
        (0..n).map(|i| ((i * 7 + seed * 3) % vocabulary) as u32).collect()
    };
    let targets = |n: usize, seed: usize| -> Vec<i32> {
        (0..n)
            .map(|i| if (i + seed).is_multiple_of(3) { -100 } else { ((i * 5 + seed) % vocabulary) as i32 })
            .collect()
    };
    batch.push(&tokens(7, 1), &targets(7, 1), &[0, 1, 2, 3, 0, 1, 2], &[0, 4, 7], 11);
    batch.push(&tokens(1, 2), &targets(1, 2), &[0], &[0, 1], 12);
    batch.push(&tokens(5, 3), &targets(5, 3), &[0, 1, 2, 3, 4], &[0, 5], 13);
    batch
}

#[test]
fn rms_norm() {
    let b = Oracle::new();
    let (rows, cols) = (5, 7);
    let (x, w, dy) = (random(rows * cols, 1), random(cols, 2), random(rows * cols, 3));
    let mut dx = vec![0.5; rows * cols];
    b.rms_norm_backward(rows, cols, &x, &w, 1e-5, &dy, &mut dx, true);
    dx.iter_mut().for_each(|v| *v -= 0.5);
    let mut replaced = vec![f64::NAN; rows * cols];
    b.rms_norm_backward(rows, cols, &x, &w, 1e-5, &dy, &mut replaced, false);
    assert!(relative_error(&dx, &replaced) < 1e-12, "+= and = differ");
    check("rms_norm", &x, &dx, |x| {
        let mut y = vec![0.0; rows * cols];
        b.rms_norm(rows, cols, &x.to_vec(), &w, 1e-5, &mut y);
        weighted(&y, &dy)
    });
}

#[test]
fn swiglu() {
    let b = Oracle::new();
    let n = 13;
    let (gate, up, dy) = (random(n, 1), random(n, 2), random(n, 3));
    let (mut dgate, mut dup) = (gate.clone(), up.clone());
    b.swiglu_backward(n, &dy, &mut dgate, &mut dup);
    let loss = |gate: &[f64], up: &[f64]| {
        let mut y = vec![0.0; n];
        b.swiglu(n, &gate.to_vec(), &up.to_vec(), &mut y);
        weighted(&y, &dy)
    };
    check("swiglu, gate", &gate, &dgate, |gate| loss(gate, &up));
    check("swiglu, up", &up, &dup, |up| loss(&gate, up));
}

#[test]
fn rope() {
    let b = Oracle::new();
    let batch = b.batch(batch(10));
    let (heads, d) = (3, 6);
    let n = batch.len() * heads * d;
    let frequencies = [1.0, 0.3, 0.07];
    let (x, dy) = (random(n, 1), random(n, 2));
    let mut dx = dy.clone();
    b.rope(&batch, heads, d, &frequencies, 1.5, true, &mut dx);
    check("rope", &x, &dx, |x| {
        let mut y = x.to_vec();
        b.rope(&batch, heads, d, &frequencies, 1.5, false, &mut y);
        weighted(&y, &dy)
    });
}

#[test]
fn attention() {
    let b = Oracle::new();
    // Longer than a strip of queries, so that strips meet; windows shorter and longer than an example.
    let mut long = Batch::default();
    let n = 71;
    let positions: Vec<u32> = (0..n).collect();
    long.push(&vec![0; n as usize], &vec![0; n as usize], &positions, &[0, n], 1);
    for (batch, heads, kv_heads, d) in [(batch(10), 4, 2, 3), (batch(10), 3, 3, 5), (long, 2, 1, 2)] {
        let batch = b.batch(batch);
        for window in [None, Some(2), Some(66)] {
            let shape = AttentionShape { heads, kv_heads, head_dim: d, scale: 0.7, window };
            let m = batch.len();
            let (q, k, v) =
                (random(m * heads * d, 1), random(m * kv_heads * d, 2), random(m * kv_heads * d, 3));
            let dout = random(m * heads * d, 4);
            let forward = |q: &[f64], k: &[f64], v: &[f64]| {
                let (mut out, mut log_sum) = (vec![f64::NAN; m * heads * d], vec![f64::NAN; m * heads]);
                b.attention(&batch, shape, &q.to_vec(), &k.to_vec(), &v.to_vec(), &mut out, &mut log_sum);
                (out, log_sum)
            };
            let (out, log_sum) = forward(&q, &k, &v);
            let nan = |len| vec![f64::NAN; len];
            let (mut dq, mut dk, mut dv) = (nan(q.len()), nan(k.len()), nan(v.len()));
            b.attention_backward(&batch, shape, &q, &k, &v, &out, &log_sum, &dout, &mut dq, &mut dk, &mut dv);
            let what = format!("attention {heads}/{kv_heads} heads, window {window:?}, {m} tokens");
            check(&format!("{what}: dq"), &q, &dq, |q| weighted(&forward(q, &k, &v).0, &dout));
            check(&format!("{what}: dk"), &k, &dk, |k| weighted(&forward(&q, k, &v).0, &dout));
            check(&format!("{what}: dv"), &v, &dv, |v| weighted(&forward(&q, &k, v).0, &dout));
        }
    }
}

fn dense(rows: usize, cols: usize, seed: u64) -> FrozenMatrix {
    let bytes: Vec<u8> = random(rows * cols, seed).iter().flat_map(|&v| (v as f32).to_le_bytes()).collect();
    FrozenMatrix::Dense(DenseMatrix { rows, cols, dtype: Dtype::F32, data: Blob::Owned(bytes.into()) })
}

fn quantised(rows: usize, cols: usize, seed: u64, double: bool) -> FrozenMatrix {
    let values: Vec<f32> = random(rows * cols, seed).iter().map(|&v| v as f32).collect();
    let matrix = nf4::quantize(&values, rows, cols, double).unwrap();
    assert_eq!(double, matches!(matrix.absmax, Absmax::Nested { .. }));
    FrozenMatrix::Nf4(matrix)
}

#[test]
fn linear_with_lora() {
    let b = Oracle::new();
    let batch = b.batch(batch(10));
    let m = batch.len();
    let (inputs, r) = (11, 3);
    let outputs = [9, 4];
    for dropout in [None, Some(Dropout { probability: 0.4, module: 5 })] {
        for weights in
            [[dense(9, 11, 1), dense(4, 11, 2)], [quantised(9, 11, 1, true), quantised(4, 11, 2, false)]]
        {
            let weights = weights.map(|w| b.matrix(w));
            let bias = random(9, 5);
            let x = random(m * inputs, 6);
            let a = outputs.map(|o| random(r * inputs, 10 + o as u64));
            let up = outputs.map(|o| random(o * r, 20 + o as u64));
            let dy = outputs.map(|o| random(m * o, 30 + o as u64));
            let forward = |x: &[f64], a: &[Vec<f64>; 2], up: &[Vec<f64>; 2]| {
                let mut y = outputs.map(|o| vec![f64::NAN; m * o]);
                let mut down = [vec![f64::NAN; m * r], vec![f64::NAN; m * r]];
                let mut group: Vec<Projection<'_, Oracle>> = y
                    .iter_mut()
                    .zip(&mut down)
                    .enumerate()
                    .map(|(i, (y, down))| Projection {
                        weight: &weights[i],
                        bias: (i == 0).then_some(&bias),
                        lora: Some(Lora { a: &a[i], b: &up[i], rank: r, scale: 1.7, dropout }),
                        output: Some(y),
                        down: Some(down),
                    })
                    .collect();
                b.linear(&batch, inputs, &x.to_vec(), &mut group);
                drop(group);
                (y, down)
            };
            let loss = |x: &[f64], a: &[Vec<f64>; 2], up: &[Vec<f64>; 2]| {
                let (y, _) = forward(x, a, up);
                weighted(&y[0], &dy[0]) + weighted(&y[1], &dy[1])
            };
            let (_, down) = forward(&x, &a, &up);
            let mut da = outputs.map(|_| vec![0.25; r * inputs]);
            let mut db = outputs.map(|o| vec![0.25; o * r]);
            let mut dx = vec![f64::NAN; m * inputs];
            let mut group: Vec<ProjectionBackward<'_, Oracle>> = da
                .iter_mut()
                .zip(&mut db)
                .enumerate()
                .map(|(i, (da, db))| ProjectionBackward {
                    weight: &weights[i],
                    lora: Some(Lora { a: &a[i], b: &up[i], rank: r, scale: 1.7, dropout }),
                    output_gradient: &dy[i],
                    down: Some(&down[i]),
                    a_gradient: Some(da),
                    b_gradient: Some(db),
                })
                .collect();
            b.linear_backward(&batch, inputs, &x, &mut group, Some(&mut dx));
            drop(group);
            check("linear: dx", &x, &dx, |x| loss(x, &a, &up));
            for i in 0..2 {
                let mut changed = a.clone();
                let added: Vec<f64> = da[i].iter().map(|v| v - 0.25).collect();
                check("linear: dA", &a[i], &added, |ai| {
                    changed[i] = ai.to_vec();
                    loss(&x, &changed, &up)
                });
                let mut changed = up.clone();
                let added: Vec<f64> = db[i].iter().map(|v| v - 0.25).collect();
                check("linear: dB", &up[i], &added, |bi| {
                    changed[i] = bi.to_vec();
                    loss(&x, &a, &changed)
                });
            }
        }
    }
}

#[test]
fn cross_entropy() {
    let b = Oracle::new();
    let (vocabulary, hidden) = (37, 5);
    let batch = b.batch(batch(vocabulary));
    let n = batch.labelled.len();
    let head = b.matrix(dense(vocabulary, hidden, 1));
    let h = random(n * hidden, 2);
    let mut dh = vec![f64::NAN; n * hidden];
    let losses = b.cross_entropy(&batch, hidden, &h, &head, Some(&mut dh));
    assert_eq!(losses, b.cross_entropy(&batch, hidden, &h, &head, None), "with and without gradient");
    assert_eq!(losses.len(), 3);
    check("cross_entropy", &h, &dh, |h| {
        b.cross_entropy(&batch, hidden, &h.to_vec(), &head, None).iter().sum()
    });
}

#[test]
fn gather_and_scatter_are_each_others_transpose() {
    let b = Oracle::new();
    let batch = b.batch(batch(10));
    let (m, n, cols) = (batch.len(), batch.labelled.len(), 3);
    assert!(n < m);
    let (x, dy) = (random(m * cols, 1), random(n * cols, 2));
    let mut dx = vec![f64::NAN; m * cols];
    b.scatter_labelled(&batch, cols, &dy, &mut dx);
    check("gather", &x, &dx, |x| {
        let mut y = vec![0.0; n * cols];
        b.gather_labelled(&batch, cols, &x.to_vec(), &mut y);
        weighted(&y, &dy)
    });
}

/// A Qwen3-like model (grouped queries, norms per head, a bias) with random weights.
fn model(vocabulary: usize, window: Option<usize>) -> (Decoder<Oracle>, ModelConfig) {
    let text = format!(
        r#"{{"architectures":["Qwen3ForCausalLM"],"model_type":"qwen3","hidden_size":8,"intermediate_size":11,
        "num_hidden_layers":3,"num_attention_heads":4,"num_key_value_heads":2,"head_dim":4,
        "vocab_size":{vocabulary},"max_position_embeddings":64,"rms_norm_eps":1e-5,"rope_theta":100.0,
        "tie_word_embeddings":false,"hidden_act":"silu","attention_bias":true}}"#
    );
    let mut config = ModelConfig::parse(&text, std::path::Path::new("config.json")).unwrap();
    config.windows = vec![window; config.layers];
    let mut seed = 100;
    let mut next = || {
        seed += 1;
        seed
    };
    let f32s = |n, seed| random(n, seed).iter().map(|&v| v as f32 + 1.0).collect::<Vec<_>>();
    let layers = (0..config.layers)
        .map(|_| {
            let mut linear = |module: Module| {
                let (rows, cols) = module.shape(&config);
                let bias = (module < Module::Gate).then(|| f32s(rows, next()));
                BaseLinear { weight: quantised(rows, cols, next(), true), bias }
            };
            let [q, k, v, o, gate, up, down] = Module::ALL.map(&mut linear);
            BaseLayer {
                q,
                k,
                v,
                o,
                gate,
                up,
                down,
                input_norm: f32s(8, next()),
                post_attention_norm: f32s(8, next()),
                q_norm: Some(f32s(4, next())),
                k_norm: Some(f32s(4, next())),
            }
        })
        .collect();
    let base = Base {
        embedding: dense(vocabulary, 8, 1),
        layers,
        final_norm: f32s(8, 2),
        lm_head: Some(dense(vocabulary, 8, 3)),
        hash: String::new(),
        quantization: finetuned::config::spec::Quantization::Nf4,
        double_quant: true,
        cache: CacheUse::NotNeeded,
        config: config.clone(),
    };
    (Decoder::new(Oracle::new(), base), config)
}

/// The whole decoder, for every choice of where the backward pass ends.
#[test]
fn the_decoder() {
    let vocabulary = 17;
    let (decoder, config) = model(vocabulary, Some(3));
    let batch = decoder.batch(batch(vocabulary));
    let shape = BatchShape::of(&batch);
    let all = Module::ALL.to_vec();
    for (modules, layers, dropout) in [
        (all.clone(), None, 0.0),
        (all.clone(), None, 0.3),
        (vec![Module::V], None, 0.0),
        (vec![Module::O, Module::Gate], Some((1, 2)), 0.0),
        (vec![Module::Up], Some((2, 3)), 0.0),
        (vec![Module::Down], Some((0, 2)), 0.0),
    ] {
        let layout = AdapterLayout::new(&config, 2, 1.5, dropout, &modules, layers);
        let mut adapter = Adapter::<Oracle>::zeros(&decoder.backend, &layout, Role::Weights);
        for (i, tensor) in adapter.tensors.iter_mut().enumerate() {
            *tensor = random(tensor.len(), 1000 + i as u64);
        }
        let mut results = Vec::new();
        for recompute in [false, true] {
            let mut gradients = Adapter::zeros(&decoder.backend, &layout, Role::Sums);
            let mut work = Workspace::new(&decoder, &layout, batch.len(), recompute);
            let losses =
                decoder.loss_and_gradients(&batch, shape, &layout, &adapter, &mut gradients, &mut work);
            results.push((losses, gradients.tensors));
        }
        assert_eq!(results[0], results[1], "recompute changed bits");
        let (_, gradients) = results.swap_remove(0);
        let mut scratch = Adapter::zeros(&decoder.backend, &layout, Role::Sums);
        let mut work = Workspace::new(&decoder, &layout, batch.len(), false);
        for (i, gradient) in gradients.iter().enumerate() {
            let start = adapter.tensors[i].clone();
            let what = format!("decoder, {}, dropout {dropout}", layout.name(i));
            check(&what, &start, gradient, |values| {
                adapter.tensors[i].copy_from_slice(values);
                // Dropout is on in training only, so the loss comes from there.
                decoder
                    .loss_and_gradients(&batch, shape, &layout, &adapter, &mut scratch, &mut work)
                    .iter()
                    .sum()
            });
            adapter.tensors[i].copy_from_slice(&start);
        }
    }
}

/// A batch of one token, and one without any: nothing to learn, nothing that breaks.
#[test]
fn batches_of_one_token_and_of_none() {
    let (decoder, config) = model(17, None);
    let layout = AdapterLayout::new(&config, 2, 1.0, 0.0, &Module::ALL, None);
    let adapter = Adapter::initial(&decoder.backend, &layout, 1);
    let mut one = Batch::default();
    one.push(&[3], &[-100], &[0], &[0, 1], 1);
    let mut labelled = Batch::default();
    labelled.push(&[3], &[5], &[0], &[0, 1], 1);
    for (batch, loses) in [(Batch::default(), false), (one, false), (labelled, true)] {
        let mut gradients = Adapter::zeros(&decoder.backend, &layout, Role::Sums);
        let mut work = Workspace::new(&decoder, &layout, 4, false);
        let shape = BatchShape::of(&batch);
        let batch = decoder.batch(batch);
        let losses = decoder.loss_and_gradients(&batch, shape, &layout, &adapter, &mut gradients, &mut work);
        assert_eq!(losses.iter().sum::<f64>() > 0.0, loses);
        let moved = gradients.tensors.iter().flatten().any(|&g| g != 0.0);
        assert_eq!(moved, loses);
        assert!(gradients.tensors.iter().flatten().all(|g| g.is_finite()));
    }
}
