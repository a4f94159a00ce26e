//! A write, fsync, rename or any other operation fails, for each of them, with EIO or ENOSPC, once or from then on: the
//! commit fails with its reason and the one before stands, or it is in the log and the weights files follow later. In
//! either case the live weights are as they were, the next commit works, and a crash right after loses nothing.

mod commit_support;

use commit_support::memory::*;
use commit_support::world::*;
use commit_support::*;
use weightfs::commit::*;

/// What a file whose fsync failed holds on the disk after a crash: anything of what was not synced.
fn crash_and_check(world: &World, what: &str) {
    let recording = world.storage.recording();
    let newest = world.commits.len() as u64 - 1;
    for lost in [0, u64::MAX, 0x5555_5555_5555_5555, 0x1234_5678_9abc_def0] {
        let fate = |i: usize| if lost >> (i % 64) & 1 == 0 { Fate::Kept } else { Fate::Lost };
        world.check(recording.crash(recording.ops.len(), fate), newest, &|| format!("{what}, then a crash {lost:x}"));
    }
}

fn play(options: Options, errno: i32, lasting: bool, shared: bool) {
    for at in 0.. {
        let mut world = World::new(options.clone(), shared);
        let (committer, _) = world.open_on(&world.storage);
        let mut random = Random(21);
        // Shared files are private once the first commit is folded: there the first is the one that fails.
        let before = if shared { 0 } else { 2 };
        for n in 1..=before {
            world.live.scribble(&mut random, 60);
            world.commit(&committer, Some(optimizer(n as u8)));
        }
        world.storage.record();
        world.live.scribble(&mut random, 60);
        let live = world.live.bytes();
        world.storage.set_fault(Some(Fault { at, errno, lasting }));
        let what = format!("operation {at} fails with {errno}, lasting {lasting}, shared {shared}, {options:?}");
        let three = optimizer(3);
        let request = CommitRequest { optimizer: Some(&three), ..CommitRequest::new("crash me", 3) };
        let result = committer.commit(&world.live, &request);
        let (_, failed) = world.storage.counted();
        world.storage.set_fault(None);
        assert_same!(world.live.bytes(), live, "{what}");
        match &result {
            Err(e) => {
                assert!(matches!(e.errno(), libc::EIO | libc::ENOSPC), "{what}: {e}");
                assert_eq!(e.errno() == libc::ENOSPC, errno == libc::ENOSPC, "{what}: {e}");
                assert_eq!(committer.newest().map_or(0, |c| c.id), before, "{what}");
            }
            Ok(report) => {
                assert_eq!(report.commit.as_ref().unwrap().id, before + 1, "{what}");
                world.commits.push(Committed { shards: live.clone(), optimizer: Some(three.clone()) });
            }
        }
        for id in 0..world.commits.len() as u64 {
            if committer.history().first().is_some_and(|c| c.id <= id) {
                assert_same!(world.read(&committer, id), world.commits[id as usize], "{what}: commit {id}");
            }
        }
        assert_eq!(committer.verify(None).unwrap().wrong, Vec::<String>::new(), "{what}");
        if result.is_ok() {
            crash_and_check(&world, &what);
        }
        // The trouble is over.
        world.live.scribble(&mut random, 30);
        let report = world.commit(&committer, None);
        assert!(
            options.fold != FoldPolicy::Always || matches!(report.fold, FoldOutcome::Folded { .. }),
            "{what}: {report}"
        );
        if result.is_err() {
            // The id of the commit that failed is taken by the one after it; its optimizer state is gone with it.
            assert_eq!(committer.newest().unwrap().id, before + 1, "{what}");
        }
        crash_and_check(&world, &what);
        if !failed {
            println!("{at} operations, each failed with {errno}, lasting {lasting}, shared {shared}");
            return;
        }
    }
}

#[test]
fn an_io_error_anywhere_in_a_commit_costs_no_commit() {
    play(Options::default(), libc::EIO, false, false);
    play(Options::default(), libc::EIO, true, false);
}

#[test]
fn a_full_disk_anywhere_in_a_commit_costs_no_commit() {
    play(Options::default(), libc::ENOSPC, true, false);
    play(Options { staging_memory: 0, ..Options::default() }, libc::ENOSPC, false, false);
}

#[test]
fn errors_while_making_private_copies_and_pruning_cost_no_commit() {
    play(Options::default(), libc::ENOSPC, true, true);
    play(Options { keep: Keep::Newest(2), ..Options::default() }, libc::EIO, false, false);
}
