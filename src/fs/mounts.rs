//! The kernel's table of mounts, and taking ours out of it.

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a daemon may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// One line of `/proc/self/mountinfo` (proc(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `major:minor`.
    pub device: String,
    pub point: PathBuf,
    pub fs_type: String,
    pub source: String,
}

impl Mount {
    pub fn is_ours(&self) -> bool {
        // Mounted by us the type is plain `fuse`, by fusermount3 it has the subtype.
        self.fs_type.starts_with("fuse") && self.source == "weightfs"
    }
}

/// The topmost mount exactly at `point` (absolute, without links), without touching the file system there, which may
/// be dead or be ourselves.
pub fn find(point: &Path) -> Option<Mount> {
    let table = std::fs::read("/proc/self/mountinfo").ok()?;
    table.split(|&b| b == b'\n').filter_map(parse).rfind(|m| m.point == point)
}

/// Whether the file system `device` ([`Mount::device`]) is mounted anywhere; true when that cannot be told.
pub fn is_mounted(device: &str) -> bool {
    let Ok(table) = std::fs::read("/proc/self/mountinfo") else { return true };
    table.split(|&b| b == b'\n').filter_map(parse).any(|m| m.device == device)
}

fn parse(line: &[u8]) -> Option<Mount> {
    let fields: Vec<&[u8]> = line.split(|&b| b == b' ').collect();
    let dash = fields.iter().position(|f| *f == b"-")?;
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let point = PathBuf::from(OsString::from_vec(unescape(fields.get(4)?)));
    let (device, fs_type, source) = (fields.get(2)?, fields.get(dash + 1)?, fields.get(dash + 2)?);
    Some(Mount { device: text(device), point, fs_type: text(fs_type), source: text(source) })
}

/// Spaces and the like are written as octal escapes.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut at = 0;
    while at < field.len() {
        let code = field.get(at + 1..at + 4).filter(|_| field[at] == b'\\');
        match code.and_then(|c| u8::from_str_radix(std::str::from_utf8(c).ok()?, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(field[at]);
                at += 1;
            }
        }
    }
    out
}

/// Takes the mount at `point` out of the tree at once; files that are open on it stay usable until they are closed.
/// Needs root, or fusermount3 for the mount's owner.
pub fn detach(point: &Path) -> io::Result<()> {
    match unmount(point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::PERM) => fusermount(point),
        Err(e) => Err(e.into()),
    }
}

/// What `question` finds at a mount that may be a stopped daemon's, which would never answer; `None` if it takes too long.
/// The question is then left behind on a thread of its own.
pub fn ask<T: Send + 'static>(question: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (answer, answered) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // Nobody is waiting any more if this fails.
        let _ = answer.send(question());
    });
    answered.recv_timeout(PATIENCE).ok()
}

fn fusermount(point: &Path) -> io::Result<()> {
    for program in ["fusermount3", "fusermount"] {
        match std::process::Command::new(program).args(["-u", "-z", "--"]).arg(point).output() {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_string())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        }
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, "only root may unmount without fusermount3: install fuse3"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_with_spaces_and_backslashes_are_read() {
        let line = br"36 35 98:0 /mnt1 /mnt/a\040b\134c rw,noatime shared:1 - fuse.weightfs weightfs rw";
        let mount = parse(line).unwrap();
        assert_eq!(mount.point, Path::new(r"/mnt/a b\c"));
        assert_eq!(mount.device, "98:0");
        assert!(mount.is_ours());
        let proc = find(Path::new("/proc")).unwrap();
        assert_eq!(proc.fs_type, "proc");
        assert!(is_mounted(&proc.device) && !is_mounted("999:999999"));
    }
}
