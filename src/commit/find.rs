//! Which blocks of the live weights differ from the newest commit: hashes where the weights are, against the table.

use super::blocks::Table;
use super::error::CommitError;
use super::layout::Layout;
use crate::image::ShardBytes;
use crate::memory::BLOCK;
use rayon::prelude::*;
use std::ops::Range;

/// Blocks that one task hashes: 4 MB, large against the cost of a task and small against a core's share of a model.
const BATCH: u64 = 1024;

/// A run of consecutive changed blocks, at most [`BATCH`] long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub shard: usize,
    pub first: u64,
    pub blocks: u64,
}

impl Run {
    pub fn bytes(&self, layout: &Layout) -> Range<u64> {
        let start = self.first * BLOCK as u64;
        start..(start + self.blocks * BLOCK as u64).min(layout.shards[self.shard].bytes)
    }
}

/// The changed blocks among `within` (byte ranges of a shard; all that can change when `None`), in order.
pub fn find(
    live: &dyn ShardBytes,
    layout: &Layout,
    table: &Table,
    within: Option<&[(usize, Range<u64>)]>,
) -> Result<Vec<Run>, CommitError> {
    let whole: Vec<(usize, Range<u64>)>;
    let ranges = match within {
        Some(ranges) => ranges,
        None => {
            let bytes = |b: Range<u64>| b.start * BLOCK as u64..b.end * BLOCK as u64;
            let live_bytes = |s| live.live_blocks(s).into_iter().map(move |blocks| (s, bytes(blocks)));
            whole = (0..layout.shards.len()).flat_map(live_bytes).collect();
            &whole
        }
    };
    let mut tasks: Vec<(usize, u64, u64)> = Vec::new();
    for (shard, range) in ranges {
        let mut first = range.start / BLOCK as u64;
        // Neighbouring ranges may share a block: it is hashed once.
        if let Some(&(s, f, n)) = tasks.last()
            && s == *shard
        {
            first = first.max(f + n);
        }
        let end = range.end.div_ceil(BLOCK as u64);
        while first < end {
            let blocks = BATCH.min(end - first);
            tasks.push((*shard, first, blocks));
            first += blocks;
        }
    }
    let found: Vec<Vec<Run>> = tasks
        .into_par_iter()
        .map(|(shard, first, blocks)| {
            let mut hashes = vec![0; blocks as usize];
            live.hash(shard, first, &mut hashes)?;
            let known = &table.0[shard][first as usize..(first + blocks) as usize];
            let mut runs: Vec<Run> = Vec::new();
            for (i, _) in hashes.iter().zip(known).enumerate().filter(|(_, (a, b))| a != b) {
                let block = first + i as u64;
                match runs.last_mut() {
                    Some(run) if run.first + run.blocks == block => run.blocks += 1,
                    _ => runs.push(Run { shard, first: block, blocks: 1 }),
                }
            }
            Ok(runs)
        })
        .collect::<Result<_, CommitError>>()?;
    Ok(found.into_iter().flatten().collect())
}
