//! What a user sees of commits on a real directory: what is written, what is refused, what can be had back.

mod commit_support;

use commit_support::hooked::Hooked;
use commit_support::memory::Op;
use commit_support::world::World;
use commit_support::*;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use weightfs::commit::storage::{Access, Storage};
use weightfs::commit::*;
use weightfs::image::{ImageError, ShardBytes, StepHold};
use weightfs::memory::Hash;
use weightfs::model::ModelDirectory;

const BLOCKS: &str = ".weightfs/blocks";

struct Setup {
    directory: tempfile::TempDir,
    shards: Vec<(String, Vec<u8>)>,
    model: Arc<ModelDirectory>,
    live: Live,
}

impl Setup {
    fn new() -> Setup {
        let directory = tempfile::tempdir().unwrap();
        let shards = two_shards();
        let model = write_model(directory.path(), &shards);
        let live = Live::of(&shards);
        Setup { directory, shards, model, live }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn open(&self) -> Committer {
        self.open_with(Options::default())
    }

    fn open_with(&self, options: Options) -> Committer {
        Committer::open(self.model.clone(), options).unwrap().0
    }

    fn disk(&self) -> Vec<Vec<u8>> {
        disk(self.path(), &self.shards)
    }

    fn mtimes(&self) -> Vec<i128> {
        let stat = |(name, _): &(String, Vec<u8>)| std::fs::metadata(self.path().join(name)).unwrap();
        self.shards.iter().map(stat).map(|m| m.mtime() as i128 * 1_000_000_000 + m.mtime_nsec() as i128).collect()
    }
}

fn commit(committer: &Committer, live: &Live, step: u64) -> CommitReport {
    committer.commit(live, &CommitRequest::new("a test", step)).unwrap()
}

fn read_all(snapshot: &Snapshot) -> Vec<Vec<u8>> {
    (0..snapshot.shards())
        .map(|s| {
            let mut bytes = vec![0; snapshot.shard_bytes(s) as usize];
            snapshot.read(s, 0, &mut bytes).unwrap();
            bytes
        })
        .collect()
}

#[test]
fn a_commit_writes_just_the_changed_blocks_and_moves_mtime_forward() {
    let setup = Setup::new();
    let committer = setup.open();
    committer.ensure_baseline(&|_| ()).unwrap();
    let before = setup.mtimes();
    // Two neighbouring blocks and one apart in the second shard.
    let second = setup.shards[1].1.len();
    setup.live.set(1, 8190, &[1, 2, 3, 4]);
    setup.live.set(1, second - 1, &[!setup.shards[1].1[second - 1]]);
    assert_eq!(committer.dirty_blocks(&setup.live).unwrap(), 3);
    let report = commit(&committer, &setup.live, 7);
    let info = report.commit.unwrap();
    assert_eq!((info.id, info.step, info.changed_blocks), (1, 7, 3));
    let last = second as u64 % 4096;
    assert_eq!(report.fold, FoldOutcome::Folded { blocks: 3, bytes: 8192 + last });
    assert_same!(setup.disk(), setup.live.bytes());
    let after = setup.mtimes();
    assert!(after[1] > before[1], "the changed shard's mtime moves");
    assert_eq!(after[0], before[0], "the other shard is not touched");
    assert_eq!(committer.dirty_blocks(&setup.live).unwrap(), 0);
    assert_eq!(committer.newest().unwrap().id, 1);
    assert_eq!(committer.step(), 7);
    assert!(committer.verify(None).unwrap().wrong.is_empty());
    assert!(committer.verify(Some(1)).unwrap().wrong.is_empty());
}

#[test]
fn a_commit_with_nothing_changed_writes_nothing_and_says_so() {
    let setup = Setup::new();
    let committer = setup.open();
    commit(&committer, &setup.live, 1);
    setup.live.set(0, 5000, &[1, 2, 3]);
    commit(&committer, &setup.live, 2);
    let tree = |path: &Path| -> Vec<_> {
        let mut files = vec![];
        let mut folders = vec![path.to_path_buf()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let entry = entry.unwrap();
                let metadata = entry.metadata().unwrap();
                files.push((entry.path(), metadata.len(), metadata.modified().unwrap(), metadata.ino()));
                if metadata.is_dir() {
                    folders.push(entry.path());
                }
            }
        }
        files.sort();
        files
    };
    let before = tree(setup.path());
    let report = commit(&committer, &setup.live, 3);
    assert!(report.commit.is_none());
    assert!(report.to_string().contains("nothing changed"));
    assert_eq!(tree(setup.path()), before);
}

#[test]
fn staging_beyond_its_limit_streams_and_commits_the_same() {
    for limit in [u64::MAX, 0] {
        let setup = Setup::new();
        let committer = setup.open_with(Options { staging_memory: limit, ..Options::default() });
        let mut random = Random(5);
        for step in 1..6 {
            setup.live.scribble(&mut random, 1 << (2 * step));
            commit(&committer, &setup.live, step);
            assert_same!(setup.disk(), setup.live.bytes());
            assert_eq!(committer.dirty_blocks(&setup.live).unwrap(), 0);
        }
        drop(committer);
        let committer = setup.open();
        for id in 1..6 {
            assert_eq!(committer.verify(Some(id)).unwrap().wrong, Vec::<String>::new());
        }
    }
}

