//! Manifests that cannot be used: each ends in one line that names it, says why and what to do, with nothing mounted and
//! nothing changed on disk; `diagnose` lists all that is wrong.

mod support;

use rustix::fs::symlink;
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use support::engine::{publish, start_time};
use support::model::*;
use support::mount::{assert_one_line, fails};
use support::refusal::refuses;
use support::*;

/// A way to spoil a manifest, and what is said about it.
type Manifest = (&'static str, fn(&mut Value), &'static [&'static str]);

fn tensor<'a>(manifest: &'a mut Value, name: &str) -> &'a mut Value {
    &mut manifest["tensors"][name]
}

const MANIFESTS: &[Manifest] = &[
    ("another version", |m| m["weightfs"] = 2.into(), &["version 2"]),
    ("no tensors", |m| drop(m.as_object_mut().unwrap().remove("tensors")), &["tensors"]),
    (
        "another model's tensors",
        |m| {
            let one = tensor(m, Q).clone();
            m["tensors"] = json!({"other.weight": one});
        },
        &["another model"],
    ),
    ("a segment outside its memory", |m| tensor(m, Q)["segments"][0]["offset"] = (1u64 << 40).into(), &[Q, "outside"]),
    (
        "a segment whose end overflows",
        |m| tensor(m, Q)["segments"][0]["strides"] = json!([u64::MAX / 2, 1]),
        &[Q, "outside"],
    ),
    ("a memory that is not listed", |m| tensor(m, Q)["segments"][0]["memory"] = 7.into(), &[Q, "memory 7"]),
    ("a negative offset", |m| tensor(m, Q)["segments"][0]["offset"] = (-1).into(), &["-1"]),
    ("a tensor not covered", |m| tensor(m, Q)["segments"][0]["shape"] = json!([63, 64]), &[Q, "4032 of its 4096"]),
    ("a tensor without segments", |m| tensor(m, Q)["segments"] = json!([]), &[Q]),
    (
        "a tensor covered twice",
        |m| {
            let one = tensor(m, Q)["segments"][0].clone();
            tensor(m, Q)["segments"].as_array_mut().unwrap().push(one);
        },
        &[Q, "two segments"],
    ),
    ("overlapping segments", |m| tensor(m, O)["segments"][1]["at"] = json!([0, 63]), &[O, "two segments"]),
    (
        "a segment outside its tensor",
        |m| tensor(m, O)["segments"][1]["at"] = json!([0, 65]),
        &[O, "outside the tensor"],
    ),
    ("a segment of fewer dimensions", |m| tensor(m, O)["segments"][1]["at"] = json!([0]), &[O, "2 dimensions"]),
    ("elements in one place", |m| tensor(m, Q)["segments"][0]["strides"] = json!([1, 1]), &[Q, "one place"]),
    ("an unknown dtype", |m| tensor(m, Q)["segments"][0]["dtype"] = "BF17".into(), &[Q, "BF17"]),
    ("a dtype that is not cast", |m| tensor(m, Q)["segments"][0]["dtype"] = "I16".into(), &[Q, "I16"]),
    ("another dtype than the file's", |m| tensor(m, Q)["dtype"] = "F16".into(), &[Q, "F16", "BF16", "diagnose"]),
    ("another shape than the file's", |m| tensor(m, Q)["shape"] = json!([32, 128]), &[Q, "[32, 128]", "[64, 64]"]),
    (
        "a pid that is gone",
        |m| {
            let mut gone = std::process::Command::new("true").spawn().unwrap();
            gone.wait().unwrap();
            m["engine"]["pid"] = gone.id().into();
        },
        &["ended", "start it again"],
    ),
    (
        "a pid that is another process's now",
        |m| {
            m["engine"]["start_time"] = (start_time(std::process::id()) + 1).into();
        },
        &["another one now"],
    ),
    ("a rank that there is not", |m| m["engine"]["rank"] = 1.into(), &["rank 1"]),
    ("a rank left out", |m| m["engine"]["world_size"] = 2.into(), &["rank 1 of 2 is missing", "all ranks"]),
    (
        "a memory file that is not there",
        |m| m["memories"][0]["path"] = "/dev/shm/weightfs-test-none".into(),
        &["/dev/shm/weightfs-test-none", "No such file"],
    ),
    (
        "a memory file that is too short",
        |m| m["memories"][0]["bytes"] = (1u64 << 40).into(),
        &["1099511627776 were promised"],
    ),
    ("a memory that is no file", |m| m["memories"][0]["path"] = "/dev/null".into(), &["/dev/null", "regular file"]),
    (
        "a memory on a GPU",
        |m| {
            m["memories"][0] = json!({"kind": "cuda-ipc", "device": "GPU-0", "handle": "00", "bytes": 1 << 30});
        },
        &["CUDA"],
    ),
    ("a kind of memory that nobody knows", |m| m["memories"][0]["kind"] = "floppy".into(), &["floppy"]),
];

#[test]
fn a_manifest_that_cannot_be_believed_is_refused() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let engine = Engine::new(&model, scratch.join("engine.json"));
    let point = scratch.dir("mnt");
    let good = engine.description(&model, Some(std::process::id()));
    for (what, spoil, words) in MANIFESTS {
        let mut manifest = good.clone();
        spoil(&mut manifest);
        publish(&engine.manifest, &manifest);
        refuses(what, Mounting::of(&model, &point).engine(&engine), &model.path, &point, words);
        let commit = fails(weightfs().arg("commit").arg(&model.path).arg("--weights").arg(&engine.manifest));
        assert_one_line(&commit, words);
    }
    // All that was wrong was the manifest.
    publish(&engine.manifest, &good);
    Mounting::of(&model, &point).engine(&engine).mount();
}

