//! Which of several kernels an operation takes: a table for each operation, in data, and where each row comes from.
//!
//! A table is read from the top; the first row that fits the device and the number of rows of the product is taken, and the
//! last fits everything. A row says where it comes from: measured, on what and when, or derived, from what. The choice
//! may depend on the device and on the shape; results may not, so all kernels of a table sum in one order.

use crate::device::Properties;
use crate::kernels::Kernel;

/// Where a row comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provenance {
    /// A measurement.
    Measured {
        /// The device, with its power mode where it has any.
        on: &'static str,
        /// The day, as 2026-11-25.
        date: &'static str,
        /// What was seen, in figures.
        result: &'static str,
    },
    /// Arithmetic, to be replaced by a measurement.
    Derived {
        /// What it follows from.
        from: &'static str,
    },
}

/// A row of a table.
#[derive(Debug)]
pub struct Row {
    /// For this architecture only, such as 87; `None` for all.
    pub sm: Option<u32>,
    /// For products of up to so many rows (tokens).
    pub up_to: usize,
    /// Rows of a block's tile.
    pub tile_m: usize,
    /// Columns of a block's tile.
    pub tile_n: usize,
    /// The kernel.
    pub kernel: &'static Kernel,
    /// Where it comes from.
    pub provenance: Provenance,
}

/// The row of a table for a product of `m` rows on a device. `None` when the table has no row for everything: a mistake that
/// [`complete`] finds in a test.
pub fn select(table: &'static [Row], device: &Properties, m: usize) -> Option<&'static Row> {
    table.iter().find(|row| row.sm.is_none_or(|sm| sm == device.sm) && m <= row.up_to)
}

/// Whether a table has a row for every device and every shape, and no row that is never reached.
pub fn complete(table: &[Row]) -> bool {
    let covers = |a: &Row, b: &Row| (a.sm.is_none() || a.sm == b.sm) && a.up_to >= b.up_to;
    let unreachable =
        table.iter().enumerate().any(|(i, row)| table[..i].iter().any(|above| covers(above, row)));
    !unreachable && table.last().is_some_and(|row| row.sm.is_none() && row.up_to == usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels;

    const fn row(sm: Option<u32>, up_to: usize, tile_m: usize) -> Row {
        let provenance = Provenance::Derived { from: "a test" };
        Row { sm, up_to, tile_m, tile_n: 128, kernel: &kernels::add_bf16, provenance }
    }

    static TABLE: [Row; 3] = [row(Some(87), 64, 32), row(None, 256, 64), row(None, usize::MAX, 128)];

    fn device(sm: u32) -> Properties {
        Properties {
            name: String::new(),
            sm,
            multiprocessors: 8,
            clock_khz: 612_000,
            shared_per_block: 0,
            shared_per_multiprocessor: 0,
            l2: 0,
            integrated: true,
            memory: 0,
            driver: 0,
        }
    }

    #[test]
    fn the_first_row_that_fits_is_taken() {
        let tile = |sm, m| select(&TABLE, &device(sm), m).unwrap().tile_m;
        assert_eq!([tile(87, 1), tile(87, 64), tile(87, 65), tile(87, 257)], [32, 32, 64, 128]);
        assert_eq!([tile(90, 1), tile(90, 100_000)], [64, 128]);
    }

    #[test]
    fn a_table_with_a_gap_or_a_dead_row_is_seen() {
        assert!(complete(&TABLE));
        assert!(!complete(&TABLE[..2]));
        assert!(!complete(&[row(None, 64, 32), row(Some(87), 32, 16), row(None, usize::MAX, 128)]));
        assert!(!complete(&[]));
    }
}
