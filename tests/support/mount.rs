//! Mounts made with the real command, and taken away with the test however it ends.

use super::model::weights_in;
use super::{Engine, Model, PATIENCE, until, user};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

/// A hang must fail its test: the daemon is killed when a mount is older than this, which wakes all who wait for it.
const LONGEST: Duration = Duration::from_secs(180);

/// The three ways of serving, by the word that `status` has for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Passthrough,
    Copied,
    Direct,
}

impl Way {
    pub fn view(self) -> &'static str {
        if self == Way::Direct { "live" } else { "held" }
    }

    pub fn name(self) -> &'static str {
        match self {
            Way::Passthrough => "passthrough",
            Way::Copied => "copied",
            Way::Direct => "direct",
        }
    }
}

/// The command as users have it.
pub fn weightfs() -> Command {
    Command::new(user::program())
}

/// What a command said that failed.
#[derive(Debug)]
pub struct Failure {
    pub status: ExitStatus,
    pub stderr: String,
}

/// A mount to be made.
pub struct Mounting {
    command: Command,
    point: PathBuf,
    model: PathBuf,
    shards: Vec<String>,
}

impl Mounting {
    pub fn of(model: &Model, point: impl Into<PathBuf>) -> Mounting {
        Mounting::by(weightfs(), model, point)
    }

    /// `command` runs weightfs, behind whatever it is run by.
    pub fn by(mut command: Command, model: &Model, point: impl Into<PathBuf>) -> Mounting {
        let point = point.into();
        let _ = std::fs::create_dir(&point);
        command.args(["mount", "--log-level", "debug"]).arg(&model.path).arg(&point);
        command.stdin(Stdio::null());
        Mounting { command, point, model: model.path.clone(), shards: model.shards.clone() }
    }

    pub fn engine(self, engine: &Engine) -> Mounting {
        self.arg("--weights").arg(&engine.manifest)
    }

    pub fn arg(mut self, word: impl AsRef<OsStr>) -> Mounting {
        self.command.arg(word);
        self
    }

    pub fn args(mut self, words: &[&str]) -> Mounting {
        self.command.args(words);
        self
    }

    pub fn way(self, way: Way) -> Mounting {
        self.args(&["--view", way.view()])
    }

    /// Mounts in the background; the command has returned.
    #[track_caller]
    pub fn mount(self) -> Mount {
        self.start().unwrap_or_else(|e| panic!("the mount failed: {}", e.stderr))
    }

    pub fn start(mut self) -> Result<Mount, Failure> {
        let output = self.command.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        match output.status.success() {
            true => Ok(Mount::at(self, None)),
            false => Err(Failure { status: output.status, stderr }),
        }
    }

    /// Mounts with `-f`: the daemon is a child of the test. Its log goes to the test's stderr.
    #[track_caller]
    pub fn foreground(mut self) -> Mount {
        self.command.arg("-f").stdout(Stdio::null());
        let mut child = self.command.spawn().unwrap();
        until("the mount in the foreground answers", || {
            assert_eq!(child.try_wait().unwrap(), None, "the mount ended before it answered");
            self.point.join("status").exists()
        });
        Mount::at(self, Some(child))
    }

    /// What goes wrong when it is mounted.
    #[track_caller]
    pub fn fails(self) -> Failure {
        match self.start() {
            Ok(_) => panic!("the mount should have failed"),
            Err(failure) => failure,
        }
    }
}

/// A mount that is there.
pub struct Mount {
    pub point: PathBuf,
    pub model: PathBuf,
    pub pid: u32,
    shards: Vec<String>,
    daemon: OwnedFd,
    pub child: Option<Child>,
    _watchdog: Sender<()>,
}

