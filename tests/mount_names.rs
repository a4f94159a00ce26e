//! Everything in a model directory that is no weights file passes through a mount, whatever its name and wherever its links
//! lead, and nothing can be made, changed or removed there.

mod support;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use support::*;

fn setup() -> (Scratch, Model, Mount) {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let mount = Mounting::of(&model, scratch.join("mnt")).mount();
    (scratch, model, mount)
}

fn names(dir: &Path) -> Vec<OsString> {
    let mut names: Vec<OsString> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    names
}

#[test]
fn files_of_any_name_pass_through() {
    let (_scratch, model, mount) = setup();
    let odd: Vec<OsString> = vec![
        "with space".into(),
        " ".into(),
        "Zażółć gęślą jaźń 模型 🦀.json".into(),
        "line\nbreak".into(),
        "-rf".into(),
        "back\\slash \"quoted\" 'and' $HOME".into(),
        "*".into(),
        "n".repeat(255).into(),
        OsString::from_vec(vec![0xff, 0xfe, b'x', 0x01]),
        ".hidden".into(),
    ];
    for (i, name) in odd.iter().enumerate() {
        fs::write(model.path.join(name), format!("content {i}")).unwrap();
    }
    let listed = names(&mount.point);
    for (i, name) in odd.iter().enumerate() {
        assert!(listed.contains(name), "{name:?} is not listed");
        assert_eq!(fs::read(mount.path(name)).unwrap(), format!("content {i}").as_bytes(), "{name:?}");
    }
    assert_eq!(errno(fs::read(mount.path("n".repeat(256)))), Some(libc::ENAMETOOLONG));
    assert_eq!(errno(fs::read(mount.path("absent"))), Some(libc::ENOENT));
}

#[test]
fn weights_files_of_unusual_names_are_live() {
    let scratch = Scratch::new();
    let model = Model::single(scratch.join("a model with space\nand newline 模型"));
    let name = "my weights 模型.safetensors";
    fs::rename(model.shard(0), model.path.join(name)).unwrap();
    let model = Model { shards: vec![name.into()], ..model };
    let mut engine = Engine::new(&model, scratch.join("engine of mine.json"));
    let mount = Mounting::of(&model, scratch.join("mount point 🦀\nx")).engine(&engine).mount();
    engine.change_all(1);
    let want = engine.expected(&model);
    support::model::assert_same("the mount", &mount.weights(), &want);
    mount.does("commit");
    support::model::assert_same("the disk", &model.disk(), &want);
    assert_eq!(mount.status()["mount_point"], mount.point.to_str().unwrap());
    assert!(mount.umount().contains("unmounted"));
    mount.ends();
}

#[test]
fn directories_within_pass_through_as_deep_as_they_go() {
    let (_scratch, model, mount) = setup();
    let deep: PathBuf = (0..30).map(|i| format!("level {i}")).collect();
    fs::create_dir_all(model.path.join(&deep)).unwrap();
    fs::write(model.path.join(&deep).join("leaf.txt"), "deep").unwrap();
    fs::create_dir_all(model.path.join("original")).unwrap();
    // Only the model's own weights are live: those of a directory within are files like others.
    fs::copy(model.shard(0), model.path.join("original").join(&model.shards[0])).unwrap();
    assert_eq!(fs::read(mount.path(&deep).join("leaf.txt")).unwrap(), b"deep");
    let copy = mount.path("original").join(&model.shards[0]);
    assert_eq!(fs::read(copy).unwrap(), fs::read(model.shard(0)).unwrap());
    fs::create_dir(model.path.join("empty")).unwrap();
    assert_eq!(names(&mount.path("empty")), Vec::<OsString>::new());
}

#[test]
fn a_directory_of_thousands_of_files_is_listed_once_each() {
    let (_scratch, model, mount) = setup();
    let many = model.path.join("many");
    fs::create_dir(&many).unwrap();
    for i in 0..3000 {
        File::create(many.join(format!("file-{i:05}-{}", "x".repeat(100)))).unwrap();
    }
    assert_eq!(names(&mount.path("many")), names(&many));
}

