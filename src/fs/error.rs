//! Errors of the file tree: an errno for the kernel, a sentence for `status`.

use crate::commit::CommitError;
use crate::image::ImageError;
use crate::memory::MemoryError;
use crate::view::ViewError;
use rustix::io::Errno;
use std::fmt;

/// What a file operation failed with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsError {
    pub errno: Errno,
    pub message: String,
}

impl FsError {
    pub fn new(errno: Errno, message: impl Into<String>) -> FsError {
        FsError { errno, message: message.into() }
    }

    pub fn not_found(name: impl fmt::Display) -> FsError {
        FsError::new(Errno::NOENT, format!("there is no '{name}'"))
    }
}

impl fmt::Display for FsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for FsError {}

/// The errno of an I/O error, EIO where it carries none. ESTALE says here that the engine is gone: from a file system
/// (NFS) it is an error like others.
pub(crate) fn errno_of(e: &std::io::Error) -> Errno {
    match Errno::from_io_error(e) {
        None | Some(Errno::STALE) => Errno::IO,
        Some(errno) => errno,
    }
}

impl From<std::io::Error> for FsError {
    fn from(e: std::io::Error) -> FsError {
        FsError::new(errno_of(&e), e.to_string())
    }
}

impl From<ImageError> for FsError {
    fn from(e: ImageError) -> FsError {
        let errno = match &e {
            // What the reader had is stale; it does not come back without a new mount.
            ImageError::EngineGone(_) | ImageError::Memory(MemoryError::Gone { .. }) => Errno::STALE,
            ImageError::Memory(MemoryError::ReadOnly { .. }) => Errno::ROFS,
            // Layouts were checked when they were mapped: this would be our mistake.
            ImageError::Memory(MemoryError::OutOfBounds { .. } | MemoryError::Device { .. }) => Errno::IO,
            ImageError::Disk { source, .. } => errno_of(source),
            ImageError::NoBoundary(_) => Errno::BUSY,
            ImageError::Torn => Errno::IO,
        };
        FsError::new(errno, e.to_string())
    }
}

impl From<CommitError> for FsError {
    fn from(e: CommitError) -> FsError {
        FsError::new(Errno::from_raw_os_error(e.errno()), e.to_string())
    }
}

impl From<ViewError> for FsError {
    fn from(e: ViewError) -> FsError {
        match e {
            ViewError::Image(e) => e.into(),
            ViewError::NoMemory { .. } => FsError::new(Errno::NOMEM, e.to_string()),
            ViewError::Io(ref io) => FsError::new(errno_of(io), e.to_string()),
        }
    }
}
