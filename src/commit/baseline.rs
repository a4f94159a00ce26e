//! The block hashes of the newest commit: from `.weightfs/blocks` while the weights files are as weightfs left them, else
//! from the files themselves. And the reverse: weights files that somebody else changed are noticed here.

use super::blocks::Table;
use super::error::CommitError;
use super::record::Record;
use super::replay::{Replay, WINDOW, layers};
use super::state::hex;
use super::storage::{Access, Stat};
use super::{Baseline, Committer, Shared};
use crate::memory::{BLOCK, Hash, hash_into};
use rayon::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that one task hashes.
const BATCH: u64 = 16 << 20;

impl Committer {
    /// Makes sure that the hashes of the newest commit are known. `progress` gets the bytes hashed so far.
    pub fn ensure_baseline(&self, progress: &(dyn Fn(u64) + Sync)) -> Result<(), CommitError> {
        let _working = self.working.lock();
        self.baseline(progress).map(|_| ())
    }

    /// For a caller that has just hashed the weights files itself: one list a shard, one hash a block, as of the newest
    /// commit.
    pub fn set_baseline(&self, tables: Vec<Vec<Hash>>) -> Result<(), CommitError> {
        let _working = self.working.lock();
        let table = Table(tables);
        let shared = &self.shared;
        if !table.fits(&shared.layout) {
            return Err(CommitError::corrupt(&shared.layout.root, "its hashes are not of all of its blocks"));
        }
        let root = table.root();
        shared.check_root(root)?;
        shared.adopt(&(0..shared.layout.shards.len()).collect::<Vec<_>>())?;
        shared.publish_baseline(table, root, false);
        self.store_blocks(None);
        Ok(())
    }

    pub(super) fn baseline(&self, progress: &(dyn Fn(u64) + Sync)) -> Result<Baseline, CommitError> {
        let shared = &self.shared;
        if let Some(baseline) = &shared.published.read().baseline {
            return Ok(baseline.clone());
        }
        let (state, newest) = {
            let published = shared.published.read();
            (published.state.clone(), published.records.last().cloned())
        };
        let changed = shared.changed_shards()?;
        let stored = Table::load(&*shared.storage, &shared.layout, state.newest)
            .map_err(|e| shared.layout.io("read", super::blocks::BLOCKS, e))?
            .filter(|(_, root)| newest.as_ref().is_none_or(|r| r.facts().root == hex(*root)));
        match stored {
            Some((table, root)) if changed.is_empty() => {
                shared.publish_baseline(table, root, true);
            }
            stored => {
                let table = shared.hash_committed(None, progress)?;
                let root = table.root();
                if newest.is_some()
                    && let Some((known, _)) = &stored
                {
                    shared.refuse_difference(known, &table)?;
                }
                shared.check_root(root)?;
                shared.adopt(&changed)?;
                shared.publish_baseline(table, root, false);
                self.store_blocks(None);
            }
        }
        match &shared.published.read().baseline {
            Some(baseline) => Ok(baseline.clone()),
            None => unreachable!("published above, and taken back by nobody"),
        }
    }

    /// Refuses weights files that another program changed since they were last known. Files that were only touched, and
    /// hold what was committed, are adopted.
    pub(super) fn check_foreign(&self) -> Result<(), CommitError> {
        let shared = &self.shared;
        let changed = shared.changed_shards()?;
        if changed.is_empty() {
            return Ok(());
        }
        let Some(baseline) = shared.published.read().baseline.clone() else {
            // Hashing the files compares them with the newest record.
            return self.baseline(&|_| ()).map(|_| ());
        };
        let now = shared.hash_committed(Some(&changed), &|_| ())?;
        for &shard in &changed {
            shared.refuse_shard(shard, &baseline.table.0[shard], &now.0[shard])?;
        }
        shared.adopt(&changed)
    }

    /// Writes `.weightfs/blocks`: all of it, or just `changes` when it holds the table before them. A failure costs
    /// hashing the files next time.
    pub(super) fn store_blocks(&self, changes: Option<&[super::blocks::Change]>) {
        let shared = &self.shared;
        let (baseline, commit) = {
            let published = shared.published.read();
            (published.baseline.clone(), published.state.newest)
        };
        let Some(baseline) = baseline else { return };
        match baseline.table.store(&*shared.storage, &shared.layout, commit, baseline.root, changes) {
            Ok(()) => {
                if let Some(baseline) = &mut shared.published.write().baseline {
                    baseline.stored = true;
                }
            }
            Err(e) => {
                log::warn!("could not write {} ({e}): the weights are hashed at the next start", super::blocks::BLOCKS)
            }
        }
    }
}

