//! The way into a model directory's `.weightfs`. The directory may be another user's: whoever mounts it as root must not
//! write where a link of theirs leads, so folders are opened level by level and reached by descriptor from then on.

use crate::memory::is_root_or_us;
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat, readlinkat};
use std::ffi::OsString;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// An open folder: this one, whatever its name leads to later.
#[derive(Debug)]
pub struct StateFolder(OwnedFd);

impl StateFolder {
    /// Opens `path` (".weightfs", ".weightfs/log") in the model directory `root`. Links in it are followed if root or we
    /// made them (to a larger disk, say), and refused otherwise.
    pub fn open(root: &Path, path: &str) -> io::Result<StateFolder> {
        let mut folder = openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        for name in path.split('/') {
            folder = open_in(&folder, name, &root.join(path))?;
        }
        Ok(StateFolder(folder))
    }

    /// Opens `path`, and makes the last folder of it (mode 0700) if it is not there.
    pub fn make(root: &Path, path: &str) -> io::Result<StateFolder> {
        let made = match path.rsplit_once('/') {
            Some((parent, name)) => create(&StateFolder::open(root, parent)?.path().join(name)),
            None => create(&root.join(path)),
        };
        match made {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
            _ => StateFolder::open(root, path),
        }
    }

    pub fn fd(&self) -> &OwnedFd {
        &self.0
    }

    /// A path of it for as long as `self` lives.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

fn create(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

fn open_in(at: &OwnedFd, name: &str, whole: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let found = openat(at, name, flags | OFlags::NOFOLLOW, Mode::empty())?;
    let stat = fstat(&found)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Ok(found),
        FileType::Symlink if is_root_or_us(stat.st_uid) => {
            let target = PathBuf::from(OsString::from_vec(readlinkat(&found, "", Vec::new())?.into_bytes()));
            Ok(openat(at, &target, flags | OFlags::DIRECTORY, Mode::empty())?)
        }
        FileType::Symlink => {
            let why =
                format!("'{name}' in {} is a symbolic link that user {} made: remove it", whole.display(), stat.st_uid);
            Err(io::Error::other(why))
        }
        _ => Err(io::Error::from(io::ErrorKind::NotADirectory)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{lchown, symlink};

    #[test]
    fn links_are_followed_if_we_made_them_and_an_open_folder_stays_the_same() {
        let scratch = tempfile::tempdir().unwrap();
        let at = |name: &str| scratch.path().join(name);
        std::fs::create_dir_all(at("disk/state/log")).unwrap();
        std::fs::create_dir(at("model")).unwrap();
        symlink("../disk/state", at("model/.weightfs")).unwrap();
        let folder = StateFolder::open(&at("model"), ".weightfs/log").unwrap();
        std::fs::write(folder.path().join("1"), "one").unwrap();
        assert_eq!(std::fs::read(at("disk/state/log/1")).unwrap(), b"one");

        // What is open stays; what another user put there is not believed.
        std::fs::rename(at("disk/state/log"), at("disk/state/log.old")).unwrap();
        std::fs::write(folder.path().join("2"), "two").unwrap();
        assert_eq!(std::fs::read(at("disk/state/log.old/2")).unwrap(), b"two");
        symlink(at("disk"), at("disk/state/log")).unwrap();
        assert!(StateFolder::open(&at("model"), ".weightfs/log").is_ok());
        if rustix::process::geteuid().is_root() {
            lchown(at("disk/state/log"), Some(12345), Some(12345)).unwrap();
            let error = StateFolder::open(&at("model"), ".weightfs/log").unwrap_err().to_string();
            assert!(error.contains("user 12345") && error.contains("'log'"), "{error}");
            lchown(at("model/.weightfs"), Some(12345), Some(12345)).unwrap();
            let error = StateFolder::open(&at("model"), ".weightfs").unwrap_err().to_string();
            assert!(error.contains("'.weightfs'"), "{error}");
        }

        std::fs::write(at("disk/state/file"), "").unwrap();
        let error = StateFolder::open(&at("disk"), "state/file").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotADirectory);
        let error = StateFolder::open(&at("disk"), "state/none").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
