//! Opens and reads of weights: when the view moves, and what a read is served from.

use super::{Event, Mounted, Served};
use crate::fs::FsError;
use crate::image::ShardBytes;
use crate::view::{CopiedShards, Opened, Reader};
use rustix::io::Errno;
use std::sync::atomic::Ordering;
use std::time::Instant;

impl Mounted {
    /// Fills the view for the first time and finds out what differs from disk; runs beside the mount.
    pub fn prepare(&self) {
        if self.view.is_some() {
            let mut turn = self.moving.lock();
            // Whoever opened a file first has filled the view, and may be holding it.
            if !self.view_ready.load(Ordering::Acquire) {
                let _ = self.noted(self.move_in_turn(Instant::now(), &mut turn));
            }
        }
        let dirty = match &self.committer {
            // Loaded from the files a moment ago.
            _ if self.image.source().is_own() => false,
            None => return,
            Some(committer) => {
                match committer.ensure_baseline(&|_| {}).and_then(|()| committer.dirty_blocks(&*self.image)) {
                    Ok(blocks) => blocks > 0,
                    Err(e) => {
                        let _ = self.noted::<()>(Err(e.into()));
                        return self.changed();
                    }
                }
            }
        };
        let mut other_than_the_files = false;
        self.change(|facts| {
            // Whoever wrote or committed meanwhile knows better.
            if facts.dirty == "unknown" {
                facts.dirty = if dirty { "yes" } else { "no" };
                other_than_the_files = dirty;
            }
            if other_than_the_files {
                facts.weights_changed();
            }
        });
        if other_than_the_files {
            self.tell(Event::ViewMoved);
        }
    }

    /// Whether an open would have to wait for the view.
    pub fn open_may_wait(&self) -> bool {
        // Somebody has the view in hand, moves it, or waits for an engine to.
        let Some(_turn) = self.moving.try_lock() else { return self.view.is_some() };
        if self.view.is_none() || self.is_current() {
            return false;
        }
        let readers = self.readers.lock();
        readers.all_closing() || !readers.holding(Instant::now(), || self.is_mapped())
    }

    /// Whether mappings hold the view: the kernel serves them from the copy itself and keeps no file open for them.
    /// Asked with `readers` locked and none open, so that no open is under way.
    pub(super) fn is_mapped(&self) -> bool {
        self.view.as_ref().is_some_and(CopiedShards::is_mapped)
    }

    /// Whether the view is known to show the live step: only of weights that nobody else writes.
    fn is_current(&self) -> bool {
        self.image.source().is_own()
            && self.view.as_ref().is_some_and(CopiedShards::is_whole)
            && self.view_step.load(Ordering::Acquire) == self.step.load(Ordering::Acquire)
    }

    /// Opens shard `shard` for process or thread `pid`: brings the view to the newest step unless others hold it.
    pub fn open_weights(&self, handle: u64, shard: usize, pid: u32) -> Result<Served, FsError> {
        self.alive()?;
        let pid = process_of(pid);
        let reader = |since| Reader { shard, pid, since };
        if self.view.is_none() {
            self.noted(self.image.check().map_err(FsError::from))?;
            self.readers.lock().add(handle, reader(Instant::now()));
            self.changed();
            return Ok(Served::Direct);
        }
        let asked = Instant::now();
        let mut turn = self.moving.lock();
        if !self.is_current() {
            self.wait_for_releases();
        }
        // Looked at in our turn: whoever came before may have begun to hold the view.
        let before = self.readers.lock().before_open(Instant::now(), || self.is_mapped());
        if before == Opened::MoveFirst {
            self.noted(self.move_in_turn(asked, &mut turn))?;
        } else if !self.view.as_ref().is_some_and(CopiedShards::is_whole) {
            return Err(FsError::new(Errno::STALE, "the view is not of one step: the engine went while it moved"));
        }
        self.readers.lock().add(handle, reader(Instant::now()));
        self.changed();
        Ok(Served::Held)
    }

    /// Who closes a file and opens one next is not to be shown the step of the file that is closed: nothing of theirs
    /// holds the view any more. Each close is waited for once.
    fn wait_for_releases(&self) {
        let mut readers = self.readers.lock();
        let until = Instant::now() + self.release;
        while readers.all_closing() {
            if self.released.wait_until(&mut readers, until).timed_out() {
                readers.none_closing();
            }
        }
    }

    /// Somebody closes a descriptor of `handle`, the last one perhaps.
    pub fn closing_weights(&self, handle: u64) {
        self.readers.lock().closing(handle);
    }

    pub fn close_weights(&self, handle: u64) {
        self.readers.lock().remove(handle);
        self.released.notify_all();
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
        // One engine's for all of it: another may be attached meanwhile.
        let image = self.image.attached();
        let _hold = image.hold()?;
        image.read(shard, offset, dst)?;
        Ok(image.check()?)
    }

    /// Brings the view to the live step for somebody who asked for it at `asked` and now has the turn. If a move failed
    /// in between, that was the answer: with an engine that keeps its lock, nobody waits once more for each one before.
    pub(super) fn move_in_turn(&self, asked: Instant, turn: &mut Option<(Instant, FsError)>) -> Result<(), FsError> {
        match turn {
            Some((when, e)) if *when >= asked => Err(e.clone()),
            _ => self.move_view().inspect_err(|e| *turn = Some((Instant::now(), e.clone()))),
        }
    }

    /// Brings the view to the live step. The caller has `moving`.
    fn move_view(&self) -> Result<(), FsError> {
        let Some(view) = &self.view else { return Ok(()) };
        if self.is_current() {
            return Ok(());
        }
        self.whole()?;
        let began = Instant::now();
        let (refreshed, step) = view.refresh_at(&*self.image, &|| self.step.load(Ordering::Acquire))?;
        log::debug!("view: {} blocks in {:?}", refreshed.blocks, began.elapsed());
        self.view_ready.store(true, Ordering::Release);
        if refreshed.filled {
            self.view_step.store(step, Ordering::Release);
        } else if refreshed.blocks > 0 {
            self.weights_moved(step);
        } else {
            self.view_step.store(step, Ordering::Release);
        }
        self.changed();
        Ok(())
    }

    /// The view shows other bytes than before: steps that somebody else took are counted as we see them.
    pub(super) fn weights_moved(&self, step: u64) {
        let others = self.view_step.load(Ordering::Acquire) == step && !self.image.source().is_own();
        let step = if others { self.step.fetch_add(1, Ordering::AcqRel) + 1 } else { step };
        self.view_step.store(step, Ordering::Release);
        // Of our own steps it was said when they were taken. A commit may have been made since, of theirs as well.
        let committed = match (&self.view, &self.committer) {
            (Some(view), Some(committer)) => view.with_hashes(|hashes| committer.are_newest(hashes)),
            _ => false,
        };
        let mut facts = self.facts.lock();
        if others && !committed {
            facts.dirty = "yes";
        }
        facts.weights_changed();
        drop(facts);
        self.tell(Event::ViewMoved);
    }
}

/// The process that a thread belongs to: FUSE names the thread that asks.
fn process_of(thread: u32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let process = status.lines().find_map(|l| l.strip_prefix("Tgid:")?.trim().parse().ok());
    process.unwrap_or(thread)
}
