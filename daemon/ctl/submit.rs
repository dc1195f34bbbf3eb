//! `finetunectl submit`: a spec and the files that it names go to the daemon, the files as descriptors that are opened
//! here, with the caller's rights.
//!
//! Without overrides the spec travels as it was written, and each descriptor under the path as it was written. With
//! overrides the resolved spec travels, and each descriptor under its absolute path.

use super::connect::options;
use super::context::Context;
use super::exit::{Code, Exit, Failure};
use super::figures::Figures;
use super::{steer, text, watch};
use crate::config::spec::Spec;
use clap::Args;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Component, Path, PathBuf};
use zbus::{OwnedFd, OwnedObjectPath, OwnedVariant};

/// Descriptors that a message may carry on the buses of a distribution (`max_message_unix_fds` of dbus-daemon).
const MOST_FILES: usize = 16;

/// Arguments of `finetunectl submit`.
#[derive(Args, Debug)]
pub struct SubmitArguments {
    /// The run's spec, a TOML file (docs/spec.md)
    #[arg(value_name = "SPEC")]
    pub spec: PathBuf,
    /// Override a key of the spec, such as train.max_steps=10; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Place in the queue: higher goes first
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    pub priority: i32,
    /// When it should be done: '2026-11-27 06:00', 06:00 (the next one), or +8h
    #[arg(long, value_name = "WHEN")]
    pub deadline: Option<String>,
    /// Begin as paused; `finetunectl resume` lets it go
    #[arg(long)]
    pub hold: bool,
    /// Wait for the end of the run
    #[arg(long, conflicts_with = "watch")]
    pub wait: bool,
    /// Watch the run until it ends
    #[arg(long)]
    pub watch: bool,
}

/// Runs the command.
pub async fn command(arguments: &SubmitArguments, context: &Context) -> Result<Code, Failure> {
    let deadline = arguments.deadline.as_deref().map_or(Ok(0), |text| steer::moment(text, context))?;
    let parcel = Parcel::pack(&arguments.spec, &arguments.set)?;
    let client = context.client().await?;
    let mut options = options([
        ("spec-name", parcel.name.as_str().into()),
        ("priority", arguments.priority.into()),
        ("hold", arguments.hold.into()),
    ])?;
    // A daemon that knows no deadlines takes a run without one.
    if deadline > 0 {
        options.insert("deadline".into(), OwnedVariant::from(deadline));
    }
    let body = (parcel.text.as_str(), parcel.files, options);
    // The daemon copies the files before it answers.
    let path: OwnedObjectPath =
        client.call(client.manager.inner(), "Submit", &body, Some(context.patience())).await?;
    let run = client.run(path).await?;
    let figures = Figures::new(&client.properties(run.inner()).await?);
    if context.json && !arguments.wait {
        context.console.json(serde_json::json!({ "run": figures.json() }))?;
    } else if !context.json {
        context.console.line(&text::printable(&figures.id))?;
    }
    if arguments.watch {
        return watch::to_the_end(context, &client, &run).await;
    }
    if !arguments.wait {
        let watch = context.transport.again(&format!("watch {}", text::printable(&figures.id)));
        context.console.message(&format!("submitted {}; watch it with: {watch}", figures.title()));
        return Ok(Exit::Done.into());
    }
    watch::wait_for(context, &client, &run, None).await
}

/// What is sent.
#[derive(Debug)]
pub struct Parcel {
    /// File name of the spec.
    pub name: String,
    /// The spec.
    pub text: String,
    /// Files and directories, by the path that stands in `text`.
    pub files: HashMap<String, OwnedFd>,
}

/// A path that a spec names.
struct Named {
    /// `section.key`.
    key: &'static str,
    /// As it will stand in the text.
    written: String,
    /// Where it is.
    path: PathBuf,
    /// A directory, or a file.
    directory: bool,
}

