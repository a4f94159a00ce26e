//! The copy itself: one memfd a shard, so that the kernel can serve reads and mappings from it without us.

use crate::image::{ImageError, Part, ShardBytes};
use crate::memory::{BLOCK, Hash, SharedBytes, UsersProbe, hash_into, sealed_memfd};
use parking_lot::{Mutex, MutexGuard, RwLock};
use rayon::prelude::*;
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
    /// Written while bytes change.
    changing: RwLock<()>,
}

struct CopiedShard {
    file: File,
    users: UsersProbe,
    bytes: u64,
    contents: Mutex<Contents>,
}

#[derive(Default)]
struct Contents {
    /// Of all blocks, as they were copied.
    hashes: Vec<Hash>,
    /// For copies that a device makes by itself; without, the file is written.
    mapping: Option<SharedBytes>,
}

impl CopiedShards {
    /// Makes an empty file for every shard; nothing is copied yet.
    pub fn new(image: &dyn ShardBytes, name: &str) -> Result<CopiedShards, ViewError> {
        let mut shards = Vec::new();
        for shard in 0..image.shards() {
            let bytes = image.shard_bytes(shard);
            let file = sealed_memfd(&format!("weightfs:{name}:{shard}"), bytes)
                .map_err(|source| ViewError::NoMemory { bytes, source })?;
            let users = UsersProbe::new(&file)?;
            shards.push(CopiedShard { file, users, bytes, contents: Mutex::default() });
        }
        let (filled, torn) = (AtomicBool::new(false), AtomicBool::new(true));
        Ok(CopiedShards { shards, refreshing: Mutex::default(), filled, torn, changing: RwLock::default() })
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

    /// Copies from the view; short only at the end of the file. Waits while the view moves; an error where its bytes are
    /// not of one step.
    pub fn read(&self, shard: usize, offset: u64, dst: &mut [u8]) -> io::Result<usize> {
        let _still = self.changing.read();
        if !self.is_whole() {
            return Err(io::Error::other("the view is not of one step: the weights could not be read while it moved"));
        }
        let mut done = 0;
        while done < dst.len() {
            match self.shards[shard].file.read_at(&mut dst[done..], offset + done as u64)? {
                0 => break,
                n => done += n,
            }
        }
        Ok(done)
    }

    /// Gives `look` the hashes of all blocks as they were copied, a list a shard.
    pub fn with_hashes<T>(&self, look: impl FnOnce(&[&[Hash]]) -> T) -> T {
        let contents: Vec<MutexGuard<'_, Contents>> = self.shards.iter().map(|s| s.contents.lock()).collect();
        look(&contents.iter().map(|c| c.hashes.as_slice()).collect::<Vec<_>>())
    }

    /// Brings the view to the live step: hashes every block where it is, copies those that changed. Weights are held
    /// still meanwhile.
    pub fn refresh(&self, image: &dyn ShardBytes) -> Result<Refreshed, ViewError> {
        self.refresh_at(image, &|| 0).map(|(refreshed, _)| refreshed)
    }

    /// The same. `step` is asked while weights are held still, and its answer returned: the step that the view now is of.
    pub fn refresh_at(&self, image: &dyn ShardBytes, step: &dyn Fn() -> u64) -> Result<(Refreshed, u64), ViewError> {
        let _one = self.refreshing.lock();
        // Taking memory takes seconds: nobody's training waits for it.
        self.map_for(image)?;
        let _hold = image.hold()?;
        let step = step();
        let first = !self.filled.load(Ordering::Acquire);
        let mut contents: Vec<MutexGuard<'_, Contents>> = self.shards.iter().map(|s| s.contents.lock()).collect();
        for (shard, contents) in self.shards.iter().zip(&mut contents) {
            contents.hashes.resize(shard.bytes.div_ceil(BLOCK as u64) as usize, 0);
        }
        let blocks_of = |s: usize| contents[s].hashes.len() as u64;
        let changed: Vec<(usize, Range<u64>)> = match first {
            true => (0..self.shards.len()).filter(|s| blocks_of(*s) > 0).map(|s| (s, 0..blocks_of(s))).collect(),
            false => {
                let live = |s: usize| image.live_blocks(s).into_iter().map(move |range| (s, range));
                let ranges: Vec<_> = (0..self.shards.len()).flat_map(live).collect();
                let known: Vec<&[Hash]> = contents.iter().map(|c| c.hashes.as_slice()).collect();
                image.changed(&ranges, &known)?
            }
        };
        let (blocks, bytes) = (AtomicU64::new(0), AtomicU64::new(0));
        let _changing = self.changing.write();
        tasks(&self.shards, &mut contents, &changed).into_par_iter().try_for_each(|task| {
            // From the first change on, the copy is of no one step until the refresh is through.
            self.torn.store(true, Ordering::Release);
            blocks.fetch_add(task.iter().map(|p| p.known.len() as u64).sum(), Ordering::Relaxed);
            bytes.fetch_add(task.iter().map(|p| p.bytes as u64).sum(), Ordering::Relaxed);
            self.copy(image, task)
        })?;
        let (blocks, bytes) = (blocks.into_inner(), bytes.into_inner());
        // An engine that died during the copies may have left half a step behind: its lock went with it.
        image.check()?;
        self.filled.store(true, Ordering::Release);
        self.torn.store(false, Ordering::Release);
        Ok((Refreshed { blocks, bytes, filled: first }, step))
    }

    /// Copies from a device go straight into mappings of the files, once those have their memory.
    fn map_for(&self, image: &dyn ShardBytes) -> Result<(), ViewError> {
        let Some(accelerator) = image.accelerator() else { return Ok(()) };
        // All shards at once: one after the other, each would end with a few threads busy and the others idle.
        self.shards.par_iter().filter(|s| s.bytes > 0).try_for_each(|shard| {
            let mut contents = shard.contents.lock();
            if contents.mapping.is_none() {
                let mapping = SharedBytes::populated(&shard.file, &*accelerator);
                let no_memory = |source| ViewError::NoMemory { bytes: shard.bytes, source };
                contents.mapping = Some(mapping.map_err(no_memory)?);
            }
            Ok(())
        })
    }

    /// Copies the blocks of one task and records the hashes of what was copied (not of what was seen before: a foreign
    /// writer without manners may have written in between).
    fn copy(&self, image: &dyn ShardBytes, task: Vec<Piece<'_>>) -> Result<(), ViewError> {
        let through = task.iter().filter(|p| p.mapped.is_none()).map(|p| p.bytes).sum();
        let mut buffer = vec![0; through];
        let mut rest = &mut buffer[..];
        let (mut parts, mut known): (Vec<Part<'_>>, Vec<_>) = (Vec::new(), Vec::new());
        for piece in task {
            let mapped = piece.mapped.is_some();
            let dst = match piece.mapped {
                // Straight into the view: if it fails half way these blocks match nothing, and the next refresh copies
                // them again. What fails on its way to the buffer leaves the view, and what is known of it, as they are.
                Some(mapped) => {
                    piece.known.fill(0);
                    mapped
                }
                None => take(&mut rest, 0, piece.bytes),
            };
            parts.push(Part { shard: piece.shard, offset: piece.first * BLOCK as u64, dst });
            known.push((piece.known, mapped));
        }
        image.read_parts(&mut parts)?;
        for (part, (known, mapped)) in parts.iter().zip(known) {
            if !mapped {
                known.fill(0);
                self.shards[part.shard].file.write_all_at(part.dst, part.offset)?;
            }
            hash_into(part.dst, known);
        }
        Ok(())
    }
}

/// Consecutive blocks of a shard that changed.
struct Piece<'a> {
    shard: usize,
    first: u64,
    bytes: usize,
    known: &'a mut [Hash],
    /// Their place in the shard's mapping, if it has one.
    mapped: Option<&'a mut [u8]>,
}

/// Cuts `changed` (in order) into pieces, and puts so many together as one thread copies at a time. Pieces end where a
/// multiple of [`PIECE_BLOCKS`] is: no copy spans two pins.
fn tasks<'a>(
    shards: &[CopiedShard],
    contents: &'a mut [MutexGuard<'_, Contents>],
    changed: &[(usize, Range<u64>)],
) -> Vec<Vec<Piece<'a>>> {
    let mut tasks: Vec<Vec<Piece<'a>>> = Vec::new();
    let mut room = 0;
    let mut changed = changed.iter().peekable();
    for (s, (shard, contents)) in shards.iter().zip(contents).enumerate() {
        let contents = &mut **contents;
        let mut hashes = &mut contents.hashes[..];
        let mut mapped = contents.mapping.as_deref_mut();
        let mut at = 0;
        while let Some((_, range)) = changed.next_if(|(of, _)| *of == s) {
            let mut first = range.start;
            while first < range.end {
                let end = range.end.min((first / PIECE_BLOCKS + 1) * PIECE_BLOCKS);
                let (n, skip) = ((end - first) as usize, (first - at) as usize);
                let bytes = ((end * BLOCK as u64).min(shard.bytes) - first * BLOCK as u64) as usize;
                let known = take(&mut hashes, skip, n);
                let mapped = mapped.as_mut().map(|m| take(m, skip * BLOCK, bytes));
                if room < n as u64 {
                    tasks.push(Vec::new());
                    room = PIECE_BLOCKS;
                }
                room -= n as u64;
                if let Some(task) = tasks.last_mut() {
                    task.push(Piece { shard: s, first, bytes, known, mapped });
                }
                (first, at) = (end, end);
            }
        }
    }
    tasks
}

/// `n` of what is left after `skip`, which goes.
fn take<'a, T>(rest: &mut &'a mut [T], skip: usize, n: usize) -> &'a mut [T] {
    let (_, tail) = std::mem::take(rest).split_at_mut(skip);
    let (taken, tail) = tail.split_at_mut(n);
    *rest = tail;
    taken
}
