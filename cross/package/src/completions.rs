//! Completions for the shells, under the paths where each looks for those of packages.

use clap::Command;
use clap_complete::{Shell, generate};

const PLACES: [(Shell, &str, &str, &str); 3] = [
    (Shell::Bash, "usr/share/bash-completion/completions", "", ""),
    (Shell::Zsh, "usr/share/zsh/vendor-completions", "_", ""),
    (Shell::Fish, "usr/share/fish/vendor_completions.d", "", ".fish"),
];

/// Every file: its path in the tree and its content.
pub fn all() -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    let programs =
        [("finetuned", finetuned::cli::declaration()), ("finetunectl", finetuned::ctl::declaration())];
    for (name, declaration) in programs {
        let declaration = without_hidden(name, declaration);
        for (shell, directory, prefix, suffix) in PLACES {
            let mut text = Vec::new();
            generate(shell, &mut declaration.clone(), name, &mut text);
            files.push((format!("{directory}/{prefix}{name}{suffix}"), text));
        }
    }
    files
}

/// The command without the commands that are not for people: a command's own commands cannot be taken away, so it is put
/// together again from the rest.
fn without_hidden(name: &'static str, command: Command) -> Command {
    let rest: Vec<Command> = command.get_subcommands().filter(|sub| !sub.is_hide_set()).cloned().collect();
    let mut bare = Command::new(name);
    if let Some(about) = command.get_about() {
        bare = bare.about(about.clone());
    }
    bare.args(command.get_arguments().cloned()).subcommands(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_that_is_for_people_is_completed() {
        for declaration in [finetuned::cli::declaration(), finetuned::ctl::declaration()] {
            let own: Vec<_> =
                all().into_iter().filter(|(path, _)| path.contains(declaration.get_name())).collect();
            assert_eq!(own.len(), PLACES.len());
            for (path, text) in own {
                let text = String::from_utf8(text).unwrap();
                for sub in declaration.get_subcommands() {
                    assert_eq!(
                        text.contains(sub.get_name()),
                        !sub.is_hide_set(),
                        "{path}: {}",
                        sub.get_name()
                    );
                }
            }
        }
    }
}
