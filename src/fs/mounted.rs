//! Everything one mount knows and does: the weights, the view of them, the commits, and the facts that `status` shows.
//!
//! Lock order: `moving` (one open or move of the view at a time) before `readers`; `facts` is a leaf. Step holds are taken
//! inside `moving`, never the other way round.

use super::ctl::Command;
use super::status::{CommandFacts, CommitFacts, ReaderFacts, SourceFacts, Status, ViewFacts};
use super::{FsError, JobFacts};
use crate::commit::{CommitError, CommitInfo, CommitRequest, Committer, Snapshot};
use crate::image::{Image, ShardBytes};
use crate::model::ModelDirectory;
use crate::source::{HoldGuard, Place};
use crate::view::{CopiedShards, Opened, Reader, Readers};
use parking_lot::Mutex;
use rustix::io::Errno;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

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
    moving: Mutex<()>,
    readers: Mutex<Readers>,
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
    ) -> Result<Mounted, FsError> {
        let directory = image.directory().clone();
        let (view, why_direct) = view_for(&image, options)?;
        let mtime = directory.shards.iter().map(|s| std::fs::metadata(&s.path)?.modified());
        let facts = Facts {
            doing: None,
            dirty: "unknown",
            gone: None,
            last_command: None,
            last_error: None,
            mtime: mtime.collect::<Result<_, std::io::Error>>()?,
            changed_at: SystemTime::now(),
        };
        let step = committer.as_ref().map_or(0, |c| c.step());
        Ok(Mounted {
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
            readers: Mutex::new(Readers::new(options.hold)),
            snapshots: Mutex::default(),
            frozen: Mutex::default(),
            commanding: Mutex::default(),
            step: AtomicU64::new(step),
            view_step: AtomicU64::new(step),
            view_ready: AtomicBool::new(false),
            version: AtomicU64::new(1),
            facts: Mutex::new(facts),
            events: OnceLock::new(),
        })
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

    fn tell(&self, event: Event) {
        if let Some(tell) = self.events.get() {
            tell(event);
        }
    }

    /// Something that `status` shows has changed.
    fn changed(&self) {
        self.facts.lock().changed_at = SystemTime::now();
        self.version.fetch_add(1, Ordering::AcqRel);
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
        }
    }

    fn engine_gone(&self, why: &str) {
        {
            let mut facts = self.facts.lock();
            if facts.gone.is_some() {
                return;
            }
            facts.gone = Some(why.to_string());
            facts.last_error = Some(why.to_string());
        }
        log::error!("{why}");
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
            } else {
                self.facts.lock().last_error = Some(e.message.clone());
                self.changed();
            }
        }
        result
    }

    // -- reading --

    /// Fills the view for the first time and finds out what differs from disk; runs beside the mount.
    pub fn prepare(&self) {
        if self.view.is_some() {
            let _turn = self.moving.lock();
            let _ = self.noted(self.move_view());
        }
        if self.image.source().is_own() {
            // Loaded from the files a moment ago.
            self.facts.lock().dirty = "no";
            self.changed();
        } else if let Some(committer) = &self.committer {
            let dirty = committer.ensure_baseline(&|_| {}).and_then(|()| committer.dirty_blocks(&*self.image));
            match dirty {
                Ok(blocks) => self.facts.lock().dirty = if blocks > 0 { "yes" } else { "no" },
                Err(e) => {
                    let _ = self.noted::<()>(Err(commit_error(e)));
                }
            }
            self.changed();
        }
    }

    /// Whether an open would have to wait for the view.
    pub fn open_may_wait(&self) -> bool {
        self.view.is_some() && !self.readers.lock().holding(Instant::now())
    }

    /// Opens shard `shard` for process `pid`: brings the view to the newest step unless others hold it.
    pub fn open_weights(&self, handle: u64, shard: usize, pid: u32) -> Result<Served, FsError> {
        self.alive()?;
        let reader = |since| Reader { shard, pid, since };
        if self.view.is_none() {
            self.noted(self.image.check().map_err(FsError::from))?;
            self.readers.lock().add(handle, reader(Instant::now()));
            self.changed();
            return Ok(Served::Direct);
        }
        let _turn = self.moving.lock();
        // Looked at in our turn: whoever came before may have begun to hold the view.
        let before = self.readers.lock().before_open(Instant::now());
        if before == Opened::MoveFirst {
            self.noted(self.move_view())?;
        } else if !self.view.as_ref().is_some_and(CopiedShards::is_whole) {
            return Err(FsError::new(Errno::STALE, "the view is not of one step: the engine went while it moved"));
        }
        self.readers.lock().add(handle, reader(Instant::now()));
        self.changed();
        Ok(Served::Held)
    }

    pub fn close_weights(&self, handle: u64) {
        self.readers.lock().remove(handle);
        self.changed();
    }

    /// Reads shard bytes as they are shown. The whole of `dst` lies inside the shard.
    pub fn read_weights(&self, shard: usize, offset: u64, dst: &mut [u8]) -> Result<(), FsError> {
        match &self.view {
            Some(view) => {
                self.alive()?;
                let n = view.read(shard, offset, dst)?;
                if n < dst.len() {
                    return Err(FsError::new(Errno::IO, "the view is shorter than its shard"));
                }
                Ok(())
            }
            None => {
                self.alive()?;
                self.noted(self.read_live(shard, offset, dst))
            }
        }
    }

    fn read_live(&self, shard: usize, offset: u64, dst: &mut [u8]) -> Result<(), FsError> {
        let _hold = self.image.hold()?;
        self.image.read(shard, offset, dst)?;
        Ok(self.image.check()?)
    }

    /// Brings the view to the live step. The caller has `moving`.
    fn move_view(&self) -> Result<(), FsError> {
        let Some(view) = &self.view else { return Ok(()) };
        let own = self.image.source().is_own();
        let step = self.step.load(Ordering::Acquire);
        if own && view.is_whole() && self.view_step.load(Ordering::Acquire) == step {
            return Ok(());
        }
        let began = Instant::now();
        let refreshed = view.refresh(&*self.image)?;
        log::debug!("view: {} blocks in {:?}", refreshed.blocks, began.elapsed());
        self.view_ready.store(true, Ordering::Release);
        if refreshed.filled {
            self.view_step.store(step, Ordering::Release);
        } else if refreshed.blocks > 0 {
            self.weights_moved(step);
        }
        self.changed();
        Ok(())
    }

    /// The view shows other bytes than before: steps that somebody else took are counted as we see them.
    fn weights_moved(&self, step: u64) {
        let step = if self.view_step.load(Ordering::Acquire) == step && !self.image.source().is_own() {
            self.step.fetch_add(1, Ordering::AcqRel) + 1
        } else {
            step
        };
        self.view_step.store(step, Ordering::Release);
        let mut facts = self.facts.lock();
        facts.dirty = "yes";
        let now = SystemTime::now();
        for mtime in &mut facts.mtime {
            // Forward always, even when the clock went back: that is how rsync and make notice.
            *mtime = now.max(*mtime + Duration::from_nanos(1));
        }
        drop(facts);
        self.tell(Event::ViewMoved);
    }

    // -- commands --

    /// Runs one command to its end; one at a time. Returns what it did in a sentence.
    pub fn command(&self, command: &Command) -> Result<String, FsError> {
        let result = match self.commanding.try_lock() {
            Some(_turn) => self.run(command),
            None => Err(FsError::new(Errno::BUSY, "another command is running: try again when `status` shows its end")),
        };
        let facts = CommandFacts {
            command: command.name().to_string(),
            result: result.as_ref().map_or_else(|e| errno_name(e.errno), |_| "ok".into()),
            says: result.as_ref().map_or_else(|e| e.message.clone(), String::clone),
        };
        match &result {
            Ok(says) => log::info!("{}: {says}", command.name()),
            Err(e) => log::warn!("{}: {e}", command.name()),
        }
        self.facts.lock().last_command = Some(facts);
        self.changed();
        self.noted(result)
    }

    /// Waits for a running command to end, and lets no other begin.
    pub fn finish_command(&self) {
        std::mem::forget(self.commanding.lock());
    }

    /// A command that could not even be parsed is remembered as well.
    pub fn refused(&self, error: FsError) -> FsError {
        let says = error.message.clone();
        self.facts.lock().last_command =
            Some(CommandFacts { command: "?".into(), result: errno_name(error.errno), says });
        let _ = self.noted::<()>(Err(error.clone()));
        error
    }

    fn run(&self, command: &Command) -> Result<String, FsError> {
        match command {
            Command::Commit { message } => {
                self.doing(Some("committing"));
                let result = self.commit(message.as_deref());
                self.doing(None);
                result
            }
            Command::Refresh => self.refresh(),
            Command::Freeze => self.freeze(),
            Command::Thaw => match self.frozen.lock().take() {
                Some(_) => Ok("weights may change again".into()),
                None => Err(FsError::new(Errno::INVAL, "the weights are not frozen")),
            },
            Command::Train { .. } | Command::Cancel { .. } | Command::Pause | Command::Resume => Err(FsError::new(
                Errno::NOSYS,
                format!("this version of weightfs has no trainer, so '{}' does nothing", command.name()),
            )),
            Command::Rollback { id } => {
                self.doing(Some("rolling-back"));
                let result = self.rollback(*id);
                self.doing(None);
                result
            }
        }
    }

    fn doing(&self, what: Option<&'static str>) {
        self.facts.lock().doing = what;
        self.changed();
    }

    fn commit(&self, message: Option<&str>) -> Result<String, FsError> {
        let Some(committer) = &self.committer else {
            return Err(FsError::new(Errno::ROFS, "the mount is read-only"));
        };
        self.alive()?;
        committer.ensure_baseline(&|_| {}).map_err(commit_error)?;
        // Steps that another process took are not counted anywhere: what differs from the last commit is one at least.
        let committed = committer.newest().map_or(0, |c| c.step);
        let mut step = self.step.load(Ordering::Acquire);
        if !self.image.source().is_own() {
            step = step.max(committed + 1);
        }
        let request = CommitRequest::new(message.unwrap_or_default(), step);
        let report = committer.commit(&*self.image, &request).map_err(commit_error)?;
        if report.commit.is_some() {
            self.step.fetch_max(step, Ordering::AcqRel);
        }
        self.facts.lock().dirty = "no";
        Ok(report.to_string())
    }

    fn rollback(&self, id: u64) -> Result<String, FsError> {
        let committer = self.committer.as_ref().ok_or_else(|| FsError::new(Errno::ROFS, "the mount is read-only"))?;
        self.alive()?;
        if self.frozen.lock().is_some() {
            return Err(FsError::new(Errno::BUSY, "the weights are frozen: `thaw` first"));
        }
        committer.ensure_baseline(&|_| {}).map_err(commit_error)?;
        let report = committer.rollback(id, Some(&*self.image)).map_err(commit_error)?;
        if report.live_bytes > 0 {
            // Readers see it as they see a step: with the next open.
            self.step.fetch_add(1, Ordering::AcqRel);
            let mut facts = self.facts.lock();
            facts.dirty = "no";
        }
        Ok(format!("back at commit {id}: {}, {} bytes of live weights written", report.commit, report.live_bytes))
    }

    fn refresh(&self) -> Result<String, FsError> {
        self.alive()?;
        if self.view.is_none() {
            self.image.check()?;
            self.weights_moved(self.step.load(Ordering::Acquire));
            return Ok("weights are read where they are: caches were dropped".into());
        }
        let _turn = self.moving.lock();
        self.move_view()?;
        Ok(format!("the view shows step {}", self.view_step.load(Ordering::Acquire)))
    }

    fn freeze(&self) -> Result<String, FsError> {
        self.alive()?;
        let mut frozen = self.frozen.lock();
        if frozen.is_some() {
            return Err(FsError::new(Errno::BUSY, "the weights are frozen already: `thaw` first"));
        }
        let boundary = &self.image.source().boundary;
        *frozen = Some(boundary.freeze().map_err(|e| crate::image::ImageError::NoBoundary(e.seconds()))?);
        drop(frozen);
        if self.view.is_none() {
            // Pages that the kernel kept of an earlier step must not be mixed with the frozen one.
            self.tell(Event::ViewMoved);
        }
        Ok(format!("weights stand still at step {} until `thaw`", self.step.load(Ordering::Acquire)))
    }

    // -- commits as directories --

    fn committer(&self) -> Result<&Arc<Committer>, FsError> {
        self.committer.as_ref().ok_or_else(|| FsError::not_found("commits of a read-only mount"))
    }

    pub fn commit_ids(&self) -> Vec<u64> {
        self.committer.as_ref().map_or(Vec::new(), |c| c.history().iter().map(|c| c.id).collect())
    }

    pub fn commit_time(&self, id: u64) -> Result<SystemTime, FsError> {
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
        let snapshot = self.committer()?.snapshot(id).map_err(commit_error)?;
        snapshots.insert(id, (Arc::new(snapshot), 1));
        Ok(())
    }

    pub fn read_commit(&self, id: u64, shard: usize, offset: u64, dst: &mut [u8]) -> Result<(), FsError> {
        let snapshot = self.snapshots.lock().get(&id).map(|(s, _)| s.clone());
        let snapshot = snapshot.ok_or_else(|| FsError::new(Errno::BADF, "the commit is not open"))?;
        snapshot.read(shard, offset, dst).map_err(commit_error)
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

    // -- facts --

    pub fn status(&self) -> Status {
        let source = self.image.source();
        let count = |f: fn(&Place) -> bool| source.places.values().filter(|p| f(p)).count() as u64;
        let readers = self.readers.lock();
        let (open, pids) = (readers.len() as u64, readers.pids());
        let held = self.view.as_ref().and_then(|_| readers.remaining(Instant::now()));
        drop(readers);
        let frozen = self.frozen.lock().is_some();
        let newest = self.committer.as_ref().and_then(|c| c.newest());
        let facts = self.facts.lock();
        let state = match (&facts.gone, facts.doing) {
            (Some(_), _) => "failed",
            (None, Some(doing)) => doing,
            (None, None) if frozen => "frozen",
            (None, None) => "idle",
        };
        let (served, why) = match (&self.view, self.passthrough.get()) {
            (None, _) => ("direct", self.why_direct.clone()),
            (Some(_), Some(Ok(()))) => ("passthrough", None),
            (Some(_), Some(Err(why))) => ("copied", Some(why.clone())),
            (Some(_), None) => ("copied", None),
        };
        Status {
            state,
            model: self.directory.path.display().to_string(),
            mount_point: self.mount_point.display().to_string(),
            pid: std::process::id(),
            source: SourceFacts {
                engine: source.engines.first().map_or("own".into(), |e| match e.name.as_str() {
                    "" => "engine".into(),
                    name => name.to_string(),
                }),
                pids: source.engines.iter().filter_map(|e| e.pid).collect(),
                device: "cpu".into(),
                bytes: self.directory.bytes(),
                tensors: source.places.len() as u64,
                live: count(|p| matches!(p, Place::Live(_))),
                opaque: count(|p| matches!(p, Place::Opaque(_))),
                only_on_disk: count(|p| matches!(p, Place::OnlyOnDisk)),
                only_live: source.only_live.len() as u64,
                gone: facts.gone.clone(),
            },
            step: self.step.load(Ordering::Acquire),
            view: ViewFacts {
                step: match self.view {
                    Some(_) => self.view_step.load(Ordering::Acquire),
                    None => self.step.load(Ordering::Acquire),
                },
                served,
                why,
                bytes: self.view.as_ref().map_or(0, CopiedShards::bytes),
                ready: self.view.is_none() || self.view_ready.load(Ordering::Acquire),
            },
            readers: ReaderFacts { open, pids, hold_seconds_left: held.map(|d| d.as_secs()) },
            committed: newest.as_ref().map(commit_facts),
            dirty: facts.dirty,
            job: None::<JobFacts>,
            jobs_queued: 0,
            jobs: Vec::new(),
            last_command: facts.last_command.clone(),
            last_error: facts.last_error.clone(),
        }
    }
}

