//! Opens files of the model directory for other users, in a mount that is shared with them. We may read more than they,
//! and whoever may write the directory decides where its names lead; the kernel decides by attributes that may be a second
//! old and says nothing of what lies beyond a link. So the way is gone step by step, on descriptors that nobody can
//! exchange, and each directory on it must be one that the reader may search, the file one that they may read, by their modes.

use super::FsError;
use crate::memory::{ProcessOwner, is_root_or_us, process_owner};
use rustix::fd::OwnedFd;
use rustix::fs::{FileType, Mode, OFlags, PROC_SUPER_MAGIC, Stat, fstat, fstatfs, open, openat, readlinkat};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// As many as the kernel follows (path_resolution(7)).
const MOST_LINKS: usize = 40;
const READ: u32 = 0o4;
const SEARCH: u32 = 0o1;

/// A user for whom a file is opened; without ids (of another PID namespace, or hidden) one of the others.
#[derive(Debug)]
pub(super) struct Reader(Option<ProcessOwner>);

impl Reader {
    /// Whoever `pid` (a process or thread) reads for; `None` for us and root, whose rights are not less than ours.
    pub(super) fn other(pid: u32) -> Option<Reader> {
        let owner = process_owner(pid);
        match &owner {
            Some(owner) if is_root_or_us(owner.uids[3]) => None,
            _ => Some(Reader(owner)),
        }
    }

    /// Whether the mode allows `what` (of rwx) to the reader.
    fn may(&self, what: u32, stat: &Stat) -> bool {
        let class = match &self.0 {
            Some(reader) if reader.uids[3] == stat.st_uid => 6,
            Some(reader) if reader.groups.contains(&stat.st_gid) => 3,
            _ => 0,
        };
        stat.st_mode >> class & what != 0
    }
}

/// Opens the regular file at `path` below `root`; of `root` itself the kernel has decided.
pub(super) fn open_for(reader: &Reader, root: &Path, path: &Path) -> Result<File, FsError> {
    let refused = |why: &str| FsError::new(Errno::ACCESS, format!("{}: {why}", path.display()));
    let fail = |e: Errno| FsError::new(e, format!("{}: {e}", path.display()));
    let (found, stat) = walk(reader, root, path).map_err(fail)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {}
        FileType::Directory => return Err(FsError::new(Errno::ISDIR, "it is a directory")),
        _ => return Err(FsError::not_found(path.display())),
    }
    if !reader.may(READ, &stat) {
        return Err(refused("its mode does not let its reader read it"));
    }
    // What is in there depends on who opens it, whatever the mode says.
    if fstatfs(&found).map_err(fail)?.f_type == PROC_SUPER_MAGIC {
        return Err(refused("it leads into /proc"));
    }
    // The same file again, not its name.
    let again = format!("/proc/self/fd/{}", found.as_raw_fd());
    Ok(File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(again)?)
}

fn walk(reader: &Reader, root: &Path, path: &Path) -> Result<(OwnedFd, Stat), Errno> {
    let step = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at = open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let (mut rest, mut links) = (parts(path), 0);
    while let Some(part) = rest.pop() {
        let next = openat(&at, &part, step, Mode::empty())?;
        let stat = fstat(&next)?;
        if FileType::from_raw_mode(stat.st_mode).is_symlink() {
            links += 1;
            if links > MOST_LINKS {
                return Err(Errno::LOOP);
            }
            let target = OsString::from_vec(readlinkat(&next, "", Vec::new())?.into_bytes());
            rest.extend(parts(&PathBuf::from(target)));
        } else if rest.is_empty() {
            return Ok((next, stat));
        } else if !FileType::from_raw_mode(stat.st_mode).is_dir() {
            return Err(Errno::NOTDIR);
        } else if !reader.may(SEARCH, &stat) {
            return Err(Errno::ACCESS);
        } else {
            at = next;
        }
    }
    Err(Errno::NOENT)
}

