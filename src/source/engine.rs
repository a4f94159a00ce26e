//! The life of the process that owns the weights.

use super::Manifest;
use std::path::PathBuf;

/// One engine process, as its manifest names it.
#[derive(Debug, Clone)]
pub struct Engine {
    pub name: String,
    pub manifest: PathBuf,
    pub rank: u32,
    pub pid: Option<u32>,
    start_time: Option<u64>,
}

impl Engine {
    pub fn of(manifest: &Manifest) -> Engine {
        Engine {
            name: manifest.engine.clone(),
            manifest: manifest.path.clone(),
            rank: manifest.rank,
            pid: manifest.pid,
            start_time: manifest.start_time,
        }
    }

    /// Is the process alive, and still the one that wrote the manifest? A manifest without a pid is not watched.
    pub fn check(&self) -> Result<(), String> {
        let Some(pid) = self.pid else { return Ok(()) };
        match process_start(pid) {
            None => Err(format!("process {pid} has ended")),
            Some(start) if self.start_time.is_some_and(|s| s != start) => {
                Err(format!("process {pid} is another one now (started at tick {start})"))
            }
            Some(_) => Ok(()),
        }
    }
}

/// When process `pid` started, in clock ticks since boot (field 22 of `/proc/PID/stat`, proc(5)); `None` when there is
/// no such process or it is only waiting to be reaped, its memory gone.
pub(crate) fn process_start(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command in parentheses and may hold anything, so fields are counted after the last ')'.
    let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_whitespace().collect();
    match fields.first() {
        Some(&"Z" | &"X") | None => None,
        Some(_) => fields.get(19)?.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_one_that_took_its_pid() {
        let start = process_start(std::process::id()).unwrap();
        let engine = |start_time| Engine {
            name: "test".into(),
            manifest: PathBuf::new(),
            rank: 0,
            pid: Some(std::process::id()),
            start_time,
        };
        engine(Some(start)).check().unwrap();
        engine(None).check().unwrap();
        assert!(engine(Some(start + 1)).check().unwrap_err().contains("another"));
    }

    #[test]
    fn a_process_that_ended_is_gone_even_before_it_is_reaped() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let engine =
            Engine { name: String::new(), manifest: PathBuf::new(), rank: 0, pid: Some(child.id()), start_time: None };
        while engine.check().is_ok() {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(engine.check().unwrap_err().contains("ended"));
    }
}
