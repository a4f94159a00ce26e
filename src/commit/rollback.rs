//! Rollback: a new commit with the state of an earlier one, so that history only grows and no id ever means two things.
//! The weights files follow by folding it, and live weights are written back when they are given.

use super::error::CommitError;
use super::protocol::Wanted;
use super::report::CommitReport;
use super::snapshot::Snapshot;
use super::{CommitRequest, Committer};
use crate::image::{ImageError, ShardBytes, StepHold};
use crate::memory::{Hash, hash_into};

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
                    for (i, (then, now)) in then.chunks(GRAIN).zip(now.chunks(GRAIN)).enumerate() {
                        if then != now {
                            live.write(s, at + (i * GRAIN) as u64, then)?;
                            written += then.len() as u64;
                        }
                    }
                    at = stop;
                }
            }
        }
        Ok(written)
    }
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
