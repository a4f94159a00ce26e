//! The weights as of one commit, read at any place: `commits/ID/` in a mount. They never change, whatever is committed,
//! folded or pruned meanwhile.
//!
//! At a byte that a later commit changed, the value is the oldest of the old ones in those records; elsewhere it is the
//! one in the file. The file is read first and the list of later commits is taken then, so a fold that writes the byte
//! in between is always covered.

use super::error::CommitError;
use super::layout::Layout;
use super::record::Record;
use super::replay::{Layer, Overlay, Side, WINDOW};
use super::report::CommitInfo;
use super::storage::Access;
use super::{Committer, Shared};
use parking_lot::Mutex;
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;

/// Bytes that one region of a patch covers.
const REGION: usize = 64 << 10;
/// Decoded patches are kept up to this many bytes; the one in use is kept in any case.
const CACHE: usize = 512 << 20;

pub struct Snapshot {
    shared: Arc<Shared>,
    id: u64,
    info: Option<CommitInfo>,
    /// New sides of the records up to this commit that were not folded when it was opened.
    forward: Vec<Layer>,
    cache: Mutex<Cache>,
}

#[derive(Default)]
struct Cache {
    patches: HashMap<(usize, usize), Cached>,
    bytes: usize,
    clock: u64,
}

#[derive(Default)]
struct Cached {
    /// Locked while it is built, so that readers of one tensor wait for each other and those of others do not.
    patch: Arc<Mutex<Option<Arc<Patch>>>>,
    bytes: usize,
    used: u64,
}

/// The bytes of one tensor that differ, or may differ, from the file's.
struct Patch {
    /// Newest record that was looked at.
    through: u64,
    regions: Vec<Region>,
    bytes: usize,
}

/// Changed bytes among [`REGION`] of them.
struct Region {
    places: Vec<u16>,
    values: Vec<u8>,
}

impl Committer {
    /// Opens the weights as of commit `id`; 0 is before the first, while its record is kept.
    pub fn snapshot(&self, id: u64) -> Result<Snapshot, CommitError> {
        Snapshot::open(&self.shared, id)
    }
}

impl Snapshot {
    pub(super) fn open(shared: &Arc<Shared>, id: u64) -> Result<Snapshot, CommitError> {
        let published = shared.published.read();
        let record = shared.record_in(&published, id)?;
        let folded = published.state.folded;
        let forward: Vec<Layer> = published
            .records
            .iter()
            .filter(|r| folded < r.id() && r.id() <= id)
            .map(|r| Layer { record: r.clone(), side: Side::New })
            .collect();
        *shared.held.lock().entry(id).or_insert(0) += 1;
        let info = record.map(|r| CommitInfo::of(&r, folded));
        Ok(Snapshot { shared: shared.clone(), id, info, forward, cache: Mutex::new(Cache::default()) })
    }

    pub fn id(&self) -> u64 {
        self.id
    }

    /// `None` for the weights before the first commit.
    pub fn info(&self) -> Option<&CommitInfo> {
        self.info.as_ref()
    }

    pub fn shards(&self) -> usize {
        self.shared.layout.shards.len()
    }

    pub fn shard_bytes(&self, shard: usize) -> u64 {
        self.shared.layout.shards[shard].bytes
    }

    /// Reads bytes of a shard file; the range lies inside it.
    pub fn read(&self, shard: usize, offset: u64, buffer: &mut [u8]) -> Result<(), CommitError> {
        let layout = &self.shared.layout;
        let name = &layout.shards[shard].name;
        let io = |e| layout.io("read", name, e);
        let file = self.shared.storage.open(name, Access::Read).map_err(io)?;
        file.read_exact_at(buffer, offset).map_err(io)?;
        let later = self.later();
        let end = offset + buffer.len() as u64;
        let tensors = &layout.shards[shard].tensors;
        let mut t = layout.shards[shard].tensor_at(offset);
        while let Some(tensor) = tensors.get(t).filter(|tensor| tensor.start < end) {
            if let Some(patch) = self.patch(shard, t, &later)? {
                let (from, to) = (tensor.start.max(offset), tensor.end.min(end));
                let part = &mut buffer[(from - offset) as usize..(to - offset) as usize];
                patch.apply((from - tensor.start) as usize, part);
            }
            t += 1;
        }
        Ok(())
    }

    /// Reads a whole tensor, decoding what differs from front to back. `buffer` has its size.
    pub(super) fn read_tensor(&self, shard: usize, tensor: usize, buffer: &mut [u8]) -> Result<(), CommitError> {
        let layout = &self.shared.layout;
        let (name, tensor) = (&layout.shards[shard].name, &layout.shards[shard].tensors[tensor]);
        let file = self.shared.storage.open(name, Access::Read);
        let read = file.and_then(|file| file.read_exact_at(buffer, tensor.start));
        read.map_err(|e| layout.io("read", name, e))?;
        let mut overlay = Overlay::new(layout, shard, &self.layers(&tensor.name, &self.later()));
        for (i, window) in buffer.chunks_mut(WINDOW as usize).enumerate() {
            overlay.apply(tensor.start + i as u64 * WINDOW, window, |_| ())?;
        }
        Ok(())
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.shared.layout
    }

    /// Ranges of shard files where this commit may differ from the newest.
    pub(super) fn differences(&self) -> Vec<(usize, std::ops::Range<u64>)> {
        let later = self.later();
        let mut ranges = Vec::new();
        for (s, shard) in self.shared.layout.shards.iter().enumerate() {
            for tensor in shard.tensors.iter().filter(|t| later.iter().any(|r| r.has(&t.name))) {
                ranges.push((s, tensor.start..tensor.end));
            }
        }
        ranges
    }

