//! A model directory of another user, mounted by root: nothing of ours is written where their links below `.weightfs` lead.

mod commit_support;

use commit_support::*;
use std::collections::BTreeMap;
use std::os::unix::fs::{lchown, symlink};
use std::path::Path;
use weightfs::commit::*;

/// What is at `path`, and in it.
fn contents(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let name = path.to_str().unwrap().to_string();
    if path.is_dir() {
        found.insert(name, Vec::new());
        std::fs::read_dir(path).unwrap().for_each(|e| found.append(&mut contents(&e.unwrap().path())));
    } else {
        found.insert(name, std::fs::read(path).unwrap());
    }
    found
}

/// A model with one commit, and a name below its `.weightfs` made a link to `victim`, of user `owner`. What it says to two more
/// commits, each by a process of its own.
fn commits_through(name: &str, owner: u32) -> (Result<(), String>, bool) {
    let (directory, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let shards = two_shards();
    let model = write_model(directory.path(), &shards);
    let live = Live::of(&shards);
    let change = |step: u64| {
        live.set(0, 4000, &[step as u8; 7]);
        let (committer, recovery) = Committer::open(model.clone(), Options::default()).map_err(|e| e.to_string())?;
        recovery.fold.map_or(Ok(()), |_| Err("a fold".to_string()))?;
        let report = committer.commit(&live, &CommitRequest::new("a test", step)).map_err(|e| e.to_string())?;
        assert!(report.commit.is_some());
        Ok(())
    };
    assert_eq!(change(1), Ok(()));
    let (path, victim) = (directory.path().join(".weightfs").join(name), elsewhere.path().join("victim"));
    let path = path.components().as_path();
    match std::fs::symlink_metadata(path) {
        Ok(_) => std::fs::rename(path, &victim).unwrap(),
        Err(_) => std::fs::write(&victim, "precious").unwrap(),
    }
    let before = contents(&victim);
    symlink(&victim, path).unwrap();
    lchown(path, Some(owner), None).unwrap();
    let done = change(2).and_then(|()| change(3));
    (done, contents(&victim) != before)
}

#[test]
fn nothing_is_written_where_another_users_link_leads() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: only root can give a link away");
    }
    for folder in ["", "log", "optimizer"] {
        let (done, written) = commits_through(folder, 12345);
        assert!(!written, "{folder}");
        assert!(done.as_ref().is_err_and(|e| e.contains("user 12345")), "{folder}: {done:?}");
        // Our own leads to a larger disk.
        let (done, written) = commits_through(folder, 0);
        assert_eq!((done, written), (Ok(()), folder != "optimizer"), "{folder}");
    }
    for file in ["writer", "lock", "blocks", "state.json", "state.json.new", "blocks.new"] {
        for owner in [12345, 0] {
            let (done, written) = commits_through(file, owner);
            assert!(!written, "{file} of {owner}: {done:?}");
        }
    }
}