#[test]
fn the_table_of_hashes_is_written_in_large_pieces() {
    for staging_memory in [u64::MAX, 0] {
        let mut world = World::new(Options { staging_memory, ..Options::default() }, false);
        let (committer, _) = world.open_on(&world.storage);
        committer.ensure_baseline(&|_| ()).unwrap();
        world.storage.record();
        // Every other block of both shards.
        for (shard, bytes) in world.live.bytes().iter().enumerate() {
            (4000..bytes.len()).step_by(8192).for_each(|at| world.live.set(shard, at, &[!bytes[at]]));
        }
        let report = world.commit(&committer, None);
        assert!(report.commit.unwrap().changed_blocks > 5);
        let hashes = |op: &Op| matches!(op, Op::Write { bytes, .. } if bytes.len() == 16);
        assert!(!world.storage.recording().ops.iter().any(hashes), "staging {staging_memory}");
        // It is what hashing the weights gives.
        let written = world.storage.tree().file(BLOCKS).map(<[u8]>::to_vec);
        drop(committer);
        world.storage.remove_file(BLOCKS).unwrap();
        world.open_on(&world.storage).0.ensure_baseline(&|_| ()).unwrap();
        assert_same!(world.storage.tree().file(BLOCKS).map(<[u8]>::to_vec), written);
    }
}

/// Live weights that fail to be reached, or to be written, and what was said of their updates.
struct Failing<'a> {
    live: &'a Live,
    excludes: bool,
    writes: AtomicI64,
    updates: Mutex<Vec<&'static str>>,
}

impl ShardBytes for Failing<'_> {
    fn shards(&self) -> usize {
        self.live.shards()
    }

    fn shard_bytes(&self, shard: usize) -> u64 {
        self.live.shard_bytes(shard)
    }

    fn hold(&self) -> Result<StepHold, ImageError> {
        self.live.hold()
    }

    fn exclude(&self) -> Result<StepHold, ImageError> {
        if self.excludes { self.live.exclude() } else { Err(ImageError::NoBoundary(30)) }
    }

    fn update_begins(&self) {
        self.updates.lock().unwrap().push("begins");
    }

    fn update_ended(&self, whole: bool) {
        self.updates.lock().unwrap().push(if whole { "whole" } else { "torn" });
    }

    fn read(&self, shard: usize, offset: u64, dst: &mut [u8]) -> Result<(), ImageError> {
        self.live.read(shard, offset, dst)
    }

    fn hash(&self, shard: usize, first: u64, out: &mut [Hash]) -> Result<(), ImageError> {
        self.live.hash(shard, first, out)
    }

    fn write(&self, shard: usize, offset: u64, src: &[u8]) -> Result<(), ImageError> {
        if self.writes.fetch_sub(1, Ordering::SeqCst) <= 0 {
            return Err(ImageError::EngineGone("test".into()));
        }
        self.live.write(shard, offset, src)
    }
}

#[test]
fn a_rollback_cut_while_it_writes_says_that_the_weights_are_of_no_step() {
    let setup = Setup::new();
    let mut random = Random(4);
    let committer = setup.open();
    let start = setup.live.bytes();
    setup.live.scribble(&mut random, 300);
    commit(&committer, &setup.live, 1);
    let after = setup.live.bytes();
    for (excludes, writes, told) in
        [(false, 0, vec![]), (true, 1, vec!["begins", "torn"]), (true, 99, vec!["begins", "whole"])]
    {
        let live = Failing { live: &setup.live, excludes, writes: writes.into(), updates: Mutex::default() };
        let report = committer.rollback(0, Some(&live));
        assert_eq!(*live.updates.lock().unwrap(), told);
        assert_eq!(report.is_ok(), told.last() == Some(&"whole"));
        // The directory has it from the first time on, whatever became of the live weights.
        assert_same!(setup.disk(), start);
        assert_eq!(setup.live.bytes() == after, told.is_empty());
    }
    assert_same!(setup.live.bytes(), start);
}

