//! Jobs through `ctl`: the queue, which starts with the first of them, and what of it outlives the daemon.

use super::{Event, Mounted};
use crate::commit::{self, CommitError, Committer, TakenState};
use crate::fs::{FsError, job_file};
use crate::image::{Image, ImageError};
use crate::memory::cuda::add_search_process;
use crate::model::ModelDirectory;
use crate::source::Place;
use crate::train::queue::{self, QueueError};
use crate::train::state::{BadState, Taken};
use crate::train::{
    Architecture, Config, JobRecord, JobRecords, JobState, LiveWeights, Model, OptimizerState, Queue, Refusal, StepEnd,
    TextModel,
};
use parking_lot::Mutex;
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

/// No step of the optimizer: what is committed is of another state than the one at hand.
const UNCOMMITTED: u64 = u64::MAX;

/// The trainer of one mount.
pub(super) struct Training {
    /// `None` on a read-only mount.
    records: Option<JobRecords>,
    /// Of former lives: what the queue starts with.
    history: Vec<JobRecord>,
    /// Jobs that the last daemon left behind, a sentence each.
    cut: Vec<String>,
    queue: OnceLock<Queue>,
    /// Asked for before there was a queue.
    paused: AtomicBool,
    /// Threads that train; 0 for all cores.
    threads: AtomicUsize,
    /// Bytes of host memory that steps on a GPU may keep activations in; `None` for what they find.
    offload_memory: Mutex<Option<u64>>,
    /// The optimizer's step as of the newest commit, once a queue has taken its state from there.
    committed: Mutex<u64>,
}

impl Training {
    /// Reads the records of former lives. A job that ran or waited when the daemon ended is cut, and said so.
    pub(super) fn new(
        directory: &ModelDirectory,
        committer: Option<&Arc<Committer>>,
        image: &Image,
    ) -> Result<Training, FsError> {
        let (mut records, mut history, mut cut) = (None, Vec::new(), Vec::new());
        if let Some(committer) = committer {
            let opened = JobRecords::open(&directory.path);
            let (opened, mut known) = opened.map_err(|e| {
                let why = format!("the records of jobs in {}: {e}", directory.state_dir().display());
                FsError::new(crate::fs::error::errno_of(&e), why)
            })?;
            for job in known.iter_mut().filter(|job| !job.has_ended()) {
                let commit = committer.newest().map_or("the files".into(), |c| format!("commit {}", c.id));
                // A daemon that ended in order has written so; what another left may be of a while before it ended.
                let then = match job.ended_at {
                    0 => format!("ended unexpectedly, after step {} of {} or a later one", job.steps_done, job.steps),
                    _ => format!("ended after step {} of {}", job.steps_done, job.steps),
                };
                job.error = Some(match (job.state, image.source().is_own()) {
                    (JobState::Queued, _) => "the daemon ended before it began".into(),
                    (_, true) => format!("the daemon {then}: the weights are those of {commit} again"),
                    (_, false) => format!(
                        "the daemon {then}: the engine's weights are as it left them, the optimizer's state is that of {commit}"
                    ),
                });
                job.state = JobState::Cut;
                if job.ended_at == 0 {
                    job.ended_at = queue::now();
                }
                cut.push(format!("job {} was cut: {}", job.id, job.error.as_deref().unwrap_or_default()));
                opened.keep(job)?;
            }
            (records, history) = (Some(opened), known);
        }
        Ok(Training {
            records,
            history,
            cut,
            queue: OnceLock::new(),
            paused: AtomicBool::new(false),
            threads: AtomicUsize::new(0),
            offload_memory: Mutex::new(None),
            committed: Mutex::new(0),
        })
    }

    fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Release);
        match (self.queue.get(), paused) {
            (Some(queue), true) => queue.pause(),
            (Some(queue), false) => queue.resume(),
            (None, _) => {}
        }
    }

    /// How the jobs stand: paused, the one that runs, how many wait, and all that are known, oldest first.
    pub(super) fn jobs(&self) -> (bool, Option<JobRecord>, u64, Vec<JobRecord>) {
        match self.queue.get() {
            Some(queue) => {
                let status = queue.status();
                let waiting = status.queued.len() as u64;
                let mut all = status.history;
                all.extend(status.running.clone());
                all.extend(status.queued);
                all.sort_by_key(|job| job.id);
                (status.paused, status.running, waiting, all)
            }
            None => (self.paused.load(Ordering::Acquire), None, 0, self.history.clone()),
        }
    }
}