impl Shared {
    /// The shards that are not as weightfs left them. Those in doubt are expected to differ.
    pub(super) fn changed_shards(&self) -> Result<Vec<usize>, CommitError> {
        let state = self.published.read().state.clone();
        let mut changed = Vec::new();
        for (i, known) in state.shards.iter().enumerate() {
            let now = self.storage.stat(&known.name).map_err(|e| self.layout.io("look at", &known.name, e))?;
            if now.bytes != known.stat.bytes {
                let why = format!("it has {} bytes where {} were committed", now.bytes, known.stat.bytes);
                return Err(CommitError::Foreign { path: self.layout.path(i), commit: state.newest, why });
            }
            if now != known.stat && !known.in_doubt {
                changed.push(i);
            }
        }
        Ok(changed)
    }

    /// Takes the files as they are now for those that weightfs left.
    pub(super) fn adopt(&self, shards: &[usize]) -> Result<(), CommitError> {
        if shards.is_empty() {
            return Ok(());
        }
        let mut state = self.published.read().state.clone();
        for &i in shards {
            let name = &state.shards[i].name;
            let now: Stat = self.storage.stat(name).map_err(|e| self.layout.io("look at", name, e))?;
            state.shards[i].stat = now;
        }
        if state != self.published.read().state {
            state.store(&*self.storage, &self.layout)?;
            self.published.write().state = state;
        }
        Ok(())
    }

    /// Hashes the weights as of the newest commit from the files and the log; of shards not in `only`, nothing.
    pub(super) fn hash_committed(
        &self,
        only: Option<&[usize]>,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Table, CommitError> {
        let layers = {
            let published = self.published.read();
            layers(&published.records, published.state.folded, published.state.newest)
        };
        let done = AtomicU64::new(0);
        let shards = self.layout.shards.iter().enumerate().map(|(s, shard)| {
            let mut hashes = vec![0; shard.blocks() as usize];
            if only.is_some_and(|only| !only.contains(&s)) {
                return Ok(hashes);
            }
            let io = |e| self.layout.io("read", &shard.name, e);
            let file = self.storage.open(&shard.name, Access::Read).map_err(io)?;
            // With layers, a jump into a tensor decodes it from its start: then one task a shard is the least work.
            let batch = if layers.is_empty() { BATCH } else { shard.bytes.max(1).next_multiple_of(BATCH) };
            let parts: Vec<(usize, &mut [Hash])> = hashes.chunks_mut(batch as usize / BLOCK).enumerate().collect();
            parts.into_par_iter().try_for_each(|(i, hashes)| {
                let mut replay = Replay::new(&self.layout, s, file.clone(), &layers);
                let mut buffer = vec![0; WINDOW as usize];
                for (j, hashes) in hashes.chunks_mut(WINDOW as usize / BLOCK).enumerate() {
                    let at = i as u64 * batch + j as u64 * WINDOW;
                    let window = &mut buffer[..WINDOW.min(shard.bytes - at) as usize];
                    replay.read(at, window, |_| ())?;
                    hash_into(window, hashes);
                    progress(done.fetch_add(window.len() as u64, Ordering::Relaxed) + window.len() as u64);
                }
                Ok::<(), CommitError>(())
            })?;
            Ok(hashes)
        });
        Ok(Table(shards.collect::<Result<_, CommitError>>()?))
    }

    pub(super) fn newest_record(&self) -> Option<Arc<Record>> {
        self.published.read().records.last().cloned()
    }

    /// The files' hashes have to add up to the newest commit's.
    fn check_root(&self, root: Hash) -> Result<(), CommitError> {
        match self.newest_record() {
            Some(record) if record.facts().root != hex(root) => Err(CommitError::Foreign {
                path: self.layout.root.clone(),
                commit: record.id(),
                why: "its weights files do not hold what was committed".into(),
            }),
            _ => Ok(()),
        }
    }

    fn refuse_difference(&self, known: &Table, now: &Table) -> Result<(), CommitError> {
        known.0.iter().zip(&now.0).enumerate().try_for_each(|(s, (a, b))| self.refuse_shard(s, a, b))
    }

    fn refuse_shard(&self, shard: usize, known: &[Hash], now: &[Hash]) -> Result<(), CommitError> {
        match known.iter().zip(now).filter(|(a, b)| a != b).count() {
            0 => Ok(()),
            n => Err(CommitError::Foreign {
                path: self.layout.path(shard),
                commit: self.published.read().state.newest,
                why: format!("{n} of its {} blocks differ", known.len()),
            }),
        }
    }

    pub(super) fn publish_baseline(&self, table: Table, root: Hash, stored: bool) {
        self.published.write().baseline = Some(Baseline { table: Arc::new(table), root, stored });
    }
}
