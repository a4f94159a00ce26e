//! Everything at once: an engine that trains, readers of all shards, and users who commit, refresh, freeze, thaw and roll back.
//! Nobody waits for ever, no reader sees two steps, and what is committed at the end is what is live.

mod support;

use safetensors::SafeTensors;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use support::engine::decode;
use support::model::*;
use support::*;

/// Rounds of each reader and of each user.
const ROUNDS: usize = 60;

fn setup(way: Way) -> (Scratch, Model, Engine, Mount) {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let mut engine = Engine::new(&model, scratch.join("engine.json"));
    engine.fill(1);
    let mut mounting = Mounting::of(&model, scratch.join("mnt")).engine(&engine).way(way);
    if way == Way::Copied {
        mounting = mounting.arg("--no-passthrough");
    }
    let mount = mounting.mount();
    mount.settled();
    mount.does("commit");
    (scratch, model, engine, mount)
}

/// The numbers that the live tensors of a shard hold. A value on disk that rounds to the live one is a hair off it.
fn numbers(shard: &[u8], live: &[String]) -> BTreeSet<u8> {
    let file = SafeTensors::deserialize(shard).unwrap();
    let live = file.tensors().into_iter().filter(|(name, _)| live.contains(name));
    live.flat_map(|(_, t)| decode(t.dtype(), t.data()).map(|v| v.round() as u8).collect::<BTreeSet<u8>>()).collect()
}

fn read(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Refreshes that were begun and that have ended, so that a reader knows whether one came in between.
#[derive(Default)]
struct Refreshes {
    begun: AtomicUsize,
    ended: AtomicUsize,
}

/// Readers of the held view see one number in all shards that they have open together, unless somebody refreshes meanwhile.
fn read_together(mount: &Mount, live: &[String], refreshes: &Refreshes) {
    for _ in 0..ROUNDS {
        let (ended, begun) = (refreshes.ended.load(Ordering::SeqCst), refreshes.begun.load(Ordering::SeqCst));
        let files: Vec<File> = (0..3).map(|i| mount.open(i)).collect();
        let seen: BTreeSet<u8> = files.iter().flat_map(|f| numbers(&read(f), live)).collect();
        let undisturbed = ended == begun && refreshes.begun.load(Ordering::SeqCst) == begun;
        assert!(!undisturbed || seen.len() == 1, "two steps together: {seen:?}");
    }
}

/// A user with a mind of their own.
fn command(mount: &Mount, seed: u64, refreshes: &Refreshes) {
    for round in 0..ROUNDS {
        let errno = match mixed(seed, round as u64) % 8 {
            0 => {
                refreshes.begun.fetch_add(1, Ordering::SeqCst);
                let result = errno(mount.ctl("refresh"));
                refreshes.ended.fetch_add(1, Ordering::SeqCst);
                result
            }
            1 | 2 => errno(mount.ctl("commit with others")),
            3 => errno(mount.ctl("freeze")),
            4 | 5 => errno(mount.ctl("thaw")),
            6 => errno(mount.ctl("rollback 1")),
            _ => {
                assert!(mount.status()["source"]["gone"].is_null());
                None
            }
        };
        // Done, or refused for a reason: somebody else's command, a freeze, nothing to thaw.
        assert!(matches!(errno, None | Some(libc::EBUSY | libc::EINVAL)), "{errno:?}: {}", mount.says());
    }
}

fn everything_at_once(way: Way) {
    let (_scratch, model, mut engine, mount) = setup(way);
    let live = engine.names();
    let (done, refreshes) = (AtomicBool::new(false), Refreshes::default());
    std::thread::scope(|scope| {
        let (mount, live, refreshes, engine) = (&mount, &live, &refreshes, &mut engine);
        let writer = scope.spawn(|| {
            let mut step = 1;
            while !done.load(Ordering::Acquire) {
                step = step % 200 + 1;
                engine.fill(step);
            }
        });
        let users: Vec<_> = (1..=2).map(|seed| scope.spawn(move || command(mount, seed, refreshes))).collect();
        let readers: Vec<_> = match way {
            Way::Direct => vec![],
            _ => (0..2).map(|_| scope.spawn(|| read_together(mount, live, refreshes))).collect(),
        };
        let results: Vec<_> = users.into_iter().chain(readers).map(|t| t.join()).collect();
        done.store(true, Ordering::Release);
        // If they left it frozen, the writer waits.
        let _ = mount.ctl("thaw");
        writer.join().unwrap();
        results.into_iter().for_each(|r| r.unwrap_or_else(|e| std::panic::resume_unwind(e)));
    });
    // A rollback may have written memory after the engine's last step.
    engine.reload();
    mount.does("commit");
    let expected = engine.expected(&model);
    assert_same("the disk", &model.disk(), &expected);
    assert_same("the mount", &mount.weights(), &expected);
    mount.umount();
    mount.ends();
    let verified = succeeds(weightfs().arg("verify").arg(&model.path));
    assert!(verified.contains(" 0 wrong"), "{verified}");
}

#[test]
fn everything_at_once_on_the_kernels_copy() {
    everything_at_once(Way::Passthrough);
}

#[test]
fn everything_at_once_on_our_copy() {
    everything_at_once(Way::Copied);
}

#[test]
fn everything_at_once_on_the_weights_themselves() {
    everything_at_once(Way::Direct);
}
