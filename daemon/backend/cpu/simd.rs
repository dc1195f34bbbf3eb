//! Which vector instructions this machine has, and how a plain loop gets to use them.

use std::sync::atomic::{AtomicU8, Ordering};

/// Instruction set the hot loops are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Isa {
    /// What the target guarantees: SSE2 on x86-64, NEON on aarch64.
    Baseline = 1,
    /// AVX2 and FMA.
    Avx2 = 2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512 = 3,
}

static ISA: AtomicU8 = AtomicU8::new(0);

/// The best instruction set of this machine, looked up once.
#[inline]
pub fn isa() -> Isa {
    match ISA.load(Ordering::Relaxed) {
        3 => Isa::Avx512,
        2 => Isa::Avx2,
        1 => Isa::Baseline,
        _ => detect(),
    }
}

#[cold]
fn detect() -> Isa {
    #[cfg(target_arch = "x86_64")]
    let isa = if is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("fma")
    {
        Isa::Avx512
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        Isa::Avx2
    } else {
        Isa::Baseline
    };
    #[cfg(not(target_arch = "x86_64"))]
    let isa = Isa::Baseline;
    ISA.store(isa as u8, Ordering::Relaxed);
    isa
}

/// Defines a function over `T: Real` whose body is compiled once per instruction set and chosen at run time: a plain
/// loop in it is vectorised for the machine it runs on. The arithmetic is the same on every instruction set (nothing
/// is contracted or reassociated), so the bits are too.
macro_rules! vectorized {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name<T: $crate::backend::cpu::real::Real>($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body<T: $crate::backend::cpu::real::Real>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                unsafe fn avx512<T: $crate::backend::cpu::real::Real>($($arg: $ty),*) $(-> $ret)? {
                    body::<T>($($arg),*)
                }
                #[target_feature(enable = "avx2")]
                unsafe fn avx2<T: $crate::backend::cpu::real::Real>($($arg: $ty),*) $(-> $ret)? {
                    body::<T>($($arg),*)
                }
                match $crate::backend::cpu::simd::isa() {
                    // SAFETY: `isa` has seen these features on this machine.
                    $crate::backend::cpu::simd::Isa::Avx512 => return unsafe { avx512::<T>($($arg),*) },
                    // SAFETY: as above.
                    $crate::backend::cpu::simd::Isa::Avx2 => return unsafe { avx2::<T>($($arg),*) },
                    $crate::backend::cpu::simd::Isa::Baseline => {}
                }
            }
            body::<T>($($arg),*)
        }
    };
}

pub(crate) use vectorized;
