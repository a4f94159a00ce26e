//! The mounted directory as a tree of files, without FUSE: what is where, how it looks, what opening and reading it gives.
//! Everything of the model directory is passed through as it is now; weights, `ctl`, `status` and `commits` come from
//! [`Mounted`].
//!
//! Lock order: `nodes` and `handles` are leaves, never held while anything else is called.

use super::permission::{Reader, open_for};
use super::{FsError, Mounted, Served, links};
use crate::model::STATE_DIR;
use parking_lot::Mutex;
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What an inode stands for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Node {
    Root,
    Ctl,
    Status,
    StatusJson,
    /// Shard of the live view, by number.
    Weights(usize),
    Commits,
    Commit(u64),
    CommitWeights(u64, usize),
    /// Anything else in the model directory, by its path there; seen under a commit or at the top.
    Disk(Option<u64>, PathBuf),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Directory,
    File,
    Symlink,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    pub ino: u64,
    pub kind: Kind,
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: SystemTime,
    pub ctime: SystemTime,
    /// Whether the kernel may remember these for a moment.
    pub cacheable: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub ino: u64,
    pub kind: Kind,
    pub name: OsString,
}

/// What the adapter needs to know of a file that was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opening {
    pub handle: u64,
    pub content: Content,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A shard of the view: the kernel may serve it from the view's own file.
    Held(usize),
    /// A shard read where the weights are, each read anew.
    Direct(usize),
    /// Bytes that stay: the kernel may cache them as it likes while the file is open.
    Stable,
    /// A file of the model directory: another may have taken its name since others opened it.
    Ordinary,
    /// Made at open or on the first read; its size is not known before.
    Composed,
    Control,
}

enum Handle {
    Weights(usize),
    CommitWeights(u64, usize),
    Disk(File),
    Text(Arc<TextHandle>),
    Directory(Arc<Vec<Entry>>),
    Control,
}

/// An open `status`: its text is made when it is opened and again by each read from the start, so that a program can
/// keep it open, `poll` it and read it again.
struct TextHandle {
    json: bool,
    made: Mutex<(u64, Vec<u8>)>,
}

const ROOT: u64 = 1;
const FIRST_DYNAMIC: u64 = 64;

struct Nodes {
    by_ino: HashMap<u64, (Node, u64)>,
    by_node: HashMap<Node, u64>,
    next: u64,
}

/// The file tree of one mount.
pub struct Tree {
    mounted: Arc<Mounted>,
    nodes: Mutex<Nodes>,
    handles: Mutex<(u64, HashMap<u64, Handle>)>,
    born: SystemTime,
    shared: bool,
}

impl Tree {
    pub fn new(mounted: Arc<Mounted>) -> Tree {
        let mut nodes = Nodes { by_ino: HashMap::new(), by_node: HashMap::new(), next: FIRST_DYNAMIC };
        for (ino, node) in
            [(ROOT, Node::Root), (2, Node::Ctl), (3, Node::Status), (4, Node::StatusJson), (5, Node::Commits)]
        {
            nodes.by_ino.insert(ino, (node.clone(), 1));
            nodes.by_node.insert(node, ino);
        }
        Tree { mounted, nodes: Mutex::new(nodes), handles: Mutex::default(), born: SystemTime::now(), shared: false }
    }

    /// For a mount that other users may read: a file of the model directory is opened with their rights, not with ours.
    pub fn shared(self, shared: bool) -> Tree {
        Tree { shared, ..self }
    }

    pub fn mounted(&self) -> &Arc<Mounted> {
        &self.mounted
    }

    // -- names --

    /// Finds `name` in directory `parent` and counts one reference to it for the kernel ([`Tree::forget`]).
    pub fn lookup(&self, parent: u64, name: &OsStr) -> Result<Attributes, FsError> {
        let node = self.child(&self.node(parent)?, name)?;
        // Looked at before it gets a number: what is not there leaves nothing behind.
        let attributes = self.describe(&node, 0)?;
        Ok(Attributes { ino: self.number(node, 1), ..attributes })
    }

