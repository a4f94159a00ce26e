//! A file system in memory that remembers every operation, so that a crash can be played at any of them.
//!
//! What a crash keeps: everything that was synced before it (a file's bytes and times by a sync of the file, a
//! directory's entries by a sync of the directory), and of the rest whatever the test says, each write whole or torn into
//! sectors of 512 bytes. Entries and bytes are independent of each other, which is more than a journaling file system
//! would ever do to us.
#![allow(dead_code)]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::{Arc, Mutex};
use weightfs::commit::storage::{Access, Lock, Sharing, Stat, Storage, StoredFile};

pub const SECTOR: usize = 512;
type Inode = u64;

#[derive(Debug, Clone)]
enum Node {
    File { bytes: Vec<u8>, mtime_ns: i64 },
    Directory(BTreeMap<String, Inode>),
}

#[derive(Debug, Clone)]
pub struct Tree {
    nodes: HashMap<Inode, Node>,
    next: Inode,
    /// Files that the storage calls shared.
    shared: HashSet<Inode>,
}

#[derive(Debug, Clone)]
pub enum Op {
    Write {
        inode: Inode,
        at: u64,
        bytes: Vec<u8>,
        mtime_ns: i64,
    },
    Empty {
        inode: Inode,
    },
    Mtime {
        inode: Inode,
        mtime_ns: i64,
    },
    Link {
        directory: Inode,
        name: String,
        inode: Inode,
        node: bool,
    },
    Unlink {
        directory: Inode,
        name: String,
    },
    Rename {
        from: (Inode, String),
        to: (Inode, String),
        inode: Inode,
    },
    SyncFile(Inode),
    SyncDirectory(Inode),
    /// A sync that failed: the kernel has marked the file's pages clean, and no later sync writes them.
    FailedSync(Inode),
}

/// What happens to one operation that was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Kept,
    Lost,
    /// Of a write, the sectors whose bit in the mask (repeated) is set.
    Torn(u64),
}

impl Tree {
    pub fn new(files: &[(String, Vec<u8>)]) -> Tree {
        let mut tree = Tree { nodes: HashMap::new(), next: 2, shared: HashSet::new() };
        tree.nodes.insert(1, Node::Directory(BTreeMap::new()));
        for (name, bytes) in files {
            let inode = tree.next;
            tree.next += 1;
            tree.nodes.insert(inode, Node::File { bytes: bytes.clone(), mtime_ns: 1_000 });
            tree.entries(1).insert(name.clone(), inode);
        }
        tree
    }

    pub fn share_all(&mut self) {
        self.shared = self.nodes.iter().filter(|(_, n)| matches!(n, Node::File { .. })).map(|(i, _)| *i).collect();
    }

    pub fn file(&self, path: &str) -> Option<&[u8]> {
        match self.nodes.get(&self.find(path).ok()?)? {
            Node::File { bytes, .. } => Some(bytes),
            Node::Directory(_) => None,
        }
    }

    fn entries(&mut self, directory: Inode) -> &mut BTreeMap<String, Inode> {
        match self.nodes.get_mut(&directory) {
            Some(Node::Directory(entries)) => entries,
            _ => panic!("inode {directory} is no directory"),
        }
    }

    fn find(&self, path: &str) -> io::Result<Inode> {
        let mut at = 1;
        for part in path.split('/').filter(|p| *p != ".") {
            at = match self.nodes.get(&at) {
                Some(Node::Directory(entries)) => *entries.get(part).ok_or(io::ErrorKind::NotFound)?,
                _ => return Err(io::ErrorKind::NotADirectory.into()),
            };
        }
        Ok(at)
    }

    /// The directory that holds a path, and the name in it.
    fn parent(&self, path: &str) -> io::Result<(Inode, String)> {
        let (directory, name) = path.rsplit_once('/').unwrap_or((".", path));
        Ok((self.find(directory)?, name.to_string()))
    }

