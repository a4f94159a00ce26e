//! Copies of the changed blocks in memory of our own, so that training can go on while they are logged and folded.
//!
//! The hashes that count are taken from the copies: a writer that keeps no step boundary may have changed a block
//! between the search and the copy, and then the commit holds what was copied.

use super::blocks::{Change, Table};
use super::error::CommitError;
use super::find::Run;
use super::layout::Layout;
use crate::image::ShardBytes;
use crate::memory::{BLOCK, Hash, hash_into};
use memmap2::{Advice, MmapMut};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Consecutive blocks as they were copied.
#[derive(Debug)]
pub struct StagedRun {
    pub shard: usize,
    pub first: u64,
    pub hashes: Vec<Hash>,
    /// All blocks back to back; the last block of a file may be short.
    bytes: Bytes,
}

/// A part of the one piece of memory that a commit stages in.
#[derive(Debug, Clone)]
struct Bytes {
    arena: Arc<MmapMut>,
    range: Range<usize>,
}

impl StagedRun {
    pub fn start(&self) -> u64 {
        self.first * BLOCK as u64
    }

    pub fn end(&self) -> u64 {
        self.start() + self.bytes.range.len() as u64
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes.arena[self.bytes.range.clone()]
    }
}

/// In order of shard and place.
#[derive(Debug, Default)]
pub struct Staged(pub Vec<StagedRun>);

impl Staged {
    /// Copies `runs`; blocks whose copies equal the committed ones are left out.
    pub fn copy(live: &dyn ShardBytes, layout: &Layout, table: &Table, runs: &[Run]) -> Result<Staged, CommitError> {
        let lengths = runs.iter().map(|run| run.bytes(layout)).map(|r| (r.end - r.start) as usize);
        let total: usize = lengths.clone().sum();
        let no_memory = |e: std::io::Error| CommitError::io("stage changed blocks of", &layout.root, e);
        // One mapping in large pages where the system has them: the pages of many small ones cost more than the copies.
        let mut arena = MmapMut::map_anon(total.max(1)).map_err(no_memory)?;
        let _ = arena.advise(Advice::HugePage);
        let mut parts: Vec<&mut [u8]> = Vec::with_capacity(runs.len());
        let mut rest = &mut arena[..total];
        for length in lengths.clone() {
            let (part, after) = rest.split_at_mut(length);
            parts.push(part);
            rest = after;
        }
        let hashes: Vec<Vec<Hash>> = runs
            .par_iter()
            .zip(parts)
            .map(|(run, bytes)| {
                live.read(run.shard, run.bytes(layout).start, bytes)?;
                let mut hashes = vec![0; run.blocks as usize];
                hash_into(bytes, &mut hashes);
                Ok(hashes)
            })
            .collect::<Result<_, CommitError>>()?;
        let arena = Arc::new(arena);
        let mut at = 0;
        let mut staged = Vec::with_capacity(runs.len());
        for ((run, hashes), length) in runs.iter().zip(hashes).zip(lengths) {
            let bytes = Bytes { arena: arena.clone(), range: at..at + length };
            at += length;
            let first = run.first as usize;
            let known = &table.0[run.shard][first..first + run.blocks as usize];
            changed_parts(StagedRun { shard: run.shard, first: run.first, hashes, bytes }, known, &mut staged);
        }
        Ok(Staged(staged))
    }

    pub fn runs(&self) -> Vec<Run> {
        self.0.iter().map(|r| Run { shard: r.shard, first: r.first, blocks: r.hashes.len() as u64 }).collect()
    }

    pub fn changes(&self) -> Vec<Change> {
        self.0.iter().map(|r| Change { shard: r.shard, first: r.first, hashes: r.hashes.clone() }).collect()
    }

    /// The staged runs that overlap bytes `start..end` of a shard.
    pub fn overlapping(&self, shard: usize, start: u64, end: u64) -> &[StagedRun] {
        let from = self.0.partition_point(|r| (r.shard, r.end()) <= (shard, start));
        let to = self.0.partition_point(|r| (r.shard, r.start()) < (shard, end));
        &self.0[from..to.max(from)]
    }

    /// The bytes `start..end` of a shard where all of them are staged in one piece.
    pub fn whole(&self, shard: usize, start: u64, end: u64) -> Option<&[u8]> {
        let [run] = self.overlapping(shard, start, end) else { return None };
        let from = start.checked_sub(run.start())? as usize;
        run.bytes().get(from..from + (end - start) as usize)
    }

    /// Puts staged bytes over `buffer`, which holds a shard's bytes from `start` on. False when none lie there.
    pub fn overlay(&self, shard: usize, start: u64, buffer: &mut [u8]) -> bool {
        let end = start + buffer.len() as u64;
        let runs = self.overlapping(shard, start, end);
        for run in runs {
            let (from, to) = (run.start().max(start), run.end().min(end));
            let source = &run.bytes()[(from - run.start()) as usize..(to - run.start()) as usize];
            buffer[(from - start) as usize..(to - start) as usize].copy_from_slice(source);
        }
        !runs.is_empty()
    }
}

/// Usually the run as it is: blocks equal to `known` appear only when somebody wrote during the search.
fn changed_parts(run: StagedRun, known: &[Hash], parts: &mut Vec<StagedRun>) {
    if run.hashes.iter().zip(known).all(|(a, b)| a != b) {
        return parts.push(run);
    }
    let changed: Vec<bool> = run.hashes.iter().zip(known).map(|(a, b)| a != b).collect();
    let mut at = 0;
    for same in changed.chunk_by(|a, b| a == b) {
        let (from, to) = (at, at + same.len());
        at = to;
        if same[0] {
            let start = run.bytes.range.start;
            let range = start + from * BLOCK..(start + to * BLOCK).min(run.bytes.range.end);
            parts.push(StagedRun {
                shard: run.shard,
                first: run.first + from as u64,
                hashes: run.hashes[from..to].to_vec(),
                bytes: Bytes { arena: run.bytes.arena.clone(), range },
            });
        }
    }
}
