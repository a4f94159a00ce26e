//! The protocol of a commit from end to end: find, stage, log, fold.

use super::blocks::Change;
use super::container::{ContainerWriter, FileFacts};
use super::error::CommitError;
use super::find::find;
use super::fold::{Fold, Source};
use super::journal::{Journal, NewBytes, Streamed, touched_tensors};
use super::record::{self, Facts, Head, LOG, Record, ShardFacts, UNFINISHED, VALUES, XOR};
use super::replay::{Layer, layers};
use super::report::{CommitInfo, CommitReport, FoldOutcome, Phase, PhaseTimes, Progress};
use super::stage::{self, Staged};
use super::state::hex;
use super::storage::Lock;
use super::{Baseline, CommitRequest, Committer, FoldPolicy, fold, lock, optimizer};
use crate::image::ShardBytes;
use crate::memory::BLOCK;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// A commit as the committer's own commands ask for it.
pub(super) struct Wanted<'a> {
    pub request: CommitRequest<'a>,
    /// Where to look for changes, when that is known.
    pub within: Option<&'a [(usize, Range<u64>)]>,
    /// The optimizer's state is taken from that commit as well.
    pub rollback_to: Option<u64>,
    /// The weights files hold it when it is done, whatever the policy. While somebody reads them nothing is committed.
    pub folds: bool,
}

/// A record on the disk, and the table after it.
struct Logged {
    record: Arc<Record>,
    baseline: Baseline,
    changes: Vec<Change>,
}

impl Committer {
    /// `working` is held.
    pub(super) fn commit_locked(&self, live: &dyn ShardBytes, wanted: &Wanted) -> Result<CommitReport, CommitError> {
        let layout = &self.shared.layout;
        let baseline = self.baseline(&|_| ())?;
        self.check_foreign()?;
        let mut times = PhaseTimes::default();
        let tell = |phase, done, total| {
            if let Some(progress) = wanted.request.progress {
                progress(Progress { phase, done, total });
            }
        };

        stage::prepare(live, layout, self.options.staging_memory)?;
        let start = Instant::now();
        tell(Phase::Finding, 0, layout.shards.iter().map(|s| s.bytes).sum());
        let mut hold = Some(live.hold()?);
        let held = Instant::now();
        let mut moment = wanted.request.moment.map(|take| take()).transpose()?;
        let runs = find(live, layout, &baseline.table, wanted.within)?;
        times.find = start.elapsed();

        let start = Instant::now();
        let dirty: u64 = runs.iter().map(|r| r.blocks * BLOCK as u64).sum();
        tell(Phase::Staging, 0, dirty);
        let staged = match dirty <= self.options.staging_memory {
            true => Some(Staged::copy(live, layout, &baseline.table, &runs)?),
            false => None,
        };
        // Copied beside the blocks; of the same step as they are.
        let mut taken = moment.as_mut().and_then(|m| m.optimizer.take());
        taken.as_mut().map_or(Ok(()), |taken| taken.arrive())?;
        if staged.is_some() {
            // What was copied from an engine that is gone by now may be half a step.
            live.check()?;
            hold = None;
            times.held = held.elapsed();
        }
        times.stage = start.elapsed();

        let start = Instant::now();
        let optimizer = taken.map(|taken| taken.into_state()).transpose()?;
        let request = match &moment {
            Some(m) => CommitRequest { step: m.step, optimizer: optimizer.as_ref(), ..wanted.request },
            None => wanted.request,
        };
        let wanted = &Wanted { request, ..*wanted };
        let runs = staged.as_ref().map_or(runs, Staged::runs);
        let tensors = touched_tensors(layout, &runs);
        let bytes = |&(s, t): &(usize, usize)| {
            let tensor = &layout.shards[s].tensors[t];
            tensor.end - tensor.start
        };
        let total = tensors.iter().map(bytes).sum();
        let nothing = |times, readers_out| {
            let fold = self.fold_wanted(wanted, None, readers_out, &|_| ());
            Ok(CommitReport { commit: None, fold, times })
        };
        if runs.is_empty() && !self.optimizer_changed(wanted)? {
            return nothing(times, None);
        }
        // Before the commit, which would have to be taken back.
        let readers_out = wanted.folds.then(|| self.lock_out_readers()).transpose()?;
        let new = match &staged {
            Some(staged) => NewBytes::Staged(staged),
            None => NewBytes::Streamed(Streamed::new(live, layout, &baseline.table, &runs)?),
        };
        let Some(logged) = self.log(wanted, &baseline, &tensors, new, &|done| tell(Phase::Logging, done, total))?
        else {
            return nothing(times, readers_out);
        };
        if hold.take().is_some() {
            times.held = held.elapsed();
        }
        times.log = start.elapsed();
        let Logged { record, baseline: after, changes } = logged;
        {
            let mut published = self.shared.published.write();
            published.state.newest = record.id();
            published.state.step = record.facts().step;
            published.records.push(record.clone());
            published.baseline = Some(after);
        }

        let start = Instant::now();
        let fold = self.fold_wanted(wanted, staged.as_ref(), readers_out, &|done| tell(Phase::Folding, done, dirty));
        self.store_blocks(baseline.stored.then_some(&changes[..]));
        times.fold = start.elapsed();
        if let Err(e) = self.prune() {
            log::warn!("{e}");
        }
        Ok(CommitReport { commit: Some(CommitInfo::of(&record, self.folded())), fold, times })
    }

