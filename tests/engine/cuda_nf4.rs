//! The NF4 kernels on the stand-in against `backend/nf4.rs`, to the bit: codes, scales, nested codes, dequantised values.

use finetuned::backend::nf4::{self, dynamic_map};
use finetuned::backend::{Absmax, Nf4Matrix};
use finetuned_cuda::ops::nf4 as device_nf4;
use finetuned_cuda::simt::Simt;
use finetuned_cuda::{Buffer, Device};
use half::bf16;

/// Rows and columns: one block, a last short block, one nested block and its neighbours, more rows than the cascade of
/// the mean has levels, a layer of SmolLM2-135M.
const SHAPES: [(usize, usize); 8] =
    [(1, 64), (1, 70), (3, 33), (255, 64), (257, 64), (33, 520), (300, 1000), (1536, 576)];

fn device() -> Option<Device> {
    match Simt::new() {
        Ok(simt) => Some(simt.device()),
        Err(why) => {
            eprintln!("SKIPPED: the kernels are not run: {why}");
            None
        }
    }
}

/// Weights with a few outliers, so that scales differ.
fn weights(rows: usize, cols: usize) -> Vec<f32> {
    let mut state = (rows * 31 + cols) as u64 | 1;
    (0..rows * cols)
        .map(|i| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let value = (state >> 40) as f32 / (1 << 24) as f32 - 0.5;
            if i % 997 == 0 { value * 8.0 } else { value }
        })
        .collect()
}

struct Quantized {
    codes: Buffer<u8>,
    absmax: Buffer<f32>,
    offset: Buffer<f32>,
    nested_codes: Buffer<u8>,
    nested: Buffer<f32>,
    map: Buffer<f32>,
}

fn quantize(device: &Device, values: &[f32]) -> Quantized {
    let (count, blocks) = (values.len(), values.len().div_ceil(device_nf4::BLOCK));
    let x = Buffer::from_slice(device, values).unwrap();
    let map: &[f32; 256] = dynamic_map();
    let mut q = Quantized {
        codes: Buffer::new(device, count.div_ceil(2)).unwrap(),
        absmax: Buffer::new(device, blocks).unwrap(),
        offset: Buffer::new(device, 1).unwrap(),
        nested_codes: Buffer::new(device, blocks).unwrap(),
        nested: Buffer::new(device, blocks.div_ceil(device_nf4::NESTED_BLOCK)).unwrap(),
        map: Buffer::from_slice(device, map).unwrap(),
    };
    device_nf4::quantize(count, &x, &mut q.codes, &mut q.absmax).unwrap();
    device_nf4::nest(blocks, &q.absmax, &q.map, &mut q.offset, &mut q.nested_codes, &mut q.nested).unwrap();
    q
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn codes_and_scales_are_those_of_the_cpu() {
    let Some(device) = device() else { return };
    for (rows, cols) in SHAPES {
        let values = weights(rows, cols);
        let expected: Nf4Matrix = nf4::quantize(&values, rows, cols, true).unwrap();
        let plain: Nf4Matrix = nf4::quantize(&values, rows, cols, false).unwrap();
        let Absmax::Nested { codes, nested, offset, .. } = &expected.absmax else { panic!("not nested") };
        let found = quantize(&device, &values);
        let blocks = expected.blocks();
        let scales: Vec<f32> = (0..blocks).map(|b| plain.absmax_at(b)).collect();
        assert!(
            found.codes.read(found.codes.len()).unwrap() == expected.codes.as_bytes(),
            "codes, {rows} × {cols}"
        );
        assert_eq!(bits(&found.absmax.read(blocks).unwrap()), bits(&scales), "absmax, {rows} × {cols}");
        assert_eq!(found.offset.read(1).unwrap()[0].to_bits(), offset.to_bits(), "mean, {rows} × {cols}");
        assert_eq!(
            found.nested_codes.read(blocks).unwrap(),
            codes.as_bytes(),
            "nested codes, {rows} × {cols}"
        );
        assert_eq!(bits(&found.nested.read(nested.len()).unwrap()), bits(nested), "nested, {rows} × {cols}");
    }
}

#[test]
fn dequantised_values_are_those_of_the_cpu_rounded_to_bf16() {
    let Some(device) = device() else { return };
    for (rows, cols) in SHAPES {
        let values = weights(rows, cols);
        let matrix = nf4::quantize(&values, rows, cols, true).unwrap();
        let mut expected = vec![0.0; rows * cols];
        matrix.dequantize_rows(0..rows, &mut expected);
        let expected: Vec<bf16> = expected.into_iter().map(bf16::from_f32).collect();
        let found = quantize(&device, &values);
        let absmax = device_nf4::Absmax::Nested {
            codes: found.nested_codes,
            map: found.map,
            nested: found.nested,
            nested_block: device_nf4::NESTED_BLOCK,
            offset: found.offset.read(1).unwrap()[0],
        };
        let mut out = Buffer::new(&device, rows * cols).unwrap();
        device_nf4::dequantize(rows * cols, device_nf4::BLOCK, &found.codes, &absmax, &mut out).unwrap();
        assert!(out.read(rows * cols).unwrap() == expected, "{rows} × {cols}");
    }
}
