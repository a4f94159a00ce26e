//! Several at once: engines that write while a commit looks, threads that commit, roll back and read, processes that
//! contend for the directory.

mod commit_support;

use commit_support::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use weightfs::commit::*;
use weightfs::image::{ImageError, ShardBytes, StepHold};
use weightfs::memory::Hash;

/// An engine that keeps no step boundary: what is hashed is not what is read a moment later.
struct Racing {
    hashed: Live,
    read: Live,
}

impl ShardBytes for Racing {
    fn shards(&self) -> usize {
        self.read.shards()
    }

    fn shard_bytes(&self, shard: usize) -> u64 {
        self.read.shard_bytes(shard)
    }

    fn hold(&self) -> Result<StepHold, ImageError> {
        Ok(StepHold::new(()))
    }

    fn read(&self, shard: usize, offset: u64, dst: &mut [u8]) -> Result<(), ImageError> {
        self.read.read(shard, offset, dst)
    }

    fn hash(&self, shard: usize, first: u64, out: &mut [Hash]) -> Result<(), ImageError> {
        self.hashed.hash(shard, first, out)
    }

    fn write(&self, shard: usize, offset: u64, src: &[u8]) -> Result<(), ImageError> {
        self.read.write(shard, offset, src)
    }
}

#[test]
fn what_counts_is_what_was_copied_not_what_was_hashed() {
    for staging_memory in [u64::MAX, 0] {
        let directory = tempfile::tempdir().unwrap();
        let shards = two_shards();
        let model = write_model(directory.path(), &shards);
        let committer = Committer::open(model, Options { staging_memory, ..Options::default() }).unwrap().0;
        let racing = Racing { hashed: Live::of(&shards), read: Live::of(&shards) };
        // Blocks 1 to 4 looked changed; by the time they are copied, 2 and 3 are as they were, and 4 changed again.
        racing.hashed.set(1, 4096, &[1; 4 * 4096]);
        racing.read.set(1, 4100, b"one");
        racing.read.set(1, 4 * 4096 + 5, b"four");
        let report = committer.commit(&racing, &CommitRequest::new("", 1)).unwrap();
        let info = report.commit.unwrap();
        assert_eq!((info.changed_blocks, info.changed_bytes), (2, 7), "staging {staging_memory}");
        assert_same!(disk(directory.path(), &shards), racing.read.bytes());
        assert!(committer.verify(None).unwrap().wrong.is_empty());
        assert!(committer.verify(Some(1)).unwrap().wrong.is_empty());
        assert_eq!(committer.dirty_blocks(&racing.read).unwrap(), 0);
        // All of it is as it was when it is copied.
        racing.hashed.set(0, 4096, &[2; 4096]);
        let settled = Racing { hashed: racing.hashed, read: Live(racing.read.0) };
        let report = committer.commit(&settled, &CommitRequest::new("", 2)).unwrap();
        assert!(report.commit.is_none(), "staging {staging_memory}");
        assert_eq!(committer.newest().unwrap().id, 1);
        assert_eq!(std::fs::read_dir(directory.path().join(".weightfs/log")).unwrap().count(), 1);
    }
}

/// An engine that goes while its weights are read: what the reads return from then on is no weights.
struct Leaving {
    live: Live,
    gone: AtomicBool,
}

impl ShardBytes for Leaving {
    fn shards(&self) -> usize {
        self.live.shards()
    }

    fn shard_bytes(&self, shard: usize) -> u64 {
        self.live.shard_bytes(shard)
    }

    fn check(&self) -> Result<(), ImageError> {
        match self.gone.load(Ordering::Relaxed) {
            true => Err(ImageError::EngineGone("it ended".into())),
            false => Ok(()),
        }
    }

    fn hold(&self) -> Result<StepHold, ImageError> {
        Ok(StepHold::new(()))
    }

    fn read(&self, shard: usize, offset: u64, dst: &mut [u8]) -> Result<(), ImageError> {
        self.live.read(shard, offset, dst)?;
        self.gone.store(true, Ordering::Relaxed);
        dst.fill(0);
        Ok(())
    }

    fn hash(&self, shard: usize, first: u64, out: &mut [Hash]) -> Result<(), ImageError> {
        self.live.hash(shard, first, out)
    }

    fn write(&self, shard: usize, offset: u64, src: &[u8]) -> Result<(), ImageError> {
        self.live.write(shard, offset, src)
    }
}

#[test]
fn what_was_read_of_an_engine_that_went_meanwhile_is_not_committed() {
    for staging_memory in [u64::MAX, 0] {
        let directory = tempfile::tempdir().unwrap();
        let shards = two_shards();
        let model = write_model(directory.path(), &shards);
        let committer = Committer::open(model, Options { staging_memory, ..Options::default() }).unwrap().0;
        let before = disk(directory.path(), &shards);
        let leaving = Leaving { live: Live::of(&shards), gone: AtomicBool::new(false) };
        leaving.live.scribble(&mut Random(3), 100);
        let error = committer.commit(&leaving, &CommitRequest::new("", 1)).unwrap_err();
        assert_eq!(error.errno(), libc::ESTALE, "staging {staging_memory}: {error}");
        assert!(committer.newest().is_none(), "staging {staging_memory}");
        assert_same!(disk(directory.path(), &shards), before, "staging {staging_memory}");
        assert_eq!(std::fs::read_dir(directory.path().join(".weightfs/log")).unwrap().count(), 0);
        // Another engine's weights go on from there.
        committer.commit(&leaving.live, &CommitRequest::new("", 1)).unwrap();
        assert_same!(disk(directory.path(), &shards), leaving.live.bytes(), "staging {staging_memory}");
    }
}

