//! The manual pages. Arguments come from the declarations of the programs, prose from `docs/`, the interface from its XML:
//! nothing is written here that is written elsewhere.
//!
//! ```text
//!   finetuned(8), finetunectl(1)     NAME, SYNOPSIS, OPTIONS, COMMANDS: clap; then the sections of docs/cli.md, finetunectl.md
//!   finetuned.toml(5), -spec(5)      docs/configuration.md, docs/spec.md
//!   org.finetuned.Finetuned1(5)      docs/dbus/README.md, then every interface
//! ```

use crate::interface;
use crate::markdown;
use crate::roff::{Roff, bold, code, escape, italic};
use anyhow::{Context, Result};
use clap::Command;
use clap_mangen::Man;
use jiff::Timestamp;

/// What the pages call the collection.
const COLLECTION: &str = "finetuned manual";

/// Every page: name, section, what it is in a line.
pub const PAGES: [(&str, u8, &str); 5] = [
    ("finetunectl", 1, "talk to the fine-tuning daemon"),
    ("finetuned", 8, "fine-tune language models on the device"),
    ("finetuned.toml", 5, "configuration of the fine-tuning daemon"),
    ("finetuned-spec", 5, "description of a fine-tuning run"),
    ("org.finetuned.Finetuned1", 5, "D-Bus interface of the fine-tuning daemon"),
];

/// A page, ready to be installed.
pub struct Page {
    name: &'static str,
    section: u8,
    /// The roff.
    pub text: String,
}

impl Page {
    /// Its place in the tree. It is compressed when the package is built.
    pub fn path(&self) -> String {
        format!("usr/share/man/man{0}/{1}.{0}", self.section, self.name)
    }
}

/// All of them.
pub fn pages(at: Timestamp) -> Result<Vec<Page>> {
    PAGES
        .into_iter()
        .map(|(name, section, what)| {
            let mut roff = Roff::default();
            let (number, version) = (section.to_string(), concat!("finetuned ", env!("CARGO_PKG_VERSION")));
            roff.request(
                "TH",
                &[&name.to_uppercase(), &number, &at.strftime("%F").to_string(), version, COLLECTION],
            );
            // No hyphenation, ragged right: commands and keys stay whole. Then the quote that clap_mangen's parts name.
            roff.raw(".nh\n.ad l\n.ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '");
            roff.request("SH", &["NAME"]);
            roff.line(&format!("{} \\- {}", escape(name), escape(what)));
            body(name, &mut roff).with_context(|| format!("{name}({section})"))?;
            see_also(name, &mut roff);
            Ok(Page { name, section, text: roff.into_text() })
        })
        .collect()
}

fn body(name: &str, roff: &mut Roff) -> Result<()> {
    match name {
        "finetuned" => program(finetuned::cli::declaration(), include_str!("../../../docs/cli.md"), roff),
        "finetunectl" => {
            program(finetuned::ctl::declaration(), include_str!("../../../docs/finetunectl.md"), roff)
        }
        "finetuned.toml" => {
            files(
                roff,
                &[
                    "/usr/lib/finetuned/finetuned.toml",
                    "/usr/lib/finetuned/finetuned.toml.d/*.toml",
                    "/etc/finetuned/finetuned.toml",
                    "/etc/finetuned/finetuned.toml.d/*.toml",
                ],
            );
            markdown::document(include_str!("../../../docs/configuration.md"), roff);
            Ok(())
        }
        "finetuned-spec" => {
            markdown::document(include_str!("../../../docs/spec.md"), roff);
            Ok(())
        }
        _ => {
            markdown::document(include_str!("../../../docs/dbus/README.md"), roff);
            for xml in [
                include_str!("../../../docs/dbus/org.finetuned.Finetuned1.Manager.xml"),
                include_str!("../../../docs/dbus/org.finetuned.Finetuned1.Run.xml"),
                include_str!("../../../docs/dbus/org.finetuned.Finetuned1.Governor.xml"),
            ] {
                interface::write(xml, roff)?;
            }
            Ok(())
        }
    }
}

fn files(roff: &mut Roff, paths: &[&str]) {
    roff.request("SH", &["SYNOPSIS"]);
    for (i, path) in paths.iter().enumerate() {
        if i > 0 {
            roff.raw(".br");
        }
        roff.line(&italic(&code(path)));
    }
}

fn see_also(name: &str, roff: &mut Roff) {
    roff.request("SH", &["SEE ALSO"]);
    let others: Vec<String> = PAGES
        .into_iter()
        .filter(|(other, ..)| *other != name)
        .map(|(other, section, _)| format!("{}({section})", bold(&code(other))))
        .collect();
    roff.line(&others.join(", "));
}

