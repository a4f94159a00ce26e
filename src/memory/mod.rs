//! Memory that holds weights, behind one small interface: copy, strided copy, hash. Of the host ([`HostMemory`]) or of a GPU
//! ([`cuda`]), which also works on many blocks at a time ([`Accelerator`]). The bytes belong to an engine that may write them,
//! or vanish, at any moment: a copy may mix old and new values (callers hold a step boundary when that matters), and a
//! vanished memory is an error.

mod accelerator;
mod available;
pub mod cuda;
mod fault;
mod hash;
mod host;
mod host_buffer;
mod process;
mod shared_bytes;
#[cfg(test)]
pub mod simulated;
mod users;

pub use accelerator::{Accelerator, DeviceMemory, DeviceRange, Piece, Span, WorkingMemory};
pub use available::available;
pub use hash::{BLOCK, Hash, block_hash, hash_into};
pub use host::HostMemory;
pub use host_buffer::HostBuffer;
pub use process::{ProcessOwner, is_root_or_us, process_owner, process_start};
pub use shared_bytes::{PIN_CHUNK, SharedBytes, sealed_memfd};
pub use users::UsersProbe;

use std::fmt::Debug;

/// Why a memory could not be read or written.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MemoryError {
    /// The engine truncated, deleted or unmapped it. Nothing read since then counts.
    #[error("{what} is gone: {why}")]
    Gone { what: String, why: String },
    /// A GPU refused, for a reason that may pass (no memory left for a buffer).
    #[error("{what}: {why}")]
    Device { what: String, why: String },
    #[error("{what} is mapped for reading only")]
    ReadOnly { what: String },
    #[error("{what}: bytes {offset}..{end} lie outside its {bytes} bytes")]
    OutOfBounds { what: String, offset: u64, end: u64, bytes: u64 },
}

/// `count` elements of `element` bytes, the first at `offset`, each `stride` bytes after the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strided {
    pub offset: u64,
    pub stride: u64,
    pub element: usize,
    pub count: u64,
}

impl Strided {
    /// First byte after the last element, or `None` on overflow.
    pub fn end(&self) -> Option<u64> {
        match self.count {
            0 => Some(self.offset),
            n => (n - 1).checked_mul(self.stride)?.checked_add(self.element as u64)?.checked_add(self.offset),
        }
    }
}

/// One memory of an engine. All offsets are in bytes from its start and are checked.
pub trait Memory: Send + Sync + Debug {
    fn bytes(&self) -> u64;
    fn read(&self, offset: u64, dst: &mut [u8]) -> Result<(), MemoryError>;
    fn write(&self, offset: u64, src: &[u8]) -> Result<(), MemoryError>;
    /// Packs the elements of `run` into `dst`, which has `run.count * run.element` bytes.
    fn read_strided(&self, run: Strided, dst: &mut [u8]) -> Result<(), MemoryError>;
    /// The reverse of [`Memory::read_strided`].
    fn write_strided(&self, run: Strided, src: &[u8]) -> Result<(), MemoryError>;
    /// Hashes `out.len()` consecutive blocks of [`BLOCK`] bytes that start at `offset`, where the bytes are.
    fn hash_blocks(&self, offset: u64, out: &mut [Hash]) -> Result<(), MemoryError>;
    /// Is it still there? Cheap; asked at the start of every operation and a few times a second.
    fn check(&self) -> Result<(), MemoryError>;
    /// As memory that a GPU works on by itself, if it is.
    fn device(&self) -> Option<&dyn DeviceMemory> {
        None
    }
    /// Lets go of it, as soon as the copies in flight are through: its engine has ended and its memory is wanted. From
    /// then on it is gone.
    fn release(&self) {}
}
