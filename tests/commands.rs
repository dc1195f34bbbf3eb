//! The program as a person meets it: what each command prints, leaves and returns, and what it says to bad input.

#[path = "commands/ask.rs"]
mod ask;
#[path = "commands/bad_input.rs"]
mod bad_input;
#[path = "commands/demo.rs"]
mod demo;
#[path = "exactness/fixture.rs"]
#[allow(dead_code, reason = "the fixture of the exactness tests, of which these use a part")]
mod fixture;
#[path = "commands/full_disk.rs"]
mod full_disk;
#[path = "commands/look.rs"]
mod look;
#[path = "commands/memory.rs"]
mod memory;
#[path = "commands/run.rs"]
mod run;
#[path = "commands/support.rs"]
mod support;
