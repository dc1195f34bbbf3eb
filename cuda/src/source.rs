//! The kernels as text. They are part of the program: what is compiled on a device is what was tested.

use sha2::{Digest, Sha256};

/// A file of CUDA C++.
#[derive(Debug, PartialEq, Eq)]
pub struct Source {
    /// Its name below `kernels/`.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

macro_rules! sources {
    ($($name:literal)*) => {
        &[$(Source { name: $name, text: include_str!(concat!("../kernels/", $name)) }),*]
    };
}

/// What the kernels include.
pub const HEADERS: &[Source] = sources!["attention.cuh" "attention_tiles.cuh" "device.cuh" "gemm.cuh" "gemm_units.cuh" "nf4.cuh" "philox.cuh" "ptx.cuh" "reduce.cuh" "vector.cuh"];

/// One operation a file. A test compares both lists with the directory.
pub const FILES: &[Source] = sources![
    "adamw.cu" "adapter_gradient.cu" "attention.cu" "attention_any.cu" "attention_backward.cu" "cached_attention.cu"
    "cross_entropy.cu" "dropout.cu" "elementwise.cu" "gemm.cu" "gemm_nf4.cu" "gemm_pack.cu" "nf4.cu" "probe.cu"
    "rms_norm.cu" "rope.cu" "rows.cu" "small.cu" "swiglu.cu"
];

/// Options that decide what the compiler makes of the text, besides the architecture.
///
/// `-default-device`: lambdas need no annotation. `--fmad=false`: a product and a sum are contracted where the source says `fmaf`, and nowhere else, so that the
/// stand-in and the CPU backend round where the GPU does.
pub const OPTIONS: &[&str] = &["--std=c++17", "--fmad=false", "-default-device"];

/// The file of that name.
pub fn file(name: &str) -> Option<&'static Source> {
    let all = FILES.iter();
    #[cfg(feature = "simt")]
    let all = all.chain(crate::simt::SELF_TEST);
    let mut all = all;
    all.find(|source| source.name == name)
}

impl Source {
    /// The name without `.cu`.
    pub fn stem(&self) -> &'static str {
        self.name.strip_suffix(".cu").unwrap_or(self.name)
    }

    /// SHA-256 of everything that goes into the compilation but the architecture and the compiler: the text, all
    /// headers, the options; the first 16 hexadecimal digits.
    pub fn hash(&self) -> String {
        let mut hash = Sha256::new();
        let mut part = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        for source in HEADERS.iter().chain([self]) {
            part(source.name.as_bytes());
            part(source.text.as_bytes());
        }
        OPTIONS.iter().for_each(|option| part(option.as_bytes()));
        hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_lists_are_the_directory() {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels");
        let found: BTreeSet<String> = std::fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.ends_with(".cu") || name.ends_with(".cuh"))
            .collect();
        let listed = HEADERS.iter().chain(FILES).map(|source| source.name.to_string()).collect();
        assert_eq!(found, listed);
    }

    #[test]
    fn a_hash_belongs_to_a_file() {
        let hashes: BTreeSet<String> = FILES.iter().map(Source::hash).collect();
        assert_eq!(hashes.len(), FILES.len());
        assert!(hashes.iter().all(|hash| hash.len() == 16));
    }

    /// The rules of a kernel file that a reader relies on.
    #[test]
    fn every_kernel_file_says_what_it_is() {
        for source in FILES {
            let head: String =
                source.text.lines().take_while(|line| line.starts_with("//")).collect::<Vec<_>>().join("\n");
            assert!(head.contains("Bound:"), "{}: the head comment does not name the bound", source.name);
            assert!(
                head.to_lowercase().contains("bytes"),
                "{}: the head comment does not count bytes",
                source.name
            );
            let kernels = source.text.matches("__global__").count();
            assert!(kernels > 0 && source.text.contains("ENTRY("), "{}: no entry", source.name);
        }
    }

    /// Sums of floats by atomics have no order; memory is touched through `device.cuh` and `ptx.cuh` only.
    #[test]
    fn no_kernel_goes_around_the_headers() {
        let banned =
            ["atomicAdd", "atomicCAS", "atom.", "red.", "asm", "__shared__", "reinterpret_cast", "__ldg"];
        for source in FILES {
            for word in banned {
                let code = source.text.lines().filter(|line| !line.trim_start().starts_with("//"));
                for line in code {
                    assert!(!line.contains(word), "{}: {word} in `{}`", source.name, line.trim());
                }
            }
        }
    }
}
