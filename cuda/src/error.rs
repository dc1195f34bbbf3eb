//! What can go wrong between a shape and a GPU. An error names the operation or the kernel, the shape, and the code of
//! CUDA where there is one.

use std::path::PathBuf;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call that cannot be right, whatever the device. Nothing was launched.
    #[error("{operation}: {what}")]
    Shape {
        /// The operation.
        operation: &'static str,
        /// What does not fit, with its numbers.
        what: String,
    },
    /// CUDA refused a call.
    #[error("{during}: CUDA error {code} ({name}){}", hint(*.code))]
    Cuda {
        /// What was being done: the kernel and its launch, or the call.
        during: String,
        /// The driver's number (`CUresult`).
        code: u32,
        /// The driver's name for it.
        name: String,
    },
    /// There is no driver on this machine.
    #[error("no CUDA driver: libcuda.so.1 was not found")]
    NoDriver,
    /// The driver is there, a device is not.
    #[error("no CUDA device {index}: the driver knows {count}")]
    NoDevice {
        /// The device that was asked for.
        index: usize,
        /// Devices that there are.
        count: usize,
    },
    /// A driver that is too old for this program.
    #[error("the CUDA driver supports {}.{}, and 12.2 (JetPack 6) is needed", .found / 1000, .found % 1000 / 10)]
    OldDriver {
        /// As `cuDriverGetVersion` has it: 1000 · major + 10 · minor.
        found: i32,
    },
    /// A GPU without the instructions that the kernels use.
    #[error("{name} has compute capability {}.{}, and 8.0 (Ampere) is needed", .sm / 10, .sm % 10)]
    OldDevice {
        /// The GPU.
        name: String,
        /// 10 · major + minor.
        sm: u32,
    },
    /// There is no compiler, and it is needed.
    #[error("NVRTC was not found (tried {}){}", .tried.join(", "), because(.cause))]
    NoCompiler {
        /// Names and paths that were tried.
        tried: Vec<String>,
        /// What the dynamic loader said of the last.
        cause: String,
    },
    /// The compiler refused a kernel.
    #[error("{file} does not compile for sm_{sm}: {name}\n{log}")]
    Compile {
        /// The source.
        file: &'static str,
        /// The architecture.
        sm: u32,
        /// NVRTC's name for the error.
        name: String,
        /// What the compiler printed.
        log: String,
    },
    /// No cubin for this GPU, and no compiler to make one.
    #[error("no cubin of {file} for sm_{sm} in {}: {cause}", list(.searched))]
    NoCubin {
        /// The source.
        file: &'static str,
        /// The architecture.
        sm: u32,
        /// Directories that were searched.
        searched: Vec<PathBuf>,
        /// Why none was made.
        cause: Box<Error>,
    },
    /// A file that is no cubin, or a damaged one.
    #[error("{what}: not a cubin: {problem}")]
    Cubin {
        /// The file or the kernel.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A kernel that its cubin does not have.
    #[error("the cubin of {file} has no kernel {kernel}")]
    MissingKernel {
        /// The source.
        file: &'static str,
        /// The kernel.
        kernel: &'static str,
    },
    /// The plan asks for more than there is.
    #[error(
        "{wanted} bytes of device memory are needed and {available} can be taken ({kept} are left to the system)"
    )]
    Memory {
        /// Bytes of the plan.
        wanted: u64,
        /// Bytes that may be taken.
        available: u64,
        /// Bytes that stay free.
        kept: u64,
    },
    /// The stand-in found a mistake in a kernel or a launch.
    #[error("{kernel}{shape}: {fault}")]
    Fault {
        /// The kernel.
        kernel: &'static str,
        /// Grid, threads, shared memory.
        shape: String,
        /// What, where, which thread.
        fault: String,
    },
    /// A file that cannot be read or written.
    #[error("{}: {source}", .path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl Error {
    /// Whether the context is lost: every later call in this process fails, and nothing it computed can be trusted
    /// (CUDA Driver API, the codes described as leaving "the process in an inconsistent state").
    pub fn is_sticky(&self) -> bool {
        match self {
            Error::Cuda { code, .. } => STICKY.contains(code),
            Error::Fault { .. } => true,
            _ => false,
        }
    }

    /// Whether device memory ran out.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Error::Cuda { code: 2, .. } | Error::Memory { .. })
    }
}

/// Illegal address, launch timeout, context destroyed, assert, hardware stack, illegal instruction, misaligned address,
/// invalid address space, invalid program counter, launch failed.
const STICKY: [u32; 10] = [700, 702, 709, 710, 714, 715, 716, 717, 718, 719];

fn hint(code: u32) -> &'static str {
    match code {
        2 => ": out of memory",
        209 | 222 => ": the cubin is not for this GPU or this driver",
        700 | 716..=719 => ": the kernel is wrong, or the memory is",
        _ => "",
    }
}

fn because(cause: &str) -> String {
    if cause.is_empty() { String::new() } else { format!(": {cause}") }
}

fn list(paths: &[PathBuf]) -> String {
    let shown: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    if shown.is_empty() { "any directory".into() } else { shown.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_that_end_the_context_are_known() {
        let cuda = |code| Error::Cuda { during: "rms_norm_8".into(), code, name: "E".into() };
        for code in [700, 702, 709, 710, 714, 715, 716, 717, 718, 719] {
            assert!(cuda(code).is_sticky(), "{code}");
        }
        for code in [1, 2, 209, 701, 999] {
            assert!(!cuda(code).is_sticky(), "{code}");
        }
        assert!(cuda(2).is_out_of_memory() && !cuda(700).is_out_of_memory());
    }

    #[test]
    fn an_old_driver_is_said_in_one_sentence() {
        assert_eq!(
            Error::OldDriver { found: 11040 }.to_string(),
            "the CUDA driver supports 11.4, and 12.2 (JetPack 6) is needed"
        );
    }
}
