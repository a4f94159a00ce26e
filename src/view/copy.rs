//! The copy itself: one memfd a shard, so that the kernel can serve reads and mappings from it without us.

use crate::image::{ImageError, ShardBytes};
use crate::memory::{BLOCK, Hash, UsersProbe, block_hash};
use parking_lot::Mutex;
use rayon::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Hashed, compared and copied by one thread at a time: 4 MiB, the size from which copies run at full speed.
const PIECE_BLOCKS: u64 = 1024;

/// Why the view could not be made or moved.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("memory for the view ({bytes} bytes) could not be had: {source}; mount with --view live to do without")]
    NoMemory {
        bytes: u64,
        #[source]
        source: io::Error,
    },
    #[error("the view could not be written: {0}")]
    Io(#[from] io::Error),
}

/// What a refresh did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refreshed {
    pub blocks: u64,
    pub bytes: u64,
    /// The first time: everything was copied.
    pub filled: bool,
}

/// One step's bytes of every shard.
pub struct CopiedShards {
    shards: Vec<CopiedShard>,
    /// One refresh at a time.
    refreshing: Mutex<()>,
    filled: AtomicBool,
    /// Set while the bytes are not all of one step: a refresh is under way, or one has failed half way.
    torn: AtomicBool,
}

struct CopiedShard {
    file: File,
    users: UsersProbe,
    bytes: u64,
    hashes: Mutex<Vec<Hash>>,
}

impl CopiedShards {
    /// Makes an empty file for every shard; nothing is copied yet.
    pub fn new(image: &dyn ShardBytes, name: &str) -> Result<CopiedShards, ViewError> {
        let mut shards = Vec::new();
        for shard in 0..image.shards() {
            let bytes = image.shard_bytes(shard);
            let file = reserve(&format!("weightfs:{name}:{shard}"), bytes)
                .map_err(|source| ViewError::NoMemory { bytes, source })?;
            let users = UsersProbe::new(&file)?;
            shards.push(CopiedShard { file, users, bytes, hashes: Mutex::default() });
        }
        let (filled, torn) = (AtomicBool::new(false), AtomicBool::new(true));
        Ok(CopiedShards { shards, refreshing: Mutex::default(), filled, torn })
    }

    /// The memfd of a shard, for the kernel to serve from.
    pub fn file(&self, shard: usize) -> &File {
        &self.shards[shard].file
    }

    pub fn bytes(&self) -> u64 {
        self.shards.iter().map(|s| s.bytes).sum()
    }

    /// True once everything was copied and no refresh has stopped half way: the bytes are of one step.
    pub fn is_whole(&self) -> bool {
        !self.torn.load(Ordering::Acquire)
    }

    /// Whether somebody still has a passthrough mapping of a shard (or has it open). Nobody may be opening one meanwhile.
    pub fn is_mapped(&self) -> bool {
        self.shards.iter().any(|s| s.users.has_others())
    }

    /// Copies from the view; short only at the end of the file.
    pub fn read(&self, shard: usize, offset: u64, dst: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < dst.len() {
            match self.shards[shard].file.read_at(&mut dst[done..], offset + done as u64)? {
                0 => break,
                n => done += n,
            }
        }
        Ok(done)
    }

    /// Brings the view to the live step: hashes every block where it is, copies those that changed. Weights are held
    /// still meanwhile.
    pub fn refresh(&self, image: &dyn ShardBytes) -> Result<Refreshed, ViewError> {
        self.refresh_at(image, &|| 0).map(|(refreshed, _)| refreshed)
    }

