//! `finetunectl model`: the models that the daemon has.

use super::context::Context;
use super::exit::{Code, Exit, Failure};
use super::figures::{number_of, text_of};
use super::text;
use crate::bus::Dictionary;
use crate::units::Bytes;
use clap::Subcommand;
use serde_json::{Value, json};
use std::fs::File;
use std::path::PathBuf;
use zbus::OwnedFd;

/// Commands about models.
#[derive(Subcommand, Debug)]
pub enum ModelCommand {
    /// List the registered models
    List,
    /// Copy a Hugging Face model directory to the registered models
    Add {
        /// What specs will call it
        name: String,
        /// The directory
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Remove a model that was added and that no unfinished run uses
    Remove {
        /// Its name
        name: String,
    },
}

/// Runs the command.
pub async fn command(command: &ModelCommand, context: &Context) -> Result<Code, Failure> {
    let name = match command {
        ModelCommand::List => return list(context).await,
        ModelCommand::Add { name, directory } => {
            let opened = open(directory)?;
            let client = context.client().await?;
            let body = (name.as_str(), opened, Dictionary::new());
            let patience = Some(context.patience());
            client.call::<()>(client.manager.inner(), "AddModel", &body, patience).await?;
            name
        }
        ModelCommand::Remove { name } => {
            let client = context.client().await?;
            client.call::<()>(client.manager.inner(), "RemoveModel", &(name.as_str()), None).await?;
            name
        }
    };
    let done = if matches!(command, ModelCommand::Add { .. }) { "added" } else { "removed" };
    if context.json {
        context.console.json(json!({ "name": name, done: true }))?;
    } else {
        context.console.line(&format!("{}: {done}", text::printable(name)))?;
    }
    Ok(Exit::Done.into())
}

fn open(directory: &PathBuf) -> Result<OwnedFd, Failure> {
    let shown = directory.display();
    let cannot =
        |error: std::io::Error| Failure::new(Exit::Usage, format!("cannot open {shown}")).because(error);
    if !std::fs::metadata(directory).map_err(cannot)?.is_dir() {
        return Err(Failure::new(Exit::Usage, format!("{shown} is no directory"))
            .help("a model is a directory with config.json, tokenizer.json and *.safetensors"));
    }
    Ok(OwnedFd::from(std::os::fd::OwnedFd::from(File::open(directory).map_err(cannot)?)))
}

async fn list(context: &Context) -> Result<Code, Failure> {
    let client = context.client().await?;
    let models = client.answer(client.manager.list_models()).await?;
    if context.json {
        let models: Vec<Value> = models
            .iter()
            .map(|model| {
                json!({
                    "name": text_of(model, "Name"),
                    "directory": text_of(model, "Directory"),
                    "bytes": number_of(model, "Bytes"),
                    "architecture": text_of(model, "Architecture"),
                })
            })
            .collect();
        context.console.json(json!({ "models": models }))?;
        return Ok(Exit::Done.into());
    }
    if models.is_empty() {
        context.console.message("no models; register one with: finetunectl model add NAME DIR");
        return Ok(Exit::Done.into());
    }
    let rows: Vec<[String; 4]> = models
        .iter()
        .map(|model| {
            let size = Bytes(number_of(model, "Bytes")).to_string();
            [text_of(model, "Name"), text_of(model, "Architecture"), size, text_of(model, "Directory")]
        })
        .collect();
    context.console.result(&text::table(["NAME", "ARCHITECTURE", "SIZE", "DIRECTORY"], &rows))?;
    Ok(Exit::Done.into())
}