#[test]
fn every_commit_can_be_read_and_rolled_back_to() {
    let setup = Setup::new();
    let mut states = vec![setup.live.bytes()];
    let mut random = Random(9);
    let committer = setup.open();
    for step in 1..=5u64 {
        setup.live.scribble(&mut random, 300);
        commit(&committer, &setup.live, step);
        states.push(setup.live.bytes());
    }
    for (id, state) in states.iter().enumerate() {
        let snapshot = committer.snapshot(id as u64).unwrap();
        assert_same!(read_all(&snapshot), *state, "commit {id}");
        let mut part = [0; 5000];
        snapshot.read(1, 3000, &mut part).unwrap();
        assert_eq!(part, state[1][3000..8000]);
    }
    for (i, id) in [3, 0, 5, 1].into_iter().enumerate() {
        setup.live.scribble(&mut random, 10);
        let report = committer.rollback(id, Some(&setup.live)).unwrap();
        let info = report.commit.commit.unwrap();
        assert_eq!((info.id, info.rollback_to), (6 + i as u64, Some(id)));
        assert!(report.live_bytes > 0);
        assert_same!(setup.live.bytes(), states[id as usize]);
        assert_same!(setup.disk(), states[id as usize]);
        assert_eq!(committer.dirty_blocks(&setup.live).unwrap(), 0);
    }
    let log = history_readonly(setup.path()).unwrap();
    assert_eq!(log.iter().map(|c| c.id).collect::<Vec<_>>(), (1..=9).collect::<Vec<_>>());
    assert_eq!(log, committer.history());
    for id in 1..=9 {
        assert!(committer.verify(Some(id)).unwrap().wrong.is_empty());
        assert!(verify_readonly(setup.path(), Some(id)).unwrap().wrong.is_empty());
    }
    assert!(matches!(committer.snapshot(10), Err(CommitError::NoSuchCommit { id: 10, newest: 9 })));
}

#[test]
fn folds_that_are_put_off_happen_later_with_the_same_bytes() {
    for policy in ["never", "every:3"] {
        let setup = Setup::new();
        let committer = setup.open_with(Options { fold: policy.parse().unwrap(), ..Options::default() });
        let original = setup.disk();
        let mut random = Random(3);
        let mut states = vec![original.clone()];
        for step in 1..=5u64 {
            setup.live.scribble(&mut random, 200);
            let report = commit(&committer, &setup.live, step);
            states.push(setup.live.bytes());
            let folded = policy == "every:3" && step == 3;
            assert_eq!(matches!(report.fold, FoldOutcome::Folded { .. }), folded, "{policy} {step}");
        }
        assert_same!(setup.disk(), states[if policy == "never" { 0 } else { 3 }]);
        for (id, state) in states.iter().enumerate() {
            assert_same!(read_all(&committer.snapshot(id as u64).unwrap()), *state);
        }
        assert!(committer.verify(None).unwrap().wrong.is_empty());
        let held = committer.snapshot(2).unwrap();
        assert_same!(read_all(&held)[0], states[2][0]);
        assert!(matches!(committer.fold().unwrap(), FoldOutcome::Folded { .. }));
        assert_same!(setup.disk(), states[5]);
        assert_same!(read_all(&held), states[2]);
        assert_eq!(committer.folded(), 5);
        assert!(committer.verify(None).unwrap().wrong.is_empty());
    }
}

#[test]
fn a_reader_with_the_shared_lock_puts_the_fold_off_not_the_commit() {
    let setup = Setup::new();
    let committer = setup.open();
    let lock = std::fs::File::create(setup.path().join(".weightfs/lock")).unwrap();
    lock.lock_shared().unwrap();
    let before = setup.disk();
    setup.live.set(0, 4000, b"changed");
    let report = commit(&committer, &setup.live, 1);
    assert_eq!(report.commit.as_ref().unwrap().id, 1);
    assert!(matches!(&report.fold, FoldOutcome::Deferred { why } if why.contains(".weightfs/lock")));
    assert!(report.to_string().contains("follow later"));
    assert_same!(setup.disk(), before);
    drop(lock);
    let report = commit(&committer, &setup.live, 1);
    assert!(report.commit.is_none());
    assert!(matches!(report.fold, FoldOutcome::Folded { blocks: 1, .. }));
    assert_same!(setup.disk(), setup.live.bytes());
}

#[test]
fn the_directory_has_one_writer_at_a_time_and_the_second_learns_who() {
    let setup = Setup::new();
    let mount = Some("/mnt/here".into());
    let committer = setup.open_with(Options { mount_point: mount, ..Options::default() });
    let error = Committer::open(setup.model.clone(), Options::default()).map(|_| ()).unwrap_err();
    assert_eq!(error.errno(), libc::EBUSY);
    let text = error.to_string();
    assert!(text.contains(&std::process::id().to_string()) && text.contains("/mnt/here"), "{text}");
    drop(committer);
    setup.open();
}

#[test]
fn a_weights_file_that_may_not_be_opened_for_writing_stays_as_it_is_however_many_commits_follow() {
    let setup = Setup::new();
    let (name, closed) = (setup.shards[0].0.clone(), Arc::new(AtomicBool::new(true)));
    let open = {
        let (name, closed) = (name.clone(), closed.clone());
        move |path: &str, access: Access| match path == name && access == Access::ReadWrite {
            true if closed.load(Ordering::SeqCst) => Err(std::io::Error::from_raw_os_error(libc::EACCES)),
            _ => Ok(()),
        }
    };
    let storage = Hooked::new(setup.path(), open);
    let committer = Committer::open_on(storage, &setup.model, Options::default()).unwrap().0;
    let (before, inode) = (setup.disk(), || std::fs::metadata(setup.path().join(&name)).unwrap().ino());
    let first = inode();
    for step in 1..=3 {
        setup.live.set(0, 4000, &[step; 7]);
        let report = commit(&committer, &setup.live, step.into());
        assert!(matches!(&report.fold, FoldOutcome::Deferred { why } if why.contains("permissions")), "{report}");
        assert_same!(setup.disk(), before);
    }
    closed.store(false, Ordering::SeqCst);
    assert!(matches!(committer.fold().unwrap(), FoldOutcome::Folded { .. }));
    assert_same!(setup.disk(), setup.live.bytes());
    assert_eq!(inode(), first, "it was in doubt, and replaced");
}

