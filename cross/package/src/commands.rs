//! Every command line in the documents is one that the programs understand, and every reason and key is one that there is.

use clap::Command;
use clap::error::ErrorKind;
use finetuned::reason::Reason;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What a placeholder stands for where the value is looked at.
const PLACEHOLDERS: &[(&str, &str)] =
    &[("COMMAND", "run"), ("N", "1"), ("SECONDS", "1"), ("WHEN", "06:00"), ("KEY=VALUE", "power=25W")];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The documents that are packed: name and text.
fn documents() -> Vec<(String, String)> {
    let mut files =
        vec![root().join("README.md"), root().join("cross/README.md"), root().join("docs/dbus/README.md")];
    let docs = std::fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    files.extend(docs.filter(|path| path.extension().is_some_and(|extension| extension == "md")));
    files.sort();
    let read = |path: PathBuf| {
        let name = path.strip_prefix(root()).unwrap().display().to_string();
        (name, std::fs::read_to_string(path).unwrap())
    };
    files.into_iter().map(read).collect()
}

/// Fenced blocks of a language.
fn blocks<'a>(text: &'a str, language: &str) -> Vec<&'a str> {
    let fence = format!("```{language}\n");
    text.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap_or(rest)).collect()
}

/// Code between single backquotes, outside of fenced blocks.
fn inline(text: &str) -> Vec<String> {
    let outside: String = text.split("```").step_by(2).collect();
    // A line may break inside.
    outside
        .split('`')
        .skip(1)
        .step_by(2)
        .map(|code| code.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect()
}

/// The commands of a piece of shell, as words. Knows quotes, comments, continued lines, and what stands between commands.
fn shell(text: &str) -> Vec<Vec<String>> {
    let (mut commands, mut words, mut word) = (Vec::new(), Vec::new(), None::<String>);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\'' | '"' => {
                let word = word.get_or_insert_default();
                word.extend(chars.by_ref().take_while(|&next| next != c));
            }
            '\\' => match chars.next() {
                None | Some('\n') => {}
                Some(next) => word.get_or_insert_default().push(next),
            },
            '#' if word.is_none() => while chars.next_if(|&next| next != '\n').is_some() {},
            ' ' | '\t' => words.extend(word.take()),
            '\n' | '|' | '&' | ';' | '(' | ')' | '>' | '<' => {
                words.extend(word.take());
                commands.push(std::mem::take(&mut words));
            }
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    commands.push(words);
    commands
}

/// From the program's name on: without `sudo`, variables that are set, words of the shell.
fn of_ours(words: &[String]) -> Option<&[String]> {
    let start = words.iter().position(|word| word == "finetuned" || word == "finetunectl")?;
    let before =
        |word: &String| word.contains('=') || ["sudo", "if", "!", "then", "do"].contains(&word.as_str());
    words[..start].iter().all(before).then_some(&words[start..])
}

/// Of what is `named` in a sentence, without all it needs, the rest must still be right.
fn understood(words: &[String], named: bool) -> Result<(), String> {
    const INCOMPLETE: [ErrorKind; 3] = [
        ErrorKind::MissingRequiredArgument,
        ErrorKind::MissingSubcommand,
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand,
    ];
    let declaration: Command =
        if words[0] == "finetuned" { finetuned::cli::declaration() } else { finetuned::ctl::declaration() };
    let filled = words.iter().map(|word| {
        let value = PLACEHOLDERS.iter().find(|(name, _)| name == word);
        value.map_or(word.as_str(), |(_, value)| value)
    });
    match declaration.try_get_matches_from(filled) {
        Ok(_) => Ok(()),
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => Ok(()),
        Err(error) if named && INCOMPLETE.contains(&error.kind()) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn every_command_in_the_documents_is_understood() {
    let (mut tried, mut wrong) = (0, Vec::new());
    for (name, text) in documents() {
        let lines = blocks(&text, "sh").into_iter().map(|block| (block.to_string(), false));
        // Lines of usage have brackets; a name alone, or with an ellipsis, is no call.
        let call = |code: &String| code.contains(' ') && !code.contains(['[', '…']) && !code.contains("...");
        let names = inline(&text).into_iter().filter(call).map(|code| (code, true));
        for (piece, named) in lines.chain(names) {
            for words in shell(&piece) {
                let Some(words) = of_ours(&words) else { continue };
                if words.iter().any(|word| word.contains('…')) {
                    continue;
                }
                tried += 1;
                if let Err(error) = understood(words, named) {
                    wrong.push(format!("{name}: {}\n{error}", words.join(" ")));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(tried > 60, "only {tried} commands were found");
}

#[test]
fn a_command_that_does_not_exist_is_noticed() {
    for wrong in
        ["finetunectl lst", "finetunectl list --jsn", "finetuned run", "sudo finetunectl priority a high"]
    {
        let commands = shell(wrong);
        assert!(understood(of_ours(&commands[0]).unwrap(), false).is_err(), "{wrong}");
    }
    let commands =
        shell("id=$(finetunectl submit a.toml --set run.name='a b' \\\n  --hold) && finetuned demo # x\n");
    let ours: Vec<&[String]> = commands.iter().filter_map(|words| of_ours(words)).collect();
    assert_eq!(ours[0].join("|"), "finetunectl|submit|a.toml|--set|run.name=a b|--hold");
    assert_eq!(ours[1], ["finetuned", "demo"]);
}

/// The table of docs/operating.md says of every reason that a run can have what to do.
#[test]
fn every_reason_of_a_run_has_its_advice() {
    /// Reasons of a moment, in the account of a night and on the live page; no run has them.
    const OF_A_NIGHT: [Reason; 4] = [Reason::NoRun, Reason::Off, Reason::ClockSet, Reason::RampUp];
    let text = std::fs::read_to_string(root().join("docs/operating.md")).unwrap();
    let table = text.split("| reason | what it means |").nth(1).unwrap().split("\n\n").next().unwrap();
    let first = table.lines().skip(1).filter_map(|line| line.split('|').nth(1));
    let listed: BTreeSet<&str> = first.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect();
    let all = Reason::ALL.iter().filter(|reason| !OF_A_NIGHT.contains(reason));
    assert_eq!(listed, all.map(|reason| reason.word()).collect());
}
