//! Fold: brings the weights files up to the newest commit, by writing just the changed blocks in large sequential runs.
//!
//! A file that others share (a hub cache's blob, a hard link), and one whose last write or fsync failed, is not written
//! where it is: a private copy takes the changes, and its place once it is on the disk.

use super::error::CommitError;
use super::layout::{Layout, TensorLayout};
use super::replay::{Layer, Replay};
use super::stage::Staged;
use super::state::{ShardState, State};
use super::storage::{Access, Sharing, Stat, Storage, StoredFile};
use crate::memory::{BLOCK, Hash, block_hash};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Where private copies grow, on the file system of the model directory and out of its readers' sight.
pub const INCOMING: &str = ".weightfs/incoming";
/// Bytes of a shard read, changed and written at a time.
const WINDOW: usize = 4 << 20;

/// Where the changed blocks come from.
pub enum Source<'a> {
    /// The commit just logged, still in memory.
    Staged(&'a Staged),
    /// The log: new sides of the records not folded yet, in order.
    Log(&'a [Layer]),
}

/// Byte ranges written.
type Runs = Vec<Range<u64>>;

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Folded {
    pub blocks: u64,
    pub bytes: u64,
}

pub struct Fold<'a> {
    pub storage: &'a dyn Storage,
    pub layout: &'a Layout,
    pub source: Source<'a>,
    /// Hashes of the newest commit, to check what a file in doubt is rewritten from.
    pub table: Option<&'a super::blocks::Table>,
}

