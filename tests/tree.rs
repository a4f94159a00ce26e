//! The file tree of a mount against a simple model of it: random lookups, listings, opens, reads, commands and changes
//! of the model directory, of the weights and of the kernel's references. Numbers of inodes and handles stay what they
//! are while somebody uses them and never mean two things; no number that the kernel could send makes it panic.

mod reference;
mod tree_model;

use proptest::collection::vec;
use proptest::prelude::*;
use reference::{Keep, Random, Recipe, Reference, ShardRecipe, TensorRecipe};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tree_model::{Model, Open};
use weightfs::fs::{Content, Kind, Mounted, ViewMode, ViewOptions};
use weightfs::model::Dtype;

/// Names that are looked up; those from `PLAIN` on are also made in the model directory.
const NAMES: [&[u8]; 25] = [
    b"commits",
    b"1",
    b"2",
    b"model-00001-of-00002.safetensors",
    b"model-00002-of-00002.safetensors",
    b"status.json",
    b".weightfs",
    b"model.safetensors.index.json",
    b".",
    b"..",
    b"",
    b"a/b",
    b"/etc",
    b"0",
    b"+1",
    b"01",
    b"-1",
    // Made:
    b"config.json",
    b"sub",
    b"link to sub",
    b"\xff\xfe",
    "ü 🦀".as_bytes(),
    b"new\nline",
    b"ctl",
    b"status",
];
const PLAIN: usize = 17;

const COMMANDS: [&str; 14] = [
    "commit",
    "commit after lunch",
    "commit",
    "refresh",
    "freeze",
    "thaw",
    "thaw",
    "rollback 0",
    "rollback 1",
    "rollback 2",
    "rollback 77",
    "pause",
    "train x",
    "dance",
];

#[derive(Debug, Clone)]
enum Op {
    Lookup {
        parent: usize,
        name: usize,
    },
    Attributes(usize),
    Forget {
        inode: usize,
        count: u64,
    },
    OpenDirectory(usize),
    Open {
        inode: usize,
        write: bool,
    },
    Read {
        handle: usize,
        offset: u64,
        size: usize,
    },
    Release(usize),
    /// Numbers that the kernel was never given, or no longer has.
    Stray(u64, u64),
    /// Something appears, changes or goes in the model directory.
    Disk {
        what: u8,
        under: usize,
        name: usize,
        other: usize,
    },
    Weights(usize),
    Command(usize),
    EngineGone,
}

fn op() -> impl Strategy<Value = Op> {
    let slot = || 0usize..1000;
    let offset = prop_oneof![6 => 0u64..20_000, 1 => Just(0), 1 => any::<u64>(), 1 => Just(u64::MAX)];
    prop_oneof![
        12 => (slot(), 0..NAMES.len()).prop_map(|(parent, name)| Op::Lookup { parent, name }),
        4 => slot().prop_map(Op::Attributes),
        3 => (slot(), 0u64..4).prop_map(|(inode, count)| Op::Forget { inode, count }),
        3 => slot().prop_map(Op::OpenDirectory),
        6 => (slot(), prop::bool::weighted(0.1)).prop_map(|(inode, write)| Op::Open { inode, write }),
        8 => (slot(), offset, 0usize..20_000).prop_map(|(handle, offset, size)| Op::Read { handle, offset, size }),
        4 => slot().prop_map(Op::Release),
        1 => (prop_oneof![0u64..80, any::<u64>()], prop_oneof![0u64..20, any::<u64>()]).prop_map(|(i, h)| Op::Stray(i, h)),
        6 => (0u8..9, slot(), PLAIN..NAMES.len(), PLAIN..NAMES.len())
            .prop_map(|(what, under, name, other)| Op::Disk { what, under, name, other }),
        4 => (1usize..20).prop_map(Op::Weights),
        4 => (0..COMMANDS.len()).prop_map(Op::Command),
        1 => prop::bool::weighted(0.1).prop_map(|gone| if gone { Op::EngineGone } else { Op::Command(3) }),
    ]
}

