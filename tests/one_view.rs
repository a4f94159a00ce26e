//! One view: while a writer changes every weight and a counter in each, nobody who reads ever sees two counters. On the
//! held view that goes for all shards from the first open to the last close, on the live one for each read.
//!
//! The counter is in every element: all of them hold the same number, so that one stale byte shows.

mod support;

use memmap2::Mmap;
use rustix::fs::{FlockOperation, flock};
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use support::engine::decode;
use support::*;

/// How often each reader looks at least, and how many steps it has to have met; the writer goes on as long as anybody does.
const LOOKS: usize = 60;
const STEPS: usize = 4;

struct Setup {
    mount: Mount,
    model: Model,
    engine: Engine,
    _scratch: Scratch,
}

fn setup(way: &str, more: &[&str]) -> Setup {
    let scratch = Scratch::new();
    let model = Model::sharded_of(scratch.join("model"), 1000);
    let mut engine = Engine::new(&model, scratch.join("engine.json"));
    engine.fill(1);
    let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).args(&["--view", way]).args(more).mount();
    Setup { mount, model, engine, _scratch: scratch }
}

/// A value of the file that rounds to the live one stays as it is: a hair off the number.
fn step_of(value: f32) -> u32 {
    value.round() as u32
}

/// The counters in the live tensors of a shard's bytes.
fn counters(shard: &[u8], live: &[String]) -> BTreeSet<u32> {
    let mut seen = BTreeSet::new();
    for (name, view) in SafeTensors::deserialize(shard).expect("headers never change").tensors() {
        if live.contains(&name) {
            let bytes = view.data();
            // Whole runs of one element are compared as bytes: decoding all of them would be most of the test.
            let size = if view.dtype() == Dtype::F32 { 4 } else { 2 };
            if bytes[size..] == bytes[..bytes.len() - size] {
                seen.extend(decode(view.dtype(), &bytes[..size]).map(step_of));
            } else {
                seen.extend(decode(view.dtype(), bytes).map(step_of));
            }
        }
    }
    seen
}

#[track_caller]
fn only(counters: BTreeSet<u32>) -> u32 {
    assert_eq!(counters.len(), 1, "two steps are seen together: {counters:?}");
    counters.into_iter().next().unwrap()
}

/// Readers, which return the step that they see, run while the engine takes step after step.
fn while_it_trains(setup: &mut Setup, readers: &[&(dyn Fn() -> u32 + Sync)]) {
    let done = AtomicBool::new(false);
    let read = |reader: &(dyn Fn() -> u32 + Sync)| {
        let (mut looks, mut met) = (0, BTreeSet::new());
        until("enough steps were met", || {
            met.insert(reader());
            looks += 1;
            looks >= LOOKS && met.len() >= STEPS
        });
    };
    let engine = &mut setup.engine;
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for step in (1..=200).cycle().take_while(|_| !done.load(Ordering::Relaxed)) {
                engine.fill(step);
            }
        });
        let running: Vec<_> = readers.iter().map(|r| scope.spawn(|| read(*r))).collect();
        let outcomes: Vec<_> = running.into_iter().map(|r| r.join()).collect();
        done.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        outcomes.into_iter().for_each(|o| o.unwrap_or_else(|e| std::panic::resume_unwind(e)));
    });
}

