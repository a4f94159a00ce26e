//! Commits of a mounted model: the disk stays as it is until `commit`, then it equals the live weights, and just the blocks
//! that changed were written. Back by `rollback`, looked at in `commits/`, refused while the disk is full.

mod support;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::fs;
use std::path::{Path, PathBuf};
use support::model::*;
use support::mount::{assert_one_line, fails};
use support::trace::Trace;
use support::*;

struct Setup {
    mount: Mount,
    model: Model,
    engine: Engine,
    scratch: Scratch,
}

fn setup() -> Setup {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let engine = Engine::new(&model, scratch.join("engine.json"));
    let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).mount();
    mount.settled();
    Setup { mount, model, engine, scratch }
}

#[test]
fn the_disk_changes_with_the_commit_and_not_before() {
    let Setup { scratch: _scratch, mount, model, mut engine } = setup();
    let (before, mtimes) = (model.disk(), model.mtimes());
    engine.change_all(1);
    let want = engine.expected(&model);
    mount.does("refresh");
    assert_same("the mount", &mount.weights(), &want);
    assert_same("the disk", &model.disk(), &before);
    assert_eq!(model.mtimes(), mtimes);

    mount.does("commit all of it");
    assert_same("the disk", &model.disk(), &want);
    assert_same("the mount", &mount.weights(), &want);
    assert!(model.mtimes().iter().zip(&mtimes).all(|(now, then)| now > then), "rsync and make have to notice");

    let mtimes = model.mtimes();
    mount.does("commit nothing");
    assert_eq!(model.mtimes(), mtimes, "nothing was to be written");
    assert_eq!(mount.status()["committed"]["id"], 1);
}

#[test]
fn just_the_blocks_that_changed_are_written() {
    let Setup { scratch: _scratch, mount, model, mut engine } = setup();
    let before = model.disk();
    engine.step(|e| {
        for (name, i) in [(Q, 0), (Q, 1), (EXPERTS, 5000), (NORM, 700), (A_LOG, 299), (EMBED, 0), (EMBED, 250 * 64 - 1)]
        {
            e.set(name, i, 9.5);
        }
    });
    let want = engine.expected(&model);
    let Some(trace) = Trace::of(mount.pid) else { return };
    mount.does("commit a few values");
    let written = trace.weights_written();
    assert_same("the disk", &model.disk(), &want);
    let mut blocks: Vec<(String, usize)> = Vec::new();
    for write in &written {
        assert_eq!(write.offset % 4096, 0, "{write:?}");
        blocks.extend((0..write.bytes.div_ceil(4096)).map(|i| (write.file.clone(), write.offset / 4096 + i)));
    }
    blocks.sort();
    let mut changed = Vec::new();
    for (name, (a, b)) in model.shards.iter().zip(before.iter().zip(&want)) {
        let differ = a.chunks(4096).zip(b.chunks(4096)).enumerate().filter(|(_, (x, y))| x != y);
        changed.extend(differ.map(|(i, _)| (name.clone(), i)));
    }
    assert_eq!(blocks, changed);

    let Some(trace) = Trace::of(mount.pid) else { return };
    mount.does("commit again");
    assert_eq!(trace.weights_written(), []);
}

#[test]
fn values_that_nobody_touched_keep_their_bytes_though_the_live_type_is_coarser() {
    let Setup { scratch: _scratch, mount, model, mut engine } = setup();
    let before = model.disk();
    // F32 on disk, BF16 live: most values do not survive the way there and back.
    engine.step(|e| e.set(NORM, 1000, 9.5));
    mount.does("commit");
    let after = model.disk();
    let differ: usize = before.iter().zip(&after).map(|(a, b)| a.iter().zip(b).filter(|(x, y)| x != y).count()).sum();
    assert!((1..=4).contains(&differ), "{differ} bytes changed, one value was set");
}

