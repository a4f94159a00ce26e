//! All shards of a model as live bytes of one source: extents of header, disk and live tensors, found by file offset.

use super::tensor::{Fetch, LiveTensor, copy};
use super::wide::Plans;
use super::{ImageError, Part, ShardBytes, StepHold, wide};
use crate::memory::{Accelerator, BLOCK, Hash, Memory, hash_into};
use crate::model::{ModelDirectory, Shard, TensorEntry};
use crate::source::{Place, Source};
use std::collections::HashMap;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Blocks gathered and hashed together where the bytes do not lie contiguously: small enough for a core's cache, large
/// enough that a transposed tensor's cache lines are used by several rows.
const GATHER_BLOCKS: usize = 16;

/// The live shard files of one model, with weights of one source.
pub(super) struct Attached {
    directory: Arc<ModelDirectory>,
    source: Arc<Source>,
    pub(super) shards: Vec<Vec<Extent>>,
    /// Live tensors by name: the shard, the extent in it, and the tensor's place in the header.
    live: HashMap<String, (usize, usize, usize)>,
    /// Where devices find the blocks that were asked for last.
    pub(super) plans: Plans,
}

/// What a stretch of a shard file is made of. The extents of a shard follow each other without holes.
#[derive(Debug)]
pub(super) enum Extent {
    Header(Range<u64>),
    /// Opaque tensors and those the engine does not hold.
    Disk(Range<u64>),
    Live(LiveTensor),
}

impl Extent {
    pub fn range(&self) -> &Range<u64> {
        match self {
            Extent::Header(range) | Extent::Disk(range) => range,
            Extent::Live(tensor) => &tensor.file,
        }
    }
}

impl Attached {
    pub fn new(directory: Arc<ModelDirectory>, source: Arc<Source>) -> Attached {
        let mut live = HashMap::new();
        let shards = directory.shards.iter().enumerate().map(|(index, shard)| {
            let mut extents = vec![Extent::Header(0..shard.header.bytes.len() as u64)];
            for (entry, tensor) in shard.header.tensors.iter().enumerate().filter(|(_, t)| t.bytes() > 0) {
                extents.push(match source.places.get(&tensor.name) {
                    Some(Place::Live(segments)) => {
                        live.insert(tensor.name.clone(), (index, extents.len(), entry));
                        Extent::Live(LiveTensor::new(tensor, segments, &source.memories))
                    }
                    _ => Extent::Disk(tensor.start..tensor.end),
                });
            }
            extents
        });
        Attached { shards: shards.collect(), live, directory, source, plans: Plans::default() }
    }

    pub fn source(&self) -> &Arc<Source> {
        &self.source
    }

    /// A live tensor by its name, and its entry in the shard's header.
    pub fn tensor(&self, name: &str) -> Option<(&LiveTensor, &TensorEntry)> {
        let (shard, extent, entry) = *self.live.get(name)?;
        match &self.shards[shard][extent] {
            Extent::Live(live) => Some((live, &self.directory.shards[shard].header.tensors[entry])),
            _ => None,
        }
    }

    pub(super) fn extents_from(&self, shard: usize, offset: u64) -> &[Extent] {
        let extents = &self.shards[shard];
        &extents[extents.partition_point(|e| e.range().end <= offset)..]
    }

    pub(super) fn disk(shard: &Shard, offset: u64, dst: &mut [u8]) -> Result<(), ImageError> {
        let at = |source| ImageError::Disk { path: shard.path.clone(), source };
        shard.file().read_exact_at(dst, offset).map_err(at)
    }

    /// Contiguous live memory under the shard's bytes from `offset` on, if there is.
    pub(super) fn direct(&self, shard: usize, offset: u64) -> Option<(&Arc<dyn Memory>, u64, u64)> {
        match self.extents_from(shard, offset).first() {
            Some(Extent::Live(tensor)) => tensor.direct(offset),
            _ => None,
        }
    }

    /// Whether any of the weights is on a device that works on them by itself.
    pub(super) fn has_devices(&self) -> bool {
        self.source.memories.iter().any(|m| m.device().is_some())
    }

    pub(super) fn read_with(
        &self,
        shard: usize,
        offset: u64,
        dst: &mut [u8],
        fetch: Fetch<'_>,
    ) -> Result<(), ImageError> {
        let file = &self.directory.shards[shard];
        let end = offset + dst.len() as u64;
        for extent in self.extents_from(shard, offset).iter().take_while(|e| e.range().start < end) {
            let range = extent.range();
            let (a, b) = (range.start.max(offset), range.end.min(end));
            let part = &mut dst[(a - offset) as usize..(b - offset) as usize];
            match extent {
                Extent::Header(_) => part.copy_from_slice(&file.header.bytes[a as usize..b as usize]),
                Extent::Disk(_) => Attached::disk(file, a, part)?,
                Extent::Live(tensor) => tensor.read(a, part, |at, base| Attached::disk(file, at, base), fetch)?,
            }
        }
        Ok(())
    }
}

