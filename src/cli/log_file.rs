//! Where the daemon's log goes: the file that the user names, or one in the model directory, which may be another user's.
//! There, names are not believed: root would append to whatever file a link leads to.

use super::background;
use crate::model::{ModelDirectory, STATE_DIR, StateFolder};
use anyhow::{Context, bail};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, fstat, openat, renameat, statat};
use rustix::io::Errno;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// A log starts anew beyond this, one old one is kept.
const LARGEST: u64 = 8 << 20;
const NAME: &str = "mount.log";
const OLD: &str = "mount.log.1";

/// The log, open for appending; `None` for stderr.
pub fn open_log(named: Option<&Path>, directory: &ModelDirectory, read_only: bool) -> anyhow::Result<Option<File>> {
    match named {
        Some(path) => named_log(&std::path::absolute(path)?).map(Some),
        None if !background::is_background() || read_only => Ok(None),
        None => {
            let state = directory.state_dir();
            default_log(&state).with_context(|| format!("the log file {}", state.join(NAME).display())).map(Some)
        }
    }
}

fn named_log(path: &Path) -> anyhow::Result<File> {
    if std::fs::metadata(path).is_ok_and(|m| m.len() > LARGEST) {
        std::fs::rename(path, path.with_extension("log.1"))?;
    }
    let file = File::options().append(true).create(true).mode(0o600).open(path);
    file.with_context(|| format!("the log file {}", path.display()))
}

/// The log in `.weightfs`, which is made if it is not there.
fn default_log(state: &Path) -> anyhow::Result<File> {
    match std::fs::DirBuilder::new().mode(0o700).create(state) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => {
            let hint = "mount with --read-only if it must not be written";
            return Err(anyhow::Error::from(e).context(format!("{} cannot be made ({hint})", state.display())));
        }
        _ => {}
    }
    let folder = StateFolder::open(state.parent().unwrap_or(Path::new("/")), STATE_DIR)?;
    let folder = folder.fd();
    if statat(folder, NAME, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|s| s.st_size as u64 > LARGEST) {
        renameat(folder, NAME, folder, OLD)?;
    }
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::CLOEXEC;
    // A pipe must not hold us up before we see what it is.
    let careful = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match openat(folder, NAME, flags | careful, Mode::from_raw_mode(0o600)) {
        Ok(file) => file,
        Err(Errno::LOOP) => bail!("it is a symbolic link: remove it, or name a file with --log-file"),
        Err(e) => return Err(e.into()),
    };
    let stat = fstat(&file)?;
    if !FileType::from_raw_mode(stat.st_mode).is_file() || stat.st_nlink != 1 {
        bail!("it is no file of its own: remove it, or name another with --log-file");
    }
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::symlink;

    /// A model directory's `.weightfs`, a file of somebody else's beside it, and what is in that after logging.
    fn logs(prepare: impl FnOnce(&Path, &Path)) -> (Result<(), String>, String) {
        let scratch = tempfile::tempdir().unwrap();
        let (state, victim) = (scratch.path().join("model/.weightfs"), scratch.path().join("victim"));
        std::fs::create_dir_all(&state).unwrap();
        std::fs::write(&victim, "").unwrap();
        prepare(&state, &victim);
        let written = default_log(&state).map(|mut log| log.write_all(b"line\n").unwrap()).map_err(|e| e.to_string());
        (written, std::fs::read_to_string(&victim).unwrap())
    }

    #[test]
    fn the_log_is_appended_to_and_starts_anew_when_it_is_large() {
        let scratch = tempfile::tempdir().unwrap();
        let state = scratch.path().join(".weightfs");
        for _ in 0..2 {
            default_log(&state).unwrap().write_all(b"line\n").unwrap();
        }
        assert_eq!(std::fs::read_to_string(state.join(NAME)).unwrap(), "line\nline\n");
        File::options().write(true).open(state.join(NAME)).unwrap().set_len(LARGEST + 1).unwrap();
        default_log(&state).unwrap().write_all(b"new\n").unwrap();
        assert_eq!(std::fs::read_to_string(state.join(NAME)).unwrap(), "new\n");
        assert_eq!(std::fs::metadata(state.join(OLD)).unwrap().len(), LARGEST + 1);
    }

    #[test]
    fn a_log_that_leads_elsewhere_is_refused() {
        let (written, victim) = logs(|state, victim| symlink(victim, state.join(NAME)).unwrap());
        assert!(written.unwrap_err().contains("symbolic link") && victim.is_empty());
        let (written, victim) = logs(|state, victim| std::fs::hard_link(victim, state.join(NAME)).unwrap());
        assert!(written.unwrap_err().contains("no file of its own") && victim.is_empty());
        let (written, _) = logs(|state, _| {
            let fifo = FileType::Fifo;
            rustix::fs::mknodat(rustix::fs::CWD, state.join(NAME), fifo, 0o600.into(), 0).unwrap();
        });
        assert!(written.is_err());
    }

    #[test]
    fn a_state_directory_elsewhere_is_our_own_choice_or_refused() {
        let moved = |owner: Option<u32>| {
            logs(|state, victim| {
                std::fs::remove_dir(state).unwrap();
                let elsewhere = victim.with_file_name("elsewhere");
                std::fs::create_dir(&elsewhere).unwrap();
                symlink("../elsewhere", state).unwrap();
                std::os::unix::fs::lchown(state, owner, None).unwrap();
            })
        };
        assert_eq!(moved(None).0, Ok(()));
        if !rustix::process::geteuid().is_root() {
            return eprintln!("skipped: only root can give a link away");
        }
        assert!(moved(Some(12345)).0.unwrap_err().contains("user 12345"));
    }
}
