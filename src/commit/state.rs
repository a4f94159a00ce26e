//! `.weightfs/state.json`: the newest commit, how far the directory has been brought up to it, and what the weights
//! files looked like when weightfs last wrote (or adopted) them.

use super::error::CommitError;
use super::layout::Layout;
use super::storage::{Stat, Storage, read_small, replace_small};
use crate::model::STATE_DIR;
use serde::{Deserialize, Serialize};
use std::io;
use xxhash_rust::xxh3::xxh3_128;

pub const STATE: &str = ".weightfs/state.json";
const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Version of this file's format.
    pub weightfs: u32,
    /// Newest commit when this was written. The log may hold one more: its record is what makes a commit.
    pub newest: u64,
    /// The commit that the weights files hold.
    pub folded: u64,
    /// Optimizer step of the newest commit.
    pub step: u64,
    pub shards: Vec<ShardState>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardState {
    pub name: String,
    /// XXH3-128 of the header, 32 hexadecimal digits.
    pub header: String,
    #[serde(flatten)]
    pub stat: Stat,
    /// A write or fsync of this file failed: its bytes on the disk are in doubt until it is written anew.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub in_doubt: bool,
}

/// The file: the state and the XXH3-128 of its compact JSON.
#[derive(Serialize, Deserialize)]
struct StateFile {
    checksum: String,
    state: Box<serde_json::value::RawValue>,
}

pub fn hex(hash: u128) -> String {
    format!("{hash:032x}")
}

impl State {
    /// Of a directory that never saw a commit.
    pub fn new(storage: &dyn Storage, layout: &Layout) -> Result<State, CommitError> {
        let mut shards = Vec::with_capacity(layout.shards.len());
        for shard in &layout.shards {
            let stat = storage.stat(&shard.name).map_err(|e| layout.io("look at", &shard.name, e))?;
            shards.push(ShardState { name: shard.name.clone(), header: hex(shard.header), stat, in_doubt: false });
        }
        Ok(State { weightfs: VERSION, newest: 0, folded: 0, step: 0, shards })
    }

    /// `None` when there is none yet.
    pub fn load(storage: &dyn Storage, layout: &Layout) -> Result<Option<State>, CommitError> {
        let bytes = match read_small(storage, STATE, 64 << 20) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(layout.io("read", STATE, e)),
        };
        let corrupt = |why: String| CommitError::corrupt(layout.root.join(STATE), why);
        let file: StateFile = serde_json::from_slice(&bytes).map_err(|e| corrupt(e.to_string()))?;
        if file.checksum != hex(xxh3_128(file.state.get().as_bytes())) {
            return Err(corrupt("its checksum does not fit".into()));
        }
        let state: State = serde_json::from_str(file.state.get()).map_err(|e| corrupt(e.to_string()))?;
        if state.weightfs != VERSION {
            return Err(corrupt(format!("it is of format {}, and this program knows {VERSION}", state.weightfs)));
        }
        if state.folded > state.newest {
            return Err(corrupt(format!("commit {} cannot be folded, {} is the newest", state.folded, state.newest)));
        }
        state.check_layout(layout)?;
        Ok(Some(state))
    }

    fn check_layout(&self, layout: &Layout) -> Result<(), CommitError> {
        for (i, shard) in layout.shards.iter().enumerate() {
            let known = self.shards.get(i).filter(|s| s.name == shard.name && s.header == hex(shard.header));
            if known.is_none_or(|s| s.stat.bytes != shard.bytes) {
                let why = "its tensors are not those that were committed".into();
                return Err(CommitError::Foreign { path: layout.path(i), commit: self.newest, why });
            }
        }
        match self.shards.len() > layout.shards.len() {
            true => Err(CommitError::Foreign {
                path: layout.root.join(&self.shards[layout.shards.len()].name),
                commit: self.newest,
                why: "it is no longer a part of the model".into(),
            }),
            false => Ok(()),
        }
    }

    /// Durable when it returns.
    pub fn store(&self, storage: &dyn Storage, layout: &Layout) -> Result<(), CommitError> {
        // Neither can fail: the state has string keys only and no floats.
        let state = serde_json::value::to_raw_value(self).expect("a state is plain JSON");
        let checksum = hex(xxh3_128(state.get().as_bytes()));
        let mut bytes = serde_json::to_vec(&StateFile { checksum, state }).expect("a state is plain JSON");
        bytes.push(b'\n');
        replace_small(storage, STATE_DIR, "state.json", &bytes).map_err(|e| layout.io("write", STATE, e))
    }
}