fn name(n: usize) -> &'static OsStr {
    OsStr::from_bytes(NAMES[n])
}

fn pick<K: Copy + Ord, V>(map: &std::collections::BTreeMap<K, V>, n: usize) -> Option<K> {
    map.keys().nth(n.checked_rem(map.len())?).copied()
}

/// A plain name is one step down; anything else is nowhere.
fn is_name(name: &OsStr) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(std::path::Component::Normal(part)), None) if part == name)
}

impl Model {
    fn lookup(&mut self, parent: usize, name: &OsStr) -> Result<(), TestCaseError> {
        let parent = pick(&self.inodes, parent).unwrap();
        let from = self.inodes[&parent].0.clone();
        let path = from.join(name);
        let inside = is_name(name) && (from.as_os_str().is_empty() || self.is_directory(&from));
        let there = self.there(&path).filter(|_| inside);
        match self.tree.lookup(parent, name) {
            Ok(found) => {
                let there = there.ok_or_else(|| TestCaseError::fail(format!("{path:?} is found and not there")))?;
                prop_assert_eq!(found.kind, there.kind);
                prop_assert!(there.size.is_none_or(|size| size == found.size), "{:?}: {:?}", path, found);
                let known = self.inodes.iter().find(|(_, (p, _))| *p == path).map(|(ino, _)| *ino);
                match known {
                    Some(ino) => prop_assert_eq!(found.ino, ino, "{:?} changed its number", path),
                    None => prop_assert!(
                        found.ino < 64 || self.used_inodes.insert(found.ino),
                        "{} was another's: {:?}",
                        found.ino,
                        path
                    ),
                }
                prop_assert!(self.inodes.get(&found.ino).is_none_or(|(p, _)| *p == path));
                self.inodes.entry(found.ino).or_insert((path, 0)).1 += 1;
            }
            Err(e) => prop_assert!(there.is_none(), "{:?} is there, but: {}", path, e),
        }
        Ok(())
    }

    fn attributes(&self, ino: u64) -> Result<(), TestCaseError> {
        let path = &self.inodes[&ino].0;
        let there = self.there(path);
        match (self.tree.attributes(ino), there) {
            (Ok(seen), Some(there)) => {
                prop_assert_eq!((seen.ino, seen.kind), (ino, there.kind));
                prop_assert!(there.size.is_none_or(|size| size == seen.size));
                if path == Path::new("ctl") && !self.read_only {
                    prop_assert_eq!(seen.mode, 0o600);
                }
                prop_assert_eq!(self.tree.readlink(ino).is_ok(), there.kind == Kind::Symlink);
            }
            (Err(_), None) => {}
            (seen, there) => prop_assert!(false, "{:?}: {:?} where {:?} is", path, seen, there),
        }
        Ok(())
    }

    fn forget(&mut self, ino: u64, count: u64) -> Result<(), TestCaseError> {
        let (path, references) = self.inodes[&ino].clone();
        let count = count.min(references);
        self.tree.forget(ino, count);
        if ino < 64 {
            return Ok(()); // those that are always there
        }
        self.inodes.insert(ino, (path, references - count));
        if references == count {
            self.inodes.remove(&ino);
            prop_assert_eq!(self.tree.attributes(ino).unwrap_err().errno, Errno::STALE);
        }
        Ok(())
    }

    fn new_handle(&mut self, handle: u64, open: Open) -> Result<(), TestCaseError> {
        prop_assert!(self.used_handles.insert(handle), "handle {} is given twice", handle);
        self.handles.insert(handle, open);
        Ok(())
    }

    fn open_directory(&mut self, ino: u64) -> Result<(), TestCaseError> {
        let path = self.inodes[&ino].0.clone();
        let directory = self.is_directory(&path);
        match self.tree.open_directory(ino) {
            Ok(handle) => {
                prop_assert!(directory, "{:?} is no directory", path);
                let names = self.names(&path);
                self.new_handle(handle, Open::Directory(path, names))?;
            }
            Err(e) => prop_assert!(!directory, "{:?}: {}", path, e),
        }
        Ok(())
    }