#[test]
fn ordinary_files_are_as_they_are_on_disk_now() {
    let (_scratch, model, mount) = setup();
    let (disk, seen) = (model.path.join("notes.txt"), mount.path("notes.txt"));
    fs::write(&disk, "first").unwrap();
    assert_eq!(fs::read(&seen).unwrap(), b"first");
    fs::write(&disk, "second, longer").unwrap();
    assert_eq!(fs::read(&seen).unwrap(), b"second, longer");
    // Replaced in one go, as editors and downloads do: who has the old one open has that, everybody else the new one.
    let old = File::open(&seen).unwrap();
    fs::write(model.path.join("new"), "third, the longest of them all").unwrap();
    fs::rename(model.path.join("new"), &disk).unwrap();
    assert_eq!(fs::metadata(&seen).unwrap().len(), 30);
    let new = File::open(&seen).unwrap();
    let read = |file: &File| {
        let mut bytes = vec![0; 100];
        let n = file.read_at(&mut bytes, 0).unwrap();
        bytes.truncate(n);
        String::from_utf8(bytes).unwrap()
    };
    for _ in 0..2 {
        assert_eq!(read(&old), "second, longer");
        assert_eq!(read(&new), "third, the longest of them all");
    }
    drop((old, new));
    fs::remove_file(&disk).unwrap();
    assert!(fs::read(&seen).is_err());
}

#[test]
fn who_may_read_weights_is_said_by_their_file_whatever_has_its_name_later() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let name = &model.shards[0];
    let (disk, away) = (model.path.join(name), model.path.join("away"));
    fs::set_permissions(&disk, PermissionsExt::from_mode(0o600)).unwrap();
    let mount = Mounting::of(&model, scratch.join("mnt")).mount();
    let mode = || fs::metadata(mount.path(name)).unwrap().permissions().mode() & 0o777;
    fs::rename(&disk, &away).unwrap();
    fs::write(&disk, "anything").unwrap();
    fs::set_permissions(&disk, PermissionsExt::from_mode(0o644)).unwrap();
    assert_eq!(mode(), 0o600);
    fs::rename(&away, &disk).unwrap();
    fs::set_permissions(&disk, PermissionsExt::from_mode(0o640)).unwrap();
    assert_eq!(mode(), 0o640);
}

#[test]
fn links_are_followed_and_those_that_lead_nowhere_are_shown_as_links() {
    let (scratch, model, mount) = setup();
    let outside = scratch.dir("outside");
    fs::write(outside.join("file"), "outside").unwrap();
    let link = |target: &Path, name: &str| symlink(target, model.path.join(name)).unwrap();
    link(&outside.join("file"), "to-file");
    link(&outside, "to-directory");
    link(Path::new("tokenizer.json"), "relative");
    link(Path::new("nowhere/at all"), "dangling");
    link(Path::new("self"), "self");
    link(Path::new("pong"), "ping");
    link(Path::new("ping"), "pong");

    for name in ["to-file", "relative"] {
        assert!(fs::symlink_metadata(mount.path(name)).unwrap().is_file(), "{name}");
    }
    assert_eq!(fs::read(mount.path("to-file")).unwrap(), b"outside");
    assert_eq!(fs::read(mount.path("to-directory/file")).unwrap(), b"outside");
    assert_eq!(fs::read(mount.path("relative")).unwrap(), fs::read(model.path.join("tokenizer.json")).unwrap());
    let shown = |name: &str| fs::read_link(mount.path(name)).unwrap();
    assert_eq!(shown("dangling"), Path::new("nowhere/at all"));
    assert_eq!(errno(fs::read(mount.path("dangling"))), Some(libc::ENOENT));
    for name in ["self", "ping", "pong"] {
        assert_eq!(errno(fs::read(mount.path(name))), Some(libc::ELOOP), "{name}");
    }
    // Nobody who lists the mount is kept waiting or told an error.
    let listed = names(&mount.point);
    for name in ["to-file", "to-directory", "relative", "dangling"] {
        assert!(listed.contains(&name.into()), "{name}");
    }
}

#[test]
fn links_to_a_directory_above_themselves_are_hidden_so_that_a_walk_ends() {
    let (_scratch, model, mount) = setup();
    fs::create_dir_all(model.path.join("a/b")).unwrap();
    symlink("..", model.path.join("a/b/up")).unwrap();
    symlink(&model.path, model.path.join("me")).unwrap();
    symlink("/", model.path.join("a/root")).unwrap();
    assert_eq!(names(&mount.path("a")), ["b"]);
    assert_eq!(names(&mount.path("a/b")), Vec::<OsString>::new());
    assert!(!names(&mount.point).contains(&"me".into()));
    let mut find = std::process::Command::new("find");
    let found = succeeds(find.arg("-L").arg(&mount.point));
    assert!(found.lines().count() < 30, "{found}");
}