#[test]
fn weights_files_from_the_far_future_can_be_committed_to() {
    let setup = Setup::new();
    let committer = setup.open();
    // Nanoseconds since 1970 end in 2262.
    let far = SystemTime::UNIX_EPOCH + Duration::from_secs(10_413_792_000);
    let path = setup.path().join(&setup.shards[0].0);
    std::fs::File::options().write(true).open(path).unwrap().set_modified(far).unwrap();
    for step in 1..=2 {
        setup.live.set(0, 4000, &[step; 7]);
        commit(&committer, &setup.live, step.into());
        assert_same!(setup.disk(), setup.live.bytes());
    }
}

#[test]
fn a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for() {
    let names = [
        ".weightfs/state.json",
        ".weightfs/log/weight_v000001/model.safetensors.index.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
    ];
    for name in names {
        let setup = Setup::new();
        setup.live.set(0, 4000, b"mine");
        commit(&setup.open(), &setup.live, 1);
        let path = setup.path().join(name);
        std::fs::remove_file(&path).unwrap();
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &path, fifo, 0o600.into(), 0).unwrap();
        let (model, root, (told, tells)) = (setup.model.clone(), setup.path().to_path_buf(), channel());
        std::thread::spawn(move || {
            let _ = told.send(history_readonly(&root).map(|_| ()));
            // What is below `.weightfs` only: the weights file is open.
            if name.starts_with(".weightfs") {
                let _ = told.send(Committer::open(model, Options::default()).map(|_| ()));
            }
        });
        for _ in 0..if name.starts_with(".weightfs") { 2 } else { 1 } {
            let said = tells.recv_timeout(Duration::from_secs(30)).unwrap_or_else(|e| panic!("{name}: {e}"));
            let error = said.unwrap_err().to_string();
            assert!(error.contains("not a regular file"), "{name}: {error}");
        }
    }
}

/// What somebody who hashed the weights files would find, with these bytes in the first.
fn tables(first: &[u8], setup: &Setup) -> Vec<Vec<weightfs::memory::Hash>> {
    let second = &setup.disk()[1];
    let hashes = |bytes: &[u8]| bytes.chunks(4096).map(weightfs::memory::block_hash).collect();
    vec![hashes(first), hashes(second)]
}

#[test]
fn weights_files_that_somebody_else_changed_are_refused_and_untouched() {
    let setup = Setup::new();
    let committer = setup.open();
    setup.live.set(0, 4000, b"mine");
    commit(&committer, &setup.live, 1);
    // Touched only: adopted.
    let path = setup.path().join(&setup.shards[0].0);
    let touch = |path: &Path| {
        std::fs::File::options().write(true).open(path).unwrap().set_modified(std::time::SystemTime::now()).unwrap()
    };
    touch(&path);
    setup.live.set(0, 4000, b"mine again");
    commit(&committer, &setup.live, 2);
    // Another file of the same size in its place.
    let mut theirs = std::fs::read(&path).unwrap();
    theirs[9000..9006].copy_from_slice(b"theirs");
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, &theirs).unwrap();
    setup.live.set(0, 4000, b"and again!");
    let before = std::fs::read(setup.path().join(".weightfs/state.json")).unwrap();
    let error = committer.commit(&setup.live, &CommitRequest::new("", 3)).unwrap_err();
    assert!(matches!(&error, CommitError::Foreign { commit: 2, .. }), "{error}");
    assert!(error.to_string().contains("1 of its") && error.to_string().contains("remove .weightfs"), "{error}");
    assert_same!(std::fs::read(&path).unwrap(), theirs);
    assert_eq!(std::fs::read(setup.path().join(".weightfs/state.json")).unwrap(), before);
    drop(committer);
    let committer = setup.open();
    assert!(matches!(committer.ensure_baseline(&|_| ()), Err(CommitError::Foreign { .. })));
    assert_eq!(committer.verify(None).unwrap().wrong.len(), 1);
    // Also without the table that says which blocks.
    let blocks = setup.path().join(".weightfs/blocks");
    let table = std::fs::read(&blocks).unwrap();
    std::fs::remove_file(&blocks).unwrap();
    assert!(matches!(committer.ensure_baseline(&|_| ()), Err(CommitError::Foreign { .. })));
    assert!(matches!(committer.set_baseline(tables(&theirs, &setup)), Err(CommitError::Foreign { .. })));
    std::fs::write(&blocks, table).unwrap();
    // Put back: all is well.
    theirs[9000..9006].copy_from_slice(&setup.live.bytes()[0][9000..9006]);
    std::fs::write(&path, &theirs).unwrap();
    commit(&committer, &setup.live, 3);
    assert_same!(setup.disk(), setup.live.bytes());
}

