//! The disk, with a test's own doings before files on it are opened.

use std::io;
use std::path::Path;
use std::sync::Arc;
use weightfs::commit::DiskStorage;
use weightfs::commit::storage::{Access, Lock, Sharing, Stat, Storage, StoredFile};

type Hook = Box<dyn Fn(&str, Access) -> io::Result<()> + Send + Sync>;

pub struct Hooked {
    disk: DiskStorage,
    before_open: Hook,
}

impl Hooked {
    pub fn new(
        root: &Path,
        before_open: impl Fn(&str, Access) -> io::Result<()> + Send + Sync + 'static,
    ) -> Arc<Hooked> {
        Arc::new(Hooked { disk: DiskStorage::new(root), before_open: Box::new(before_open) })
    }
}

impl Storage for Hooked {
    fn open(&self, path: &str, access: Access) -> io::Result<Arc<dyn StoredFile>> {
        (self.before_open)(path, access)?;
        self.disk.open(path, access)
    }

    fn stat(&self, path: &str) -> io::Result<Stat> {
        self.disk.stat(path)
    }

    fn list(&self, directory: &str) -> io::Result<Vec<String>> {
        self.disk.list(directory)
    }

    fn create_directory(&self, path: &str) -> io::Result<()> {
        self.disk.create_directory(path)
    }

    fn remove_directory(&self, path: &str) -> io::Result<()> {
        self.disk.remove_directory(path)
    }

    fn remove_file(&self, path: &str) -> io::Result<()> {
        self.disk.remove_file(path)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.disk.rename(from, to)
    }

    fn sync_directory(&self, path: &str) -> io::Result<()> {
        self.disk.sync_directory(path)
    }

    fn copy(&self, from: &str, to: &str) -> io::Result<Arc<dyn StoredFile>> {
        self.disk.copy(from, to)
    }

    fn sharing(&self, path: &str) -> io::Result<Sharing> {
        self.disk.sharing(path)
    }

    fn try_lock(&self, path: &str, exclusive: bool) -> io::Result<Option<Lock>> {
        self.disk.try_lock(path, exclusive)
    }
}
