//! The shape of the code, read from the code: imports point one way, every file says what it is, and nothing panics
//! where an error could be returned. And the shape of the units (`architecture/units.rs`).

#[path = "architecture/source.rs"]
mod source;
#[path = "architecture/units.rs"]
mod units;

use source::{Token, tokens, without_tests};
use std::path::{Path, PathBuf};

/// Who may use whom, in the order of `daemon/lib.rs`. A module may always use itself. `docs/architecture.md` has the
/// picture; a new top-level module needs a line here and a place there.
const ARROWS: &[(&str, &[&str])] = &[
    ("clock", &[]),
    ("reason", &[]),
    ("units", &[]),
    ("config", BASE),
    ("data", BASE),
    ("backend", BASE),
    ("model", &["clock", "config", "reason", "units", "backend"]),
    ("checkpoint", BASE),
    ("plan", BASE),
    ("train", &["clock", "config", "reason", "units", "data", "backend", "model", "checkpoint", "plan"]),
    (
        "worker",
        &["clock", "config", "reason", "units", "data", "backend", "model", "checkpoint", "plan", "train"],
    ),
    ("governor", BASE),
    ("night", &["clock", "config", "reason", "units", "governor"]),
    ("scheduler", &["clock", "config", "reason", "units", "plan", "governor"]),
    (
        "runs",
        &["clock", "config", "reason", "units", "checkpoint", "plan", "worker", "governor", "scheduler"],
    ),
    ("bus", &["clock", "config", "reason", "units", "plan", "governor", "night", "runs"]),
    (
        "service",
        &[
            "clock",
            "config",
            "reason",
            "units",
            "checkpoint",
            "plan",
            "worker",
            "governor",
            "night",
            "scheduler",
            "runs",
            "bus",
        ],
    ),
    (
        "cli",
        &[
            "clock",
            "config",
            "reason",
            "units",
            "data",
            "backend",
            "model",
            "checkpoint",
            "plan",
            "train",
            "worker",
            "governor",
            "scheduler",
            "service",
        ],
    ),
    ("ctl", &["clock", "config", "reason", "units", "plan", "night", "bus"]),
];

/// What lies below everything.
const BASE: &[&str] = &["clock", "config", "reason", "units"];

/// Calls that may end the process, outside tests: (file, the call, how often, why it cannot happen or must be so).
const PANICS: &[(&str, &str, usize, &str)] = &[
    (
        "model/decoder.rs",
        "unreachable!",
        2,
        "a workspace without gradients only serves generation, whose methods never enter the backward pass",
    ),
    (
        "backend/cuda/tensor.rs",
        "unreachable!",
        1,
        "the contract of every operation says which kind of tensor it takes, and the model obeys it",
    ),
    (
        "backend/cuda.rs",
        "unreachable!",
        3,
        "rotary angles are made in the line above; embeddings are never quantised; weights are made with their copy",
    ),
    (
        "backend/cuda/failure.rs",
        "panic!",
        1,
        "a process whose GPU has failed ends; a program that has said how is not ended this way",
    ),
];

fn daemon() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("daemon")
}

/// Every Rust file under `daemon/`, as a path relative to it, with its text.
fn files() -> Vec<(String, String)> {
    fn collect(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    let mut paths = Vec::new();
    collect(&daemon(), &mut paths);
    paths.sort();
    assert!(paths.len() > 30, "only {} files under {}: nothing was checked", paths.len(), daemon().display());
    paths
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(daemon()).unwrap().to_str().unwrap().to_string();
            (name, std::fs::read_to_string(&path).unwrap())
        })
        .collect()
}

/// The module that a file is: `data/plan.rs` is `["data", "plan"]`, `data/mod.rs` is `["data"]`.
fn module_of(file: &str) -> Vec<&str> {
    let mut parts: Vec<&str> = file.trim_end_matches(".rs").split('/').collect();
    if matches!(parts.last(), Some(&"mod" | &"lib")) {
        parts.pop();
    }
    parts
}

/// Top-level modules that `file` refers to by `crate::…` or a chain of `super::` that leaves its folder, with lines.
fn references(file: &str, source: &str) -> Vec<(String, usize)> {
    let tokens = tokens(source);
    let text = |i: usize| tokens.get(i).map_or("", |t: &Token| t.text.as_str());
    let depth_of_file = module_of(file).len();
    let mut found = Vec::new();
    // Modules written inside the file, as the depth of braces in which each lies.
    let (mut braces, mut inner) = (0usize, Vec::new());
    for i in 0..tokens.len() {
        let path_starts = i == 0 || text(i - 1) != "::";
        match text(i) {
            "{" => {
                braces += 1;
                if i >= 2 && text(i - 2) == "mod" {
                    inner.push(braces);
                }
            }
            "}" => {
                if inner.last() == Some(&braces) {
                    inner.pop();
                }
                braces = braces.saturating_sub(1);
            }
            "crate" if path_starts && text(i + 1) == "::" => names(&tokens, i + 2, &mut found),
            "super" if path_starts => {
                let mut end = i;
                let mut supers = 0;
                while text(end) == "super" && text(end + 1) == "::" {
                    supers += 1;
                    end += 2;
                }
                if supers >= depth_of_file + inner.len() {
                    names(&tokens, end, &mut found);
                }
            }
            _ => {}
        }
    }
    found
}

