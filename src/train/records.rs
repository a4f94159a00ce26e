//! Jobs as they are kept over restarts: one JSON file each in `.weightfs/jobs/`.

use super::queue::{JobRecord, JobState};
use parking_lot::Mutex;
use std::fs::{DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often the record of a running job is written again: what a kill loses of its losses.
const EVERY: Duration = Duration::from_secs(1);
/// Ended jobs kept.
const KEPT: usize = 1000;

/// The directory of the records of one model.
pub struct JobRecords {
    directory: PathBuf,
    /// The highest id that a file is named after, whatever is in it.
    highest: u64,
    /// When a running job's record was written last.
    written: Mutex<Option<Instant>>,
}

impl JobRecords {
    /// Makes the directory if need be, and reads what is there, in order of ids. A file that is none of ours or damaged
    /// is left alone, and said in the log.
    pub fn open(directory: &Path) -> io::Result<(JobRecords, Vec<JobRecord>)> {
        DirBuilder::new().mode(0o700).recursive(true).create(directory)?;
        let (mut records, mut highest) = (Vec::new(), 0);
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            let Some(id) = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".json")) else {
                // Of a write that a crash cut off.
                if path.extension().is_some_and(|e| e == "new") {
                    let _ = std::fs::remove_file(&path);
                }
                continue;
            };
            highest = highest.max(id.parse().unwrap_or(0u32) as u64);
            let read = std::fs::read(&path).and_then(|b| Ok(serde_json::from_slice::<JobRecord>(&b)?));
            match read {
                Ok(record) if record.id.to_string() == id => records.push(record),
                Ok(record) => log::warn!("{} holds job {}: left alone", path.display(), record.id),
                Err(e) => log::warn!("{} is no record of a job: {e}", path.display()),
            }
        }
        records.sort_by_key(|r| r.id);
        let this = JobRecords { directory: directory.to_owned(), highest, written: Mutex::default() };
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
        let running = record.state == JobState::Running && record.steps_done > 0;
        let mut written = self.written.lock();
        if running && written.is_some_and(|w| w.elapsed() < EVERY) {
            return Ok(());
        }
        *written = Some(Instant::now());
        drop(written);
        let path = self.path(record.id);
        let new = path.with_extension("json.new");
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&serde_json::to_vec_pretty(record)?)?;
        if !running {
            file.sync_all()?;
        }
        std::fs::rename(&new, &path)?;
        if !running {
            File::open(&self.directory)?.sync_all()?;
        }
        Ok(())
    }

    fn path(&self, id: u64) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_that_cannot_be_read_keeps_its_id() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(JobRecords::open(directory.path()).unwrap().0.next_id(), 1);
        // Its writer lost power.
        std::fs::write(directory.path().join("7.json"), "").unwrap();
        std::fs::write(directory.path().join("notes.json"), "{}").unwrap();
        let (records, known) = JobRecords::open(directory.path()).unwrap();
        assert_eq!((records.next_id(), known.len()), (8, 0));
    }
}
