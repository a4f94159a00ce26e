//! `ctl` as shells use it, and what answers while commands and readers wait for an engine in the middle of a step.

mod support;

use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};
use support::*;

fn setup() -> (Scratch, Model, Engine, Mount) {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let engine = Engine::new(&model, scratch.join("engine.json"));
    let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).mount();
    mount.settled();
    (scratch, model, engine, mount)
}

#[test]
fn opening_truncating_syncing_and_writing_nothing_are_no_commands() {
    let (_scratch, _model, _engine, mount) = setup();
    for _ in 0..3 {
        let mut ctl = File::options().write(true).truncate(true).open(mount.path("ctl")).unwrap();
        assert_eq!(ctl.write(b"").unwrap(), 0);
        ctl.set_len(0).unwrap();
        ctl.set_len(100).unwrap();
        ctl.flush().unwrap();
        ctl.sync_all().unwrap();
    }
    drop(File::options().append(true).create(true).open(mount.path("ctl")).unwrap());
    assert_eq!(mount.fact("last_command").unwrap(), "none");
}

#[test]
fn commands_work_from_the_shell_as_documented() {
    let (_scratch, _model, _engine, mount) = setup();
    let shell = |script: &str| {
        let mut sh = Command::new("sh");
        sh.args(["-ec", script]).current_dir(&mount.point).stderr(Stdio::null());
        sh.status().unwrap().success()
    };
    assert!(shell("echo freeze > ctl"));
    assert_eq!(mount.state(), "frozen");
    assert!(shell("echo thaw >> ctl"));
    assert_eq!(mount.state(), "idle");
    assert!(shell("printf commit > ctl"));
    assert!(shell("printf 'refresh\\r\\n' > ctl"));
    assert!(!shell("echo nonsense > ctl"));
    assert!(shell("echo nonsense > ctl || echo failed"));
    // One descriptor, several writes: several commands.
    assert!(shell("exec 3> ctl; echo freeze >&3; echo thaw >&3; echo refresh >&3"));
    assert_eq!(mount.fact("last_command").unwrap().split(':').next(), Some("refresh"));
}

#[test]
fn commands_take_turns_and_status_answers_meanwhile() {
    let (_scratch, _model, mut engine, mount) = setup();
    // The engine is in the middle of a step: a commit has to wait for its end.
    std::thread::scope(|scope| {
        let (first, second) = engine.step(|_| {
            let first = scope.spawn(|| mount.ctl("commit"));
            until("it has begun", || mount.state() == "committing");
            let second = scope.spawn(|| mount.ctl("refresh"));
            assert!(!first.is_finished());
            assert_eq!(mount.state(), "committing");
            assert!(std::fs::read_dir(&mount.point).unwrap().count() > 5);
            (first, second)
        });
        first.join().unwrap().unwrap();
        // The kernel lets one write to a file through at a time; had it not, this one would have been refused.
        let second = second.join().unwrap();
        assert!(second.is_ok() || errno(second) == Some(libc::EBUSY));
    });
    assert_eq!(mount.state(), "idle");
    mount.does("refresh");
}

#[test]
fn status_answers_while_many_readers_wait_for_the_end_of_a_step() {
    for way in ["held", "live"] {
        let scratch = Scratch::new();
        let model = Model::sharded(scratch.join("model"));
        let mut engine = Engine::new(&model, scratch.join("engine.json"));
        let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).args(&["--view", way]).mount();
        mount.settled();
        std::thread::scope(|scope| {
            let readers: Vec<_> = engine.step(|_| {
                let readers = (0..24).map(|i| {
                    let path = mount.shard(i % 3);
                    scope.spawn(move || std::fs::read(path).unwrap())
                });
                let readers: Vec<_> = readers.collect();
                // All of them have asked and none has an answer: asleep in the kernel until the step ends.
                until("all of them wait", || sleeping_in_fuse() >= 24);
                assert_eq!(mount.state(), "idle", "{way}");
                assert!(mount.path("config.json").exists(), "{way}");
                assert!(readers.iter().all(|r| !r.is_finished()), "{way}");
                readers
            });
            for (i, reader) in readers.into_iter().enumerate() {
                assert!(reader.join().unwrap() == std::fs::read(model.shard(i % 3)).unwrap(), "{way}");
            }
        });
    }
}

/// How many threads of this process wait for an answer of a FUSE daemon.
fn sleeping_in_fuse() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let waits = |t: std::io::Result<std::fs::DirEntry>| {
        let stack = std::fs::read_to_string(t.ok()?.path().join("wchan")).ok()?;
        ["fuse", "request_wait_answer"].iter().any(|s| stack.contains(s)).then_some(())
    };
    tasks.filter_map(waits).count()
}
