//! The column of the sanitizers: this test binary once more, with the kernels compiled for the address and
//! undefined-behaviour sanitizers and their runtimes preloaded.

use crate::harness::skipped;
use finetuned_cuda::simt;
use std::process::Command;

#[test]
fn the_table_holds_under_address_and_undefined_behaviour_sanitizers() {
    if simt::sanitized() {
        return; // this is that process
    }
    let environment = match simt::sanitizer_environment() {
        Ok(environment) => environment,
        Err(why) => return skipped("sanitizers", &why),
    };
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--test-threads", "2"])
        .envs(environment)
        .output()
        .unwrap();
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{complained}");
    assert!(said.contains("test result: ok"), "{said}");
}
