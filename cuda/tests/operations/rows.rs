use crate::harness::{ReadBack, Values, everywhere, poisoned, random, same_bits, upload};
use finetuned_cuda::Buffer;
use finetuned_cuda::ops::rows;
use half::bf16;

/// Rows moved, columns, rows of the table.
const SHAPES: [(usize, usize, usize); 6] =
    [(0, 8, 5), (1, 1, 1), (3, 5, 7), (9, 64, 10), (33, 576, 100), (5, 250, 9)];

fn values(values: impl Iterator<Item = f64>) -> Values {
    Values::Bf16(values.map(bf16::from_f64).collect())
}

#[test]
fn gathered_rows_are_copies() {
    for (count, cols, all) in SHAPES {
        let index: Vec<u32> = (0..count).map(|i| (i * 7 % all) as u32).collect();
        let table = random(all * cols, 1);
        let rows_of = index.iter().flat_map(|&i| &table[i as usize * cols..][..cols]).copied();
        let expected = values(rows_of);
        everywhere(
            |device| {
                let (index, table) = (Buffer::from_slice(device, &index)?, upload(device, &table));
                let mut out = poisoned(device, count * cols);
                rows::gather(count, cols, &index, &table, &mut out)?;
                Ok(vec![("out", out.all())])
            },
            |device, outputs| {
                same_bits(&format!("{device}: gather {count} × {cols}"), &outputs[0].1, &expected)
            },
        );
    }
}

#[test]
fn scattered_rows_lie_between_zeros() {
    for (count, cols, all) in SHAPES {
        // Ascending, with gaps where there is room.
        let index: Vec<u32> = (0..count).map(|i| (i * all / count.max(1)) as u32).collect();
        let x = random(count * cols, 1);
        let mut whole = vec![0.0; all * cols];
        for (row, &i) in x.chunks_exact(cols).zip(&index) {
            whole[i as usize * cols..][..cols].copy_from_slice(row);
        }
        let expected = values(whole.into_iter());
        everywhere(
            |device| {
                let (index, x) = (Buffer::from_slice(device, &index)?, upload(device, &x));
                let mut out = poisoned(device, all * cols);
                rows::scatter(count, cols, all, &index, &x, &mut out)?;
                Ok(vec![("out", out.all())])
            },
            |device, outputs| {
                same_bits(&format!("{device}: scatter {count} × {cols}"), &outputs[0].1, &expected)
            },
        );
    }
}
