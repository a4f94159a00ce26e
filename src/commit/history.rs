//! The history of a directory: read without the writer's lock, and shortened by pruning.

use super::error::CommitError;
use super::layout::Layout;
use super::record::{self, LOG, Record, UNFINISHED};
use super::report::{CommitInfo, VerifyReport};
use super::state::State;
use super::storage::Storage;
use super::{Committer, DiskStorage, Keep, Published, Shared, optimizer, protocol, recover};
use crate::model::{ModelDirectory, ModelError};
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// The commits of a model directory, oldest first, whoever may be writing it. None when it never saw one.
pub fn history_readonly(directory: &Path) -> Result<Vec<CommitInfo>, CommitError> {
    let shared = match open_readonly(directory) {
        Err(CommitError::NoHistory { .. }) => return Ok(Vec::new()),
        other => other?,
    };
    let published = shared.published.read();
    Ok(published.records.iter().map(|r| CommitInfo::of(r, published.state.folded)).collect())
}

/// Checks without the writer's lock: the directory against its newest commit, or one commit against its checksums. What
/// a process that commits meanwhile writes may be reported as wrong.
pub fn verify_readonly(directory: &Path, id: Option<u64>) -> Result<VerifyReport, CommitError> {
    open_readonly(directory)?.verify(id)
}

fn open_readonly(directory: &Path) -> Result<Shared, CommitError> {
    let model = ModelDirectory::open(directory).map_err(|e| match e {
        ModelError::Io { path, source } => CommitError::io("read", path, source),
        other => CommitError::corrupt(directory, other.to_string()),
    })?;
    let (layout, storage) = (Layout::of(&model), Arc::new(DiskStorage::new(&model.path)));
    let storage: Arc<dyn Storage> = storage;
    let read = || -> Result<(State, Vec<Arc<Record>>), CommitError> {
        let Some(state) = State::load(&*storage, &layout)? else {
            return Err(CommitError::NoHistory { path: layout.root.clone() });
        };
        let ids = recover::ids(&*storage, &layout)?;
        let records: Result<Vec<_>, _> =
            ids.into_iter().map(|id| Record::open(&storage, &layout, id).map(Arc::new)).collect();
        let records = records?;
        recover::check_log(&layout, &state, &records)?;
        Ok((state, records))
    };
    // The process that writes may prune a record between the list and its reading, or all that the state just read says
    // is not folded: then the next time finds it in order.
    let (mut state, records) = read().or_else(|_| read()).or_else(|_| read())?;
    if let Some(newest) = records.last() {
        state.newest = state.newest.max(newest.id());
    }
    let published = Published { state, records, retired: Vec::new(), baseline: None };
    Ok(Shared { storage, layout, published: RwLock::new(published), held: Mutex::new(BTreeMap::new()) })
}

impl Committer {
    /// Removes the records of commits that are no longer to be kept. Those not folded yet stay.
    pub(super) fn prune(&self) -> Result<(), CommitError> {
        let Keep::Newest(keep) = self.options.keep else { return Ok(()) };
        let shared = &self.shared;
        let (layout, storage) = (&shared.layout, &*shared.storage);
        let mut pruned = false;
        loop {
            {
                // Under this lock no snapshot begins that would miss the record.
                let mut published = shared.published.write();
                let Some(record) = published.records.first().cloned() else { break };
                if published.records.len() as u64 <= keep.max(1) || record.id() > published.state.folded {
                    break;
                }
                // Snapshots need what later records replaced, and what was not folded when they began.
                if !shared.held.lock().is_empty() {
                    record.keep()?;
                }
                let gone = format!("{LOG}/{UNFINISHED}pruned-{}", record::name(record.id()));
                storage.rename(record.directory(), &gone).map_err(|e| layout.io("prune", record.directory(), e))?;
                published.records.remove(0);
                published.retired.push(record);
                shared.drop_unneeded(&mut published);
            }
            pruned = true;
        }
        if pruned {
            protocol::discard_unfinished(storage, None).map_err(|e| layout.io("prune", LOG, e))?;
            let published = shared.published.read();
            let named = published.records.iter().filter_map(|r| r.facts().optimizer.as_ref());
            let named = named.map(|o| o.file.as_str()).collect();
            optimizer::remove_unnamed(storage, &named).map_err(|e| layout.io("prune", optimizer::OPTIMIZER, e))?;
        }
        Ok(())
    }
}

impl Shared {
    /// Forgets pruned records that no snapshot needs: those at or before the oldest commit held.
    pub(super) fn drop_unneeded(&self, published: &mut Published) {
        let oldest = self.held.lock().keys().next().copied();
        published.retired.retain(|r| oldest.is_some_and(|oldest| oldest < r.id()));
    }
}
