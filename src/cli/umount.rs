//! `weightfs umount`: always works, dead daemons and open files included.

use crate::fs::mounts;
use anyhow::{Context, bail};
use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
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
}

#[derive(Deserialize)]
struct Readers {
    open: u64,
    pids: Vec<u32>,
}

pub fn run(a: UmountArguments) -> anyhow::Result<ExitCode> {
    let given = a.mount_point.display();
    let point = super::mount::absolute(&a.mount_point)?;
    let Some(mount) = mounts::find(&point) else { bail!("nothing is mounted at {given}") };
    if !mount.is_ours() {
        bail!("{given} is a mount of type {}, not of weightfs", mount.fs_type);
    }
    // Asked before it goes; a dead daemon does not answer, and needs no waiting for.
    let facts = std::fs::read(point.join("status.json")).ok();
    let facts: Option<Facts> = facts.and_then(|text| serde_json::from_slice(&text).ok());
    let daemon = facts.as_ref().and_then(|f| {
        let pid = Pid::from_raw(i32::try_from(f.pid).ok()?)?;
        pidfd_open(pid, PidfdFlags::empty()).ok()
    });
    mounts::detach(&point).with_context(|| format!("unmounting {given}"))?;
    let (Some(facts), Some(daemon)) = (facts, daemon) else {
        println!("unmounted {given} (its daemon had ended)");
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
