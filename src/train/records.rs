//! Jobs as they are kept over restarts: one JSON file each in `.weightfs/jobs/`.

use super::queue::{JobRecord, JobState, now};
use crate::model::{STATE_DIR, StateFolder, create_anew, read_small_no_link};
use parking_lot::Mutex;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often the record of a running job is written again: what a kill loses of its losses.
const EVERY: Duration = Duration::from_secs(1);
/// Ended jobs kept.
const KEPT: usize = 1000;

const JOBS: &str = "jobs";

/// The directory of the records of one model.
pub struct JobRecords {
    folder: StateFolder,
    /// The highest id that a file is named after, whatever is in it.
    highest: u64,
    written: Mutex<Written>,
}

/// Held while a record is written: records of one job come from the queue's thread and from whoever ends the daemon.
#[derive(Default)]
struct Written {
    /// When a running job's record was written last.
    at: Option<Instant>,
    /// The last of a running job's records was written.
    last: bool,
}

impl JobRecords {
    /// Makes the directory below the `.weightfs` of a model directory if need be, and reads what is there, in order of
    /// ids. A file that is none of ours or damaged is left alone, and said in the log.
    pub fn open(model: &Path) -> io::Result<(JobRecords, Vec<JobRecord>)> {
        let folder = StateFolder::make(model, &format!("{STATE_DIR}/{JOBS}"))?;
        let (mut records, mut highest) = (Vec::new(), 0);
        for entry in std::fs::read_dir(folder.path())? {
            let path = entry?.path();
            let Some(id) = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".json")) else {
                // Of a write that a crash cut off.
                if path.extension().is_some_and(|e| e == "new") {
                    let _ = std::fs::remove_file(&path);
                }
                continue;
            };
            highest = highest.max(id.parse().unwrap_or(0u32) as u64);
            let read = read_small_no_link(&path).and_then(|b| Ok(serde_json::from_slice::<JobRecord>(&b)?));
            match read {
                Ok(record) if record.id.to_string() == id => records.push(record),
                Ok(record) => log::warn!("{STATE_DIR}/{JOBS}/{id}.json holds job {}: left alone", record.id),
                Err(e) => log::warn!("{STATE_DIR}/{JOBS}/{id}.json is no record of a job: {e}"),
            }
        }
        records.sort_by_key(|r| r.id);
        let this = JobRecords { folder, highest, written: Mutex::default() };
        while records.len() > KEPT {
            let _ = std::fs::remove_file(this.path(records.remove(0).id));
        }
        Ok((this, records))
    }

    /// No id from this one on was ever given: a record that cannot be read keeps its own.
    pub fn next_id(&self) -> u64 {
        self.highest + 1
    }

    /// Keeps what is known of a job: durably when its state changed, now and then while it runs.
    pub fn keep(&self, record: &JobRecord) -> io::Result<()> {
        let running = record.state == JobState::Running;
        let stepped = running && record.steps_done > 0;
        let mut written = self.written.lock();
        let recently = written.at.is_some_and(|at| at.elapsed() < EVERY);
        if running && written.last || stepped && recently {
            return Ok(());
        }
        written.at = Some(Instant::now());
        self.write(record, !stepped)
    }

    /// Keeps the job that runs as the daemon leaves it, durably, and no more of its steps after that. `running` is asked while
    /// no other record is written: of a job that has ended in the meantime its own last record stays.
    pub fn keep_last(&self, running: impl FnOnce() -> Option<JobRecord>) -> io::Result<()> {
        let mut written = self.written.lock();
        written.last = true;
        let Some(mut record) = running() else { return Ok(()) };
        record.ended_at = now();
        self.write(&record, true)
    }

    fn write(&self, record: &JobRecord, durably: bool) -> io::Result<()> {
        let path = self.path(record.id);
        let new = path.with_extension("json.new");
        let mut file = create_anew(&new)?;
        file.write_all(&serde_json::to_vec_pretty(record)?)?;
        if durably {
            file.sync_all()?;
        }
        std::fs::rename(&new, &path)?;
        if durably {
            File::open(self.folder.path())?.sync_all()?;
        }
        Ok(())
    }

    fn path(&self, id: u64) -> PathBuf {
        self.folder.path().join(format!("{id}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, mknodat};

    fn running(id: u64, steps_done: u64) -> JobRecord {
        let record = serde_json::json!({"id": id, "state": "running", "config": {}, "samples": 1, "steps": 9,
            "steps_done": steps_done, "losses": [], "tokens": 0, "trained_tokens": 0, "seconds": 0.0, "memory": 0,
            "first_step": 0, "last_step": steps_done, "queued_at": 1, "started_at": 1, "ended_at": 0, "notes": [],
            "error": null});
        serde_json::from_value(record).unwrap()
    }

    #[test]
    fn the_last_record_of_a_running_job_is_exact_and_stays() {
        let model = tempfile::tempdir().unwrap();
        std::fs::create_dir(model.path().join(STATE_DIR)).unwrap();
        let (records, _) = JobRecords::open(model.path()).unwrap();
        let kept = || JobRecords::open(model.path()).unwrap().1.remove(0);
        records.keep(&running(1, 1)).unwrap();
        assert_eq!((kept().steps_done, kept().ended_at), (1, 0));
        records.keep_last(|| Some(running(1, 3))).unwrap();
        assert_eq!(kept().steps_done, 3);
        assert!(kept().ended_at > 0);
        // What the queue's thread still had to tell; but a job that ended has ended.
        std::thread::sleep(EVERY);
        records.keep(&running(1, 2)).unwrap();
        records.keep(&running(1, 0)).unwrap();
        assert_eq!(kept().steps_done, 3);
        records.keep(&JobRecord { state: JobState::Finished, ..running(1, 9) }).unwrap();
        records.keep_last(|| None).unwrap();
        assert_eq!((kept().state, kept().steps_done), (JobState::Finished, 9));
    }

    #[test]
    fn a_pipe_in_a_records_place_is_neither_waited_for_nor_written_to() {
        let model = tempfile::tempdir().unwrap();
        std::fs::create_dir(model.path().join(STATE_DIR)).unwrap();
        let (records, _) = JobRecords::open(model.path()).unwrap();
        records.keep(&running(3, 0)).unwrap();
        let jobs = model.path().join(STATE_DIR).join(JOBS);
        let pipe = |name: &str| {
            mknodat(CWD, jobs.join(name), FileType::Fifo, 0o600.into(), 0).unwrap();
        };
        pipe("5.json");
        std::os::unix::fs::symlink("3.json", jobs.join("4.json")).unwrap();
        let (records, known) = JobRecords::open(model.path()).unwrap();
        assert_eq!(known.iter().map(|job| job.id).collect::<Vec<_>>(), [3]);
        assert_eq!(records.next_id(), 6);

        pipe("6.json.new");
        records.keep(&running(6, 0)).unwrap();
        let outside = model.path().join("outside");
        std::fs::write(&outside, "of somebody else").unwrap();
        std::fs::hard_link(&outside, jobs.join("7.json.new")).unwrap();
        records.keep(&running(7, 0)).unwrap();
        assert_eq!(std::fs::read(&outside).unwrap(), b"of somebody else");
        assert_eq!(JobRecords::open(model.path()).unwrap().1.len(), 3);
    }

    #[test]
    fn a_record_that_cannot_be_read_keeps_its_id() {
        let model = tempfile::tempdir().unwrap();
        let jobs = model.path().join(STATE_DIR).join(JOBS);
        std::fs::create_dir(model.path().join(STATE_DIR)).unwrap();
        assert_eq!(JobRecords::open(model.path()).unwrap().0.next_id(), 1);
        // Its writer lost power.
        std::fs::write(jobs.join("7.json"), "").unwrap();
        std::fs::write(jobs.join("notes.json"), "{}").unwrap();
        let (records, known) = JobRecords::open(model.path()).unwrap();
        assert_eq!((records.next_id(), known.len()), (8, 0));
    }
}
