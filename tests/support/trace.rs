//! What a process writes, seen from outside by strace.

use super::{Scratch, have};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

pub struct Trace {
    strace: Child,
    log: PathBuf,
    _scratch: Scratch,
}

/// One write that the process made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    pub file: String,
    pub offset: usize,
    pub bytes: usize,
}

impl Trace {
    /// Follows all threads of `pid` from here on; `None` where that is not possible, which it says.
    pub fn of(pid: u32) -> Option<Trace> {
        if !have("strace") {
            return None;
        }
        let scratch = Scratch::new();
        let log = scratch.join("trace");
        let mut strace = Command::new("strace")
            .args(["-f", "-y", "-s", "0", "-e", "trace=pwrite64,write,pwritev,pwritev2,ftruncate", "-e", "signal=none"])
            .arg("-o")
            .arg(&log)
            .args(["-p", &pid.to_string()])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let mut lines = BufReader::new(strace.stderr.take().unwrap());
        while !said.contains("attached") {
            if lines.read_line(&mut said).unwrap() == 0 {
                strace.wait().unwrap();
                eprintln!("skipped: strace may not attach here: {said}");
                return None;
            }
        }
        // Nobody reads what else it says; it must not fill a pipe.
        std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        Some(Trace { strace, log, _scratch: scratch })
    }

    /// Ends it; the writes to weights files.
    #[track_caller]
    pub fn weights_written(mut self) -> Vec<Write> {
        let pid = rustix::process::Pid::from_child(&self.strace);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.strace.wait().unwrap();
        let log = std::fs::read_to_string(&self.log).unwrap();
        // Those of the model directory, not the log's.
        let weights = log.lines().filter(|l| l.contains(".safetensors>") && !l.contains("/.weightfs/"));
        weights.map(|l| parse(l).unwrap_or_else(|| panic!("{l}"))).collect()
    }
}

/// `4242 pwrite64(7</m/model.safetensors>, ""..., 4096, 8192) = 4096`, whole or resumed.
fn parse(line: &str) -> Option<Write> {
    let (_, call) = line.split_once("pwrite64(")?;
    let file = call.split_once('<')?.1.split_once('>')?.0;
    let mut numbers = call.rsplit_once("\"...")?.1.split([',', ')', ' ', '<']).filter_map(|w| w.parse().ok());
    let (bytes, offset) = (numbers.next()?, numbers.next()?);
    Some(Write { file: file.rsplit_once('/')?.1.to_string(), offset, bytes })
}