#[test]
fn readers_of_all_shards_together_never_see_two_steps() {
    let mut setup = setup("held", &[]);
    let paths: Vec<PathBuf> = (0..3).map(|i| setup.mount.shard(i)).collect();
    let live = setup.engine.names();
    let check = |shards: Vec<BTreeSet<u32>>| only(shards.into_iter().flatten().collect());
    let open = || paths.iter().map(|p| File::open(p).unwrap()).collect::<Vec<_>>();
    let by_read = || {
        let files = open();
        let bytes = |f: &File| {
            let mut bytes = vec![0; f.metadata().unwrap().len() as usize];
            f.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        // And once more, the other way round: nothing has moved meanwhile.
        check(files.iter().chain(files.iter().rev()).map(|f| counters(&bytes(f), &live)).collect())
    };
    let by_mmap = || {
        let files = open();
        // SAFETY: the view's files are never cut off.
        let maps: Vec<Mmap> = files.iter().map(|f| unsafe { Mmap::map(f) }.unwrap()).collect();
        drop(files);
        check(maps.iter().map(|m| counters(m, &live)).collect())
    };
    while_it_trains(&mut setup, &[&by_read, &by_mmap]);
}

#[test]
fn a_single_read_of_the_live_view_never_sees_two_steps() {
    let mut setup = setup("live", &[]);
    let live = setup.engine.names();
    let path = setup.mount.shard(0);
    let bytes = path.metadata().unwrap().len() as usize;
    assert!(bytes < 1 << 20, "one read is one request of the kernel");
    let by_read = || {
        let mut shard = vec![0; bytes];
        let n = File::open(&path).unwrap().read_at(&mut shard, 0).unwrap();
        assert_eq!(n, bytes);
        only(counters(&shard, &live))
    };
    while_it_trains(&mut setup, &[&by_read, &by_read]);
}

#[test]
fn what_is_committed_while_it_trains_is_one_step() {
    let mut setup = setup("held", &[]);
    let live = setup.engine.names();
    let (point, model) = (setup.mount.path("ctl"), setup.model.path.clone());
    let shards = setup.model.shards.clone();
    let committer = || {
        std::fs::write(&point, "commit").unwrap();
        only(support::model::weights_in(&model, &shards).iter().flat_map(|s| counters(s, &live)).collect())
    };
    while_it_trains(&mut setup, &[&committer]);
}

/// The step that the first weights file of a mount shows, through an open file.
fn counter(file: &File, live: &[String]) -> u32 {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    only(counters(&bytes, live))
}

#[test]
fn the_view_stays_until_the_last_close_and_moves_with_the_next_open() {
    let Setup { _scratch, mount, mut engine, .. } = setup("held", &[]);
    let live = engine.names();
    let (first, second) = (mount.open(0), mount.open(1));
    engine.fill(2);
    let later = mount.open(2);
    assert_eq!([&first, &second, &later].map(|f| counter(f, &live)), [1, 1, 1]);
    drop((first, later));
    assert_eq!(counter(&mount.open(0), &live), 1, "one is open still");
    drop(second);
    until("the last close was seen", || mount.fact("readers").unwrap() == "0");
    assert_eq!(counter(&mount.open(0), &live), 2);
}

#[test]
fn a_mapping_holds_the_view_though_its_file_is_closed() {
    let Setup { _scratch, mount, mut engine, .. } = setup("held", &[]);
    let live = engine.names();
    // SAFETY: the view's files are never cut off.
    let map = unsafe { Mmap::map(&mount.open(0)) }.unwrap();
    engine.fill(2);
    assert_eq!(counter(&mount.open(1), &live), 1);
    assert_eq!(counters(&map, &live), [1].into());
    until("the open file was closed", || mount.fact("readers").unwrap() == "0");
    assert!(mount.fact("view_held").is_some());
    drop(map);
    assert_eq!(mount.fact("view_held"), None);
    assert_eq!(counter(&mount.open(1), &live), 2);
}

#[test]
fn refresh_moves_the_view_under_open_files_and_mappings() {
    for way in ["held", "live"] {
        let Setup { _scratch, mount, mut engine, .. } = setup(way, &[]);
        let live = engine.names();
        let file = mount.open(0);
        // SAFETY: the view's files are never cut off.
        let map = unsafe { Mmap::map(&file) }.unwrap();
        assert_eq!((counter(&file, &live), counters(&map, &live)), (1, [1].into()), "{way}");
        engine.fill(2);
        mount.does("refresh");
        assert_eq!(counter(&file, &live), 2, "{way}: by read");
        // The kernel is told by a thread of its own, a moment after the command.
        until("the mapping shows the step", || counters(&map, &live) == [2].into());
    }
}

#[test]
fn without_a_hold_every_open_moves_the_view() {
    let Setup { _scratch, mount, mut engine, .. } = setup("held", &["--view-hold", "0"]);
    let live = engine.names();
    let file = mount.open(0);
    engine.fill(2);
    assert_eq!(counter(&file, &live), 1, "nobody has opened anything since");
    let second = mount.open(1);
    assert_eq!([&file, &second].map(|f| counter(f, &live)), [2, 2], "an open moves it under those who have it open");
    assert_eq!(mount.fact("view_held"), None);
}

#[test]
fn freeze_makes_the_writer_wait_until_thaw() {
    for way in ["held", "live"] {
        let Setup { _scratch, mount, mut engine, .. } = setup(way, &[]);
        let live = engine.names();
        mount.does("freeze");
        assert_eq!(mount.state(), "frozen");
        let lock = engine.lock_file();
        let without_waiting = || flock(&lock, FlockOperation::NonBlockingLockExclusive);
        assert_eq!(without_waiting(), Err(rustix::io::Errno::WOULDBLOCK), "{way}");
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| engine.fill(2));
            // Closing and opening again moves nothing now: all of these are of one step.
            for i in 0..3 {
                assert_eq!(counter(&mount.open(i), &live), 1, "{way}");
            }
            assert!(!writer.is_finished(), "{way}: the writer has to wait");
            assert_eq!(errno(mount.ctl("freeze")), Some(libc::EBUSY));
            mount.does("thaw");
            writer.join().unwrap();
        });
        assert_eq!(counter(&mount.open(0), &live), 2, "{way}");
        assert_eq!(mount.state(), "idle");
        assert_eq!(errno(mount.ctl("thaw")), Some(libc::EINVAL));
    }
}

#[test]
fn a_reader_waits_for_the_end_of_a_step_and_sees_it_whole() {
    for way in ["held", "live"] {
        let Setup { _scratch, mount, mut engine, .. } = setup(way, &[]);
        let live = engine.names();
        mount.settled();
        let read = std::thread::scope(|scope| {
            let writes = engine.filling(2);
            let reader = engine.step(|engine| {
                let (half, rest) = writes.split_at(writes.len() / 2);
                engine.write(half);
                let reader = scope.spawn(|| counter(&mount.open(0), &live));
                assert!(mount.state() == "idle" && !reader.is_finished(), "{way}: half a step must not be read");
                engine.write(rest);
                assert!(!reader.is_finished(), "{way}: the step has not ended");
                reader
            });
            reader.join().unwrap()
        });
        assert_eq!(read, 2, "{way}");
    }
}