impl Parcel {
    /// Reads the spec and opens what it names.
    pub fn pack(path: &Path, overrides: &[String]) -> Result<Parcel, Failure> {
        let mut spec = Spec::load(path, overrides)?;
        let cannot = |error: std::io::Error| {
            Failure::new(Exit::Usage, format!("cannot read the spec {}", path.display())).because(error)
        };
        let base_dir = std::path::absolute(path).map_err(cannot)?.parent().map(Path::to_path_buf);
        let base_dir = base_dir.unwrap_or_else(|| "/".into());
        let registered = registered(&spec.model.base, &base_dir);
        if let Some(name) = &registered {
            spec.model.base = name.into();
        }
        let (text, written) = if overrides.is_empty() {
            let text = std::fs::read_to_string(path).map_err(cannot)?;
            let written = written(&text);
            (text, written)
        } else {
            (spec.to_toml(), HashMap::new())
        };
        let mut named = Vec::new();
        let mut name = |key, path: &Path, directory| {
            let absolute = path.to_string_lossy().into_owned();
            // Several ways to write a path lead to the same place; the one in the text is the key.
            let as_written = |text: &&String| base_dir.join(text).components().collect::<PathBuf>() == path;
            let in_text = written.get(key).and_then(|texts: &Vec<String>| texts.iter().find(as_written));
            let written = in_text.cloned().unwrap_or(absolute);
            named.push(Named { key, written, path: path.to_path_buf(), directory });
        };
        if registered.is_none() {
            name("model.base", &spec.model.base, true);
        }
        spec.data.train.iter().for_each(|file| name("data.train", file, false));
        if let Some(file) = &spec.data.eval {
            name("data.eval", file, false);
        }
        if let Some(adapter) = &spec.lora.init_from {
            name("lora.init_from", adapter, true);
        }
        let mut files = HashMap::new();
        for named in named {
            let file = named.open()?;
            files.insert(named.written, file);
        }
        if files.len() > MOST_FILES {
            let error = format!(
                "the spec names {} files and directories; a message to the daemon carries {MOST_FILES}",
                files.len()
            );
            return Err(Failure::new(Exit::Usage, error).help(
                "join files of data.train (`cat a.jsonl b.jsonl > all.jsonl`), \
                 or register the model: `finetunectl model add`",
            ));
        }
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Parcel { name, text, files })
    }
}

/// The name of a registered model: a plain name, with nothing of that name here.
fn registered(base: &Path, base_dir: &Path) -> Option<String> {
    let below = base.strip_prefix(base_dir).ok()?;
    let mut components = below.components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(name)), None) if std::fs::symlink_metadata(base).is_err() => {
            name.to_str().map(String::from)
        }
        _ => None,
    }
}

/// The paths of a spec as its text has them, by key. The spec was read before, so nothing here can be wrong.
fn written(text: &str) -> HashMap<&'static str, Vec<String>> {
    let table: toml::Table = text.parse().unwrap_or_default();
    let texts = |section: &str, key: &str| match table.get(section).and_then(|section| section.get(key)) {
        Some(toml::Value::String(text)) => vec![text.clone()],
        Some(toml::Value::Array(items)) => {
            items.iter().filter_map(|item| item.as_str().map(String::from)).collect()
        }
        _ => Vec::new(),
    };
    HashMap::from([
        ("model.base", texts("model", "base")),
        ("data.train", texts("data", "train")),
        ("data.eval", texts("data", "eval")),
        ("lora.init_from", texts("lora", "init_from")),
    ])
}

