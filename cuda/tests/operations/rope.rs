use crate::harness::{ReadBack, Values, everywhere, random, same_bits, upload};
use finetuned_cuda::Buffer;
use finetuned_cuda::ops::rope::{Angles, rope};
use half::bf16;

/// Tokens, heads, heads of keys, elements of a head.
const SHAPES: [(usize, usize, usize, usize); 6] =
    [(0, 2, 1, 64), (1, 1, 1, 2), (5, 3, 1, 6), (7, 9, 3, 64), (4, 4, 2, 128), (3, 2, 0, 16)];

const LONGEST: usize = 40;

fn frequencies(head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / head_dim as f32)).collect()
}

/// The rotation as the CPU backend computes it: in f32, rounded once at the end.
fn rotated(
    x: &[f64],
    positions: &[u32],
    heads: usize,
    head_dim: usize,
    magnitude: f32,
    inverse: bool,
) -> Values {
    let (half, frequencies) = (head_dim / 2, frequencies(head_dim));
    let mut out: Vec<bf16> = x.iter().map(|&v| bf16::from_f64(v)).collect();
    for (t, token) in out.chunks_exact_mut(heads * head_dim).enumerate() {
        for head in token.chunks_exact_mut(head_dim) {
            for i in 0..half {
                let angle = f64::from(positions[t] as f32 * frequencies[i]);
                let (cos, sin) = (angle.cos() as f32 * magnitude, angle.sin() as f32 * magnitude);
                let sin = if inverse { -sin } else { sin };
                let (p, q) = (head[i].to_f32(), head[i + half].to_f32());
                head[i] = bf16::from_f32(p * cos - q * sin);
                head[i + half] = bf16::from_f32(q * cos + p * sin);
            }
        }
    }
    Values::Bf16(out)
}

#[test]
fn queries_and_keys_are_rotated_to_the_bits_of_the_cpu() {
    for (tokens, heads, kv_heads, d) in SHAPES {
        for (inverse, magnitude) in [(false, 1.0), (true, 1.0), (false, 1.138_629)] {
            // Packed examples: positions begin again.
            let positions: Vec<u32> = (0..tokens as u32).map(|t| (t * 13) % LONGEST as u32).collect();
            let (q, k) = (random(tokens * heads * d, 1), random(tokens * kv_heads * d, 2));
            let expected = [
                rotated(&q, &positions, heads, d, magnitude, inverse),
                rotated(&k, &positions, kv_heads.max(1), d, magnitude, inverse),
            ];
            everywhere(
                |device| {
                    let angles = Angles::new(device, LONGEST, &frequencies(d), magnitude)?;
                    let positions = Buffer::from_slice(device, &positions)?;
                    let (mut q, mut k) = (upload(device, &q), upload(device, &k));
                    let keys = (kv_heads > 0).then_some(&mut k);
                    rope(&angles, &positions, tokens, heads, kv_heads, inverse, &mut q, keys)?;
                    Ok(vec![("q", q.all()), ("k", k.all())])
                },
                |device, outputs| {
                    for ((name, found), expected) in outputs.iter().zip(&expected) {
                        let shape = format!("{tokens} × {heads}/{kv_heads} × {d}, inverse {inverse}");
                        same_bits(&format!("{device}: rope of {name}, {shape}"), found, expected);
                    }
                },
            );
        }
    }
}
