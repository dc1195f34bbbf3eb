//! The column of the sanitizers: this test binary once more, with the kernels compiled for the address and
//! undefined-behaviour sanitizers and their runtimes preloaded.

use crate::harness::{required, skipped};
use std::process::Command;

/// Where the compiler keeps a library, if it has it.
fn library(name: &str) -> Option<String> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let output = Command::new(compiler).arg(format!("-print-file-name={name}")).output().ok()?;
    let path = String::from_utf8(output.stdout).ok()?.trim().to_string();
    // A name that comes back as it went in was not found.
    (path.contains('/') && std::path::Path::new(&path).exists()).then_some(path)
}

#[test]
fn the_table_holds_under_address_and_undefined_behaviour_sanitizers() {
    if std::env::var_os("FINETUNED_SIMT_SANITIZE").is_some() {
        return; // this is that process
    }
    let (Some(address), Some(undefined)) = (library("libasan.so"), library("libubsan.so")) else {
        return skipped("sanitizers", "the compiler has no libasan.so and libubsan.so");
    };
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--test-threads", "2"])
        .env("FINETUNED_SIMT_SANITIZE", "1")
        .env("LD_PRELOAD", format!("{address} {undefined}"))
        // Rust's runtime and the fibers' stacks are none of the leak checker's business.
        .env("ASAN_OPTIONS", "detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=0")
        .env("UBSAN_OPTIONS", "print_stacktrace=1:halt_on_error=1")
        .output()
        .unwrap();
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{complained}");
    assert!(said.contains("test result: ok"), "{said}");
    let _ = required("sanitizers");
}
