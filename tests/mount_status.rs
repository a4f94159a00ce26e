//! `status`, `status.json` and `ctl` of a real mount: their keys, that `poll` wakes for news, and whom `ctl` obeys.

mod support;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use support::*;

/// Every key that docs/semantics.md lists and this mount has.
const KEYS: &[&str] = &[
    "state",
    "model",
    "mount",
    "pid",
    "source",
    "device",
    "bytes",
    "tensors",
    "step",
    "view_step",
    "view",
    "view_bytes",
    "view_ready",
    "host_memory",
    "gpu_memory",
    "readers",
    "committed",
    "dirty",
    "job",
    "last_job",
    "jobs_queued",
    "last_command",
    "last_error",
];

fn setup() -> (Scratch, Model, Engine, Mount) {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let engine = Engine::new(&model, scratch.join("engine.json"));
    let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).args(&["--view", "held"]).mount();
    mount.settled();
    (scratch, model, engine, mount)
}

#[test]
fn status_has_every_key_on_a_line_of_its_own_and_json_the_same_facts() {
    let (_scratch, model, engine, mount) = setup();
    let text = std::fs::read_to_string(mount.path("status")).unwrap();
    let keys: Vec<&str> = text.lines().map(|l| l.split_once(' ').expect("key and value").0).collect();
    assert_eq!(keys, KEYS);
    assert_eq!(std::fs::metadata(mount.path("status")).unwrap().len(), 0, "its size is 0, as in /proc");

    let json = mount.status();
    assert_eq!(json["state"], "idle");
    assert_eq!(json["pid"], mount.pid);
    assert_eq!(json["model"], model.path.to_str().unwrap());
    assert_eq!(json["mount_point"], mount.point.to_str().unwrap());
    assert_eq!(json["source"]["engine"], "toy 7");
    assert_eq!(json["source"]["pids"], serde_json::json!([std::process::id()]));
    assert_eq!(json["source"]["tensors"], model.specs.len());
    assert_eq!(json["source"]["live"], engine.live());
    assert_eq!(json["source"]["opaque"], 1);
    assert_eq!(json["source"]["only_on_disk"], 2);
    let bytes: usize = model.disk().iter().map(Vec::len).sum();
    assert_eq!(json["source"]["bytes"], bytes);
    assert_eq!(json["view"]["bytes"], bytes);
    // What is announced: the copies, a commit of everything, 16 bytes a block for each of them; weights are the engine's.
    let hashes = 2 * 16 * model.disk().iter().map(|shard| shard.len().div_ceil(4096)).sum::<usize>();
    // What encoders take depends on the number of cores.
    let encoding = json["memory"]["host"]["encoding"].as_u64().unwrap() as usize;
    assert!(encoding > 0);
    let host = serde_json::json!({"weights": 0, "view": bytes, "staging": bytes, "encoding": encoding, "hashes": hashes, "buffers": 0});
    assert_eq!(json["memory"]["host"], host);
    assert_eq!(
        mount.fact("host_memory").unwrap().split(' ').next(),
        Some(&*(2 * bytes + encoding + hashes).to_string())
    );
    assert_eq!(mount.fact("gpu_memory").unwrap(), "0 at most (weights 0, buffers 0)");
    assert_eq!(json["committed"], serde_json::Value::Null);
    assert_eq!(json["readers"]["open"], 0);
    assert_eq!(mount.fact("mount").unwrap(), mount.point.to_str().unwrap());
    assert_eq!(mount.fact("bytes").unwrap(), bytes.to_string());
    assert_eq!(mount.fact("last_command").unwrap(), "none");
}

