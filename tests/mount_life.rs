//! The life of a mount: there when the command returns, gone with umount or a signal whatever is open, cleared away when
//! its daemon was killed; readers and writers that are killed cost nothing.

mod support;

use rustix::process::{Pid, Signal, getsid, kill_process};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use support::model::assert_same;
use support::mount::{assert_one_line, fails, is_mounted};
use support::*;

const WAYS: [Way; 3] = [Way::Passthrough, Way::Copied, Way::Direct];

fn setup(way: Way) -> (Scratch, Model, Engine, Mount) {
    let scratch = Scratch::new();
    // Larger than a pipe, so that a reader can be stopped in the middle of it.
    let model = Model::sharded_of(scratch.join("model"), 4000);
    let engine = Engine::new(&model, scratch.join("engine.json"));
    let mut mounting = Mounting::of(&model, scratch.join("mnt")).engine(&engine).way(way);
    if way == Way::Copied {
        mounting = mounting.arg("--no-passthrough");
    }
    let mount = mounting.mount();
    mount.settled();
    (scratch, model, engine, mount)
}

fn read(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

// -- beginning --

#[test]
fn the_command_returns_when_the_mount_answers_and_leaves_a_daemon_that_nothing_ties_to_its_starter() {
    let (_scratch, model, _engine, mount) = setup(Way::Passthrough);
    assert_same("right after the command", &mount.weights(), &model.disk());
    let pid = Pid::from_raw(mount.pid as i32).unwrap();
    assert_eq!(getsid(Some(pid)).unwrap(), pid, "a session of its own");
    let link = |name: &str| std::fs::read_link(format!("/proc/{}/{name}", mount.pid)).unwrap();
    assert_eq!(link("cwd"), Path::new("/"));
    assert_eq!(link("fd/0"), Path::new("/dev/null"));
    assert_eq!(link("fd/1"), Path::new("/dev/null"));
    assert!(link("fd/2").ends_with(".weightfs/mount.log"));
    // A terminal that closes does not end it.
    mount.signal(Signal::HUP);
    assert_eq!(mount.state(), "idle");
    assert!(std::fs::read_to_string(model.path.join(".weightfs/mount.log")).unwrap().contains("is mounted at"));
}

#[test]
fn a_log_file_that_is_asked_for_gets_the_log() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let log = scratch.join("a log");
    let mount = Mounting::of(&model, scratch.join("mnt")).arg("--log-file").arg(&log).mount();
    assert!(std::fs::read_to_string(&log).unwrap().contains("is mounted at"));
    assert_eq!(errno(mount.ctl("thaw")), Some(libc::EINVAL));
    until("the refusal is in the log", || std::fs::read_to_string(&log).unwrap().contains("not frozen"));
    let failure = fails(
        weightfs()
            .arg("mount")
            .arg("--log-file")
            .arg(scratch.join("no/such/log"))
            .arg(&model.path)
            .arg(scratch.dir("other")),
    );
    assert_one_line(&failure, &["no/such/log"]);
}

#[test]
fn a_mount_that_works_says_nothing() {
    for options in [&[][..], &["--read-only"]] {
        let scratch = Scratch::new();
        let model = Model::sharded(scratch.join("model"));
        let point = scratch.dir("mnt");
        let output = weightfs().arg("mount").args(options).arg(&model.path).arg(&point).output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()), "", "{options:?}");
        succeeds(weightfs().arg("umount").arg(&point));
    }
}

