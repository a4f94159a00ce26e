//! Everything one mount knows and does: the weights, the view of them, the commits, and the facts that `status` shows.
//!
//! Lock order: `moving` (one open or move of the view at a time) before `readers`; `facts` is a leaf. Step holds are taken
//! inside `moving`, never the other way round; under a hold the optimizer's state may be locked, and `facts`. Steps of our
//! own tell what they did ([`training`]) while everybody else is shut out: what they tell takes no hold.

mod attach;
mod commands;
mod commits;
mod facts;
mod reading;
mod training;

use super::FsError;
use super::status::CommandFacts;
use crate::commit::{Committer, Snapshot};
use crate::image::{Image, ShardBytes};
use crate::memory;
use crate::model::ModelDirectory;
use crate::source::{EngineHttpError, EngineHttpOptions, EngineSync, HoldGuard, ManifestId};
use crate::view::{CopiedShards, Readers};
use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{OnceLock, Weak};
use std::time::{Duration, Instant, SystemTime};
use training::Training;

/// How weights are to be shown (`--view`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ViewMode {
    /// Copies of one step, if there is memory for them.
    Auto,
    Held,
    /// Each read from where the weights are.
    Live,
}

#[derive(Debug, Clone)]
pub struct ViewOptions {
    pub mode: ViewMode,
    pub hold: Duration,
    /// The kernel tells of a close before it returns (FLUSH), and that the file is gone (RELEASE) without waiting for us:
    /// an open waits so long for the second. It is on its way, unless the descriptor was one of several, or a mapping is
    /// left.
    pub release: Duration,
}

impl Default for ViewOptions {
    fn default() -> ViewOptions {
        ViewOptions { mode: ViewMode::Auto, hold: Duration::from_secs(600), release: Duration::from_millis(500) }
    }
}

/// Where the reads of an open shard come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    Held,
    Direct,
}

/// What the adapter is told, to pass on to the kernel from a thread that serves no request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Bytes of the shards changed under files that are open.
    ViewMoved,
    StatusChanged,
}

/// One mount.
pub struct Mounted {
    pub directory: Arc<ModelDirectory>,
    pub image: Arc<Image>,
    pub mount_point: PathBuf,
    pub read_only: bool,
    /// uid and gid whose mount this is.
    pub owner: (u32, u32),
    committer: Option<Arc<Committer>>,
    view: Option<CopiedShards>,
    why_direct: Option<String>,
    /// Set by the adapter once it knows whether the kernel serves the view without us.
    passthrough: OnceLock<Result<(), String>>,
    /// Whoever opens or moves the view takes turns; in it, when the last move that failed did so, and why.
    moving: Mutex<Option<(Instant, FsError)>>,
    release: Duration,
    readers: Mutex<Readers>,
    /// Told when a weights file is gone from `readers`.
    released: Condvar,
    training: Training,
    /// The engine that is told of new weights over HTTP.
    engine: OnceLock<EngineSync>,
    /// For threads that outlive a call.
    me: Weak<Mounted>,
    snapshots: Mutex<HashMap<u64, (Arc<Snapshot>, usize)>>,
    frozen: Mutex<Option<HoldGuard>>,
    commanding: Mutex<()>,
    step: AtomicU64,
    view_step: AtomicU64,
    view_ready: AtomicBool,
    version: AtomicU64,
    facts: Mutex<Facts>,
    events: OnceLock<Box<dyn Fn(Event) + Send + Sync>>,
}

struct Facts {
    doing: Option<&'static str>,
    dirty: &'static str,
    gone: Option<String>,
    last_command: Option<CommandFacts>,
    last_error: Option<String>,
    /// The manifests that were tried and refused since the engine went.
    refused: Vec<ManifestId>,
    mtime: Vec<SystemTime>,
    changed_at: SystemTime,
}

impl Mounted {
    /// `committer` is `None` for a read-only mount.
    pub fn new(
        image: Arc<Image>,
        committer: Option<Arc<Committer>>,
        mount_point: PathBuf,
        options: &ViewOptions,
    ) -> Result<Arc<Mounted>, FsError> {
        let directory = image.directory().clone();
        let (view, why_direct) = view_for(&image, options)?;
        let mtime = directory.shards.iter().map(|s| std::fs::metadata(&s.path)?.modified());
        let facts = Facts {
            doing: None,
            dirty: "unknown",
            gone: None,
            last_command: None,
            last_error: None,
            refused: Vec::new(),
            mtime: mtime.collect::<Result<_, std::io::Error>>()?,
            changed_at: SystemTime::now(),
        };
        let training = Training::new(&directory, committer.as_ref(), &image)?;
        let step = committer.as_ref().map_or(0, |c| c.step());
        Ok(Arc::new_cyclic(|me| Mounted {
            directory,
            image,
            mount_point,
            read_only: committer.is_none(),
            owner: (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()),
            committer,
            view,
            why_direct,
            passthrough: OnceLock::new(),
            moving: Mutex::default(),
            release: options.release,
            readers: Mutex::new(Readers::new(options.hold)),
            released: Condvar::new(),
            training,
            engine: OnceLock::new(),
            me: me.clone(),
            snapshots: Mutex::default(),
            frozen: Mutex::default(),
            commanding: Mutex::default(),
            step: AtomicU64::new(step),
            view_step: AtomicU64::new(step),
            view_ready: AtomicBool::new(false),
            version: AtomicU64::new(1),
            facts: Mutex::new(facts),
            events: OnceLock::new(),
        }))
    }