#[test]
fn pruned_commits_say_so_and_snapshots_held_stay_valid() {
    let setup = Setup::new();
    let committer = setup.open_with(Options { keep: Keep::Newest(2), ..Options::default() });
    let mut random = Random(77);
    let mut states = vec![setup.live.bytes()];
    let mut held = vec![committer.snapshot(0).unwrap()];
    for step in 1..=6u64 {
        setup.live.scribble(&mut random, 100);
        commit(&committer, &setup.live, step);
        states.push(setup.live.bytes());
        held.push(committer.snapshot(step).unwrap());
    }
    assert_eq!(std::fs::read_dir(setup.path().join(".weightfs/log")).unwrap().count(), 2);
    for (snapshot, state) in held.iter().zip(&states) {
        assert_same!(read_all(snapshot), *state, "commit {}", snapshot.id());
    }
    let error = committer.snapshot(4).map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "commit 4 was pruned: the oldest that is kept is 5");
    assert!(matches!(committer.rollback(3, None), Err(CommitError::Pruned { .. })));
    assert_eq!(committer.history().iter().map(|c| c.id).collect::<Vec<_>>(), [5, 6]);
    drop(held);
    drop(committer);
    let committer = setup.open();
    committer.rollback(5, Some(&setup.live)).unwrap();
    assert_same!(setup.disk(), states[5]);
    assert_same!(setup.live.bytes(), states[5]);
}

#[test]
fn optimizer_state_is_part_of_its_commit_and_comes_back_with_a_rollback() {
    let setup = Setup::new();
    let committer = setup.open_with(Options { keep: Keep::Newest(3), ..Options::default() });
    let state = |n: u8| OptimizerState {
        header: format!(r#"{{"step":{n},"text":"\"quoted\""}}"#),
        tensors: vec![
            OptimizerTensor { name: "a.exp_avg".into(), dtype: "F32".into(), shape: vec![2, 2], bytes: vec![n; 16] },
            OptimizerTensor { name: "seed".into(), dtype: "U8".into(), shape: vec![], bytes: vec![n] },
        ],
    };
    let commit = |n: u8, optimizer: Option<&OptimizerState>| {
        setup.live.set(0, 3000, &[n; 5]);
        committer.commit(&setup.live, &CommitRequest { optimizer, ..CommitRequest::new("", n as u64) }).unwrap()
    };
    commit(1, Some(&state(1)));
    commit(2, Some(&state(2)));
    commit(3, None);
    assert_eq!(committer.optimizer_state(1).unwrap(), Some(state(1)));
    assert_eq!(committer.optimizer_state(3).unwrap(), Some(state(2)));
    assert!(commit(3, Some(&state(2))).commit.is_none(), "weights and optimizer are as they were");
    assert_eq!(commit(3, Some(&state(3))).commit.unwrap().id, 4);
    committer.rollback(2, None).unwrap();
    assert_eq!(committer.optimizer_state(5).unwrap(), Some(state(2)));
    assert!(committer.optimizer_state(1).is_err(), "pruned");
    let files = std::fs::read_dir(setup.path().join(".weightfs/optimizer")).unwrap().count();
    assert_eq!(files, 2);
    for id in 3..=5 {
        assert!(committer.verify(Some(id)).unwrap().wrong.is_empty());
    }
}

#[test]
fn blobs_of_a_hub_cache_and_hard_links_are_replaced_by_private_copies() {
    for kind in ["hub", "hard link", "plain link", "another user's link"] {
        if kind == "another user's link" && !rustix::process::geteuid().is_root() {
            return eprintln!("skipped: only root can give a link away");
        }
        let cache = tempfile::tempdir().unwrap();
        let shards = vec![("model.safetensors".to_string(), shard(&[("a", "BF16", 9000, 2)], 4))];
        let (blobs, snapshot) = (cache.path().join("blobs"), cache.path().join("snapshots/main"));
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::create_dir_all(&snapshot).unwrap();
        let blob = match kind {
            "plain link" | "another user's link" => cache.path().join("elsewhere"),
            _ => blobs.join("0123abcd"),
        };
        std::fs::write(&blob, &shards[0].1).unwrap();
        let file = snapshot.join("model.safetensors");
        match kind {
            "hard link" => std::fs::hard_link(&blob, &file).unwrap(),
            _ => std::os::unix::fs::symlink(&blob, &file).unwrap(),
        }
        if kind == "another user's link" {
            std::os::unix::fs::lchown(&file, Some(12345), None).unwrap();
        }
        let model = Arc::new(ModelDirectory::open(&snapshot).unwrap());
        let live = Live::of(&shards);
        let committer = Committer::open(model, Options::default()).unwrap().0;
        for step in 1..3 {
            live.set(0, 5000, &[step; 3]);
            commit(&committer, &live, step as u64);
            assert_same!(disk(&snapshot, &shards), live.bytes(), "{kind}");
        }
        let through = kind == "plain link";
        assert_eq!(std::fs::read(&blob).unwrap() == live.bytes()[0], through, "{kind}");
        assert_eq!(std::fs::symlink_metadata(&file).unwrap().is_symlink(), through);
        assert!(!snapshot.join(".weightfs/incoming/model.safetensors").exists());
        assert_same!(read_all(&committer.snapshot(0).unwrap())[0], shards[0].1);
    }
}

#[test]
fn blocks_that_cannot_be_believed_are_hashed_again() {
    let setup = Setup::new();
    let committer = setup.open();
    setup.live.set(0, 4000, b"mine");
    commit(&committer, &setup.live, 1);
    drop(committer);
    let path = setup.path().join(".weightfs/blocks");
    let good = std::fs::read(&path).unwrap();
    for at in [0, 20, 30, 50, 64, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        std::fs::write(&path, &bad).unwrap();
        let committer = setup.open();
        assert_eq!(committer.dirty_blocks(&setup.live).unwrap(), 0);
        assert_same!(std::fs::read(&path).unwrap(), good, "byte {at}");
    }
    std::fs::write(&path, b"").unwrap();
    setup.open().ensure_baseline(&|_| ()).unwrap();
    assert_same!(std::fs::read(&path).unwrap(), good);
}

#[test]
fn blocks_that_cannot_be_read_cost_no_commit() {
    let setup = Setup::new();
    let committer = setup.open();
    setup.live.set(0, 4000, b"mine");
    commit(&committer, &setup.live, 1);
    drop(committer);
    let path = setup.path().join(".weightfs/blocks");
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("blocks", &path).unwrap(); // ELOOP, for root as well
    let committer = setup.open();
    setup.live.set(0, 4000, b"more");
    assert_eq!(commit(&committer, &setup.live, 2).commit.unwrap().changed_blocks, 1);
    drop(committer);
    let weights = setup.path().join(&setup.shards[0].0);
    let mut wrong = std::fs::read(&weights).unwrap();
    wrong[9000] ^= 1;
    std::fs::write(&weights, &wrong).unwrap();
    assert_eq!(verify_readonly(setup.path(), None).unwrap().wrong.len(), 1);
}

#[test]
fn a_log_that_lost_its_newest_commits_is_damaged_also_for_those_who_only_read() {
    let setup = Setup::new();
    let committer = setup.open_with(Options { keep: Keep::Newest(3), ..Options::default() });
    for step in 1..=5 {
        setup.live.set(0, 4000, &[step; 7]);
        commit(&committer, &setup.live, step as u64);
    }
    drop(committer);
    let check = |id| verify_readonly(setup.path(), id).map(|report| report.wrong);
    assert!(check(None).unwrap().is_empty() && check(Some(5)).unwrap().is_empty());
    assert!(matches!(check(Some(2)), Err(CommitError::Pruned { id: 2, oldest: 3 })));
    for id in [5, 4, 3] {
        std::fs::remove_dir_all(setup.path().join(format!(".weightfs/log/weight_v{id:06}"))).unwrap();
        for damaged in [check(None), check(Some(5)), history_readonly(setup.path()).map(|_| Vec::new())] {
            let error = damaged.unwrap_err();
            assert!(matches!(error, CommitError::Corrupt { .. }), "{error}");
            assert!(error.to_string().contains("commit 5 is not in it"), "{error}");
        }
        let error = Committer::open(setup.model.clone(), Options::default()).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("commit 5 is not in it"), "{error}");
    }
}

