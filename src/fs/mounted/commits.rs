//! `commits/ID/`: snapshots that are open, shared by those who read one commit.

use super::Mounted;
use crate::commit::Committer;
use crate::fs::FsError;
use rustix::io::Errno;
use std::sync::Arc;
use std::time::SystemTime;

impl Mounted {
    fn committer(&self) -> Result<&Arc<Committer>, FsError> {
        self.committer.as_ref().ok_or_else(|| FsError::not_found("commits of a read-only mount"))
    }

    pub fn commit_ids(&self) -> Vec<u64> {
        self.committer.as_ref().map_or(Vec::new(), |c| c.history().iter().map(|c| c.id).collect())
    }

    pub fn commit_time(&self, id: u64) -> Result<SystemTime, FsError> {
        // One that is open may be pruned already: its files are there until they are closed.
        if let Some((snapshot, _)) = self.snapshots.lock().get(&id)
            && let Some(commit) = snapshot.info()
        {
            return Ok(commit.time());
        }
        let history = self.committer()?.history();
        let commit = history.iter().find(|c| c.id == id).ok_or_else(|| FsError::not_found(id))?;
        Ok(commit.time())
    }

    /// Opens commit `id` for reading; its bytes stay as they are until [`Mounted::close_commit`].
    pub fn open_commit(&self, id: u64) -> Result<(), FsError> {
        let mut snapshots = self.snapshots.lock();
        if let Some((_, users)) = snapshots.get_mut(&id) {
            *users += 1;
            return Ok(());
        }
        let snapshot = self.committer()?.snapshot(id)?;
        snapshots.insert(id, (Arc::new(snapshot), 1));
        Ok(())
    }

    pub fn read_commit(&self, id: u64, shard: usize, offset: u64, dst: &mut [u8]) -> Result<(), FsError> {
        let snapshot = self.snapshots.lock().get(&id).map(|(s, _)| s.clone());
        let snapshot = snapshot.ok_or_else(|| FsError::new(Errno::BADF, "the commit is not open"))?;
        Ok(snapshot.read(shard, offset, dst)?)
    }

    pub fn close_commit(&self, id: u64) {
        let mut snapshots = self.snapshots.lock();
        if let Some((_, users)) = snapshots.get_mut(&id) {
            *users -= 1;
            if *users == 0 {
                snapshots.remove(&id);
            }
        }
    }
}
