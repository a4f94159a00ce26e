//! Every crash point: whatever of the writes that were not synced survives, the directory recovers to the commit before
//! or this one, whole, with its optimizer state and its history.
//!
//! `cargo test --test commit_crash` plays a bounded sample; `WEIGHTFS_CRASH_POINTS=all cargo test --release --test
//! commit_crash -- --nocapture` all of them, and prints how many there were.

mod commit_support;

use commit_support::memory::*;
use commit_support::world::*;
use commit_support::*;
use std::sync::atomic::Ordering;
use weightfs::commit::storage::Storage;
use weightfs::commit::*;

fn all() -> bool {
    std::env::var("WEIGHTFS_CRASH_POINTS").is_ok_and(|v| v == "all")
}

/// Plays crashes at every operation since the storage's recording began. `before` is the newest commit then.
fn crash_everywhere(world: &World, before: u64, scenario: &str) {
    let recording = world.storage.recording();
    let after = world.commits.len() as u64 - 1;
    let mut committed = before;
    let mut random = Random(42);
    let (subsets, singles) = if all() { (64, usize::MAX) } else { (3, 4) };
    for n in 0..=recording.ops.len() {
        if n > 0 && (recording.is_commit_point(n - 1) || n == recording.ops.len()) {
            committed = after;
        }
        let unsynced = recording.unsynced(n);
        let mut fates: Vec<Vec<Fate>> = vec![vec![Fate::Kept; unsynced.len()], vec![Fate::Lost; unsynced.len()]];
        if unsynced.len() <= 5 && all() {
            // Few enough for all subsets, and each write torn in all of them.
            for mask in 0..1u64 << unsynced.len() {
                let pick = |i: usize| if mask >> i & 1 == 1 { Fate::Kept } else { Fate::Lost };
                fates.push((0..unsynced.len()).map(pick).collect());
            }
        }
        for i in 0..unsynced.len().min(singles) {
            // The oldest and the newest matter most where not all are played.
            let i = if i % 2 == 0 { unsynced.len() - 1 - i / 2 } else { i / 2 };
            for (one, rest) in [(Fate::Lost, Fate::Kept), (Fate::Kept, Fate::Lost)] {
                let mut fate = vec![rest; unsynced.len()];
                fate[i] = one;
                fates.push(fate);
            }
            if recording.tears(unsynced[i]) {
                for mask in [0x5555_5555_5555_5555, 1, !1, random.next()] {
                    let mut fate = vec![Fate::Kept; unsynced.len()];
                    fate[i] = Fate::Torn(mask);
                    fates.push(fate);
                }
            }
        }
        for _ in 0..if unsynced.is_empty() { 0 } else { subsets } {
            let pick = |&i: &usize| match random.below(3) {
                0 => Fate::Lost,
                1 if recording.tears(i) => Fate::Torn(random.next()),
                _ => Fate::Kept,
            };
            fates.push(unsynced.iter().map(pick).collect());
        }
        fates.sort_by_key(|f| format!("{f:?}"));
        fates.dedup();
        for fate in fates {
            let at = |i: usize| unsynced.iter().position(|&u| u == i).map_or(Fate::Kept, |p| fate[p]);
            let tree = recording.crash(n, at);
            let what = || {
                let ops: Vec<_> = unsynced.iter().zip(&fate).collect();
                format!("{scenario}: crash after {n} of {} operations, unsynced {ops:?}", recording.ops.len())
            };
            let (_, recovered) = world.check(tree.clone(), committed, &what);
            // Recovery can crash, too: at a few of its own operations.
            if all() || random.below(40) == 0 {
                let second = recovered.recording();
                for _ in 0..2 {
                    let n = random.below(second.ops.len() as u64 + 1) as usize;
                    let lost = random.next();
                    let tree = second.crash(n, |i| if lost >> (i % 64) & 1 == 0 { Fate::Kept } else { Fate::Lost });
                    let storage = MemoryStorage::new(tree);
                    let (committer, _) = world.open_on(&storage);
                    assert!(committer.newest().map_or(0, |c| c.id) >= committed, "{}, twice", what());
                    assert_eq!(committer.verify(None).unwrap().wrong, Vec::<String>::new(), "{}, twice", what());
                    POINTS.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
    println!("{scenario}: {} operations, {} crash points so far", recording.ops.len(), POINTS.load(Ordering::Relaxed));
}

/// Two commits in peace, then `act` with a crash at each of its operations.
fn play(scenario: &str, options: Options, shared: bool, act: impl Fn(&mut World, &Committer)) {
    let mut world = World::new(options, shared);
    let (committer, _) = world.open_on(&world.storage);
    let mut random = Random(11);
    for n in 1..3 {
        world.live.scribble(&mut random, 60);
        world.commit(&committer, (n == 2).then(|| optimizer(2)));
    }
    world.storage.record();
    world.live.scribble(&mut random, 90);
    act(&mut world, &committer);
    crash_everywhere(&world, 2, scenario);
}

#[test]
fn a_commit_that_crashes_anywhere_recovers_to_itself_or_the_one_before() {
    play("commit", Options::default(), false, |world, committer| {
        world.commit(committer, Some(optimizer(3)));
    });
}

#[test]
fn a_streamed_commit_that_crashes_anywhere_recovers() {
    play("streamed commit", Options { staging_memory: 0, ..Options::default() }, false, |world, committer| {
        world.commit(committer, None);
    });
}

#[test]
fn a_commit_over_shared_files_that_crashes_anywhere_recovers() {
    let mut world = World::new(Options::default(), true);
    let (committer, _) = world.open_on(&world.storage);
    world.storage.record();
    world.live.scribble(&mut Random(4), 90);
    world.commit(&committer, Some(optimizer(1)));
    crash_everywhere(&world, 0, "private copies");
}

#[test]
fn the_first_commit_of_a_directory_recovers() {
    let mut world = World::new(Options::default(), false);
    world.storage.record();
    let (committer, _) = world.open_on(&world.storage);
    world.live.scribble(&mut Random(4), 90);
    world.commit(&committer, Some(optimizer(1)));
    crash_everywhere(&world, 0, "first commit");
}

#[test]
fn the_first_commit_recovers_where_somebody_else_made_the_directory() {
    let mut world = World::new(Options::default(), false);
    world.storage.record();
    // A mount does, for its log.
    world.storage.create_directory(".weightfs").unwrap();
    let (committer, _) = world.open_on(&world.storage);
    world.live.scribble(&mut Random(4), 90);
    world.commit(&committer, Some(optimizer(1)));
    crash_everywhere(&world, 0, "first commit in a directory that was there");
}

#[test]
fn a_commit_that_is_not_folded_recovers() {
    play("unfolded commit", Options { fold: FoldPolicy::Never, ..Options::default() }, false, |world, committer| {
        world.commit(committer, None);
    });
}

#[test]
fn a_fold_of_several_commits_that_crashes_anywhere_recovers() {
    play("fold of three", Options { fold: FoldPolicy::Every(3), ..Options::default() }, false, |world, committer| {
        world.commit(committer, None);
    });
}

#[test]
fn a_rollback_that_crashes_anywhere_recovers() {
    play("rollback", Options::default(), false, |world, committer| {
        committer.rollback(1, None).unwrap();
        world.commits.push(world.commits[1].clone());
    });
}

#[test]
fn a_prune_that_crashes_anywhere_keeps_what_is_to_be_kept() {
    play("prune", Options { keep: Keep::Newest(1), ..Options::default() }, false, |world, committer| {
        world.commit(committer, Some(optimizer(3)));
    });
}
