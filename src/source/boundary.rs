//! Step boundaries: whoever copies weights holds them still, whoever changes them takes its turn.
//!
//! Inside weightfs the trainer takes a [`StepGuard`] around each optimizer step; views, commits and reads take a
//! [`HoldGuard`]. Writers in other processes join in by an exclusive `flock` on their manifest while a step is half
//! written, which also ends by itself when they die; a hold takes it shared.
//!
//! Lock order: the state's mutex is never held while a flock is waited for.

use parking_lot::{Condvar, Mutex};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a writer may keep the lock before a hold gives up: longer than any optimizer step.
const WRITER_PATIENCE: Duration = Duration::from_secs(30);
/// How often the lock is tried: a trainer without pauses leaves gaps of less than a millisecond between its steps.
const LONGEST_PAUSE: Duration = Duration::from_micros(250);
/// A new hold joins running ones only this long; then it waits for them to end, so that writers are not starved.
const JOIN_WINDOW: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub struct Boundary {
    state: Mutex<State>,
    changed: Condvar,
    manifests: Vec<Arc<File>>,
}

#[derive(Debug, Default)]
struct State {
    holds: usize,
    /// When the oldest of the running holds began.
    since: Option<Instant>,
    /// Flocks are taken or released by one thread, outside the mutex.
    locking: bool,
    stepping: bool,
    steps_waiting: usize,
    /// A hold that lasts (freeze): others join it without limit, and steps wait for its end.
    frozen: usize,
}

/// The engine kept its manifest locked for longer than any step takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoBoundary;

impl NoBoundary {
    pub fn seconds(&self) -> u64 {
        WRITER_PATIENCE.as_secs()
    }
}

/// Weights stand still while this lives.
#[derive(Debug)]
pub struct HoldGuard {
    boundary: Arc<Boundary>,
    frozen: bool,
}

/// The only step in progress.
#[derive(Debug)]
pub struct StepGuard {
    boundary: Arc<Boundary>,
}

/// The only step in progress anywhere.
#[derive(Debug)]
pub struct ExcludeGuard {
    step: StepGuard,
}

impl Boundary {
    pub fn new(manifests: Vec<Arc<File>>) -> Boundary {
        Boundary { state: Mutex::default(), changed: Condvar::new(), manifests }
    }

    /// The manifests as they were opened, one a rank.
    pub(super) fn manifests(&self) -> &[Arc<File>] {
        &self.manifests
    }

    /// Waits for a step boundary and holds it.
    pub fn hold(self: &Arc<Self>) -> Result<HoldGuard, NoBoundary> {
        self.enter(false)
    }

    /// A hold that may last: for readers outside, between `freeze` and `thaw`.
    pub fn freeze(self: &Arc<Self>) -> Result<HoldGuard, NoBoundary> {
        self.enter(true)
    }

    fn enter(self: &Arc<Self>, frozen: bool) -> Result<HoldGuard, NoBoundary> {
        // Everybody's own: whoever waited behind others for the lock does not begin anew.
        let deadline = Instant::now() + WRITER_PATIENCE;
        let mut state = self.state.lock();
        loop {
            let starving = state.holds > 0 && state.since.is_some_and(|s| s.elapsed() > JOIN_WINDOW);
            let step_first = state.stepping || (state.frozen == 0 && (state.steps_waiting > 0 || starving));
            if !step_first && !state.locking {
                break;
            }
            // Steps of our own end; only another process's lock can be held for ever.
            if state.locking && Instant::now() >= deadline {
                return Err(NoBoundary);
            }
            self.changed.wait_for(&mut state, WRITER_PATIENCE);
        }
        if state.holds == 0 && !self.manifests.is_empty() {
            state.locking = true;
            drop(state);
            let locked = self.lock_manifests(FlockOperation::NonBlockingLockShared, deadline);
            state = self.state.lock();
            state.locking = false;
            if let Err(e) = locked {
                self.changed.notify_all();
                return Err(e);
            }
        }
        if state.holds == 0 {
            state.since = Some(Instant::now());
        }
        state.holds += 1;
        state.frozen += usize::from(frozen);
        self.changed.notify_all();
        Ok(HoldGuard { boundary: self.clone(), frozen })
    }

