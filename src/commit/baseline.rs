//! The block hashes of the newest commit: from `.weightfs/blocks` while the weights files are as weightfs left them, else
//! from the files themselves. And the reverse: weights files that somebody else changed are noticed here.

use super::blocks::Table;
use super::error::CommitError;
use super::layout::ShardLayout;
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
        self.publish(Baseline { table: Arc::new(table), root, stored: false });
        Ok(())
    }

    pub(super) fn baseline(&self, progress: &(dyn Fn(u64) + Sync)) -> Result<Baseline, CommitError> {
        let shared = &self.shared;
        if let Some(baseline) = &shared.published.read().baseline {
            return Ok(baseline.clone());
        }
        let changed = shared.changed_shards()?;
        let baseline = shared.compare(&changed, progress)?;
        shared.adopt(&changed)?;
        self.publish(baseline);
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
        shared.refuse_changes(&baseline.table, &changed, &|_| ())?;
        shared.adopt(&changed)
    }

    /// Makes the hashes of the newest commit known, here and in `.weightfs/blocks`.
    pub(super) fn publish(&self, baseline: Baseline) {
        let stored = baseline.stored;
        self.shared.published.write().baseline = Some(baseline);
        if !stored {
            self.store_blocks(None);
        }
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
    /// The table in `.weightfs/blocks`, when it is that of the newest commit.
    pub(super) fn stored_table(&self) -> Option<(Table, Hash)> {
        let (commit, newest) = {
            let published = self.published.read();
            (published.state.newest, published.records.last().cloned())
        };
        let stored = Table::load(&*self.storage, &self.layout, commit).unwrap_or_else(|e| {
            log::warn!("could not read {} ({e}): the weights are hashed instead", super::blocks::BLOCKS);
            None
        });
        stored.filter(|(_, root)| newest.is_none_or(|r| r.facts().root == hex(*root)))
    }

    /// The hashes of the newest commit. Refuses weights files that, with the log over them, are not what they say;
    /// `changed` are the shards of which that is in question.
    pub(super) fn compare(&self, changed: &[usize], progress: &(dyn Fn(u64) + Sync)) -> Result<Baseline, CommitError> {
        // Before the first commit files may change: they are hashed anew.
        let fixed = changed.is_empty() || self.newest_record().is_some();
        if let Some((table, root)) = self.stored_table().filter(|_| fixed) {
            self.refuse_changes(&table, changed, progress)?;
            return Ok(Baseline { table: Arc::new(table), root, stored: true });
        }
        let table = self.hash_committed(None, progress)?;
        let root = table.root();
        self.check_root(root)?;
        Ok(Baseline { table: Arc::new(table), root, stored: false })
    }

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
            let mut parts: Vec<(u64, &mut [Hash])> = Vec::new();
            let (mut first, mut rest) = (0, &mut hashes[..]);
            for end in ends(shard, !layers.is_empty()) {
                let (part, after) = rest.split_at_mut((end - first) as usize);
                parts.push((first * BLOCK as u64, part));
                (first, rest) = (end, after);
            }
            parts.into_par_iter().try_for_each(|(start, hashes)| {
                let mut replay = Replay::new(&self.layout, s, file.clone(), &layers);
                let mut buffer = vec![0; WINDOW as usize];
                for (i, hashes) in hashes.chunks_mut(WINDOW as usize / BLOCK).enumerate() {
                    let at = start + i as u64 * WINDOW;
                    let window = &mut buffer[..((hashes.len() * BLOCK) as u64).min(shard.bytes - at) as usize];
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

    /// Hashes `shards` and refuses them unless the hashes are the `known` ones.
    fn refuse_changes(
        &self,
        known: &Table,
        shards: &[usize],
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), CommitError> {
        if shards.is_empty() {
            return Ok(());
        }
        let now = self.hash_committed(Some(shards), progress)?;
        shards.iter().try_for_each(|&s| self.refuse_shard(s, &known.0[s], &now.0[s]))
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
}

/// The blocks before which tasks of [`BATCH`] bytes or more end. Layers decode a tensor from its start: over them no task
/// begins in the middle of one.
fn ends(shard: &ShardLayout, layered: bool) -> Vec<u64> {
    let batch = BATCH / BLOCK as u64;
    let mut ends = Vec::new();
    let mut end_at = |block: u64| {
        if block >= ends.last().copied().unwrap_or(0) + batch {
            ends.push(block);
        }
    };
    match layered {
        true => shard.tensors.iter().for_each(|t| end_at(t.start.div_ceil(BLOCK as u64))),
        false => (batch..shard.blocks()).step_by(batch as usize).for_each(end_at),
    }
    ends.push(shard.blocks());
    ends
}
