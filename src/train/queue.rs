//! Jobs one after another, on a thread of their own. Everything that users ask for while a job runs (cancel, pause)
//! happens between two steps; what they want to know is in [`Queue::status`].

use super::job::{BadJob, Job, Plan};
use super::sample::TextModel;
use super::settings::Settings;
use super::state::OptimizerState;
use super::step::{Model, StepError};
use super::trainer::Trainer;
use parking_lot::{Condvar, Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long whoever ends the process waits for a step that is written to be counted.
const COUNTING: Duration = Duration::from_secs(10);

/// How a job stands, or ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    Queued,
    Running,
    Finished,
    Cancelled,
    Failed,
    /// The program ended while it ran or waited.
    Cut,
}

/// Everything that is told and kept of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    pub id: u64,
    pub state: JobState,
    /// Where it came from: a path, or what the submitter calls it.
    #[serde(default)]
    pub source: String,
    pub config: Settings,
    pub samples: u64,
    /// Samples run so far, of every epoch.
    #[serde(default)]
    pub samples_done: u64,
    /// Steps it has in all, and those done.
    pub steps: u64,
    pub steps_done: u64,
    /// Mean loss of every step done, before its update.
    pub losses: Vec<f32>,
    /// Tokens run so far, contexts included, and those that the loss counted.
    pub tokens: u64,
    pub trained_tokens: u64,
    /// Seconds in steps, without what these waited for readers, commits or a freeze.
    pub seconds: f64,
    /// Bytes predicted at its peak beyond the weights and the optimizer's state.
    pub memory: u64,
    /// Bytes of host memory that the last step on a GPU kept activations in.
    #[serde(default)]
    pub host_memory: u64,
    /// The optimizer's step when it began, and now.
    pub first_step: u64,
    pub last_step: u64,
    /// Seconds since 1970; 0 before the event. In the file of a job that runs, `ended_at` says that its daemon ended in order,
    /// after just these steps.
    pub queued_at: u64,
    pub started_at: u64,
    pub ended_at: u64,
    pub notes: Vec<String>,
    pub error: Option<String>,
}

impl JobRecord {
    pub fn has_ended(&self) -> bool {
        !matches!(self.state, JobState::Queued | JobState::Running)
    }

    pub fn tokens_per_second(&self) -> f64 {
        if self.seconds > 0.0 { self.tokens as f64 / self.seconds } else { 0.0 }
    }

    /// Seconds left, by the steps so far; `None` before the first.
    pub fn eta(&self) -> Option<f64> {
        (self.steps_done > 0).then(|| self.seconds / self.steps_done as f64 * (self.steps - self.steps_done) as f64)
    }
}

/// How the queue stands.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct QueueStatus {
    pub paused: bool,
    pub running: Option<JobRecord>,
    pub queued: Vec<JobRecord>,
    /// Ended jobs, oldest first.
    pub history: Vec<JobRecord>,
}

/// Why the queue would not do something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    #[error(transparent)]
    BadJob(#[from] BadJob),
    #[error(
        "the job needs {needs} beyond the weights at its peak, and {free} is free: shorten the samples, or lower step_tokens or rank"
    )]
    NoMemory { needs: String, free: String },
    #[error("there is no job {0} that waits or runs")]
    NoSuchJob(u64),
}

/// What happened, for whoever keeps records or wakes pollers. Called on the queue's thread, or the submitter's, with no
/// lock held.
pub type Listener = Box<dyn Fn(&JobRecord) + Send + Sync>;

pub struct Options {
    /// Threads of the operations; 0 for all cores.
    pub threads: usize,
    /// Bytes of host memory that steps on a GPU may keep activations in; `None` for what they find.
    pub offload_memory: Option<u64>,
    /// Jobs of former lives, whose ids are not given again. Those that ran or waited are shown as cut.
    pub history: Vec<JobRecord>,
    /// The first id to give, if those of `history` are below it.
    pub next_id: u64,
    /// Called after every step and every change of a job's state.
    pub listener: Option<Listener>,
    /// Bytes that a job may use; asked when a job comes in. By default what the system has available.
    pub free_memory: fn() -> u64,
    /// Begin nothing until [`Queue::resume`].
    pub paused: bool,
}

