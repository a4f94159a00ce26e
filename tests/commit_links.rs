//! A model directory of another user, mounted by root: nothing of ours is written where their links below `.weightfs` lead.

mod commit_support;

use commit_support::hooked::Hooked;
use commit_support::world::optimizer;
use commit_support::*;
use std::collections::BTreeMap;
use std::os::unix::fs::{lchown, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use weightfs::commit::storage::Access;
use weightfs::commit::*;
use weightfs::model::ModelDirectory;

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

/// A model with two shards of its own.
struct Setup {
    directory: tempfile::TempDir,
    /// Nothing in it is the model's.
    elsewhere: tempfile::TempDir,
    shards: Vec<(String, Vec<u8>)>,
    model: Arc<ModelDirectory>,
    live: Live,
}

impl Setup {
    fn new() -> Setup {
        let (directory, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let shards = two_shards();
        let model = write_model(directory.path(), &shards);
        let live = Live::of(&shards);
        Setup { directory, elsewhere, shards, model, live }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name).components().collect()
    }

    fn victim(&self) -> PathBuf {
        self.elsewhere.path().join("victim")
    }

    fn open(&self) -> Result<Committer, String> {
        let (committer, recovery) =
            Committer::open(self.model.clone(), Options::default()).map_err(|e| e.to_string())?;
        recovery.fold.map_or(Ok(committer), |_| Err("a fold".to_string()))
    }

    fn commit(&self, committer: &Committer, step: u8) -> Result<FoldOutcome, String> {
        self.live.set(0, 4000, &[step; 7]);
        let optimizer = optimizer(step);
        let request = CommitRequest { optimizer: Some(&optimizer), ..CommitRequest::new("a test", step.into()) };
        let report = committer.commit(&self.live, &request).map_err(|e| e.to_string())?;
        assert!(report.commit.is_some());
        Ok(report.fold)
    }
}

/// A model with one commit, and a name below its `.weightfs` made a link to `victim`, of user `owner`. What it says to two more
/// commits, each by a process of its own.
fn commits_through(name: &str, owner: u32) -> (Result<(), String>, bool) {
    let setup = Setup::new();
    let change = |step: u8| setup.commit(&setup.open()?, step).map(|_| ());
    assert_eq!(change(1), Ok(()));
    let (path, victim) = (setup.path(&format!(".weightfs/{name}")), setup.victim());
    match std::fs::symlink_metadata(&path) {
        Ok(_) => std::fs::rename(&path, &victim).unwrap(),
        Err(_) => std::fs::write(&victim, "precious").unwrap(),
    }
    let before = contents(&victim);
    symlink(&victim, &path).unwrap();
    lchown(&path, Some(owner), None).unwrap();
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
        assert_eq!((done, written), (Ok(()), true), "{folder}");
    }
    for file in ["writer", "lock", "blocks", "state.json"] {
        for owner in [12345, 0] {
            let (done, written) = commits_through(file, owner);
            assert!(!written, "{file} of {owner}: {done:?}");
        }
    }
}

#[test]
fn nothing_is_written_through_what_another_user_puts_where_a_running_commit_makes_a_file() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: only root can give a link away");
    }
    let shard = &two_shards()[0].0;
    let copy = format!("incoming/{shard}");
    let (new_state, optimizer) = ("state.json.tmp", "optimizer/weight_v000002.safetensors");
    // Our own link to a folder is followed, on purpose; no other is, and no file is written that has another name.
    for (name, link, owner) in [
        ("incoming", "symbolic", 12345),
        (&copy, "symbolic", 12345),
        (&copy, "symbolic", 0),
        (&copy, "hard", 12345),
        (new_state, "symbolic", 12345),
        (new_state, "symbolic", 0),
        (optimizer, "symbolic", 12345),
        (optimizer, "symbolic", 0),
    ] {
        let setup = Setup::new();
        let committer = setup.open().unwrap();
        setup.commit(&committer, 1).unwrap();
        // Shared files are not written where they are: a private copy is made in `incoming`.
        std::fs::hard_link(setup.path(shard), setup.elsewhere.path().join("shard")).unwrap();
        let (path, victim) = (setup.path(&format!(".weightfs/{name}")), setup.victim());
        match name {
            "incoming" => {
                std::fs::remove_dir(&path).or_else(|e| if path.exists() { Err(e) } else { Ok(()) }).unwrap();
                std::fs::create_dir(&victim).unwrap();
                std::fs::write(victim.join(shard), "precious").unwrap();
            }
            _ => {
                let _ = std::fs::create_dir(path.parent().unwrap());
                std::fs::write(&victim, "precious").unwrap();
            }
        }
        let before = contents(&victim);
        match link {
            "hard" => std::fs::hard_link(&victim, &path).unwrap(),
            _ => {
                symlink(&victim, &path).unwrap();
                lchown(&path, Some(owner), None).unwrap();
            }
        }
        let done = setup.commit(&committer, 2);
        assert_eq!(contents(&victim), before, "{name}, {link} link of {owner}: {done:?}");
    }
}

#[test]
fn a_weights_file_that_is_exchanged_while_it_is_opened_is_not_written() {
    let setup = Setup::new();
    let (shard, aside, victim) = (setup.path(&setup.shards[0].0), setup.elsewhere.path().join("aside"), setup.victim());
    std::fs::write(&victim, &setup.shards[0].1).unwrap();
    let armed = Arc::new(AtomicBool::new(false));
    let exchange = {
        let (name, shard, aside, armed) = (setup.shards[0].0.clone(), shard.clone(), aside.clone(), armed.clone());
        let victim = victim.clone();
        move |path: &str, access: Access| {
            if path == name && access == Access::ReadWrite && armed.swap(false, Ordering::SeqCst) {
                std::fs::rename(&shard, &aside)?;
                symlink(&victim, &shard)?;
            }
            Ok(())
        }
    };
    let storage = Hooked::new(setup.directory.path(), exchange);
    let committer = Committer::open_on(storage, &setup.model, Options::default()).unwrap().0;
    setup.commit(&committer, 1).unwrap();
    armed.store(true, Ordering::SeqCst);
    let fold = setup.commit(&committer, 2).unwrap();
    assert!(matches!(&fold, FoldOutcome::Deferred { why } if why.contains("another file")), "{fold:?}");
    assert_eq!(std::fs::read(&victim).unwrap(), setup.shards[0].1);
    // Put back, it takes both commits.
    std::fs::rename(&aside, &shard).unwrap();
    assert!(matches!(setup.commit(&committer, 3), Ok(FoldOutcome::Folded { .. })));
    assert_same!(disk(setup.directory.path(), &setup.shards), setup.live.bytes());
}