/// Arguments and commands as they are declared, then the sections of the document.
fn program(mut declaration: Command, document: &str, roff: &mut Roff) -> Result<()> {
    declaration.build();
    let part = |render: &dyn Fn(&Man, &mut Vec<u8>) -> std::io::Result<()>, command: &Command| {
        let mut text = Vec::new();
        render(&Man::new(command.clone()), &mut text)?;
        anyhow::Ok(String::from_utf8(text)?)
    };
    roff.raw(&without_preamble(&part(&|man, to| man.render_synopsis_section(to), &declaration)?));
    roff.raw(&without_preamble(&part(&|man, to| man.render_description_section(to), &declaration)?));
    roff.raw(&without_preamble(&part(&|man, to| man.render_options_section(to), &declaration)?));

    roff.request("SH", &["COMMANDS"]);
    for command in people_commands(&declaration) {
        let command = &without_common(command);
        let name = command.get_bin_name().unwrap_or(command.get_name());
        roff.request("SS", &[name]);
        let about = command.get_long_about().or_else(|| command.get_about());
        if let Some(about) = about {
            roff.line(&escape(&sentence(&about.to_string())));
        }
        roff.raw(".PP");
        roff.raw(&without_headings(&part(&|man, to| man.render_synopsis_section(to), command)?));
        roff.raw(&without_headings(&part(&|man, to| man.render_options_section(to), command)?));
        if let Some(help) = command.get_after_help() {
            roff.verbatim(&help.to_string());
        }
    }
    markdown::sections(document, roff);
    Ok(())
}

/// Every command that is for people and has no commands below it, in the order of the help.
fn people_commands(command: &Command) -> Vec<&Command> {
    let mut found = Vec::new();
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help") {
        if sub.has_subcommands() { found.extend(people_commands(sub)) } else { found.push(sub) }
    }
    found
}

/// The command without the arguments that every command has; those stand under OPTIONS.
fn without_common(command: &Command) -> Command {
    command.clone().mut_args(|argument| {
        let common = argument.is_global_set() || ["help", "version"].contains(&argument.get_id().as_str());
        if common { argument.hide(true) } else { argument }
    })
}

/// As clap has it, with the full stop that it leaves out.
fn sentence(text: &str) -> String {
    if text.ends_with(['.', '?', '!']) { text.to_string() } else { format!("{text}.") }
}

/// Two lines that the generator puts before every part: they belong to the head of a page, once.
fn without_preamble(text: &str) -> String {
    without_lines(text, &[".ie \\n(.g", ".el .ds"])
}

fn without_headings(text: &str) -> String {
    without_lines(&without_preamble(text), &[".SH"])
}

/// Without those lines, and without breaks around an empty line, which is a break itself.
fn without_lines(text: &str, starts: &[&str]) -> String {
    text.lines()
        .filter(|line| !starts.iter().any(|start| line.starts_with(start)))
        .fold(String::new(), |text, line| text + line.trim_end() + "\n")
        .replace(".br\n\n.br\n", ".sp\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(name: &str) -> String {
        let pages = pages(Timestamp::UNIX_EPOCH).unwrap();
        pages.into_iter().find(|page| page.name == name).unwrap().text
    }

    #[test]
    fn every_argument_of_every_command_is_in_the_page() {
        for (name, mut declaration) in
            [("finetuned", finetuned::cli::declaration()), ("finetunectl", finetuned::ctl::declaration())]
        {
            declaration.build();
            let page = text(name);
            for command in people_commands(&declaration) {
                let heading = format!(".SS \"{}\"", command.get_bin_name().unwrap());
                assert!(page.contains(&heading), "{name}: {heading}");
                for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
                    if let Some(long) = argument.get_long() {
                        let long = format!("\\-\\-{}", code(long));
                        assert!(page.contains(&long), "{heading} {long}");
                    }
                }
            }
            assert!(!page.contains(&format!("{name} worker")), "hidden commands are not for people");
        }
    }

    #[test]
    fn every_key_and_every_member_is_in_its_page() {
        for (name, document) in [
            ("finetuned.toml", include_str!("../../../docs/configuration.md")),
            ("finetuned-spec", include_str!("../../../docs/spec.md")),
        ] {
            let page = text(name);
            let keys: Vec<&str> =
                document.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
            assert!(keys.len() > 20, "{name}: {keys:?}");
            for key in keys {
                assert!(page.contains(&bold(&code(key))), "{name}: {key}");
            }
        }
        let page = text("org.finetuned.Finetuned1");
        for member in ["Submit", "AcquireLease", "Pause", "Temperature", "StateReason", "InvalidSpec"] {
            assert!(page.contains(member) || !include_str!("../../../docs/dbus/README.md").contains(member));
        }
    }
}