    /// The listing of an open directory is the one of when it was opened.
    fn entries(&self, handle: u64) -> Result<(), TestCaseError> {
        let Some(Open::Directory(path, names)) = self.handles.get(&handle) else {
            prop_assert!(self.tree.entries(handle).is_err());
            return Ok(());
        };
        let entries = self.tree.entries(handle).unwrap();
        prop_assert_eq!([&entries[0].name, &entries[1].name], [".", ".."]);
        let seen = Vec::from_iter(entries[2..].iter().map(|e| (e.name.clone(), e.kind)));
        prop_assert_eq!(seen.len(), names.len(), "{:?}: {:?} {:?}", path, seen, names);
        prop_assert_eq!(&seen.into_iter().collect::<std::collections::BTreeMap<_, _>>(), names);
        Ok(())
    }

    fn open(&mut self, ino: u64, write: bool) -> Result<(), TestCaseError> {
        let path = self.inodes[&ino].0.clone();
        let (commit, rest) = self.in_commit(&path);
        let ctl = path == Path::new("ctl") && !self.read_only;
        let file = self.there(&path).is_some_and(|t| t.kind == Kind::File) && (ctl || !write);
        let shard = self.shard(rest.as_os_str());
        let open = match (shard, commit) {
            _ if ctl => Some((Open::Control, Content::Control)),
            _ if !file => None,
            (Some(_), None) if self.gone => None,
            (Some(shard), None) if self.live_mode => Some((Open::Weights(shard), Content::Direct(shard))),
            (Some(shard), None) => Some((Open::Weights(shard), Content::Held(shard))),
            (Some(shard), Some(id)) => Some((Open::Commit(id, shard), Content::Stable)),
            (None, None) if ["status", "status.json"].iter().any(|s| path == Path::new(s)) => {
                Some((Open::Text(path.clone()), Content::Composed))
            }
            _ => Some((Open::Disk(File::open(self.reference.model().join(rest)).unwrap()), Content::Ordinary)),
        };
        if let Some((Open::Weights(_), _)) = open {
            self.before_open();
        }
        match (self.tree.open(ino, write, 7), open) {
            (Ok(opening), Some((open, content))) => {
                prop_assert_eq!(opening.content, content);
                self.new_handle(opening.handle, open)?;
            }
            (Err(e), None) => prop_assert!(!write || e.errno == Errno::ROFS),
            (opening, open) => prop_assert!(false, "{:?}: {:?}, expected {}", path, opening, open.is_some()),
        }
        Ok(())
    }

    fn read(&self, handle: u64, offset: u64, size: usize) -> Result<(), TestCaseError> {
        let expected = match self.handles[&handle] {
            Open::Text(ref path) => {
                let text = self.tree.read(handle, 0, 1 << 20).unwrap();
                match path == Path::new("status.json") {
                    true => prop_assert!(serde_json::from_slice::<serde_json::Value>(&text).unwrap().is_object()),
                    false => prop_assert!(text.starts_with(b"state ")),
                }
                Some(text)
            }
            Open::Weights(_) if self.gone => None,
            _ => self.content(handle),
        };
        match (self.tree.read(handle, offset, size), expected) {
            (Ok(bytes), Some(all)) => {
                let from = offset.min(all.len() as u64) as usize;
                prop_assert!(bytes == all[from..(from + size).min(all.len())], "handle {} at {}", handle, offset);
            }
            // The system refuses offsets that no file reaches.
            (Err(_), Some(_)) if offset > i64::MAX as u64 / 2 => {}
            (Err(e), None) => prop_assert!([Errno::STALE, Errno::BADF].contains(&e.errno), "{}", e),
            (seen, expected) => prop_assert!(false, "{:?}, expected {}", seen.map(|b| b.len()), expected.is_some()),
        }
        Ok(())
    }

