//! Commits through a mount: the files on disk are the live weights after it and were untouched before it, exactly the
//! changed blocks are written (counted from outside), and a commit that fails costs nothing.

mod support;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use support::model::*;
use support::*;

fn setup() -> (Scratch, Model, Engine, Mount) {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let engine = Engine::new(&model, scratch.join("engine.json"));
    let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).mount();
    mount.settled();
    (scratch, model, engine, mount)
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

#[test]
fn the_disk_is_untouched_until_a_commit_and_then_equals_the_live_weights() {
    let (_scratch, model, mut engine, mount) = setup();
    let (before, times) = (model.disk(), model.mtimes());
    engine.change_all(1);
    let live = engine.over(before.clone());
    assert_same("the mount", &mount.weights(), &live);
    assert_same("the disk before the commit", &model.disk(), &before);
    assert_eq!(model.mtimes(), times);

    mount.does("commit");
    assert_same("the disk after the commit", &model.disk(), &live);
    assert_same("the mount after the commit", &mount.weights(), &live);
    for (i, (new, old)) in model.mtimes().into_iter().zip(times).enumerate() {
        assert!(new > old, "mtime of weights file {i} moves forward");
    }
}

#[test]
fn a_commit_with_nothing_changed_writes_no_file_and_says_so() {
    let (_scratch, model, mut engine, mount) = setup();
    engine.change_all(1);
    mount.does("commit");
    let before = everything(&model.path);
    let says = mount.does("commit again");
    assert!(says.contains("nothing changed"), "{says}");
    assert_eq!(everything(&model.path), before);
    assert_eq!(mount.status()["committed"]["id"], 1);
}

#[test]
fn weights_as_the_engine_loaded_them_are_no_change_however_lossy_the_cast() {
    let (_scratch, model, _engine, mount) = setup();
    // NORM is F32 on disk and BF16 live: what is live is not what is on disk, and nobody touched it.
    let before = model.disk();
    let says = mount.does("commit");
    assert!(says.contains("nothing changed"), "{says}");
    assert_same("the disk", &model.disk(), &before);
}

#[test]
fn one_changed_value_of_a_cast_tensor_rewrites_that_value_alone() {
    let (_scratch, model, mut engine, mount) = setup();
    for (name, element) in [(NORM, 700), (A_LOG, 17)] {
        let before = model.disk();
        engine.step(|e| e.set(name, element, 2.625));
        mount.does("commit");
        let after = model.disk();
        assert_same(name, &after, &engine.over(before.clone()));
        let differ = |(a, b): (&Vec<u8>, &Vec<u8>)| a.iter().zip(b).filter(|(x, y)| x != y).count();
        let changed: usize = before.iter().zip(&after).map(differ).sum();
        assert!((1..=4).contains(&changed), "{changed} bytes of {name} changed");
    }
}

/// What the daemon wrote into weights files while `work` was done: file name to ranges of bytes.
fn writes_during(mount: &Mount, scratch: &Scratch, work: impl FnOnce()) -> BTreeMap<String, Vec<(usize, usize)>> {
    let log = scratch.join("trace");
    let mut strace = Command::new("strace")
        .args(["-f", "-y", "-s", "0", "-e", "signal=none", "-o"])
        .arg(&log)
        .args(["-e", "trace=write,writev,pwrite64,pwritev,pwritev2,ftruncate,fallocate,copy_file_range,sendfile"])
        .args(["-p", &mount.pid.to_string()])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(strace.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("attached") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "strace cannot attach");
    }
    work();
    let pid = rustix::process::Pid::from_raw(strace.id() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    strace.wait().unwrap();

    let mut written: BTreeMap<String, Vec<(usize, usize)>> = BTreeMap::new();
    for line in std::fs::read_to_string(&log).unwrap().lines() {
        // PID pwrite64(7</model/model.safetensors>, ""..., 4096, 8192) = 4096
        let Some(path) = line.split_once('<').and_then(|(_, rest)| Some(rest.split_once('>')?.0)) else { continue };
        if !path.ends_with(".safetensors") || path.contains("/.weightfs/") {
            continue;
        }
        assert!(line.contains(" pwrite64("), "only whole blocks are written in place: {line}");
        let (call, result) = line.rsplit_once(") = ").unwrap_or_else(|| panic!("a write was interrupted: {line}"));
        let mut numbers = call.rsplit(", ").map(|n| n.parse::<usize>().unwrap());
        let (offset, length) = (numbers.next().unwrap(), numbers.next().unwrap());
        assert_eq!(result.trim(), length.to_string(), "{line}");
        let name = Path::new(path).file_name().unwrap().to_str().unwrap().to_string();
        written.entry(name).or_default().push((offset, length));
    }
    written
}