    /// The same. `step` is asked while weights are held still, and its answer returned: the step that the view now is of.
    pub fn refresh_at(&self, image: &dyn ShardBytes, step: &dyn Fn() -> u64) -> Result<(Refreshed, u64), ViewError> {
        let _one = self.refreshing.lock();
        let _hold = image.hold()?;
        let step = step();
        let first = !self.filled.load(Ordering::Acquire);
        let (blocks, bytes) = (AtomicU64::new(0), AtomicU64::new(0));
        for (index, shard) in self.shards.iter().enumerate() {
            let all = shard.bytes.div_ceil(BLOCK as u64);
            let mut hashes = shard.hashes.lock();
            hashes.resize(all as usize, 0);
            let ranges = if first { Vec::from_iter((all > 0).then_some(0..all)) } else { image.live_blocks(index) };
            pieces(&ranges, &mut hashes).into_par_iter().try_for_each(|(range, known)| {
                let touched = |n: u64, len: u64| {
                    // From the first change on, the copy is of no one step until the refresh is through.
                    self.torn.store(true, Ordering::Release);
                    blocks.fetch_add(n, Ordering::Relaxed);
                    bytes.fetch_add(len, Ordering::Relaxed);
                };
                if first {
                    return shard.copy(image, index, range.start, known, &touched);
                }
                let mut now = vec![0; known.len()];
                image.hash(index, range.start, &mut now)?;
                let mut at = 0;
                while at < now.len() {
                    let run = (at..now.len()).take_while(|&i| now[i] != known[i]).count();
                    if run > 0 {
                        shard.copy(image, index, range.start + at as u64, &mut known[at..at + run], &touched)?;
                    }
                    at += run.max(1);
                }
                Ok::<(), ViewError>(())
            })?;
        }
        let (blocks, bytes) = (blocks.into_inner(), bytes.into_inner());
        // An engine that died during the copies may have left half a step behind: its lock went with it.
        image.check()?;
        self.filled.store(true, Ordering::Release);
        self.torn.store(false, Ordering::Release);
        Ok((Refreshed { blocks, bytes, filled: first }, step))
    }
}

impl CopiedShard {
    /// Copies blocks from `first` on and records the hashes of what was copied (not of what was seen before: a foreign
    /// writer without manners may have written in between).
    fn copy(
        &self,
        image: &dyn ShardBytes,
        shard: usize,
        first: u64,
        known: &mut [Hash],
        touched: &dyn Fn(u64, u64),
    ) -> Result<(), ViewError> {
        let offset = first * BLOCK as u64;
        let mut buffer = vec![0; ((known.len() * BLOCK) as u64).min(self.bytes - offset) as usize];
        image.read(shard, offset, &mut buffer)?;
        touched(known.len() as u64, buffer.len() as u64);
        // If the write fails half way these blocks match nothing, and the next refresh copies them again.
        known.fill(0);
        self.file.write_all_at(&buffer, offset)?;
        for (block, hash) in buffer.chunks(BLOCK).zip(known) {
            *hash = block_hash(block);
        }
        Ok(())
    }
}

/// Cuts the hashes of `ranges` (ascending, disjoint block ranges) into pieces that threads can own.
fn pieces<'a>(ranges: &[Range<u64>], hashes: &'a mut [Hash]) -> Vec<(Range<u64>, &'a mut [Hash])> {
    let mut cut = Vec::new();
    let (mut rest, mut at) = (hashes, 0);
    for range in ranges {
        let (_, tail) = rest.split_at_mut((range.start - at) as usize);
        let (mut mine, tail) = tail.split_at_mut((range.end - range.start) as usize);
        let mut start = range.start;
        while !mine.is_empty() {
            let n = (mine.len() as u64).min(PIECE_BLOCKS);
            let (piece, more) = mine.split_at_mut(n as usize);
            cut.push((start..start + n, piece));
            (mine, start) = (more, start + n);
        }
        (rest, at) = (tail, range.end);
    }
    cut
}

/// A memfd of `bytes`, its size sealed, so that nothing that maps it can ever be cut off. Its memory is taken as it is
/// written, before anybody reads it.
fn reserve(name: &str, bytes: u64) -> io::Result<File> {
    let name: String = name.chars().filter(|c| *c != '\0').take(200).collect();
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let file = File::from(fd);
    file.set_len(bytes)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(file)
}