    fn run(&mut self, op: &Op, random: &mut Random) -> Result<(), TestCaseError> {
        let inode = |n| pick(&self.inodes, n).unwrap();
        match *op {
            Op::Lookup { parent, name: n } => self.lookup(parent, name(n))?,
            Op::Attributes(n) => self.attributes(inode(n))?,
            Op::Forget { inode: n, count } => self.forget(inode(n), count)?,
            Op::OpenDirectory(n) => self.open_directory(inode(n))?,
            Op::Open { inode: n, write } => self.open(inode(n), write)?,
            Op::Read { handle, offset, size } => {
                if let Some(handle) = pick(&self.handles, handle) {
                    self.read(handle, offset, size)?;
                    self.entries(handle)?;
                }
            }
            Op::Release(n) => {
                if let Some(handle) = pick(&self.handles, n) {
                    self.handles.remove(&handle);
                    self.tree.release(handle);
                    prop_assert!(self.tree.read(handle, 0, 1).is_err() && self.tree.entries(handle).is_err());
                }
            }
            Op::Stray(ino, handle) => {
                if !self.inodes.contains_key(&ino) && ino >= 64 {
                    self.tree.forget(ino, u64::MAX);
                    let denied = [
                        self.tree.attributes(ino).is_err(),
                        self.tree.lookup(ino, name(0)).is_err(),
                        self.tree.open(ino, false, 7).is_err(),
                        self.tree.open_directory(ino).is_err(),
                        self.tree.readlink(ino).is_err(),
                    ];
                    prop_assert_eq!(denied, [true; 5]);
                }
                if !self.handles.contains_key(&handle) {
                    prop_assert!(self.tree.read(handle, ino, 9).is_err() && self.tree.entries(handle).is_err());
                    let _ = self.tree.has_news(handle);
                    self.tree.release(handle);
                }
            }
            Op::Disk { what, under, name: n, other } => self.disk(what, under, name(n), name(other)),
            Op::Weights(count) if !self.gone => self.reference.change(random, count),
            Op::Weights(_) => {}
            Op::Command(n) => self.command(COMMANDS[n]).map_err(TestCaseError::fail)?,
            Op::EngineGone => {
                std::fs::remove_file(&self.reference.memories.iter().find(|m| !m.bytes.is_empty()).unwrap().path)
                    .unwrap_or(());
                self.tree.mounted().watch();
                self.gone = true;
            }
        }
        Ok(())
    }

    /// All that is open is what it should be, and its count is right.
    fn check(&self) -> Result<(), TestCaseError> {
        self.inodes.keys().try_for_each(|&ino| self.attributes(ino))?;
        for &handle in self.handles.keys() {
            self.entries(handle)?;
            self.read(handle, 0, 1 << 16)?;
        }
        let weights = self.handles.values().filter(|h| matches!(h, Open::Weights(_))).count() as u64;
        prop_assert_eq!(self.tree.mounted().status().readers.open, weights);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, max_shrink_iters: 800, ..ProptestConfig::default() })]

    #[test]
    fn the_tree_shows_the_directory_the_weights_and_the_commits_as_they_are(
        ops in vec(op(), 1..120), live in any::<bool>(), read_only in prop::bool::weighted(0.2), seed in any::<u64>()
    ) {
        let mut model = Model::new(live, read_only, seed);
        let mut random = Random(seed);
        for ours in ["ctl", "status", "status.json", "commits", "model-00002-of-00002.safetensors"] {
            model.lookup(0, OsStr::new(ours))?;
        }
        for op in &ops {
            model.run(op, &mut random)?;
        }
        model.check()?;
        // Everything let go: nothing is left but what is always there.
        for handle in std::mem::take(&mut model.handles).into_keys() {
            model.tree.release(handle);
        }
        for (ino, (_, references)) in model.inodes.clone() {
            model.forget(ino, references)?;
        }
        prop_assert!(model.inodes.keys().all(|ino| *ino < 64));
        prop_assert_eq!(model.tree.mounted().status().readers.open, 0);
    }
}

