//! Tables of tiles that were measured on a device, in the place of those in the program.
//!
//! `finetuned bench` measures which kernel of a table is the fastest for how many rows, and keeps it with the device it was
//! measured on. What is read again is checked: another device, another number of multiprocessors (a power mode switches them
//! off), another clock or a name that no kernel has, and the program's own table is taken. A table can only choose
//! among the kernels that the program's has, all of which give the same bits.

use crate::device::Properties;
use crate::ops::linear;
use crate::tiles::Row;

/// The operations whose tables can be measured, with the program's own.
pub const TABLES: &[(&str, &[Row])] = &[
    ("linear", &linear::FORWARD_NF4),
    ("linear-bf16", &linear::FORWARD),
    ("input-gradient", &linear::GRADIENT_NF4),
    ("input-gradient-bf16", &linear::GRADIENT),
    ("logits", &linear::LOGITS),
];

/// What a table is only good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// The maker's name.
    pub device: String,
    /// Compute capability, 10 · major + minor.
    pub sm: u32,
    /// Multiprocessors that are switched on.
    pub multiprocessors: u32,
    /// Highest clock, in kHz.
    pub clock_khz: u32,
}

impl Key {
    /// Of a device as it is now.
    pub fn of(device: &Properties) -> Key {
        Key {
            device: device.name.clone(),
            sm: device.sm,
            multiprocessors: device.multiprocessors,
            clock_khz: device.clock_khz,
        }
    }
}

/// A line of a measured table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// An operation of [`TABLES`].
    pub operation: String,
    /// For products of up to so many rows; `None` for all.
    pub up_to: Option<usize>,
    /// Name of the kernel.
    pub kernel: String,
}

/// Tables that hold for a device.
#[derive(Clone, Debug, Default)]
pub struct Tuned {
    rows: Vec<(&'static str, usize, &'static Row)>,
}

impl Tuned {
    /// Takes the lines whose operation and kernel there are, in their order; of the others it says which and why.
    pub fn new(choices: &[Choice]) -> (Tuned, Vec<String>) {
        let (mut tuned, mut problems) = (Tuned::default(), Vec::new());
        for choice in choices {
            let Choice { operation, up_to, kernel } = choice;
            let Some((name, table)) = TABLES.iter().find(|(name, _)| name == operation) else {
                problems.push(format!("no operation {operation:?} has a table"));
                continue;
            };
            let Some(row) = table.iter().find(|row| row.kernel.name == kernel) else {
                problems.push(format!("{operation}: no kernel {kernel:?} in its table"));
                continue;
            };
            let up_to = up_to.unwrap_or(usize::MAX);
            let before = tuned.rows.iter().rev().find(|(of, ..)| of == name);
            if before.is_some_and(|(_, before, _)| *before >= up_to) {
                problems.push(format!("{operation}: a line for up to {up_to} rows that is never reached"));
                continue;
            }
            tuned.rows.push((name, up_to, row));
        }
        (tuned, problems)
    }

