//! `log`, `verify`, `rollback`, `recover`, `fold`: commands on the commits of a directory that is not mounted (`log` and
//! `verify` also of one that is).

use super::say;
use crate::commit::{CommitInfo, Committer, FoldOutcome, Options, history_readonly, verify_readonly};
use crate::model::ModelDirectory;
use clap::Args;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

#[derive(Args)]
pub struct DirectoryArguments {
    model_dir: PathBuf,
}

#[derive(Args)]
pub struct LogArguments {
    model_dir: PathBuf,
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub struct VerifyArguments {
    model_dir: PathBuf,
    /// A commit to check against its own checksums; default: the directory against its newest commit
    #[arg(value_name = "ID")]
    id: Option<u64>,
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub struct RollbackArguments {
    model_dir: PathBuf,
    id: u64,
}

/// The writer of a directory, recovered.
fn writer(model_dir: &Path) -> anyhow::Result<Committer> {
    super::log_to(log::LevelFilter::Warn, env_logger::Target::Stderr);
    let directory = Arc::new(ModelDirectory::open(model_dir)?);
    let (committer, recovery) = Committer::open(directory, Options::default())?;
    say(&recovery);
    Ok(committer)
}

pub fn log(a: LogArguments) -> anyhow::Result<ExitCode> {
    let history = history_readonly(&a.model_dir)?;
    if a.json {
        println!("{}", serde_json::to_string_pretty(&history)?);
        return Ok(ExitCode::SUCCESS);
    }
    if history.is_empty() {
        println!("no commits yet");
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{:>6} {:<20} {:>8} {:>12} {:>10} {:>14}  message",
        "id", "time", "step", "elements", "blocks", "bytes logged"
    );
    for c in history.iter().rev() {
        let CommitInfo { id, step, changed_elements, changed_blocks, logged_bytes, .. } = c;
        let unfolded = if c.folded { "" } else { " (not in the weights files yet)" };
        println!(
            "{id:>6} {:<20} {step:>8} {changed_elements:>12} {changed_blocks:>10} {logged_bytes:>14}  {}{unfolded}",
            c.time_text(),
            on_one_line(&c.message)
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Messages are anybody's: none ends its line or tells the terminal what to do.
fn on_one_line(message: &str) -> String {
    let shown = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    message.chars().map(shown).collect()
}

/// Success only if all of it fits.
pub fn verify(a: VerifyArguments) -> anyhow::Result<ExitCode> {
    let report = verify_readonly(&a.model_dir, a.id)?;
    if a.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        report.wrong.iter().for_each(|w| println!("{w}"));
        println!("{} blocks and {} tensors compared, {} wrong", report.blocks, report.tensors, report.wrong.len());
    }
    Ok(if report.wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

pub fn rollback(a: RollbackArguments) -> anyhow::Result<ExitCode> {
    let report = writer(&a.model_dir)?.rollback(a.id, None)?;
    println!("back at commit {}: {}", a.id, report.commit);
    Ok(ExitCode::SUCCESS)
}

pub fn recover(a: DirectoryArguments) -> anyhow::Result<ExitCode> {
    let committer = writer(&a.model_dir)?;
    match committer.newest() {
        Some(newest) => println!("commit {} stands", newest.id),
        None => println!("there are no commits"),
    }
    Ok(ExitCode::SUCCESS)
}

pub fn fold(a: DirectoryArguments) -> anyhow::Result<ExitCode> {
    match writer(&a.model_dir)?.fold()? {
        FoldOutcome::Deferred { why } => anyhow::bail!("the weights files could not be brought up to date: {why}"),
        FoldOutcome::Folded { bytes, .. } => {
            println!("the weights files hold the newest commit ({bytes} bytes written)")
        }
        FoldOutcome::ByPolicy => println!("the weights files hold the newest commit"),
    }
    Ok(ExitCode::SUCCESS)
}