    /// The kernel dropped `count` references to `ino`.
    pub fn forget(&self, ino: u64, count: u64) {
        let mut nodes = self.nodes.lock();
        if ino < FIRST_DYNAMIC {
            return;
        }
        if let Some((_, references)) = nodes.by_ino.get_mut(&ino) {
            *references = references.saturating_sub(count);
            if *references == 0
                && let Some((node, _)) = nodes.by_ino.remove(&ino)
            {
                nodes.by_node.remove(&node);
            }
        }
    }

    pub fn attributes(&self, ino: u64) -> Result<Attributes, FsError> {
        self.describe(&self.node(ino)?, ino)
    }

    /// The target of a symbolic link: only links that lead nowhere are shown as links.
    pub fn readlink(&self, ino: u64) -> Result<PathBuf, FsError> {
        let node = self.node(ino)?;
        // A link that is followed is shown as what it leads to.
        match (&node, self.describe(&node, ino)?.kind) {
            (Node::Disk(_, path), Kind::Symlink) => Ok(std::fs::read_link(self.on_disk(path))?),
            _ => Err(FsError::new(Errno::INVAL, "it is no symbolic link")),
        }
    }

    fn node(&self, ino: u64) -> Result<Node, FsError> {
        let nodes = self.nodes.lock();
        nodes
            .by_ino
            .get(&ino)
            .map(|(n, _)| n.clone())
            .ok_or_else(|| FsError::new(Errno::STALE, "the file is forgotten"))
    }

    fn number(&self, node: Node, references: u64) -> u64 {
        let mut nodes = self.nodes.lock();
        if let Some(&ino) = nodes.by_node.get(&node) {
            if let Some((_, count)) = nodes.by_ino.get_mut(&ino) {
                *count += references;
            }
            return ino;
        }
        let ino = nodes.next;
        nodes.next += 1;
        nodes.by_node.insert(node.clone(), ino);
        nodes.by_ino.insert(ino, (node, references));
        ino
    }

    /// The inode of shard `shard`, if the kernel knows it.
    pub fn weights_ino(&self, shard: usize) -> Option<u64> {
        self.nodes.lock().by_node.get(&Node::Weights(shard)).copied()
    }

    /// Is `ino` the control file?
    pub fn is_control(&self, ino: u64) -> bool {
        matches!(self.node(ino), Ok(Node::Ctl))
    }

    fn child(&self, parent: &Node, name: &OsStr) -> Result<Node, FsError> {
        let missing = || FsError::not_found(name.display());
        // The kernel resolves these itself and never sends them; a path made of them would leave the directory.
        if name.is_empty() || name == "." || name == ".." || name.as_bytes().contains(&b'/') {
            return Err(missing());
        }
        let shard = || self.mounted.directory.shards.iter().position(|s| OsStr::new(&s.name) == name);
        match parent {
            Node::Root => Ok(match name.to_str() {
                Some(STATE_DIR) => return Err(missing()),
                Some("ctl") if !self.mounted.read_only => Node::Ctl,
                Some("status") => Node::Status,
                Some("status.json") => Node::StatusJson,
                Some("commits") => Node::Commits,
                _ => match shard() {
                    Some(shard) => Node::Weights(shard),
                    None => Node::Disk(None, PathBuf::from(name)),
                },
            }),
            Node::Commits => {
                // As it is listed: neither `+1` nor `01`.
                let id = name.to_str().and_then(|n| n.parse::<u64>().ok().filter(|id| id.to_string() == n));
                id.map(Node::Commit).ok_or_else(missing)
            }
            Node::Commit(id) => Ok(match shard() {
                _ if name == STATE_DIR => return Err(missing()),
                Some(shard) => Node::CommitWeights(*id, shard),
                None => Node::Disk(Some(*id), PathBuf::from(name)),
            }),
            Node::Disk(commit, path) => Ok(Node::Disk(*commit, path.join(name))),
            _ => Err(FsError::new(Errno::NOTDIR, "it is no directory")),
        }
    }

