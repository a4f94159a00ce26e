//! A command that goes on in the background: it starts itself again, waits until that one is ready or has failed, and
//! leaves it running.

use anyhow::Context;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Command, ExitCode, Stdio};

/// Set for the process that stays; its stdout is the pipe on which it says that it is ready.
const MARK: &str = "WEIGHTFS_BACKGROUND";
const READY: &[u8] = b"ready\n";

/// Is this the process that stays?
pub fn is_background() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Starts `arguments` again in the background. Returns when it is ready; its failures are its own words on our stderr.
pub fn start(arguments: &[OsString]) -> anyhow::Result<ExitCode> {
    let program = std::env::current_exe().context("finding our own program")?;
    let mut child = Command::new(program)
        .args(&arguments[1..])
        .env(MARK, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting the background process")?;
    let mut said = Vec::new();
    if let Some(mut pipe) = child.stdout.take() {
        pipe.read_to_end(&mut said)?;
    }
    if said == READY {
        return Ok(ExitCode::SUCCESS);
    }
    let status = child.wait()?;
    match status.code() {
        Some(code) if code != 0 => Ok(ExitCode::from(code.clamp(1, 255) as u8)),
        _ => anyhow::bail!("the background process ended before it was ready ({status}): its log may say why"),
    }
}

/// In the process that stays: leaves the terminal, so that neither its hangup nor its Ctrl-C reach us.
pub fn leave_terminal() {
    // Fails only for a process group leader, which a process started by `start` is not.
    let _ = rustix::process::setsid();
}

/// In the process that stays: tells the one that started us, and lets go of its terminal. From here on messages go to
/// `log` or nowhere. Fails if the other is gone (somebody pressed Ctrl-C): then nobody wants this mount.
pub fn ready(log: Option<File>) -> anyhow::Result<()> {
    std::io::stdout()
        .write_all(READY)
        .and_then(|()| std::io::stdout().flush())
        .context("the command that started us is gone")?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let errors = match log {
        Some(file) => file,
        None => null.try_clone()?,
    };
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&errors)?;
    // The directory we were started in must stay free to be removed or unmounted.
    std::env::set_current_dir("/")?;
    Ok(())
}
