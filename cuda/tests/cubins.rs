//! Every kernel, compiled for the GPUs that matter without one: what the compiler makes of it is held against the table in
//! `cuda/src/kernels.rs`.
//!
//! It needs NVRTC (`FINETUNED_NVRTC` names the library; `pip install nvidia-cuda-nvrtc-cu12` brings one). Without it the
//! tests say so on standard error; `FINETUNED_REQUIRE=nvrtc` makes that a failure.

use finetuned_cuda::compile::Compiler;
use finetuned_cuda::cubin::{Usage, usage};
use finetuned_cuda::cubins::{Cubins, build};
use finetuned_cuda::source::FILES;
use finetuned_cuda::{Error, kernels};
use std::collections::BTreeMap;

/// Orin, and the data-centre GPUs that the same instructions are tried on.
const ARCHITECTURES: [u32; 2] = [87, 90];

fn compiler() -> Option<Compiler> {
    match Compiler::load(None) {
        Ok(compiler) => Some(compiler),
        Err(error) => {
            let required =
                std::env::var("FINETUNED_REQUIRE").is_ok_and(|list| list.split(',').any(|c| c == "nvrtc"));
            assert!(!required, "{error}");
            eprintln!("SKIPPED: kernels are not compiled for a GPU: {error}");
            None
        }
    }
}

/// All kernels of an architecture.
fn compiled(compiler: &Compiler, sm: u32) -> BTreeMap<String, Usage> {
    FILES
        .iter()
        .flat_map(|source| {
            let cubin = compiler.compile(source, sm).unwrap_or_else(|error| panic!("{error}"));
            let found = usage(source.name, &cubin).unwrap();
            let mut listed: Vec<&str> = kernels::ALL
                .iter()
                .filter(|kernel| kernel.file == source.name)
                .map(|kernel| kernel.name)
                .collect();
            listed.sort();
            assert_eq!(
                found.iter().map(|usage| &usage.kernel[..]).collect::<Vec<_>>(),
                listed,
                "{}",
                source.name
            );
            found
        })
        .map(|usage| (usage.kernel.clone(), usage))
        .collect()
}

#[test]
fn every_kernel_stays_within_its_row() {
    let Some(compiler) = compiler() else { return };
    let mut problems = Vec::new();
    for sm in ARCHITECTURES {
        let found = compiled(&compiler, sm);
        for kernel in kernels::ALL {
            let usage = &found[kernel.name];
            if usage.registers > kernel.registers {
                problems.push(format!(
                    "{} sm_{sm}: {} registers of {}",
                    kernel.name, usage.registers, kernel.registers
                ));
            }
            if usage.stack > 0 {
                problems.push(format!("{} sm_{sm}: {} bytes of stack: it spills", kernel.name, usage.stack));
            }
            if sm == 87 && kernel.occupancy_sm87(usage.registers, usage.shared) < kernel.blocks {
                let blocks = kernel.occupancy_sm87(usage.registers, usage.shared);
                problems.push(format!(
                    "{}: {blocks} blocks fit on an SM and not {} ({} registers, {} + {} bytes)",
                    kernel.name, kernel.blocks, usage.registers, usage.shared, kernel.dynamic_shared
                ));
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// Shipped, cached, compiled: what is found is what was put there, and it is found again.
#[test]
fn cubins_are_found_where_they_were_put() {
    let Some(compiler) = compiler() else { return };
    let source = &FILES[0];
    let (shipped, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let open = || Cubins::new(vec![shipped.path().into()], Some(cache.path().into()), None);

    let made = open().find(source, 87).unwrap();
    assert!(made.path.is_none());
    let cached = open().find(source, 87).unwrap();
    assert!(cached.path.as_ref().unwrap().starts_with(cache.path()));
    assert!(cached.bytes == made.bytes && cached.compiler == made.compiler);

    let (path, bytes) = build(&compiler, source, 87, shipped.path()).unwrap();
    let found = open().find(source, 87).unwrap();
    assert_eq!(found.path.as_ref(), Some(&path));
    assert!(found.bytes == bytes && bytes == made.bytes, "the compiler is not deterministic");

    // Half a file is as good as none.
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let found = open().find(source, 87).unwrap();
    assert!(found.path.unwrap().starts_with(cache.path()));
    // Another architecture is another file.
    assert!(open().find(source, 90).unwrap().path.is_none());
}

#[test]
fn a_mistake_in_a_kernel_comes_with_the_compilers_words() {
    let Some(compiler) = compiler() else { return };
    static WRONG: finetuned_cuda::source::Source = finetuned_cuda::source::Source {
        name: "wrong.cu",
        text: "extern \"C\" __global__ void f() { nothing(); }",
    };
    let error = compiler.compile(&WRONG, 87).unwrap_err();
    assert!(matches!(error, Error::Compile { sm: 87, .. }));
    assert!(error.to_string().contains("identifier \"nothing\" is undefined"), "{error}");
}