impl Mounted {
    /// How many threads train; 0 for all cores. Set before the first job.
    pub fn set_train_threads(&self, threads: usize) {
        self.training.threads.store(threads, Ordering::Release);
    }

    /// How many bytes of host memory steps on a GPU may keep activations in; by default what they find. Set before the first
    /// job.
    pub fn set_offload_memory(&self, bytes: Option<u64>) {
        *self.training.offload_memory.lock() = bytes;
    }

    /// Jobs that the last daemon left behind, a sentence each.
    pub fn cut_jobs(&self) -> &[String] {
        &self.training.cut
    }

    /// The running step is the last: jobs stand still to the end of the process, and are cut then.
    pub fn stop_jobs(&self) {
        self.training.set_paused(true);
    }

    /// From here to the end of the process no step begins to write: the one that writes now has ended. The record of the job
    /// that runs says after which.
    pub fn finish_steps(&self) {
        // A freeze is over with the mount; a step that waits for its end would keep us.
        drop(self.frozen.lock().take());
        if let Some(queue) = self.training.queue.get() {
            queue.stop();
        }
        std::mem::forget(self.image.source().boundary.step());
        let Training { records: Some(records), queue, .. } = &self.training else { return };
        let Some(queue) = queue.get() else { return };
        if queue.count_steps()
            && let Err(e) = records.keep_last(|| queue.running())
        {
            log::warn!("how far the running job came could not be kept: {e}");
        }
    }

    /// Whether a step was cut while it was written, as an error.
    pub(super) fn whole(&self) -> Result<(), FsError> {
        match self.image.source().updates.are_torn() {
            false => Ok(()),
            true => Err(ImageError::Torn.into()),
        }
    }

    /// Queues a job: a path as the writer of `ctl` means it, or JSON.
    pub(super) fn train(&self, job: &str, writer: u32) -> Result<String, FsError> {
        self.alive()?;
        self.whole()?;
        let Some(committer) = &self.committer else {
            return Err(FsError::new(Errno::ROFS, "the mount is read-only"));
        };
        let inline = job.starts_with('{');
        let (text, source) = match inline {
            true => (job.to_string(), "ctl".to_string()),
            false => job_file::read(job, writer)?,
        };
        let queue = self.queue()?;
        // Libraries that an engine on a GPU has are those that fit there.
        self.image.source().engines.iter().filter_map(|e| e.pid).for_each(add_search_process);
        let refused = |e: QueueError| {
            let message = if inline { e.to_string() } else { format!("{source}: {e}") };
            match e {
                QueueError::BadJob(_) => FsError::new(Errno::INVAL, message),
                QueueError::NoMemory { .. } => FsError::new(Errno::NOMEM, message),
                QueueError::NoSuchJob(_) => FsError::new(Errno::INVAL, message),
            }
        };
        // Not by the first commit, while the job's steps would wait for the driver.
        if let Err(e) = committer.prepare(&*self.image) {
            log::warn!("commits will stage more slowly: {e}");
        }
        let id = queue.submit(&text, &source).map_err(refused)?;
        let known = queue.job(id);
        let notes = known.as_ref().map_or(String::new(), |j| j.notes.iter().map(|n| format!("; {n}")).collect());
        let steps = known.map_or(0, |j| j.steps);
        Ok(format!("job {id} is queued: {steps} steps{notes}"))
    }

    pub(super) fn cancel(&self, id: u64) -> Result<String, FsError> {
        let none = QueueError::NoSuchJob(id);
        let cancelled = self.training.queue.get().map_or(Err(none), |queue| queue.cancel(id));
        cancelled.map_err(|e| FsError::new(Errno::INVAL, e.to_string()))?;
        Ok(format!("job {id} ends here; the steps it took stay"))
    }

    pub(super) fn pause(&self, paused: bool) -> Result<String, FsError> {
        if self.committer.is_none() {
            return Err(FsError::new(Errno::ROFS, "the mount is read-only"));
        }
        self.training.set_paused(paused);
        Ok(if paused { "jobs stand still after the running step until `resume`" } else { "jobs go on" }.into())
    }

