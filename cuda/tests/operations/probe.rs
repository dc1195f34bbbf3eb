//! The probes of the ceilings do what they are counted for.

use crate::harness::{Values, counted, everywhere, poisoned};
use finetuned_cuda::Buffer;
use finetuned_cuda::ops::probe;

#[test]
fn a_copy_is_a_copy_up_to_its_last_whole_word() {
    for len in [16, 17, 4096, 16 * 1024 + 48, 3 * 16 * 1024 + 16] {
        let bytes: Vec<u8> = (0..len).map(|i| (i * 31 % 251) as u8).collect();
        everywhere(
            |device| {
                let from = Buffer::from_slice(device, &bytes)?;
                let mut to = poisoned::<u8>(device, len);
                assert_eq!(probe::copy(&from, &mut to)?, 32.0 * (len / 16) as f64);
                Ok(vec![("to", Values::U8(to.read(len)?))])
            },
            |column, outputs| {
                let mut expected = bytes.clone();
                expected[len / 16 * 16..].fill(0xff);
                assert_eq!(outputs[0].1.bytes(), expected, "{column}, {len}");
            },
        );
    }
}

#[test]
fn the_probe_multiplies_as_often_as_it_says_and_not_zeros() {
    let Some(counters) = counted(|device| {
        let mut out = Buffer::<f32>::new(device, probe::mma_elements(3))?;
        let operations = probe::mma(5, &mut out)?;
        // 3 blocks of 8 warps, 5 rounds of 4 products.
        assert_eq!(operations, 3.0 * 8.0 * 5.0 * 4.0 * 4096.0);
        let sums = out.read(out.len())?;
        assert!(sums.iter().all(|sum| sum.is_finite()));
        let mut different: Vec<u32> = sums.iter().map(|sum| sum.to_bits()).collect();
        different.sort();
        different.dedup();
        assert!(different.len() > sums.len() / 2, "{} different sums", different.len());
        assert!(probe::mma(5, &mut out.slice(0, 255)?).is_err());
        Ok(())
    }) else {
        return;
    };
    assert_eq!(counters["probe_mma"].mma, 3 * 8 * 5 * 4);
    assert_eq!(counters["probe_mma"].global_load_bytes, 0);
}