    /// Records after this commit, in order.
    fn later(&self) -> Vec<Arc<Record>> {
        let published = self.shared.published.read();
        published.retired.iter().chain(&published.records).filter(|r| r.id() > self.id).cloned().collect()
    }

    fn patch(&self, shard: usize, tensor: usize, later: &[Arc<Record>]) -> Result<Option<Arc<Patch>>, CommitError> {
        let name = &self.shared.layout.shards[shard].tensors[tensor].name;
        let newest = later.iter().rev().find(|r| r.has(name)).map_or(0, |r| r.id());
        let has_forward = self.forward.iter().any(|l| l.record.has(name));
        if newest == 0 && !has_forward {
            return Ok(None);
        }
        let slot = {
            let mut cache = self.cache.lock();
            cache.clock += 1;
            let clock = cache.clock;
            let cached = cache.patches.entry((shard, tensor)).or_default();
            cached.used = clock;
            cached.patch.clone()
        };
        let mut built = slot.lock();
        if let Some(patch) = built.as_ref().filter(|p| p.through >= newest) {
            return Ok(Some(patch.clone()));
        }
        let layers = self.layers(name, later);
        let through = later.last().map_or(self.id, |r| r.id());
        let patch = Arc::new(self.build(shard, tensor, &layers, through)?);
        *built = Some(patch.clone());
        drop(built);
        self.cache.lock().account((shard, tensor), patch.bytes);
        Ok(Some(patch))
    }

    /// What turns a tensor of the files into that of this commit.
    fn layers(&self, name: &str, later: &[Arc<Record>]) -> Vec<Layer> {
        let back = later.iter().rev().map(|r| Layer { record: r.clone(), side: Side::Old });
        self.forward.iter().cloned().chain(back).filter(|l| l.record.has(name)).collect()
    }

    /// Decodes what differs on all cores, as far as it is kept.
    pub(super) fn prepare(&self) -> Result<(), CommitError> {
        let later = self.later();
        let mut tensors: Vec<(usize, usize)> = Vec::new();
        for (s, shard) in self.shared.layout.shards.iter().enumerate() {
            tensors.extend((0..shard.tensors.len()).map(|t| (s, t)));
        }
        let bytes = |&(s, t): &(usize, usize)| {
            let tensor = &self.shared.layout.shards[s].tensors[t];
            tensor.end - tensor.start
        };
        tensors.sort_by_key(|at| std::cmp::Reverse(bytes(at)));
        tensors.into_par_iter().with_max_len(1).try_for_each(|(s, t)| {
            if self.cache.lock().bytes < CACHE / 2 {
                self.patch(s, t, &later)?;
            }
            Ok(())
        })
    }

    fn build(&self, shard: usize, tensor: usize, layers: &[Layer], through: u64) -> Result<Patch, CommitError> {
        let layout = &self.shared.layout;
        let tensor = &layout.shards[shard].tensors[tensor];
        let mut overlay = Overlay::new(layout, shard, layers);
        let mut patch = Patch { through, regions: Vec::new(), bytes: 0 };
        let mut values = vec![0; REGION];
        let mut changed = vec![false; REGION];
        let mut at = tensor.start;
        while at < tensor.end {
            let window = &mut values[..(tensor.end - at).min(REGION as u64) as usize];
            changed.fill(false);
            overlay.apply(at, window, |i| changed[i] = true)?;
            let places: Vec<u16> = (0..window.len()).filter(|&i| changed[i]).map(|i| i as u16).collect();
            let region = Region { values: places.iter().map(|&i| window[i as usize]).collect(), places };
            patch.bytes += region.places.len() * 3 + size_of::<Region>();
            patch.regions.push(region);
            at += window.len() as u64;
        }
        Ok(patch)
    }
}

impl Cache {
    /// Notes the size of a patch just built, and lets go of those used longest ago when all are too large together.
    fn account(&mut self, at: (usize, usize), bytes: usize) {
        if let Some(cached) = self.patches.get_mut(&at) {
            self.bytes = self.bytes - cached.bytes + bytes;
            cached.bytes = bytes;
        }
        while self.bytes > CACHE && self.patches.len() > 1 {
            let oldest = self.patches.iter().min_by_key(|(_, cached)| cached.used).map(|(at, _)| *at);
            let Some(cached) = oldest.and_then(|at| self.patches.remove(&at)) else { break };
            self.bytes -= cached.bytes;
        }
    }
}

impl Patch {
    /// `buffer` holds bytes of the tensor from `start` (counted in the tensor) on.
    fn apply(&self, start: usize, buffer: &mut [u8]) {
        let end = start + buffer.len();
        for (r, region) in self.regions.iter().enumerate().take(end.div_ceil(REGION)).skip(start / REGION) {
            let base = r * REGION;
            let from = region.places.partition_point(|&p| base + (p as usize) < start);
            for (&place, &value) in region.places[from..].iter().zip(&region.values[from..]) {
                let at = base + place as usize;
                if at >= end {
                    break;
                }
                buffer[at - start] = value;
            }
        }
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        let mut published = self.shared.published.write();
        {
            let mut held = self.shared.held.lock();
            if let Some(count) = held.get_mut(&self.id) {
                *count -= 1;
                if *count == 0 {
                    held.remove(&self.id);
                }
            }
        }
        self.shared.drop_unneeded(&mut published);
    }
}