impl Default for Options {
    fn default() -> Options {
        let free_memory = || crate::memory::available().unwrap_or(u64::MAX);
        Options {
            threads: 0,
            offload_memory: None,
            history: Vec::new(),
            next_id: 1,
            listener: None,
            free_memory,
            paused: false,
        }
    }
}

/// A queue of jobs over one model.
pub struct Queue {
    shared: Arc<Shared>,
    model: Model,
    text: TextModel,
    state: Arc<Mutex<OptimizerState>>,
    free_memory: fn() -> u64,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    inner: Mutex<Inner>,
    /// Something to do, or to stop.
    changed: Condvar,
    /// A step is in its job's record, or there will be none.
    counted: Condvar,
    listener: Option<Listener>,
}

#[derive(Default)]
struct Inner {
    next_id: u64,
    paused: bool,
    stopping: bool,
    /// The thread waits between two steps, or has ended.
    standing: bool,
    cancel_running: bool,
    running: Option<JobRecord>,
    queued: VecDeque<(JobRecord, Plan)>,
    history: Vec<JobRecord>,
}

impl Queue {
    /// Starts the thread. `text` is the tokenizer and template of the same model.
    pub fn start(
        model: Model,
        text: TextModel,
        state: Arc<Mutex<OptimizerState>>,
        options: Options,
    ) -> std::io::Result<Queue> {
        let mut history = options.history;
        for job in &mut history {
            if !job.has_ended() {
                job.state = JobState::Cut;
                job.error = Some("the program ended before the job did".into());
            }
        }
        let next_id = history.iter().map(|j| j.id + 1).max().unwrap_or(1).max(options.next_id);
        let inner = Inner { next_id, history, paused: options.paused, ..Inner::default() };
        let (changed, counted) = (Condvar::new(), Condvar::new());
        let shared = Arc::new(Shared { inner: inner.into(), changed, counted, listener: options.listener });
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(options.threads)
            .thread_name(|i| format!("train-{i}"))
            .build()
            .map_err(std::io::Error::other)?;
        let mut trainer = Trainer::new(model.clone(), state.clone());
        trainer.offload_memory = options.offload_memory;
        let of_thread = shared.clone();
        let thread = std::thread::Builder::new().name("train".into()).spawn(move || of_thread.work(trainer, &pool))?;
        Ok(Queue { shared, model, text, state, free_memory: options.free_memory, thread: Some(thread) })
    }

    /// Checks a job whole, and queues it. `source` is where it came from. Returns its id.
    pub fn submit(&self, job: &str, source: &str) -> Result<u64, QueueError> {
        let model = &self.model;
        let plan = Job::parse(job)?.prepare(&self.text, &model.architecture, &*model.weights, &self.state)?;
        // On a GPU, what a running job holds goes back before this one begins.
        let free = match model.device().map_err(BadJob)? {
            Some(device) => {
                let (free, _) = device.memory().map_err(|e| BadJob(e.to_string()))?;
                free + model.held.load(std::sync::atomic::Ordering::Relaxed)
            }
            None => (self.free_memory)(),
        };
        if plan.memory > free {
            return Err(QueueError::NoMemory { needs: size(plan.memory), free: size(free) });
        }
        let id = {
            let mut inner = self.shared.inner.lock();
            inner.next_id += 1;
            inner.next_id - 1
        };
        let record = JobRecord {
            id,
            state: JobState::Queued,
            source: source.to_string(),
            config: plan.settings.clone(),
            samples: plan.samples.len() as u64,
            samples_done: 0,
            steps: plan.steps(),
            steps_done: 0,
            losses: Vec::new(),
            tokens: 0,
            trained_tokens: 0,
            seconds: 0.0,
            memory: plan.memory,
            host_memory: 0,
            first_step: 0,
            last_step: 0,
            queued_at: now(),
            started_at: 0,
            ended_at: 0,
            notes: plan.notes.clone(),
            error: None,
        };
        // Told before it can begin, so that what is told of a job is told in order.
        self.shared.tell(&record);
        self.shared.inner.lock().queued.push_back((record, plan));
        self.shared.changed.notify_all();
        Ok(id)
    }