/// The first identifiers of the path, or of the group of paths, that starts at `at`.
fn names(tokens: &[Token], at: usize, found: &mut Vec<(String, usize)>) {
    let Some(first) = tokens.get(at) else { return };
    if first.is_identifier() {
        found.push((first.text.clone(), first.line));
    } else if first.text == "{" {
        let mut depth = 0;
        let mut expected = true;
        for token in &tokens[at..] {
            match token.text.as_str() {
                "{" => depth += 1,
                "}" => depth -= 1,
                "," if depth == 1 => expected = true,
                _ if depth == 1 && expected && token.is_identifier() => {
                    found.push((token.text.clone(), token.line));
                    expected = false;
                }
                _ => {}
            }
            if depth == 0 {
                return;
            }
        }
    }
}

/// What is wrong with a file's imports, a line each.
fn backward(file: &str, source: &str) -> Vec<String> {
    let module = module_of(file);
    // lib.rs is the list itself; the binaries stand above it.
    let Some(&own) = module.first() else { return Vec::new() };
    if own == "bin" {
        return Vec::new();
    }
    let known = |name: &str| ARROWS.iter().find(|(module, _)| *module == name);
    let Some((_, allowed)) = known(own) else {
        return vec![format!("daemon/{file}: `{own}` has no arrows in tests/architecture.rs")];
    };
    references(file, source)
        .into_iter()
        .filter(|(name, _)| name != own && !allowed.contains(&name.as_str()))
        .map(|(name, line)| match known(&name) {
            Some(_) => format!("daemon/{file}:{line}: `{own}` uses `{name}`, which is not below it"),
            None => format!("daemon/{file}:{line}: `{name}` is not a module of daemon/lib.rs"),
        })
        .collect()
}

fn assert_none(problems: &[String]) {
    assert!(problems.is_empty(), "{} problem(s):\n{}", problems.len(), problems.join("\n"));
}

#[test]
fn imports_point_one_way() {
    let problems: Vec<String> = files().iter().flat_map(|(file, source)| backward(file, source)).collect();
    assert_none(&problems);
}

#[test]
fn the_arrows_have_no_circle_and_name_every_module() {
    for (i, (module, allowed)) in ARROWS.iter().enumerate() {
        for below in *allowed {
            // The base modules may use each other in the order of the list; `config` is the last of them.
            let place = ARROWS.iter().position(|(other, _)| other == below).unwrap();
            assert!(place < i || below == module, "{module} → {below} points back");
        }
    }
    let library = std::fs::read_to_string(daemon().join("lib.rs")).unwrap();
    let mut declared: Vec<String> = tokens(&library)
        .windows(3)
        .filter(|t| t[0].text == "mod" && t[2].text == ";")
        .map(|t| t[1].text.clone())
        .collect();
    let mut listed: Vec<String> = ARROWS.iter().map(|(module, _)| module.to_string()).collect();
    declared.sort();
    listed.sort();
    assert_eq!(declared, listed, "daemon/lib.rs and the arrows list different modules");
}

#[test]
fn a_backward_import_is_caught_in_every_spelling() {
    let caught = [
        ("backend/cpu/gemm.rs", "use crate::model::config::ModelConfig;"),
        ("backend/cpu/gemm.rs", "use crate::{units::Bytes, train::gate::Gate};"),
        ("backend/cpu/gemm.rs", "use super::super::super::model::config;"),
        ("backend/nf4.rs", "pub(crate) use super::super::data as rows;"),
        ("backend/nf4.rs", "fn f() { let x = crate::train::run::run; }"),
        ("backend/nf4.rs", "macro_rules! m { () => { $crate::train::run } }"),
        ("data/plan.rs", "mod inner { use super::super::super::model::config; }"),
        ("data/mod.rs", "use super::checkpoint::Store;"),
        ("checkpoint/store.rs", "/// [`x`]\nuse crate::data::Sequence; // yes"),
        ("clock.rs", "use crate::config::spec::Spec;"),
        ("units.rs", "use super::{reason::Reason};"),
        ("model/decoder.rs", "const Q: char = '\"'; use crate::train::gate; const R: char = '\"';"),
        ("model/decoder.rs", "fn f<'a>(x: &'a str) -> crate::data::Sequence { r#\"x\"#; }"),
        ("train/run.rs", "use crate::cli::main;"),
        ("governor/control.rs", "use crate::runs::Runs;"),
        ("runs/owner.rs", "use crate::bus::Server;"),
        ("data/plan.rs", "use crate::gardener::Gardener;"),
        ("gardener/mod.rs", ""),
    ];
    for (file, source) in caught {
        assert_eq!(backward(file, source).len(), 1, "{file}: {source}");
    }
    let right = [
        ("backend/cpu/gemm.rs", "use super::real::Real; use crate::backend::Batch; use super::super::nf4;"),
        ("model/decoder.rs", "use crate::{backend::{Backend, cpu::Cpu}, units::{self, Bytes}};"),
        (
            "data/plan.rs",
            "// use crate::model;\n/* crate::train /* crate::cli */ */ const S: &str = \"crate::cli\";",
        ),
        (
            "data/plan.rs",
            "const R: &str = r##\"crate::cli \"# crate::cli\"##; const B: &[u8] = b\"crate::cli\";",
        ),
        (
            "data/plan.rs",
            "mod tests { use super::super::rows; mod deeper { use super::super::super::rows; } }",
        ),
        ("cli/mod.rs", "use crate::train::run::run; use crate::model::config; pub(crate) fn f() {}"),
        ("bin/finetuned.rs", "fn main() { finetuned::cli::main() }"),
        ("lib.rs", "pub mod train;"),
    ];
    for (file, source) in right {
        assert_none(&backward(file, source));
    }
}

