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
use rayon::prelude::*;

/// Consecutive blocks as they were copied.
#[derive(Debug)]
pub struct StagedRun {
    pub shard: usize,
    pub first: u64,
    pub hashes: Vec<Hash>,
    /// All blocks back to back; the last block of a file may be short.
    pub bytes: Vec<u8>,
}

impl StagedRun {
    pub fn start(&self) -> u64 {
        self.first * BLOCK as u64
    }

    pub fn end(&self) -> u64 {
        self.start() + self.bytes.len() as u64
    }
}

/// In order of shard and place.
#[derive(Debug, Default)]
pub struct Staged(pub Vec<StagedRun>);

impl Staged {
    /// Copies `runs`; blocks whose copies equal the committed ones are left out.
    pub fn copy(live: &dyn ShardBytes, layout: &Layout, table: &Table, runs: &[Run]) -> Result<Staged, CommitError> {
        let copied: Vec<Vec<StagedRun>> = runs
            .par_iter()
            .map(|run| {
                let range = run.bytes(layout);
                let mut bytes = vec![0; (range.end - range.start) as usize];
                live.read(run.shard, range.start, &mut bytes)?;
                let mut hashes = vec![0; run.blocks as usize];
                hash_into(&bytes, &mut hashes);
                let staged = StagedRun { shard: run.shard, first: run.first, hashes, bytes };
                let first = run.first as usize;
                Ok(changed_parts(staged, &table.0[run.shard][first..first + run.blocks as usize]))
            })
            .collect::<Result<_, CommitError>>()?;
        Ok(Staged(copied.into_iter().flatten().collect()))
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

    /// Puts staged bytes over `buffer`, which holds a shard's bytes from `start` on. False when none lie there.
    pub fn overlay(&self, shard: usize, start: u64, buffer: &mut [u8]) -> bool {
        let end = start + buffer.len() as u64;
        let runs = self.overlapping(shard, start, end);
        for run in runs {
            let (from, to) = (run.start().max(start), run.end().min(end));
            let source = &run.bytes[(from - run.start()) as usize..(to - run.start()) as usize];
            buffer[(from - start) as usize..(to - start) as usize].copy_from_slice(source);
        }
        !runs.is_empty()
    }
}

/// Usually the run as it is: blocks equal to `known` appear only when somebody wrote during the search.
fn changed_parts(run: StagedRun, known: &[Hash]) -> Vec<StagedRun> {
    if run.hashes.iter().zip(known).all(|(a, b)| a != b) {
        return vec![run];
    }
    let mut parts: Vec<StagedRun> = Vec::new();
    for (i, block) in run.bytes.chunks(BLOCK).enumerate() {
        if run.hashes[i] == known[i] {
            continue;
        }
        let at = run.first + i as u64;
        match parts.last_mut() {
            Some(part) if part.first + part.hashes.len() as u64 == at => {
                part.hashes.push(run.hashes[i]);
                part.bytes.extend_from_slice(block);
            }
            _ => parts.push(StagedRun {
                shard: run.shard,
                first: at,
                hashes: vec![run.hashes[i]],
                bytes: block.to_vec(),
            }),
        }
    }
    parts
}