#[test]
fn a_one_shot_commit_is_refused_while_mounted_and_works_afterwards() {
    let Setup { scratch: _scratch, mount, model, mut engine } = setup();
    let before = model.disk();
    engine.change_all(1);
    let once = || {
        let mut command = weightfs();
        command.arg("commit").arg(&model.path).arg("--weights").arg(&engine.manifest);
        command
    };
    let refused = fails(&mut once());
    assert_one_line(&refused, &[&mount.point.display().to_string(), &mount.pid.to_string()]);
    assert_same("the disk", &model.disk(), &before);
    mount.umount();
    mount.ends();
    succeeds(&mut once());
    assert_same("the disk", &model.disk(), &engine.over(before));
}

#[test]
fn a_commit_with_nothing_changed_writes_no_file_and_says_so() {
    let Setup { scratch: _scratch, mount, model, mut engine } = setup();
    engine.change_all(1);
    mount.does("commit");
    let before = everything(&model.path);
    let says = mount.does("commit again");
    assert!(says.contains("nothing changed"), "{says}");
    assert_eq!(everything(&model.path), before);
    assert_eq!(mount.status()["committed"]["id"], 1);
}

#[test]
fn a_one_shot_commit_tells_what_it_did_and_is_in_the_history() {
    let scratch = Scratch::new();
    let model = Model::single(scratch.join("model"));
    let mut engine = Engine::new(&model, scratch.join("engine.json"));
    let commit = || {
        let mut command = weightfs();
        command.arg("commit").arg(&model.path).arg("--weights").arg(&engine.manifest);
        succeeds(&mut command)
    };
    assert!(commit().contains("nothing changed"));
    engine.change_all(3);
    let live = engine.expected(&model);
    let mut command = weightfs();
    command.args(["commit", "--json", "-m", "from cron"]).arg(&model.path).arg("--weights").arg(&engine.manifest);
    let report: serde_json::Value = serde_json::from_str(&succeeds(&mut command)).unwrap();
    assert_eq!((&report["commit"]["id"], &report["commit"]["message"]), (&1.into(), &"from cron".into()));
    assert_same("the disk", &model.disk(), &live);
    let verify = succeeds(weightfs().arg("verify").arg(&model.path));
    assert!(verify.contains(" 0 wrong"), "{verify}");
    let log = succeeds(weightfs().arg("log").arg(&model.path));
    assert!(log.contains("from cron"), "{log}");
}

#[test]
fn a_rollback_brings_live_weights_and_disk_back() {
    let Setup { scratch: _scratch, mount, model, mut engine } = setup();
    engine.change_all(1);
    mount.does("commit one");
    let first = model.disk();
    engine.change_all(2);
    mount.does("commit two");
    let second = model.disk();
    engine.change_all(3);
    assert_ne!(first, second);

    assert_eq!(errno(mount.ctl("rollback 77")), Some(libc::ENOENT));
    assert_same("the disk", &model.disk(), &second);
    mount.does("rollback 1");
    assert_same("the disk", &model.disk(), &first);
    assert_same("the mount", &mount.weights(), &first);
    engine.reload();
    assert_same("the engine's memory", &engine.expected(&model), &first);
    assert_eq!(mount.status()["committed"]["id"], 3, "going back is a commit as well");

    mount.does("rollback 2");
    assert_same("the mount", &mount.weights(), &second);
    assert_same("the disk", &model.disk(), &second);
}

