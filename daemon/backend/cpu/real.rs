//! The element type the CPU backend computes in: `f32` is the product, `f64` the oracle that the tests hold it (and
//! every other backend) against. Both run the same code.

use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub, SubAssign};

/// A floating-point element.
pub trait Real:
    Copy
    + Send
    + Sync
    + Default
    + PartialOrd
    + std::fmt::Debug
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + 'static
{
    /// 0
    const ZERO: Self;
    /// 1
    const ONE: Self;
    /// −∞
    const NEG_INFINITY: Self;
    /// Name for the identity of a run.
    const NAME: &'static str;

    /// Nearest value.
    fn from_f64(value: f64) -> Self;
    /// Exact for both types.
    fn from_f32(value: f32) -> Self;
    /// Exact for both types.
    fn to_f64(self) -> f64;
    /// Nearest value.
    fn to_f32(self) -> f32;
    /// eˣ. Branch-free for `f32`, so that loops over it vectorise.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Square root, correctly rounded.
    fn sqrt(self) -> Self;
    /// The larger (either operand may be −∞, neither NaN).
    fn larger(self, other: Self) -> Self;
    /// Nearest bfloat16 (ties to even); the identity for the oracle, which has no low precision.
    fn round_bf16(self) -> Self;

    /// Geometry of the register tile and the product of two packed panels; see [`super::gemm`].
    const TILE: super::gemm::Tile;
    /// `c[0..MR][0..NR] = a·b`, or `+=`. `a` is `[depth][MR]`, `b` is `[depth][NR]`. With `half`, the right half of
    /// the tile may be left out.
    ///
    /// # Safety
    /// `a` and `b` are valid for `depth * MR` and `depth * NR` reads; `c` for an `MR × NR` tile with row stride `ldc`.
    unsafe fn tile_product(
        depth: usize,
        a: *const Self,
        b: *const Self,
        c: *mut Self,
        ldc: usize,
        half: bool,
        accumulate: bool,
    );
}

impl Real for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
    const NEG_INFINITY: f32 = f32::NEG_INFINITY;
    const NAME: &'static str = "float32";

    #[inline(always)]
    fn from_f64(value: f64) -> f32 {
        value as f32
    }
    #[inline(always)]
    fn from_f32(value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    /// Cody–Waite reduction to |r| ≤ ln2/2 and a degree-6 minimax polynomial: at most 1 ulp from the true value over
    /// the normal range. No fused multiply-add and no library call, so the bits are the same on every machine.
    /// Below −87.3 the result is that of −87.3 (1.2e-38, nothing for a softmax); above 88.3 that of 88.3.
    #[inline(always)]
    fn exp(self) -> f32 {
        const LOG2_E: f32 = std::f32::consts::LOG2_E;
        const LN2_HI: f32 = 0.693_359_4; // 355/512: the product with a small integer is exact
        const LN2_LO: f32 = -2.121_944_4e-4;
        const ROUND: f32 = 12_582_912.0; // 1.5·2²³: adding it leaves the nearest integer in the low bits
        let x = if self > -87.3 { self } else { -87.3 };
        let x = if x < 88.3 { x } else { 88.3 };
        let shifted = x * LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = (x - n * LN2_HI) - n * LN2_LO;
        let mut p = 1.987_569_2e-4_f32;
        p = p * r + 1.398_2e-3;
        p = p * r + 8.333_452e-3;
        p = p * r + 4.166_579_6e-2;
        p = p * r + 1.666_666_5e-1;
        p = p * r + 0.5;
        let value = (p * (r * r) + r) + 1.0;
        let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()) << 23;
        let result = f32::from_bits(value.to_bits().wrapping_add(exponent));
        // NaN compares false with everything and was clamped above: hand it back, or a diverged run would look fine.
        if self.is_nan() { self } else { result }
    }
    #[inline(always)]
    fn ln(self) -> f32 {
        // In double: one rounding, so that the result does not depend on the C library.
        f64::from(self).ln() as f32
    }
    #[inline(always)]
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn larger(self, other: f32) -> f32 {
        if self > other { self } else { other }
    }
    #[inline(always)]
    fn round_bf16(self) -> f32 {
        let bits = self.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
        f32::from_bits(if self.is_nan() { bits } else { rounded })
    }

    const TILE: super::gemm::Tile = super::gemm::Tile { rows: 12, cols: 32 };
    #[inline]
    unsafe fn tile_product(
        depth: usize,
        a: *const f32,
        b: *const f32,
        c: *mut f32,
        ldc: usize,
        half: bool,
        accumulate: bool,
    ) {
        // SAFETY: the caller's contract is the callee's.
        unsafe { super::gemm::tile_product_f32(depth, a, b, c, ldc, half, accumulate) }
    }
}

impl Real for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    const NEG_INFINITY: f64 = f64::NEG_INFINITY;
    const NAME: &'static str = "float64";

    #[inline(always)]
    fn from_f64(value: f64) -> f64 {
        value
    }
    #[inline(always)]
    fn from_f32(value: f32) -> f64 {
        f64::from(value)
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self as f32
    }
    #[inline(always)]
    fn exp(self) -> f64 {
        f64::exp(self)
    }
    #[inline(always)]
    fn ln(self) -> f64 {
        f64::ln(self)
    }
    #[inline(always)]
    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }
    #[inline(always)]
    fn larger(self, other: f64) -> f64 {
        if self > other { self } else { other }
    }
    #[inline(always)]
    fn round_bf16(self) -> f64 {
        self
    }

    const TILE: super::gemm::Tile = super::gemm::Tile { rows: 4, cols: 8 };
    #[inline]
    unsafe fn tile_product(
        depth: usize,
        a: *const f64,
        b: *const f64,
        c: *mut f64,
        ldc: usize,
        _: bool,
        accumulate: bool,
    ) {
        // SAFETY: the caller's contract is the callee's.
        unsafe { super::gemm::tile_product_plain::<f64, 4, 8>(depth, a, b, c, ldc, accumulate) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_one_ulp_of_the_truth() {
        let mut worst = 0.0_f64;
        let mut x = -87.0_f32;
        while x < 88.0 {
            let truth = f64::from(x).exp();
            let ulp = f64::from(f32::from_bits((truth as f32).to_bits() + 1)) - f64::from(truth as f32);
            worst = worst.max((f64::from(Real::exp(x)) - truth).abs() / ulp);
            x += 0.001_37;
        }
        assert!(worst < 1.0, "{worst} ulp");
        assert_eq!(Real::exp(0.0_f32), 1.0);
        assert!(Real::exp(-1e30_f32) < 2e-38);
        assert!(Real::exp(f32::NEG_INFINITY) < 2e-38);
        assert!(Real::exp(f32::NAN).is_nan());
    }

    #[test]
    fn bf16_rounding_is_that_of_the_half_crate() {
        for i in 0..200_000_u32 {
            let x = f32::from_bits(i.wrapping_mul(2_654_435_761));
            let expected = half::bf16::from_f32(x).to_f32();
            let got = x.round_bf16();
            assert!(got == expected || (x.is_nan() && got.is_nan()), "{x}: {got} against {expected}");
        }
    }
}