fn commit_facts(info: &CommitInfo) -> CommitFacts {
    CommitFacts { id: info.id, step: info.step, time: info.time_text() }
}

fn commit_error(e: CommitError) -> FsError {
    FsError::new(Errno::from_raw_os_error(e.errno()), e.to_string())
}

fn errno_name(errno: Errno) -> String {
    let known = [
        (Errno::INVAL, "EINVAL"),
        (Errno::TOOBIG, "E2BIG"),
        (Errno::BUSY, "EBUSY"),
        (Errno::NOSPC, "ENOSPC"),
        (Errno::IO, "EIO"),
        (Errno::STALE, "ESTALE"),
        (Errno::ROFS, "EROFS"),
        (Errno::NOSYS, "ENOSYS"),
        (Errno::NOENT, "ENOENT"),
        (Errno::NOMEM, "ENOMEM"),
        (Errno::PERM, "EPERM"),
        (Errno::ACCESS, "EACCES"),
    ];
    let name = known.iter().find(|(e, _)| *e == errno).map(|(_, name)| name.to_string());
    name.unwrap_or_else(|| format!("errno {}", errno.raw_os_error()))
}

/// Copies of all shards if they fit beside what else the machine needs, or why not.
fn view_for(image: &Arc<Image>, options: &ViewOptions) -> Result<(Option<CopiedShards>, Option<String>), FsError> {
    let bytes = image.directory().bytes();
    if options.mode == ViewMode::Live {
        return Ok((None, Some("asked for by --view live".into())));
    }
    let available = available_memory().unwrap_or(u64::MAX);
    // A tenth is left for the rest of the machine.
    if options.mode == ViewMode::Auto && bytes > available / 10 * 9 {
        let why = format!("a copy of the weights takes {bytes} bytes and {available} are available");
        return Ok((None, Some(why)));
    }
    let name = image.directory().path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    Ok((Some(CopiedShards::new(&**image, &name)?), None))
}

/// What the kernel thinks can be had without swapping (`MemAvailable`, proc(5)), or what is left of our cgroup's limit.
fn available_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let machine = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024;
    Some(machine.min(cgroup_left().unwrap_or(u64::MAX)))
}

fn cgroup_left() -> Option<u64> {
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|l| l.strip_prefix("0::"))?;
    let read = |name: &str| std::fs::read_to_string(format!("/sys/fs/cgroup{path}/{name}")).ok();
    let max: u64 = read("memory.max")?.trim().parse().ok()?;
    let current: u64 = read("memory.current")?.trim().parse().ok()?;
    Some(max.saturating_sub(current))
}
