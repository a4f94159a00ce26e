//! A model directory in memory, and all that was ever committed to it, against which a recovered one is checked.
#![allow(dead_code)]

use super::memory::*;
use super::*;
use crate::assert_same;
use std::sync::atomic::{AtomicUsize, Ordering};
use weightfs::commit::*;

/// Crashed directories that were recovered and checked.
pub static POINTS: AtomicUsize = AtomicUsize::new(0);

/// The state that a commit promises to keep.
#[derive(Clone, PartialEq, Debug)]
pub struct Committed {
    pub shards: Vec<Vec<u8>>,
    pub optimizer: Option<OptimizerState>,
}

pub struct World {
    _directory: tempfile::TempDir,
    pub names: Vec<String>,
    pub model: Arc<ModelDirectory>,
    pub storage: MemoryStorage,
    pub live: Live,
    /// By id, from 0 on.
    pub commits: Vec<Committed>,
    pub options: Options,
}

impl World {
    pub fn new(options: Options, shared: bool) -> World {
        let directory = tempfile::tempdir().unwrap();
        let shards = two_shards();
        let model = write_model(directory.path(), &shards);
        let mut tree = Tree::new(&shards);
        if shared {
            tree.share_all();
        }
        let live = Live::of(&shards);
        let commits = vec![Committed { shards: live.bytes(), optimizer: None }];
        let names = shards.into_iter().map(|(name, _)| name).collect();
        World { _directory: directory, names, model, storage: MemoryStorage::new(tree), live, commits, options }
    }

    pub fn open_on(&self, storage: &MemoryStorage) -> (Committer, Recovery) {
        Committer::open_on(Arc::new(storage.clone()), &self.model, self.options.clone()).unwrap()
    }

    pub fn commit(&mut self, committer: &Committer, optimizer: Option<OptimizerState>) -> CommitReport {
        let step = self.commits.len() as u64;
        let request = CommitRequest { optimizer: optimizer.as_ref(), ..CommitRequest::new("crash me", step) };
        let report = committer.commit(&self.live, &request).unwrap();
        let optimizer = optimizer.or(self.commits.last().unwrap().optimizer.clone());
        self.commits.push(Committed { shards: self.live.bytes(), optimizer });
        report
    }

    pub fn read(&self, committer: &Committer, id: u64) -> Committed {
        let snapshot = committer.snapshot(id).unwrap();
        let read = |s| {
            let mut bytes = vec![0; snapshot.shard_bytes(s) as usize];
            snapshot.read(s, 0, &mut bytes).unwrap();
            bytes
        };
        let shards = (0..snapshot.shards()).map(read).collect();
        Committed { shards, optimizer: if id == 0 { None } else { committer.optimizer_state(id).unwrap() } }
    }

    /// Recovers a crashed tree and checks all that is promised. Returns the newest commit there.
    pub fn check(&self, tree: Tree, least: u64, what: &dyn Fn() -> String) -> (u64, MemoryStorage) {
        let storage = MemoryStorage::new(tree);
        let (committer, _) = self.open_on(&storage);
        let newest = committer.newest().map_or(0, |c| c.id);
        let most = self.commits.len() as u64 - 1;
        assert!((least..=most).contains(&newest), "{}: recovered to {newest}, not {least}..={most}", what());
        if committer.folded() == newest {
            for (name, expected) in self.names.iter().zip(&self.commits[newest as usize].shards) {
                assert_same!(storage.tree().file(name), Some(&expected[..]), "{}: {name}", what());
            }
        } else {
            assert_ne!(self.options.fold, FoldPolicy::Always, "{}: not folded", what());
        }
        assert_eq!(committer.verify(None).unwrap().wrong, Vec::<String>::new(), "{}", what());
        let history = committer.history();
        let oldest = history.first().map_or(newest + 1, |c| c.id);
        assert!(history.iter().map(|c| c.id).eq(oldest..=newest), "{}: {history:?}", what());
        if self.options.keep == Keep::All {
            assert_eq!(oldest, 1.min(newest + 1), "{}", what());
        }
        for id in oldest..=newest {
            assert_same!(self.read(&committer, id), self.commits[id as usize], "{}: commit {id}", what());
            assert_eq!(committer.verify(Some(id)).unwrap().wrong, Vec::<String>::new(), "{}", what());
        }
        // It goes on: the live weights, whichever they are, can be committed.
        committer.commit(&self.live, &CommitRequest::new("after", 99)).unwrap();
        drop(committer);
        POINTS.fetch_add(1, Ordering::Relaxed);
        (newest, storage)
    }
}

pub fn optimizer(n: u8) -> OptimizerState {
    let tensors =
        vec![OptimizerTensor { name: "a.m".into(), dtype: "F32".into(), shape: vec![300], bytes: vec![n; 1200] }];
    OptimizerState { header: format!("{{\"n\":{n}}}"), tensors }
}