/// The parts of a path, the first one last. That of an absolute path is the root.
fn parts(path: &Path) -> Vec<OsString> {
    path.components().rev().map(|part| part.as_os_str().to_os_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// A model directory and what lies beside it, all of the user who runs the test.
    struct World(tempfile::TempDir);

    impl World {
        fn new() -> World {
            let world = World(tempfile::tempdir().unwrap());
            world.mode("", 0o755);
            world
        }

        fn at(&self, path: &str) -> PathBuf {
            self.0.path().join(path)
        }

        fn mode(&self, path: &str, mode: u32) {
            std::fs::set_permissions(self.at(path), PermissionsExt::from_mode(mode)).unwrap();
        }

        fn file(&self, path: &str, mode: u32) {
            std::fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
            std::fs::write(self.at(path), path).unwrap();
            self.mode(path, mode);
        }

        /// What another user reads, in that group.
        fn reads(&self, name: &str, groups: &[u32]) -> Result<String, Errno> {
            let reader = Reader(Some(ProcessOwner { uids: [12345; 4], groups: groups.to_vec() }));
            let mut text = String::new();
            let file = open_for(&reader, &self.at("model"), name.as_ref()).map_err(|e| e.errno);
            file.map(|mut file| file.read_to_string(&mut text).unwrap()).map(|_| text)
        }
    }

    #[test]
    fn another_user_reads_what_modes_let_them_and_nothing_else() {
        let world = World::new();
        let group = rustix::process::getegid().as_raw();
        world.file("model/all", 0o644);
        world.file("model/group", 0o640);
        world.file("model/mine", 0o600);
        world.file("model/not the group", 0o604);
        world.file("model/closed/all", 0o644);
        world.mode("model/closed", 0o700);
        assert_eq!(world.reads("all", &[]), Ok("model/all".into()));
        assert_eq!(world.reads("group", &[]), Err(Errno::ACCESS));
        assert_eq!(world.reads("group", &[1, group]), Ok("model/group".into()));
        assert_eq!(world.reads("not the group", &[group]), Err(Errno::ACCESS));
        for name in ["mine", "closed/all"] {
            assert_eq!(world.reads(name, &[1]), Err(Errno::ACCESS), "{name}");
        }
        assert_eq!(world.reads("closed", &[]), Err(Errno::ISDIR));
        assert_eq!(world.reads("all/more", &[]), Err(Errno::NOTDIR));
        assert_eq!(world.reads("nothing", &[]), Err(Errno::NOENT));
        // Nobody is known: one of the others.
        assert!(open_for(&Reader(None), &world.at("model"), "all".as_ref()).is_ok());
        assert!(open_for(&Reader(None), &world.at("model"), "group".as_ref()).is_err());
    }

    #[test]
    fn links_lead_another_user_no_further_than_their_own_rights_do() {
        let world = World::new();
        world.file("blobs/all", 0o644);
        world.file("blobs/mine", 0o600);
        world.file("closed/all", 0o644);
        world.mode("closed", 0o700);
        std::fs::create_dir(world.at("model")).unwrap();
        let link = |target: &Path, name: &str| symlink(target, world.at("model").join(name)).unwrap();
        // As in a hub's cache.
        link("../blobs/all".as_ref(), "config.json");
        link("config.json".as_ref(), "again");
        link("../blobs/mine".as_ref(), "mine");
        link("../closed/all".as_ref(), "closed");
        link(&world.at("closed"), "directory");
        link("/proc/self/maps".as_ref(), "maps");
        link("circle".as_ref(), "circle");
        for name in ["config.json", "again"] {
            assert_eq!(world.reads(name, &[]), Ok("blobs/all".into()), "{name}");
        }
        for name in ["mine", "closed", "directory/all", "maps"] {
            assert_eq!(world.reads(name, &[]), Err(Errno::ACCESS), "{name}");
        }
        assert_eq!(world.reads("circle", &[]), Err(Errno::LOOP));
    }

    #[test]
    fn only_root_and_we_ourselves_are_no_other() {
        assert!(Reader::other(std::process::id()).is_none());
        assert!(Reader::other(0).is_some(), "of another PID namespace");
    }
}