impl Named {
    /// Opens it for reading. What it is is looked at first: opening a pipe would wait for its other end.
    fn open(&self) -> Result<OwnedFd, Failure> {
        let what = |problem: String| Failure::new(Exit::Usage, format!("{}: {problem}", self.key));
        let shown = self.path.display();
        let cannot = |error: std::io::Error| {
            let failure = what(format!("cannot open {shown}")).because(&error);
            match error.kind() {
                std::io::ErrorKind::PermissionDenied => {
                    failure.help("it is opened with your rights, not the daemon's")
                }
                _ if self.key == "model.base" => failure.help(
                    "a directory with a model, or the name of a registered one: `finetunectl model list`",
                ),
                _ => failure,
            }
        };
        let metadata = std::fs::metadata(&self.path).map_err(cannot)?;
        if self.directory && !metadata.is_dir() {
            return Err(what(format!("{shown} is no directory")));
        }
        if !self.directory && !metadata.is_file() {
            return Err(what(format!("{shown} is no regular file")));
        }
        let file = File::open(&self.path).map_err(cannot)?;
        Ok(OwnedFd::from(std::os::fd::OwnedFd::from(file)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const SPEC: &str =
        "[model]\nbase = './base'\n[data]\ntrain = ['a.jsonl', \"../x/b.jsonl\"]\neval = 'e.jsonl'\n";

    fn directory() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let x = directory.path().join("x");
        fs::create_dir_all(x.join("base")).unwrap();
        for file in ["a.jsonl", "b.jsonl", "e.jsonl"] {
            fs::write(x.join(file), file).unwrap();
        }
        fs::write(x.join("night.toml"), SPEC).unwrap();
        directory
    }

    fn keys(parcel: &Parcel) -> Vec<&str> {
        let mut keys: Vec<&str> = parcel.files.keys().map(String::as_str).collect();
        keys.sort_unstable();
        keys
    }

    #[test]
    fn paths_are_keyed_as_the_text_writes_them() {
        let directory = directory();
        let spec = directory.path().join("x/night.toml");
        let parcel = Parcel::pack(&spec, &[]).unwrap();
        assert_eq!((parcel.name.as_str(), parcel.text.as_str()), ("night.toml", SPEC));
        assert_eq!(keys(&parcel), ["../x/b.jsonl", "./base", "a.jsonl", "e.jsonl"]);
    }

    #[test]
    fn overrides_are_in_the_text_that_is_sent() {
        let directory = directory();
        let spec = directory.path().join("x/night.toml");
        let set =
            ["train.max_steps=7".to_string(), "data.train=e.jsonl".into(), "data.eval_fraction=0.1".into()];
        // The file has data.eval, which excludes eval_fraction.
        let parcel = Parcel::pack(&spec, &set[..2]).unwrap();
        let absolute = |name: &str| spec.with_file_name(name).to_str().unwrap().to_string();
        assert_eq!(keys(&parcel), [absolute("base"), absolute("e.jsonl")]);
        let again = Spec::parse(&parcel.text, "night.toml", Path::new("/elsewhere"), &[]).unwrap();
        assert_eq!(again.train.max_steps, Some(7));
        assert_eq!(again.data.train, [PathBuf::from(absolute("e.jsonl"))]);
    }

    #[test]
    fn a_plain_name_that_is_not_here_is_a_registered_model() {
        let directory = directory();
        let spec = directory.path().join("x/night.toml");
        fs::write(&spec, "[model]\nbase = 'qwen3'\n[data]\ntrain = 'a.jsonl'\n").unwrap();
        assert_eq!(keys(&Parcel::pack(&spec, &[]).unwrap()), ["a.jsonl"]);
        let parcel = Parcel::pack(&spec, &["lora.r=4".into()]).unwrap();
        assert!(parcel.text.contains("base = \"qwen3\""), "{}", parcel.text);
        for path in ["models/qwen3", "/models/qwen3", "../qwen3"] {
            fs::write(&spec, format!("[model]\nbase = '{path}'\n[data]\ntrain = 'a.jsonl'\n")).unwrap();
            let failure = Parcel::pack(&spec, &[]).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(
                failure.lines()[0].starts_with("error: model.base: cannot open"),
                "{:?}",
                failure.lines()
            );
        }
    }

    #[test]
    fn what_cannot_be_sent_is_refused_here() {
        let directory = directory();
        let spec = directory.path().join("x/night.toml");
        let refused = |text: &str| {
            fs::write(&spec, text).unwrap();
            let failure = Parcel::pack(&spec, &[]).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            failure.lines().join("\n")
        };
        let mistake = refused("[model]\nbsae = 'x'\n[data]\ntrain = 'a.jsonl'\n");
        assert!(mistake.contains("night.toml:2:1: model.bsae: unknown key"), "{mistake}");
        let file = refused("[model]\nbase = 'a.jsonl'\n[data]\ntrain = 'a.jsonl'\n");
        assert!(file.contains("a.jsonl is no directory"), "{file}");
        let directory = refused("[model]\nbase = 'base'\n[data]\ntrain = 'base'\n");
        assert!(directory.contains("base is no regular file"), "{directory}");
        let names: Vec<String> = (0..16).map(|i| format!("{i}.jsonl")).collect();
        names.iter().for_each(|name| fs::write(spec.with_file_name(name), "").unwrap());
        let many = refused(&format!("[model]\nbase = 'base'\n[data]\ntrain = {names:?}\n"));
        assert!(
            many.contains("names 17 files and directories; a message to the daemon carries 16"),
            "{many}"
        );
    }
}
