//! The file operations of a commit behind one small trait, so that tests can put a file system in memory in place of the
//! disk, crash it between any two operations, or make any one of them fail.
//!
//! Paths are relative to the model directory ("model.safetensors", ".weightfs/state.json").

use std::any::Any;
use std::io;
use std::sync::Arc;

/// What a file is like now. `mtime_ns` and `inode` tell a file that somebody else wrote or replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Stat {
    pub bytes: u64,
    pub mtime_ns: i64,
    pub inode: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Read,
    ReadWrite,
    /// Reading and writing; makes the file (mode 0600), or empties one that is there.
    Create,
}

/// Whether a weights file may be written where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sharing {
    Own,
    /// Others rely on these bytes (a hub cache's blob, a hard link): write a private copy instead. Says which.
    Shared(&'static str),
}

/// Held while it lives; the kernel drops it with the process.
pub type Lock = Box<dyn Any + Send + Sync>;

pub trait Storage: Send + Sync {
    fn open(&self, path: &str, access: Access) -> io::Result<Arc<dyn StoredFile>>;
    /// Follows symbolic links.
    fn stat(&self, path: &str) -> io::Result<Stat>;
    /// Names of the entries of a directory.
    fn list(&self, directory: &str) -> io::Result<Vec<String>>;
    /// `.weightfs`, or one in it. Mode 0700; one that is there is left alone.
    fn create_directory(&self, path: &str) -> io::Result<()>;
    fn remove_directory(&self, path: &str) -> io::Result<()>;
    fn remove_file(&self, path: &str) -> io::Result<()>;
    /// Replaces `to` when that is a file.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Makes the entries of a directory durable.
    fn sync_directory(&self, path: &str) -> io::Result<()>;
    /// Copies bytes, mode and owner of a file (shared extents where the file system can) into a new one, which replaces
    /// what is at `to`. Open for reading and writing.
    fn copy(&self, from: &str, to: &str) -> io::Result<Arc<dyn StoredFile>>;
    fn sharing(&self, path: &str) -> io::Result<Sharing>;
    /// `None` when somebody else holds a lock that excludes this one. Makes the file.
    fn try_lock(&self, path: &str, exclusive: bool) -> io::Result<Option<Lock>>;
}

pub trait StoredFile: Send + Sync {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    fn set_mtime(&self, nanoseconds: i64) -> io::Result<()>;
    /// Data and metadata.
    fn sync(&self) -> io::Result<()>;
    fn stat(&self) -> io::Result<Stat>;
    /// Lets the disk begin with bytes just written, so that it works while we do. Best effort.
    fn write_behind(&self, offset: u64, bytes: u64) {
        let _ = (offset, bytes);
    }
    /// Asks for the bytes to be read from the disk again rather than from memory. Best effort.
    fn forget_cache(&self);
}

/// Reads a whole small file, refusing one of more than `limit` bytes.
pub fn read_small(storage: &dyn Storage, path: &str, limit: u64) -> io::Result<Vec<u8>> {
    let file = storage.open(path, Access::Read)?;
    let bytes = file.stat()?.bytes;
    if bytes > limit {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("it has {bytes} bytes, over {limit}")));
    }
    let mut buffer = vec![0; bytes as usize];
    file.read_exact_at(&mut buffer, 0)?;
    Ok(buffer)
}

/// Makes `path` hold `bytes`, or leaves it as it was, whatever happens in between.
pub fn replace_small(storage: &dyn Storage, directory: &str, name: &str, bytes: &[u8]) -> io::Result<()> {
    let (path, temporary) = (format!("{directory}/{name}"), format!("{directory}/{name}.tmp"));
    let written = (|| {
        let file = storage.open(&temporary, Access::Create)?;
        file.write_all_at(bytes, 0)?;
        file.sync()?;
        storage.rename(&temporary, &path)
    })();
    if let Err(e) = written {
        let _ = storage.remove_file(&temporary);
        return Err(e);
    }
    storage.sync_directory(directory)
}