    /// Takes a waiting job out, or ends the running one after its step.
    pub fn cancel(&self, id: u64) -> Result<(), QueueError> {
        let mut inner = self.shared.inner.lock();
        if inner.running.as_ref().is_some_and(|job| job.id == id) {
            inner.cancel_running = true;
            drop(inner);
            self.shared.changed.notify_all();
            return Ok(());
        }
        let at = inner.queued.iter().position(|(job, _)| job.id == id).ok_or(QueueError::NoSuchJob(id))?;
        let (mut record, _) = inner.queued.remove(at).expect("its place was found just now");
        record.state = JobState::Cancelled;
        record.ended_at = now();
        inner.history.push(record.clone());
        drop(inner);
        self.shared.tell(&record);
        Ok(())
    }

    /// Holds the queue, and a running job after its step.
    pub fn pause(&self) {
        self.shared.inner.lock().paused = true;
    }

    /// Nothing more is begun. A running step that fails from here on, with the process or its device going away around it, is
    /// not the job's failure: the job is cut.
    pub fn stop(&self) {
        self.shared.inner.lock().stopping = true;
        self.shared.changed.notify_all();
    }

    pub fn resume(&self) {
        self.shared.inner.lock().paused = false;
        self.shared.changed.notify_all();
    }

    /// Waits until a step that has been written is in the record of its job, and a job's last step has ended it. For a caller
    /// who holds the weights, in a queue that was stopped: from here on [`Queue::running`] says what they are. False if that
    /// takes too long.
    pub fn count_steps(&self) -> bool {
        let taken = self.state.lock().step;
        let counted = |job: &JobRecord| job.last_step >= taken && job.steps_done < job.steps;
        let deadline = Instant::now() + COUNTING;
        let mut inner = self.shared.inner.lock();
        // A step that was torn ends the thread uncounted.
        while !inner.standing && inner.running.as_ref().is_some_and(|job| !counted(job)) {
            if self.shared.counted.wait_until(&mut inner, deadline).timed_out() {
                return false;
            }
        }
        true
    }

    /// The job that runs, or stands still between its steps.
    pub fn running(&self) -> Option<JobRecord> {
        self.shared.inner.lock().running.clone()
    }

    /// Whether a paused queue has ended the step that ran: nothing moves until [`Queue::resume`].
    pub fn stands_still(&self) -> bool {
        let inner = self.shared.inner.lock();
        inner.paused && inner.standing
    }

    /// The job that runs or, with none, the next that waits.
    pub fn busy_with(&self) -> Option<u64> {
        let inner = self.shared.inner.lock();
        inner.running.as_ref().or(inner.queued.front().map(|(job, _)| job)).map(|job| job.id)
    }

    pub fn status(&self) -> QueueStatus {
        let inner = self.shared.inner.lock();
        QueueStatus {
            paused: inner.paused,
            running: inner.running.clone(),
            queued: inner.queued.iter().map(|(job, _)| job.clone()).collect(),
            history: inner.history.clone(),
        }
    }

    /// A job by its id, wherever it is.
    pub fn job(&self, id: u64) -> Option<JobRecord> {
        let inner = self.shared.inner.lock();
        let waiting = inner.queued.iter().map(|(job, _)| job);
        inner.running.iter().chain(waiting).chain(&inner.history).find(|job| job.id == id).cloned()
    }

    /// The optimizer's state. Whoever holds a step of the weights finds the state of that step.
    pub fn state(&self) -> Arc<Mutex<OptimizerState>> {
        self.state.clone()
    }
}