    fn apply(&mut self, op: &Op, fate: Fate) {
        if fate == Fate::Lost {
            return;
        }
        match op {
            Op::Write { inode, at, bytes, mtime_ns } => {
                let Some(Node::File { bytes: file, mtime_ns: mtime }) = self.nodes.get_mut(inode) else { return };
                *mtime = *mtime_ns;
                for (i, part) in sectors(*at, bytes) {
                    if let Fate::Torn(mask) = fate
                        && mask >> (i % 64) & 1 == 0
                    {
                        continue;
                    }
                    let (from, to) = (part.start as usize, part.end as usize);
                    if file.len() < to {
                        file.resize(to, 0);
                    }
                    file[from..to].copy_from_slice(&bytes[from - *at as usize..to - *at as usize]);
                }
            }
            Op::Empty { inode } => {
                if let Some(Node::File { bytes, .. }) = self.nodes.get_mut(inode) {
                    bytes.clear();
                }
            }
            Op::Mtime { inode, mtime_ns } => {
                if let Some(Node::File { mtime_ns: mtime, .. }) = self.nodes.get_mut(inode) {
                    *mtime = *mtime_ns;
                }
            }
            Op::Link { directory, name, inode, .. } => {
                self.entries(*directory).insert(name.clone(), *inode);
            }
            Op::Unlink { directory, name } => {
                self.entries(*directory).remove(name);
            }
            Op::Rename { from, to, inode } => {
                if self.entries(from.0).get(&from.1) == Some(inode) {
                    self.entries(from.0).remove(&from.1);
                }
                self.entries(to.0).insert(to.1.clone(), *inode);
            }
            Op::SyncFile(_) | Op::SyncDirectory(_) | Op::FailedSync(_) => {}
        }
    }
}

/// Byte ranges of a write that lie in one sector of the file each.
fn sectors(at: u64, bytes: &[u8]) -> impl Iterator<Item = (u64, std::ops::Range<u64>)> {
    let end = at + bytes.len() as u64;
    (at / SECTOR as u64..end.div_ceil(SECTOR as u64)).map(move |s| {
        let start = s * SECTOR as u64;
        (s, start.max(at)..(start + SECTOR as u64).min(end))
    })
}

/// A history of operations on a tree.
#[derive(Clone)]
pub struct Recording {
    /// As it was when the recording began, all of it durable, and every inode that the operations make, still empty.
    start: Tree,
    pub ops: Vec<Op>,
}

impl Recording {
    /// Which of the first `n` operations a crash after them may lose.
    pub fn unsynced(&self, n: usize) -> Vec<usize> {
        let mut synced = HashSet::new();
        let mut unsynced = Vec::new();
        for i in (0..n).rev() {
            let durable = match &self.ops[i] {
                Op::SyncFile(inode) => {
                    synced.insert(*inode);
                    true
                }
                Op::FailedSync(inode) => {
                    // What was written before it is never written by a later sync.
                    synced.remove(inode);
                    true
                }
                Op::SyncDirectory(inode) => {
                    synced.insert(*inode);
                    true
                }
                Op::Write { inode, .. } | Op::Empty { inode } | Op::Mtime { inode, .. } => synced.contains(inode),
                Op::Link { directory, .. } | Op::Unlink { directory, .. } => synced.contains(directory),
                Op::Rename { to, .. } => synced.contains(&to.0),
            };
            if !durable {
                unsynced.push(i);
            }
        }
        unsynced.reverse();
        unsynced
    }

    /// The tree after a crash behind the first `n` operations, given what became of the unsynced ones.
    pub fn crash(&self, n: usize, fate: impl Fn(usize) -> Fate) -> Tree {
        let unsynced: HashSet<usize> = self.unsynced(n).into_iter().collect();
        let mut tree = self.start.clone();
        for (i, op) in self.ops[..n].iter().enumerate() {
            tree.apply(op, if unsynced.contains(&i) { fate(i) } else { Fate::Kept });
        }
        tree
    }

    /// Is the write's size one that tears?
    pub fn tears(&self, i: usize) -> bool {
        matches!(&self.ops[i], Op::Write { at, bytes, .. } if sectors(*at, bytes).count() > 1)
    }

    pub fn is_commit_point(&self, i: usize) -> bool {
        let Op::SyncDirectory(directory) = &self.ops[i] else { return false };
        let renamed =
            |op: &Op| matches!(op, Op::Rename { to, .. } if to.0 == *directory && to.1.starts_with("weight_v"));
        self.ops[..i].iter().any(renamed)
    }
}

