//! Where the tensors of every shard lie, as a commit needs it: names, byte ranges, size of an element.

use super::error::CommitError;
use crate::memory::{BLOCK, Hash};
use crate::model::{ModelDirectory, element_bytes};
use std::path::PathBuf;
use xxhash_rust::xxh3::xxh3_128;

#[derive(Debug)]
pub struct Layout {
    /// The model directory, for messages.
    pub root: PathBuf,
    pub shards: Vec<ShardLayout>,
}

#[derive(Debug)]
pub struct ShardLayout {
    pub name: String,
    pub bytes: u64,
    /// XXH3-128 of the header: a file with another header is another model.
    pub header: Hash,
    /// In order of their place; those without bytes left out. They fill the file behind its header.
    pub tensors: Vec<TensorLayout>,
}

#[derive(Debug)]
pub struct TensorLayout {
    pub name: String,
    /// Byte range in the file.
    pub start: u64,
    pub end: u64,
    /// Bytes of an element; 1 for types smaller than a byte, whose changes are then counted in bytes.
    pub element: usize,
}

impl Layout {
    pub fn of(directory: &ModelDirectory) -> Layout {
        let shards = directory.shards.iter().map(|shard| ShardLayout {
            name: shard.name.clone(),
            bytes: shard.bytes(),
            header: xxh3_128(&shard.header.bytes),
            tensors: shard
                .header
                .tensors
                .iter()
                .filter(|t| t.bytes() > 0)
                .map(|t| TensorLayout {
                    name: t.name.clone(),
                    start: t.start,
                    end: t.end,
                    element: element_bytes(t.dtype).unwrap_or(1),
                })
                .collect(),
        });
        Layout { root: directory.path.clone(), shards: shards.collect() }
    }

    pub fn path(&self, shard: usize) -> PathBuf {
        self.root.join(&self.shards[shard].name)
    }

    /// An error about a file named relative to the model directory.
    pub fn io(&self, doing: &'static str, path: &str, source: std::io::Error) -> CommitError {
        CommitError::io(doing, self.root.join(path), source)
    }
}

impl ShardLayout {
    pub fn blocks(&self) -> u64 {
        self.bytes.div_ceil(BLOCK as u64)
    }

    /// The bytes of block `block`; the last one may be short.
    pub fn block_bytes(&self, block: u64) -> usize {
        (self.bytes - block * BLOCK as u64).min(BLOCK as u64) as usize
    }

    /// Position of the first tensor that ends after `offset`.
    pub fn tensor_at(&self, offset: u64) -> usize {
        self.tensors.partition_point(|t| t.end <= offset)
    }
}
