//! The engine against independent truth: transformers + PEFT + bitsandbytes golden values (`tests/golden`), finite
//! differences in float64, and its own promises about bits.

#[path = "engine/cuda.rs"]
mod cuda;
#[path = "engine/cuda_nf4.rs"]
mod cuda_nf4;
#[path = "engine/export_logits.rs"]
mod export_logits;
#[path = "engine/finite_differences.rs"]
mod finite_differences;
#[path = "engine/golden.rs"]
mod golden;
#[path = "engine/support.rs"]
mod support;