/// Makes operations fail.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// The first of them, counted from when the fault was set.
    pub at: usize,
    pub errno: i32,
    /// All after it fail as well, removals aside (a full disk), until the fault is taken away.
    pub lasting: bool,
}

struct Inner {
    tree: Tree,
    recording: Recording,
    clock: i64,
    fault: Option<Fault>,
    /// Operations that could fail, since the fault was set.
    counted: usize,
    failed: bool,
}

#[derive(Clone)]
pub struct MemoryStorage(Arc<Mutex<Inner>>);

impl MemoryStorage {
    pub fn new(tree: Tree) -> MemoryStorage {
        let recording = Recording { start: tree.clone(), ops: Vec::new() };
        let inner = Inner { tree, recording, clock: 1_000, fault: None, counted: 0, failed: false };
        MemoryStorage(Arc::new(Mutex::new(inner)))
    }

    pub fn tree(&self) -> Tree {
        self.0.lock().unwrap().tree.clone()
    }

    /// Takes what is there for durable, and records from here.
    pub fn record(&self) {
        let mut inner = self.0.lock().unwrap();
        inner.recording = Recording { start: inner.tree.clone(), ops: Vec::new() };
    }

    pub fn recording(&self) -> Recording {
        self.0.lock().unwrap().recording.clone()
    }

    pub fn set_fault(&self, fault: Option<Fault>) {
        let mut inner = self.0.lock().unwrap();
        (inner.fault, inner.counted, inner.failed) = (fault, 0, false);
    }

    /// Operations that could have failed since the fault was set or taken away, and whether one did.
    pub fn counted(&self) -> (usize, bool) {
        let inner = self.0.lock().unwrap();
        (inner.counted, inner.failed)
    }
}

impl Inner {
    /// Counts an operation that may fail; the error when this one does.
    fn may_fail(&mut self, frees: bool) -> io::Result<()> {
        let at = self.counted;
        self.counted += 1;
        match self.fault {
            Some(fault) if at == fault.at || (fault.lasting && at > fault.at && !frees) => {
                self.failed = true;
                Err(io::Error::from_raw_os_error(fault.errno))
            }
            _ => Ok(()),
        }
    }

    fn perform(&mut self, op: Op) {
        self.tree.apply(&op, Fate::Kept);
        self.recording.ops.push(op);
    }

    fn make(&mut self, path: &str, node: Node) -> io::Result<Inode> {
        let (directory, name) = self.tree.parent(path)?;
        let inode = self.tree.next;
        self.tree.next += 1;
        // The inode is there, empty, in the state that every crash starts from; only its entry can be lost.
        self.tree.nodes.insert(inode, node.clone());
        self.recording.start.nodes.insert(inode, node);
        self.recording.start.next = self.tree.next;
        self.perform(Op::Link { directory, name, inode, node: true });
        Ok(inode)
    }