#[test]
fn a_manifest_file_that_is_not_to_be_trusted_is_refused() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let engine = Engine::new(&model, scratch.join("engine.json"));
    let point = scratch.dir("mnt");
    let refused = |what: &str, words: &[&str]| {
        refuses(what, Mounting::of(&model, &point).engine(&engine), &model.path, &point, words);
    };
    let mode = |mode| std::fs::set_permissions(&engine.manifest, PermissionsExt::from_mode(mode)).unwrap();
    mode(0o622);
    refused("a manifest that others may write", &["engine.json", "chmod 600"]);
    mode(0o600);
    // Another user's manifest must not make root write files that are not that user's.
    std::os::unix::fs::chown(&engine.manifest, Some(user::NOBODY), None).unwrap();
    refused("another user's manifest of our process", &["another user", &std::process::id().to_string()]);
    let ours = engine.description(&model, None);
    publish(&engine.manifest, &ours);
    std::os::unix::fs::chown(&engine.manifest, Some(user::NOBODY), None).unwrap();
    refused("another user's manifest over our memory", &["another user", engine.memory(0).to_str().unwrap()]);
    std::os::unix::fs::chown(&engine.manifest, Some(0), None).unwrap();

    let mut manifest = engine.description(&model, None);
    let link = scratch.join("link");
    symlink(engine.memory(0), &link).unwrap();
    manifest["memories"][0]["path"] = link.to_str().unwrap().into();
    publish(&engine.manifest, &manifest);
    refused("a memory behind a symbolic link", &["link"]);

    std::fs::write(&engine.manifest, "{\"weightfs\": 1").unwrap();
    refused("half a manifest", &["engine.json", "not a usable manifest"]);
    std::fs::write(&engine.manifest, b"PK\x03\x04rest of a zip").unwrap();
    refused("half a file of torch handles", &["engine.json", "not a usable handle file", "zip"]);
    std::fs::write(&engine.manifest, []).unwrap();
    refused("an empty manifest", &["engine.json"]);
    std::fs::remove_file(&engine.manifest).unwrap();
    refused("no manifest", &["engine.json", "No such file"]);
    std::fs::create_dir(&engine.manifest).unwrap();
    refused("a directory for a manifest", &["engine.json"]);
    std::fs::remove_dir(&engine.manifest).unwrap();
    let fifo = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &engine.manifest, fifo, 0o600.into(), 0).unwrap();
    refused("a pipe for a manifest", &["engine.json", "not a regular file"]);
}

#[test]
fn ranks_that_do_not_fit_each_other_are_refused() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let engine = Engine::new(&model, scratch.join("engine.json"));
    let point = scratch.dir("mnt");
    let second = scratch.join("second.json");
    let mut manifest = engine.description(&model, None);
    publish(&second, &manifest);
    let both = || Mounting::of(&model, &point).engine(&engine).arg("--weights").arg(&second);
    refuses("one rank twice", both(), &model.path, &point, &["second.json", "rank 0", "one manifest a rank"]);
    manifest["engine"]["world_size"] = 3.into();
    publish(&second, &manifest);
    refuses("different numbers of ranks", both(), &model.path, &point, &["second.json", "one of 3 ranks"]);
}

#[test]
fn diagnose_lists_every_tensor_that_does_not_fit_in_text_and_json() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let engine = Engine::new(&model, scratch.join("engine.json"));
    let mut manifest = engine.description(&model, None);
    tensor(&mut manifest, Q)["shape"] = json!([32, 128]);
    tensor(&mut manifest, NORM)["dtype"] = "BF16".into();
    tensor(&mut manifest, O)["segments"].as_array_mut().unwrap().pop();
    let extra = tensor(&mut manifest, K).clone();
    manifest["tensors"]["only.live"] = extra;
    publish(&engine.manifest, &manifest);
    let run = |json: bool| {
        let mut command = weightfs();
        command.arg("diagnose").arg(&model.path).arg("--weights").arg(&engine.manifest);
        if json {
            command.arg("--json");
        }
        let output = command.output().unwrap();
        assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(1), &[][..]), "something is wrong");
        String::from_utf8(output.stdout).unwrap()
    };
    let found: Value = serde_json::from_str(&run(true)).unwrap();
    let wrong: Vec<&str> = found["wrong"].as_array().unwrap().iter().map(|w| w[0].as_str().unwrap()).collect();
    assert_eq!(wrong, [O, Q, NORM]);
    assert_eq!(found["only_live"], json!(["only.live"]));
    assert_eq!(found["only_on_disk"], json!([EMPTY, ONLY_ON_DISK]));
    assert_eq!(found["opaque"], json!([[OPAQUE, "repacked after loading"]]));
    assert_eq!(found["matched"].as_array().unwrap().len(), engine.live() - 3);
    let text = run(false);
    for word in ["matched       6", "only live     1", "only on disk  2", "opaque        1", "wrong         3", NORM] {
        assert!(text.contains(word), "{word:?} in {text}");
    }
    publish(&engine.manifest, &engine.description(&model, None));
    succeeds(weightfs().arg("diagnose").arg(&model.path).arg("--weights").arg(&engine.manifest));
}
