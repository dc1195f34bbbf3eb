//! Against the definition, element by element. `tests/engine/cuda_nf4.rs` holds the same kernels against
//! `daemon/backend/nf4.rs`, which is bitsandbytes to the bit.

use crate::harness::{
    ReadBack, Values, counted, everywhere, poisoned, random, same_bits, upload, upload_f32,
};
use finetuned_cuda::Buffer;
use finetuned_cuda::ops::nf4::{Absmax, dequantize, quantize};
use half::bf16;

pub const CODES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// One element, an odd number, short last blocks, more than a block of threads.
const SIZES: [usize; 8] = [0, 1, 63, 64, 65, 1000, 8192, 20_001];

pub fn bytes(len: usize, seed: u64) -> Vec<u8> {
    random(len, seed)
        .iter()
        .map(|v| v.to_bits().wrapping_mul(0x9e37_79b9) as u8 ^ (v.to_bits() >> 37) as u8)
        .collect()
}

#[test]
fn dequantised_values_are_one_product_rounded_once() {
    for count in SIZES {
        for block in [32, 64, 4096] {
            let blocks = count.div_ceil(block);
            let (codes, scales) = (bytes(count.div_ceil(2), 1), random(blocks, 2));
            let expected = (0..count).map(|i| {
                let byte = codes[i / 2];
                let code = if i % 2 == 0 { byte >> 4 } else { byte & 15 };
                bf16::from_f32(CODES[usize::from(code)] * scales[i / block] as f32)
            });
            let expected = Values::Bf16(expected.collect());
            everywhere(
                |device| {
                    let codes = Buffer::from_slice(device, &codes)?;
                    let mut out = poisoned(device, count);
                    dequantize(count, block, &codes, &Absmax::Plain(upload_f32(device, &scales)), &mut out)?;
                    Ok(vec![("out", out.all())])
                },
                |device, outputs| {
                    same_bits(&format!("{device}: {count} in blocks of {block}"), &outputs[0].1, &expected);
                },
            );
        }
    }
}

#[test]
fn nested_scales_are_a_product_and_a_sum() {
    let (count, block, nested_block, offset) = (64 * 700, 64, 256, 0.123_456_7_f32);
    let (codes, absmax_codes) = (bytes(count / 2, 1), bytes(700, 2));
    let (map, nested) = (random(256, 3), random(3, 4));
    let expected = (0..count).map(|i| {
        let b = i / block;
        // In f32, the product rounded before the sum.
        let absmax = map[usize::from(absmax_codes[b])] as f32 * nested[b / nested_block] as f32 + offset;
        let code = if i % 2 == 0 { codes[i / 2] >> 4 } else { codes[i / 2] & 15 };
        bf16::from_f32(CODES[usize::from(code)] * absmax)
    });
    let expected = Values::Bf16(expected.collect());
    everywhere(
        |device| {
            let absmax = Absmax::Nested {
                codes: Buffer::from_slice(device, &absmax_codes)?,
                map: upload_f32(device, &map),
                nested: upload_f32(device, &nested),
                nested_block,
                offset,
            };
            let mut out = poisoned(device, count);
            dequantize(count, block, &Buffer::from_slice(device, &codes)?, &absmax, &mut out)?;
            Ok(vec![("out", out.all())])
        },
        |device, outputs| same_bits(&format!("{device}: nested"), &outputs[0].1, &expected),
    );
}

/// Codes and scales by definition: the border goes to the lower code, a last short block is divided.
fn quantized(x: &[f64]) -> (Vec<u8>, Vec<f32>) {
    let code_of = |q: f32| (0..15).filter(|&i| q > (CODES[i] + CODES[i + 1]) / 2.0).count() as u8;
    let (mut nibbles, mut absmax) = (Vec::new(), Vec::new());
    for block in x.chunks(64) {
        let block: Vec<f32> = block.iter().map(|&v| v as f32).collect();
        let most = block.iter().fold(0f32, |most, v| most.max(v.abs()));
        if block.len() == 64 {
            absmax.push(most);
            nibbles.extend(block.iter().map(|v| code_of(v * (1.0 / most.max(1e-38)))));
        } else {
            absmax.push(most.max(1e-38));
            nibbles.extend(block.iter().map(|v| code_of(v / most.max(1e-38))));
        }
    }
    if nibbles.len() % 2 == 1 {
        nibbles.push(7);
    }
    (nibbles.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect(), absmax)
}

#[test]
fn quantised_values_are_those_of_the_definition() {
    for count in SIZES {
        let mut x = random(count, 5);
        x.iter_mut().skip(64).take(64).for_each(|v| *v = 0.0); // a block of zeros
        let (codes, absmax) = quantized(&x);
        everywhere(
            |device| {
                let (wide, narrow) = (upload_f32(device, &x), upload(device, &x));
                let mut outputs = Vec::new();
                for half in [false, true] {
                    let mut codes = poisoned(device, count.div_ceil(2));
                    let mut absmax = poisoned(device, count.div_ceil(64));
                    match half {
                        false => quantize(count, &wide, &mut codes, &mut absmax)?,
                        true => quantize(count, &narrow, &mut codes, &mut absmax)?,
                    }
                    outputs.extend([("codes", codes.all()), ("absmax", absmax.all())]);
                }
                Ok(outputs)
            },
            |device, outputs| {
                for (name, found) in outputs {
                    let what = format!("{device}: {name} of {count}");
                    match *name {
                        "codes" => same_bits(&what, found, &Values::U8(codes.clone())),
                        _ => same_bits(&what, found, &Values::F32(absmax.clone())),
                    }
                }
            },
        );
    }
}

#[test]
fn dequantisation_moves_its_bytes_once_and_without_conflicts() {
    let count = 64 * 1024;
    let counters = counted(|device| {
        let codes = Buffer::from_slice(device, &bytes(count / 2, 1))?;
        let mut out = poisoned(device, count);
        dequantize(count, 64, &codes, &Absmax::Plain(upload_f32(device, &random(count / 64, 2))), &mut out)
    });
    let Some(counters) = counters else { return };
    let (found, n) = (counters["nf4_dequantize"], count as u64);
    assert_eq!(found.bus_bytes(), n / 2 + 2 * n + n / 64 * 4);
    assert_eq!(32 * found.global_store_sectors, 2 * n);
    assert_eq!(found.bank_conflicts, 0);
}

#[test]
fn blocks_that_straddle_a_load_are_refused() {
    let Some(simt) = crate::harness::simt() else { return };
    let device = simt.device();
    let absmax = Absmax::Plain(upload_f32(&device, &[1.0; 4]));
    let mut out = poisoned(&device, 96);
    let codes = Buffer::from_slice(&device, &[0u8; 48]).unwrap();
    let error = dequantize(96, 48, &codes, &absmax, &mut out).unwrap_err().to_string();
    assert_eq!(error, "nf4 dequantize: blocks of 48 elements, not of a power of two from 32 on");
    let error = dequantize(96, 0, &codes, &absmax, &mut out).unwrap_err().to_string();
    assert_eq!(error, "nf4 dequantize: blocks of 0 elements, not of a power of two from 32 on");
}
