//! From a Hugging Face directory to a decoder with LoRA on a backend.
//!
//! ```text
//!  config.json ─► config ─┐
//!  *.safetensors ─► tensor_file ─► weights ─► decoder ─► logits, loss, gradients; generate
//!                  bitsandbytes ─┘   │  ▲        ▲
//!                             base_cache │    adapter
//!                             digests ───┘
//! ```

pub mod adapter;
pub mod base_cache;
pub mod bitsandbytes;
pub mod config;
pub mod decoder;
pub mod digests;
pub mod generate;
pub mod memory;
pub mod tensor_file;
pub mod traffic;
pub mod weights;
pub mod work;
