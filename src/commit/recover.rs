//! Opening a directory: whatever a crash left is made into the newest commit that reached the log.

use super::error::CommitError;
use super::layout::Layout;
use super::record::{self, LOG, Record};
use super::replay::{Replay, WINDOW};
use super::report::{FoldOutcome, Recovery};
use super::state::State;
use super::storage::{Access, Storage};
use super::{Committer, Options, Published, Shared, fold, lock, optimizer, protocol};
use crate::model::STATE_DIR;
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use xxhash_rust::xxh3::Xxh3Default;

pub fn open(storage: Arc<dyn Storage>, layout: Layout, options: Options) -> Result<(Committer, Recovery), CommitError> {
    // Whoever made `.weightfs` (a mount's log goes there) need not have synced its entry.
    let new = storage.stat(super::state::STATE).is_err();
    let make = |path: &str| storage.create_directory(path).map_err(|e| layout.io("create", path, e));
    make(STATE_DIR)?;
    let writer = lock::lock_writer(&*storage, &layout, options.mount_point.clone())?;
    // There for readers to lock, whoever comes first.
    storage.try_lock(lock::READERS, false).map_err(|e| layout.io("create", lock::READERS, e))?;
    make(LOG)?;
    make(optimizer::OPTIMIZER)?;
    let sync = |path: &str| storage.sync_directory(path).map_err(|e| layout.io("fsync", path, e));
    if new {
        sync(STATE_DIR)?;
        sync(".")?;
    }
    let mut recovery = Recovery { removed_unfinished: remove_leftovers(&*storage, &layout)?, ..Recovery::default() };
    let ids = ids(&*storage, &layout)?;
    let records = ids
        .iter()
        .map(|&id| Record::open(&storage, &layout, id).map(Arc::new))
        .collect::<Result<Vec<_>, CommitError>>()?;
    let state = state(&*storage, &layout, &records)?;
    let named = records.iter().filter_map(|r| r.facts().optimizer.as_ref()).map(|o| o.file.as_str()).collect();
    optimizer::remove_unnamed(&*storage, &named).map_err(|e| layout.io("clean", optimizer::OPTIMIZER, e))?;
    recovery.newest = state.newest;
    recovery.pending = state.newest - state.folded;
    let published = Published { state, records, retired: Vec::new(), baseline: None };
    let shared = Shared { storage, layout, published: RwLock::new(published), held: Mutex::new(BTreeMap::new()) };
    let committer = Committer { shared: Arc::new(shared), options, working: Mutex::new(()), _writer: writer };
    recovery.fold = committer.finish_fold()?;
    Ok((committer, recovery))
}

/// Ids in the log, ascending and without gaps up to the newest. A prune that was cut short may leave older ones behind.
pub fn ids(storage: &dyn Storage, layout: &Layout) -> Result<Vec<u64>, CommitError> {
    let names = match storage.list(LOG) {
        Ok(names) => names,
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(layout.io("read", LOG, e)),
    };
    let mut ids: Vec<u64> = names.iter().filter_map(|n| record::id_of(n)).collect();
    ids.sort_unstable();
    let gap = ids.windows(2).rposition(|w| w[1] != w[0] + 1);
    Ok(gap.map_or(ids.clone(), |g| ids[g + 1..].to_vec()))
}

/// True when a commit had been under way.
fn remove_leftovers(storage: &dyn Storage, layout: &Layout) -> Result<bool, CommitError> {
    let commit = protocol::discard_unfinished(storage, None).map_err(|e| layout.io("clean", LOG, e))?;
    protocol::remove_tree(storage, fold::INCOMING).map_err(|e| layout.io("remove", fold::INCOMING, e))?;
    let temporary = format!("{}.tmp", super::state::STATE);
    match storage.remove_file(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(layout.io("remove", &temporary, e)),
        _ => Ok(commit),
    }
}