    /// The row for an operation and a product of `m` rows; `None` where nothing was measured.
    pub fn row(&self, operation: &str, m: usize) -> Option<&'static Row> {
        let mut rows = self.rows.iter().filter(|(name, ..)| *name == operation);
        rows.find(|(_, up_to, _)| m <= *up_to).map(|(.., row)| *row)
    }

    /// The row for a product of `m` rows in the place of `table`; `None` where nothing was measured.
    pub fn instead_of(&self, table: &'static [Row], m: usize) -> Option<&'static Row> {
        let (name, _) = TABLES.iter().find(|(_, of)| std::ptr::eq(*of, table))?;
        self.row(name, m)
    }

    /// Lines.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

/// The fastest kernel for each number of rows, from `(rows, kernel, seconds)`; the seconds of one kernel and number of rows
/// are added. Neighbours with the same kernel become one line, the last is for everything.
pub fn fastest(operation: &str, measured: &[(usize, &'static str, f64)]) -> Vec<Choice> {
    let mut sizes: Vec<usize> = measured.iter().map(|(m, ..)| *m).collect();
    sizes.sort();
    sizes.dedup();
    let mut choices: Vec<Choice> = Vec::new();
    for m in sizes {
        let mut sums: Vec<(&str, f64)> = Vec::new();
        for (_, kernel, seconds) in measured.iter().filter(|(of, ..)| *of == m) {
            match sums.iter_mut().find(|(name, _)| name == kernel) {
                Some((_, sum)) => *sum += seconds,
                None => sums.push((kernel, *seconds)),
            }
        }
        let Some((kernel, _)) = sums.into_iter().min_by(|(_, a), (_, b)| a.total_cmp(b)) else { continue };
        match choices.last_mut().filter(|last| last.kernel == kernel) {
            Some(last) => last.up_to = Some(m),
            None => {
                choices.push(Choice { operation: operation.into(), up_to: Some(m), kernel: kernel.into() })
            }
        }
    }
    if let Some(last) = choices.last_mut() {
        last.up_to = None;
    }
    choices
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(operation: &str, up_to: Option<usize>, kernel: &str) -> Choice {
        Choice { operation: operation.into(), up_to, kernel: kernel.into() }
    }

    #[test]
    fn a_measured_table_chooses_among_the_programs_rows() {
        let (tuned, problems) = Tuned::new(&[
            choice("linear", Some(128), "gemm_nf4_nt_64x64"),
            choice("linear", None, "gemm_nt_128x128"),
            choice("logits", None, "gemm_nt_f32_128x128"),
        ]);
        assert!(problems.is_empty(), "{problems:?}");
        let kernel = |operation, m| tuned.row(operation, m).map(|row| row.kernel.name);
        assert_eq!(kernel("linear", 1), Some("gemm_nf4_nt_64x64"));
        assert_eq!(kernel("linear", 129), Some("gemm_nt_128x128"));
        assert_eq!(kernel("input-gradient", 1), None);
        assert_eq!((tuned.len(), tuned.is_empty()), (3, false));
    }

    #[test]
    fn what_there_is_not_is_left_out_and_said() {
        let (tuned, problems) = Tuned::new(&[
            choice("convolution", None, "gemm_nt_128x128"),
            choice("linear", None, "gemm_nn_128x128"),
            choice("linear", None, "rm -rf"),
            choice("linear", Some(64), "gemm_nf4_nt_64x64"),
            choice("linear", Some(64), "gemm_nf4_nt_32x64"),
        ]);
        assert_eq!(tuned.len(), 1);
        assert_eq!(problems.len(), 4, "{problems:?}");
        assert_eq!(problems[0], "no operation \"convolution\" has a table");
        assert_eq!(problems[1], "linear: no kernel \"gemm_nn_128x128\" in its table");
        assert!(problems[3].contains("never reached"));
    }

    #[test]
    fn the_fastest_becomes_a_table_that_is_read_again() {
        let measured = [
            (64, "gemm_nf4_nt_32x64", 3.0),
            (64, "gemm_nf4_nt_64x64", 1.0),
            // Two shapes: 1 + 5 is slower than 3 + 2.
            (256, "gemm_nf4_nt_32x64", 1.0),
            (256, "gemm_nf4_nt_64x64", 3.0),
            (256, "gemm_nf4_nt_32x64", 5.0),
            (256, "gemm_nf4_nt_64x64", 2.0),
            (2048, "gemm_nf4_nt_64x64", 9.0),
            (2048, "gemm_nt_128x128", 4.0),
        ];
        let choices = fastest("linear", &measured);
        assert_eq!(
            choices,
            [choice("linear", Some(256), "gemm_nf4_nt_64x64"), choice("linear", None, "gemm_nt_128x128")]
        );
        assert!(Tuned::new(&choices).1.is_empty());
        assert!(fastest("linear", &[]).is_empty());
    }
}