    // -- attributes --

    fn describe(&self, node: &Node, ino: u64) -> Result<Attributes, FsError> {
        let mounted = &self.mounted;
        let ours = |kind, mode, mtime| Attributes {
            ino,
            kind,
            size: 0,
            mode,
            uid: mounted.owner.0,
            gid: mounted.owner.1,
            mtime,
            ctime: mtime,
            cacheable: false,
        };
        let shard = |shard: usize, mtime: SystemTime| -> Result<Attributes, FsError> {
            // The live weights do not go with the file's name: whoever puts another there says nothing of who may read these.
            let disk = mounted.directory.shards[shard].file().metadata();
            let disk = disk.map_or_else(|_| ours(Kind::File, 0o400, mtime), |m| from_disk(&m, ino));
            let size = mounted.directory.shards[shard].bytes();
            Ok(Attributes { kind: Kind::File, size, mtime, ctime: mtime, cacheable: false, ..disk })
        };
        match node {
            Node::Root => {
                // `status` answers, and weights are shown, also when somebody moved the model directory away.
                let disk = std::fs::metadata(&mounted.directory.path)
                    .map_or_else(|_| ours(Kind::Directory, 0o500, self.born), |m| from_disk(&m, ino));
                Ok(Attributes { uid: mounted.owner.0, gid: mounted.owner.1, cacheable: false, ..disk })
            }
            Node::Ctl => Ok(ours(Kind::File, 0o600, self.born)),
            Node::Status | Node::StatusJson => Ok(ours(Kind::File, 0o444, mounted.changed_at())),
            Node::Commits => Ok(ours(Kind::Directory, 0o555, mounted.changed_at())),
            Node::Weights(index) => shard(*index, mounted.weights_mtime(*index)),
            Node::Commit(id) => Ok(ours(Kind::Directory, 0o555, mounted.commit_time(*id)?)),
            Node::CommitWeights(id, index) => shard(*index, mounted.commit_time(*id)?),
            Node::Disk(_, path) => {
                let full = self.on_disk(path);
                self.refuse_loop(path)?;
                match std::fs::metadata(&full) {
                    Ok(metadata) => {
                        if metadata.is_dir() && leads_back(&full, &self.mounted.directory.path) {
                            return Err(FsError::new(
                                Errno::LOOP,
                                format!("{} leads back above itself", path.display()),
                            ));
                        }
                        if !metadata.is_dir() && !metadata.is_file() {
                            return Err(FsError::not_found(path.display()));
                        }
                        Ok(from_disk(&metadata, ino))
                    }
                    // A link that leads nowhere is shown as what it is.
                    Err(e) => match std::fs::symlink_metadata(&full) {
                        Ok(metadata) if metadata.is_symlink() => Ok(from_disk(&metadata, ino)),
                        _ => Err(e.into()),
                    },
                }
            }
        }
    }

    fn refuse_loop(&self, path: &Path) -> Result<(), FsError> {
        match links::lead_into(&self.mounted.directory.path, path, &self.mounted.mount_point) {
            true => Err(FsError::new(Errno::LOOP, format!("{} leads into the mount itself", path.display()))),
            false => Ok(()),
        }
    }

    fn on_disk(&self, path: &Path) -> PathBuf {
        self.mounted.directory.path.join(path)
    }

    // -- directories --

    /// Opens a directory: its entries as they are now, so that reading it in pieces misses and repeats nothing.
    pub fn open_directory(&self, ino: u64) -> Result<u64, FsError> {
        let entries = self.list(&self.node(ino)?, ino)?;
        Ok(self.add(Handle::Directory(Arc::new(entries))))
    }