impl Fold<'_> {
    /// Writes every shard that has changes, and notes in `state` what the files look like now. After an error some are
    /// written, and the one that failed is in doubt if a write of it was begun; folding again ends in the same bytes.
    pub fn run(&self, state: &mut State, progress: &dyn Fn(u64)) -> Result<Folded, CommitError> {
        let (mut folded, newest) = (Folded::default(), state.newest);
        for shard in 0..self.layout.shards.len() {
            if !self.has_changes(shard) && !state.shards[shard].in_doubt {
                continue;
            }
            self.shard(shard, &mut folded, &mut state.shards[shard], newest)?;
            progress(folded.bytes);
        }
        Ok(folded)
    }

    fn has_changes(&self, shard: usize) -> bool {
        match self.source {
            Source::Staged(staged) => !staged.overlapping(shard, 0, u64::MAX).is_empty(),
            Source::Log(layers) => {
                self.layout.shards[shard].tensors.iter().any(|t| layers.iter().any(|l| l.record.has(&t.name)))
            }
        }
    }

    fn shard(&self, shard: usize, folded: &mut Folded, state: &mut ShardState, newest: u64) -> Result<(), CommitError> {
        let (in_doubt, before) = (state.in_doubt, state.stat);
        let name = &self.layout.shards[shard].name;
        let io = |doing| move |e| self.layout.io(doing, name, e);
        let sharing = self.storage.sharing(name).map_err(io("look at"))?;
        if !in_doubt && sharing == Sharing::Own {
            let file = self.storage.open(name, Access::ReadWrite).map_err(io("open"))?;
            // The name was looked at before: somebody may have made it lead elsewhere since.
            let found = file.stat().map_err(io("look at"))?;
            if (found.inode, found.bytes) != (before.inode, before.bytes) {
                let why = "another file took its place".into();
                return Err(CommitError::Foreign { path: self.layout.path(shard), commit: newest, why });
            }
            // From here on the file may be half written; one that could not even be opened is as it was.
            let sealed = self.write_blocks(shard, &file, folded).and_then(|()| self.seal(shard, &*file, before));
            state.in_doubt = sealed.is_err();
            state.stat = sealed?;
            return Ok(());
        }
        // The name may be a link to the file that others share; the copy takes the place of the link.
        let copy = format!("{INCOMING}/{name}");
        let copied = self.private_copy(shard, &copy, folded, in_doubt, before);
        let stat = copied.and_then(|stat| self.storage.rename(&copy, name).map_err(io("replace")).map(|()| stat));
        let stat = stat.inspect_err(|_| {
            let _ = self.storage.remove_file(&copy);
        })?;
        let synced = self.storage.sync_directory(".").map_err(io("replace"));
        // Until that works, the name may lead to the file before after a crash: the next copy syncs it anew.
        state.in_doubt = synced.is_err();
        synced?;
        state.stat = stat;
        Ok(())
    }

    /// Makes `copy` what the shard is to become.
    fn private_copy(
        &self,
        shard: usize,
        copy: &str,
        folded: &mut Folded,
        in_doubt: bool,
        before: Stat,
    ) -> Result<Stat, CommitError> {
        let name = &self.layout.shards[shard].name;
        let io = |doing| move |e| self.layout.io(doing, name, e);
        if in_doubt {
            self.storage.open(name, Access::Read).map_err(io("open"))?.forget_cache();
        }
        self.storage.create_directory(INCOMING).map_err(io("make a private copy of"))?;
        let file = self.storage.copy(name, copy).map_err(io("make a private copy of"))?;
        self.write_blocks(shard, &file, folded)?;
        if in_doubt {
            self.check(shard, &*file)?;
        }
        self.seal(shard, &*file, before)
    }

    fn write_blocks(&self, shard: usize, file: &Arc<dyn StoredFile>, folded: &mut Folded) -> Result<(), CommitError> {
        let io = |e| self.layout.io("write", &self.layout.shards[shard].name, e);
        match self.source {
            Source::Staged(staged) => {
                for run in staged.overlapping(shard, 0, u64::MAX) {
                    file.write_all_at(run.bytes(), run.start()).map_err(io)?;
                    folded.blocks += run.hashes.len() as u64;
                    folded.bytes += run.bytes().len() as u64;
                }
                Ok(())
            }
            Source::Log(layers) => self.write_from_log(shard, file, layers, folded),
        }
    }

    /// Tensors are decoded at the same time. Each is written up to its own ends only: a block that two share is written in
    /// two parts, which is as good, since every byte is an absolute value.
    fn write_from_log(
        &self,
        shard: usize,
        file: &Arc<dyn StoredFile>,
        layers: &[Layer],
        folded: &mut Folded,
    ) -> Result<(), CommitError> {
        let tensors = &self.layout.shards[shard].tensors;
        let mut changed: Vec<&TensorLayout> =
            tensors.iter().filter(|t| layers.iter().any(|l| l.record.has(&t.name))).collect();
        changed.sort_by_key(|t| std::cmp::Reverse(t.end - t.start));
        let written = changed
            .into_par_iter()
            .with_max_len(1)
            .map(|tensor| self.write_tensor(shard, tensor, file, layers))
            .collect::<Result<Vec<Runs>, CommitError>>()?;
        let mut runs: Vec<Range<u64>> = written.into_iter().flatten().collect();
        runs.sort_by_key(|r| r.start);
        let mut counted = 0;
        for run in runs {
            folded.bytes += run.end - run.start;
            let blocks = (run.start / BLOCK as u64).max(counted)..run.end.div_ceil(BLOCK as u64);
            folded.blocks += blocks.end - blocks.start;
            counted = blocks.end;
        }
        Ok(())
    }

    fn write_tensor(
        &self,
        shard: usize,
        tensor: &TensorLayout,
        file: &Arc<dyn StoredFile>,
        layers: &[Layer],
    ) -> Result<Runs, CommitError> {
        let mut source = Replay::new(self.layout, shard, file.clone(), layers);
        let mut buffer = vec![0; WINDOW.min((tensor.end - tensor.start) as usize)];
        let mut touched = vec![false; WINDOW / BLOCK + 1];
        let mut written = Vec::new();
        let mut at = tensor.start;
        while at < tensor.end {
            let end = ((at / WINDOW as u64 + 1) * WINDOW as u64).min(at + buffer.len() as u64).min(tensor.end);
            let window = &mut buffer[..(end - at) as usize];
            touched.fill(false);
            let first = at / BLOCK as u64;
            source.read(at, window, |i| touched[((at + i as u64) / BLOCK as u64 - first) as usize] = true)?;
            let mut block = first;
            while block * (BLOCK as u64) < end {
                let run = touched[(block - first) as usize..].iter().take_while(|t| **t).count() as u64;
                if run > 0 {
                    let (from, to) = ((block * BLOCK as u64).max(at), ((block + run) * BLOCK as u64).min(end));
                    let part = &window[(from - at) as usize..(to - at) as usize];
                    file.write_all_at(part, from)
                        .map_err(|e| self.layout.io("write", &self.layout.shards[shard].name, e))?;
                    written.push(from..to);
                }
                block += run + 1;
            }
            at = end;
        }
        Ok(written)
    }

    /// Moves the mtime forward, so that rsync and make notice, and makes the file durable.
    fn seal(&self, shard: usize, file: &dyn StoredFile, before: Stat) -> Result<Stat, CommitError> {
        let io = |e| self.layout.io("fsync", &self.layout.shards[shard].name, e);
        let mut mtime = now_ns().max(before.mtime_ns.saturating_add(1));
        file.set_mtime(mtime).map_err(io)?;
        // A file system that keeps whole seconds only needs the next one.
        if file.stat().map_err(io)?.mtime_ns <= before.mtime_ns {
            mtime = before.mtime_ns.saturating_add(2_000_000_000);
            file.set_mtime(mtime).map_err(io)?;
        }
        file.sync().map_err(io)?;
        file.stat().map_err(io)
    }

    /// Every block of a rewritten file is what was committed.
    fn check(&self, shard: usize, file: &dyn StoredFile) -> Result<(), CommitError> {
        let Some(table) = self.table else { return Ok(()) };
        let layout = &self.layout.shards[shard];
        let mut buffer = vec![0; BLOCK];
        for (block, known) in table.0[shard].iter().enumerate() {
            let bytes = &mut buffer[..layout.block_bytes(block as u64)];
            file.read_exact_at(bytes, (block * BLOCK) as u64).map_err(|e| self.layout.io("read", &layout.name, e))?;
            let hash: Hash = block_hash(bytes);
            if hash != *known {
                let why = format!("after a failed write its block {block} is not what was committed");
                return Err(CommitError::corrupt(self.layout.path(shard), why));
            }
        }
        Ok(())
    }
}

pub fn now_ns() -> i64 {
    // A clock before 1970 counts as 1970: the mtime still moves forward from the one before.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i64)
}
