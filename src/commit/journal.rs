//! Log: compares changed blocks with the bytes they replace, and writes the record of the changed elements.
//!
//! Tensors are encoded on all cores, in waves whose results are appended while the next wave is encoded. The new bytes
//! come from the staged copies, or, when those would take more memory than allowed, from the live weights piece by piece.

use super::blocks::{Change, Table};
use super::container::ContainerWriter;
use super::delta::{DeltaEncoder, Summary};
use super::error::CommitError;
use super::find::Run;
use super::layout::{Layout, TensorLayout};
use super::replay::{Layer, Replay, WINDOW};
use super::stage::Staged;
use super::state::hex;
use super::storage::{Access, Storage};
use crate::image::ShardBytes;
use crate::memory::{BLOCK, hash_into};
use parking_lot::Mutex;
use rayon::prelude::*;
use std::io::Write;

/// Bytes of tensors in a wave: their deltas are in memory twice over, so this bounds what logging takes.
const WAVE: u64 = 64 << 20;

/// Where the new bytes of changed blocks come from.
pub enum NewBytes<'a> {
    Staged(&'a Staged),
    Streamed(Streamed<'a>),
}

/// Changed blocks read when their tensor is encoded, each exactly once.
pub struct Streamed<'a> {
    live: &'a dyn ShardBytes,
    table: &'a Table,
    runs: &'a [Run],
    /// Blocks that two tensors share are copied beforehand, so that both see the same bytes.
    shared: Staged,
    seen: Mutex<Vec<Change>>,
}

impl<'a> Streamed<'a> {
    pub fn new(
        live: &'a dyn ShardBytes,
        layout: &Layout,
        table: &'a Table,
        runs: &'a [Run],
    ) -> Result<Streamed<'a>, CommitError> {
        let mut shared: Vec<Run> = Vec::new();
        for run in runs {
            for tensor in tensors_of(layout, run) {
                for offset in [tensor.start, tensor.end - 1] {
                    let block = Run { shard: run.shard, first: offset / BLOCK as u64, blocks: 1 };
                    let inside = (run.first..run.first + run.blocks).contains(&block.first);
                    let range = block.bytes(layout);
                    let cut = range.start < tensor.start || range.end > tensor.end;
                    if inside && cut && shared.last().is_none_or(|r| (r.shard, r.first) < (run.shard, block.first)) {
                        shared.push(block);
                    }
                }
            }
        }
        let shared = Staged::copy(live, layout, table, &shared)?;
        let seen = Mutex::new(shared.changes());
        Ok(Streamed { live, table, runs, shared, seen })
    }

    /// The changes of all blocks, once every tensor was encoded.
    pub fn into_changes(self) -> Vec<Change> {
        let mut changes = self.seen.into_inner();
        changes.sort_by_key(|c| (c.shard, c.first));
        changes
    }

    /// Puts live bytes of changed blocks over `buffer`. Its ends are ends of blocks or of the tensor, so that a block
    /// lies wholly inside, or is a shared one.
    fn overlay(&self, layout: &Layout, shard: usize, start: u64, buffer: &mut [u8]) -> Result<bool, CommitError> {
        let end = start + buffer.len() as u64;
        let mut any = self.shared.overlay(shard, start, buffer);
        let from = self.runs.partition_point(|r| (r.shard, r.bytes(layout).end) <= (shard, start));
        for run in self.runs[from..].iter().take_while(|r| (r.shard, r.bytes(layout).start) < (shard, end)) {
            let mut blocks = run.first..run.first + run.blocks;
            let whole = |first| {
                let range = Run { shard, first, blocks: 1 }.bytes(layout);
                start <= range.start && range.end <= end
            };
            let Some(first) = blocks.find(|&b| whole(b)) else { continue };
            let count = 1 + blocks.take_while(|&b| whole(b)).count() as u64;
            let part = Run { shard, first, blocks: count }.bytes(layout);
            let bytes = &mut buffer[(part.start - start) as usize..(part.end - start) as usize];
            self.live.read(shard, part.start, bytes)?;
            any = true;
            let mut hashes = vec![0; count as usize];
            hash_into(bytes, &mut hashes);
            let mut seen = self.seen.lock();
            for (block, hash) in (first..).zip(hashes) {
                if hash != self.table.0[shard][block as usize] {
                    seen.push(Change { shard, first: block, hashes: vec![hash] });
                }
            }
        }
        Ok(any)
    }
}

fn tensors_of<'a>(layout: &'a Layout, run: &Run) -> impl Iterator<Item = &'a TensorLayout> {
    let range = run.bytes(layout);
    let shard = &layout.shards[run.shard];
    shard.tensors[shard.tensor_at(range.start)..].iter().take_while(move |t| t.start < range.end)
}

/// The tensors with bytes in changed blocks, in order, as (shard, position).
pub fn touched_tensors(layout: &Layout, runs: &[Run]) -> Vec<(usize, usize)> {
    let mut tensors = Vec::new();
    for run in runs {
        let range = run.bytes(layout);
        let shard = &layout.shards[run.shard];
        let mut t = shard.tensor_at(range.start);
        while shard.tensors.get(t).is_some_and(|tensor| tensor.start < range.end) {
            if tensors.last().is_none_or(|&last| last < (run.shard, t)) {
                tensors.push((run.shard, t));
            }
            t += 1;
        }
    }
    tensors
}

/// Compares and encodes.
pub struct Journal<'a> {
    pub storage: &'a dyn Storage,
    pub layout: &'a Layout,
    /// What turns the files into the newest commit: nothing, unless folds were put off.
    pub layers: &'a [Layer],
    pub new: &'a NewBytes<'a>,
}