#[test]
fn every_commit_is_a_directory_that_never_changes() {
    let Setup { scratch: _scratch, mount, model, mut engine } = setup();
    let mut commits = Vec::new();
    for seed in 1..=3 {
        engine.change_all(seed);
        mount.does(&format!("commit number {seed}"));
        commits.push(model.disk());
    }
    let open = fs::File::open(mount.path("commits/1").join(&model.shards[0])).unwrap();
    let look = || {
        for (i, want) in commits.iter().enumerate() {
            let dir = mount.path(format!("commits/{}", i + 1));
            assert_same(&format!("commit {}", i + 1), &weights_in(&dir, &model.shards), want);
            assert_eq!(fs::read(dir.join("config.json")).unwrap(), fs::read(model.path.join("config.json")).unwrap());
        }
    };
    look();
    let mut listed: Vec<_> = fs::read_dir(mount.path("commits")).unwrap().map(|e| e.unwrap().file_name()).collect();
    listed.sort();
    assert_eq!(listed, ["1", "2", "3"]);
    engine.change_all(4);
    mount.does("commit");
    mount.does("rollback 2");
    look();
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut &open, &mut bytes).unwrap();
    assert_eq!(bytes, commits[0][0], "the open file");
    assert_eq!(errno(fs::read_dir(mount.path("commits/99"))), Some(libc::ENOENT));
    assert_eq!(errno(fs::read_dir(mount.path("commits/01"))), Some(libc::ENOENT));
    assert_eq!(errno(fs::write(mount.path("commits/1/config.json"), "")), Some(libc::EROFS));
}

#[test]
fn what_a_start_folds_into_private_copies_is_what_it_reads() {
    for hub in [true, false] {
        let scratch = Scratch::new();
        let model = match hub {
            true => Model::in_hub_cache(scratch.path()),
            false => Model::sharded(scratch.join("model")),
        };
        let link = |name: &str| {
            for (i, shard) in model.shards.iter().enumerate() {
                fs::hard_link(model.shard(i), scratch.join(format!("{name}-{shard}"))).unwrap();
            }
        };
        let commit = |engine: &Engine, fold: &str| {
            let mut command = weightfs();
            command.args(["commit", "--fold", fold]).arg(&model.path).arg("--weights").arg(&engine.manifest);
            succeeds(&mut command)
        };
        let before = Engine::new(&model, scratch.join("before.json"));
        let mut engine = Engine::new(&model, scratch.join("engine.json"));
        if !hub {
            link("first");
        }
        engine.change_all(1);
        let want = engine.expected(&model);
        assert!(commit(&engine, "never").contains("not folded yet"));
        let mount = Mounting::of(&model, scratch.join("mnt")).mount();
        assert_same("the mount", &mount.weights(), &want);
        assert_same("the disk", &model.disk(), &want);
        mount.umount();
        mount.ends();

        // Back to F32 values of which an engine has the roundings: what it holds is compared with the files as folded.
        link("second");
        let readers = fs::File::open(model.path.join(".weightfs/lock")).unwrap();
        readers.lock_shared().unwrap();
        let says = succeeds(weightfs().arg("rollback").arg(&model.path).arg("0"));
        assert!(says.contains("follow later"), "{says}");
        drop(readers);
        let says = commit(&before, "always");
        assert!(says.contains("nothing changed"), "{says}");
        verify(&model.path);
    }
}

#[test]
fn a_commit_that_is_open_is_read_to_its_end_though_it_is_pruned() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let mut engine = Engine::new(&model, scratch.join("engine.json"));
    let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).args(&["--keep", "1"]).mount();
    mount.settled();
    engine.change_all(1);
    mount.does("commit");
    let first = model.disk();
    let path = mount.path("commits/1").join(&model.shards[0]);
    let file = fs::File::open(&path).unwrap();
    let read = || {
        let mut bytes = vec![0; first[0].len()];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).map(|()| bytes)
    };
    assert_same("commit 1", &[read().unwrap()], &first[..1]);
    engine.change_all(2);
    mount.does("commit");
    assert_same("commit 1", &[read().unwrap()], &first[..1]);
    assert_eq!(file.metadata().unwrap().len(), first[0].len() as u64);
    drop(file);
    until("it is gone once it is closed", || errno(fs::File::open(&path)) == Some(libc::ENOENT));
}

