//! The image: the bytes of every shard file as they are live, header from disk plus tensors from engine memory.

mod attach;
mod runs;
mod shard;
mod tensor;
mod wide;

pub use attach::{Image, TensorRef};
pub use tensor::EvenRows;

use crate::memory::{Accelerator, BLOCK, Hash, MemoryError};
use rayon::prelude::*;
use std::any::Any;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

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
    #[error(
        "a step was cut while it was written, so the weights are of no step: `rollback ID` mends them (`weightfs log` lists ids)"
    )]
    Torn,
}

/// While it lives, no optimizer step changes the weights.
pub struct StepHold(#[allow(dead_code)] Box<dyn Any + Send>);

impl StepHold {
    pub fn new(guards: impl Any + Send) -> StepHold {
        StepHold(Box::new(guards))
    }
}

/// Bytes of a shard file and where they are to be copied.
#[derive(Debug)]
pub struct Part<'a> {
    pub shard: usize,
    pub offset: u64,
    pub dst: &'a mut [u8],
}

/// Blocks that one task hashes: 4 MB, large against the cost of a task and small against a core's share of a model.
const BATCH: u64 = 1024;

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
    /// hold must not ask for another: a writer may be waiting in between. Fails where an update was cut.
    fn hold(&self) -> Result<StepHold, ImageError>;

    /// Waits until nobody holds the weights still, and keeps everybody out while they are changed (rollback). Reads and
    /// writes under it are the caller's alone.
    fn exclude(&self) -> Result<StepHold, ImageError> {
        self.hold()
    }

    /// The first write of an update follows. The caller excludes everybody.
    fn update_begins(&self) {}

    /// The update is written, or nothing of it is (`whole`), or it was cut: nobody is given a [hold](ShardBytes::hold) of
    /// half a step. The caller still excludes everybody.
    fn update_ended(&self, whole: bool) {
        let _ = whole;
    }

    /// Copies live bytes from `offset` into `dst`; the range lies inside the shard.
    fn read(&self, shard: usize, offset: u64, dst: &mut [u8]) -> Result<(), ImageError>;

    /// Hashes `out.len()` consecutive [`BLOCK`](crate::memory::BLOCK)s of the shard file from block `first` on,
    /// where the weights are. The file's last block may be short.
    fn hash(&self, shard: usize, first: u64, out: &mut [Hash]) -> Result<(), ImageError>;

    /// Copies many parts, which lie scattered perhaps. Called with some megabytes at a time, from several threads.
    fn read_parts(&self, parts: &mut [Part<'_>]) -> Result<(), ImageError> {
        parts.iter_mut().try_for_each(|p| self.read(p.shard, p.offset, p.dst))
    }

    /// The blocks among `ranges` (of shards, ascending, disjoint) whose hashes differ from those in `known`, which has all
    /// blocks of every shard. In order; ranges that touch may come apart.
    fn changed(
        &self,
        ranges: &[(usize, Range<u64>)],
        known: &[&[Hash]],
    ) -> Result<Vec<(usize, Range<u64>)>, ImageError> {
        changed_in_batches(self, ranges, known)
    }

    /// The device that the weights are on, if any: memory that it reaches is better to copy to.
    fn accelerator(&self) -> Option<Arc<dyn Accelerator>> {
        None
    }

    /// Writes file bytes back into the live weights (rollback). Bytes of the header and of tensors that no engine
    /// holds are left alone. Whole elements: both ends of the range are on element boundaries of their tensors.
    fn write(&self, shard: usize, offset: u64, src: &[u8]) -> Result<(), ImageError>;
}

/// Hashes on all cores, a batch a task.
fn changed_in_batches<B: ShardBytes + ?Sized>(
    bytes: &B,
    ranges: &[(usize, Range<u64>)],
    known: &[&[Hash]],
) -> Result<Vec<(usize, Range<u64>)>, ImageError> {
    let mut tasks: Vec<(usize, u64, u64)> = Vec::new();
    for (shard, range) in ranges {
        tasks.extend(range.clone().step_by(BATCH as usize).map(|at| (*shard, at, BATCH.min(range.end - at))));
    }
    let found: Vec<Vec<(usize, Range<u64>)>> = tasks
        .into_par_iter()
        .map(|(shard, first, blocks)| {
            let mut hashes = vec![0; blocks as usize];
            bytes.hash(shard, first, &mut hashes)?;
            let mut changed = Vec::new();
            differing(shard, first, &hashes, known[shard], &mut changed);
            Ok(changed)
        })
        .collect::<Result<_, ImageError>>()?;
    Ok(found.into_iter().flatten().collect())
}

/// Adds runs of blocks from `first` on whose `hashes` differ from the shard's `known` ones.
fn differing(shard: usize, first: u64, hashes: &[Hash], known: &[Hash], changed: &mut Vec<(usize, Range<u64>)>) {
    let known = &known[first as usize..first as usize + hashes.len()];
    if hashes == known {
        return;
    }
    for (i, _) in hashes.iter().zip(known).enumerate().filter(|(_, (a, b))| a != b) {
        let block = first + i as u64;
        match changed.last_mut() {
            Some((s, range)) if *s == shard && range.end == block => range.end += 1,
            _ => changed.push((shard, block..block + 1)),
        }
    }
}
