//! What a mount of a model directory should show, by its rules, looked up anew each time: paths in the mount, what is
//! there, and the bytes of it. Inodes and handles are only remembered, never computed.

use crate::reference::{Keep, Recipe, Reference, ShardRecipe, TensorRecipe};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use weightfs::commit::{Committer, Options};
use weightfs::fs::ctl::parse;
use weightfs::fs::{Kind, Mounted, Tree, ViewMode, ViewOptions};
use weightfs::model::Dtype;

pub struct Model {
    pub reference: Reference,
    pub tree: Tree,
    pub live_mode: bool,
    pub read_only: bool,
    /// Path in the mount of every inode that is referenced, and how often.
    pub inodes: BTreeMap<u64, (PathBuf, u64)>,
    pub used_inodes: BTreeSet<u64>,
    pub handles: BTreeMap<u64, Open>,
    pub used_handles: BTreeSet<u64>,
    /// The step that the view is at.
    shown: Vec<Vec<u8>>,
    /// Shards as of every commit; 0 is before the first.
    commits: Vec<Vec<Vec<u8>>>,
    frozen: bool,
    pub gone: bool,
}

pub enum Open {
    Weights(usize),
    Commit(u64, usize),
    Disk(File),
    Text(PathBuf),
    Control,
    Directory(PathBuf, BTreeMap<OsString, Kind>),
}

#[derive(Debug, Clone, PartialEq)]
pub struct There {
    pub kind: Kind,
    /// Not of texts and directories.
    pub size: Option<u64>,
}

const OURS: [&str; 4] = ["ctl", "status", "status.json", "commits"];

impl Model {
    pub fn new(live_mode: bool, read_only: bool, seed: u64) -> Model {
        let tensor = |dtype, shape: &[usize], keep| TensorRecipe { dtype, shape: shape.to_vec(), keep };
        let live = |cuts: &[(usize, usize)], strided| {
            let cuts = cuts.to_vec();
            Keep::Live { cuts, dtype: None, strided, replicas: true }
        };
        let first = vec![tensor(Dtype::BF16, &[40, 99], live(&[(0, 7)], true)), tensor(Dtype::U8, &[99], Keep::Absent)];
        let second = vec![tensor(Dtype::F32, &[3000], live(&[], false)), tensor(Dtype::F16, &[5], Keep::Opaque)];
        let shards = [first, second].map(|tensors| ShardRecipe { padding: 3, tensors }).to_vec();
        let reference = Reference::new(&Recipe { shards, index: true, ranks: 2, seed });
        let image = Arc::new(reference.open().unwrap());
        let committer =
            (!read_only).then(|| Arc::new(Committer::open(image.directory().clone(), Options::default()).unwrap().0));
        let mode = if live_mode { ViewMode::Live } else { ViewMode::Held };
        let options = ViewOptions { mode, ..ViewOptions::default() };
        let mounted = Mounted::new(image, committer, "/mount".into(), &options).unwrap();
        mounted.prepare();
        let all = reference.all();
        Model {
            reference,
            tree: Tree::new(mounted),
            live_mode,
            read_only,
            inodes: BTreeMap::from([(1, (PathBuf::new(), 1))]),
            used_inodes: BTreeSet::from([1]),
            handles: BTreeMap::new(),
            used_handles: BTreeSet::new(),
            shown: all.clone(),
            commits: vec![all],
            frozen: false,
            gone: false,
        }
    }

    /// Number of the shard of this name.
    pub fn shard(&self, name: &OsStr) -> Option<usize> {
        self.reference.shards.iter().position(|s| name == s.name.as_str())
    }

