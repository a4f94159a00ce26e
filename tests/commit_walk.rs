//! A random walk of commits, rollbacks, folds, prunes, faults and crashes, against a model that just keeps copies.
//!
//! `cargo test --test commit_walk` takes a few hundred steps; `WEIGHTFS_WALK_STEPS=100000` in the environment as many.

mod commit_support;

use commit_support::memory::*;
use commit_support::world::*;
use commit_support::*;
use std::collections::BTreeMap;
use weightfs::commit::*;

#[derive(Default, Debug)]
struct Counts(BTreeMap<&'static str, u64>);

impl Counts {
    fn note(&mut self, what: &'static str) {
        *self.0.entry(what).or_default() += 1;
    }
}

fn options(random: &mut Random) -> Options {
    Options {
        fold: [FoldPolicy::Always, FoldPolicy::Always, FoldPolicy::Never, FoldPolicy::Every(3)]
            [random.below(4) as usize],
        keep: [Keep::All, Keep::Newest(1), Keep::Newest(4)][random.below(3) as usize],
        staging_memory: [0, u64::MAX][random.below(2) as usize],
        mount_point: None,
    }
}

fn read_all(snapshot: &Snapshot) -> Vec<Vec<u8>> {
    let read = |s| {
        let mut bytes = vec![0; snapshot.shard_bytes(s) as usize];
        snapshot.read(s, 0, &mut bytes).unwrap();
        bytes
    };
    (0..snapshot.shards()).map(read).collect()
}

/// The commits that can be read, and some of them read.
fn compare(world: &World, committer: &Committer, random: &mut Random, what: &str) {
    let newest = world.commits.len() as u64 - 1;
    assert_eq!(committer.newest().map_or(0, |c| c.id), newest, "{what}");
    let oldest = committer.history().first().map_or(0, |c| c.id);
    let oldest = if oldest <= 1 { 0 } else { oldest };
    for id in [newest, oldest + random.below(newest - oldest + 1)] {
        assert_same!(
            world.read(committer, id),
            world.commits[id as usize],
            "{what}: commit {id} of {oldest}..={newest}"
        );
    }
    assert_eq!(committer.verify(None).unwrap().wrong, Vec::<String>::new(), "{what}");
}

fn walk(seed: u64, steps: u64, counts: &mut Counts) {
    let mut random = Random(seed);
    let mut world = World::new(options(&mut random), false);
    let (mut committer, _) = world.open_on(&world.storage);
    let mut held: Vec<Snapshot> = Vec::new();
    // A commit that failed in its very last sync: a crash may bring it about.
    let mut in_doubt: Option<Committed> = None;
    for step in 0..steps {
        let what = format!("seed {seed}, step {step}");
        let before = world.storage.recording().ops.len();
        let newest = world.commits.len() as u64 - 1;
        let action = random.below(100);
        // What the commit under way would be, if it is acknowledged or survives a crash in the middle.
        let mut next: Option<Committed> = None;
        let faulty = action < 15;
        if faulty {
            let errno = [libc::EIO, libc::ENOSPC][random.below(2) as usize];
            world.storage.set_fault(Some(Fault {
                at: random.below(60) as usize,
                errno,
                lasting: random.below(2) == 0,
            }));
        }
        match action {
            0..=59 => {
                world.live.scribble(&mut random, 80);
                let state = (random.below(3) == 0).then(|| optimizer(random.next() as u8));
                let request = CommitRequest { optimizer: state.as_ref(), ..CommitRequest::new("walk", step) };
                let standing = world.commits.last().unwrap().optimizer.clone();
                next = Some(Committed { shards: world.live.bytes(), optimizer: state.clone().or(standing) });
                match committer.commit(&world.live, &request) {
                    Ok(report) if report.commit.is_some() => {
                        counts.note("commits");
                        world.commits.push(next.clone().unwrap());
                        in_doubt = None;
                    }
                    Ok(_) => counts.note("commits of nothing"),
                    Err(_) if faulty => {
                        counts.note("commits that failed");
                        in_doubt = next.clone();
                    }
                    Err(e) => panic!("{what}: {e}"),
                }
            }
            60..=69 => {
                let oldest = committer.history().first().map_or(0, |c| c.id);
                let oldest = if oldest <= 1 { 0 } else { oldest };
                let id = oldest + random.below(newest - oldest + 1);
                let mut target = world.commits[id as usize].clone();
                if id == 0 {
                    target.optimizer = None;
                }
                next = Some(target.clone());
                let report = committer.rollback(id, Some(&world.live)).unwrap();
                assert_same!(world.live.bytes(), target.shards, "{what}: live after rollback to {id}");
                if report.commit.commit.is_some() {
                    counts.note("rollbacks");
                    world.commits.push(target);
                }
            }
            70..=74 => {
                assert!(matches!(committer.fold().unwrap(), FoldOutcome::Folded { .. }), "{what}");
                counts.note("folds");
            }
            75..=84 => {
                if held.len() < 3 {
                    held.push(committer.snapshot(newest).unwrap());
                    counts.note("snapshots held");
                }
                for snapshot in &held {
                    assert_same!(read_all(snapshot), world.commits[snapshot.id() as usize].shards, "{what}: held");
                }
                if random.below(2) == 0 {
                    held.remove(random.below(held.len() as u64) as usize);
                }
            }
            _ => {}
        }
        world.storage.set_fault(None);
        if action >= 85 {
            // A new process, after a crash or in peace.
            for snapshot in held.drain(..) {
                assert_same!(read_all(&snapshot), world.commits[snapshot.id() as usize].shards, "{what}: held");
            }
            drop(committer);
            if action >= 90 {
                let recording = world.storage.recording();
                let (lost, torn) = (random.next(), random.next());
                let tree = recording.crash(recording.ops.len(), |i| match (lost >> (i % 64) & 1, i % 3) {
                    (0, _) => Fate::Kept,
                    (_, 0) if recording.tears(i) => Fate::Torn(torn),
                    _ => Fate::Lost,
                });
                world.storage = MemoryStorage::new(tree);
                counts.note("crashes between commands");
            } else {
                counts.note("restarts");
            }
            world.options = options(&mut random);
            committer = world.open_on(&world.storage).0;
            if committer.newest().map_or(0, |c| c.id) == newest + 1 {
                counts.note("failed commits that a crash brought about");
                world.commits.push(in_doubt.take().expect("only a commit that failed can do that"));
            }
            in_doubt = None;
        } else if next.is_some() && random.below(4) == 0 {
            // A crash in the middle of the command just done.
            for snapshot in held.drain(..) {
                assert_same!(read_all(&snapshot), world.commits[snapshot.id() as usize].shards, "{what}: held");
            }
            drop(committer);
            let recording = world.storage.recording();
            let n = before + random.below((recording.ops.len() - before) as u64 + 1) as usize;
            let (lost, torn) = (random.next(), random.next());
            let tree = recording.crash(n, |i| match (lost >> (i % 64) & 1, i % 3) {
                (0, _) => Fate::Kept,
                (_, 0) if recording.tears(i) => Fate::Torn(torn),
                _ => Fate::Lost,
            });
            world.storage = MemoryStorage::new(tree);
            committer = world.open_on(&world.storage).0;
            let now = committer.newest().map_or(0, |c| c.id);
            assert!(now == newest || now == newest + 1, "{what}: {now} after a crash in commit {}", newest + 1);
            world.commits.truncate(newest as usize + 1);
            if now > newest {
                // What the command did, or the commit that failed before it: which of the two is on the disk.
                let found = world.read(&committer, now);
                let failed = in_doubt.take().filter(|failed| *failed == found);
                world.commits.extend(failed.or(next));
            }
            in_doubt = None;
            counts.note("crashes in a command");
        }
        compare(&world, &committer, &mut random, &what);
    }
}

#[test]
fn a_random_walk_agrees_with_a_model_that_keeps_copies() {
    let steps = std::env::var("WEIGHTFS_WALK_STEPS").ok().and_then(|s| s.parse().ok()).unwrap_or(600);
    let mut counts = Counts::default();
    for seed in 0..steps / 100 {
        walk(seed, 100, &mut counts);
    }
    println!("{steps} steps: {:?}", counts.0);
}