impl ShardBytes for Attached {
    fn shards(&self) -> usize {
        self.shards.len()
    }

    fn shard_bytes(&self, shard: usize) -> u64 {
        self.directory.shards[shard].bytes()
    }

    fn live_blocks(&self, shard: usize) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for extent in &self.shards[shard] {
            if let Extent::Live(tensor) = extent {
                let blocks = tensor.file.start / BLOCK as u64..tensor.file.end.div_ceil(BLOCK as u64);
                match ranges.last_mut() {
                    Some(last) if last.end >= blocks.start => last.end = last.end.max(blocks.end),
                    _ => ranges.push(blocks),
                }
            }
        }
        ranges
    }

    fn check(&self) -> Result<(), ImageError> {
        self.source.check().map_err(ImageError::EngineGone)
    }

    fn hold(&self) -> Result<StepHold, ImageError> {
        self.check()?;
        let hold = self.source.boundary.hold().map_err(|e| ImageError::NoBoundary(e.seconds()))?;
        // An engine that died while we waited let go of its lock half way through a step.
        self.check()?;
        if !self.source.updates.are_whole() {
            return Err(ImageError::Torn);
        }
        Ok(StepHold::new(hold))
    }

    fn exclude(&self) -> Result<StepHold, ImageError> {
        self.check()?;
        let step = self.source.boundary.exclude().map_err(|e| ImageError::NoBoundary(e.seconds()))?;
        self.check()?;
        Ok(StepHold::new(step))
    }

    fn update_begins(&self) {
        self.source.updates.begin();
    }

    fn update_ended(&self, whole: bool) {
        self.source.updates.end(whole);
    }

    fn read(&self, shard: usize, offset: u64, dst: &mut [u8]) -> Result<(), ImageError> {
        self.read_with(shard, offset, dst, &mut copy)
    }

    fn read_parts(&self, parts: &mut [Part<'_>]) -> Result<(), ImageError> {
        match self.has_devices() {
            true => wide::read_parts(self, parts),
            false => parts.iter_mut().try_for_each(|p| self.read(p.shard, p.offset, p.dst)),
        }
    }

    fn changed(
        &self,
        ranges: &[(usize, Range<u64>)],
        known: &[&[Hash]],
    ) -> Result<Vec<(usize, Range<u64>)>, ImageError> {
        match self.has_devices() {
            true => wide::changed(self, ranges, known),
            false => super::changed_in_batches(self, ranges, known),
        }
    }

    fn accelerator(&self) -> Option<Arc<dyn Accelerator>> {
        self.source.memories.iter().find_map(|m| m.device()).map(|d| d.accelerator())
    }

    fn hash(&self, shard: usize, first: u64, out: &mut [Hash]) -> Result<(), ImageError> {
        let bytes = self.shard_bytes(shard);
        let mut done = 0;
        let mut buffer = [0; GATHER_BLOCKS * BLOCK];
        while done < out.len() {
            let offset = (first + done as u64) * BLOCK as u64;
            let left = out.len() - done;
            let blocks = match self.direct(shard, offset) {
                Some((memory, at, len)) if len >= BLOCK as u64 => {
                    let blocks = ((len / BLOCK as u64) as usize).min(left);
                    memory.hash_blocks(at, &mut out[done..done + blocks])?;
                    blocks
                }
                direct => {
                    let blocks = if direct.is_some() { 1 } else { left.min(GATHER_BLOCKS) };
                    let len = ((blocks * BLOCK) as u64).min(bytes - offset) as usize;
                    self.read(shard, offset, &mut buffer[..len])?;
                    hash_into(&buffer[..len], &mut out[done..done + blocks]);
                    blocks
                }
            };
            done += blocks;
        }
        Ok(())
    }

    fn write(&self, shard: usize, offset: u64, src: &[u8]) -> Result<(), ImageError> {
        let end = offset + src.len() as u64;
        for extent in self.extents_from(shard, offset).iter().take_while(|e| e.range().start < end) {
            if let Extent::Live(tensor) = extent {
                let (a, b) = (tensor.file.start.max(offset), tensor.file.end.min(end));
                tensor.write(a, &src[(a - offset) as usize..(b - offset) as usize])?;
            }
        }
        Ok(())
    }
}
