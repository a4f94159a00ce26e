//! A commit's record in the log: the directory `.weightfs/log/weight_v000007/`, laid out as the delta directories of
//! SGLang, slime and ModelExpress are, with what rollback and `log` need beside. Written under another name and renamed
//! when every byte of it is on the disk: the sync of the log directory after that is the commit point.

use super::container::{Container, FileFacts};
use super::error::CommitError;
use super::layout::Layout;
use super::state::hex;
use super::storage::{Access, Storage, read_small};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, OnceLock};
use xxhash_rust::xxh3::xxh3_128;

pub const LOG: &str = ".weightfs/log";
pub const HEAD: &str = "model.safetensors.index.json";
pub const XOR: &str = "model-00001-of-00001.safetensors";
/// No `.safetensors` at its end: readers of delta directories take every file so named for part of the delta.
pub const VALUES: &str = "new-values";
/// Begins the names of records under construction, and of pruned ones until they are gone.
pub const UNFINISHED: &str = "unfinished-";
pub const FORMAT: u32 = 1;
const MAX_HEAD_BYTES: u64 = 256 << 20;

/// `metadata` has the keys that the other readers know; what they do not know is under `weightfs`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Head {
    pub metadata: Metadata,
    pub weight_map: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Metadata {
    /// XXH3-128 of the whole file with these 32 digits as zeros.
    weightfs_checksum: String,
    pub version: String,
    pub base_version: String,
    pub delta_encoding: String,
    pub compression_format: String,
    pub checksum_format: String,
    pub weightfs: Facts,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    pub format: u32,
    pub id: u64,
    /// Since the Unix epoch.
    pub time_ns: u64,
    pub step: u64,
    pub message: String,
    /// The commit whose state this one brought back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback_to: Option<u64>,
    pub changed_elements: u64,
    pub changed_bytes: u64,
    pub changed_blocks: u64,
    /// XXH3-128 of all block hashes after this commit, and before it.
    pub root: String,
    pub base_root: String,
    pub shards: Vec<ShardFacts>,
    pub xor: FileFacts,
    pub values: FileFacts,
    /// The optimizer's state as of this commit, which an earlier one may have written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<FileFacts>,
}

/// The weights file that a record is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardFacts {
    pub name: String,
    pub bytes: u64,
    pub header: String,
}

pub fn version(id: u64) -> String {
    format!("{id:06}")
}

/// Name inside the log directory.
pub fn name(id: u64) -> String {
    format!("weight_v{}", version(id))
}

/// The id in a name that [`name`] made.
pub fn id_of(entry: &str) -> Option<u64> {
    let id = entry.strip_prefix("weight_v")?.parse().ok()?;
    (name(id) == entry).then_some(id)
}

impl Head {
    pub fn new(facts: Facts, tensors: impl Iterator<Item = String>) -> Head {
        Head {
            metadata: Metadata {
                weightfs_checksum: hex(0),
                version: version(facts.id),
                base_version: version(facts.id - 1),
                delta_encoding: "xor".into(),
                compression_format: "zstd".into(),
                checksum_format: "xxh3-128".into(),
                weightfs: facts,
            },
            weight_map: tensors.map(|t| (t, XOR.to_string())).collect(),
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        // Cannot fail: string keys and no floats.
        let mut bytes = serde_json::to_vec(self).expect("a record's head is plain JSON");
        if let Some(at) = checksum_digits(&bytes) {
            let checksum = hex(xxh3_128(&bytes));
            bytes[at..at + 32].copy_from_slice(checksum.as_bytes());
        }
        bytes
    }

    fn from_bytes(mut bytes: Vec<u8>) -> Result<Head, String> {
        let head: Head = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
        let at = checksum_digits(&bytes).ok_or("it has no checksum")?;
        bytes[at..at + 32].fill(b'0');
        if hex(xxh3_128(&bytes)) != head.metadata.weightfs_checksum {
            return Err("its checksum does not fit".into());
        }
        match head.metadata.weightfs.format {
            FORMAT => Ok(head),
            other => Err(format!("it is of format {other}, and this program knows {FORMAT}")),
        }
    }

    pub fn write(&self, storage: &dyn Storage, directory: &str) -> io::Result<u64> {
        let bytes = self.to_bytes();
        let file = storage.open(&format!("{directory}/{HEAD}"), Access::Create)?;
        file.write_all_at(&bytes, 0)?;
        file.sync()?;
        Ok(bytes.len() as u64)
    }
}

/// Where the digits of the head's checksum are. A quote inside a JSON string is escaped, so the key cannot be found in
/// one.
fn checksum_digits(bytes: &[u8]) -> Option<usize> {
    let key = b"\"weightfs_checksum\":\"";
    let at = bytes.windows(key.len()).position(|w| w == key)? + key.len();
    (bytes.len() >= at + 32).then_some(at)
}

impl Facts {
    pub fn logged_bytes(&self) -> u64 {
        let own = self.optimizer.as_ref().filter(|o| o.file == super::optimizer::file_name(self.id));
        self.xor.bytes + self.values.bytes + own.map_or(0, |o| o.bytes)
    }
}

/// One record of the log, its head checked; the two files are opened and checked when first needed.
pub struct Record {
    pub head: Head,
    directory: String,
    root: std::path::PathBuf,
    storage: Arc<dyn Storage>,
    files: OnceLock<Files>,
}

pub struct Files {
    pub xor: Container,
    pub values: Container,
}

impl Record {
    /// Of a record just written.
    pub fn new(storage: &Arc<dyn Storage>, head: Head, layout: &Layout) -> Record {
        let directory = format!("{LOG}/{}", name(head.metadata.weightfs.id));
        Record { head, directory, root: layout.root.clone(), storage: storage.clone(), files: OnceLock::new() }
    }