    /// Refuses what must not happen beside a job.
    pub(super) fn no_jobs(&self, what: &str) -> Result<(), FsError> {
        match self.training.queue.get().and_then(Queue::busy_with) {
            None => Ok(()),
            Some(id) => {
                let why = format!("job {id} runs or waits: {what} when it has ended, or `cancel {id}` first");
                Err(FsError::new(Errno::BUSY, why))
            }
        }
    }

    /// The optimizer's state, for a commit that holds the weights of this moment; `None` when it stands as committed.
    pub(super) fn optimizer_to_commit(&self) -> Result<Option<Box<dyn TakenState>>, CommitError> {
        let Some(queue) = self.training.queue.get() else { return Ok(None) };
        let state = queue.state();
        let state = state.lock();
        if state.step == *self.training.committed.lock() {
            return Ok(None);
        }
        Ok(Some(Box::new(state.taken().map_err(optimizer_error)?)))
    }

    /// Takes the memory that a commit brings moments home to, before weights are held still for it.
    pub(super) fn prepare_optimizer(&self) -> Result<(), CommitError> {
        let Some(queue) = self.training.queue.get() else { return Ok(()) };
        // Not under the lock of the state, for which a step would wait.
        let remote = queue.state().lock().remote.clone();
        remote.prepare().map_err(optimizer_error)
    }

    /// A commit has made the optimizer's state of `step` durable.
    pub(super) fn optimizer_committed(&self, step: u64) {
        *self.training.committed.lock() = step;
    }

    /// The optimizer's steps so far, if there is one. The weights are held.
    pub(super) fn optimizer_step(&self) -> Option<u64> {
        Some(self.training.queue.get()?.state().lock().step)
    }

    /// The weights are those of the newest commit, after a rollback or in another engine: the optimizer's state becomes
    /// what was committed with them. If that cannot be used, a new one, and the error says so.
    pub(super) fn optimizer_as_committed(&self) -> Result<(), FsError> {
        let Some(queue) = self.training.queue.get() else { return Ok(()) };
        let (committed, state, result) = match self.newest_optimizer() {
            Ok(state) => (state.step, state, Ok(())),
            Err(e) => (UNCOMMITTED, OptimizerState::default(), Err(e)),
        };
        *self.training.committed.lock() = committed;
        *queue.state().lock() = state;
        result
    }

    /// The newest commit has not got the optimizer's state of the weights that are live.
    pub(super) fn optimizer_uncommitted(&self) {
        *self.training.committed.lock() = UNCOMMITTED;
    }

    fn newest_optimizer(&self) -> Result<OptimizerState, FsError> {
        let Some(committer) = &self.committer else { return Ok(OptimizerState::default()) };
        let Some(newest) = committer.newest() else { return Ok(OptimizerState::default()) };
        let unusable = |e: &dyn std::fmt::Display| {
            let why = format!(
                "the optimizer's state of commit {} cannot be used ({e}): `rollback ID` to one that can",
                newest.id
            );
            FsError::new(Errno::IO, why)
        };
        let committed = committer.optimizer_state(newest.id).map_err(|e: CommitError| unusable(&e))?;
        committed.map_or(Ok(OptimizerState::default()), |state| trained_form(&state).map_err(|e| unusable(&e)))
    }