#[test]
fn of_several_mounts_begun_at_once_at_one_place_one_succeeds_and_none_covers_another() {
    for _ in 0..8 {
        let scratch = Scratch::new();
        let models = ["one", "two", "three"].map(|name| Model::sharded(scratch.join(name)));
        let point = scratch.dir("mnt");
        let running = models.each_ref().map(|model| {
            let mut command = weightfs();
            command.arg("mount").arg(&model.path).arg(&point).stderr(Stdio::piped()).spawn().unwrap()
        });
        let ended = running.map(|child| child.wait_with_output().unwrap());
        for output in ended.iter().filter(|o| !o.status.success()) {
            let failure =
                Failure { status: output.status, stderr: String::from_utf8_lossy(&output.stderr).into_owned() };
            assert_one_line(&failure, &["mnt"]);
        }
        let mounted = ended.iter().filter(|o| o.status.success()).count();
        (0..mounted).for_each(|_| drop(succeeds(weightfs().arg("umount").arg(&point))));
        assert_eq!(mounted, 1);
        assert!(!is_mounted(&point));
    }
}

// -- end --

#[test]
fn signals_unmount_cleanly() {
    for (signal, way) in [(Signal::TERM, Way::Passthrough), (Signal::INT, Way::Direct)] {
        let (_scratch, _model, _engine, mount) = setup(way);
        mount.signal(signal);
        mount.ends();
        assert!(!mount.is_mounted());
        assert_eq!(std::fs::read_dir(&mount.point).unwrap().count(), 0);
    }
}

#[test]
fn a_mount_in_the_foreground_ends_with_success_on_a_signal_and_on_umount() {
    for by_signal in [true, false] {
        let scratch = Scratch::new();
        let model = Model::sharded(scratch.join("model"));
        let mut mount = Mounting::of(&model, scratch.join("mnt")).foreground();
        match by_signal {
            true => mount.signal(Signal::INT),
            false => drop(mount.umount()),
        }
        assert!(mount.child.take().unwrap().wait().unwrap().success());
        assert!(!mount.is_mounted());
    }
}

#[test]
fn umount_works_with_files_open_which_stay_readable_and_hold_the_daemon() {
    for way in WAYS {
        let (_scratch, model, mut engine, mount) = setup(way);
        engine.change_all(1);
        let live = engine.over(model.disk());
        let files: Vec<File> = (0..live.len()).map(|i| mount.open(i)).collect();
        let text = File::open(mount.path("tokenizer.json")).unwrap();
        // SAFETY: the mapping is read once, below; nothing truncates the file.
        let map = unsafe { memmap2::Mmap::map(&files[2]) }.unwrap();
        let says = mount.umount();
        assert!(says.contains(&format!("open by pid {}", std::process::id())), "{says}");
        assert!(!mount.is_mounted());
        assert_same("files that are open", &files.iter().map(read).collect::<Vec<_>>(), &live);
        assert_eq!(read(&text), vec![b'x'; 9001]);
        assert!(map[..] == live[2][..], "the mapping");
        assert!(mount.is_running(), "it serves what is open");
        drop((files, text, map));
        mount.ends();
    }
}

#[test]
fn a_signal_works_with_files_open_too() {
    let (_scratch, model, _engine, mount) = setup(Way::Passthrough);
    let file = mount.open(0);
    mount.signal(Signal::TERM);
    until("it is unmounted", || !mount.is_mounted());
    assert_same("the open file", &[read(&file)], &model.disk()[..1]);
    drop(file);
    mount.ends();
}

#[test]
fn a_signal_to_a_daemon_whose_place_is_taken_leaves_the_next_mount_alone() {
    let (scratch, _model, _engine, mount) = setup(Way::Passthrough);
    let file = mount.open(0);
    mount.umount();
    let other = Model::sharded(scratch.join("other"));
    let next = Mounting::of(&other, &mount.point).mount();
    mount.signal(Signal::TERM);
    drop(file);
    mount.ends();
    assert!(next.is_mounted() && next.is_running());
    assert_same("the next mount", &next.weights(), &other.disk());
}

#[test]
fn a_model_is_free_for_the_next_mount_when_umount_returns() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    for _ in 0..5 {
        let mount = Mounting::of(&model, scratch.join("mnt")).mount();
        assert!(mount.umount().starts_with("unmounted "));
        assert!(!mount.is_running());
    }
}

