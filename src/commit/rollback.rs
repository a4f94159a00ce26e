//! Rollback: a new commit with the state of an earlier one, so that history only grows and no id ever means two things.
//! The weights files follow by folding it, and live weights are written back when they are given.

use super::blocks::Table;
use super::error::CommitError;
use super::find::{Run, find};
use super::journal::tensors_of;
use super::layout::Layout;
use super::past::{self, Past};
use super::protocol::Wanted;
use super::report::{CommitReport, FoldOutcome};
use super::snapshot::Snapshot;
use super::{CommitRequest, Committer};
use crate::image::ShardBytes;
use rayon::prelude::*;
use std::ops::Range;
use std::time::{Duration, Instant};

#[derive(Debug, Clone)]
pub struct RollbackReport {
    /// Of the new commit; without one when the newest already had that state.
    pub commit: CommitReport,
    /// Bytes written to the live weights.
    pub live_bytes: u64,
}

impl Committer {
    /// Makes the directory, and `live` when given, what they were at commit `id`. The commit of that comes first, folded
    /// when `live` is given: when the live weights cannot be written after it, they are a change like any other, and
    /// rolling back again is safe.
    /// The optimizer's state is that of [`Committer::optimizer_state`] of the newest commit afterwards.
    pub fn rollback(&self, id: u64, live: Option<&dyn ShardBytes>) -> Result<RollbackReport, CommitError> {
        self.rollback_to(id, live, &|| ())
    }

    /// The same of weights that are `live`. `before` is called before the first of them is written, with everybody
    /// excluded.
    pub fn rollback_live(
        &self,
        id: u64,
        live: &dyn ShardBytes,
        before: &dyn Fn(),
    ) -> Result<RollbackReport, CommitError> {
        self.rollback_to(id, Some(live), before)
    }

    fn rollback_to(
        &self,
        id: u64,
        live: Option<&dyn ShardBytes>,
        before: &dyn Fn(),
    ) -> Result<RollbackReport, CommitError> {
        let _working = self.working.lock();
        let snapshot = Snapshot::open(&self.shared, id)?;
        let message = format!("rollback to commit {id}");
        let within = snapshot.differences();
        let staging = self.options.staging_memory;
        let past = Past::new(&snapshot, &within, live, staging, past::limit(staging))?;
        let wanted = Wanted {
            request: CommitRequest::new(&message, self.step()),
            within: Some(&within),
            rollback_to: Some(id),
            // Of what an engine holds in a coarser type, the weights files say what it is rounded from.
            folds: live.is_some(),
        };
        let mut commit = self.commit_locked(&past, &wanted)?;
        // That of the past is no hold of weights.
        commit.times.held = Duration::ZERO;
        let Some(live) = live else { return Ok(RollbackReport { commit, live_bytes: 0 }) };
        if let FoldOutcome::Deferred { why } = commit.fold {
            return Err(CommitError::NotFolded { why });
        }
        // Of the state that is newest from here on: the one gone back to.
        let table = self.baseline(&|_| ())?.table;
        let alone = live.exclude()?;
        let start = Instant::now();
        before();
        let live_bytes = write_back(&self.shared.layout, &table, &past, live)?;
        drop(alone);
        commit.times.held = start.elapsed();
        Ok(RollbackReport { commit, live_bytes })
    }
}

/// Writes the blocks of `live` that `table` has other hashes of, while nobody reads: half a rollback is no step. They are
/// found where the weights are, and written from several threads in pieces of megabytes.
fn write_back(layout: &Layout, table: &Table, past: &Past, live: &dyn ShardBytes) -> Result<u64, CommitError> {
    let runs = find(live, layout, table, None)?;
    live.update_begins();
    let written = write_runs(layout, &runs, past, live);
    live.update_ended(written.is_ok());
    written
}

fn write_runs(layout: &Layout, runs: &[Run], past: &Past, live: &dyn ShardBytes) -> Result<u64, CommitError> {
    let pieces: Vec<(usize, Range<u64>)> = runs.iter().flat_map(|run| pieces(layout, run)).collect();
    let write = |(shard, range): &(usize, Range<u64>)| {
        match past.bytes(*shard, range.clone()) {
            Some(bytes) => live.write(*shard, range.start, bytes)?,
            None => {
                let mut bytes = vec![0; (range.end - range.start) as usize];
                past.read(*shard, range.start, &mut bytes)?;
                live.write(*shard, range.start, &bytes)?;
            }
        }
        Ok::<(), CommitError>(())
    };
    match past.is_decoded() {
        true => pieces.par_iter().try_for_each(write)?,
        // One tensor after the other, so that each is decoded once.
        false => pieces.iter().try_for_each(write)?,
    }
    Ok(pieces.iter().map(|(_, range)| range.end - range.start).sum())
}

/// A run as ranges of tensors, whole elements of each.
fn pieces(layout: &Layout, run: &Run) -> Vec<(usize, Range<u64>)> {
    let range = run.bytes(layout);
    let piece = |t: &super::layout::TensorLayout| {
        let element = t.element as u64;
        let first = (range.start.max(t.start) - t.start) / element * element;
        let end = (range.end.min(t.end) - t.start).next_multiple_of(element);
        (run.shard, t.start + first..(t.start + end).min(t.end))
    };
    tensors_of(layout, run).map(piece).collect()
}

#[cfg(test)]
mod tests {
    use super::super::layout::{ShardLayout, TensorLayout};
    use super::*;

    #[test]
    fn pieces_are_whole_elements_of_one_tensor() {
        let tensor = |start, end, element| TensorLayout { name: String::new(), start, end, element };
        // An odd header: no element begins where a block does.
        let tensors = vec![tensor(101, 4101, 4), tensor(4101, 4111, 2), tensor(4111, 12303, 8)];
        let shard = ShardLayout { name: String::new(), bytes: 12303, header: 0, tensors };
        let layout = Layout { root: Default::default(), shards: vec![shard] };
        let run = |first, blocks| pieces(&layout, &Run { shard: 0, first, blocks });
        assert_eq!(run(0, 1), [(0, 101..4097)]);
        assert_eq!(run(1, 1), [(0, 4093..4101), (0, 4101..4111), (0, 4111..8199)]);
        assert_eq!(run(2, 2), [(0, 8191..12303)]);
    }
}
