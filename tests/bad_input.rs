//! Model directories, mount points, options and commands that cannot be used: each ends in one line that names it, says why
//! and what to do, with nothing mounted and nothing changed on disk.

mod support;

use rustix::fs::symlink;
use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use support::model::*;
use support::mount::{assert_one_line, fails, is_mounted};
use support::refusal::refuses;
use support::*;

// -- the model directory --

fn header(file: &Path) -> (usize, Value) {
    let bytes = std::fs::read(file).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (8 + n, serde_json::from_slice(&bytes[8..8 + n]).unwrap())
}

/// Puts another header before the same data.
fn set_header(file: &Path, text: &str) {
    let data = std::fs::read(file).unwrap().split_off(header(file).0);
    std::fs::write(file, [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &data].concat()).unwrap();
}

fn edit_header(file: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = header(file).1;
    edit(&mut value);
    set_header(file, &value.to_string());
}

fn edit_index(model: &Model, edit: impl FnOnce(&mut Value)) {
    let path = model.path.join("model.safetensors.index.json");
    let mut index = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut index);
    std::fs::write(path, index.to_string()).unwrap();
}

/// A way to spoil a model directory, and what is said about it.
type Spoilt = (&'static str, fn(&Model), &'static [&'static str]);

const MODELS: &[Spoilt] = &[
    (
        "a truncated shard",
        |m| File::options().write(true).open(m.shard(1)).unwrap().set_len(5000).unwrap(),
        &["model-00002-of-00003.safetensors", "truncated"],
    ),
    (
        "a shard shorter than its header",
        |m| std::fs::write(m.shard(1), [200, 0, 0, 0, 0, 0, 0, 0, b'{']).unwrap(),
        &["truncated"],
    ),
    ("an empty shard", |m| std::fs::write(m.shard(1), []).unwrap(), &["model-00002", "fewer than the 8"]),
    (
        "a header of over 100 MB",
        |m| {
            let file = File::options().write(true).open(m.shard(0)).unwrap();
            file.write_all_at(&100_000_001u64.to_le_bytes(), 0).unwrap();
            file.set_len(100_000_100).unwrap();
        },
        &["model-00001", "100000001", "limit"],
    ),
    ("a header that is no JSON", |m| set_header(&m.shard(0), "{\"a\": "), &["model-00001", "JSON"]),
    (
        "a header that is no text",
        |m| {
            let file = File::options().write(true).open(m.shard(0)).unwrap();
            file.write_all_at(b"\xff\xfe", 20).unwrap();
        },
        &["model-00001", "UTF-8"],
    ),
    (
        "overlapping offsets",
        |m| {
            edit_header(&m.shard(0), |h| {
                for end in [0, 1] {
                    h[V]["data_offsets"][end] = (h[V]["data_offsets"][end].as_u64().unwrap() - 2).into();
                }
            })
        },
        &["overlaps"],
    ),
    (
        "offsets behind the end of the file",
        |m| {
            edit_header(&m.shard(0), |h| {
                for end in [0, 1] {
                    h[V]["data_offsets"][end] = (h[V]["data_offsets"][end].as_u64().unwrap() + (1 << 30)).into();
                }
            })
        },
        &[V, "end of the file"],
    ),
    (
        "offsets that do not hold the shape",
        |m| edit_header(&m.shard(0), |h| h[V]["shape"] = json!([33, 64])),
        &[V, "shape"],
    ),
    ("a dtype that nobody knows", |m| edit_header(&m.shard(0), |h| h[V]["dtype"] = "F128".into()), &["F128"]),
    (
        "one name twice in a header",
        |m| {
            let text = header(&m.shard(0)).1.to_string().replace(K, Q);
            set_header(&m.shard(0), &text);
        },
        &[Q, "twice"],
    ),
    (
        "one name in two shards",
        |m| {
            edit_header(&m.shard(1), |h| {
                let entry = h.as_object_mut().unwrap().remove(O).unwrap();
                h[Q] = entry;
            })
        },
        &[Q, "model-00001", "model-00002", "remove one"],
    ),
    (
        "an index that names a missing shard",
        |m| std::fs::remove_file(m.shard(2)).unwrap(),
        &["index.json", "model-00003-of-00003.safetensors", "not there"],
    ),
    (
        "an index that names a file elsewhere",
        |m| {
            edit_index(m, |i| {
                i["weight_map"][Q] = "../elsewhere.safetensors".into();
            })
        },
        &["index.json", "../elsewhere.safetensors"],
    ),
    (
        "an index that is wrong about a tensor",
        |m| {
            edit_index(m, |i| {
                i["weight_map"][Q] = "model-00002-of-00003.safetensors".into();
            })
        },
        &[Q, "model-00001", "model-00002"],
    ),
    (
        "an index that is no JSON",
        |m| std::fs::write(m.path.join("model.safetensors.index.json"), "{").unwrap(),
        &["index.json"],
    ),
    (
        "no weights",
        |m| {
            std::fs::remove_file(m.path.join("model.safetensors.index.json")).unwrap();
            m.shards.iter().for_each(|s| std::fs::remove_file(m.path.join(s)).unwrap());
        },
        &["no safetensors weights", "expected model.safetensors"],
    ),
];

#[test]
fn a_model_directory_that_cannot_be_believed_is_refused() {
    for (what, spoil, words) in MODELS {
        let scratch = Scratch::new();
        let model = Model::sharded(scratch.join("model"));
        spoil(&model);
        let point = scratch.dir("mnt");
        refuses(what, Mounting::of(&model, &point), &model.path, &point, words);
        assert!(!model.path.join(".weightfs").exists(), "{what}: .weightfs was made");
        // Another command says the same.
        let manifest = scratch.join("none.json");
        assert_one_line(&fails(weightfs().arg("diagnose").arg(&model.path).arg("--weights").arg(&manifest)), words);
    }
}

#[test]
fn a_model_directory_that_is_not_there_is_refused() {
    let scratch = Scratch::new();
    let point = scratch.dir("mnt");
    let missing = scratch.join("no such model");
    let failure = fails(weightfs().arg("mount").arg(&missing).arg(&point));
    assert_one_line(&failure, &["no such model", "No such file"]);
    let file = scratch.join("file");
    std::fs::write(&file, "x").unwrap();
    assert_one_line(&fails(weightfs().arg("mount").arg(&file).arg(&point)), &["file"]);
}

#[test]
fn a_model_directory_that_cannot_be_written_can_be_mounted_read_only_and_no_other_way() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let point = scratch.dir("mnt");
    mount_bind(&model.path, &model.path).unwrap();
    let _bind = Bind(&model.path);
    mount_remount(&model.path, MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
    refuses("a read-only disk", Mounting::of(&model, &point), &model.path, &point, &["--read-only"]);
    let mount = Mounting::of(&model, &point).arg("--read-only").mount();
    assert_same("the mount", &mount.weights(), &model.disk());
}

/// Undoes a bind mount.
struct Bind<'a>(&'a Path);

impl Drop for Bind<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

// -- the mount point --

#[test]
fn a_mount_point_that_cannot_be_used_is_refused() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let refused = |point: &Path, words: &[&str]| {
        let failure = fails(weightfs().arg("mount").arg(&model.path).arg(point));
        println!("{}", failure.stderr.trim_end());
        assert_one_line(&failure, words);
        assert!(!is_mounted(point));
        assert!(!model.path.join(".weightfs").exists(), ".weightfs was made");
    };
    refused(&scratch.join("missing"), &["missing", "does not exist", "mkdir"]);
    let file = scratch.join("file");
    std::fs::write(&file, "kept").unwrap();
    refused(&file, &["file", "not a directory"]);
    assert_eq!(std::fs::read(&file).unwrap(), b"kept");
    let full = scratch.dir("full");
    std::fs::write(full.join("something"), "kept").unwrap();
    refused(&full, &["full", "not empty"]);
    assert_eq!(std::fs::read(full.join("something")).unwrap(), b"kept");
    let inside = scratch.dir("model/inside");
    refused(&inside, &["must not lie in each other"]);
    symlink(scratch.path(), scratch.join("link")).unwrap();
    refused(&scratch.join("link/model/inside"), &["must not lie in each other"]);
    refused(scratch.path(), &["must not lie in each other"]);
}