#[test]
fn the_systems_own_umount_ends_the_daemon() {
    if !have("umount") {
        return;
    }
    let (_scratch, _model, _engine, mount) = setup(Way::Passthrough);
    succeeds(Command::new("umount").arg("--lazy").arg(&mount.point));
    mount.ends();
}

// -- daemons that were killed --

fn killed() -> (Scratch, Model, Mount) {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let mount = Mounting::of(&model, scratch.join("mnt")).mount();
    mount.signal(Signal::KILL);
    mount.ends();
    until("the mount is dead", || errno(std::fs::metadata(&mount.point)) == Some(libc::ENOTCONN));
    assert!(mount.is_mounted());
    (scratch, model, mount)
}

#[test]
fn the_dead_mount_of_a_killed_daemon_is_cleared_by_the_next_mount() {
    let (_scratch, model, dead) = killed();
    let output = weightfs().arg("mount").arg(&model.path).arg(&dead.point).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("cleared the mount that a killed daemon left"), "{said}");
    assert_same("the new mount", &model::weights_in(&dead.point, &model.shards), &model.disk());
    dead.umount();
    assert!(!dead.is_mounted(), "there was one mount, not one over the dead one");
}

#[test]
fn the_dead_mount_of_a_killed_daemon_is_cleared_by_umount() {
    let (_scratch, model, dead) = killed();
    let says = dead.umount();
    assert!(says.contains("its daemon had ended"), "{says}");
    assert!(!dead.is_mounted());
    Mounting::of(&model, &dead.point).mount();
}

#[test]
fn what_was_mapped_of_a_killed_daemons_copy_stays_readable() {
    let (_scratch, model, _engine, mount) = setup(Way::Passthrough);
    if mount.fact("view").as_deref() != Some("passthrough") {
        return eprintln!("skipped: {:?}", mount.fact("view"));
    }
    let file = mount.open(0);
    // SAFETY: the mapping is read once, below; nothing truncates the file.
    let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    mount.signal(Signal::KILL);
    mount.ends();
    assert!(map[..] == model.disk()[0][..], "the mapping");
}

// -- readers and writers that are killed --