    fn stat(&self, inode: Inode) -> io::Result<Stat> {
        match self.tree.nodes.get(&inode) {
            Some(Node::File { bytes, mtime_ns }) => Ok(Stat { bytes: bytes.len() as u64, mtime_ns: *mtime_ns, inode }),
            Some(Node::Directory(_)) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

impl Storage for MemoryStorage {
    fn open(&self, path: &str, access: Access) -> io::Result<Arc<dyn StoredFile>> {
        let mut inner = self.0.lock().unwrap();
        let found = inner.tree.find(path);
        let inode = match (access, found) {
            (Access::Create, Ok(inode)) => {
                inner.may_fail(false)?;
                inner.perform(Op::Empty { inode });
                inode
            }
            (Access::Create, Err(_)) => {
                inner.may_fail(false)?;
                inner.make(path, Node::File { bytes: Vec::new(), mtime_ns: 0 })?
            }
            (_, found) => found?,
        };
        inner.stat(inode)?;
        Ok(Arc::new(MemoryFile { storage: self.clone(), inode }))
    }

    fn stat(&self, path: &str) -> io::Result<Stat> {
        let inner = self.0.lock().unwrap();
        inner.stat(inner.tree.find(path)?)
    }

    fn list(&self, directory: &str) -> io::Result<Vec<String>> {
        let inner = self.0.lock().unwrap();
        match &inner.tree.nodes[&inner.tree.find(directory)?] {
            Node::Directory(entries) => Ok(entries.keys().cloned().collect()),
            Node::File { .. } => Err(io::ErrorKind::NotADirectory.into()),
        }
    }

    fn create_directory(&self, path: &str) -> io::Result<()> {
        let mut inner = self.0.lock().unwrap();
        if inner.tree.find(path).is_ok() {
            return Ok(());
        }
        inner.may_fail(false)?;
        inner.make(path, Node::Directory(BTreeMap::new())).map(|_| ())
    }

    fn remove_directory(&self, path: &str) -> io::Result<()> {
        let mut inner = self.0.lock().unwrap();
        let inode = inner.tree.find(path)?;
        if !inner.tree.entries(inode).is_empty() {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        inner.may_fail(true)?;
        let (directory, name) = inner.tree.parent(path)?;
        inner.perform(Op::Unlink { directory, name });
        Ok(())
    }

    fn remove_file(&self, path: &str) -> io::Result<()> {
        let mut inner = self.0.lock().unwrap();
        inner.tree.find(path)?;
        inner.may_fail(true)?;
        let (directory, name) = inner.tree.parent(path)?;
        inner.perform(Op::Unlink { directory, name });
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut inner = self.0.lock().unwrap();
        let inode = inner.tree.find(from)?;
        if let Ok(target) = inner.tree.find(to)
            && matches!(&inner.tree.nodes[&target], Node::Directory(entries) if !entries.is_empty())
        {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        inner.may_fail(false)?;
        let (from, to) = (inner.tree.parent(from)?, inner.tree.parent(to)?);
        inner.perform(Op::Rename { from, to, inode });
        Ok(())
    }

    fn sync_directory(&self, path: &str) -> io::Result<()> {
        let mut inner = self.0.lock().unwrap();
        let inode = inner.tree.find(path)?;
        inner.may_fail(false)?;
        inner.perform(Op::SyncDirectory(inode));
        Ok(())
    }

    fn copy(&self, from: &str, to: &str) -> io::Result<Arc<dyn StoredFile>> {
        let source = self.open(from, Access::Read)?;
        let mut bytes = vec![0; source.stat()?.bytes as usize];
        source.read_exact_at(&mut bytes, 0)?;
        let target = self.open(to, Access::Create)?;
        target.write_all_at(&bytes, 0)?;
        Ok(target)
    }

    fn sharing(&self, path: &str) -> io::Result<Sharing> {
        let inner = self.0.lock().unwrap();
        match inner.tree.shared.contains(&inner.tree.find(path)?) {
            true => Ok(Sharing::Shared("a test says so")),
            false => Ok(Sharing::Own),
        }
    }

    fn try_lock(&self, _: &str, _: bool) -> io::Result<Option<Lock>> {
        Ok(Some(Box::new(())))
    }
}

struct MemoryFile {
    storage: MemoryStorage,
    inode: Inode,
}

impl StoredFile for MemoryFile {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let inner = self.storage.0.lock().unwrap();
        let Some(Node::File { bytes, .. }) = inner.tree.nodes.get(&self.inode) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let from = offset as usize;
        let part = from.checked_add(buffer.len()).and_then(|to| bytes.get(from..to));
        buffer.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut inner = self.storage.0.lock().unwrap();
        inner.clock += 1;
        let mtime_ns = inner.clock;
        let failed = inner.may_fail(false);
        // A write that fails may have written some of it.
        let bytes = if failed.is_err() { &bytes[..bytes.len() / 2] } else { bytes };
        inner.perform(Op::Write { inode: self.inode, at: offset, bytes: bytes.to_vec(), mtime_ns });
        failed
    }

    fn set_mtime(&self, mtime_ns: i64) -> io::Result<()> {
        let mut inner = self.storage.0.lock().unwrap();
        inner.may_fail(false)?;
        inner.perform(Op::Mtime { inode: self.inode, mtime_ns });
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut inner = self.storage.0.lock().unwrap();
        let failed = inner.may_fail(false);
        let op = if failed.is_err() { Op::FailedSync(self.inode) } else { Op::SyncFile(self.inode) };
        inner.perform(op);
        failed
    }

    fn stat(&self) -> io::Result<Stat> {
        self.storage.0.lock().unwrap().stat(self.inode)
    }

    fn forget_cache(&self) {}
}