#[test]
fn a_mount_point_that_is_mounted_already_is_refused_and_its_mount_lives_on() {
    let scratch = Scratch::new();
    let (first, second) = (Model::sharded(scratch.join("first")), Model::sharded(scratch.join("second")));
    let mount = Mounting::of(&first, scratch.join("mnt")).mount();
    let failure = fails(weightfs().arg("mount").arg(&second.path).arg(&mount.point));
    assert_one_line(&failure, &["mounted already", "weightfs umount"]);
    assert_eq!(mount.status()["model"], first.path.to_str().unwrap());
    assert_same("the first mount", &mount.weights(), &first.disk());
}

#[test]
fn what_is_not_a_mount_of_ours_is_not_unmounted() {
    let scratch = Scratch::new();
    let point = scratch.dir("mnt");
    assert_one_line(&fails(weightfs().arg("umount").arg(&point)), &["nothing is mounted"]);
    assert_one_line(&fails(weightfs().arg("umount").arg(scratch.join("missing"))), &["nothing is mounted", "missing"]);
    assert_one_line(&fails(weightfs().arg("umount").arg("/proc")), &["/proc", "not of weightfs"]);
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let point = scratch.dir("mnt");
    let cases: &[(&[&str], &[&str])] = &[
        (&["--weights", "own", "--weights", "own"], &["own", "twice"]),
        (&["--weights", "own", "--weights", "x.json"], &["own", "mixed"]),
        (&["--device", "cuda:999"], &["cuda:999", "--device cpu"]),
        (&["--device", "abacus"], &["abacus"]),
    ];
    for (options, words) in cases {
        refuses(&options.join(" "), Mounting::of(&model, &point).args(options), &model.path, &point, words);
    }
    let cases: &[(&[&str], &[&str])] = &[
        (&["mount"], &["required", "<MODEL_DIR> <MOUNT_POINT>", "--help"]),
        (&["mount", "a", "b", "--view", "upside-down"], &["upside-down", "auto, held, live"]),
        (&["mount", "a", "b", "--view-hold", "long"], &["long", "--view-hold"]),
        (&["mount", "a", "b", "--colour", "red"], &["--colour"]),
        (&["mnt"], &["mnt", "--help"]),
        (&["log", "/no/such/model"], &["/no/such/model", "No such file"]),
        (&["verify", "/no/such/model"], &["/no/such/model", "No such file"]),
    ];
    for (arguments, words) in cases {
        assert_one_line(&fails(weightfs().args(*arguments)), words);
    }
    assert_one_line(&fails(weightfs().arg("commit").arg(&model.path)), &["--weights MANIFEST"]);
    assert_one_line(&fails(weightfs().arg("diagnose").arg(&model.path)), &["--weights MANIFEST"]);
}

