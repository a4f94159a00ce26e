//! A job's file, as the process means it that wrote its path to `ctl`: relative to its directory, in its root.

use super::FsError;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Above this a file is no job somebody wrote: reading it would fill the memory.
const LARGEST: u64 = 1 << 30;

/// What `writer` (a process or thread) calls `path`.
pub fn path_of(path: &str, writer: u32) -> Result<PathBuf, FsError> {
    let given = Path::new(path);
    // The writer may live in a container, or in mounts of its own (systemd's PrivateTmp): what it calls by a name is not
    // what we do. Where that cannot be looked at, ours has to do.
    let elsewhere = writer != 0 && !shares_our_files(writer);
    match given.strip_prefix("/") {
        Ok(below) if elsewhere => Ok(PathBuf::from(format!("/proc/{writer}/root")).join(below)),
        Ok(_) => Ok(given.to_owned()),
        Err(_) if elsewhere => Ok(PathBuf::from(format!("/proc/{writer}/cwd")).join(given)),
        Err(_) => {
            let directory = PathBuf::from(format!("/proc/{writer}/cwd"));
            // Where that leads: the link goes when its process does.
            std::fs::read_link(&directory).map(|directory| directory.join(given)).map_err(|_| {
                let why = "the directory of its writer is not known: give an absolute path";
                FsError::new(Errno::INVAL, format!("{path}: {why}"))
            })
        }
    }
}

/// Reads the file that `writer` (a process or thread) calls `path`. Returns its text and what to call it.
pub fn read(path: &str, writer: u32) -> Result<(String, String), FsError> {
    let fail = |errno: Errno, why: &str| Err(FsError::new(errno, format!("the job {path}: {why}")));
    // Never waits for the other end of a pipe.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = match below_its_root(path, writer) {
        // Links mean what they mean there.
        Some((root, path)) => openat2(&root, &path, flags, Mode::empty(), ResolveFlags::IN_ROOT),
        None => rustix::fs::open(path_of(path, writer)?, flags, Mode::empty()),
    };
    let mut file = match opened {
        Ok(file) => File::from(file),
        Err(Errno::NOENT) => return fail(Errno::NOENT, "there is no such file"),
        Err(e @ (Errno::ACCESS | Errno::PERM)) => {
            return fail(e, "the daemon may not read it: its owner is the user who mounted");
        }
        Err(e) => return fail(e, &std::io::Error::from(e).to_string()),
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return fail(Errno::INVAL, "it is no regular file");
    }
    if metadata.len() > LARGEST {
        return fail(Errno::FBIG, "it is larger than 1 GiB: cut it into several jobs");
    }
    let mut bytes = Vec::new();
    file.by_ref().take(LARGEST + 1).read_to_end(&mut bytes)?;
    match String::from_utf8(bytes) {
        Ok(text) => {
            let name = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)));
            Ok((text, name.map_or(path.to_string(), |n| n.display().to_string())))
        }
        Err(e) => {
            let line = 1 + e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|&&b| b == b'\n').count();
            fail(Errno::INVAL, &format!("line {line} is not UTF-8 text"))
        }
    }
}

/// The root of a writer whose files are not ours, and `path` from there; `None` for any other.
fn below_its_root(path: &str, writer: u32) -> Option<(OwnedFd, PathBuf)> {
    if writer == 0 || shares_our_files(writer) {
        return None;
    }
    let its = |what: &str| format!("/proc/{writer}/{what}");
    let root = rustix::fs::open(its("root"), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    // Both as its mounts have them.
    let (top, directory) = (std::fs::read_link(its("root")).ok()?, std::fs::read_link(its("cwd")).ok()?);
    let directory = Path::new("/").join(directory.strip_prefix(top).ok()?);
    Some((root, directory.join(path)))
}

/// Whether the writer has our root and our mounts, as far as they can be looked at.
fn shares_our_files(writer: u32) -> bool {
    let root = |process: &str| std::fs::metadata(format!("/proc/{process}/root")).map(|m| (m.dev(), m.ino())).ok();
    let mounts = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    let writer = writer.to_string();
    let differ = |its: Option<PathBuf>| its.is_some() && its != mounts("thread-self");
    !differ(mounts(&writer)) && root(&writer).is_none_or(|its| Some(its) == root("thread-self"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};

    #[test]
    fn a_writer_with_mounts_of_its_own_means_its_own_files() {
        let scratch = tempfile::tempdir().unwrap();
        let job = scratch.path().join("job.json");
        std::fs::write(&job, "ours").unwrap();
        // By another name it is `link.json`, by an absolute one.
        let script = "mount -t tmpfs none \"$1\" && cd \"$1\" && printf its > job.json && ln -s \"$1/job.json\" link.json \
            && echo ready && read end";
        let mut unshare = Command::new("unshare");
        unshare.args(["-m", "sh", "-c", script, "sh"]).arg(scratch.path());
        let Ok(mut writer) = unshare.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() else {
            return eprintln!("skipped: there is no unshare here");
        };
        let mut said = String::new();
        BufReader::new(writer.stdout.as_mut().unwrap()).read_line(&mut said).unwrap();
        if said != "ready\n" {
            let _ = writer.wait();
            return eprintln!("skipped: no mounts of one's own may be made here");
        }
        let text = |path: &str, writer| read(path, writer).map(|(text, _)| text).unwrap();
        let absolute = job.to_str().unwrap();
        let link = scratch.path().join("link.json");
        let read = [
            text(absolute, writer.id()),
            text("job.json", writer.id()),
            text(link.to_str().unwrap(), writer.id()),
            text("link.json", writer.id()),
            text(absolute, std::process::id()),
        ];
        writer.stdin.take().unwrap().write_all(b"\n").unwrap();
        writer.wait().unwrap();
        assert_eq!(read, ["its", "its", "its", "its", "ours"]);
    }
}