    /// Reads the head of record `id`. The model directory's weights files are to be those of the record.
    pub fn open(storage: &Arc<dyn Storage>, layout: &Layout, id: u64) -> Result<Record, CommitError> {
        let record = Record::open_head(storage, &layout.root, id)?;
        let facts = record.facts();
        let same = facts.shards.len() == layout.shards.len()
            && facts
                .shards
                .iter()
                .zip(&layout.shards)
                .all(|(f, s)| f.name == s.name && f.bytes == s.bytes && f.header == hex(s.header));
        match same {
            true => Ok(record),
            false => Err(CommitError::Foreign {
                path: layout.root.clone(),
                commit: id,
                why: "its weights files are not those of the log".into(),
            }),
        }
    }

    fn open_head(storage: &Arc<dyn Storage>, root: &std::path::Path, id: u64) -> Result<Record, CommitError> {
        let directory = format!("{LOG}/{}", name(id));
        let path = root.join(&directory).join(HEAD);
        let bytes =
            read_small(&**storage, &format!("{directory}/{HEAD}"), MAX_HEAD_BYTES).map_err(|e| match e.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::InvalidData => CommitError::corrupt(&path, e.to_string()),
                _ => CommitError::io("read", &path, e),
            })?;
        let head = Head::from_bytes(bytes).map_err(|why| CommitError::corrupt(&path, why))?;
        let facts = &head.metadata.weightfs;
        // Names of files come from the head only as far as they are the ones that a record of ours has.
        let own = |o: &FileFacts| o.file.strip_suffix(".safetensors").and_then(id_of).is_some_and(|i| i <= id);
        let named = facts.xor.file == XOR && facts.values.file == VALUES && facts.optimizer.as_ref().is_none_or(own);
        if facts.id != id || id == 0 || !named {
            return Err(CommitError::corrupt(&path, "it is not the head of the record it lies in"));
        }
        Ok(Record { head, directory, root: root.to_path_buf(), storage: storage.clone(), files: OnceLock::new() })
    }

    pub fn id(&self) -> u64 {
        self.facts().id
    }

    pub fn facts(&self) -> &Facts {
        &self.head.metadata.weightfs
    }

    pub fn has(&self, tensor: &str) -> bool {
        self.head.weight_map.contains_key(tensor)
    }

    pub fn directory(&self) -> &str {
        &self.directory
    }

    /// The record's two files.
    pub fn files(&self) -> Result<&Files, CommitError> {
        if let Some(files) = self.files.get() {
            return Ok(files);
        }
        match self.open_files() {
            Ok(files) => Ok(self.files.get_or_init(|| files)),
            // A prune that takes the record away meanwhile has opened them first.
            Err(e) => self.files.get().ok_or(e),
        }
    }

    fn open_files(&self) -> Result<Files, CommitError> {
        let open = |facts| Container::open(&self.storage, &self.root, &self.directory, facts);
        let files = Files { xor: open(&self.facts().xor)?, values: open(&self.facts().values)? };
        for tensor in self.head.weight_map.keys() {
            for file in [&files.xor, &files.values] {
                if !file.entries.contains_key(tensor) {
                    return Err(CommitError::corrupt(file.path(), format!("tensor '{tensor}' is not in it")));
                }
            }
        }
        Ok(files)
    }

    /// Keeps the files readable after a prune.
    pub fn keep(&self) -> Result<(), CommitError> {
        let files = self.files()?;
        files.xor.keep()?;
        files.values.keep()
    }
}
