use crate::harness::{
    ReadBack, Values, counted, everywhere, poisoned, random, rounded_once, same_bits, upload,
};
use finetuned_cuda::ops::cached_attention::{Shape, cached_attention, scratch_elements};
use finetuned_cuda::{Buffer, Device, Error};
use half::bf16;

/// Heads, key heads, head_dim, window, rows, past.
type Case = (usize, usize, usize, Option<usize>, usize, usize);

/// One element; odd sizes; the borders of a chunk (128 keys); several chunks; groups beyond a block's four heads; heads beyond
/// a warp's 256 elements; windows of one key, inside a chunk and over several; nothing at all.
const CASES: [Case; 15] = [
    (1, 1, 1, None, 1, 0),
    (2, 1, 7, None, 3, 2),
    (4, 4, 16, None, 1, 300),
    (9, 3, 64, None, 2, 126),
    (14, 2, 64, None, 1, 127),
    (2, 2, 40, None, 1, 128),
    (8, 2, 80, Some(50), 3, 200),
    (6, 1, 256, None, 1, 140),
    (2, 1, 320, None, 2, 5),
    (2, 1, 45, None, 2, 130),
    (3, 3, 33, Some(1), 2, 128),
    (4, 1, 128, Some(200), 1, 700),
    (4, 1, 128, Some(129), 2, 254),
    (2, 1, 8, Some(1000), 2, 3),
    (2, 1, 8, None, 0, 5),
];

/// Elements behind the result, which stay as they are.
const BEHIND: usize = 3;

fn shape((heads, kv_heads, head_dim, window, ..): Case) -> Shape {
    Shape { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt(), window }
}

/// First key that a position sees.
fn low(window: Option<usize>, position: usize) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window))
}

fn operands(case: Case) -> [Vec<f64>; 3] {
    let (heads, kv_heads, d, _, rows, past) = case;
    let mut q = random(rows * heads * d, 1);
    // Scores of some size, so that their softmax is no mean.
    q.iter_mut().for_each(|q| *q *= 2.0);
    [q, random((past + rows) * kv_heads * d, 2), random((past + rows) * kv_heads * d, 3)]
}

fn oracle(case: Case, [q, k, v]: &[Vec<f64>; 3]) -> Vec<f64> {
    let (heads, kv_heads, d, window, rows, past) = case;
    let scale = f64::from(shape(case).scale);
    let mut out = vec![];
    for row in 0..rows {
        for h in 0..heads {
            let query = &q[(row * heads + h) * d..][..d];
            let of = |values: &[f64], j: usize| -> Vec<f64> {
                values[(j * kv_heads + h / (heads / kv_heads)) * d..][..d].to_vec()
            };
            let seen = low(window, past + row)..past + row + 1;
            let scores: Vec<f64> = seen
                .clone()
                .map(|j| of(k, j).iter().zip(query).map(|(a, b)| a * b).sum::<f64>() * scale)
                .collect();
            let most = scores.iter().copied().fold(f64::MIN, f64::max);
            let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
            let mut sum = vec![0.0; d];
            for (j, s) in seen.zip(&scores) {
                let p = (s - most).exp() / total;
                sum.iter_mut().zip(of(v, j)).for_each(|(sum, v)| *sum += p * v);
            }
            out.extend(sum);
        }
    }
    out
}

/// Rows `from .. from + count` of a case, a number of them at a time. Keys that nobody sees are NaN, and so is what lies
/// behind the cache.
fn run(
    device: &Device,
    case: Case,
    [q, k, v]: &[Vec<f64>; 3],
    from: usize,
    count: usize,
    at_a_time: usize,
) -> Result<Buffer<bf16>, Error> {
    let (heads, kv_heads, d, window, _, past) = case;
    let past = past + from;
    let (q_cols, kv_cols) = (heads * d, kv_heads * d);
    let cache = |values: &[f64]| {
        let mut values = values[..(past + count) * kv_cols].to_vec();
        values[..low(window, past) * kv_cols].fill(f64::NAN);
        values.extend(vec![f64::NAN; 2 * kv_cols]);
        upload(device, &values)
    };
    let q = upload(device, &q[from * q_cols..(from + count) * q_cols]);
    let (k, v) = (cache(k), cache(v));
    let mut out = poisoned(device, count * q_cols + BEHIND);
    let mut scratch = poisoned(device, scratch_elements(shape(case), at_a_time, past + count));
    cached_attention(shape(case), count, past, &q, &k, &v, &mut out, &mut scratch)?;
    Ok(out)
}