    /// The queue, which the first job starts. Commands come one at a time.
    fn queue(&self) -> Result<&Queue, FsError> {
        if let Some(queue) = self.training.queue.get() {
            return Ok(queue);
        }
        let refused = |e: Refusal| {
            let opaque = match &e {
                Refusal::Tensor { name, .. } => match self.image.source().places.get(name) {
                    Some(Place::Opaque(why)) => format!(" (the engine has it in a form of its own: {why})"),
                    Some(Place::OnlyOnDisk) => " (no engine holds it)".into(),
                    _ => String::new(),
                },
                _ => String::new(),
            };
            FsError::new(Errno::OPNOTSUPP, format!("this model cannot be trained: {e}{opaque}"))
        };
        let directory = &self.directory.path;
        let config = Config::read(directory).map_err(refused)?;
        let architecture = Architecture::within(&config, self.directory.tensors().count()).map_err(refused)?;
        let mounted = self.me.clone();
        let ended = move |end| {
            if let Some(mounted) = mounted.upgrade() {
                mounted.step_ended(end);
            }
        };
        let mut weights = LiveWeights::new(self.image.clone(), ended);
        if let Some(engine) = self.engine.get().cloned() {
            weights = weights.around_steps(move || Box::new(engine.step_begins()));
        }
        let model = Model::new(architecture, Arc::new(weights)).map_err(refused)?;
        let state = self.newest_optimizer()?;
        *self.training.committed.lock() = state.step;
        let mounted = self.me.clone();
        let options = queue::Options {
            threads: self.training.threads.load(Ordering::Acquire),
            offload_memory: *self.training.offload_memory.lock(),
            history: self.training.history.clone(),
            next_id: self.training.records.as_ref().map_or(1, JobRecords::next_id),
            listener: Some(Box::new(move |job| {
                if let Some(mounted) = mounted.upgrade() {
                    mounted.job_moved(job);
                }
            })),
            paused: self.training.paused.load(Ordering::Acquire),
            ..queue::Options::default()
        };
        let queue = Queue::start(model, TextModel::read(directory), Arc::new(Mutex::new(state)), options)?;
        Ok(self.training.queue.get_or_init(|| queue))
    }

    /// A step has written; readers are still shut out.
    fn step_ended(&self, end: StepEnd) {
        match end {
            StepEnd::Taken => {
                let step = self.step.fetch_add(1, Ordering::AcqRel) + 1;
                if let Some(engine) = self.engine.get() {
                    engine.step_taken(step);
                }
                let mut facts = self.facts.lock();
                facts.dirty = "yes";
                if self.view.is_none() {
                    facts.weights_changed();
                    drop(facts);
                    self.tell(Event::ViewMoved);
                }
            }
            // Nobody is given a hold of these weights; the job says why.
            StepEnd::Torn => {}
        }
    }

    /// Something about a job is new: kept on disk, and told to pollers.
    fn job_moved(&self, job: &JobRecord) {
        if let Some(records) = &self.training.records
            && let Err(e) = records.keep(job)
        {
            log::warn!("the record of job {} could not be kept: {e}", job.id);
        }
        match (&job.state, &job.error) {
            (JobState::Failed, error) => {
                let why = format!("job {}: {}", job.id, error.as_deref().unwrap_or("failed"));
                log::error!("{why}");
                self.facts.lock().last_error = Some(why);
            }
            (JobState::Running, _) if job.steps_done > 0 => {}
            (state, _) => log::info!("job {} is {state:?}", job.id),
        }
        if job.has_ended() && job.steps_done > 0 {
            self.weights_differ();
        }
        self.changed();
    }
}

impl super::Facts {
    /// What readers see is new. Time goes forward always, even when the clock went back: that is how rsync and make
    /// notice.
    pub(super) fn weights_changed(&mut self) {
        let now = SystemTime::now();
        for mtime in &mut self.mtime {
            *mtime = now.max(*mtime + Duration::from_nanos(1));
        }
    }
}

fn optimizer_error(e: BadState) -> CommitError {
    CommitError::Optimizer(e.to_string())
}

/// The state as a commit keeps it.
impl TakenState for Taken {
    fn arrive(&mut self) -> Result<(), CommitError> {
        Taken::arrive(self).map_err(optimizer_error)
    }

    fn into_state(self: Box<Self>) -> Result<commit::OptimizerState, CommitError> {
        let (header, moments) = self.into_parts().map_err(optimizer_error)?;
        let tensor = |(name, bytes): (String, Vec<u8>)| {
            let shape = vec![bytes.len() as u64 / 4];
            commit::OptimizerTensor { name, dtype: "F32".into(), shape, bytes }
        };
        Ok(commit::OptimizerState { header, tensors: moments.into_iter().map(tensor).collect() })
    }
}

fn trained_form(state: &commit::OptimizerState) -> Result<OptimizerState, BadState> {
    let moment = |name: &str| {
        let found = state.tensors.binary_search_by(|t| t.name.as_str().cmp(name)).ok()?;
        Some(&state.tensors[found]).filter(|t| t.dtype == "F32").map(|t| &t.bytes[..])
    };
    OptimizerState::from_parts(&state.header, moment)
}
