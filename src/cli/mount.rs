//! `weightfs mount`: from arguments to a served tree, and its end.

use super::background;
use super::engine::EngineArguments;
use super::log_file::open_log;
use super::policy::PolicyArguments;
use super::weights::WeightsArguments;
use crate::commit::{CommitError, Committer, Options as CommitOptions, history_readonly};
use crate::fs::{Mounted, Tree, ViewMode, ViewOptions, fuse, mounts};
use crate::model::ModelDirectory;
use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use log::LevelFilter;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// How often engine and memories are looked at: readers are promised ESTALE within a second.
const WATCH: Duration = Duration::from_millis(250);
/// How long a signal waits for readers to close their files before the daemon ends under them.
const GRACE: Duration = Duration::from_secs(5);

#[derive(Args)]
pub struct MountArguments {
    /// The checkpoint: config.json, tokenizer, *.safetensors
    model_dir: PathBuf,
    /// An empty directory
    mount_point: PathBuf,
    /// Stay in the foreground (systemd, containers)
    #[arg(short, long)]
    foreground: bool,
    #[command(flatten)]
    weights: WeightsArguments,
    #[command(flatten)]
    engine: EngineArguments,
    #[command(flatten)]
    policy: PolicyArguments,
    /// Let other users read what file modes allow
    #[arg(long)]
    allow_other: bool,
    /// Show weights, but no ctl: nothing can be trained or committed, and other mounts may
    #[arg(long)]
    read_only: bool,
    /// held: readers see one step from first open to last close, from a copy in memory; live: each read is of the step it
    /// finds; auto: held if there is memory for it
    #[arg(long, value_enum, default_value = "auto")]
    view: View,
    /// Seconds after the newest open for which readers hold the view still
    #[arg(long, value_name = "SECONDS", default_value = "600")]
    view_hold: u64,
    /// Serve copies through FUSE even where the kernel could read them without us
    #[arg(long)]
    no_passthrough: bool,
    /// Threads that train; 0 for one a core
    #[arg(long, value_name = "N", default_value = "0")]
    train_threads: usize,
    /// Host memory that a step on a GPU may keep activations in; 0 for none [default: a quarter of what is available, 8 GiB at
    /// most]
    #[arg(long, value_name = "BYTES", value_parser = super::policy::bytes)]
    offload_memory: Option<u64>,
    #[arg(long, default_value = "info")]
    log_level: LevelFilter,
    /// Default: stderr in the foreground, MODEL_DIR/.weightfs/mount.log in the background
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum View {
    Auto,
    Held,
    Live,
}

enum End {
    Signal(i32),
    Unmounted,
}

pub fn run(a: MountArguments, arguments: &[OsString]) -> anyhow::Result<ExitCode> {
    if !a.foreground && !background::is_background() {
        return background::start(arguments);
    }
    if background::is_background() {
        background::leave_terminal();
    }
    let directory = Arc::new(ModelDirectory::open(&a.model_dir)?);
    let (point, turn) = free_mount_point(&a.mount_point, &directory.path)?;
    let log = open_log(a.log_file.as_deref(), &directory, a.read_only)?;
    // Without a log, what is not trouble is nobody's to read: the command that waits for us is about to end.
    let level =
        if log.is_none() && background::is_background() { a.log_level.min(LevelFilter::Warn) } else { a.log_level };
    super::log_to(
        level,
        match &log {
            Some(file) => env_logger::Target::Pipe(Box::new(file.try_clone()?)),
            None => env_logger::Target::Stderr,
        },
    );
    serve(&a, directory, (point, turn), log)?;
    Ok(ExitCode::SUCCESS)
}

fn serve(
    a: &MountArguments,
    directory: Arc<ModelDirectory>,
    (point, turn): (PathBuf, File),
    log: Option<File>,
) -> anyhow::Result<()> {
    // Signals are ours from here on: one that comes while we load ends us before anything is mounted.
    let (end, ends) = channel();
    forward_signals(end.clone())?;
    let committer = match a.read_only {
        true => {
            if let Some(behind) = history_readonly(&directory.path)?.iter().find(|commit| !commit.folded) {
                eprintln!(
                    "weightfs: the weights files do not hold commit {} yet (`weightfs fold` brings them there): they are shown as they are",
                    behind.id
                );
            }
            None
        }
        false => {
            let options = CommitOptions { mount_point: Some(point.clone()), ..a.policy.options() };
            let (committer, recovery) = Committer::open(directory.clone(), options).map_err(hint)?;
            super::say(&recovery);
            super::bring_up_to_date(&committer)?;
            Some(Arc::new(committer))
        }
    };
    // Its files once more: a fold puts private copies in the place of those that others share.
    directory.reopen()?;
    let opened = a.weights.open(&directory, !a.read_only)?;
    if let (Some(committer), Some(hashes)) = (&committer, opened.hashes) {
        committer.set_baseline(hashes)?;
    }
    if let Ok(End::Signal(signal)) = ends.try_recv() {
        bail!("stopped by signal {signal} before the mount was ready");
    }
    let mode = match a.view {
        View::Auto => ViewMode::Auto,
        View::Held => ViewMode::Held,
        View::Live => ViewMode::Live,
    };
    let options = ViewOptions { mode, hold: Duration::from_secs(a.view_hold), ..ViewOptions::default() };
    let mounted = Mounted::new(opened.image, committer, point.clone(), &options)?;
    mounted.set_train_threads(a.train_threads);
    mounted.set_offload_memory(a.offload_memory);
    if let Some(options) = a.engine.options() {
        mounted.tell_engine(options)?;
    }
    for cut in mounted.cut_jobs() {
        log::warn!("{cut}");
        // The log says it to who looks there; the user who mounts sees it here.
        if log.is_some() {
            eprintln!("weightfs: {cut}");
        }
    }
    let tree = Arc::new(Tree::new(mounted.clone()).shared(a.allow_other));
    let (gone, is_gone) = channel();
    let _serving =
        fuse::serve(tree, &point, fuse::Options { allow_other: a.allow_other, passthrough: !a.no_passthrough }, gone)
            .map_err(mount_failed)?;
    drop(turn);
    std::thread::spawn(move || {
        let _ = is_gone.recv();
        let _ = end.send(End::Unmounted);
    });
    log::info!("{} is mounted at {}", directory.path.display(), point.display());
    if background::is_background()
        && let Err(e) = background::ready(log)
    {
        mounts::detach(&point)?;
        return Err(e);
    }
    let device = mounts::find(&point).map(|mount| mount.device);
    let preparing = mounted.clone();
    std::thread::Builder::new().name("prepare".into()).spawn(move || preparing.prepare())?;
    until_the_end(&mounted, &ends, &point, device)
}

fn until_the_end(
    mounted: &Mounted,
    ends: &Receiver<End>,
    point: &Path,
    mut device: Option<String>,
) -> anyhow::Result<()> {
    loop {
        match ends.recv_timeout(WATCH) {
            Err(RecvTimeoutError::Timeout) => {
                mounted.watch();
                // Files that are open keep us; jobs that nobody can follow or commit do not go on.
                if device.as_ref().is_some_and(|device| !mounts::is_mounted(device)) {
                    device = None;
                    log::info!("the mount is gone; files on it are still open");
                    mounted.stop_jobs();
                }
            }
            Err(RecvTimeoutError::Disconnected) | Ok(End::Unmounted) => {
                mounted.finish_command();
                mounted.finish_steps();
                log::info!("unmounted");
                return Ok(());
            }
            Ok(End::Signal(signal)) => {
                log::info!("signal {signal}: unmounting");
                // Gone at once, whatever runs: a command that runs is still answered, as its writer has `ctl` open. While
                // files of ours are open we outlive our mount, and its place may be another's by now.
                let there = mounts::find(point).filter(|mount| device.as_ref() == Some(&mount.device));
                let detached = there.map_or(Ok(()), |_| mounts::detach(point));
                mounted.finish_command();
                // Readers have a moment to close what they have open; passthrough and mappings survive us anyway.
                while !matches!(ends.recv_timeout(GRACE), Ok(End::Unmounted) | Err(_)) {}
                // Whatever failed before: no update is cut.
                mounted.finish_steps();
                return detached.with_context(|| format!("unmounting {}", point.display()));
            }
        }
    }
}

fn forward_signals(end: std::sync::mpsc::Sender<End>) -> anyhow::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            // A terminal that closes is no reason for a background mount to end.
            if !(signal == SIGHUP && background::is_background()) {
                let _ = end.send(End::Signal(signal));
            }
        }
    })?;
    Ok(())
}