#[test]
fn attention_is_that_of_double_precision() {
    for case in CASES {
        let (heads, _, d, _, rows, _) = case;
        let operands = operands(case);
        let oracle = oracle(case, &operands);
        everywhere(
            |device| Ok(vec![("out", run(device, case, &operands, 0, rows, rows)?.all())]),
            |device, outputs| {
                let what = format!("{device}: {case:?}");
                let (found, len) = (outputs[0].1.f64(), rows * heads * d);
                rounded_once(&what, &found[..len], &oracle);
                assert!(found[len..].iter().all(|v| v.is_nan()), "{what}: behind out");
            },
        );
    }
}

/// All rows at once, in lots as small as scratch allows, or one call a row: the same bits.
#[test]
fn a_row_is_the_same_alone() {
    for case in [(6, 3, 24, None, 5, 126), (4, 1, 45, Some(100), 5, 150)] {
        let operands = operands(case);
        let cols = case.0 * case.2;
        everywhere(
            |device| {
                let rows = |from, count, at_a_time| -> Result<Values, Error> {
                    let out = run(device, case, &operands, from, count, at_a_time)?;
                    Ok(out.slice(0, count * cols)?.all())
                };
                let mut found = vec![("all", rows(0, 5, 5)?), ("lots", rows(0, 5, 2)?)];
                for from in 0..5 {
                    found.push(("alone", rows(from, 1, 1)?));
                }
                Ok(found)
            },
            |device, found| {
                let what = format!("{device}: {case:?}");
                same_bits(&what, &found[1].1, &found[0].1);
                let Values::Bf16(all) = &found[0].1 else { unreachable!("out is bf16") };
                for (row, (_, alone)) in found[2..].iter().enumerate() {
                    let expected = Values::Bf16(all[row * cols..(row + 1) * cols].to_vec());
                    same_bits(&format!("{what}: row {row}"), alone, &expected);
                }
            },
        );
    }
}

/// Keys and values once for the query heads of a block, and no bank conflicts.
#[test]
fn traffic_is_that_of_the_head_comment() {
    let case = (8, 2, 128, None, 1, 511);
    let operands = operands(case);
    let counters = counted(|device| run(device, case, &operands, 0, 1, 1).map(|_| ()));
    let Some(counters) = counters else { return };
    let (keys, d, heads, chunks) = (512, 128, 8, 4);
    let cache = 4 * keys * 2 * d;
    let scratch = 4 * heads * chunks * (d + 2);
    let found = counters["cached_attention_8"];
    // The query, by each of the lanes' sets that share a key.
    let query = 2 * heads * d * chunks * 4 * 2;
    assert_eq!(found.global_load_bytes, cache + query);
    assert_eq!(found.global_store_bytes, scratch);
    assert_eq!(found.bus_bytes(), cache + scratch + 2 * heads * d);
    assert_eq!(found.bank_conflicts, 0);
    assert_eq!(counters["cached_attention_combine"].bus_bytes(), scratch + 2 * heads * d);
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let Some(simt) = crate::harness::simt() else { return };
    let device = &simt.device();
    let refused = |case: Case, k: usize, scratch: usize| {
        let (heads, _, d, _, rows, past) = case;
        let (q, k) = (poisoned(device, rows * heads * d), poisoned::<bf16>(device, k));
        let v = poisoned(device, 10_000);
        let (mut out, mut scratch) = (poisoned(device, rows * heads * d), poisoned(device, scratch));
        let error = cached_attention(shape(case), rows, past, &q, &k, &v, &mut out, &mut scratch);
        error.unwrap_err().to_string()
    };
    let case = (4, 2, 8, None, 2, 10);
    assert_eq!(refused(case, 191, 1000), "cached attention: k has 191 elements, 192 are needed");
    assert_eq!(refused(case, 192, 39), "cached attention: scratch has 39 elements, 40 are needed");
    let case = (4, 3, 8, None, 2, 10);
    assert_eq!(refused(case, 288, 1000), "cached attention: 4 heads are no multiple of 3 key heads");
    assert_eq!(refused((4, 2, 8, Some(0), 2, 10), 192, 1000), "cached attention: a window of no keys");
}