#[test]
fn a_rollback_leaves_no_rounded_values_behind_though_the_fold_has_to_wait() {
    for policy in ["always", "never", "every:2"] {
        let scratch = Scratch::new();
        let model = Model::sharded(scratch.join("model"));
        let mut engine = Engine::new(&model, scratch.join("engine.json"));
        let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).args(&["--fold", policy]).mount();
        mount.settled();
        let before = model.disk();
        // F32 on disk, BF16 live.
        engine.step(|e| (0..750).for_each(|i| e.set(NORM, i, 9.5)));
        mount.does("commit");
        let (live, disk) = (mount.weights(), model.disk());

        let readers = fs::File::open(model.path.join(".weightfs/lock")).unwrap();
        readers.lock_shared().unwrap();
        assert_eq!(errno(mount.ctl("rollback 0")), Some(libc::EBUSY));
        assert!(mount.says().contains(".weightfs/lock"), "{}", mount.says());
        assert_eq!(mount.status()["committed"]["id"], 1);
        mount.does("refresh");
        assert_same("the mount", &mount.weights(), &live);
        assert_same("the disk", &model.disk(), &disk);
        drop(readers);

        mount.does("rollback 0");
        assert_same("the disk", &model.disk(), &before);
        assert_same("the mount", &mount.weights(), &before);
        let says = mount.does("commit");
        assert!(says.contains("nothing changed"), "{policy}: {says}");
        assert_same("the disk", &model.disk(), &before);
    }
}

#[test]
fn what_a_fold_puts_in_the_place_of_a_shared_file_is_what_is_read_from_then_on() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let mut engine = Engine::new(&model, scratch.join("engine.json"));
    let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).mount();
    mount.settled();
    let before = model.disk();
    // F32 on disk, BF16 live: what the file has tells what the live value was rounded from.
    engine.step(|e| (0..750).for_each(|i| e.set(NORM, i, 9.5)));
    mount.does("commit");
    // A backup by `cp -al`: from here on files are replaced, not written.
    for (i, name) in model.shards.iter().enumerate() {
        fs::hard_link(model.path.join(name), scratch.join(format!("backup-{i}"))).unwrap();
    }
    mount.does("rollback 0");
    assert_same("the mount", &mount.weights(), &before);
    let says = mount.does("commit");
    assert!(says.contains("nothing changed"), "{says}");
    assert_same("the disk", &model.disk(), &before);
    // The same with a commit in between.
    engine.step(|e| (0..750).for_each(|i| e.set(NORM, i, 3.5)));
    mount.does("commit");
    let committed = model.disk();
    engine.step(|e| (0..750).for_each(|i| e.set(NORM, i, 4.5)));
    mount.does("commit");
    mount.does("rollback 3");
    assert_same("the mount", &mount.weights(), &committed);
    assert!(mount.does("commit").contains("nothing changed"));
}

