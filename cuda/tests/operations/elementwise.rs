use crate::harness::ReadBack;
use crate::harness::{Values, counted, everywhere, poisoned, random, same_bits, upload, upload_f32};
use finetuned_cuda::ops::elementwise;
use half::bf16;

/// One element, a run, a block and their neighbours.
const SIZES: [usize; 9] = [0, 1, 7, 8, 9, 2047, 2048, 2049, 10_007];

fn bf16s(values: impl Iterator<Item = f32>) -> Values {
    Values::Bf16(values.map(bf16::from_f32).collect())
}

#[test]
fn add_rounds_once_and_leaves_the_rest_alone() {
    for len in SIZES {
        let (x, y) = (random(len + 3, 1), random(len + 3, 2));
        let sum = (0..len + 3).map(|i| if i < len { y[i] as f32 + x[i] as f32 } else { y[i] as f32 });
        let expected = bf16s(sum);
        everywhere(
            |device| {
                let (x, mut y) = (upload(device, &x), upload(device, &y));
                elementwise::add(len, &x, &mut y)?;
                Ok(vec![("y", y.all())])
            },
            |device, outputs| same_bits(&format!("{device}: add of {len}"), &outputs[0].1, &expected),
        );
    }
}

#[test]
fn scale_is_one_product() {
    for len in SIZES {
        let x = random(len, 3);
        let expected = Values::F32(x.iter().map(|&x| x as f32 * 0.37).collect());
        everywhere(
            |device| {
                let mut x = upload_f32(device, &x);
                elementwise::scale(len, 0.37, &mut x)?;
                Ok(vec![("x", x.all())])
            },
            |device, outputs| same_bits(&format!("{device}: scale of {len}"), &outputs[0].1, &expected),
        );
    }
}

#[test]
fn casts_round_to_nearest_even() {
    for len in SIZES {
        // Values between two bf16, exactly in the middle among them.
        let x: Vec<f32> = (0..len).map(|i| f32::from_bits(0x3f80_0000 + (i as u32) * 0x2000)).collect();
        let narrow = bf16s(x.iter().copied());
        let wide = Values::F32(x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect());
        everywhere(
            |device| {
                let from = finetuned_cuda::Buffer::from_slice(device, &x)?;
                let (mut there, mut back) = (poisoned::<bf16>(device, len), poisoned::<f32>(device, len));
                elementwise::cast_to_bf16(len, &from, &mut there)?;
                elementwise::cast_to_f32(len, &there, &mut back)?;
                Ok(vec![("there", there.all()), ("back", back.all())])
            },
            |device, outputs| {
                same_bits(&format!("{device}: {len} to bf16"), &outputs[0].1, &narrow);
                same_bits(&format!("{device}: {len} to f32"), &outputs[1].1, &wide);
            },
        );
    }
}

/// The head comment's six bytes an element, and every sector of a warp's access used.
#[test]
fn add_moves_six_bytes_an_element() {
    let len = 64 * 1024;
    let counters = counted(|device| {
        let (x, mut y) = (upload(device, &random(len, 1)), upload(device, &random(len, 2)));
        elementwise::add(len, &x, &mut y)
    });
    let Some(counters) = counters else { return };
    let add = counters["add_bf16"];
    assert_eq!(add.bus_bytes(), 6 * len as u64);
    assert_eq!(32 * (add.global_load_sectors + add.global_store_sectors), 6 * len as u64);
    assert_eq!(add.global_loads + add.global_stores, 3 * (len as u64 / 8 / 32));
}

#[test]
fn a_buffer_that_is_too_short_is_refused() {
    let Some(simt) = crate::harness::simt() else { return };
    let device = simt.device();
    let (x, mut y) = (upload(&device, &[1.0; 8]), upload(&device, &[1.0; 9]));
    let error = elementwise::add(9, &x, &mut y).unwrap_err();
    assert_eq!(error.to_string(), "add: x has 8 elements, 9 are needed");
    let mut off = y.slice(1, 8).unwrap();
    let error = elementwise::add(8, &x, &mut off).unwrap_err().to_string();
    assert!(
        error.starts_with("add: y starts at 0x") && error.ends_with("not at a multiple of 16 bytes"),
        "{error}"
    );
}
