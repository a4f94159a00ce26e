//! Rollback: a new commit with the state of an earlier one, so that history only grows and no id ever means two things.
//! The weights files follow by folding it, and live weights are written back when they are given.

use super::error::CommitError;
use super::protocol::Wanted;
use super::report::CommitReport;
use super::snapshot::Snapshot;
use super::{CommitRequest, Committer};
use crate::image::{ImageError, ShardBytes, StepHold};
use crate::memory::{Hash, hash_into};
use std::ops::Range;

/// Bytes of a tensor compared and written back at a time, and the grain of what is written: both hold whole elements.
const WINDOW: u64 = 1 << 20;
const GRAIN: usize = 4096;

#[derive(Debug, Clone)]
pub struct RollbackReport {
    /// Of the new commit; without one when the newest already had that state.
    pub commit: CommitReport,
    /// Bytes written to the live weights.
    pub live_bytes: u64,
}

impl Committer {
    /// Makes the directory, and `live` when given, what they were at commit `id`. The commit of that comes first: when
    /// the live weights cannot be written after it, they are a change like any other, and rolling back again is safe.
    /// The optimizer's state is that of [`Committer::optimizer_state`] of the newest commit afterwards.
    pub fn rollback(&self, id: u64, live: Option<&dyn ShardBytes>) -> Result<RollbackReport, CommitError> {
        let _working = self.working.lock();
        let snapshot = Snapshot::open(&self.shared, id)?;
        let message = format!("rollback to commit {id}");
        let within = snapshot.differences();
        snapshot.prepare()?;
        let wanted =
            Wanted { request: CommitRequest::new(&message, self.step()), within: Some(&within), rollback_to: Some(id) };
        let commit = self.commit_locked(&Past(&snapshot), &wanted)?;
        let live_bytes = live.map_or(Ok(0), |live| self.write_back(&snapshot, live))?;
        Ok(RollbackReport { commit, live_bytes })
    }

    /// Writes what differs, element by element whole, while nobody reads: half a rollback is no step.
    fn write_back(&self, snapshot: &Snapshot, live: &dyn ShardBytes) -> Result<u64, CommitError> {
        let _alone = live.exclude()?;
        let mut written = 0;
        let (mut then, mut now) = (Vec::new(), Vec::new());
        for (s, shard) in self.shared.layout.shards.iter().enumerate() {
            for tensor in &shard.tensors {
                let mut at = tensor.start;
                while at < tensor.end {
                    let stop = (at + WINDOW).min(tensor.end);
                    then.resize((stop - at) as usize, 0);
                    now.resize((stop - at) as usize, 0);
                    snapshot.read(s, at, &mut then)?;
                    live.read(s, at, &mut now)?;
                    for range in differing(&then, &now) {
                        live.write(s, at + range.start as u64, &then[range.clone()])?;
                        written += range.len() as u64;
                    }
                    at = stop;
                }
            }
        }
        Ok(written)
    }
}

/// Where `a` and `b` differ, in grains; neighbours are one range, so that a GPU is written in few large copies.
fn differing(a: &[u8], b: &[u8]) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let grains = a.chunks(GRAIN).zip(b.chunks(GRAIN)).enumerate();
    for (i, (a, _)) in grains.filter(|(_, (a, b))| a != b) {
        let (start, end) = (i * GRAIN, i * GRAIN + a.len());
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}

/// An earlier commit as if it were live.
struct Past<'a>(&'a Snapshot);

fn image_error(e: CommitError) -> ImageError {
    ImageError::Disk { path: ".weightfs/log".into(), source: std::io::Error::other(e) }
}

impl ShardBytes for Past<'_> {
    fn shards(&self) -> usize {
        self.0.shards()
    }

    fn shard_bytes(&self, shard: usize) -> u64 {
        self.0.shard_bytes(shard)
    }

    fn hold(&self) -> Result<StepHold, ImageError> {
        Ok(StepHold::new(()))
    }

    fn read(&self, shard: usize, offset: u64, dst: &mut [u8]) -> Result<(), ImageError> {
        self.0.read(shard, offset, dst).map_err(image_error)
    }

    fn hash(&self, shard: usize, first: u64, out: &mut [Hash]) -> Result<(), ImageError> {
        let start = first * crate::memory::BLOCK as u64;
        let bytes = ((out.len() * crate::memory::BLOCK) as u64).min(self.0.shard_bytes(shard) - start);
        let mut buffer = vec![0; bytes as usize];
        self.read(shard, start, &mut buffer)?;
        hash_into(&buffer, out);
        Ok(())
    }

    fn write(&self, _: usize, _: u64, _: &[u8]) -> Result<(), ImageError> {
        Ok(()) // nothing commits into the past
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_written_together() {
        let a = vec![0; 5 * GRAIN + 7];
        let mut b = a.clone();
        assert!(differing(&a, &b).is_empty());
        for at in [GRAIN, 3 * GRAIN - 1, 5 * GRAIN + 6] {
            b[at] = 1;
        }
        assert_eq!(differing(&a, &b), [GRAIN..3 * GRAIN, 5 * GRAIN..5 * GRAIN + 7]);
    }
}