    // -- what the adapter sets and asks --

    /// The shards' copies, if weights are served from copies.
    pub fn view(&self) -> Option<&CopiedShards> {
        self.view.as_ref()
    }

    /// Whether the kernel reads the view's files without us, or why not.
    pub fn set_passthrough(&self, outcome: Result<(), String>) {
        let _ = self.passthrough.set(outcome);
    }

    pub fn is_passthrough(&self) -> bool {
        matches!(self.passthrough.get(), Some(Ok(())))
    }

    pub fn on_event(&self, tell: Box<dyn Fn(Event) + Send + Sync>) {
        let _ = self.events.set(tell);
    }

    /// From now on the engine at a URL is told of new weights. Before the first job.
    pub fn tell_engine(&self, options: EngineHttpOptions) -> Result<(), EngineHttpError> {
        let me = self.me.clone();
        let moved = move || {
            if let Some(mounted) = me.upgrade() {
                mounted.changed();
            }
        };
        let _ = self.engine.set(EngineSync::start(options, moved)?);
        Ok(())
    }

    /// The weights have changed, and will not for a while: a job has ended, a rollback.
    fn weights_differ(&self) {
        if let Some(engine) = self.engine.get() {
            engine.changed(self.step.load(Ordering::Acquire));
        }
    }

    fn tell(&self, event: Event) {
        if let Some(tell) = self.events.get() {
            tell(event);
        }
    }

    /// Something that `status` shows has changed.
    fn changed(&self) {
        self.change(|_| ());
    }

    /// Changes what `status` shows: who sees it has the version with it.
    fn change(&self, change: impl FnOnce(&mut Facts)) {
        let mut facts = self.facts.lock();
        change(&mut facts);
        facts.changed_at = SystemTime::now();
        self.version.fetch_add(1, Ordering::AcqRel);
        drop(facts);
        self.tell(Event::StatusChanged);
    }

    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    pub fn changed_at(&self) -> SystemTime {
        self.facts.lock().changed_at
    }

    pub fn weights_mtime(&self, shard: usize) -> SystemTime {
        self.facts.lock().mtime[shard]
    }

    // -- the engine's life --

    /// Looks whether engine and memories are still there; called a few times a second.
    pub fn watch(&self) {
        if let Err(e) = self.image.check() {
            self.engine_gone(&e.to_string());
            self.attach_successor();
        }
    }

    /// Somebody was told that the engine is gone. It may have been the one before, of which something was still under way.
    fn engine_gone(&self, why: &str) {
        let source = {
            // Whoever attaches another engine does that before it takes `gone` back.
            let mut facts = self.facts.lock();
            let source = self.image.source();
            if facts.gone.is_some() || source.check().is_ok() {
                return;
            }
            facts.gone = Some(why.to_string());
            facts.last_error = Some(why.to_string());
            source
        };
        log::error!("{why}");
        // What it had is wanted by others, by its successor perhaps.
        source.release();
        self.changed();
        self.tell(Event::ViewMoved);
    }

    fn alive(&self) -> Result<(), FsError> {
        match &self.facts.lock().gone {
            Some(why) => Err(FsError::new(Errno::STALE, why.clone())),
            None => Ok(()),
        }
    }

    /// Notes an error for `status` and passes it on.
    fn noted<T>(&self, result: Result<T, FsError>) -> Result<T, FsError> {
        if let Err(e) = &result {
            if e.errno == Errno::STALE {
                self.engine_gone(&e.message);
            }
            let mut facts = self.facts.lock();
            if facts.gone.is_none() {
                facts.last_error = Some(e.message.clone());
                drop(facts);
                self.changed();
            }
        }
        result
    }
}

/// Copies of all shards if they fit beside what else the machine needs, or why not.
fn view_for(image: &Arc<Image>, options: &ViewOptions) -> Result<(Option<CopiedShards>, Option<String>), FsError> {
    let bytes = image.directory().bytes();
    if options.mode == ViewMode::Live {
        return Ok((None, Some("asked for by --view live".into())));
    }
    let available = memory::available().unwrap_or(u64::MAX);
    // A tenth is left for the rest of the machine.
    if options.mode == ViewMode::Auto && bytes > available / 10 * 9 {
        let why = format!("a copy of the weights takes {bytes} bytes and {available} are available");
        return Ok((None, Some(why)));
    }
    let name = image.directory().path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    Ok((Some(CopiedShards::new(&**image, &name)?), None))
}