#[test]
fn damage_to_any_file_of_the_log_is_noticed() {
    let setup = Setup::new();
    let committer = setup.open();
    setup.live.scribble(&mut Random(1), 500);
    let optimizer = OptimizerState { header: "{}".into(), tensors: vec![] };
    let request = CommitRequest { optimizer: Some(&optimizer), ..CommitRequest::new("x", 1) };
    committer.commit(&setup.live, &request).unwrap();
    drop(committer);
    let log = setup.path().join(".weightfs/log/weight_v000001");
    let mut files: Vec<_> = std::fs::read_dir(&log).unwrap().map(|e| e.unwrap().path()).collect();
    files.push(setup.path().join(".weightfs/optimizer/weight_v000001.safetensors"));
    assert_eq!(files.len(), 4);
    for path in files {
        let good = std::fs::read(&path).unwrap();
        let mut random = Random(2);
        for _ in 0..30 {
            let mut bad = good.clone();
            let at = random.below(bad.len() as u64) as usize;
            bad[at] ^= 1 << random.below(8);
            std::fs::write(&path, &bad).unwrap();
            let found = verify_readonly(setup.path(), Some(1));
            assert!(found.is_err() || !found.as_ref().unwrap().wrong.is_empty(), "{} byte {at}", path.display());
        }
        std::fs::write(&path, &good[..good.len() / 2]).unwrap();
        let found = verify_readonly(setup.path(), Some(1));
        assert!(found.is_err() || !found.unwrap().wrong.is_empty());
        std::fs::write(&path, &good).unwrap();
    }
    assert!(verify_readonly(setup.path(), Some(1)).unwrap().wrong.is_empty());
}

