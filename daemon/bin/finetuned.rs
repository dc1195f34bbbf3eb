//! `finetuned`: the program.

fn main() {}