    /// Waits until nobody holds the weights still, and keeps holds out while the step is taken.
    pub fn step(self: &Arc<Self>) -> StepGuard {
        let mut state = self.state.lock();
        state.steps_waiting += 1;
        while state.holds > 0 || state.stepping || state.locking {
            self.changed.wait(&mut state);
        }
        state.steps_waiting -= 1;
        state.stepping = true;
        StepGuard { boundary: self.clone() }
    }

    /// A step that other processes must not overlap either: their writers and ours take turns.
    pub fn exclude(self: &Arc<Self>) -> Result<ExcludeGuard, NoBoundary> {
        let step = self.step();
        self.lock_manifests(FlockOperation::NonBlockingLockExclusive, Instant::now() + WRITER_PATIENCE)?;
        Ok(ExcludeGuard { step })
    }

    fn lock_manifests(&self, operation: FlockOperation, deadline: Instant) -> Result<(), NoBoundary> {
        for (i, file) in self.manifests.iter().enumerate() {
            let mut pause = Duration::from_micros(50);
            loop {
                match flock(file, operation) {
                    Ok(()) => break,
                    // A file system without locks (rare: some network mounts) cannot tell us of writers.
                    Err(e) if e != rustix::io::Errno::WOULDBLOCK && e != rustix::io::Errno::INTR => break,
                    Err(_) if Instant::now() > deadline => {
                        self.manifests[..i].iter().for_each(unlock);
                        return Err(NoBoundary);
                    }
                    Err(_) => std::thread::sleep(pause),
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
        Ok(())
    }
}

fn unlock(file: &Arc<File>) {
    // Cannot fail on an open file; if it did, the lock would go with the file.
    let _ = flock(file, FlockOperation::Unlock);
}

impl Drop for HoldGuard {
    fn drop(&mut self) {
        let mut state = self.boundary.state.lock();
        state.holds -= 1;
        state.frozen -= usize::from(self.frozen);
        if state.holds == 0 {
            state.since = None;
            self.boundary.manifests.iter().for_each(unlock);
        }
        self.boundary.changed.notify_all();
    }
}

impl Drop for ExcludeGuard {
    fn drop(&mut self) {
        // Before the step ends: a hold that begins then takes the manifests' locks anew.
        self.step.boundary.manifests.iter().for_each(unlock);
    }
}

impl Drop for StepGuard {
    fn drop(&mut self) {
        self.boundary.state.lock().stepping = false;
        self.boundary.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn no_hold_ever_sees_half_a_step() {
        let boundary = Arc::new(Boundary::new(Vec::new()));
        let halves = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let _step = boundary.step();
                        halves[0].fetch_add(1, Ordering::Relaxed);
                        std::thread::yield_now();
                        halves[1].fetch_add(1, Ordering::Relaxed);
                    }
                });
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let _hold = boundary.hold().unwrap();
                        let first = halves[0].load(Ordering::Relaxed);
                        std::thread::yield_now();
                        assert_eq!(first, halves[1].load(Ordering::Relaxed));
                    }
                });
            }
        });
        assert_eq!(halves[0].load(Ordering::Relaxed), 4000);
    }

    #[test]
    fn a_writer_in_another_process_is_kept_out_by_its_manifest() {
        // flock belongs to the open file, so a second open stands for the other process.
        let manifest = tempfile::NamedTempFile::new().unwrap();
        let boundary = Arc::new(Boundary::new(vec![Arc::new(manifest.reopen().unwrap())]));
        let writer = manifest.reopen().unwrap();
        let exclusive = || flock(&writer, FlockOperation::NonBlockingLockExclusive);
        let first = boundary.hold().unwrap();
        let second = boundary.hold().unwrap();
        assert!(exclusive().is_err());
        drop(first);
        assert!(exclusive().is_err());
        drop(second);
        exclusive().unwrap();
        let waiting = std::thread::spawn({
            let boundary = boundary.clone();
            move || boundary.hold().map(drop)
        });
        flock(&writer, FlockOperation::Unlock).unwrap();
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn steps_wait_for_the_thaw_and_other_holds_do_not() {
        let boundary = Arc::new(Boundary::new(Vec::new()));
        let frozen = boundary.freeze().unwrap();
        let step = std::thread::spawn({
            let boundary = boundary.clone();
            move || drop(boundary.step())
        });
        while boundary.state.lock().steps_waiting == 0 {
            std::thread::yield_now();
        }
        drop(boundary.hold().unwrap());
        assert!(!step.is_finished());
        drop(frozen);
        step.join().unwrap();
    }
}