#[test]
fn a_damaged_state_is_refused_and_a_lost_one_is_found_again_in_the_log() {
    let setup = Setup::new();
    let committer = setup.open_with(Options { fold: FoldPolicy::Every(2), ..Options::default() });
    for step in 1..=3 {
        setup.live.set(0, 4000, &[step; 7]);
        commit(&committer, &setup.live, step as u64);
    }
    drop(committer);
    let path = setup.path().join(".weightfs/state.json");
    let good = std::fs::read(&path).unwrap();
    let mut random = Random(5);
    for _ in 0..60 {
        let mut bad = good.clone();
        let at = random.below(bad.len() as u64 - 1) as usize;
        bad[at] ^= 1 << random.below(7);
        std::fs::write(&path, &bad).unwrap();
        match Committer::open(setup.model.clone(), Options::default()) {
            Err(CommitError::Corrupt { .. }) => {}
            other => panic!("byte {at}: {:?}", other.map(|_| ())),
        }
    }
    std::fs::remove_file(&path).unwrap();
    std::fs::write(setup.path().join(".weightfs/writer"), b"\xff not json").unwrap();
    let committer = setup.open();
    assert_same!(setup.disk(), setup.live.bytes());
    assert_eq!((committer.newest().unwrap().id, committer.folded(), committer.step()), (3, 3, 3));
    assert!(committer.verify(None).unwrap().wrong.is_empty());
}

#[test]
fn weights_files_changed_by_others_before_a_fold_are_refused_at_the_next_start() {
    let setup = Setup::new();
    let committer = setup.open_with(Options { fold: FoldPolicy::Never, ..Options::default() });
    setup.live.set(0, 4000, b"mine");
    commit(&committer, &setup.live, 1);
    drop(committer);
    let path = setup.path().join(&setup.shards[0].0);
    let good = std::fs::read(&path).unwrap();
    let mut theirs = good.clone();
    theirs[4100] ^= 1; // in the same tensor, where the commit changed nothing
    std::fs::write(&path, &theirs).unwrap();
    let error = Committer::open(setup.model.clone(), Options::default()).map(|_| ()).unwrap_err();
    assert!(matches!(error, CommitError::Foreign { .. }), "{error}");
    assert_same!(std::fs::read(&path).unwrap(), theirs);
    // What a fold that was cut short leaves is no foreign change.
    let mut half = good.clone();
    half[4001] = b'i';
    std::fs::write(&path, &half).unwrap();
    let (committer, recovery) = Committer::open(setup.model.clone(), Options::default()).unwrap();
    assert!(recovery.to_string().contains("recovered commit 1"), "{recovery}");
    assert_same!(setup.disk(), setup.live.bytes());
    assert!(committer.verify(None).unwrap().wrong.is_empty());
}

#[test]
fn what_others_changed_where_the_log_has_nothing_is_refused_at_the_next_start_too() {
    for table in [true, false] {
        let setup = Setup::new();
        let committer = setup.open_with(Options { fold: FoldPolicy::Never, ..Options::default() });
        setup.live.set(0, 4000, b"mine"); // in tensor `a`
        commit(&committer, &setup.live, 1);
        drop(committer);
        let path = setup.path().join(&setup.shards[0].0);
        let good = std::fs::read(&path).unwrap();
        let mut theirs = good.clone();
        theirs[20000] ^= 1; // in tensor `c`
        std::fs::write(&path, &theirs).unwrap();
        if !table {
            std::fs::remove_file(setup.path().join(".weightfs/blocks")).unwrap();
        }
        let state = std::fs::read(setup.path().join(".weightfs/state.json")).unwrap();
        let error = Committer::open(setup.model.clone(), Options::default()).map(|_| ()).unwrap_err();
        assert!(matches!(error, CommitError::Foreign { .. }), "{error}");
        assert_same!(std::fs::read(&path).unwrap(), theirs);
        assert_eq!(std::fs::read(setup.path().join(".weightfs/state.json")).unwrap(), state);
        // Put back: the commit that waited is folded.
        std::fs::write(&path, &good).unwrap();
        let committer = setup.open();
        assert_same!(setup.disk(), setup.live.bytes());
        assert_eq!(committer.dirty_blocks(&setup.live).unwrap(), 0);
        assert!(committer.verify(None).unwrap().wrong.is_empty());
    }
}

#[test]
fn a_lost_state_is_no_reason_to_believe_the_weights_files() {
    for (shard, table) in [(0, true), (0, false), (1, true), (1, false)] {
        let setup = Setup::new();
        let committer = setup.open_with(Options { fold: FoldPolicy::Never, ..Options::default() });
        setup.live.set(0, 4000, b"mine");
        commit(&committer, &setup.live, 1);
        drop(committer);
        // In the other half of the shard, or in one of which the log has nothing.
        let path = setup.path().join(&setup.shards[shard].0);
        let good = std::fs::read(&path).unwrap();
        let mut theirs = good.clone();
        theirs[20000] ^= 1;
        std::fs::write(&path, &theirs).unwrap();
        std::fs::remove_file(setup.path().join(".weightfs/state.json")).unwrap();
        if !table {
            std::fs::remove_file(setup.path().join(BLOCKS)).unwrap();
        }
        let before = setup.disk();
        for _ in 0..2 {
            let error = Committer::open(setup.model.clone(), Options::default()).map(|_| ()).unwrap_err();
            assert!(matches!(error, CommitError::Foreign { .. }), "{error}");
            assert_same!(setup.disk(), before);
        }
        std::fs::write(&path, &good).unwrap();
        let committer = setup.open();
        assert_same!(setup.disk(), setup.live.bytes());
        assert!(committer.verify(None).unwrap().wrong.is_empty());
    }
}

