//! Reads weights as of any commit: the bytes on the disk, with records laid over them, walked from front to back.
//!
//! A layer is a record and a side of it. New sides in ascending order bring a file forward, old sides in descending order
//! take it back; both are absolute values, so it does not matter which of the two the file held at any byte.

use super::container::FileSlice;
use super::delta::{DeltaDecoder, decode_error};
use super::error::CommitError;
use super::layout::Layout;
use super::record::Record;
use super::storage::StoredFile;
use std::sync::Arc;

/// Bytes decoded at a time.
pub const WINDOW: u64 = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    New,
    Old,
}

#[derive(Clone)]
pub struct Layer {
    pub record: Arc<Record>,
    pub side: Side,
}

/// The layers that turn a directory folded up to somewhere at or after `folded` into commit `id`, given all records in
/// order. A fold in progress is harmless: every byte it may touch is covered by a layer.
pub fn layers(records: &[Arc<Record>], folded: u64, id: u64) -> Vec<Layer> {
    let forward = records.iter().filter(|r| folded < r.id() && r.id() <= id);
    let back = records.iter().rev().filter(|r| r.id() > id);
    forward
        .map(|r| Layer { record: r.clone(), side: Side::New })
        .chain(back.map(|r| Layer { record: r.clone(), side: Side::Old }))
        .collect()
}

/// One layer over one shard, from front to back.
struct Cursor {
    layer: Layer,
    shard: usize,
    /// The tensor being decoded, and how far (offset in the file).
    open: Option<(usize, DeltaDecoder<FileSlice>, u64)>,
}

impl Cursor {
    /// Lays the changes in `start..start + buffer.len()` over `buffer`; `touched` gets the offset of each in the buffer.
    fn apply(
        &mut self,
        layout: &Layout,
        start: u64,
        buffer: &mut [u8],
        touched: &mut impl FnMut(usize),
    ) -> Result<(), CommitError> {
        let shard = &layout.shards[self.shard];
        let end = start + buffer.len() as u64;
        let mut t = shard.tensor_at(start);
        while let Some(tensor) = shard.tensors.get(t).filter(|tensor| tensor.start < end) {
            if self.layer.record.has(&tensor.name) {
                let files = self.layer.record.files()?;
                let damaged = |e| decode_error(files.xor.path().to_path_buf(), &tensor.name, e);
                if self.open.as_ref().is_none_or(|(open, _, at)| *open != t || *at > start.max(tensor.start)) {
                    let (xor, values) = (files.xor.read(&tensor.name)?, files.values.read(&tensor.name)?);
                    self.open = Some((t, DeltaDecoder::new(xor, values).map_err(damaged)?, tensor.start));
                }
                let Some((_, decoder, at)) = self.open.as_mut() else { unreachable!("opened above") };
                let until = end.min(tensor.end);
                while *at < until {
                    let skipping = *at < start;
                    let stop = if skipping { start } else { until }.min(*at + WINDOW);
                    let base = (*at).wrapping_sub(start) as usize;
                    let side = self.layer.side;
                    decoder
                        .next((stop - *at) as usize, |i, new, old| {
                            if !skipping {
                                let i = base + i;
                                buffer[i] = if side == Side::New { new } else { old };
                                touched(i);
                            }
                        })
                        .map_err(damaged)?;
                    *at = stop;
                }
                if until == tensor.end {
                    decoder.finish().map_err(damaged)?;
                    self.open = None;
                }
            }
            t += 1;
        }
        Ok(())
    }
}

/// Layers over one shard.
pub struct Overlay<'a> {
    layout: &'a Layout,
    shard: usize,
    cursors: Vec<Cursor>,
}

impl<'a> Overlay<'a> {
    pub fn new(layout: &'a Layout, shard: usize, layers: &[Layer]) -> Overlay<'a> {
        let touches = |layer: &&Layer| layout.shards[shard].tensors.iter().any(|t| layer.record.has(&t.name));
        let cursors = layers.iter().filter(touches).map(|l| Cursor { layer: l.clone(), shard, open: None }).collect();
        Overlay { layout, shard, cursors }
    }

    /// Lays the changes over `buffer`, the shard's bytes from `start` on. Cheap when called front to back; `touched` gets
    /// the place in the buffer of every byte put there.
    pub fn apply(&mut self, start: u64, buffer: &mut [u8], mut touched: impl FnMut(usize)) -> Result<(), CommitError> {
        self.cursors.iter_mut().try_for_each(|c| c.apply(self.layout, start, buffer, &mut touched))
    }
}

/// A shard as of some commit.
pub struct Replay<'a> {
    file: Arc<dyn StoredFile>,
    overlay: Overlay<'a>,
}

impl<'a> Replay<'a> {
    pub fn new(layout: &'a Layout, shard: usize, file: Arc<dyn StoredFile>, layers: &[Layer]) -> Replay<'a> {
        Replay { file, overlay: Overlay::new(layout, shard, layers) }
    }

    pub fn read(&mut self, start: u64, buffer: &mut [u8], touched: impl FnMut(usize)) -> Result<(), CommitError> {
        let Overlay { layout, shard, .. } = self.overlay;
        self.file.read_exact_at(buffer, start).map_err(|e| CommitError::io("read", layout.path(shard), e))?;
        self.overlay.apply(start, buffer, touched)
    }
}
