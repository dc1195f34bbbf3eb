use crate::harness::{ReadBack, Values, everywhere, poisoned, random, same_bits, upload};
use finetuned_cuda::ops::dropout::{Sequences, dropout};
use finetuned_cuda::{Buffer, Device};
use half::bf16;

/// Lengths of the sequences, inputs.
const SHAPES: [(&[usize], usize); 5] =
    [(&[], 8), (&[1], 1), (&[3, 5], 7), (&[17, 1, 4], 12), (&[9, 20], 576)];

/// Random123's reference for one block.
pub fn philox(mut c: [u32; 4], mut k: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let (a, b) = (0xd251_1f53_u64 * u64::from(c[0]), 0xcd9e_8d57_u64 * u64::from(c[2]));
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
        k = [k[0].wrapping_add(0x9e37_79b9), k[1].wrapping_add(0xbb67_ae85)];
    }
    c
}

#[test]
fn the_reference_gives_the_known_answers() {
    // Random123, kat_vectors.
    assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
}

pub fn key_of(sequence: usize) -> u64 {
    0x0123_4567_89ab_cdef_u64.wrapping_mul(sequence as u64 + 1)
}

fn expected(lengths: &[usize], inputs: usize, probability: f64, x: &[f64]) -> Vec<bf16> {
    let (threshold, keep) = ((probability * 4_294_967_296.0) as u64, (1.0 / (1.0 - probability)) as f32);
    let mut out = Vec::new();
    for (s, length) in lengths.iter().enumerate() {
        let key = key_of(s);
        for e in 0..length * inputs {
            let block = (e / 4) as u64;
            let words = philox([block as u32, (block >> 32) as u32, 5, 0], [key as u32, (key >> 32) as u32]);
            let value = x[out.len()] as f32;
            let kept = u64::from(words[e % 4]) >= threshold;
            out.push(bf16::from_f32(if kept { value * keep } else { 0.0 }));
        }
    }
    out
}

pub fn sequences(device: &Device, lengths: &[usize], from: usize) -> Sequences {
    let mut offsets = vec![0u32];
    for length in lengths {
        offsets.push(offsets[offsets.len() - 1] + *length as u32);
    }
    let keys: Vec<u64> = (from..from + lengths.len()).map(key_of).collect();
    Sequences {
        offsets: Buffer::from_slice(device, &offsets).unwrap(),
        keys: Buffer::from_slice(device, &keys).unwrap(),
        count: lengths.len(),
        longest: lengths.iter().copied().max().unwrap_or(0),
        tokens: lengths.iter().sum(),
    }
}

#[test]
fn elements_are_dropped_as_on_the_cpu() {
    for (lengths, inputs) in SHAPES {
        for probability in [0.0, 0.1, 0.75] {
            let len = lengths.iter().sum::<usize>() * inputs;
            let x = random(len, 1);
            let expected = Values::Bf16(expected(lengths, inputs, probability, &x));
            everywhere(
                |device| {
                    let (x, mut out) = (upload(device, &x), poisoned(device, len));
                    dropout(&sequences(device, lengths, 0), inputs, probability, 5, &x, &mut out)?;
                    Ok(vec![("out", out.all())])
                },
                |device, outputs| {
                    let what = format!("{device}: dropout of {lengths:?} × {inputs}, p = {probability}");
                    same_bits(&what, &outputs[0].1, &expected);
                },
            );
        }
    }
}

/// A sequence is dropped the same way alone and behind another.
#[test]
fn the_place_in_the_batch_does_not_matter() {
    let (inputs, x) = (12, random(9 * 12, 1));
    everywhere(
        |device| {
            let (both, second) = (upload(device, &x), upload(device, &x[4 * 12..]));
            let (mut out, mut alone) = (poisoned(device, 9 * 12), poisoned(device, 5 * 12));
            dropout(&sequences(device, &[4, 5], 0), inputs, 0.3, 1, &both, &mut out)?;
            dropout(&sequences(device, &[5], 1), inputs, 0.3, 1, &second, &mut alone)?;
            Ok(vec![("behind", out.slice(48, 60)?.all()), ("alone", alone.all())])
        },
        |device, outputs| same_bits(device, &outputs[0].1, &outputs[1].1),
    );
}