impl Drop for Queue {
    /// Ends after the running step. The job that ran, and those that wait, stay in their state: told to no listener, so
    /// that their records say so in the next life.
    fn drop(&mut self) {
        self.shared.inner.lock().stopping = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn tell(&self, job: &JobRecord) {
        if let Some(listener) = &self.listener {
            listener(job);
        }
    }

    fn work(&self, mut trainer: Trainer, pool: &rayon::ThreadPool) {
        while let Some((record, plan)) = self.next_job(&trainer) {
            self.tell(&record);
            self.run(&mut trainer, pool, &plan);
            trainer.release_buffers();
        }
        self.inner.lock().standing = true;
        self.counted.notify_all();
    }

    fn next_job(&self, trainer: &Trainer) -> Option<(JobRecord, Plan)> {
        let mut inner = self.inner.lock();
        loop {
            if inner.stopping {
                return None;
            }
            if !inner.paused
                && let Some((mut record, plan)) = inner.queued.pop_front()
            {
                record.state = JobState::Running;
                record.started_at = now();
                record.first_step = trainer.state.lock().step;
                record.last_step = record.first_step;
                inner.running = Some(record.clone());
                inner.cancel_running = false;
                return Some((record, plan));
            }
            self.stand(&mut inner);
        }
    }

    /// Waits for something to do.
    fn stand(&self, inner: &mut MutexGuard<Inner>) {
        inner.standing = true;
        self.counted.notify_all();
        self.changed.wait(inner);
        inner.standing = false;
    }

    /// Steps until the job is done, or is to end. Returns without a word when the queue stops.
    fn run(&self, trainer: &mut Trainer, pool: &rayon::ThreadPool, plan: &Plan) {
        for step in 0..plan.steps() {
            match self.wait_to_go_on() {
                Next::Step => {}
                Next::Cancel => return self.end(JobState::Cancelled, None),
                Next::Stop => return,
            }
            let start = Instant::now();
            let batch = plan.batch(step);
            let rate = plan.settings.rate(step);
            // A panic is a fault of ours: it ends the job with a message, and leaves the mount alive.
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                pool.install(|| trainer.step(&batch, &plan.settings, rate))
            }));
            let report = match result {
                Ok(Ok(report)) => report,
                Ok(Err(_)) | Err(_) if self.inner.lock().stopping => return,
                Ok(Err(e)) => return self.end(JobState::Failed, Some(failure(&e, step))),
                Err(_) => {
                    return self.end(JobState::Failed, Some(format!("step {} met a fault in weightfs", step + 1)));
                }
            };
            let took = start.elapsed();
            let mut inner = self.inner.lock();
            let job = inner.running.as_mut().expect("this job runs");
            job.steps_done += 1;
            job.samples_done += plan.samples_in(step) as u64;
            job.losses.push(report.loss as f32);
            job.tokens += report.rows as u64;
            job.trained_tokens += report.targets as u64;
            job.last_step += report.taken as u64;
            job.host_memory = report.host_memory;
            job.seconds += took.saturating_sub(report.waited).as_secs_f64();
            let record = job.clone();
            drop(inner);
            self.counted.notify_all();
            self.tell(&record);
        }
        self.end(JobState::Finished, None);
    }

    fn wait_to_go_on(&self) -> Next {
        let mut inner = self.inner.lock();
        loop {
            if inner.stopping {
                return Next::Stop;
            }
            if inner.cancel_running {
                return Next::Cancel;
            }
            if !inner.paused {
                return Next::Step;
            }
            self.stand(&mut inner);
        }
    }

    fn end(&self, state: JobState, error: Option<String>) {
        let mut inner = self.inner.lock();
        let mut record = inner.running.take().expect("this job runs");
        record.state = state;
        record.error = error;
        record.ended_at = now();
        inner.history.push(record.clone());
        drop(inner);
        self.counted.notify_all();
        self.tell(&record);
    }
}

enum Next {
    Step,
    Cancel,
    Stop,
}

fn failure(e: &StepError, step: u64) -> String {
    format!("step {}: {e}", step + 1)
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn size(bytes: u64) -> String {
    if bytes >= 10_000_000_000 {
        format!("{} GB", bytes / 1_000_000_000)
    } else {
        format!("{} MB", bytes.div_ceil(1_000_000))
    }
}