fn state(storage: &dyn Storage, layout: &Layout, records: &[Arc<Record>]) -> Result<State, CommitError> {
    let oldest = records.first().map_or(1, |r| r.id());
    let mut state = match State::load(storage, layout)? {
        Some(state) => state,
        None => {
            // A new directory; or one whose state was lost: then all of the log is folded again, which does no harm to
            // files that it is of. Whether these are is not known any more: they are compared with it first.
            let mut state = State::new(storage, layout)?;
            if !records.is_empty() {
                state.shards.iter_mut().for_each(|s| s.stat.inode = 0); // no file has it
            }
            (state.newest, state.folded) = (oldest - 1, oldest - 1);
            state.store(storage, layout)?;
            state
        }
    };
    check_log(layout, &state, records)?;
    if let Some(newest) = records.last() {
        state.newest = newest.id();
        state.step = newest.facts().step;
    }
    Ok(state)
}

/// The log has the newest commit that the state knows of, and all that the weights files do not hold yet.
pub fn check_log(layout: &Layout, state: &State, records: &[Arc<Record>]) -> Result<(), CommitError> {
    let lost = match (records.first(), records.last()) {
        (_, None) if state.newest > 0 => state.newest,
        (_, Some(last)) if last.id() < state.newest => state.newest,
        (Some(first), _) if state.folded + 1 < first.id() => state.folded + 1,
        _ => return Ok(()),
    };
    Err(missing(layout, lost))
}

pub fn missing(layout: &Layout, id: u64) -> CommitError {
    CommitError::corrupt(layout.root.join(LOG), format!("commit {id} is not in it"))
}

impl Committer {
    /// Folds what the log has beyond the weights files, where the policy says so or a fold was cut short. `None` when
    /// there was nothing to do.
    fn finish_fold(&self) -> Result<Option<FoldOutcome>, CommitError> {
        let (pending, in_doubt) = {
            let published = self.shared.published.read();
            let state = &published.state;
            let in_doubt = |&s: &usize| state.shards[s].in_doubt;
            (state.newest - state.folded, (0..state.shards.len()).filter(in_doubt).collect::<Vec<_>>())
        };
        if pending == 0 && in_doubt.is_empty() {
            return Ok(None);
        }
        let mut changed = self.shared.changed_shards()?;
        changed.extend(in_doubt);
        if changed.is_empty() {
            return Ok(Some(self.fold_by_policy(None, &|_| ())));
        }
        // The files are not as they were left: either by our own fold that was cut short, and then the log makes them
        // what was committed, or by somebody else, and then it does not. After a fold nobody could tell any more: it
        // leaves alone what the log does not change, and takes the files as they are then for our own.
        let baseline = self.shared.compare(&changed, &|_| ())?;
        // A fold writes only into files that look as they are known to.
        self.shared.adopt(&changed)?;
        self.publish(baseline);
        Ok(Some(self.fold_pending(None, &|_| ())))
    }
}

/// XXH3-128 of a tensor with `layers` over its file.
pub(super) fn hash_tensor(
    shared: &Shared,
    shard: usize,
    tensor: usize,
    layers: &[super::replay::Layer],
) -> Result<crate::memory::Hash, CommitError> {
    let layout = &shared.layout;
    let name = &layout.shards[shard].name;
    let file = shared.storage.open(name, Access::Read).map_err(|e| layout.io("read", name, e))?;
    let mut replay = Replay::new(layout, shard, file, layers);
    let tensor = &layout.shards[shard].tensors[tensor];
    let mut hasher = Xxh3Default::new();
    let mut buffer = vec![0; WINDOW.min(tensor.end - tensor.start) as usize];
    let mut at = tensor.start;
    while at < tensor.end {
        let window = &mut buffer[..WINDOW.min(tensor.end - at) as usize];
        replay.read(at, window, |_| ())?;
        hasher.update(window);
        at += window.len() as u64;
    }
    Ok(hasher.digest128())
}