#[test]
fn links_that_lead_in_a_circle_are_hidden_where_the_circle_closes() {
    let mut model = Model::new(false, false, 0);
    let root = model.reference.model();
    for (directory, link, target) in [("a", "x", "../b"), ("b", "y", "../a"), ("c", "up", ".."), ("d", "self", ".")] {
        std::fs::create_dir(root.join(directory)).unwrap();
        std::os::unix::fs::symlink(target, root.join(directory).join(link)).unwrap();
    }
    let mut walk = |path: &str| {
        let step = |parent, name| Ok::<u64, weightfs::fs::FsError>(model.tree.lookup(parent, OsStr::new(name))?.ino);
        let found = path.split('/').try_fold(1, step).is_ok();
        assert_eq!(found, model.there(Path::new(path)).is_some(), "{path}");
        model.inodes.clear();
        found
    };
    assert!(walk("a/x") && walk("b/y"));
    assert!(!walk("a/x/y") && !walk("b/y/x") && !walk("c/up") && !walk("d/self"));
}

/// A model of one tensor, shown by a copy; opens wait so long for files that are on their way to be gone.
fn held(release: Duration) -> (Reference, Arc<Mounted>) {
    let keep = Keep::Live { cuts: vec![], dtype: None, strided: false, replicas: false };
    let tensors = vec![TensorRecipe { dtype: Dtype::BF16, shape: vec![40, 99], keep }];
    let recipe = Recipe { shards: vec![ShardRecipe { padding: 0, tensors }], index: false, ranks: 1, seed: 7 };
    let reference = Reference::new(&recipe);
    let options = ViewOptions { mode: ViewMode::Held, release, ..ViewOptions::default() };
    let mounted = Mounted::new(Arc::new(reference.open().unwrap()), None, "/mount".into(), &options).unwrap();
    (reference, mounted)
}

/// The copy may be filled by who opens a file first, before the thread that would have filled it gets to run.
#[test]
fn a_late_first_fill_leaves_the_view_to_those_who_hold_it() {
    let (mut reference, mounted) = held(Duration::ZERO);
    mounted.open_weights(1, 0, std::process::id()).unwrap();
    let before = reference.shard(0);
    reference.change(&mut Random(3), 50);
    mounted.prepare();
    let mut shown = vec![0; before.len()];
    mounted.read_weights(0, 0, &mut shown).unwrap();
    assert!(shown == before, "the view moved under an open file");
    mounted.close_weights(1);
    mounted.open_weights(2, 0, std::process::id()).unwrap();
    mounted.read_weights(0, 0, &mut shown).unwrap();
    assert!(shown == reference.shard(0) && shown != before);
}

/// The kernel says that a file is gone only after its close returned, and to another thread than the next open's.
#[test]
fn an_open_after_a_close_does_not_join_the_file_that_was_closed() {
    // It is told that the file is gone, however long that takes.
    let (mut reference, mounted) = held(Duration::from_secs(600));
    let mut shown = vec![0; reference.shard(0).len()];
    mounted.open_weights(1, 0, std::process::id()).unwrap();
    assert!(!mounted.open_may_wait(), "who joins a reader is served at once");
    reference.change(&mut Random(3), 50);
    mounted.closing_weights(1);
    assert!(mounted.open_may_wait());
    std::thread::scope(|scope| {
        let next = scope.spawn(|| mounted.open_weights(2, 0, std::process::id()).unwrap());
        mounted.close_weights(1);
        next.join().unwrap();
    });
    mounted.read_weights(0, 0, &mut shown).unwrap();
    assert!(shown == reference.shard(0), "the step of the file that was closed");
}

#[test]
fn an_open_after_the_close_of_a_duplicate_joins_the_file_that_stays_open() {
    let (mut reference, mounted) = held(Duration::from_millis(1));
    mounted.open_weights(1, 0, std::process::id()).unwrap();
    let before = reference.shard(0);
    reference.change(&mut Random(4), 50);
    mounted.closing_weights(1);
    mounted.open_weights(2, 0, std::process::id()).unwrap();
    assert!(!mounted.open_may_wait());
    let mut shown = vec![0; before.len()];
    mounted.read_weights(0, 0, &mut shown).unwrap();
    assert!(shown == before && shown != reference.shard(0));
}