// -- ctl --

#[test]
fn what_is_no_command_is_refused_by_the_write_and_explained_in_status() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let mut engine = Engine::new(&model, scratch.join("engine.json"));
    let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).mount();
    mount.settled();
    let before = model.disk();
    engine.change_all(1);
    let long = [b"commit ".to_vec(), vec![b'm'; 2 << 20]].concat();
    let cases: &[(&str, &[u8], i32, &str)] = &[
        ("garbage", b"make it so\n", libc::EINVAL, "'make' is no command"),
        ("another case", b"COMMIT\n", libc::EINVAL, "'COMMIT' is no command"),
        ("2 MB", &long, libc::E2BIG, "at most"),
        ("binary", b"commit \x00\x01\x02", libc::EINVAL, "control character"),
        ("no text", b"\xff\xfe\x00c", libc::EINVAL, "UTF-8"),
        ("an empty line", b"\n", libc::EINVAL, "empty"),
        ("two commands", b"commit\ncommit\n", libc::EINVAL, "one write is one command"),
        ("a command and more", b"refresh now\n", libc::EINVAL, "takes nothing after it"),
        ("a number that is none", b"rollback one\n", libc::EINVAL, "takes a number"),
        ("thaw of what is not frozen", b"thaw\n", libc::EINVAL, "not frozen"),
        ("a job that is not there", b"train /job.json\n", libc::ENOENT, "no such file"),
        ("a job that does not run", b"cancel 7\n", libc::EINVAL, "no job 7"),
    ];
    for (what, bytes, expected, words) in cases {
        assert_eq!(errno(mount.write_ctl(bytes)), Some(*expected), "{what}");
        let status = mount.status();
        assert!(mount.says().contains(words), "{what}: {}", mount.says());
        let name = [(libc::EINVAL, "EINVAL"), (libc::E2BIG, "E2BIG"), (libc::ENOENT, "ENOENT")];
        let name = name.iter().find(|(e, _)| e == expected).unwrap().1;
        assert_eq!(status["last_command"]["result"], name, "{what}");
        assert_eq!(status["last_error"], status["last_command"]["says"], "{what}");
        assert_eq!(status["state"], "idle", "{what}");
        assert!(std::fs::read_to_string(mount.path("status")).unwrap().lines().count() < 25, "{what}: one line a fact");
    }
    // A write of nothing is no write, and does nothing.
    let commands = mount.status()["last_command"].clone();
    std::fs::write(mount.path("ctl"), b"").unwrap();
    assert_eq!(mount.status()["last_command"], commands);
    assert_same("the disk", &model.disk(), &before);
    assert_eq!(mount.status()["committed"], Value::Null);
    // The next right word is obeyed, wherever the file's offset is and without a newline.
    let ctl = File::options().append(true).open(mount.path("ctl")).unwrap();
    ctl.write_all_at(b"commit", 12345).unwrap();
    assert_same("the disk after the commit", &model.disk(), &engine.over(before));
}