    pub fn entries(&self, handle: u64) -> Result<Arc<Vec<Entry>>, FsError> {
        match self.handles.lock().1.get(&handle) {
            Some(Handle::Directory(entries)) => Ok(entries.clone()),
            _ => Err(FsError::new(Errno::BADF, "it is no open directory")),
        }
    }

    fn list(&self, node: &Node, ino: u64) -> Result<Vec<Entry>, FsError> {
        let entry = |name: &OsStr, node: &Node, kind| Entry { ino: self.known(node), kind, name: name.to_os_string() };
        let mut entries = vec![
            Entry { ino, kind: Kind::Directory, name: ".".into() },
            Entry { ino: ROOT, kind: Kind::Directory, name: "..".into() },
        ];
        let disk = match node {
            Node::Root | Node::Commit(_) => PathBuf::new(),
            Node::Disk(_, path) => path.clone(),
            Node::Commits => {
                for id in self.mounted.commit_ids() {
                    entries.push(entry(OsStr::new(&id.to_string()), &Node::Commit(id), Kind::Directory));
                }
                return Ok(entries);
            }
            _ => return Err(FsError::new(Errno::NOTDIR, "it is no directory")),
        };
        if *node == Node::Root {
            for (name, node, kind) in [
                ("ctl", Node::Ctl, Kind::File),
                ("status", Node::Status, Kind::File),
                ("status.json", Node::StatusJson, Kind::File),
                ("commits", Node::Commits, Kind::Directory),
            ] {
                if node != Node::Ctl || !self.mounted.read_only {
                    entries.push(entry(OsStr::new(name), &node, kind));
                }
            }
        }
        let found = match std::fs::read_dir(self.on_disk(&disk)) {
            Err(_) if *node == Node::Root => {
                for (n, shard) in self.mounted.directory.shards.iter().enumerate() {
                    entries.push(entry(OsStr::new(&shard.name), &Node::Weights(n), Kind::File));
                }
                return Ok(entries);
            }
            found => found?,
        };
        for found in found {
            let name = found?.file_name();
            if entries.iter().take(6).any(|e| e.name == name) {
                continue; // a file of the model directory under one of our names
            }
            let Ok(child) = self.child(node, &name) else { continue };
            // Seen as a lookup sees it, so that a name that is listed can also be opened.
            if let Ok(attributes) = self.describe(&child, 0) {
                entries.push(entry(&name, &child, attributes.kind));
            }
        }
        Ok(entries)
    }

    /// A number for a listing: the node's own if it has one (readdir's numbers are hints).
    fn known(&self, node: &Node) -> u64 {
        self.nodes.lock().by_node.get(node).copied().unwrap_or(u64::from(u32::MAX))
    }

    // -- files --

    /// Whether a request for `ino` looks at the model directory by names: these may lead to a disk that is slow, or, the
    /// moment after they were looked at, into this mount.
    pub fn looks_at_names(&self, ino: u64) -> bool {
        matches!(self.node(ino), Ok(Node::Disk(..)))
    }

    /// The same of `name` in the directory `parent`.
    pub fn looks_at_name(&self, parent: u64, name: &OsStr) -> bool {
        matches!(self.node(parent).and_then(|parent| self.child(&parent, name)), Ok(Node::Disk(..)))
    }

    /// The same of the entries of the directory `ino`.
    pub fn lists_names(&self, ino: u64) -> bool {
        matches!(self.node(ino), Ok(Node::Root | Node::Commit(_) | Node::Disk(..)))
    }

    /// Whether opening `ino` may take long (the view has to move first), so that it belongs on a thread of its own.
    pub fn open_may_wait(&self, ino: u64) -> bool {
        match self.node(ino) {
            Ok(Node::Weights(_)) => self.mounted.open_may_wait(),
            Ok(Node::CommitWeights(..) | Node::Disk(..)) => true,
            _ => false,
        }
    }

