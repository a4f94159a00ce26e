//! The table of block hashes of the newest commit, in memory and in `.weightfs/blocks`.
//!
//! The file is a cache: it is believed only when its checksum holds and it is of the newest commit, else the weights are
//! hashed again. So it is updated in place, without syncing, and may be torn by a crash.

use super::layout::Layout;
use super::storage::{Access, Storage};
use crate::memory::Hash;
use std::io;
use std::ops::Range;
use xxhash_rust::xxh3::{Xxh3Default, xxh3_128};

pub const BLOCKS: &str = ".weightfs/blocks";
const MAGIC: &[u8; 8] = b"wfblocks";
const VERSION: u32 = 1;
/// Bytes before the hashes: magic 8, version 4, shards 4, commit 8, root 16, bytes 8, checksum 16.
const HEADER: usize = 64;

/// One list a shard, one hash a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table(pub Vec<Vec<Hash>>);

/// Hashes so close together in the file that writing what lies between them costs less than another write: a page of them.
const NEAR: u64 = 4096 / 16;

/// The hashes of consecutive blocks from `first` on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub shard: usize,
    pub first: u64,
    pub hashes: Vec<Hash>,
}

impl Change {
    /// The runs of `hashes`, which are of a shard's blocks from `first` on, that are not the `known` ones.
    pub fn differing(shard: usize, first: u64, hashes: &[Hash], known: &[Hash]) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut at = 0;
        let differ: Vec<bool> = hashes.iter().zip(known).map(|(a, b)| a != b).collect();
        for same in differ.chunk_by(|a, b| a == b) {
            if same[0] {
                changes.push(Change { shard, first: first + at as u64, hashes: hashes[at..at + same.len()].to_vec() });
            }
            at += same.len();
        }
        changes
    }

    fn end(&self) -> u64 {
        self.first + self.hashes.len() as u64
    }
}

/// Ranges of blocks that hold all of `changes`, which are in order, without those far from any.
fn spans(changes: &[Change]) -> impl Iterator<Item = (usize, Range<u64>)> {
    let near = |a: &Change, b: &Change| a.shard == b.shard && b.first <= a.end() + NEAR;
    changes.chunk_by(near).map(|together| {
        let last = &together[together.len() - 1];
        (last.shard, together[0].first..last.end())
    })
}

impl Table {
    /// XXH3-128 of all hashes (little-endian, 16 bytes each) in order: names the whole state in one number.
    pub fn root(&self) -> Hash {
        let mut hasher = Xxh3Default::new();
        let mut buffer = Vec::with_capacity(16 * 1024);
        for shard in &self.0 {
            for part in shard.chunks(1024) {
                buffer.clear();
                encode(part, &mut buffer);
                hasher.update(&buffer);
            }
        }
        hasher.digest128()
    }

    pub fn apply(&mut self, changes: &[Change]) {
        for change in changes {
            let first = change.first as usize;
            self.0[change.shard][first..first + change.hashes.len()].copy_from_slice(&change.hashes);
        }
    }

    pub fn fits(&self, layout: &Layout) -> bool {
        self.0.len() == layout.shards.len()
            && self.0.iter().zip(&layout.shards).all(|(t, s)| t.len() as u64 == s.blocks())
    }

    /// The table in the file, when it can be believed to be that of commit `commit`.
    pub fn load(storage: &dyn Storage, layout: &Layout, commit: u64) -> io::Result<Option<(Table, Hash)>> {
        let file = match storage.open(BLOCKS, Access::Read) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let blocks: u64 = layout.shards.iter().map(|s| s.blocks()).sum();
        if file.stat()?.bytes != HEADER as u64 + 16 * blocks {
            return Ok(None);
        }
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        let mut at = HEADER as u64;
        let mut shards = Vec::with_capacity(layout.shards.len());
        for shard in &layout.shards {
            let mut hashes = Vec::with_capacity(shard.blocks() as usize);
            let mut buffer = vec![0; 1 << 20];
            let mut left = 16 * shard.blocks() as usize;
            while left > 0 {
                let part = &mut buffer[..left.min(1 << 20)];
                file.read_exact_at(part, at)?;
                // `as_chunks` leaves no remainder: both lengths are multiples of 16.
                hashes.extend(part.as_chunks::<16>().0.iter().map(|h| Hash::from_le_bytes(*h)));
                at += part.len() as u64;
                left -= part.len();
            }
            shards.push(hashes);
        }
        let table = Table(shards);
        let root = table.root();
        Ok((header == header_bytes(layout, commit, root)).then_some((table, root)))
    }

