//! The CUDA kernels of finetuned, and everything between them and a caller that deals in shapes.
//!
//! ```text
//!   ops::rms_norm(&device, …)      checks shapes, chooses the tile and the grid: a Launch
//!        │
//!   Launcher ──┬── Driver          the GPU: cubins found or compiled by `cubins`, launched through the CUDA driver
//!              └── Simt            any machine: the same .cu compiled as host C++, checked and counted (feature `simt`)
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`source`] | the kernels as text, and the hash that names what was compiled from it |
//! | [`kernels`] | the table of kernels: file, threads, shared memory, what the compiler may use |
//! | [`compile`] | NVRTC: text to cubin |
//! | [`cubin`] | what a cubin says about itself: architecture, registers, shared memory, spills |
//! | [`cubins`] | shipped, cached or compiled now |
//! | [`launcher`] | the trait, and the description of a launch |
//! | [`driver`] | the launcher of a GPU |
//! | [`memory`] | buffers, and the arena that is planned before it is taken |
//! | [`device`] | properties of a device, and a device with its launcher |
//! | [`tiles`] | which kernel for which shape, as data with its provenance |
//! | [`tuned`] | tables of tiles that were measured on a device |
//! | [`ops`] | one function an operation |
//! | [`mod@bench`] | how fast they are, beside the ceilings of the device |
//! | `simt`, `libcuda` | the stand-ins for tests: for a GPU, and for the driver's library (feature `simt`) |
//!
//! No CUDA toolkit is needed to build this and none to run it: libcuda and NVRTC are loaded when they are asked for.

pub mod bench;
pub mod compile;
pub mod cubin;
pub mod cubins;
pub mod device;
pub mod driver;
pub mod error;
pub mod kernels;
pub mod launcher;
#[cfg(feature = "simt")]
pub mod libcuda;
pub mod memory;
pub mod ops;
#[cfg(feature = "simt")]
pub mod simt;
pub mod source;
pub mod tiles;
pub mod tuned;

pub use device::{Device, Properties};
pub use error::Error;
pub use memory::{Buffer, Element};