#[derive(Debug, Default, Clone, Copy)]
pub struct Totals {
    pub changed_elements: u64,
    pub changed_bytes: u64,
}

/// A tensor's two frames.
struct Encoded {
    at: (usize, usize),
    summary: Summary,
    xor: Vec<u8>,
    values: Vec<u8>,
}

impl Journal<'_> {
    /// Appends the deltas of `tensors` to the two files. Returns the names of those that did change, in order.
    pub fn write(
        &self,
        tensors: &[(usize, usize)],
        xor: &mut ContainerWriter,
        values: &mut ContainerWriter,
        progress: &dyn Fn(u64),
    ) -> Result<(Totals, Vec<String>), CommitError> {
        let mut written = Written::default();
        let mut waiting: Vec<Encoded> = Vec::new();
        let mut done = 0;
        let mut rest = tensors;
        while !rest.is_empty() {
            let (wave, bytes) = self.wave(rest);
            rest = &rest[wave.len()..];
            let previous = std::mem::take(&mut waiting);
            if bytes > WAVE {
                self.append(previous, xor, values, &mut written)?;
                for &at in wave {
                    self.write_large(at, xor, values, &mut written)?;
                }
            } else {
                let (encoded, appended) = rayon::join(
                    || wave.par_iter().map(|&at| self.encode(at)).collect::<Result<Vec<_>, _>>(),
                    || self.append(previous, xor, values, &mut written),
                );
                appended?;
                waiting = encoded?;
            }
            done += bytes;
            progress(done);
        }
        self.append(waiting, xor, values, &mut written)?;
        Ok((written.totals, written.names))
    }

    fn tensor(&self, (shard, tensor): (usize, usize)) -> &TensorLayout {
        &self.layout.shards[shard].tensors[tensor]
    }

    /// The tensors from the front that make up a wave, and their bytes: as many as fit, or one that is larger.
    fn wave<'t>(&self, tensors: &'t [(usize, usize)]) -> (&'t [(usize, usize)], u64) {
        let mut bytes = 0;
        for (i, &at) in tensors.iter().enumerate() {
            let tensor = self.tensor(at);
            let sum = bytes + tensor.end - tensor.start;
            if sum > WAVE && i > 0 {
                return (&tensors[..i], bytes);
            }
            bytes = sum;
        }
        (tensors, bytes)
    }

    fn encode(&self, at: (usize, usize)) -> Result<Encoded, CommitError> {
        let (summary, xor, values) = self.feed(at, Vec::new(), Vec::new())?;
        Ok(Encoded { at, summary, xor, values })
    }

    /// A tensor too large to have its delta in memory goes to the files as it is made.
    fn write_large(
        &self,
        at: (usize, usize),
        xor: &mut ContainerWriter,
        values: &mut ContainerWriter,
        written: &mut Written,
    ) -> Result<(), CommitError> {
        let name = &self.tensor(at).name;
        xor.begin(name);
        values.begin(name);
        let (summary, _, _) = self.feed(at, &mut *xor, &mut *values)?;
        xor.end();
        values.end();
        written.note(name, &summary, xor);
        Ok(())
    }

    fn append(
        &self,
        encoded: Vec<Encoded>,
        xor: &mut ContainerWriter,
        values: &mut ContainerWriter,
        written: &mut Written,
    ) -> Result<(), CommitError> {
        let io = |e| self.layout.io("write", super::record::LOG, e);
        for tensor in encoded.into_iter().filter(|t| t.summary.changed_bytes > 0) {
            let name = &self.tensor(tensor.at).name;
            for (file, bytes) in [(&mut *xor, &tensor.xor), (&mut *values, &tensor.values)] {
                file.begin(name);
                file.write_all(bytes).map_err(io)?;
                file.end();
            }
            written.note(name, &tensor.summary, xor);
        }
        Ok(())
    }

    /// Sends a tensor's old and new bytes through an encoder, in pieces that end on blocks.
    fn feed<X: Write, V: Write>(
        &self,
        (shard, tensor): (usize, usize),
        xor: X,
        values: V,
    ) -> Result<(Summary, X, V), CommitError> {
        let io = |e| self.layout.io("write", super::record::LOG, e);
        let TensorLayout { start, end, element, .. } = *self.tensor((shard, tensor));
        let name = &self.layout.shards[shard].name;
        let file = self.storage.open(name, Access::Read).map_err(|e| self.layout.io("open", name, e))?;
        let mut old_bytes = Replay::new(self.layout, shard, file, self.layers);
        let mut encoder = DeltaEncoder::new(xor, values, end - start, element).map_err(io)?;
        let (mut old, mut new) = (Vec::new(), Vec::new());
        let mut at = start;
        while at < end {
            let stop = ((at / WINDOW + 1) * WINDOW).min(end);
            old.resize((stop - at) as usize, 0);
            old_bytes.read(at, &mut old, |_| ())?;
            new.clear();
            new.extend_from_slice(&old);
            let any = match self.new {
                NewBytes::Staged(staged) => staged.overlay(shard, at, &mut new),
                NewBytes::Streamed(streamed) => streamed.overlay(self.layout, shard, at, &mut new)?,
            };
            match any {
                true => encoder.push(&old, &new),
                false => encoder.push_unchanged(&old),
            }
            .map_err(io)?;
            at = stop;
        }
        encoder.finish().map_err(io)
    }
}

#[derive(Default)]
struct Written {
    totals: Totals,
    names: Vec<String>,
}

impl Written {
    fn note(&mut self, tensor: &str, summary: &Summary, xor: &mut ContainerWriter) {
        self.totals.changed_elements += summary.changed_elements;
        self.totals.changed_bytes += summary.changed_bytes;
        self.names.push(tensor.to_string());
        xor.metadata(tensor, hex(summary.checksum));
    }
}