/// A reader finds one of a record's files there and, a moment later, the other one pruned: whoever pruned it has kept both.
#[test]
fn a_commit_pruned_while_its_record_is_opened_is_read_all_the_same() {
    let setup = Setup::new();
    let ((reached, reaches), (go, goes)) = (channel(), channel());
    let (goes, armed) = (Mutex::new(goes), Arc::new(AtomicBool::new(false)));
    let pause = {
        let armed = armed.clone();
        move |path: &str, _: Access| {
            if path.ends_with("weight_v000002/new-values") && armed.swap(false, Ordering::SeqCst) {
                reached.send(()).unwrap();
                goes.lock().unwrap().recv().unwrap();
            }
            Ok(())
        }
    };
    {
        let committer = setup.open();
        for step in 1..=2 {
            setup.live.set(0, 4000, &[step; 7]);
            commit(&committer, &setup.live, step.into());
        }
    }
    let options = Options { keep: Keep::Newest(1), ..Options::default() };
    let committer = Committer::open_on(Hooked::new(setup.path(), pause), &setup.model, options).unwrap().0;
    committer.ensure_baseline(&|_| ()).unwrap();
    let snapshot = committer.snapshot(1).unwrap();
    armed.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut bytes = vec![0; snapshot.shard_bytes(0) as usize];
            snapshot.read(0, 0, &mut bytes).map(|()| bytes)
        });
        reaches.recv().unwrap();
        setup.live.set(0, 4000, &[3; 7]);
        commit(&committer, &setup.live, 3);
        assert_eq!(committer.history().len(), 1);
        go.send(()).unwrap();
        let bytes = reader.join().unwrap().unwrap();
        assert_eq!(bytes[4000..4007], [1; 7]);
    });
}

/// Large tensors of which much changed are compared on all cores, those of which little did side by side; from staged
/// copies and from the live weights; over files and over commits that are only in the log.
#[test]
fn large_tensors_are_logged_as_small_ones_are() {
    // 18 MB of three-byte steps off every boundary, and one of bytes between.
    let tensors = [("a", "U8", 3, 1), ("b", "BF16", 9_000_001, 2), ("c", "F32", 4_400_000, 4), ("d", "BF16", 11, 2)];
    for (fold, staging_memory) in
        [(FoldPolicy::Always, 1 << 30), (FoldPolicy::Never, 1 << 30), (FoldPolicy::Never, 1 << 16)]
    {
        let directory = tempfile::tempdir().unwrap();
        let shards = vec![("model.safetensors".to_string(), shard(&tensors, 5))];
        let model = write_model(directory.path(), &shards);
        let live = Live::of(&shards);
        let committer = Committer::open(model, Options { fold, staging_memory, ..Options::default() }).unwrap().0;
        let mut states = vec![live.bytes()];
        let header = 8 + u64::from_le_bytes(shards[0].1[..8].try_into().unwrap()) as usize;
        let (b, c) = (header + 3, header + 3 + 18_000_002);
        // Little of each; then all of `b` and little of `c`; then all of `c`.
        let changes: [&[(usize, usize)]; 3] = [
            &[(b + 1000, 2), (b + 17_999_999, 4), (c + 5_000_000, 3)],
            &[(b, 18_000_002), (c + 17_599_999, 1)],
            &[(c, 17_600_000)],
        ];
        for (step, ranges) in changes.iter().enumerate() {
            for &(at, len) in *ranges {
                let now = &live.bytes()[0][at..at + len];
                live.set(0, at, &now.iter().map(|b| b ^ 0x41).collect::<Vec<_>>());
            }
            let info = commit(&committer, &live, step as u64).commit.unwrap();
            let (old, new) = (&states[step][0], &live.bytes()[0]);
            let differ = |start: usize, end: usize, element: usize| {
                let pairs = old[start..end].chunks(element).zip(new[start..end].chunks(element));
                pairs.filter(|(a, b)| a != b).count() as u64
            };
            let counted = differ(header, b, 1) + differ(b, c, 2) + differ(c, c + 17_600_000, 4);
            assert_eq!((info.changed_elements, info.changed_tensors), (counted, [2, 2, 1][step]));
            states.push(live.bytes());
        }
        for (id, state) in states.iter().enumerate() {
            assert_same!(read_all(&committer.snapshot(id as u64).unwrap()), *state);
        }
        assert!(committer.verify(None).unwrap().wrong.is_empty());
    }
}