fn killed_child(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_reader_that_is_killed_in_the_middle_of_a_file_is_forgotten() {
    for way in WAYS {
        let (_scratch, model, mut engine, mount) = setup(way);
        let mut cat = Command::new("cat").arg(mount.shard(0)).stdout(Stdio::piped()).spawn().unwrap();
        cat.stdout.as_mut().unwrap().read_exact(&mut [0; 1000]).unwrap();
        assert_eq!(mount.fact("readers").unwrap(), format!("1 pid {}", cat.id()));
        engine.change_all(1);
        killed_child(cat);
        until("the reader is forgotten", || mount.fact("readers").unwrap() == "0");
        assert_same("the next reader", &mount.weights(), &engine.over(model.disk()));
    }
}

/// Holds the engine's lock while `wait` waits for something that cannot end meanwhile.
fn while_locked<T>(engine: &mut Engine, wait: impl FnOnce() -> T) -> T {
    engine.step(|_| wait())
}

fn echo(command: &str, mount: &Mount) -> Child {
    let mut shell = Command::new("sh");
    shell.args(["-c", "exec printf '%s' \"$1\" > \"$2\"", "sh", command]).arg(mount.path("ctl")).stderr(Stdio::null());
    shell.spawn().unwrap()
}

#[test]
fn a_command_goes_on_to_its_end_when_its_writer_is_killed() {
    let (_scratch, model, mut engine, mount) = setup(Way::Passthrough);
    engine.change_all(1);
    let live = engine.over(model.disk());
    let writer = while_locked(&mut engine, || {
        let writer = echo("commit", &mount);
        until("the commit has begun", || mount.state() == "committing");
        // It cannot be interrupted, but it can be told.
        kill_process(Pid::from_raw(writer.id() as i32).unwrap(), Signal::KILL).unwrap();
        writer
    });
    until("the commit is done", || mount.state() == "idle");
    let _ = { writer }.wait();
    assert_same("the disk", &model.disk(), &live);
    assert_eq!(mount.status()["committed"]["id"], 1);
}

#[test]
fn a_signal_lets_the_running_command_end_first() {
    let (_scratch, model, mut engine, mount) = setup(Way::Passthrough);
    engine.change_all(1);
    let live = engine.over(model.disk());
    let mut writer = while_locked(&mut engine, || {
        let writer = echo("commit", &mount);
        until("the commit has begun", || mount.state() == "committing");
        mount.signal(Signal::TERM);
        let log = || std::fs::read_to_string(model.path.join(".weightfs/mount.log")).unwrap();
        until("the signal has come", || log().contains("signal 15: unmounting"));
        // At once, although the commit waits for the engine.
        until("it is unmounted", || !is_mounted(&mount.point));
        assert!(mount.is_running(), "the commit is not cut");
        writer
    });
    mount.ends();
    assert!(writer.wait().unwrap().success());
    assert_same("the disk", &model.disk(), &live);
    let log = succeeds(weightfs().arg("log").arg(&model.path));
    assert_eq!(log.lines().count(), 2, "{log}");
}

#[test]
fn while_an_engine_keeps_its_lock_status_answers_and_umount_works() {
    for way in WAYS {
        let (_scratch, _model, mut engine, mount) = setup(way);
        engine.change_all(1);
        let mut reader = while_locked(&mut engine, || {
            let cat =
                Command::new("cat").arg(mount.shard(0)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            // Blocked where only the engine can let it go on.
            let call = || std::fs::read_to_string(format!("/proc/{}/syscall", cat.id())).unwrap_or_default();
            let waits =
                [libc::SYS_openat, libc::SYS_read, libc::SYS_copy_file_range, libc::SYS_sendfile, libc::SYS_splice];
            until("the reader waits", || waits.iter().any(|n| call().starts_with(&format!("{n} "))));
            assert_eq!(mount.state(), "idle");
            assert!(std::fs::read(mount.path("config.json")).is_ok());
            assert!(std::fs::metadata(mount.shard(0)).is_ok());
            // Without waiting for the daemon, which waits for the reader.
            let mut umount = weightfs().arg("umount").arg(&mount.point).stdout(Stdio::null()).spawn().unwrap();
            until("it is unmounted", || !is_mounted(&mount.point));
            (cat, umount.try_wait().unwrap().is_none().then_some(umount))
        });
        assert!(reader.0.wait().unwrap().success(), "{way:?}: what was asked before is answered");
        if let Some(umount) = &mut reader.1 {
            assert!(umount.wait().unwrap().success());
        }
        mount.ends();
    }
}

#[test]
fn a_copy_of_the_whole_mount_is_a_model_directory() {
    let (scratch, model, mut engine, mount) = setup(Way::Passthrough);
    engine.change_all(1);
    let copy = scratch.join("copy");
    succeeds(Command::new("cp").arg("-r").arg(&mount.point).arg(&copy));
    assert_same("the copy", &model::weights_in(&copy, &model.shards), &engine.expected(&model));
    // It can be mounted itself, with weights of its own.
    for name in ["ctl", "status", "status.json"] {
        std::fs::remove_file(copy.join(name)).unwrap();
    }
    std::io::stdout().flush().unwrap();
    let own = weightfs().arg("mount").arg(&copy).arg(scratch.dir("second")).output().unwrap();
    assert!(own.status.success(), "{}", String::from_utf8_lossy(&own.stderr));
    let second = scratch.join("second");
    assert_same("a mount of the copy", &model::weights_in(&second, &model.shards), &engine.expected(&model));
    succeeds(weightfs().arg("umount").arg(&second));
}
