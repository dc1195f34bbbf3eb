//! The stand-in for the driver: a directory with a `libcuda.so.1` that runs the kernels of the stand-in, so that a whole
//! program can be tested on the way it takes on a GPU: cudarc, [`crate::driver`], the worker's process, its end.
//!
//! ```text
//!   libcuda.so.1, libcuda.so     simt/libcuda.cc, compiled; its head says what the environment may ask of it
//!   kernels/NAME.so              the libraries of the stand-in, which it calls
//!   cubins/                      files of the right names that the driver's launcher takes for cubins
//! ```
//!
//! For tests, and like [`crate::simt`] it needs a C++ compiler. Such a cubin holds the names of its kernels, an architecture
//! and no code; where NVRTC is, real ones serve as well.

use crate::cubins;
use crate::error::Error;
use crate::kernels::{self, Kernel};
use crate::simt::{Compiler, file_error, unique, write_whole};
use crate::source::{FILES, Source};
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

const LIBRARY: Source = Source { name: "libcuda.cc", text: include_str!("../simt/libcuda.cc") };

/// Architectures that cubins are made for: those that may stand behind `sm=` of the environment.
const ARCHITECTURES: [u32; 3] = [80, 87, 90];

/// What stands in for the compiler's name in the names of the cubins.
pub const COMPILER: &str = "stand-in";

/// A built stand-in.
#[derive(Clone, Debug)]
pub struct Libcuda {
    directory: PathBuf,
}

impl Libcuda {
    /// The stand-in, compiled if it is not there yet; all tests of a target directory share it.
    ///
    /// # Errors
    /// A sentence: there is no C++ compiler, or it refused something, or a file cannot be written.
    pub fn build() -> Result<Libcuda, String> {
        let compiler = Compiler::find()?;
        let library = compiler.build(&LIBRARY).map_err(|error| error.to_string())?;
        let kernels = build_all(&compiler).map_err(|error| error.to_string())?;
        let mut hash = Sha256::new();
        for path in kernels.iter().map(|(_, path)| path).chain([&library]) {
            // The directory of a library is named by everything that went into it.
            hash.update(path.as_os_str().as_encoded_bytes());
        }
        let hash: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let directory = compiler.directory().join(format!("libcuda-{hash}"));
        assemble(&directory, &library, &kernels).map_err(|error| error.to_string())?;
        Ok(Libcuda { directory })
    }

    /// What belongs at the front of `LD_LIBRARY_PATH`.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The cubins.
    pub fn cubins(&self) -> PathBuf {
        self.directory.join("cubins")
    }

    /// Makes a program find the stand-in; whatever the environment of this process asks of it is taken away.
    pub fn put_before<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let mut path = OsString::from(&self.directory);
        if let Some(rest) = std::env::var_os("LD_LIBRARY_PATH") {
            path.push(":");
            path.push(rest);
        }
        for variable in ["DEVICE", "FAIL", "ONCE", "LOG"] {
            command.env_remove(format!("FINETUNED_LIBCUDA_{variable}"));
        }
        command.env("LD_LIBRARY_PATH", path)
    }
}

/// The libraries of all kernels, with their sources; as many at a time as there are processors.
fn build_all(compiler: &Compiler) -> Result<Vec<(&'static Source, PathBuf)>, Error> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut built = Vec::new();
        while let Some(source) = FILES.get(next.fetch_add(1, Ordering::Relaxed)) {
            built.push((source, compiler.build(source)?));
        }
        Ok(built)
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let built: Result<Vec<Vec<_>>, Error> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    let mut built: Vec<_> = built?.into_iter().flatten().collect();
    built.sort_by_key(|(source, _)| source.name);
    Ok(built)
}

/// Fills the directory; the library that is looked for comes last, so that a directory that has it is whole.
fn assemble(directory: &Path, library: &Path, kernels: &[(&Source, PathBuf)]) -> Result<(), Error> {
    let last = directory.join("libcuda.so.1");
    if last.exists() {
        return Ok(());
    }
    let (libraries, cubins) = (directory.join("kernels"), directory.join("cubins"));
    for part in [&libraries, &cubins] {
        fs::create_dir_all(part).map_err(|error| file_error(part, error))?;
    }
    for (source, path) in kernels {
        copy(path, &libraries.join(format!("{}.so", source.stem())))?;
    }
    for source in FILES {
        let kernels: Vec<&Kernel> =
            kernels::ALL.iter().filter(|kernel| kernel.file == source.name).copied().collect();
        for sm in ARCHITECTURES {
            let name = cubins::file_name(source, sm, COMPILER);
            write_whole(&cubins.join(name), &cubin(&kernels, sm))?;
        }
    }
    // cudarc asks for this name first, and where there is a GPU it would find the real one.
    copy(library, &directory.join("libcuda.so"))?;
    copy(library, &last)
}

fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    let half_done = to.with_extension(unique());
    fs::copy(from, &half_done).and_then(|_| fs::rename(&half_done, to)).map_err(|error| file_error(to, error))
}

/// A cubin of these kernels without code: an ELF file with the sections that [`crate::cubin`] reads and the flags of
/// CUDA 12.
pub fn cubin(kernels: &[&Kernel], sm: u32) -> Vec<u8> {
    const HEADER: usize = 64;
    const SECTION: usize = 64;
    const REGISTERS: u8 = 0x2f;
    const FRAME_SIZE: u8 = 0x11;
    const FUNCTION: u8 = 0x12; // global, a function
    const FIRST_KERNEL: u16 = 5;

    // Texts, each with its terminating zero; the first is empty.
    let text = |texts: &mut Vec<u8>, text: &str| {
        let at = texts.len() as u32;
        texts.extend(text.bytes().chain([0]));
        at
    };
    let (mut names, mut strings) = (vec![0], vec![0]);
    let (mut symbols, mut info) = (vec![0; 24], Vec::new());
    for (i, kernel) in (0u16..).zip(kernels) {
        symbols.extend(text(&mut strings, kernel.name).to_le_bytes());
        symbols.extend([FUNCTION, 0]);
        symbols.extend((FIRST_KERNEL + i).to_le_bytes());
        symbols.extend([0; 16]);
        for (attribute, value) in [(REGISTERS, kernel.registers), (FRAME_SIZE, 0)] {
            info.extend([4, attribute, 8, 0]);
            info.extend((u32::from(i) + 1).to_le_bytes());
            info.extend(value.to_le_bytes());
        }
    }
    // Name, type, link, content.
    let mut sections: Vec<(u32, u32, u32, Vec<u8>)> = vec![(0, 0, 0, Vec::new())];
    let own = text(&mut names, ".shstrtab");
    let of_strings = text(&mut names, ".strtab");
    let of_symbols = text(&mut names, ".symtab");
    let of_info = text(&mut names, ".nv.info");
    let code: Vec<u32> =
        kernels.iter().map(|kernel| text(&mut names, &format!(".text.{}", kernel.name))).collect();
    sections.push((own, 3, 0, names));
    sections.push((of_strings, 3, 0, strings));
    sections.push((of_symbols, 2, 2, symbols));
    sections.push((of_info, 0x7000_0000, 3, info));
    sections.extend(code.into_iter().map(|name| (name, 1, 3, vec![0; 16])));

    let (mut content, mut table): (Vec<u8>, Vec<u8>) = (Vec::new(), Vec::new());
    for (name, kind, link, bytes) in &sections {
        table.extend(name.to_le_bytes());
        table.extend(kind.to_le_bytes());
        table.extend([0; 16]); // flags, address
        table.extend(((HEADER + content.len()) as u64).to_le_bytes());
        table.extend((bytes.len() as u64).to_le_bytes());
        table.extend(link.to_le_bytes());
        table.extend([0; SECTION - 44]);
        content.extend(bytes);
    }
    let mut file = b"\x7fELF\x02\x01\x01\x33\x07".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 190, 0]); // an executable for CUDA
    file.extend(1u32.to_le_bytes());
    file.extend([0; 16]); // entry, program headers
    file.extend(((HEADER + content.len()) as u64).to_le_bytes());
    file.extend((sm << 16 | 5 << 8 | sm).to_le_bytes());
    file.extend((HEADER as u16).to_le_bytes());
    file.extend([0; 4]); // program headers
    file.extend((SECTION as u16).to_le_bytes());
    file.extend((sections.len() as u16).to_le_bytes());
    file.extend(1u16.to_le_bytes()); // the section of the names
    file.extend(content);
    file.extend(table);
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cubin::usage;

    #[test]
    fn a_cubin_without_code_says_what_a_cubin_says() {
        let kernels = [&kernels::rms_norm_8, &kernels::add_bf16];
        let found = usage("made", &cubin(&kernels, 87)).unwrap();
        let read: Vec<(&str, u32, u32)> =
            found.iter().map(|usage| (&usage.kernel[..], usage.registers, usage.stack)).collect();
        assert_eq!(read, [("add_bf16", 40, 0), ("rms_norm_8", 64, 0)]);
        assert!(usage("cut", &cubin(&kernels, 87)[..400]).is_err());
    }
}
