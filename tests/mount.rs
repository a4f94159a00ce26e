//! What readers of a mount see: the bytes on disk while nothing has changed, the engine's once it has, the same by every
//! way of reading and for all three ways of serving.

mod support;

use support::model::assert_same;
use support::mount::assert_one_line;
use support::readers::{all_see, safe_open_sees};
use support::*;

/// Runs a test for one way of serving; the copied one as a user who may not do more.
fn served(way: Way, test: impl Fn(&Scratch, Way) + Send + Sync) {
    match way {
        Way::Copied => {
            user::as_nobody(|| test(&Scratch::new(), way));
        }
        _ => test(&Scratch::new(), way),
    }
}

/// False where the kernel has no passthrough, which `status` then says.
fn is_served(mount: &Mount, way: Way) -> bool {
    let view = mount.status()["view"].clone();
    let why = view["why"].as_str().unwrap_or_default();
    if way == Way::Passthrough && why.contains("the kernel refuses passthrough") {
        eprintln!("skipped: {why}");
        return false;
    }
    assert_eq!(view["served"], way.name(), "{why}");
    true
}

fn every_reader(scratch: &Scratch, way: Way) {
    let model = Model::sharded(scratch.join("model"));
    let mut engine = Engine::new(&model, scratch.join("engine.json"));
    let before = model.disk();
    let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).way(way).mount();
    if !is_served(&mount, way) {
        return;
    }
    assert_same("the engine's layouts hold what the disk holds", &engine.expected(&model), &before);
    all_see(&mount, &model.shards, &before);

    engine.change_all(1);
    let want = engine.expected(&model);
    assert_ne!(want, before);
    all_see(&mount, &model.shards, &want);
    safe_open_sees(&mount, &model.shards, &want);
    assert_same("the disk", &model.disk(), &before);
}

#[test]
fn every_reader_sees_the_live_weights_through_passthrough() {
    served(Way::Passthrough, every_reader);
}

#[test]
fn every_reader_sees_the_live_weights_of_a_copy() {
    served(Way::Copied, every_reader);
}

#[test]
fn every_reader_sees_the_live_weights_read_directly() {
    served(Way::Direct, every_reader);
}

#[test]
fn weights_of_its_own_are_shown_as_they_are_on_disk() {
    let scratch = Scratch::new();
    let model = Model::single(scratch.join("model"));
    let mount = Mounting::of(&model, scratch.join("mnt")).mount();
    assert_eq!(mount.fact("source").unwrap(), "own");
    all_see(&mount, &model.shards, &model.disk());
}

#[test]
fn a_change_moves_every_mtime_and_no_size_or_header() {
    for way in [Way::Passthrough, Way::Direct] {
        let scratch = Scratch::new();
        let model = Model::sharded(scratch.join("model"));
        let mut engine = Engine::new(&model, scratch.join("engine.json"));
        let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).way(way).mount();
        let mtimes = || (0..3).map(|i| support::model::mtime(&mount.shard(i))).collect::<Vec<_>>();
        mount.weights();
        assert_eq!(mtimes(), model.mtimes(), "{way:?}: nothing has changed");

        engine.change_all(1);
        mount.does("refresh");
        let moved = mtimes();
        for (i, (now, before)) in moved.iter().zip(model.mtimes()).enumerate() {
            assert!(*now > before, "{way:?}: mtime of shard {i}");
        }
        for (live, disk) in mount.weights().iter().zip(model.disk()) {
            let header = 8 + u64::from_le_bytes(disk[..8].try_into().unwrap()) as usize;
            assert_eq!(live.len(), disk.len());
            assert_eq!(live[..header], disk[..header]);
        }
        if way == Way::Passthrough {
            mount.does("refresh");
            assert_eq!(mtimes(), moved, "nothing has changed since");
        }
    }
}

#[test]
fn a_hub_caches_links_are_shown_as_the_files_they_lead_to() {
    let scratch = Scratch::new();
    let model = Model::in_hub_cache(&scratch.dir("hub"));
    let mut engine = Engine::new(&model, scratch.join("engine.json"));
    let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).mount();
    for name in model.shards.iter().map(String::as_str).chain(["config.json", "model.safetensors.index.json"]) {
        assert!(std::fs::symlink_metadata(model.path.join(name)).unwrap().is_symlink());
        assert!(std::fs::symlink_metadata(mount.path(name)).unwrap().is_file(), "{name}");
    }
    engine.change_all(3);
    let want = engine.expected(&model);
    all_see(&mount, &model.shards, &want);
    // Blobs are named after their content and shared by snapshots: a commit leaves them and writes copies of its own.
    let blobs: Vec<_> = model.shards.iter().map(|s| model.path.join(s).canonicalize().unwrap()).collect();
    let before: Vec<_> = blobs.iter().map(|b| std::fs::read(b).unwrap()).collect();
    mount.does("commit");
    assert_same("the snapshot", &model.disk(), &want);
    assert_same("the blobs", &blobs.iter().map(|b| std::fs::read(b).unwrap()).collect::<Vec<_>>(), &before);
    all_see(&mount, &model.shards, &want);
}

#[test]
fn a_model_directory_has_one_writer_and_any_number_of_read_only_mounts() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let engine = Engine::new(&model, scratch.join("engine.json"));
    let first = Mounting::of(&model, scratch.join("first")).engine(&engine).mount();
    let point = scratch.join("second");
    let refused = Mounting::of(&model, &point).engine(&engine).fails();
    assert_one_line(&refused, &[&first.pid.to_string(), &first.point.display().to_string(), "--read-only"]);
    assert!(!support::mount::is_mounted(&point));

    let want = model.disk();
    let readers: Vec<Mount> = ["second", "third"]
        .map(|name| Mounting::of(&model, scratch.join(name)).engine(&engine).arg("--read-only").mount())
        .into();
    for reader in &readers {
        assert_same("a read-only mount", &reader.weights(), &want);
        assert!(!reader.path("ctl").exists());
        let listed: Vec<_> = std::fs::read_dir(&reader.point).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(!listed.iter().any(|n| n == "ctl"), "{listed:?}");
        assert_eq!(errno(reader.ctl("refresh")), Some(libc::ENOENT));
        assert_eq!(errno(std::fs::write(reader.path("ctl"), "refresh")), Some(libc::EROFS), "as a shell's > does");
        assert_eq!(reader.state(), "idle");
    }
    first.does("commit");
    assert_same("the first mount", &first.weights(), &want);
}

#[test]
fn a_read_only_mount_writes_nothing_into_the_model_directory() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let engine = Engine::new(&model, scratch.join("engine.json"));
    let listing = || {
        let mut names: Vec<_> = std::fs::read_dir(&model.path).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = listing();
    let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).arg("--read-only").mount();
    mount.weights();
    mount.umount();
    assert_eq!(listing(), before);
}
