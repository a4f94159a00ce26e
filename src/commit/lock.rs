//! The two locks in `.weightfs/`: `writer`, held for life by the one process that commits, which says in it who it is;
//! and `lock`, which readers of the directory share to keep a fold away while they read.

use super::error::CommitError;
use super::layout::Layout;
use super::storage::{Access, Lock, Storage, read_small};
use crate::memory::process_start;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

pub const WRITER: &str = ".weightfs/writer";
pub const READERS: &str = ".weightfs/lock";
/// A fold waits so long for readers before it is put off: `ls` and `cp` of a small file pass, rsync of a model does not.
const PATIENCE: Duration = Duration::from_millis(500);

#[derive(Debug, Serialize, Deserialize)]
struct Writer {
    pid: u32,
    /// Clock ticks since boot, as in /proc/PID/stat: tells a reused pid.
    start_time: Option<u64>,
    mount_point: Option<PathBuf>,
}

pub fn lock_writer(storage: &dyn Storage, layout: &Layout, mount_point: Option<PathBuf>) -> Result<Lock, CommitError> {
    let lock = storage.try_lock(WRITER, true).map_err(|e| layout.io("lock", WRITER, e))?;
    let Some(lock) = lock else {
        // Half written when the other has only just begun: then it stays unnamed.
        let other: Option<Writer> =
            read_small(storage, WRITER, 1 << 20).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        return Err(CommitError::Busy {
            path: layout.root.clone(),
            pid: other.as_ref().map(|w| w.pid),
            mount_point: other.and_then(|w| w.mount_point),
        });
    };
    let writer = Writer { pid: std::process::id(), start_time: process_start(std::process::id()), mount_point };
    // Cannot fail: numbers, and a path that was given as text.
    let mut bytes = serde_json::to_vec(&writer).unwrap_or_default();
    bytes.push(b'\n');
    let written = storage.open(WRITER, Access::Create).and_then(|file| file.write_all_at(&bytes, 0));
    written.map_err(|e| layout.io("write", WRITER, e))?;
    Ok(lock)
}

/// `None` while somebody reads the directory under the shared lock.
pub fn lock_out_readers(storage: &dyn Storage, layout: &Layout) -> Result<Option<Lock>, CommitError> {
    let mut waited = Duration::ZERO;
    loop {
        let lock = storage.try_lock(READERS, true).map_err(|e| layout.io("lock", READERS, e))?;
        if lock.is_some() || waited >= PATIENCE {
            return Ok(lock);
        }
        let pause = Duration::from_millis(25);
        std::thread::sleep(pause);
        waited += pause;
    }
}