    /// Writes the record of the next commit: when this returns it, the commit is durable. `None` when the weights were
    /// found to be as they were after all.
    fn log(
        &self,
        wanted: &Wanted,
        baseline: &Baseline,
        tensors: &[(usize, usize)],
        new: NewBytes,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Option<Logged>, CommitError> {
        let (layout, storage) = (&self.shared.layout, &*self.shared.storage);
        let id = self.shared.published.read().state.newest + 1;
        let directory = unfinished(id);
        let place = format!("{LOG}/{}", record::name(id));
        // A record of this id is one whose last sync failed, so that nobody was told of it.
        discard_unfinished(storage, Some(&record::name(id))).map_err(|e| layout.io("clean", LOG, e))?;
        let logged = self.write_record(id, wanted, baseline, tensors, new, progress);
        if !matches!(logged, Ok(Some(_))) {
            // Best effort: recovery removes what is left, too.
            let _ = remove_tree(storage, &directory);
            let _ = storage.remove_file(&format!("{}/{}", optimizer::OPTIMIZER, optimizer::file_name(id)));
            return logged;
        }
        storage.rename(&directory, &place).map_err(|e| layout.io("write", &place, e))?;
        if let Err(e) = storage.sync_directory(LOG) {
            // The disk may hold the record under either name, so all of it stays until a sync works: the next commit's,
            // unless this one does. A crash before that may still bring the commit about, whole.
            let _ = storage.rename(&place, &directory).and_then(|()| discard_unfinished(storage, None));
            return Err(layout.io("fsync", LOG, e));
        }
        logged
    }

    /// All of the record, durable, under the name that does not count yet.
    fn write_record(
        &self,
        id: u64,
        wanted: &Wanted,
        baseline: &Baseline,
        tensors: &[(usize, usize)],
        new: NewBytes,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Option<Logged>, CommitError> {
        let (layout, storage) = (&self.shared.layout, &*self.shared.storage);
        let directory = &*unfinished(id);
        let io = |e| layout.io("write", directory, e);
        let tip: Vec<Layer> = {
            let published = self.shared.published.read();
            layers(&published.records, published.state.folded, published.state.newest)
        };
        storage.create_directory(directory).map_err(io)?;
        let names = || tensors.iter().map(|&(s, t)| layout.shards[s].tensors[t].name.as_str());
        let mut xor = ContainerWriter::create(storage, directory, XOR, names()).map_err(io)?;
        let mut values = ContainerWriter::create(storage, directory, VALUES, names()).map_err(io)?;
        let journal = Journal { storage, layout, layers: &tip, new: &new };
        let (totals, changed) = journal.write(tensors, &mut xor, &mut values, progress)?;
        let changes = match new {
            NewBytes::Staged(staged) => staged.changes(),
            NewBytes::Streamed(streamed) => streamed.into_changes()?,
        };
        if changes.is_empty() && !self.optimizer_changed(wanted)? {
            return Ok(None);
        }
        let mut table = (*baseline.table).clone();
        table.apply(&changes);
        let root = table.root();
        let optimizer = self.next_optimizer(id, wanted)?;
        let (xor, values) = (xor.finish().map_err(io)?, values.finish().map_err(io)?);
        let facts = Facts {
            format: record::FORMAT,
            id,
            time_ns: fold::now_ns() as u64,
            step: wanted.request.step,
            message: wanted.request.message.to_string(),
            rollback_to: wanted.rollback_to,
            changed_elements: totals.changed_elements,
            changed_bytes: totals.changed_bytes,
            changed_blocks: changes.iter().map(|c| c.hashes.len() as u64).sum(),
            root: hex(root),
            base_root: hex(baseline.root),
            shards: layout
                .shards
                .iter()
                .map(|s| ShardFacts { name: s.name.clone(), bytes: s.bytes, header: hex(s.header) })
                .collect(),
            xor,
            values,
            optimizer,
        };
        let head = Head::new(facts, changed.into_iter());
        head.write(storage, directory).map_err(io)?;
        storage.sync_directory(directory).map_err(io)?;
        let record = Arc::new(Record::new(&self.shared.storage, head, layout));
        let baseline = Baseline { table: Arc::new(table), root, stored: false };
        Ok(Some(Logged { record, baseline, changes }))
    }

    /// The optimizer's file that the next record names, written and durable.
    fn next_optimizer(&self, id: u64, wanted: &Wanted) -> Result<Option<FileFacts>, CommitError> {
        let Some(state) = wanted.request.optimizer else { return self.standing_optimizer(wanted) };
        let (layout, storage) = (&self.shared.layout, &*self.shared.storage);
        let facts = optimizer::write(storage, layout, id, state)?;
        storage.sync_directory(optimizer::OPTIMIZER).map_err(|e| layout.io("fsync", optimizer::OPTIMIZER, e))?;
        Ok(Some(facts))
    }

    /// The optimizer's file that stands when the request brings none.
    fn standing_optimizer(&self, wanted: &Wanted) -> Result<Option<FileFacts>, CommitError> {
        let record = match wanted.rollback_to {
            Some(id) => self.shared.record(id)?,
            None => self.shared.newest_record(),
        };
        Ok(record.and_then(|r| r.facts().optimizer.clone()))
    }

    fn optimizer_changed(&self, wanted: &Wanted) -> Result<bool, CommitError> {
        let now = self.shared.newest_record().and_then(|r| r.facts().optimizer.clone());
        let next = match wanted.request.optimizer {
            Some(state) => {
                Some(optimizer::facts(state).map_err(|e| self.shared.layout.io("write", optimizer::OPTIMIZER, e))?)
            }
            None => self.standing_optimizer(wanted)?,
        };
        Ok(match (now, next) {
            (Some(a), Some(b)) => !optimizer::is_same(&a, &b),
            (a, b) => a.is_some() != b.is_some(),
        })
    }

    /// Folds when a commit or else the policy says so; `readers_out` when readers are locked out already.
    fn fold_wanted(
        &self,
        wanted: &Wanted,
        staged: Option<&Staged>,
        readers_out: Option<Lock>,
        progress: &dyn Fn(u64),
    ) -> FoldOutcome {
        match readers_out {
            Some(lock) => self.fold_locked(staged, lock, progress),
            None if wanted.folds => self.fold_pending(staged, progress),
            None => self.fold_by_policy(staged, progress),
        }
    }

    /// Folds when the policy says so. `staged` holds the newest commit's blocks.
    pub(super) fn fold_by_policy(&self, staged: Option<&Staged>, progress: &dyn Fn(u64)) -> FoldOutcome {
        let pending = {
            let state = &self.shared.published.read().state;
            state.newest - state.folded
        };
        match self.options.fold {
            FoldPolicy::Never if pending > 0 => FoldOutcome::ByPolicy,
            FoldPolicy::Every(n) if 0 < pending && pending < n => FoldOutcome::ByPolicy,
            _ => self.fold_pending(staged, progress),
        }
    }

    /// Folds what is pending. The commits are safe in the log, so nothing that goes wrong here is more than a delay.
    pub(super) fn fold_pending(&self, staged: Option<&Staged>, progress: &dyn Fn(u64)) -> FoldOutcome {
        let nothing = {
            let state = &self.shared.published.read().state;
            state.folded == state.newest && !state.shards.iter().any(|s| s.in_doubt)
        };
        if nothing {
            return FoldOutcome::Folded { blocks: 0, bytes: 0 };
        }
        match self.lock_out_readers() {
            Ok(readers_out) => self.fold_locked(staged, readers_out, progress),
            Err(CommitError::NotFolded { why }) => deferred(why),
            Err(e) => deferred(e.to_string()),
        }
    }

    /// Until the lock is dropped nobody reads the weights files who asks first.
    fn lock_out_readers(&self) -> Result<Lock, CommitError> {
        let lock = lock::lock_out_readers(&*self.shared.storage, &self.shared.layout)?;
        lock.ok_or_else(|| CommitError::NotFolded { why: format!("somebody reads them under {}", lock::READERS) })
    }

    fn fold_locked(&self, staged: Option<&Staged>, _readers_out: Lock, progress: &dyn Fn(u64)) -> FoldOutcome {
        let (mut state, pending) = {
            let published = self.shared.published.read();
            (published.state.clone(), layers(&published.records, published.state.folded, published.state.newest))
        };
        let (layout, storage) = (&self.shared.layout, &*self.shared.storage);
        let baseline = self.shared.published.read().baseline.clone();
        let source = match staged {
            Some(staged) if pending.len() == 1 => Source::Staged(staged),
            _ => Source::Log(&pending),
        };
        let fold = Fold { storage, layout, source, table: baseline.as_ref().map(|b| &*b.table) };
        let folded = fold.run(&mut state, progress);
        if folded.is_ok() {
            state.folded = state.newest;
        }
        let stored = state.store(storage, layout);
        if let Err(e) = &stored {
            // On the disk the state is the one before, which makes the next start fold again. In memory too, but for
            // what the files look like.
            state.folded = self.shared.published.read().state.folded;
            log::warn!("{e}");
        }
        self.shared.published.write().state = state;
        match (folded, stored) {
            (Ok(folded), Ok(())) => FoldOutcome::Folded { blocks: folded.blocks, bytes: folded.bytes },
            (Err(e), _) | (_, Err(e)) => deferred(e.to_string()),
        }
    }
}

fn deferred(why: String) -> FoldOutcome {
    log::warn!("the weights files are not brought up to date yet: {why}");
    FoldOutcome::Deferred { why }
}

/// Where the record of a commit grows.
fn unfinished(id: u64) -> String {
    format!("{LOG}/{UNFINISHED}{}", record::name(id))
}

/// Removes what the log has of unfinished and pruned records, and the record `also`. They lose their names for good
/// first: a record that comes back after a crash comes back whole. True when there was any.
pub(super) fn discard_unfinished(storage: &dyn super::storage::Storage, also: Option<&str>) -> io::Result<bool> {
    let mut gone: Vec<String> = Vec::new();
    for name in storage.list(LOG)? {
        if name.starts_with(UNFINISHED) {
            gone.push(format!("{LOG}/{name}"));
        } else if also == Some(&name) {
            gone.push(format!("{LOG}/{UNFINISHED}failed-{name}"));
            storage.rename(&format!("{LOG}/{name}"), &format!("{LOG}/{UNFINISHED}failed-{name}"))?;
        }
    }
    if !gone.is_empty() {
        storage.sync_directory(LOG)?;
    }
    gone.iter().try_for_each(|directory| remove_tree(storage, directory))?;
    Ok(!gone.is_empty())
}

/// Removes a directory of files; none there is fine.
pub(super) fn remove_tree(storage: &dyn super::storage::Storage, directory: &str) -> io::Result<()> {
    let names = match storage.list(directory) {
        Ok(names) => names,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for name in names {
        storage.remove_file(&format!("{directory}/{name}"))?;
    }
    storage.remove_directory(directory)
}
