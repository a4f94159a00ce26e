//! Which blocks of the live weights differ from the newest commit: hashes where the weights are, against the table.

use super::blocks::Table;
use super::error::CommitError;
use super::layout::Layout;
use crate::image::ShardBytes;
use crate::memory::{BLOCK, Hash};
use std::ops::Range;

/// Blocks that one task copies: 4 MB, large against the cost of a task and small against a core's share of a model.
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
    let mut blocks: Vec<(usize, Range<u64>)> = Vec::new();
    for (shard, range) in ranges {
        let (mut first, end) = (range.start / BLOCK as u64, range.end.div_ceil(BLOCK as u64));
        // Neighbouring ranges may share a block: it is hashed once.
        if let Some((s, before)) = blocks.last()
            && s == shard
        {
            first = first.max(before.end);
        }
        if first < end {
            blocks.push((*shard, first..end));
        }
    }
    let known: Vec<&[Hash]> = table.0.iter().map(Vec::as_slice).collect();
    let mut runs: Vec<Run> = Vec::new();
    for (shard, changed) in live.changed(&blocks, &known)? {
        for first in changed.clone().step_by(BATCH as usize) {
            runs.push(Run { shard, first, blocks: BATCH.min(changed.end - first) });
        }
    }
    Ok(runs)
}