#[test]
fn commits_and_rollbacks_of_several_threads_come_one_after_the_other() {
    let directory = tempfile::tempdir().unwrap();
    let shards = two_shards();
    let model = write_model(directory.path(), &shards);
    let committer = Committer::open(model, Options { keep: Keep::Newest(6), ..Options::default() }).unwrap().0;
    let live = Live::of(&shards);
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    let read_all = |snapshot: &Snapshot| -> Vec<Vec<u8>> {
        let read = |s| {
            let mut bytes = vec![0; snapshot.shard_bytes(s) as usize];
            // In pieces out of order, as a kernel reads ahead.
            for piece in [1usize, 0, 2, 4, 3, 5, 7, 6, 8, 9, 10] {
                let from = (piece * 6000).min(bytes.len());
                let to = if piece == 10 { bytes.len() } else { (from + 6000).min(bytes.len()) };
                snapshot.read(s, from as u64, &mut bytes[from..to]).unwrap();
            }
            bytes
        };
        (0..snapshot.shards()).map(read).collect()
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..3)
            .map(|t| {
                let (committer, live) = (&committer, &live);
                scope.spawn(move || {
                    let mut random = Random(t);
                    for step in 0..15 {
                        if random.below(4) == 0 {
                            let oldest = committer.history().first().map_or(0, |c| c.id);
                            match committer.rollback(oldest, None) {
                                Ok(_) | Err(CommitError::Pruned { .. }) => {}
                                Err(e) => panic!("{e}"),
                            }
                        } else {
                            live.scribble(&mut random, 50);
                            committer.commit(live, &CommitRequest::new("together", step)).unwrap();
                        }
                    }
                })
            })
            .collect();
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let Some(newest) = committer.newest() else { continue };
                    // Pruned meanwhile, by commits that were faster.
                    let Ok(snapshot) = committer.snapshot(newest.id) else { continue };
                    let first = read_all(&snapshot);
                    for _ in 0..5 {
                        assert_same!(read_all(&snapshot), first, "commit {} changed", newest.id);
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        for worker in workers {
            worker.join().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    committer.commit(&live, &CommitRequest::new("last", 99)).unwrap();
    assert_same!(disk(directory.path(), &shards), live.bytes());
    let history = committer.history();
    assert_eq!(history.len(), 6);
    assert!(history.windows(2).all(|w| w[0].id + 1 == w[1].id));
    for commit in history {
        assert!(committer.verify(Some(commit.id)).unwrap().wrong.is_empty());
    }
    assert!(reads.load(Ordering::Relaxed) > 0);
}

/// Not a test of its own: the other process of the one below.
#[test]
fn helper_that_commits_a_directory() {
    let Ok(directory) = std::env::var("WEIGHTFS_TEST_COMMIT") else { return };
    let model = Arc::new(weightfs::model::ModelDirectory::open(directory.as_ref()).unwrap());
    let shards: Vec<(String, Vec<u8>)> =
        model.shards.iter().map(|s| (s.name.clone(), std::fs::read(&s.path).unwrap())).collect();
    let live = Live::of(&shards);
    let (mut done, mut busy) = (0, 0);
    let mut random = Random(std::process::id() as u64);
    while done < 10 {
        match Committer::open(model.clone(), Options::default()) {
            Ok((committer, _)) => {
                live.scribble(&mut random, 20);
                committer.commit(&live, &CommitRequest::new(&format!("by {}", std::process::id()), done)).unwrap();
                assert_same!(disk(&model.path, &shards), live.bytes());
                done += 1;
            }
            Err(CommitError::Busy { .. }) => {
                busy += 1;
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            Err(e) => panic!("{e}"),
        }
    }
    println!("{done} commits, busy {busy} times");
}

#[test]
fn two_processes_that_commit_one_directory_take_turns() {
    let directory = tempfile::tempdir().unwrap();
    write_model(directory.path(), &two_shards());
    let child = || {
        std::process::Command::new(std::env::current_exe().unwrap())
            .args(["helper_that_commits_a_directory", "--exact"])
            .env("WEIGHTFS_TEST_COMMIT", directory.path())
            .spawn()
            .unwrap()
    };
    for mut child in [child(), child()] {
        assert!(child.wait().unwrap().success());
    }
    let history = history_readonly(directory.path()).unwrap();
    assert_eq!(history.len(), 20);
    for commit in &history {
        assert!(verify_readonly(directory.path(), Some(commit.id)).unwrap().wrong.is_empty());
    }
    assert!(verify_readonly(directory.path(), None).unwrap().wrong.is_empty());
}