    /// Writes the whole file, or just the pages with `changes`, which are in order, into one that holds the table before
    /// them.
    pub fn store(
        &self,
        storage: &dyn Storage,
        layout: &Layout,
        commit: u64,
        root: Hash,
        changes: Option<&[Change]>,
    ) -> io::Result<()> {
        let whole = HEADER as u64 + 16 * layout.shards.iter().map(|s| s.blocks()).sum::<u64>();
        let fits = storage.stat(BLOCKS).is_ok_and(|s| s.bytes == whole);
        let file = storage.open(BLOCKS, if fits { Access::ReadWrite } else { Access::Create })?;
        let starts: Vec<u64> = layout
            .shards
            .iter()
            .scan(HEADER as u64, |at, s| {
                let start = *at;
                *at += 16 * s.blocks();
                Some(start)
            })
            .collect();
        let put = |shard: usize, first: u64, hashes: &[Hash]| -> io::Result<()> {
            let mut at = starts[shard] + 16 * first;
            let mut buffer = Vec::with_capacity(hashes.len().min(1 << 16) * 16);
            for part in hashes.chunks(1 << 16) {
                buffer.clear();
                encode(part, &mut buffer);
                file.write_all_at(&buffer, at)?;
                at += buffer.len() as u64;
            }
            Ok(())
        };
        match changes {
            Some(changes) if fits => spans(changes)
                .try_for_each(|(s, span)| put(s, span.start, &self.0[s][span.start as usize..span.end as usize]))?,
            _ => self.0.iter().enumerate().try_for_each(|(s, hashes)| put(s, 0, hashes))?,
        }
        file.write_all_at(&header_bytes(layout, commit, root), 0)
    }
}

fn encode(hashes: &[Hash], out: &mut Vec<u8>) {
    for hash in hashes {
        out.extend_from_slice(&hash.to_le_bytes());
    }
}

/// Everything but the hashes; its own checksum covers the root, and the root the hashes.
fn header_bytes(layout: &Layout, commit: u64, root: Hash) -> [u8; HEADER] {
    let bytes: u64 = layout.shards.iter().map(|s| s.bytes).sum();
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&(layout.shards.len() as u32).to_le_bytes());
    header[16..24].copy_from_slice(&commit.to_le_bytes());
    header[24..40].copy_from_slice(&root.to_le_bytes());
    header[40..48].copy_from_slice(&bytes.to_le_bytes());
    let checksum = xxh3_128(&header[..48]);
    header[48..].copy_from_slice(&checksum.to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_stretches_of_hashes_that_differ() {
        let change = |first, hashes: &[Hash]| Change { shard: 2, first, hashes: hashes.to_vec() };
        let differing = |hashes: &[Hash]| Change::differing(2, 10, hashes, &[1, 2, 3, 4, 5]);
        assert_eq!(differing(&[1, 2, 3, 4, 5]), []);
        assert_eq!(differing(&[6, 7, 8, 9, 0]), [change(10, &[6, 7, 8, 9, 0])]);
        assert_eq!(differing(&[1, 7, 8, 4, 9]), [change(11, &[7, 8]), change(14, &[9])]);
    }

    #[test]
    fn changes_that_lie_near_each_other_are_written_together() {
        let change = |shard, first, blocks| Change { shard, first, hashes: vec![0; blocks] };
        let far = 7 + NEAR + 1;
        let changes = [change(0, 3, 1), change(0, 4, 2), change(0, 6, 1), change(0, far, 1), change(1, far + 1, 1)];
        assert_eq!(spans(&changes).collect::<Vec<_>>(), [(0, 3..7), (0, far..far + 1), (1, far + 1..far + 2)]);
        let near = [change(0, 3, 4), change(0, far - 1, 1)];
        assert_eq!(spans(&near).collect::<Vec<_>>(), [(0, 3..far)]);
    }
}
