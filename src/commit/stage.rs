//! Copies of the changed blocks in memory of our own, so that training can go on while they are logged and folded.
//!
//! The hashes that count are taken from the copies: a writer that keeps no step boundary may have changed a block
//! between the search and the copy, and then the commit holds what was copied.

use super::blocks::{Change, Table};
use super::error::CommitError;
use super::find::Run;
use super::layout::Layout;
use crate::image::{Part, ShardBytes};
use crate::memory::{BLOCK, Hash, HostBuffer, hash_into};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Blocks that one task copies and hashes.
const TASK_BLOCKS: u64 = 1024;

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
    arena: Arc<HostBuffer>,
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
        let mut arena = arena(live, layout, total)?;
        let mut parts: Vec<&mut [u8]> = Vec::with_capacity(runs.len());
        let mut rest = &mut arena[..total];
        for length in lengths.clone() {
            let (part, after) = rest.split_at_mut(length);
            parts.push(part);
            rest = after;
        }
        let mut hashes: Vec<Vec<Hash>> = runs.iter().map(|run| vec![0; run.blocks as usize]).collect();
        tasks(runs, parts, &mut hashes).into_par_iter().try_for_each(|(runs, parts, hashes)| {
            let mut wanted: Vec<Part<'_>> = Vec::with_capacity(runs.len());
            for (run, dst) in runs.iter().zip(parts) {
                wanted.push(Part { shard: run.shard, offset: run.bytes(layout).start, dst });
            }
            live.read_parts(&mut wanted)?;
            wanted.iter().zip(hashes).for_each(|(part, hashes)| hash_into(part.dst, hashes));
            Ok::<(), CommitError>(())
        })?;
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

/// Memory to stage in: where the weights' device copies to at full speed, if they are on one.
pub fn arena(live: &dyn ShardBytes, layout: &Layout, bytes: usize) -> Result<HostBuffer, CommitError> {
    if let Some(device) = live.accelerator().filter(|_| bytes > 0) {
        match device.host_memory(bytes) {
            Ok(memory) => return Ok(memory),
            Err(e) => log::warn!("changed blocks are staged in memory that is slow to copy to: {e}"),
        }
    }
    HostBuffer::anonymous(bytes).map_err(|e| CommitError::io("stage changed blocks of", &layout.root, e))
}

/// Takes the memory that staging up to `bytes` needs of a device, which may take a second, so that it is there when
/// weights are held still.
pub fn prepare(live: &dyn ShardBytes, layout: &Layout, bytes: u64) -> Result<(), CommitError> {
    if live.accelerator().is_some() {
        let all: u64 = layout.shards.iter().map(|s| s.bytes).sum();
        drop(arena(live, layout, bytes.min(all) as usize)?);
    }
    Ok(())
}

/// Runs, their places and their hashes, so many together as one task copies.
type Task<'a> = (&'a [Run], Vec<&'a mut [u8]>, &'a mut [Vec<Hash>]);

fn tasks<'a>(mut runs: &'a [Run], parts: Vec<&'a mut [u8]>, mut hashes: &'a mut [Vec<Hash>]) -> Vec<Task<'a>> {
    let mut tasks = Vec::new();
    let mut parts = parts.into_iter();
    while !runs.is_empty() {
        let mut blocks = 0;
        let n = runs.iter().take_while(|run| {
            let fits = blocks == 0 || blocks + run.blocks <= TASK_BLOCKS;
            blocks += run.blocks;
            fits
        });
        let n = n.count();
        let (first, rest) = runs.split_at(n);
        let (its, others) = hashes.split_at_mut(n);
        tasks.push((first, parts.by_ref().take(n).collect(), its));
        (runs, hashes) = (rest, others);
    }
    tasks
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
