//! Opens a memory of kind `file`: named by a manifest, so looked at with care before it is mapped.

use super::SourceError;
use crate::memory::HostMemory;
use rustix::fs::{Mode, OFlags};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Maps the first `bytes` of the regular file at `path`. With an `owner`, the file must be that user's.
pub(super) fn map_file(path: &Path, bytes: u64, owner: Option<u32>, writable: bool) -> Result<HostMemory, SourceError> {
    let io = |source| SourceError::Io { path: path.to_path_buf(), source };
    let access = if writable { OFlags::RDWR } else { OFlags::RDONLY };
    // NOFOLLOW: a manifest names the file itself. NONBLOCK: a FIFO must not hold us up before we see what it is.
    let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let follow = path.starts_with("/proc"); // /proc/PID/fd/N is a magic link to a memfd
    let flags = if follow { flags } else { flags | OFlags::NOFOLLOW };
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| io(e.into()))?;
    let file = std::fs::File::from(fd);
    let metadata = file.metadata().map_err(io)?;
    if !metadata.is_file() {
        return Err(SourceError::Untrusted { path: path.to_path_buf(), why: "it is not a regular file".into() });
    }
    if owner.is_some_and(|owner| owner != metadata.uid()) {
        let why = "the manifest that names it was written by another user than the one who owns it".to_string();
        return Err(SourceError::Untrusted { path: path.to_path_buf(), why });
    }
    let what = format!("engine memory {}", path.display());
    HostMemory::shared(file, bytes, &what, writable).map_err(io)
}
