//! `weightfs commit`: one commit of an engine's weights without a mount.

use super::policy::PolicyArguments;
use super::say;
use super::weights::WeightsArguments;
use crate::commit::{CommitRequest, Committer};
use crate::model::ModelDirectory;
use clap::Args;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

#[derive(Args)]
pub struct CommitArguments {
    model_dir: PathBuf,
    #[command(flatten)]
    weights: WeightsArguments,
    #[command(flatten)]
    policy: PolicyArguments,
    /// Kept in the history
    #[arg(short, long)]
    message: Option<String>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(a: CommitArguments) -> anyhow::Result<ExitCode> {
    super::log_to(log::LevelFilter::Warn, env_logger::Target::Stderr);
    let directory = Arc::new(ModelDirectory::open(&a.model_dir)?);
    a.weights.need_manifests(&directory)?;
    let (committer, recovery) = Committer::open(directory.clone(), a.policy.options())?;
    say(&recovery);
    super::bring_up_to_date(&committer)?;
    // Its files once more: a fold puts private copies in the place of those that others share.
    directory.reopen()?;
    let opened = a.weights.open(&directory, false)?;
    let step = committer.step() + 1;
    let report =
        committer.commit(&*opened.image, &CommitRequest::new(a.message.as_deref().unwrap_or_default(), step))?;
    match a.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => println!("{report}"),
    }
    Ok(ExitCode::SUCCESS)
}
