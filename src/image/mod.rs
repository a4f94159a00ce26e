//! The image: the bytes of every shard file as they are live, header from disk plus tensors from engine memory.

mod runs;
mod shard;
mod tensor;

pub use shard::{Image, TensorRef};

use crate::memory::{BLOCK, Hash, MemoryError};
use std::any::Any;
use std::ops::Range;
use std::path::PathBuf;

/// Why live bytes could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A tensor that no engine holds is read from its shard on disk.
    #[error("{path}: {source}")]
    Disk {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the engine is gone ({0}): mount again when it runs")]
    EngineGone(String),
    #[error("the engine has held its manifest's lock for {0} seconds, so no step boundary could be reached")]
    NoBoundary(u64),
}

/// While it lives, no optimizer step changes the weights.
pub struct StepHold(#[allow(dead_code)] Box<dyn Any + Send>);

impl StepHold {
    pub fn new(guards: impl Any + Send) -> StepHold {
        StepHold(Box::new(guards))
    }
}

/// Live shard bytes, as views and commits use them. Shards are numbered as in
/// [`ModelDirectory::shards`](crate::model::ModelDirectory); offsets are bytes in the shard file; sizes never change.
pub trait ShardBytes: Send + Sync {
    fn shards(&self) -> usize;

    /// Size of shard file `shard`.
    fn shard_bytes(&self, shard: usize) -> u64;

    /// The blocks of shard `shard` that can change: those with bytes of a live tensor, in order, not touching.
    /// The others are header and tensors that no engine holds.
    fn live_blocks(&self, shard: usize) -> Vec<Range<u64>> {
        let blocks = self.shard_bytes(shard).div_ceil(BLOCK as u64);
        Vec::from_iter((blocks > 0).then_some(0..blocks))
    }

    /// Are the engine and its memories still there? What was read before a failing check may be half a step.
    fn check(&self) -> Result<(), ImageError> {
        Ok(())
    }

    /// Waits for a step boundary and holds it. Reads and hashes under one hold are of one step. A thread that has a
    /// hold must not ask for another: a writer may be waiting in between.
    fn hold(&self) -> Result<StepHold, ImageError>;

    /// Waits until nobody holds the weights still, and keeps everybody out while they are changed (rollback). Reads and
    /// writes under it are the caller's alone.
    fn exclude(&self) -> Result<StepHold, ImageError> {
        self.hold()
    }

    /// Copies live bytes from `offset` into `dst`; the range lies inside the shard.
    fn read(&self, shard: usize, offset: u64, dst: &mut [u8]) -> Result<(), ImageError>;

    /// Hashes `out.len()` consecutive [`BLOCK`](crate::memory::BLOCK)s of the shard file from block `first` on,
    /// where the weights are. The file's last block may be short.
    fn hash(&self, shard: usize, first: u64, out: &mut [Hash]) -> Result<(), ImageError>;

    /// Writes file bytes back into the live weights (rollback). Bytes of the header and of tensors that no engine
    /// holds are left alone. Whole elements: both ends of the range are on element boundaries of their tensors.
    fn write(&self, shard: usize, offset: u64, src: &[u8]) -> Result<(), ImageError>;
}