#[test]
fn unsafe_code_stands_where_the_policy_allows_it() {
    let allowed = |file: &str| {
        file.starts_with("backend/cpu/")
            || [
                "backend/cuda/failure.rs",
                "backend/nf4.rs",
                "model/tensor_file.rs",
                "data/rows.rs",
                "worker/priorities.rs",
            ]
            .contains(&file)
    };
    let problems: Vec<String> = files()
        .iter()
        .filter(|(file, _)| !allowed(file))
        .flat_map(|(file, source)| tokens(source).into_iter().map(move |token| (file, token)))
        .filter(|(_, token)| token.text == "unsafe")
        .map(|(file, token)| format!("daemon/{file}:{}: unsafe, see docs/architecture.md", token.line))
        .collect();
    assert_none(&problems);
}

#[test]
fn every_file_begins_by_saying_what_it_is() {
    let problems: Vec<String> = files()
        .iter()
        .filter(|(_, source)| !source.starts_with("//! "))
        .map(|(file, _)| format!("daemon/{file} does not begin with a `//!` comment"))
        .collect();
    assert_none(&problems);
}

/// Calls in `source`, outside tests, that panic on purpose: `unwrap`, `expect`, `panic!`, `todo!`, ….
fn panics(tokens: &[Token]) -> Vec<(String, usize)> {
    let text = |i: usize| tokens.get(i).map_or("", |t: &Token| t.text.as_str());
    (0..tokens.len())
        .filter_map(|i| {
            let method = i > 0 && text(i - 1) == "." && text(i + 1) == "(";
            let call = match text(i) {
                name @ ("unwrap" | "expect") if method => format!("{name}()"),
                name @ ("panic" | "todo" | "unimplemented" | "unreachable") if text(i + 1) == "!" => {
                    format!("{name}!")
                }
                _ => return None,
            };
            Some((call, tokens[i].line))
        })
        .collect()
}

#[test]
fn nothing_panics_where_an_error_could_be_returned() {
    let files = files();
    // A module that is declared under #[cfg(test)] is a test as a whole.
    let (mut test_files, mut test_folders) = (Vec::new(), Vec::new());
    for (file, source) in &files {
        let folder = module_of(file).join("/");
        for module in without_tests(&tokens(source)).1 {
            test_files.push(format!("{folder}/{module}.rs"));
            test_folders.push(format!("{folder}/{module}/"));
        }
    }
    let mut problems = Vec::new();
    let mut used = vec![0; PANICS.len()];
    let is_test =
        |file: &String| test_files.contains(file) || test_folders.iter().any(|f| file.starts_with(f));
    for (file, source) in files.iter().filter(|(file, _)| !is_test(file)) {
        for (call, line) in panics(&without_tests(&tokens(source)).0) {
            match PANICS.iter().position(|(f, c, ..)| f == file && *c == call) {
                Some(known) => used[known] += 1,
                None => problems.push(format!("daemon/{file}:{line}: {call}")),
            }
        }
    }
    for ((file, call, count, _), used) in PANICS.iter().zip(used) {
        if used != *count {
            problems
                .push(format!("daemon/{file}: {call} is listed {count} times and stands there {used} times"));
        }
    }
    assert_none(&problems);
}

#[test]
fn a_panic_is_caught_and_tests_are_left_alone() {
    let source = "
        fn f() { x.unwrap(); y.expect(\"z\"); panic!(\"no\"); x.unwrap_or(1); \"panic!\"; todo!() }
        #[cfg(test)]
        use std::fs;
        #[cfg(test)]
        mod helpers;
        #[cfg(test)]
        #[allow(dead_code)]
        mod tests { fn g() { x.unwrap() } }
        #[cfg(all(test, unix))]
        fn h(a: [u8; 3]) { unreachable!() }
        fn i() { unreachable!() }";
    let (kept, modules) = without_tests(&tokens(source));
    let calls: Vec<String> = panics(&kept).into_iter().map(|(call, _)| call).collect();
    assert_eq!(calls, ["unwrap()", "expect()", "panic!", "todo!", "unreachable!"]);
    assert_eq!(modules, ["helpers"]);
}
