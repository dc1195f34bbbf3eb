//! On what a run computes: the GPU where it is usable, else the CPU, and one sentence that says why.
//!
//! | `train.backend` | `model.compute_dtype` | a GPU is there | |
//! |---|---|---|---|
//! | `cpu` | any | | CPU; `auto` is float32 |
//! | `auto` | `float32` | | CPU |
//! | `auto` | `auto`, `bfloat16` | yes | GPU |
//! | `auto` | any | no, or too old | CPU, and why is said |
//! | `auto`, `cuda` | | yes, but it cannot be opened | an error: a run on the CPU would take weeks |
//! | `cuda` | `float32` | | an error |
//! | `cuda` | `auto`, `bfloat16` | no | an error |

use super::prepare::PrepareError;
use crate::backend::cpu::{self, Cpu};
use crate::backend::cuda::{self, Cuda};
use crate::config::spec::{BackendChoice, ComputeDtype};
use finetuned_cuda::cubins::{Cubins, SHIPPED};
use finetuned_cuda::{Error, driver};
use std::path::Path;

/// The backend of a run.
pub enum Chosen {
    /// In float32 or bfloat16.
    Cpu(Cpu<f32>),
    /// In bfloat16.
    Cuda(Box<Cuda>),
}

/// Evaluates an expression with a name bound to the backend that was chosen, whatever its type.
#[macro_export]
macro_rules! with_backend {
    ($chosen:expr, $backend:ident => $body:expr) => {
        match $chosen {
            $crate::train::device::Chosen::Cpu($backend) => $body,
            $crate::train::device::Chosen::Cuda(boxed) => {
                let $backend = *boxed;
                $body
            }
        }
    };
}
pub use with_backend;

/// Chooses. Kernels that have to be compiled are kept below `cache`; `note` is told why `auto` takes the CPU.
///
/// # Errors
/// When what was asked for is not there, or the GPU cannot be opened.
pub fn choose(
    backend: BackendChoice,
    compute: ComputeDtype,
    cache: &Path,
    note: &mut dyn FnMut(String),
) -> Result<Chosen, PrepareError> {
    let on_the_cpu = || match compute {
        ComputeDtype::Auto | ComputeDtype::Float32 => Chosen::Cpu(Cpu::new()),
        ComputeDtype::Bfloat16 => Chosen::Cpu(Cpu::bfloat16()),
    };
    let automatic = match (backend, compute) {
        (BackendChoice::Cpu, _) => return Ok(on_the_cpu()),
        (BackendChoice::Auto, ComputeDtype::Float32) => {
            note("computing on the CPU: only it computes in float32".into());
            return Ok(on_the_cpu());
        }
        (BackendChoice::Cuda, ComputeDtype::Float32) => {
            return Err(PrepareError::Unfit {
                key: "model.compute_dtype",
                value: "\"float32\"".into(),
                why: "the GPU computes in bfloat16; use \"auto\", or train.backend = \"cpu\"".into(),
            });
        }
        (choice, _) => choice == BackendChoice::Auto,
    };
    // Before a context is made on it, which takes memory.
    match driver::properties(0) {
        Ok(_) => {}
        Err(
            why @ (Error::NoDriver
            | Error::NoDevice { .. }
            | Error::OldDriver { .. }
            | Error::OldDevice { .. }),
        ) if automatic => {
            note(format!("computing on the CPU: {why}"));
            return Ok(on_the_cpu());
        }
        Err(error) => return Err(PrepareError::Device(error)),
    }
    let cubins = Cubins::new(vec![SHIPPED.into()], Some(cache.join("kernels")), None);
    let cuda = Cuda::open(&cubins, &cache.join(cuda::tiles::NAME)).map_err(PrepareError::Device)?;
    Ok(Chosen::Cuda(Box::new(cuda)))
}

/// What this machine computes on when a run does not ask for something else, in words: `CPU (x86-64, AVX-512, 2 cores)`.
pub fn device() -> String {
    driver::properties(0).map_or_else(|_| cpu::device(), |gpu| cuda::describe(&gpu))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(backend: BackendChoice, compute: ComputeDtype) -> (Result<Chosen, PrepareError>, Vec<String>) {
        let mut notes = Vec::new();
        let cache = tempfile::tempdir().unwrap();
        let chosen = choose(backend, compute, cache.path(), &mut |text| notes.push(text));
        (chosen, notes)
    }

    #[test]
    fn the_cpu_is_taken_where_it_is_asked_for() {
        let (found, notes) = chosen(BackendChoice::Cpu, ComputeDtype::Auto);
        assert!(matches!(found, Ok(Chosen::Cpu(_))) && notes.is_empty());
    }

    #[test]
    fn float32_is_for_the_cpu() {
        let (found, notes) = chosen(BackendChoice::Auto, ComputeDtype::Float32);
        assert!(matches!(found, Ok(Chosen::Cpu(_))));
        assert_eq!(notes, ["computing on the CPU: only it computes in float32"]);
        let (found, _) = chosen(BackendChoice::Cuda, ComputeDtype::Float32);
        assert!(found.err().unwrap().to_string().contains("compute_dtype"));
    }

    #[test]
    fn without_a_driver_auto_says_why_and_cuda_is_an_error() {
        if driver::is_there() {
            return;
        }
        let (found, notes) = chosen(BackendChoice::Auto, ComputeDtype::Auto);
        assert!(matches!(found, Ok(Chosen::Cpu(_))));
        assert_eq!(notes, ["computing on the CPU: no CUDA driver: libcuda.so.1 was not found"]);
        let (found, notes) = chosen(BackendChoice::Cuda, ComputeDtype::Auto);
        let error = found.err().unwrap().to_string();
        assert!(error.contains("libcuda.so.1") && notes.is_empty(), "{error}");
    }
}