    /// Splits a path under a commit.
    pub fn in_commit<'a>(&self, path: &'a Path) -> (Option<u64>, &'a Path) {
        let mut parts = path.components();
        if parts.next() == Some(Component::Normal("commits".as_ref()))
            && let Some(id) = parts.next()
        {
            return (id.as_os_str().to_str().and_then(|id| id.parse().ok()), parts.as_path());
        }
        (None, path)
    }

    /// What is at a path of the mount.
    pub fn there(&self, path: &Path) -> Option<There> {
        let directory = Some(There { kind: Kind::Directory, size: None });
        let ours = |size| Some(There { kind: Kind::File, size });
        let (commit, rest) = self.in_commit(path);
        if let Some(id) = commit {
            let canonical = path.iter().nth(1).is_some_and(|name| name == id.to_string().as_str());
            if !canonical || id == 0 || id as usize >= self.commits.len() {
                return None;
            }
        } else {
            match path.to_str() {
                Some("ctl") if !self.read_only => return ours(Some(0)),
                Some("status" | "status.json") => return ours(None),
                Some("commits") => return directory,
                _ if path.starts_with("commits") => return None,
                _ => {}
            }
        }
        if rest.as_os_str().is_empty() {
            return directory;
        }
        if rest == Path::new(".weightfs") {
            return None;
        }
        if let Some(shard) = self.shard(rest.as_os_str()) {
            return ours(Some(self.reference.shards[shard].disk.len() as u64));
        }
        self.on_disk(rest)
    }

    fn on_disk(&self, rest: &Path) -> Option<There> {
        let root = self.reference.model();
        let full = root.join(rest);
        let link = std::fs::symlink_metadata(&full).ok()?;
        let Ok(metadata) = std::fs::metadata(&full) else {
            return link.is_symlink().then_some(There { kind: Kind::Symlink, size: Some(link.len()) });
        };
        if metadata.is_file() {
            return Some(There { kind: Kind::File, size: Some(metadata.len()) });
        }
        let target = full.canonicalize().unwrap();
        // A directory that was walked through on the way here would be walked through again without end.
        let mut above = full.ancestors().skip(1).take_while(|a| a.starts_with(&root));
        let endless = link.is_symlink() && above.any(|a| a.canonicalize().unwrap().starts_with(&target));
        (metadata.is_dir() && !endless).then_some(There { kind: Kind::Directory, size: None })
    }

    /// The names in a directory of the mount, without `.` and `..`.
    pub fn names(&self, path: &Path) -> BTreeMap<OsString, Kind> {
        let mut names: BTreeSet<OsString> = BTreeSet::new();
        let (commit, rest) = self.in_commit(path);
        match path.to_str() {
            Some("commits") => names.extend((1..self.commits.len()).map(|id| id.to_string().into())),
            _ => {
                names.extend(OURS.iter().filter(|_| path.as_os_str().is_empty()).map(OsString::from));
                let disk = if commit.is_some() { rest } else { path };
                let found = std::fs::read_dir(self.reference.model().join(disk)).unwrap();
                names.extend(found.map(|f| f.unwrap().file_name()));
            }
        }
        let there = names.into_iter().filter_map(|n| Some((n.clone(), self.there(&path.join(&n))?.kind)));
        there.collect()
    }

    // -- the directory --

    pub fn is_directory(&self, path: &Path) -> bool {
        if self.there(path).is_some_and(|t| t.kind == Kind::Directory) {
            return true;
        }
        // Of a directory that is hidden by now the kernel still has the number.
        let (commit, rest) = self.in_commit(path);
        let ours = commit.is_none() && (rest.starts_with("commits") || self.is_ours(rest));
        let disk = !rest.as_os_str().is_empty() && !ours;
        disk && self.reference.model().join(rest).is_dir()
    }

    fn is_ours(&self, path: &Path) -> bool {
        path == Path::new("status") || path == Path::new("status.json") || (path == Path::new("ctl") && !self.read_only)
    }

    /// Changes the model directory, as somebody else may at any time.
    pub fn disk(&mut self, what: u8, under: usize, name: &OsStr, other: &OsStr) {
        let model = self.reference.model();
        let directories = [PathBuf::new(), "sub".into(), "config.json".into(), "sub/config.json".into()];
        let under = model.join(&directories[under % directories.len()]);
        let path = under.join(name);
        let pipe = std::fs::metadata(&path).is_ok_and(|m| !m.is_file()); // whose open would wait
        // Some of it fails, as when a file is in the way: then nothing changes.
        let _ = match what {
            0 | 1 if pipe => false,
            0 => std::fs::write(&path, name.as_bytes().repeat(99)).is_ok(),
            1 => File::options()
                .append(true)
                .open(&path)
                .is_ok_and(|mut f| std::io::Write::write(&mut f, b"more").is_ok()),
            2 => std::fs::remove_file(&path).is_ok() || std::fs::remove_dir_all(&path).is_ok(),
            3 | 4 => std::fs::create_dir(&path).is_ok(),
            5 => std::os::unix::fs::symlink(other, &path).is_ok(),
            6 => std::os::unix::fs::symlink(Path::new("..").join(other), &path).is_ok(),
            7 => std::fs::rename(&path, under.join(other)).is_ok(),
            _ => {
                let fifo = rustix::fs::FileType::Fifo;
                let _ = std::fs::remove_file(&path);
                rustix::fs::mknodat(rustix::fs::CWD, &path, fifo, 0o600.into(), 0).is_ok()
            }
        };
    }

    // -- weights --

    /// Readers that hold the view.
    fn holders(&self) -> usize {
        self.handles.values().filter(|h| matches!(h, Open::Weights(_))).count()
    }

    /// A weights file is about to be opened.
    pub fn before_open(&mut self) {
        if self.holders() == 0 {
            self.shown = self.reference.all();
        }
    }

    pub fn weights(&self, shard: usize) -> Vec<u8> {
        if self.live_mode { self.reference.shard(shard) } else { self.shown[shard].clone() }
    }

    pub fn commit(&self, id: u64, shard: usize) -> Vec<u8> {
        self.commits[id as usize][shard].clone()
    }

    /// Bytes of an open file, or `None` for those that are no file.
    pub fn content(&self, handle: u64) -> Option<Vec<u8>> {
        match self.handles.get(&handle)? {
            Open::Weights(shard) => Some(self.weights(*shard)),
            Open::Commit(id, shard) => Some(self.commit(*id, *shard)),
            Open::Disk(file) => {
                let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
                file.read_exact_at(&mut bytes, 0).unwrap();
                Some(bytes)
            }
            Open::Control => Some(Vec::new()),
            Open::Text(_) | Open::Directory(..) => None,
        }
    }

    // -- commands --

    /// Runs a command in the mount and in the model; says what does not agree.
    pub fn command(&mut self, text: &str) -> Result<(), String> {
        let outcome = parse(text.as_bytes())
            .and_then(|c| self.tree.mounted().command(&c, std::process::id()))
            .map_err(|e| e.errno);
        let (word, argument) = text.split_once(' ').unwrap_or((text, ""));
        let newest = self.commits.last().unwrap().clone();
        let expected = match word {
            "commit" | "rollback" if self.read_only => Err(Errno::ROFS),
            "commit" | "rollback" | "refresh" | "freeze" if self.gone => Err(Errno::STALE),
            "commit" => {
                let now = self.reference.all();
                if now != newest {
                    self.commits.push(now);
                }
                Ok(())
            }
            "rollback" if self.frozen => Err(Errno::BUSY),
            "rollback" => match self.commits.get(argument.parse::<usize>().unwrap()).cloned() {
                Some(then) => {
                    then.iter().enumerate().for_each(|(s, bytes)| self.reference.write(s, 0, bytes));
                    if then != newest {
                        self.commits.push(then);
                    }
                    Ok(())
                }
                None => Err(Errno::NOENT),
            },
            "refresh" => {
                self.shown = self.reference.all();
                Ok(())
            }
            "freeze" if self.frozen => Err(Errno::BUSY),
            "thaw" if !self.frozen => Err(Errno::INVAL),
            "freeze" | "thaw" => {
                self.frozen = word == "freeze";
                Ok(())
            }
            "train" if self.gone => Err(Errno::STALE),
            "pause" | "train" if self.read_only => Err(Errno::ROFS),
            "pause" => Ok(()),
            // There is no file of that name here.
            "train" => Err(Errno::NOENT),
            _ => Err(Errno::INVAL),
        };
        if outcome.as_ref().map(|_| ()).map_err(|e| *e) != expected {
            return Err(format!("'{text}' gave {outcome:?} instead of {expected:?}"));
        }
        for memory in self.reference.memories.iter().filter(|_| !self.gone) {
            if std::fs::read(&memory.path).unwrap() != memory.bytes {
                return Err(format!("after '{text}' the live weights are others"));
            }
        }
        // The files on disk are those of the newest commit, whatever happens in the mount.
        for (shard, bytes) in self.reference.shards.iter().zip(self.commits.last().unwrap()) {
            if &std::fs::read(self.reference.model().join(&shard.name)).unwrap() != bytes {
                return Err(format!("after '{text}' {} is not of the newest commit", shard.name));
            }
        }
        Ok(())
    }
}
