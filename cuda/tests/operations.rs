//! The operation table: every operation of `finetuned_cuda::ops` over its shapes, on every device there is, against the
//! same formula in double precision.
//!
//! | column | runs |
//! |---|---|
//! | stand-in | always, where there is a C++ compiler; threads and blocks in three orders, which have to give the same bits |
//! | stand-in, sanitizers | the same once more in a process of its own, under the address and undefined-behaviour sanitizers |
//! | GPU | where there is one |
//!
//! A column that cannot run says so on standard error; `FINETUNED_REQUIRE=simt,sanitizers,gpu` makes that a failure.
//!
//! Shapes: one element, sizes that divide nothing, sizes of real models, nothing at all. Outputs hold NaN before the
//! operation. Tolerance: the error against double precision is at most twice that of the formula computed naively, with
//! every intermediate result rounded to bf16; where one rounding is all that may happen, the bits are compared.

#[path = "operations/adamw.rs"]
mod adamw;
#[path = "operations/adapter_gradient.rs"]
mod adapter_gradient;
#[path = "operations/attention.rs"]
mod attention;
#[path = "operations/cached_attention.rs"]
mod cached_attention;
#[path = "operations/cross_entropy.rs"]
mod cross_entropy;
#[path = "operations/dropout.rs"]
mod dropout;
#[path = "operations/elementwise.rs"]
mod elementwise;
#[path = "operations/harness.rs"]
mod harness;
#[path = "operations/linear.rs"]
mod linear;
#[path = "operations/nf4.rs"]
mod nf4;
#[path = "operations/probe.rs"]
mod probe;
#[path = "operations/rms_norm.rs"]
mod rms_norm;
#[path = "operations/rope.rs"]
mod rope;
#[path = "operations/rows.rs"]
mod rows;
#[path = "operations/sanitizers.rs"]
mod sanitizers;
#[path = "operations/simt.rs"]
mod simt;
#[path = "operations/small.rs"]
mod small;
#[path = "operations/swiglu.rs"]
mod swiglu;
