//! Commits: atomic, durable records of the live weights in the model directory on disk. `docs/commits.md` says what users
//! are promised, `docs/format.md` what every file in `.weightfs/` holds.
//!
//! A commit finds the changed blocks ([`find`]), stages them ([`stage`]), logs a record of the changed elements
//! ([`journal`], [`record`]), whose last sync is the commit point, and folds the blocks into the weights files ([`fold`]).
//! Everything else reads the log: recovery, history, rollback, snapshots.
//!
//! Locks, in this order: `writer` in `.weightfs/` (between processes, for life), [`Committer`]'s `working` (one command
//! at a time), `lock` in `.weightfs/` (between processes, while folding), `published` (what the others may see; held for
//! moments).

mod baseline;
mod blocks;
mod container;
mod delta;
mod disk;
mod error;
mod find;
mod fold;
mod history;
mod journal;
mod layout;
mod lock;
mod optimizer;
mod past;
mod policy;
mod protocol;
mod record;
mod recover;
mod replay;
mod report;
mod rollback;
mod snapshot;
mod stage;
mod state;
pub mod storage;
mod verify;

pub use disk::DiskStorage;
pub use error::CommitError;
pub use history::{history_readonly, verify_readonly};
pub use optimizer::{OptimizerState, OptimizerTensor};
pub use policy::{FoldPolicy, Keep, Options};
pub use report::{CommitInfo, CommitReport, FoldOutcome, Phase, PhaseTimes, Progress, Recovery, VerifyReport};
pub use rollback::RollbackReport;
pub use snapshot::Snapshot;

use crate::image::ShardBytes;
use crate::memory::Hash;
use crate::model::ModelDirectory;
use blocks::Table;
use layout::Layout;
use parking_lot::{Mutex, RwLock};
use record::Record;
use state::State;
use std::collections::BTreeMap;
use std::sync::Arc;
use storage::{Lock, Storage};

/// The one writer of a model directory's `.weightfs/`.
pub struct Committer {
    shared: Arc<Shared>,
    options: Options,
    /// One command at a time.
    working: Mutex<()>,
    _writer: Lock,
}

/// What snapshots need of the committer, and keep alive.
struct Shared {
    storage: Arc<dyn Storage>,
    layout: Layout,
    published: RwLock<Published>,
    /// Commits that snapshots are held of, and how many of each: what they need of pruned records is kept open.
    held: Mutex<BTreeMap<u64, usize>>,
}

/// The directory as far as it is durable.
struct Published {
    state: State,
    /// Records in the log, in order.
    records: Vec<Arc<Record>>,
    /// Pruned records, in order, that a snapshot still needs; before `records`.
    retired: Vec<Arc<Record>>,
    /// Of the newest commit, once known.
    baseline: Option<Baseline>,
}

#[derive(Clone)]
struct Baseline {
    table: Arc<Table>,
    root: Hash,
    /// The file `blocks` holds just this.
    stored: bool,
}

/// What goes with the live weights of one moment.
pub struct Moment {
    /// The step that they are of.
    pub step: u64,
    /// Committed with them; without, the state of the commit before stands.
    pub optimizer: Option<Box<dyn TakenState>>,
}

/// The optimizer's state of a moment on its way: copied while changed blocks are found and staged, and brought into its form
/// when training goes on.
pub trait TakenState: Send {
    /// Waits for its copies. Weights are held still until then.
    fn arrive(&mut self) -> Result<(), CommitError>;

    /// The state, after [`TakenState::arrive`].
    fn into_state(self: Box<Self>) -> Result<OptimizerState, CommitError>;
}

/// What to commit.
#[derive(Clone, Copy)]
pub struct CommitRequest<'a> {
    pub message: &'a str,
    /// The step that the live weights are of.
    pub step: u64,
    /// Committed with the weights; without, the state of the commit before stands.
    pub optimizer: Option<&'a OptimizerState>,
    /// Called once the weights are held still, for what goes with them at that moment, instead of `step` and
    /// `optimizer`: while a trainer runs nobody can say before. It must not ask for a hold. An error ends the commit.
    pub moment: Option<&'a (dyn Fn() -> Result<Moment, CommitError> + Sync)>,
    /// Called from any thread.
    pub progress: Option<&'a (dyn Fn(Progress) + Sync)>,
}

impl<'a> CommitRequest<'a> {
    pub fn new(message: &'a str, step: u64) -> CommitRequest<'a> {
        CommitRequest { message, step, optimizer: None, moment: None, progress: None }
    }
}

impl Committer {
    /// Takes the writer's lock, and brings the directory to its newest commit if a crash left it between two.
    pub fn open(directory: Arc<ModelDirectory>, options: Options) -> Result<(Committer, Recovery), CommitError> {
        let storage = Arc::new(DiskStorage::new(&directory.path));
        Committer::open_on(storage, &directory, options)
    }

    /// The same on any storage, whose weights files have the headers and sizes of `directory`.
    pub fn open_on(
        storage: Arc<dyn Storage>,
        directory: &ModelDirectory,
        options: Options,
    ) -> Result<(Committer, Recovery), CommitError> {
        recover::open(storage, Layout::of(directory), options)
    }