#[test]
fn links_into_the_mount_itself_are_hidden_so_that_nothing_waits_for_itself() {
    let (scratch, model, mount) = setup();
    fs::write(scratch.dir("outside").join("file"), "").unwrap();
    symlink(&mount.point, model.path.join("live")).unwrap();
    symlink(mount.path("itself"), model.path.join("itself")).unwrap();
    symlink(mount.path("config.json"), model.path.join("config")).unwrap();
    symlink(scratch.path(), model.path.join("around")).unwrap();
    symlink("../outside", model.path.join("out")).unwrap();
    let listed = names(&mount.point);
    for hidden in ["live", "itself", "config", "around"] {
        assert!(!listed.contains(&hidden.into()), "{hidden}");
        assert_eq!(errno(fs::metadata(mount.path(hidden))), Some(libc::ELOOP), "{hidden}");
    }
    assert_eq!(names(&mount.path("out")), ["file"]);
    // A way round through a directory that holds both.
    symlink(scratch.path(), scratch.join("outside/around")).unwrap();
    let deep: PathBuf = std::iter::repeat_n("around/mnt/out", 20).collect();
    assert!(fs::metadata(mount.path("out").join(deep)).is_err());
    assert_eq!(mount.state(), "idle");
}

#[test]
fn pipes_sockets_and_devices_are_not_shown() {
    let (_scratch, model, mount) = setup();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        model.path.join("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(model.path.join("socket")).unwrap();
    let listed = names(&mount.point);
    assert!(!listed.contains(&"pipe".into()) && !listed.contains(&"socket".into()), "{listed:?}");
    assert_eq!(errno(File::open(mount.path("pipe"))), Some(libc::ENOENT));
}

#[test]
fn our_own_state_is_hidden_and_our_names_win() {
    let (_scratch, model, mount) = setup();
    assert!(model.path.join(".weightfs").is_dir());
    let ours = ["ctl", "status", "status.json", "commits"];
    for name in ours {
        fs::write(model.path.join(name), "the model's own").unwrap();
    }
    let listed = names(&mount.point);
    assert!(!listed.contains(&".weightfs".into()));
    assert_eq!(errno(fs::read_dir(mount.path(".weightfs"))), Some(libc::ENOENT));
    for name in ours {
        assert_eq!(listed.iter().filter(|n| *n == OsStr::new(name)).count(), 1, "{name}");
    }
    assert!(fs::read_to_string(mount.path("status")).unwrap().starts_with("state "));
    assert!(mount.path("commits").is_dir());
}

#[test]
fn nothing_is_made_changed_or_removed_through_a_mount() {
    let (_scratch, model, mount) = setup();
    fs::create_dir(model.path.join("sub")).unwrap();
    let before = model.disk();
    let (config, weights, sub) = (mount.path("config.json"), mount.shard(0), mount.path("sub"));
    let owner = |path: &Path| std::os::unix::fs::chown(path, Some(1), Some(1));
    let mode = || std::os::unix::fs::PermissionsExt::from_mode(0o777);
    let node = |name: &str| {
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, mount.path(name), rustix::fs::FileType::Fifo, mode, 0)
    };
    let refused: Vec<(&str, std::io::Result<()>)> = vec![
        ("create", File::create_new(mount.path("new")).map(drop)),
        ("create below", File::create_new(sub.join("new")).map(drop)),
        ("mkdir", fs::create_dir(mount.path("new"))),
        ("mknod", node("new").map_err(Into::into)),
        ("symlink", symlink("a", mount.path("new"))),
        ("link", fs::hard_link(&config, mount.path("new"))),
        ("unlink", fs::remove_file(&config)),
        ("unlink weights", fs::remove_file(&weights)),
        ("unlink ctl", fs::remove_file(mount.path("ctl"))),
        ("rmdir", fs::remove_dir(&sub)),
        ("rename", fs::rename(&config, mount.path("new"))),
        ("rename over weights", fs::rename(&config, &weights)),
        ("write", File::options().write(true).open(&config).map(drop)),
        ("write weights", File::options().write(true).open(&weights).map(drop)),
        ("append weights", File::options().append(true).open(&weights).map(drop)),
        ("truncate weights", File::options().write(true).truncate(true).open(&weights).map(drop)),
        ("truncate by path", truncate(&weights)),
        ("write status", File::options().write(true).open(mount.path("status")).map(drop)),
        ("chmod", fs::set_permissions(&config, mode())),
        ("chmod ctl", fs::set_permissions(mount.path("ctl"), mode())),
        ("chown weights", owner(&weights)),
        ("utimes", File::open(&config).unwrap().set_modified(std::time::UNIX_EPOCH)),
        ("remove commits", fs::remove_dir(mount.path("commits"))),
        ("create in commits", File::create_new(mount.path("commits/new")).map(drop)),
    ];
    for (what, result) in refused {
        assert_eq!(errno(result), Some(libc::EROFS), "{what}");
    }
    support::model::assert_same("the disk", &model.disk(), &before);
    assert!(model.path.join("config.json").exists() && !model.path.join("new").exists());
    assert_eq!(mount.state(), "idle");
}

fn truncate(path: &Path) -> std::io::Result<()> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: a C string that lives across the call.
    match unsafe { libc::truncate(path.as_ptr(), 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
