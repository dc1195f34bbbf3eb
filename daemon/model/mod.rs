//! The decoder: its shape, its frozen weights, its passes.

pub mod base_cache;
pub mod bitsandbytes;
pub mod config;
pub mod digests;
pub mod tensor_file;
pub mod weights;