#[test]
fn a_one_shot_commit_says_what_it_folds_first() {
    let scratch = Scratch::new();
    let model = Model::single(scratch.join("model"));
    let mut engine = Engine::new(&model, scratch.join("engine.json"));
    let mut commit = |seed: u64| {
        engine.change_all(seed);
        let mut command = weightfs();
        command.args(["commit", "--fold", "never"]).arg(&model.path).arg("--weights").arg(&engine.manifest);
        let output = command.output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(commit(1), "");
    let says = commit(2);
    assert!(says.contains("brought up to the newest commit") && says.lines().count() == 1, "{says}");
}

#[test]
fn no_message_in_the_history_tells_the_terminal_what_to_do() {
    let scratch = Scratch::new();
    let model = Model::single(scratch.join("model"));
    let mut engine = Engine::new(&model, scratch.join("engine.json"));
    engine.change_all(1);
    let mut command = weightfs();
    command.args(["commit", "-m", "red: \x1b[31m, next\nline, \u{9b}1m; é \"quoted\""]);
    succeeds(command.arg(&model.path).arg("--weights").arg(&engine.manifest));
    let log = succeeds(weightfs().arg("log").arg(&model.path));
    assert!(log.contains(r#"red: \u{1b}[31m, next\nline, \u{9b}1m; é "quoted""#), "{log}");
    assert_eq!(log.lines().count(), 2);
    assert!(log.chars().all(|c| c == '\n' || !c.is_control()), "{log:?}");
}

#[test]
fn a_mount_of_its_own_weights_has_nothing_to_commit() {
    let scratch = Scratch::new();
    let model = Model::single(scratch.join("model"));
    let mount = Mounting::of(&model, scratch.join("mnt")).mount();
    let mtimes = model.mtimes();
    mount.does("commit");
    assert_eq!(model.mtimes(), mtimes);
    assert_eq!(mount.status()["committed"], serde_json::Value::Null);
}

/// All files of a directory with size, inode and mtime: what shows that nothing was written.
fn everything(dir: &Path) -> Vec<(PathBuf, u64, u64, i128)> {
    use std::os::unix::fs::MetadataExt;
    let (mut found, mut folders) = (Vec::new(), vec![dir.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let metadata = path.symlink_metadata().unwrap();
            match metadata.is_dir() {
                true => folders.push(path),
                // The log of the daemon tells of the command.
                false if path.ends_with("mount.log") => {}
                false => found.push((path.clone(), metadata.len(), metadata.ino(), mtime(&path))),
            }
        }
    }
    found.sort();
    found
}

/// A file system of a few megabytes, gone with the test.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(path: PathBuf) -> SmallDisk {
        fs::create_dir(&path).unwrap();
        mount("weightfs-test", &path, "tmpfs", MountFlags::empty(), Some(c"size=4m")).unwrap();
        SmallDisk(path)
    }

    /// Takes all the space there is, by a file that is returned.
    fn fill(&self) -> PathBuf {
        let path = self.0.join("filler");
        let file = fs::File::create(&path).unwrap();
        let zeros = [0; 4096];
        while std::io::Write::write_all(&mut &file, &zeros).is_ok() {}
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_disk_fails_the_commit_and_nothing_else() {
    let scratch = Scratch::new();
    let disk = SmallDisk::new(scratch.join("disk"));
    let model = Model::sharded(disk.0.join("model"));
    let mut engine = Engine::new(&model, scratch.join("engine.json"));
    let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).mount();
    mount.settled();
    let before = model.disk();
    engine.change_all(1);
    let want = engine.expected(&model);
    let filler = disk.fill();
    for _ in 0..2 {
        assert_eq!(errno(mount.ctl("commit")), Some(libc::ENOSPC), "{}", mount.says());
        assert!(mount.says().contains("no space left"), "{}", mount.says());
        assert_same("the disk", &model.disk(), &before);
        assert_same("the mount", &mount.weights(), &want);
        assert_eq!(mount.state(), "idle");
        assert_eq!(mount.fact("dirty").unwrap(), "yes");
    }
    fs::remove_file(filler).unwrap();
    mount.does("commit");
    assert_same("the disk", &model.disk(), &want);
    verify(&model.path);
}

#[test]
fn a_disk_that_fills_up_in_the_middle_loses_nothing() {
    // However much room there is: the commit is whole or not there.
    for spare in (0..40).step_by(4) {
        let scratch = Scratch::new();
        let disk = SmallDisk::new(scratch.join("disk"));
        let model = Model::sharded(disk.0.join("model"));
        let mut engine = Engine::new(&model, scratch.join("engine.json"));
        let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).mount();
        mount.settled();
        let before = model.disk();
        engine.change_all(1);
        let want = engine.expected(&model);
        let filler = disk.fill();
        let file = fs::File::options().write(true).open(&filler).unwrap();
        file.set_len(file.metadata().unwrap().len() - spare * 4096).unwrap();
        drop(file);
        match mount.ctl("commit") {
            Ok(()) => assert_same("the disk", &model.disk(), &want),
            Err(e) => {
                assert_eq!(e.raw_os_error(), Some(libc::ENOSPC), "{}", mount.says());
                assert_same("the disk", &model.disk(), &before);
            }
        }
        fs::remove_file(filler).unwrap();
        mount.does("commit");
        assert_same("the disk", &model.disk(), &want);
        verify(&model.path);
    }
}

/// The directory against its newest commit, by the command.
#[track_caller]
fn verify(model: &Path) {
    let said = succeeds(weightfs().arg("verify").arg(model));
    assert!(said.contains(" 0 wrong"), "{said}");
}
