//! `finetuned`: the program. Everything is in [`finetuned::cli`].

fn main() -> std::process::ExitCode {
    finetuned::cli::main()
}
