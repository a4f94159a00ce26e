//! `weightfs umount`: always works, dead daemons and open files included.

use crate::fs::mounts;
use anyhow::{Context, bail};
use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::Deserialize;
use std::path::PathBuf;
use std::process::ExitCode;

/// How long a daemon without readers may take to end.
const PATIENCE_SECONDS: i64 = 30;

#[derive(Args)]
pub struct UmountArguments {
    mount_point: PathBuf,
}

#[derive(Deserialize)]
struct Facts {
    pid: u32,
    readers: Readers,
    source: SourceFacts,
    dirty: String,
}

#[derive(Deserialize)]
struct SourceFacts {
    engine: String,
}

#[derive(Deserialize)]
struct Readers {
    open: u64,
    pids: Vec<u32>,
}

enum Answer {
    Facts(Facts),
    Ended,
    Silence,
    Refused(std::io::Error),
}

/// Asked before the mount goes.
fn ask(status: PathBuf) -> Answer {
    match mounts::ask(|| std::fs::read(status)) {
        None => Answer::Silence,
        Some(Ok(text)) => serde_json::from_slice(&text).map_or(Answer::Silence, Answer::Facts),
        Some(Err(e)) if e.raw_os_error() == Some(Errno::NOTCONN.raw_os_error()) => Answer::Ended,
        // Root is not the user whose mount it is.
        Some(Err(e)) => Answer::Refused(e),
    }
}

pub fn run(a: UmountArguments) -> anyhow::Result<ExitCode> {
    let given = a.mount_point.display();
    let point = super::mount::absolute(&a.mount_point)?;
    let Some(mount) = mounts::find(&point) else { bail!("nothing is mounted at {given}") };
    if !mount.is_ours() {
        bail!("{given} is a mount of type {}, not of weightfs", mount.fs_type);
    }
    let answer = ask(point.join("status.json"));
    // Held from before the mount goes, so that it is this process and none that takes its number later.
    let daemon = match &answer {
        Answer::Facts(facts) => i32::try_from(facts.pid).ok().and_then(Pid::from_raw),
        _ => None,
    };
    let daemon = daemon.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    mounts::detach(&point).with_context(|| format!("unmounting {given}"))?;
    let facts = match answer {
        Answer::Facts(facts) => facts,
        Answer::Ended => {
            println!("unmounted {given} (its daemon had ended)");
            return Ok(ExitCode::SUCCESS);
        }
        Answer::Refused(e) => {
            println!("unmounted {given} (what its daemon still has to do is not known: {e})");
            return Ok(ExitCode::SUCCESS);
        }
        Answer::Silence => {
            println!("unmounted {given} (its daemon does not answer: it is stopped, or hangs)");
            return Ok(ExitCode::SUCCESS);
        }
    };
    if facts.dirty == "yes" && facts.source.engine == "own" {
        eprintln!("weightfs: the weights had changed since the last commit: that ended with the mount");
    }
    // If it had ended already there is nothing to wait for.
    let Some(daemon) = daemon else {
        println!("unmounted {given}");
        return Ok(ExitCode::SUCCESS);
    };
    if facts.readers.open > 0 {
        let pids = facts.readers.pids.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        println!(
            "unmounted {given}; {} weights files are still open by pid {pids}: the daemon ends with the last of them",
            facts.readers.open
        );
        return Ok(ExitCode::SUCCESS);
    }
    // So that whoever mounts the model again at once finds it free.
    let patience = Timespec { tv_sec: PATIENCE_SECONDS, tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(&daemon, PollFlags::IN)], Some(&patience))? > 0;
    match ended {
        true => println!("unmounted {given}"),
        false => println!("unmounted {given}; its daemon (pid {}) still has files open", facts.pid),
    }
    Ok(ExitCode::SUCCESS)
}