#[test]
fn status_tells_who_has_weights_open_and_what_the_last_command_did() {
    let (_scratch, _model, mut engine, mount) = setup();
    assert_eq!(mount.fact("dirty").unwrap(), "no");
    let open = mount.open(1);
    assert_eq!(mount.fact("readers").unwrap(), format!("1 pid {}", std::process::id()));
    assert!(mount.fact("view_held").unwrap().ends_with("s more at most"));
    drop(open);
    until("the reader is forgotten", || mount.fact("readers").unwrap() == "0");
    assert_eq!(mount.fact("view_held"), None);

    engine.change_all(1);
    drop(mount.open(0));
    assert_eq!(mount.fact("dirty").unwrap(), "yes");
    mount.does("commit over lunch");
    assert_eq!(mount.fact("dirty").unwrap(), "no");
    let committed = mount.status()["committed"].clone();
    assert_eq!(committed["id"], 1);
    assert!(mount.fact("committed").unwrap().starts_with("1 step "));
    assert!(mount.fact("last_command").unwrap().starts_with("commit: ok: "));
    assert_eq!(mount.fact("last_error").unwrap(), "none");

    // A step that was committed before any reader saw it.
    engine.change_all(2);
    mount.does("commit from cron");
    drop(mount.open(0));
    assert_eq!(mount.fact("dirty").unwrap(), "no");
    engine.change_all(3);
    drop(mount.open(0));
    assert_eq!(mount.fact("dirty").unwrap(), "yes");

    assert_eq!(errno(mount.ctl("train /job.json")), Some(libc::ENOENT));
    assert!(mount.fact("last_command").unwrap().starts_with("train: ENOENT: "));
    assert!(mount.fact("last_error").unwrap().contains("no such file"));
}

#[test]
fn weights_that_differ_from_the_files_at_the_start_have_a_time_of_their_own() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let mut engine = Engine::new(&model, scratch.join("engine.json"));
    engine.change_all(1);
    let files: Vec<_> = model.shards.iter().map(|s| model.path.join(s)).collect();
    let mtime = |path: &std::path::Path| std::fs::metadata(path).unwrap().modified().unwrap();
    let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).mount();
    mount.settled();
    assert_eq!(mount.fact("dirty").unwrap(), "yes");
    for file in files {
        let shown = mount.path(file.file_name().unwrap().to_str().unwrap());
        assert!(mtime(&shown) > mtime(&file), "rsync goes by size and time");
    }
}

#[test]
fn a_step_that_readers_meet_is_counted() {
    let (_scratch, _model, mut engine, mount) = setup();
    let step = || mount.status()["view"]["step"].as_u64().unwrap();
    let before = step();
    engine.change_all(1);
    mount.weights();
    assert_eq!(step(), before + 1);
    mount.weights();
    assert_eq!(step(), before + 1, "nothing has changed since");
}

#[test]
fn a_poller_of_status_wakes_when_it_says_something_new() {
    let (_scratch, _model, _engine, mount) = setup();
    let mut status = File::open(mount.path("status")).unwrap();
    let mut read = || {
        let mut text = String::new();
        status.rewind().unwrap();
        status.read_to_string(&mut text).unwrap();
        text
    };
    assert!(read().contains("state idle"));
    let watched = status.try_clone().unwrap();
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let news =
        |wait: &Timespec| poll(&mut [PollFd::new(&watched, PollFlags::IN | PollFlags::PRI)], Some(wait)).unwrap();
    assert_eq!(news(&now), 0, "it was read a moment ago");

    let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    std::thread::scope(|scope| {
        let woken = scope.spawn(|| news(&patience));
        mount.does("freeze");
        assert_eq!(woken.join().unwrap(), 1, "the poller should have woken");
    });
    let mut text = String::new();
    status.rewind().unwrap();
    status.read_to_string(&mut text).unwrap();
    assert!(text.contains("state frozen"), "the open file, read again, has the news");
}

#[test]
fn ctl_reads_as_empty_and_is_its_owners_alone() {
    let (_scratch, _model, _engine, mount) = setup();
    let ctl = std::fs::metadata(mount.path("ctl")).unwrap();
    assert_eq!((ctl.permissions().mode() & 0o7777, ctl.len()), (0o600, 0));
    assert_eq!(std::fs::read(mount.path("ctl")).unwrap(), b"");
}

