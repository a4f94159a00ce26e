//! The life of the process that owns the weights.

use crate::memory::process_start;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Which file a manifest is: another one under its path has another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestId {
    device: u64,
    inode: u64,
    /// Seconds and nanoseconds: a number of a file that is gone is given again.
    changed: (i64, i64),
}

impl ManifestId {
    /// `None` when there is no file of that name.
    pub fn of_path(path: &Path) -> Option<ManifestId> {
        std::fs::metadata(path).ok().map(|m| ManifestId::of(&m))
    }

    pub(super) fn of(metadata: &Metadata) -> ManifestId {
        let changed = (metadata.mtime(), metadata.mtime_nsec());
        ManifestId { device: metadata.dev(), inode: metadata.ino(), changed }
    }
}

/// One engine process, as its manifest names it.
#[derive(Debug)]
pub struct Engine {
    pub name: String,
    pub manifest: PathBuf,
    pub rank: u32,
    pub pid: Option<u32>,
    /// When it started, in ticks since the machine did.
    started: Option<u64>,
    /// Readable once the process has ended; stays with that process when its pid is given to another.
    process: Option<OwnedFd>,
}

impl Engine {
    /// Finds process `pid`, which must have started at `start_time` if that is known. An engine without a pid is not watched.
    pub fn find(
        name: String,
        manifest: &Path,
        rank: u32,
        pid: Option<u32>,
        start_time: Option<u64>,
    ) -> Result<Engine, String> {
        let mut engine = Engine { name, manifest: manifest.to_path_buf(), rank, pid, started: None, process: None };
        if let Some(number) = pid {
            let ended = || format!("process {number} has ended");
            let target = i32::try_from(number).ok().and_then(Pid::from_raw).ok_or_else(ended)?;
            engine.process = match pidfd_open(target, PidfdFlags::empty()) {
                Ok(fd) => Some(fd),
                Err(rustix::io::Errno::SRCH) => return Err(ended()),
                Err(e) => return Err(format!("process {number} cannot be watched ({e})")),
            };
            // Asked after the descriptor was opened: if the start fits now, the descriptor is that process's.
            match process_start(number) {
                None => return Err(ended()),
                Some(start) if start_time.is_some_and(|s| s != start) => {
                    return Err(format!("process {number} is another one now (it started at tick {start})"));
                }
                Some(start) => engine.started = Some(start),
            }
        }
        Ok(engine)
    }

    /// The process; for one that is not known, its manifest.
    pub fn identity(&self) -> String {
        match (self.pid, self.started) {
            (Some(pid), Some(start)) => format!("process {pid} that started at {start}"),
            _ => format!("{} {:?}", self.manifest.display(), ManifestId::of_path(&self.manifest)),
        }
    }

    /// Is the process alive?
    pub fn check(&self) -> Result<(), String> {
        let (Some(process), Some(pid)) = (&self.process, self.pid) else { return Ok(()) };
        let mut polled = [PollFd::new(process, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut polled, Some(&now)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => Ok(()),
            _ => Err(format!("process {pid} has ended")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(pid: u32, start_time: Option<u64>) -> Result<Engine, String> {
        Engine::find("test".into(), Path::new("m"), 0, Some(pid), start_time)
    }

    #[test]
    fn a_process_is_told_from_one_that_took_its_pid() {
        let start = process_start(std::process::id()).unwrap();
        engine(std::process::id(), Some(start)).unwrap().check().unwrap();
        assert!(engine(std::process::id(), Some(start + 1)).unwrap_err().contains("another"));
        assert!(engine(u32::MAX, None).unwrap_err().contains("ended"));
    }

    #[test]
    fn a_process_that_ended_is_gone_even_before_it_is_reaped() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let watched = engine(child.id(), None).unwrap();
        watched.check().unwrap();
        child.kill().unwrap();
        while watched.check().is_ok() {
            std::thread::yield_now();
        }
        assert!(engine(child.id(), None).unwrap_err().contains("ended"));
        child.wait().unwrap();
    }
}