    /// Opens a file. `write`: asked for writing, which only `ctl` allows.
    pub fn open(&self, ino: u64, write: bool, pid: u32) -> Result<Opening, FsError> {
        let node = self.node(ino)?;
        if write && node != Node::Ctl {
            return Err(FsError::new(Errno::ROFS, "the mount is read-only: weights change by training, files on disk"));
        }
        match node {
            Node::Ctl => Ok(Opening { handle: self.add(Handle::Control), content: Content::Control }),
            Node::Status | Node::StatusJson => {
                let json = node == Node::StatusJson;
                let text = TextHandle { json, made: Mutex::new(self.compose(json)) };
                Ok(Opening { handle: self.add(Handle::Text(Arc::new(text))), content: Content::Composed })
            }
            Node::Weights(shard) => {
                let handle = self.add(Handle::Weights(shard));
                match self.mounted.open_weights(handle, shard, pid) {
                    Ok(Served::Held) => Ok(Opening { handle, content: Content::Held(shard) }),
                    Ok(Served::Direct) => Ok(Opening { handle, content: Content::Direct(shard) }),
                    Err(e) => {
                        self.handles.lock().1.remove(&handle);
                        Err(e)
                    }
                }
            }
            Node::CommitWeights(id, shard) => {
                self.mounted.open_commit(id)?;
                Ok(Opening { handle: self.add(Handle::CommitWeights(id, shard)), content: Content::Stable })
            }
            Node::Disk(_, path) => {
                self.refuse_loop(&path)?;
                let other = if self.shared { Reader::other(pid) } else { None };
                let file = match other {
                    Some(reader) => open_for(&reader, &self.mounted.directory.path, &path)?,
                    // What was a file when it was looked up may be a pipe by now, whose open would wait for a writer.
                    None => File::options().read(true).custom_flags(libc::O_NONBLOCK).open(self.on_disk(&path))?,
                };
                let kind = file.metadata()?.file_type();
                if kind.is_dir() {
                    return Err(FsError::new(Errno::ISDIR, "it is a directory"));
                }
                if !kind.is_file() {
                    return Err(FsError::not_found(path.display()));
                }
                Ok(Opening { handle: self.add(Handle::Disk(file)), content: Content::Ordinary })
            }
            Node::Root | Node::Commits | Node::Commit(_) => Err(FsError::new(Errno::ISDIR, "it is a directory")),
        }
    }

    /// Whether a read may take long: of weights where they are, it waits for the end of a step; of a commit, for a tensor
    /// to be made.
    pub fn read_may_wait(&self, handle: u64) -> bool {
        let live = || self.mounted.view().is_none_or(|view| !view.is_whole());
        match self.handles.lock().1.get(&handle) {
            Some(Handle::Weights(_)) => live(),
            Some(Handle::CommitWeights(..)) => true,
            _ => false,
        }
    }

    /// Reads up to `size` bytes at `offset`; fewer only at the end of the file.
    pub fn read(&self, handle: u64, offset: u64, size: usize) -> Result<Vec<u8>, FsError> {
        enum Reading {
            Weights(usize),
            CommitWeights(u64, usize),
            Disk(File),
            Text(Arc<TextHandle>),
        }
        let reading = match self.handles.lock().1.get(&handle) {
            Some(Handle::Weights(shard)) => Reading::Weights(*shard),
            Some(Handle::CommitWeights(id, shard)) => Reading::CommitWeights(*id, *shard),
            Some(Handle::Disk(file)) => Reading::Disk(file.try_clone()?),
            Some(Handle::Text(text)) => Reading::Text(text.clone()),
            // Empty, so that copying the whole directory works.
            Some(Handle::Control) => return Ok(Vec::new()),
            _ => return Err(FsError::new(Errno::BADF, "it is not open for reading")),
        };
        match reading {
            Reading::Weights(shard) => {
                let mut bytes = vec![0; self.clip(shard, offset, size)];
                self.mounted.read_weights(shard, offset, &mut bytes)?;
                Ok(bytes)
            }
            Reading::CommitWeights(id, shard) => {
                let mut bytes = vec![0; self.clip(shard, offset, size)];
                self.mounted.read_commit(id, shard, offset, &mut bytes)?;
                Ok(bytes)
            }
            Reading::Disk(file) => {
                let mut bytes = vec![0; size];
                let mut done = 0;
                while done < size {
                    match file.read_at(&mut bytes[done..], offset + done as u64)? {
                        0 => break,
                        n => done += n,
                    }
                }
                bytes.truncate(done);
                Ok(bytes)
            }
            Reading::Text(text) => {
                let mut made = text.made.lock();
                if offset == 0 && made.0 != self.mounted.version() {
                    *made = self.compose(text.json);
                }
                let from = (offset as usize).min(made.1.len());
                Ok(made.1[from..(from + size).min(made.1.len())].to_vec())
            }
        }
    }