#[test]
fn exactly_the_changed_blocks_are_written_as_counted_from_outside() {
    if !have("strace") {
        return;
    }
    let (scratch, model, mut engine, mount) = setup();
    let before = model.disk();
    // In merged, transposed, split and cast tensors, and in the tied pair, which is in two files.
    engine.step(|e| {
        for (name, element) in
            [(K, 5), (EXPERTS, 3000), (O, 130), (A_LOG, 299), (NORM, 0), (EMBED, 7000), (EMBED, 9999)]
        {
            let old = e.value(name, element);
            e.set(name, element, old + 1.0);
        }
    });
    let written = writes_during(&mount, &scratch, || drop(mount.does("commit")));
    let after = model.disk();
    assert_same("the disk", &after, &engine.over(before.clone()));

    for (i, name) in model.shards.iter().enumerate() {
        let blocks = before[i].len().div_ceil(4096);
        let block = |bytes: &[u8], b: usize| bytes[b * 4096..bytes.len().min((b + 1) * 4096)].to_vec();
        let changed: Vec<usize> = (0..blocks).filter(|&b| block(&before[i], b) != block(&after[i], b)).collect();
        let ranges = written.get(name).cloned().unwrap_or_default();
        for (offset, length) in &ranges {
            let end = offset + length;
            assert!(offset % 4096 == 0 && (end % 4096 == 0 || end == before[i].len()), "{name}: {offset} + {length}");
        }
        let mut seen: Vec<usize> = ranges.iter().flat_map(|(o, l)| o / 4096..(o + l).div_ceil(4096)).collect();
        seen.sort_unstable();
        assert_eq!(seen, changed, "blocks of {name}");
    }
    let written = writes_during(&mount, &scratch, || drop(mount.does("commit")));
    assert_eq!(written, BTreeMap::new(), "a second commit writes nothing into the files");
}

