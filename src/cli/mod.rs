//! The command line: nothing else parses arguments or prints.

mod background;
mod commit;
mod device;
mod diagnose;
mod engine;
mod history;
mod log_file;
mod mount;
mod policy;
mod train;
mod umount;
mod weights;

use crate::commit::{CommitError, Committer, Recovery};
use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "weightfs", version, about, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Mount the live weights of MODEL_DIR at MOUNT_POINT
    Mount(mount::MountArguments),
    /// Unmount; files that are open stay usable until they are closed
    Umount(umount::UmountArguments),
    /// Train the model mounted at MOUNT_POINT on a job
    Train(train::TrainArguments),
    /// Commit the live weights to MODEL_DIR without a mount (from cron)
    Commit(commit::CommitArguments),
    /// Say which tensors of MODEL_DIR the engine's manifests cover
    Diagnose(diagnose::DiagnoseArguments),
    /// List the commits of MODEL_DIR
    Log(history::LogArguments),
    /// Check MODEL_DIR against its newest commit, or one commit against its checksums
    Verify(history::VerifyArguments),
    /// Make MODEL_DIR what it was at an earlier commit (for live weights: `echo 'rollback ID' > MOUNT_POINT/ctl`)
    Rollback(history::RollbackArguments),
    /// Finish what a crash left unfinished; every other command does so by itself
    Recover(history::DirectoryArguments),
    /// Bring the weights files up to the newest commit
    Fold(history::DirectoryArguments),
}

/// Runs the command in `arguments` (the first is the program's name). Every failure is one line on stderr.
pub fn run(arguments: Vec<OsString>) -> ExitCode {
    let parsed = match Arguments::try_parse_from(&arguments) {
        Ok(parsed) => parsed,
        // Asking for help or the version is success, and a page of text.
        Err(e) if !e.use_stderr() || e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { 2 } else { 0 });
        }
        Err(e) => {
            eprintln!("weightfs: {}", usage(&e.to_string()));
            return ExitCode::from(2);
        }
    };
    let result = match parsed.command {
        Command::Mount(a) => mount::run(a, &arguments),
        Command::Umount(a) => umount::run(a),
        Command::Train(a) => train::run(a),
        Command::Commit(a) => commit::run(a),
        Command::Diagnose(a) => diagnose::run(a),
        Command::Log(a) => history::log(a),
        Command::Verify(a) => history::verify(a),
        Command::Rollback(a) => history::rollback(a),
        Command::Recover(a) => history::recover(a),
        Command::Fold(a) => history::fold(a),
    };
    match result {
        Ok(code) => code,
        Err(e) => {
            eprintln!("weightfs: {}", sentence(&e));
            ExitCode::FAILURE
        }
    }
}

/// What clap says is wrong, on one line.
fn usage(text: &str) -> String {
    let wrong = text.split("\n\nUsage:").next().and_then(|t| t.split("\n\nFor more").next()).unwrap_or(text);
    let words: Vec<&str> = wrong.strip_prefix("error: ").unwrap_or(wrong).split_whitespace().collect();
    format!("{} (--help lists what there is)", words.join(" "))
}

/// An error and its causes on one line. Some errors have their cause in their own words: it is not said twice.
fn sentence(e: &anyhow::Error) -> String {
    let mut text = e.to_string();
    for cause in e.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text.replace(['\n', '\r'], " ")
}

/// Says in a line what recovery did, if it did anything.
fn say(recovery: &Recovery) {
    let said = recovery.to_string();
    if !said.is_empty() {
        eprintln!("weightfs: {said}");
    }
}

/// Folds what a policy left in the log, and says so: what comes next reads the weights files.
fn bring_up_to_date(committer: &Committer) -> Result<(), CommitError> {
    match committer.bring_up_to_date()? {
        0 => {}
        bytes => eprintln!(
            "weightfs: the weights files were brought up to the newest commit, to be read as that ({bytes} bytes written)"
        ),
    }
    Ok(())
}

/// Logs go to stderr unless a command says otherwise; `RUST_LOG` wins over `level`.
fn log_to(level: log::LevelFilter, target: env_logger::Target) {
    let environment = env_logger::Env::default().default_filter_or(level.as_str());
    // Initialising twice (several commands in one process) keeps the first.
    let _ = env_logger::Builder::from_env(environment).target(target).try_init();
}
