//! `finetunectl`: the program. Everything is in [`finetuned::ctl`].

fn main() -> std::process::ExitCode {
    finetuned::ctl::main()
}
