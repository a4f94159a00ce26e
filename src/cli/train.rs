//! `weightfs train`: gives a job to a mount and, if asked, follows it to its end.

use anyhow::{Context, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// A poller is woken by what is new; asking now and then as well costs nothing and survives a lost wake-up.
const ASK_AGAIN: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

#[derive(Args)]
pub struct TrainArguments {
    /// Where the model is mounted
    mount_point: PathBuf,
    /// The job: JSON or JSON Lines (docs/training.md)
    job: PathBuf,
    /// Show its progress until it ends; it goes on when this command is stopped
    #[arg(long)]
    follow: bool,
    /// Print what is known of the job as JSON: when it is queued, or when it ended
    #[arg(long)]
    json: bool,
}

pub fn run(a: TrainArguments) -> anyhow::Result<ExitCode> {
    let job = a.job.canonicalize().with_context(|| format!("the job {}", a.job.display()))?;
    let Some(name) = job.to_str().filter(|n| !n.contains('\n')) else {
        bail!("the path of the job {} is not one line of UTF-8, which `ctl` takes: copy it elsewhere", a.job.display())
    };
    let mut status = Status::open(&a.mount_point)?;
    let newest = status.read()?.jobs.last().map_or(0, id);
    let ctl = a.mount_point.join("ctl");
    let mut file = File::options().write(true).open(&ctl).with_context(|| format!("{}", ctl.display()))?;
    if let Err(e) = file.write_all(format!("train {name}\n").as_bytes()) {
        let said = status.read().ok().filter(|s| s.failed_command() == Some("train"));
        bail!("{}", said.and_then(|s| s.said()).unwrap_or_else(|| format!("{name}: {e}")));
    }
    // Others may queue jobs at the same time: ours is the first new one of this file.
    let facts = status.read()?;
    let ours = facts.jobs.iter().find(|j| id(j) > newest && j["source"] == name);
    let ours = ours.with_context(|| format!("the job was taken, but {} does not show it", a.mount_point.display()))?;
    let ours = match a.follow {
        false => ours.clone(),
        true => follow(&mut status, ours.clone())?,
    };
    match (a.json, a.follow) {
        (true, _) => println!("{}", serde_json::to_string_pretty(&ours)?),
        (false, true) => tell(&ours),
        (false, false) => println!("job {} is queued: {} steps", id(&ours), ours["steps"]),
    }
    Ok(match ours["state"].as_str() {
        Some("queued" | "running" | "finished") => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// Shows the job until it has ended; what is known of it then.
fn follow(status: &mut Status, mut job: Value) -> anyhow::Result<Value> {
    let number = id(&job);
    let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {msg}")?;
    let bar = ProgressBar::with_draw_target(job["steps"].as_u64(), ProgressDrawTarget::stderr()).with_style(style);
    bar.set_prefix(format!("job {number}"));
    loop {
        bar.set_length(job["steps"].as_u64().unwrap_or(0));
        bar.set_position(job["steps_done"].as_u64().unwrap_or(0));
        bar.set_message(progress(&job));
        if !matches!(job["state"].as_str(), Some("queued" | "running")) {
            bar.finish_and_clear();
            return Ok(job);
        }
        status.wait()?;
        if !status.is_there() {
            bail!("the mount was taken away while job {number} ran: it ends with the mount");
        }
        let facts = status.read().context("the mount ended while the job ran")?;
        job = facts.jobs.into_iter().find(|j| id(j) == number).context("the mount no longer knows the job")?;
    }
}

fn progress(job: &Value) -> String {
    let Some(loss) = job["loss"].as_f64() else { return job["state"].as_str().unwrap_or_default().to_string() };
    let speed = job["tokens_per_second"].as_f64().unwrap_or(0.0);
    let left = job["eta_seconds"].as_f64().map_or(String::new(), |s| format!(" {s:.0} s left"));
    format!("loss {loss:.4} {speed:.0} tokens/s{left}")
}

/// How it ended, in a line.
fn tell(job: &Value) {
    let loss = match (job["first_loss"].as_f64(), job["loss"].as_f64()) {
        (Some(loss), Some(_)) if job["steps_done"] == 1 => format!(", loss {loss:.4}"),
        (Some(first), Some(last)) => format!(", loss {first:.4} to {last:.4}"),
        _ => String::new(),
    };
    let steps = if job["steps_done"] == 1 { "step" } else { "steps" };
    let line = format!("job {} {}: {} {steps}{loss}", id(job), job["state"].as_str().unwrap_or("?"), job["steps_done"]);
    match job["error"].as_str() {
        Some(error) => eprintln!("weightfs: {line}: {error}"),
        None => println!("{line}"),
    }
}

fn id(job: &Value) -> u64 {
    job["id"].as_u64().unwrap_or(0)
}

/// `status.json` of a mount, kept open to be woken by its news.
struct Status {
    file: File,
    path: PathBuf,
}

struct Facts {
    whole: Value,
    /// In order of ids.
    jobs: Vec<Value>,
}

impl Status {
    fn open(mount: &Path) -> anyhow::Result<Status> {
        let path = mount.join("status.json");
        let file = File::open(&path).with_context(|| format!("{}: is a model mounted there?", path.display()))?;
        Ok(Status { file, path })
    }

    /// Whether it is still the mount's: what is open outlives a mount that was taken away.
    fn is_there(&self) -> bool {
        match (self.file.metadata(), std::fs::metadata(&self.path)) {
            (Ok(open), Ok(named)) => open.dev() == named.dev(),
            _ => false,
        }
    }

    fn read(&mut self) -> anyhow::Result<Facts> {
        let mut text = Vec::new();
        self.file.rewind()?;
        self.file.read_to_end(&mut text)?;
        let whole: Value = serde_json::from_slice(&text)?;
        let jobs = whole["jobs"].as_array().cloned().unwrap_or_default();
        Ok(Facts { whole, jobs })
    }

    fn wait(&self) -> anyhow::Result<()> {
        match poll(&mut [PollFd::new(&self.file, PollFlags::IN | PollFlags::PRI)], Some(&ASK_AGAIN)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

impl Facts {
    /// The last command, if it failed.
    fn failed_command(&self) -> Option<&str> {
        let last = &self.whole["last_command"];
        last["command"].as_str().filter(|_| last["result"] != "ok")
    }

    fn said(&self) -> Option<String> {
        Some(self.whole["last_command"]["says"].as_str()?.to_string())
    }
}