    /// `None` before the first commit.
    pub fn newest(&self) -> Option<CommitInfo> {
        let published = self.shared.published.read();
        published.records.last().map(|r| CommitInfo::of(r, published.state.folded))
    }

    /// Bytes of memory that a commit stages changed blocks in, at most.
    pub fn staging_bytes(&self) -> u64 {
        let all: u64 = self.shared.layout.shards.iter().map(|s| s.bytes).sum();
        self.options.staging_memory.min(all)
    }

    /// Bytes of memory that a commit encodes them in, at most.
    pub fn encoding_bytes(&self) -> u64 {
        journal::working_bytes(self.shared.layout.shards.iter().map(|s| s.bytes).sum())
    }

    /// Takes the memory that commits of `live` stage in, where that takes long (a GPU's driver pins it, and does nothing else
    /// for this process meanwhile).
    pub fn prepare(&self, live: &dyn ShardBytes) -> Result<(), CommitError> {
        stage::prepare(live, &self.shared.layout, self.options.staging_memory)
    }

    /// Oldest first.
    pub fn history(&self) -> Vec<CommitInfo> {
        let published = self.shared.published.read();
        published.records.iter().map(|r| CommitInfo::of(r, published.state.folded)).collect()
    }

    /// Step of the newest commit; 0 before the first.
    pub fn step(&self) -> u64 {
        self.shared.published.read().state.step
    }

    /// The commit that the weights files hold; the log has the rest.
    pub fn folded(&self) -> u64 {
        self.shared.published.read().state.folded
    }

    /// Blocks of the live weights that differ from the newest commit. Holds no step: while training goes on the number
    /// is of no one moment.
    pub fn dirty_blocks(&self, live: &dyn ShardBytes) -> Result<u64, CommitError> {
        let known = self.shared.published.read().baseline.clone();
        let baseline = match known {
            Some(baseline) => baseline,
            None => {
                let _working = self.working.lock();
                self.baseline(&|_| ())?
            }
        };
        let runs = find::find(live, &self.shared.layout, &baseline.table, None)?;
        Ok(runs.iter().map(|r| r.blocks).sum())
    }

    /// Whether weights with these hashes (a list a shard, one hash a block) are known to be those of the newest commit.
    pub fn are_newest(&self, hashes: &[&[Hash]]) -> bool {
        let known = self.shared.published.read().baseline.as_ref().map(|baseline| baseline.table.clone());
        known.is_some_and(|table| table.0.iter().map(Vec::as_slice).eq(hashes.iter().copied()))
    }

    /// Makes the live weights durable as the next commit. An error leaves the commit before standing, and the live
    /// weights as they are; trouble after the commit point is in the report's `fold`.
    pub fn commit(&self, live: &dyn ShardBytes, request: &CommitRequest<'_>) -> Result<CommitReport, CommitError> {
        let _working = self.working.lock();
        let wanted = protocol::Wanted { request: *request, within: None, rollback_to: None, folds: false };
        self.commit_locked(live, &wanted)
    }

    /// Brings the weights files up to the newest commit, whatever the policy.
    pub fn fold(&self) -> Result<FoldOutcome, CommitError> {
        let _working = self.working.lock();
        self.check_foreign()?;
        let outcome = self.fold_pending(None, &|_| ());
        self.prune()?;
        Ok(outcome)
    }

    /// Folds what a policy left in the log, so that the weights files may be read as the newest commit (to load them, or
    /// for tensors that no engine holds).
    /// Returns how many bytes that were.
    pub fn bring_up_to_date(&self) -> Result<u64, CommitError> {
        if self.newest().is_none_or(|c| c.folded) {
            return Ok(0);
        }
        match self.fold()? {
            FoldOutcome::Deferred { why } => Err(CommitError::NotFolded { why }),
            FoldOutcome::Folded { bytes, .. } => Ok(bytes),
            FoldOutcome::ByPolicy => Ok(0),
        }
    }

    /// The optimizer's state as of a commit, if it has one.
    pub fn optimizer_state(&self, id: u64) -> Result<Option<OptimizerState>, CommitError> {
        let record = self.shared.record(id)?;
        let facts = record.as_ref().and_then(|r| r.facts().optimizer.as_ref());
        facts.map(|f| optimizer::read(&self.shared.storage, &self.shared.layout, f)).transpose()
    }
}

impl Shared {
    /// The record of a commit that can be read; `None` for 0, the weights before the first commit.
    fn record(&self, id: u64) -> Result<Option<Arc<Record>>, CommitError> {
        self.record_in(&self.published.read(), id)
    }

    fn record_in(&self, published: &Published, id: u64) -> Result<Option<Arc<Record>>, CommitError> {
        let newest = published.state.newest;
        let oldest = published.records.first().map_or(0, |r| r.id());
        match id {
            _ if id > newest => Err(CommitError::NoSuchCommit { id, newest }),
            0 if oldest <= 1 => Ok(None),
            _ if id < oldest => Err(CommitError::Pruned { id, oldest }),
            _ => {
                let record = published.records.get((id - oldest) as usize).cloned();
                record.map(Some).ok_or_else(|| recover::missing(&self.layout, id))
            }
        }
    }
}
