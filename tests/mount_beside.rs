//! A mount beside a plain copy of its model directory: the same random changes to both, and then the same names, kinds, sizes,
//! modes and contents in both. And after much use the daemon is no larger than before.

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use support::*;

/// Kind, size, mode and contents of a file.
type Facts = (char, u64, u32, Vec<u8>);

/// What a walk of a directory finds. Links to files are files, as everybody who opens them sees.
fn walk(root: &Path) -> std::io::Result<BTreeMap<PathBuf, Facts>> {
    let (mut found, mut folders) = (BTreeMap::new(), vec![PathBuf::new()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(root.join(&folder))? {
            let relative = folder.join(entry?.file_name());
            let name = relative.to_str().unwrap();
            if ["ctl", "status", "status.json", "commits", ".weightfs"].contains(&name) {
                continue;
            }
            let path = root.join(&relative);
            let facts = match std::fs::metadata(&path) {
                Ok(m) if m.is_dir() => {
                    folders.push(relative.clone());
                    ('d', 0, m.permissions().mode(), vec![])
                }
                Ok(m) => {
                    let bytes = std::fs::read(&path)?;
                    // Read once more in odd pieces from behind: sizes and offsets agree.
                    let file = File::open(&path)?;
                    let mut end = vec![0; bytes.len().min(777)];
                    let start = bytes.len() - end.len();
                    file.read_exact_at(&mut end, start as u64)?;
                    assert!(bytes.ends_with(&end), "{name}");
                    ('f', m.len(), m.permissions().mode(), bytes)
                }
                Err(_) => ('l', 0, 0, std::fs::read_link(&path)?.into_os_string().into_encoded_bytes()),
            };
            found.insert(relative, facts);
        }
    }
    Ok(found)
}

/// One change, the same in every directory it is done in.
fn change(root: &Path, random: u64) {
    let name = ["a", "b", "ünïcode name", "deep/er/c", "deep/d", "e.safetensors.tmp"][(random >> 8) as usize % 6];
    let path = root.join(name);
    let other = root.join(["x", "deep/y", "z"][(random >> 16) as usize % 3]);
    let size = [0, 1, 4096, 100_000][(random >> 24) as usize % 4];
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::create_dir_all(other.parent().unwrap()).unwrap();
    // Whether it was there to be changed is the same in both.
    let _ = match random % 7 {
        0 | 1 => {
            let _ = std::fs::remove_dir(&path);
            std::fs::write(&path, vec![random as u8; size])
        }
        2 => std::fs::remove_file(&path),
        3 => std::fs::rename(&path, &other),
        4 => symlink(["a", "nowhere", "deep"][(random >> 32) as usize % 3], &other),
        5 => std::fs::set_permissions(
            &path,
            PermissionsExt::from_mode([0o600, 0o644, 0o444][(random >> 32) as usize % 3]),
        ),
        _ => std::fs::remove_file(&other),
    };
}

#[test]
fn a_mount_looks_like_a_plain_copy_of_its_directory_through_any_changes() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let copy = scratch.join("copy");
    succeeds(Command::new("cp").arg("-a").arg(&model.path).arg(&copy));
    let mount = Mounting::of(&model, scratch.join("mnt")).mount();
    for round in 0..8 {
        for i in 0..12 {
            let random = mixed(round, i);
            change(&model.path, random);
            change(&copy, random);
        }
        let want = walk(&copy).unwrap();
        // Names and attributes may be remembered for a second.
        let mut seen = None;
        until("the mount shows the changes", || {
            seen = Some(walk(&mount.point));
            seen.as_ref().is_some_and(|s| s.as_ref().is_ok_and(|s| *s == want))
        });
    }
}

#[test]
fn after_much_use_the_daemon_holds_no_more_files_and_threads_than_before() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let mut engine = Engine::new(&model, scratch.join("engine.json"));
    let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).mount();
    mount.settled();
    let count = |what: &str| std::fs::read_dir(format!("/proc/{}/{what}", mount.pid)).unwrap().count();
    let mut use_it = |round: u64| {
        engine.change_all(round);
        let files: Vec<File> = (0..3).map(|i| mount.open(i)).collect();
        for mut file in &files {
            file.read_to_end(&mut Vec::new()).unwrap();
        }
        drop(files);
        for name in ["status", "config.json", "tokenizer.json", "commits"] {
            let _ = std::fs::read(mount.path(name));
        }
        let _ = std::fs::read_dir(mount.path("commits")).unwrap().count();
        mount.does("refresh");
        let _ = mount.ctl("nonsense");
        if round.is_multiple_of(10) {
            mount.does("commit");
            mount.does("freeze");
            mount.does("thaw");
            let id = mount.status()["committed"]["id"].clone();
            std::fs::read(mount.path(format!("commits/{id}")).join(&model.shards[0])).unwrap();
        }
    };
    (0..=20).for_each(&mut use_it);
    let (files, threads) = (count("fd"), count("task"));
    // Records of commits stay open while they can be read: one each.
    let committed = |mount: &Mount| mount.status()["committed"]["id"].as_u64().unwrap() as usize;
    let before = committed(&mount);
    (21..=200).for_each(&mut use_it);
    let new = committed(&mount) - before;
    until("files are closed again", || count("fd") <= files + 2 * new);
    until("threads have ended", || count("task") <= threads);
}

#[test]
fn a_model_directory_that_is_moved_away_leaves_weights_and_status_where_they_are() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let mount = Mounting::of(&model, scratch.join("mnt")).mount();
    let (disk, moved) = (model.disk(), scratch.join("moved"));
    std::fs::rename(&model.path, &moved).unwrap();
    model::assert_same("the mount", &mount.weights(), &disk);
    until("ordinary files are gone", || std::fs::metadata(mount.path("config.json")).is_err());
    let names = std::fs::read_dir(&mount.point).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    assert_eq!(
        names,
        [
            &["commits", "ctl"][..],
            &model.shards.iter().map(String::as_str).collect::<Vec<_>>(),
            &["status", "status.json"]
        ]
        .concat()
    );
    assert_eq!(mount.state(), "idle");
    std::fs::rename(&moved, &model.path).unwrap();
    mount.does("commit");
    until("ordinary files are back", || std::fs::metadata(mount.path("config.json")).is_ok());
    assert!(mount.umount().starts_with("unmounted"));
}
