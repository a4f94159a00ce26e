//! [`Storage`] on a real directory.

use super::storage::{Access, Lock, Sharing, Stat, Storage, StoredFile};
use crate::memory::is_root_or_us;
use crate::model::{STATE_DIR, StateFolder, create_anew, open_regular};
use rustix::fs::{FlockOperation, Mode, OFlags, Timespec, Timestamps};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub struct DiskStorage {
    root: PathBuf,
}

impl DiskStorage {
    pub fn new(root: &Path) -> DiskStorage {
        DiskStorage { root: root.to_path_buf() }
    }

    /// Where the entry `path` is.
    fn at(&self, path: &str) -> io::Result<Place> {
        match path.rsplit_once('/') {
            Some((folder, name)) if is_state(folder) => {
                let folder = StateFolder::open(&self.root, folder)?;
                Ok(Place { path: folder.path().join(name), folder: Some(folder) })
            }
            _ => Ok(Place { path: self.root.join(path), folder: None }),
        }
    }

    /// Where the entries of the directory `path` are.
    fn directory(&self, path: &str) -> io::Result<Place> {
        if !is_state(path) {
            return Ok(Place { path: self.root.join(path), folder: None });
        }
        let folder = StateFolder::open(&self.root, path)?;
        Ok(Place { path: folder.path(), folder: Some(folder) })
    }
}

fn is_state(folder: &str) -> bool {
    folder.split('/').next() == Some(STATE_DIR)
}

struct Place {
    path: PathBuf,
    /// What the path goes through, below `.weightfs`: there nothing is reached by a link that another user made.
    folder: Option<StateFolder>,
}

impl Place {
    /// To open the entry with: in `.weightfs` no file of ours is a link.
    fn flags(&self) -> OFlags {
        if self.folder.is_some() { OFlags::NOFOLLOW } else { OFlags::empty() }
    }
}

fn stat_of(metadata: &std::fs::Metadata) -> Stat {
    Stat {
        bytes: metadata.len(),
        mtime_ns: metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec()),
        inode: metadata.ino(),
    }
}

impl Storage for DiskStorage {
    fn open(&self, path: &str, access: Access) -> io::Result<Arc<dyn StoredFile>> {
        let place = self.at(path)?;
        let (mut options, mut flags) = (File::options(), place.flags());
        options.read(true);
        match access {
            Access::Read => {}
            Access::ReadWrite => {
                options.write(true);
            }
            Access::Create => {
                options.write(true).create(true).truncate(true).mode(0o600);
                flags |= OFlags::NOFOLLOW;
            }
        }
        Ok(Arc::new(DiskFile(open_regular(&mut options, flags, &place.path)?)))
    }

    fn stat(&self, path: &str) -> io::Result<Stat> {
        let place = self.at(path)?;
        Ok(stat_of(&match place.folder {
            Some(_) => std::fs::symlink_metadata(&place.path)?,
            None => std::fs::metadata(&place.path)?,
        }))
    }

    fn list(&self, directory: &str) -> io::Result<Vec<String>> {
        let (place, mut names) = (self.directory(directory)?, Vec::new());
        for entry in std::fs::read_dir(&place.path)? {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name); // a name that is not UTF-8 is none of ours
            }
        }
        names.sort();
        Ok(names)
    }

    fn create_directory(&self, path: &str) -> io::Result<()> {
        StateFolder::make(&self.root, path).map(drop)
    }

    fn remove_directory(&self, path: &str) -> io::Result<()> {
        std::fs::remove_dir(&self.at(path)?.path)
    }

    fn remove_file(&self, path: &str) -> io::Result<()> {
        std::fs::remove_file(&self.at(path)?.path)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let (from, to) = (self.at(from)?, self.at(to)?);
        std::fs::rename(&from.path, &to.path)
    }

    fn sync_directory(&self, path: &str) -> io::Result<()> {
        File::open(&self.directory(path)?.path)?.sync_all()
    }

    fn copy(&self, from: &str, to: &str) -> io::Result<Arc<dyn StoredFile>> {
        let (from, to) = (self.at(from)?, self.at(to)?);
        let mut source = open_regular(File::options().read(true), from.flags(), &from.path)?;
        let metadata = source.metadata()?;
        let mut target = create_anew(&to.path)?;
        if rustix::fs::ioctl_ficlone(&target, &source).is_err() {
            io::copy(&mut source, &mut target)?; // copy_file_range where the kernel has it
        }
        target.set_permissions(std::fs::Permissions::from_mode(metadata.mode() & 0o7777 | 0o200))?;
        // Only root may give a file away; for anyone else the copy is simply theirs.
        let _ = std::os::unix::fs::fchown(&target, Some(metadata.uid()), Some(metadata.gid()));
        Ok(Arc::new(DiskFile(target)))
    }

    fn sharing(&self, path: &str) -> io::Result<Sharing> {
        let path = self.root.join(path);
        let (entry, resolved) = (std::fs::symlink_metadata(&path)?, path.canonicalize()?);
        // A hub cache keeps `blobs/<hash>`, and `snapshots/<revision>/<name>` as links to them: a blob is named after its
        // content and may serve other revisions.
        let blobs = resolved.parent().filter(|p| p.file_name().is_some_and(|n| n == "blobs"));
        if blobs.is_some_and(|b| b.with_file_name("snapshots").is_dir()) {
            return Ok(Sharing::Shared("a blob of a hub cache"));
        }
        let file = std::fs::metadata(&resolved)?;
        // Whoever made the link need not be allowed to write where it leads, as we are.
        if entry.is_symlink() && !is_root_or_us(entry.uid()) && entry.uid() != file.uid() {
            return Ok(Sharing::Shared("a link that another user made"));
        }
        match file.nlink() {
            0 | 1 => Ok(Sharing::Own),
            _ => Ok(Sharing::Shared("a file with other hard links")),
        }
    }

    fn try_lock(&self, path: &str, exclusive: bool) -> io::Result<Option<Lock>> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::open(&self.at(path)?.path, flags, Mode::RUSR | Mode::WUSR)?;
        let operation = match exclusive {
            true => FlockOperation::NonBlockingLockExclusive,
            false => FlockOperation::NonBlockingLockShared,
        };
        match rustix::fs::flock(&file, operation) {
            Ok(()) => Ok(Some(Box::new(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

struct DiskFile(File);

impl StoredFile for DiskFile {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn set_mtime(&self, nanoseconds: i64) -> io::Result<()> {
        let keep = Timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT };
        let mtime = Timespec {
            tv_sec: nanoseconds.div_euclid(1_000_000_000),
            tv_nsec: nanoseconds.rem_euclid(1_000_000_000) as _,
        };
        Ok(rustix::fs::futimens(&self.0, &Timestamps { last_access: keep, last_modification: mtime })?)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_all()
    }

    fn stat(&self) -> io::Result<Stat> {
        Ok(stat_of(&self.0.metadata()?))
    }

    fn write_behind(&self, offset: u64, bytes: u64) {
        // What this call does to pages that are dirty is to begin writing them.
        let bytes = std::num::NonZeroU64::new(bytes);
        let _ = rustix::fs::fadvise(&self.0, offset, bytes, rustix::fs::Advice::DontNeed);
    }

    fn forget_cache(&self) {
        let _ = rustix::fs::fadvise(&self.0, 0, None, rustix::fs::Advice::DontNeed);
    }
}