    fn clip(&self, shard: usize, offset: u64, size: usize) -> usize {
        self.mounted.directory.shards[shard].bytes().saturating_sub(offset).min(size as u64) as usize
    }

    /// Whether an open `status` has something new since its text was made.
    pub fn has_news(&self, handle: u64) -> Result<bool, FsError> {
        let text = match self.handles.lock().1.get(&handle) {
            Some(Handle::Text(text)) => text.clone(),
            _ => return Ok(true),
        };
        let made = text.made.lock().0;
        Ok(made != self.mounted.version())
    }

    /// A descriptor of `handle` is being closed: `release` follows if it was the last one.
    pub fn flush(&self, handle: u64) {
        let weights = matches!(self.handles.lock().1.get(&handle), Some(Handle::Weights(_)));
        if weights {
            self.mounted.closing_weights(handle);
        }
    }

    /// Closes a file or directory.
    pub fn release(&self, handle: u64) {
        let closed = self.handles.lock().1.remove(&handle);
        match closed {
            Some(Handle::Weights(_)) => self.mounted.close_weights(handle),
            Some(Handle::CommitWeights(id, _)) => self.mounted.close_commit(id),
            _ => {}
        }
    }

    fn compose(&self, json: bool) -> (u64, Vec<u8>) {
        // The version first: if something changes meanwhile, the text counts as old.
        let version = self.mounted.version();
        let status = self.mounted.status();
        (version, if json { status.json() } else { status.text() }.into_bytes())
    }

    fn add(&self, handle: Handle) -> u64 {
        let mut handles = self.handles.lock();
        handles.0 += 1;
        let number = handles.0;
        handles.1.insert(number, handle);
        number
    }
}

fn from_disk(metadata: &Metadata, ino: u64) -> Attributes {
    let time = |s: i64, ns: i64| {
        let whole = if s >= 0 { UNIX_EPOCH.checked_add(Duration::from_secs(s as u64)) } else { None };
        whole.unwrap_or(UNIX_EPOCH) + Duration::from_nanos(ns.clamp(0, 999_999_999) as u64)
    };
    let kind = match metadata.file_type() {
        t if t.is_dir() => Kind::Directory,
        t if t.is_symlink() => Kind::Symlink,
        _ => Kind::File,
    };
    Attributes {
        ino,
        kind,
        size: metadata.len(),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: time(metadata.mtime(), metadata.mtime_nsec()),
        ctime: time(metadata.ctime(), metadata.ctime_nsec()),
        // A file is often replaced by a longer one, of which nobody is to see so much as the old one had.
        cacheable: kind != Kind::File,
    }
}

/// Does the directory at `path` hold itself, by a link to a directory that is walked through on the way from `root`, or
/// to one above it? Walking it would never end.
fn leads_back(path: &Path, root: &Path) -> bool {
    if !path.is_symlink() {
        return false;
    }
    let Ok(target) = path.canonicalize() else { return true };
    let mut above = path.ancestors().skip(1).take_while(|a| a.starts_with(root));
    above.any(|a| a.canonicalize().map_or(true, |a| a.starts_with(&target)))
}