fn as_nobody(script: &str, mount: &Mount) -> String {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", script, "sh"]).arg(&mount.point);
    let output = command.env("LC_ALL", "C").output().unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

#[test]
fn other_users_see_nothing_of_a_mount() {
    if !have("setpriv") {
        return;
    }
    let (scratch, _model, _engine, mount) = setup();
    std::fs::set_permissions(scratch.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let said = as_nobody("ls \"$1\"; cat \"$1/status\"; echo freeze > \"$1/ctl\"", &mount);
    assert_eq!(said.matches("Permission denied").count(), 3, "{said}");
    assert_eq!(mount.state(), "idle");
}

#[test]
fn a_link_in_a_shared_mount_leads_others_no_further_than_their_rights_do() {
    if !have("setpriv") {
        return;
    }
    let scratch = Scratch::new();
    std::fs::set_permissions(scratch.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let model = Model::sharded(scratch.join("model"));
    let closed = scratch.dir("closed");
    for name in ["secret", "open"] {
        std::fs::write(closed.join(name), "rootsown").unwrap();
    }
    std::fs::set_permissions(closed.join("secret"), PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::set_permissions(&closed, PermissionsExt::from_mode(0o700)).unwrap();
    std::os::unix::fs::symlink(closed.join("open"), model.path.join("out")).unwrap();
    std::fs::write(model.path.join("mine"), "nobody's").unwrap();
    std::os::unix::fs::symlink("mine", model.path.join("alias")).unwrap();
    std::os::unix::fs::chown(&model.path, Some(65534), Some(65534)).unwrap();
    let mount = Mounting::of(&model, scratch.join("mnt")).arg("--allow-other").mount();
    assert_eq!(as_nobody("cat \"$1/mine\" \"$1/alias\"", &mount), "nobody'snobody's");
    assert!(as_nobody("cat \"$1/out\"", &mount).contains("Permission denied"));
    // What the kernel remembers of a name is what the file was before it was exchanged: the open decides, not that.
    let script = format!(
        "cd '{}'; stat \"$1/mine\" > ../said; ln -sf '{}' new; mv new mine; cat \"$1/mine\"",
        model.path.display(),
        closed.join("secret").display()
    );
    std::fs::write(scratch.join("said"), "").unwrap();
    std::os::unix::fs::chown(scratch.join("said"), Some(65534), None).unwrap();
    let said = as_nobody(&script, &mount);
    assert!(said.contains("Permission denied") && !said.contains("rootsown"), "{said}");
    assert_eq!(std::fs::read(mount.path("mine")).unwrap(), b"rootsown", "for its owner it is as it is");
}

#[test]
fn with_allow_other_other_users_read_what_modes_let_them_and_command_nothing() {
    if !have("setpriv") {
        return;
    }
    let scratch = Scratch::new();
    std::fs::set_permissions(scratch.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let model = Model::sharded(scratch.join("model"));
    for (i, mode) in [(0, 0o644), (1, 0o600)] {
        std::fs::set_permissions(model.shard(i), PermissionsExt::from_mode(mode)).unwrap();
    }
    let mount = Mounting::of(&model, scratch.join("mnt")).arg("--allow-other").mount();
    let said = as_nobody("cat \"$1/status\" | grep ^state", &mount);
    assert_eq!(said.trim(), "state idle");
    for (i, may) in [(0, true), (1, false)] {
        let script = format!("sha256sum < \"$1/{}\"", model.shards[i]);
        assert_eq!(as_nobody(&script, &mount).contains("Permission denied"), !may, "shard {i}");
    }
    assert!(as_nobody("echo freeze > \"$1/ctl\"", &mount).contains("Permission denied"));
    // With the file opened by the owner and passed on, the write itself is refused.
    let ctl = File::options().write(true).open(mount.path("ctl")).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "env", "printf", "freeze"]);
    let output = command.stdout(ctl).env("LC_ALL", "C").output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("not permitted"), "{output:?}");
    assert_eq!(mount.state(), "idle");
}
