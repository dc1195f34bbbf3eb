//! From a Hugging Face directory to a decoder with LoRA on a backend.

pub mod adapter;
pub mod config;
pub mod decoder;
pub mod memory;
pub mod weights;