#[test]
fn a_commit_without_a_mount_does_the_same() {
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
fn the_directory_of_a_commit_stays_as_it_was_while_others_follow() {
    let (_scratch, model, mut engine, mount) = setup();
    let mut states = Vec::new();
    for seed in 1..=3 {
        engine.change_all(seed);
        mount.does("commit");
        states.push(model.disk());
        for (i, state) in states.iter().enumerate() {
            let directory = mount.path(format!("commits/{}", i + 1));
            assert_same(&format!("commit {}", i + 1), &weights_in(&directory, &model.shards), state);
        }
    }
    let mut ids: Vec<_> = std::fs::read_dir(mount.path("commits"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    ids.sort();
    assert_eq!(ids, ["1", "2", "3"]);
    let first = mount.path("commits/1");
    assert_eq!(
        std::fs::read(first.join("config.json")).unwrap(),
        std::fs::read(model.path.join("config.json")).unwrap()
    );
    assert_eq!(errno(std::fs::metadata(mount.path("commits/4"))), Some(libc::ENOENT));
    assert_eq!(errno(std::fs::metadata(mount.path("commits/01"))), Some(libc::ENOENT));
}

#[test]
fn a_rollback_brings_back_memory_disk_and_view() {
    let (_scratch, model, mut engine, mount) = setup();
    engine.change_all(1);
    mount.does("commit");
    let first = model.disk();
    engine.change_all(2);
    mount.does("commit");
    let second = model.disk();
    assert!(changed_blocks(&first, &second) > 0);

    assert_eq!(errno(mount.ctl("rollback 9")), Some(libc::ENOENT));
    mount.does("rollback 1");
    assert_same("the disk", &model.disk(), &first);
    assert_same("the mount", &mount.weights(), &first);
    engine.reload();
    assert_same("the engine's memory", &engine.over(second.clone()), &first);
    // A rollback is a commit as well, and can be undone like one.
    mount.does("rollback 2");
    assert_same("the disk after the rollback of the rollback", &model.disk(), &second);
    assert_same("the mount after the rollback of the rollback", &mount.weights(), &second);
}

/// A file system of its own that can be filled.
struct Small(PathBuf);

impl Small {
    fn new(at: PathBuf, size: &str) -> Small {
        mount(
            "none",
            &at,
            "tmpfs",
            MountFlags::empty(),
            Some(std::ffi::CString::new(format!("size={size}")).unwrap().as_c_str()),
        )
        .unwrap();
        Small(at)
    }

    fn fill(&self) -> PathBuf {
        let path = self.0.join("filler");
        let mut file = std::fs::File::create(&path).unwrap();
        while file.write_all(&[7; 4096]).is_ok() {}
        path
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn a_commit_on_a_full_disk_fails_with_enospc_and_the_mount_goes_on() {
    let scratch = Scratch::new();
    let small = Small::new(scratch.dir("small"), "4m");
    let model = Model::sharded(small.0.join("model"));
    let mut engine = Engine::new(&model, scratch.join("engine.json"));
    let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).mount();
    mount.settled();
    let before = model.disk();
    engine.change_all(1);
    let live = engine.over(before.clone());
    let filler = small.fill();

    assert_eq!(errno(mount.ctl("commit")), Some(libc::ENOSPC));
    let status = mount.status();
    assert_eq!((&status["state"], &status["committed"]), (&"idle".into(), &serde_json::Value::Null));
    assert_eq!(status["last_command"]["result"], "ENOSPC");
    assert!(mount.says().contains("no space left"), "{}", mount.says());
    assert_same("the disk after the failure", &model.disk(), &before);
    assert_same("the mount after the failure", &mount.weights(), &live);

    std::fs::remove_file(filler).unwrap();
    mount.does("commit");
    assert_same("the disk once there is space", &model.disk(), &live);
    mount.umount();
    drop(mount);
}

#[test]
fn a_commit_whose_engine_has_gone_fails_with_estale_and_changes_nothing() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let mut engine = Engine::living(&model, scratch.join("engine.json"), engine::Life::Child);
    let mount = Mounting::of(&model, scratch.join("mnt")).engine(&engine).mount();
    mount.settled();
    let before = everything(&model.path);
    engine.change_all(1);
    engine.kill();
    assert_eq!(errno(mount.ctl("commit")), Some(libc::ESTALE));
    assert!(mount.says().contains("ended"), "{}", mount.says());
    assert_eq!(everything(&model.path), before);
}

#[test]
fn commands_at_the_same_time_are_done_or_refused_as_busy_and_all_of_them_whole() {
    let (_scratch, model, mut engine, mount) = setup();
    engine.change_all(1);
    let live = engine.expected(&model);
    let results: Vec<Option<i32>> = std::thread::scope(|scope| {
        let run = |command| {
            let mount = &mount;
            scope.spawn(move || errno(mount.ctl(command)))
        };
        let running = ["commit", "refresh", "commit", "refresh", "commit", "refresh"].map(run);
        running.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(results.iter().all(|r| matches!(r, None | Some(libc::EBUSY))), "{results:?}");
    assert!(results.contains(&None), "one of them at least was done");
    mount.does("commit");
    assert_same("the disk", &model.disk(), &live);
    assert_eq!(mount.status()["committed"]["id"], 1, "one change is one commit");
}
