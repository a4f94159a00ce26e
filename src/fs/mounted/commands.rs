//! What the commands of `ctl` do.

use super::{Event, Mounted};
use crate::commit::{CommitRequest, Moment};
use crate::fs::FsError;
use crate::fs::ctl::Command;
use crate::fs::status::CommandFacts;
use crate::image::{ImageError, ShardBytes};
use rustix::io::Errno;
use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

impl Mounted {
    /// Runs one command to its end; one at a time. `writer` is the process or thread that gave it. Returns what it did in
    /// a sentence.
    pub fn command(&self, command: &Command, writer: u32) -> Result<String, FsError> {
        let result = match self.commanding.try_lock() {
            Some(_turn) => self.run(command, writer),
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

    fn run(&self, command: &Command, writer: u32) -> Result<String, FsError> {
        match command {
            Command::Commit { message } => {
                self.doing(Some("committing"));
                let result = self.commit(message.as_deref());
                self.doing(None);
                result
            }
            Command::Refresh => self.refresh(),
            Command::Attach { path } => self.attach(path.as_deref(), writer),
            Command::Freeze => self.freeze(),
            Command::Thaw => match self.frozen.lock().take() {
                Some(_) => Ok("weights may change again".into()),
                None => Err(FsError::new(Errno::INVAL, "the weights are not frozen")),
            },
            Command::Train { job } => self.train(job, writer),
            Command::Cancel { id } => self.cancel(*id),
            Command::Pause => self.pause(true),
            Command::Resume => self.pause(false),
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
        self.whole()?;
        committer.ensure_baseline(&|_| {})?;
        // Steps that another process took are not counted anywhere: what differs from the last commit is one at least.
        let uncounted = match self.image.source().is_own() {
            true => 0,
            false => committer.newest().map_or(0, |c| c.step) + 1,
        };
        let (step, optimizer) = (AtomicU64::new(0), AtomicU64::new(0));
        let moment = || {
            let now = self.step.load(Ordering::Acquire).max(uncounted);
            step.store(now, Ordering::Release);
            optimizer.store(self.optimizer_step().unwrap_or(0), Ordering::Release);
            Ok(Moment { step: now, optimizer: self.optimizer_to_commit()? })
        };
        let request = CommitRequest { moment: Some(&moment), ..CommitRequest::new(message.unwrap_or_default(), 0) };
        self.prepare_optimizer()?;
        let report = committer.commit(&*self.image, &request)?;
        self.read_files_of_now();
        let step = step.into_inner();
        if report.commit.is_some() {
            self.step.fetch_max(step, Ordering::AcqRel);
        }
        self.optimizer_committed(optimizer.into_inner());
        // A job may have gone on since.
        self.facts.lock().dirty = if self.step.load(Ordering::Acquire) > step { "yes" } else { "no" };
        Ok(report.to_string())
    }

    /// A fold may have put private copies in the place of the weights files.
    fn read_files_of_now(&self) {
        if let Err(e) = self.directory.reopen() {
            log::warn!("{e}; what was there before is read still");
        }
    }

    fn rollback(&self, id: u64) -> Result<String, FsError> {
        let committer = self.committer.as_ref().ok_or_else(|| FsError::new(Errno::ROFS, "the mount is read-only"))?;
        self.alive()?;
        if self.frozen.lock().is_some() {
            return Err(FsError::new(Errno::BUSY, "the weights are frozen: `thaw` first"));
        }
        self.no_jobs("roll back")?;
        committer.ensure_baseline(&|_| {})?;
        let newest = || committer.newest().map(|c| c.id);
        let before = newest();
        let pause = RefCell::new(None);
        let begins = || {
            self.read_files_of_now();
            *pause.borrow_mut() = self.engine.get().and_then(|engine| engine.step_begins());
        };
        let done = committer.rollback_live(id, &*self.image, &begins);
        if done.as_ref().map_or(newest() != before, |report| report.live_bytes > 0) {
            // Readers see it as they see a step: with the next open. Also where it failed after its first write.
            self.step.fetch_add(1, Ordering::AcqRel);
            let mut facts = self.facts.lock();
            facts.dirty = if done.is_ok() { "no" } else { "yes" };
            if self.view.is_none() {
                facts.weights_changed();
                drop(facts);
                self.tell(Event::ViewMoved);
            }
        }
        let report = done.inspect_err(|_| {
            if newest() != before {
                self.optimizer_uncommitted();
            }
        })?;
        let optimizer = self.optimizer_as_committed();
        if report.live_bytes > 0 {
            // Before its requests go on.
            self.weights_differ();
        }
        drop(pause);
        let note = optimizer.err().map_or(String::new(), |e| format!("; the optimizer begins anew: {e}"));
        Ok(format!("back at commit {id}: {}, {} bytes of live weights written{note}", report.commit, report.live_bytes))
    }

    fn refresh(&self) -> Result<String, FsError> {
        self.alive()?;
        if self.view.is_none() {
            self.image.check()?;
            self.weights_moved(self.step.load(Ordering::Acquire));
            return Ok("weights are read where they are: caches were dropped".into());
        }
        self.move_in_turn(Instant::now(), &mut self.moving.lock())?;
        Ok(format!("the view shows step {}", self.view_step.load(Ordering::Acquire)))
    }

    fn freeze(&self) -> Result<String, FsError> {
        self.alive()?;
        let mut frozen = self.frozen.lock();
        if frozen.is_some() {
            return Err(FsError::new(Errno::BUSY, "the weights are frozen already: `thaw` first"));
        }
        let boundary = self.image.source().boundary.clone();
        *frozen = Some(boundary.freeze().map_err(|e| ImageError::NoBoundary(e.seconds()))?);
        drop(frozen);
        if self.view.is_none() {
            // Pages that the kernel kept of an earlier step must not be mixed with the frozen one.
            self.tell(Event::ViewMoved);
        }
        Ok(format!("weights stand still at step {} until `thaw`", self.step.load(Ordering::Acquire)))
    }
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
        (Errno::OPNOTSUPP, "EOPNOTSUPP"),
        (Errno::FBIG, "EFBIG"),
        (Errno::NOENT, "ENOENT"),
        (Errno::NOMEM, "ENOMEM"),
        (Errno::PERM, "EPERM"),
        (Errno::ACCESS, "EACCES"),
    ];
    let name = known.iter().find(|(e, _)| *e == errno).map(|(_, name)| name.to_string());
    name.unwrap_or_else(|| format!("errno {}", errno.raw_os_error()))
}