/// Checks the mount point, and clears away what a killed daemon left there. The file holds the place until it is closed.
fn free_mount_point(given: &Path, model: &Path) -> anyhow::Result<(PathBuf, File)> {
    let taken =
        || anyhow::anyhow!("{} is mounted already: `weightfs umount {}` first", given.display(), given.display());
    let mut point = absolute(given)?;
    if let Some(mount) = mounts::find(&point)
        && mount.is_ours()
    {
        let there = point.clone();
        match mounts::ask(|| std::fs::metadata(there)) {
            Some(Err(e)) if e.raw_os_error() == Some(Errno::NOTCONN.raw_os_error()) => {
                mounts::detach(&point).with_context(|| format!("clearing the dead mount at {}", point.display()))?;
                eprintln!("weightfs: cleared the mount that a killed daemon left at {}", point.display());
            }
            _ => return Err(taken()),
        }
    }
    let metadata = match std::fs::metadata(&point) {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            bail!("the mount point {} does not exist: make it with mkdir", given.display())
        }
        other => other.with_context(|| format!("the mount point {}", given.display()))?,
    };
    if !metadata.is_dir() {
        bail!("the mount point {} is not a directory", given.display());
    }
    point = point.canonicalize()?;
    // Either way round, reading one would read the other for ever.
    if point.starts_with(model) || model.starts_with(&point) {
        bail!(
            "the mount point {} and the model directory {} must not lie in each other",
            given.display(),
            model.display()
        );
    }
    if std::fs::read_dir(&point)?.next().is_some() {
        bail!(
            "the mount point {} is not empty: use an empty directory, so that nothing is hidden by the mount",
            given.display()
        );
    }
    // Of several mounts that begin at once one has the directory for itself until it is mounted: none covers another.
    let turn = File::open(&point).with_context(|| format!("the mount point {}", given.display()))?;
    if flock(&turn, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK) {
        bail!("another mount is being made at {}: use another directory", given.display());
    }
    if mounts::find(&point).is_some_and(|m| m.is_ours()) {
        return Err(taken());
    }
    Ok((point, turn))
}

/// An absolute path without links, also where its last part is a dead mount, which cannot be looked at.
pub fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    if let Ok(real) = path.canonicalize() {
        return Ok(real);
    }
    let path = std::path::absolute(path)?;
    match (path.parent().and_then(|p| p.canonicalize().ok()), path.file_name()) {
        (Some(parent), Some(name)) => Ok(parent.join(name)),
        _ => Ok(path),
    }
}

/// What else can be done when the directory cannot be had for writing.
fn hint(e: CommitError) -> anyhow::Error {
    match e {
        CommitError::Busy { .. } | CommitError::ReadOnly { .. } => anyhow::anyhow!("{e}; or mount with --read-only"),
        other => other.into(),
    }
}

fn mount_failed(e: std::io::Error) -> anyhow::Error {
    let why = match e.kind() {
        ErrorKind::NotFound => "there is no /dev/fuse or no fusermount3: load the fuse module, install fuse3",
        ErrorKind::PermissionDenied => {
            "not permitted: run as root or install fuse3 (in a container: --device /dev/fuse --cap-add SYS_ADMIN)"
        }
        _ => "see the kernel's log",
    };
    anyhow::Error::from(e).context(format!("FUSE could not be mounted; {why}"))
}