impl Mount {
    #[track_caller]
    fn at(mounting: Mounting, child: Option<Child>) -> Mount {
        let Mounting { point, model, shards, .. } = mounting;
        let point = point.canonicalize().unwrap();
        let text = std::fs::read(point.join("status.json")).unwrap();
        let status: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let pid = status["pid"].as_u64().unwrap() as u32;
        let daemon = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
        let (watchdog, ended) = channel::<()>();
        let watched = daemon.try_clone().unwrap();
        std::thread::spawn(move || {
            if ended.recv_timeout(LONGEST) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("weightfs, pid {pid}, hangs: killed");
                let _ = rustix::process::pidfd_send_signal(&watched, Signal::KILL);
            }
        });
        Mount { point, model, pid, shards, daemon, child, _watchdog: watchdog }
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.point.join(name)
    }

    /// Weights file `i` in the mount.
    pub fn shard(&self, i: usize) -> PathBuf {
        self.point.join(&self.shards[i])
    }

    pub fn open(&self, i: usize) -> File {
        File::open(self.shard(i)).unwrap()
    }

    /// All weights files, each opened, read and closed.
    pub fn weights(&self) -> Vec<Vec<u8>> {
        weights_in(&self.point, &self.shards)
    }

    /// One command in one write, as the shell's `echo` does.
    pub fn ctl(&self, command: &str) -> io::Result<()> {
        self.write_ctl(format!("{command}\n").as_bytes())
    }

    pub fn write_ctl(&self, bytes: &[u8]) -> io::Result<()> {
        let mut ctl = File::options().write(true).truncate(true).open(self.path("ctl"))?;
        match ctl.write(bytes)? {
            n if n == bytes.len() => Ok(()),
            n => Err(io::Error::other(format!("{n} of {} bytes were written", bytes.len()))),
        }
    }

    /// A command that has to succeed; what `status` says of it.
    #[track_caller]
    pub fn does(&self, command: &str) -> String {
        if let Err(e) = self.ctl(command) {
            panic!("{command}: {e}: {}", self.says());
        }
        self.says()
    }

    #[track_caller]
    pub fn status(&self) -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(self.path("status.json")).unwrap()).unwrap()
    }

    pub fn state(&self) -> String {
        self.status()["state"].as_str().unwrap().to_string()
    }

    /// What the last command's sentence is.
    pub fn says(&self) -> String {
        self.status()["last_command"]["says"].as_str().unwrap_or_default().to_string()
    }

    /// The value of a key of `status`, as text.
    pub fn fact(&self, key: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.path("status")).unwrap();
        text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' ').map(str::to_string))
    }

    /// Waits until the first copy is made and compared with the disk.
    pub fn settled(&self) {
        until("the view is ready", || self.fact("view_ready").as_deref() == Some("yes"));
        until("it is known what differs from disk", || self.fact("dirty").as_deref() != Some("unknown"));
    }

    pub fn is_mounted(&self) -> bool {
        is_mounted(&self.point)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.pid as i32).unwrap(), signal).unwrap();
    }

    pub fn is_running(&self) -> bool {
        !ended(&self.daemon, Duration::ZERO)
    }

    /// Waits until the daemon has ended.
    #[track_caller]
    pub fn ends(&self) {
        assert!(ended(&self.daemon, PATIENCE), "the daemon should have ended");
    }

    /// `weightfs umount`; what it says.
    #[track_caller]
    pub fn umount(&self) -> String {
        let output = weightfs().arg("umount").arg(&self.point).output().unwrap();
        assert!(output.status.success(), "umount failed: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.is_mounted() {
            let _ = weightfs().arg("umount").arg(&self.point).output();
        }
        if !ended(&self.daemon, Duration::from_secs(20)) {
            self.signal(Signal::KILL);
            eprintln!("the daemon of {} had to be killed", self.point.display());
        }
        if let Some(child) = &mut self.child {
            let _ = child.wait();
        }
        while self.is_mounted() && unmount(&self.point, UnmountFlags::DETACH).is_ok() {}
    }
}

fn ended(process: &OwnedFd, within: Duration) -> bool {
    let wait = Timespec { tv_sec: within.as_secs() as i64, tv_nsec: 0 };
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&wait)).unwrap() > 0
}

/// Whether something is mounted at `point`, asked of the kernel's table: the mount itself may be dead.
pub fn is_mounted(point: &Path) -> bool {
    // The thread's own table: see `user`.
    let table = std::fs::read("/proc/thread-self/mountinfo").unwrap();
    let escape = |b: &u8| match b {
        b' ' | b'\n' | b'\t' | b'\\' => format!("\\{b:03o}").into_bytes(),
        b => vec![*b],
    };
    let escaped: Vec<u8> = point.as_os_str().as_bytes().iter().flat_map(escape).collect();
    table.split(|b| *b == b'\n').any(|line| line.split(|b| *b == b' ').nth(4) == Some(&escaped[..]))
}

/// A failure is one line that says what, and what to do.
#[track_caller]
pub fn assert_one_line(failure: &Failure, words: &[&str]) {
    assert!(!failure.status.success());
    let text = failure.stderr.trim_end_matches('\n');
    assert!(text.starts_with("weightfs: ") && !text.contains('\n'), "not one line: {:?}", failure.stderr);
    for word in words {
        assert!(text.contains(word), "the message should say {word:?}: {text}");
    }
}

/// A command that has to fail.
#[track_caller]
pub fn fails(command: &mut Command) -> Failure {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success(), "{command:?} should have failed");
    Failure { status: output.status, stderr: String::from_utf8_lossy(&output.stderr).into_owned() }
}
