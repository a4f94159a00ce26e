//! Why a commit, or anything else done to `.weightfs/`, did not happen. Every message is one sentence: what failed, why,
//! and what to do.

use crate::image::ImageError;
use crate::memory::MemoryError;
use std::io;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Another process holds the writer's lock of this model directory.
    #[error("{path} is being written by {}: stop it, or send the command to its mount", writer(.pid, .mount_point))]
    Busy { path: PathBuf, pid: Option<u32>, mount_point: Option<PathBuf> },
    #[error("there is no space left to {doing} {path}: free some and try again; the commit before stands")]
    NoSpace { doing: &'static str, path: PathBuf },
    #[error("could not {doing} {path}, which may not be written ({source}): check its permissions and its mount")]
    ReadOnly {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("could not {doing} {path} ({source}): check the disk and try again; the commit before stands")]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The live weights could not be read or written.
    #[error("the live weights could not be reached: {0}")]
    Image(#[from] ImageError),
    #[error("the optimizer's state could not be reached: {0}")]
    Optimizer(String),
    /// Somebody else wrote the weights files since the newest commit.
    #[error(
        "{path} was changed by another program since commit {commit} ({why}), so nothing was written: put the committed file back, or remove .weightfs beside it to begin a new history from the files as they are"
    )]
    Foreign { path: PathBuf, commit: u64, why: String },
    #[error("there is no commit {id}: the newest is {newest}")]
    NoSuchCommit { id: u64, newest: u64 },
    #[error("commit {id} was pruned: the oldest that is kept is {oldest}")]
    Pruned { id: u64, oldest: u64 },
    #[error("{path} is damaged ({why}): restore it from a backup, or remove .weightfs to give up the history")]
    Corrupt { path: PathBuf, why: String },
    #[error("the weights files cannot be brought up to the newest commit now ({why}): try again when that is over")]
    NotFolded { why: String },
    #[error("{path} holds no commits: commit once to begin a history")]
    NoHistory { path: PathBuf },
}

fn writer(pid: &Option<u32>, mount_point: &Option<PathBuf>) -> String {
    match (pid, mount_point) {
        (Some(pid), Some(mount)) => format!("process {pid}, which has it mounted at {}", mount.display()),
        (Some(pid), None) => format!("process {pid}"),
        (None, _) => "another process".to_string(),
    }
}

impl CommitError {
    /// Sorts an I/O error into the kind that a user can act on.
    pub fn io(doing: &'static str, path: impl Into<PathBuf>, source: io::Error) -> CommitError {
        let path = path.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => CommitError::NoSpace { doing, path },
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
                CommitError::ReadOnly { doing, path, source }
            }
            _ => CommitError::Io { doing, path, source },
        }
    }

    pub fn corrupt(path: impl Into<PathBuf>, why: impl Into<String>) -> CommitError {
        CommitError::Corrupt { path: path.into(), why: why.into() }
    }

    /// The errno for a command that fails so.
    pub fn errno(&self) -> i32 {
        match self {
            CommitError::Busy { .. } => libc::EBUSY,
            CommitError::NoSpace { .. } => libc::ENOSPC,
            CommitError::ReadOnly { .. } => libc::EROFS,
            CommitError::Image(ImageError::EngineGone(_) | ImageError::Memory(MemoryError::Gone { .. })) => {
                libc::ESTALE
            }
            // The engine is there, but in the middle of something.
            CommitError::Image(ImageError::NoBoundary(_)) | CommitError::NotFolded { .. } => libc::EBUSY,
            CommitError::NoSuchCommit { .. } | CommitError::Pruned { .. } | CommitError::NoHistory { .. } => {
                libc::ENOENT
            }
            CommitError::Io { .. }
            | CommitError::Image(_)
            | CommitError::Optimizer(_)
            | CommitError::Foreign { .. }
            | CommitError::Corrupt { .. } => libc::EIO,
        }
    }
}
