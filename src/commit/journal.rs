//! Log: compares changed blocks with the bytes they replace, and writes the record of the changed elements.
//!
//! Tensors are encoded on all cores, and appended as they are ready. The new bytes come from the staged copies, or, when those would take more memory than allowed, from the live weights piece by piece.

use super::blocks::{Change, Table};
use super::container::ContainerWriter;
use super::delta::{DeltaEncoder, Scratch, Summary};
use super::error::CommitError;
use super::find::Run;
use super::layout::{Layout, TensorLayout};
use super::record::LOG;
use super::replay::{Layer, Replay};
use super::stage::Staged;
use super::state::hex;
use super::storage::{Access, Storage};
use crate::image::ShardBytes;
use crate::memory::{BLOCK, hash_into};
use parking_lot::Mutex;
use rayon::prelude::*;
use std::io::Write;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Tensors beyond this many bytes are encoded one by one, all cores on each, straight into the files. Of the others each
/// core has the delta of one in memory, which is at most twice as large as the tensor.
const LARGE: u64 = 16 << 20;
/// Bytes of a tensor compared at a time: old and new ones, and what they make, fit a core's cache.
const PIECE: u64 = 256 << 10;

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

/// The tensors with bytes in a run, in order.
pub fn tensors_of<'a>(layout: &'a Layout, run: &Run) -> impl Iterator<Item = &'a TensorLayout> {
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

/// What the workers share: the files, and what was written to them.
struct Output<'a> {
    xor: &'a mut ContainerWriter,
    values: &'a mut ContainerWriter,
    totals: Totals,
    names: Vec<String>,
}

impl Journal<'_> {
    /// Appends the deltas of `tensors` to the two files, in no particular order. Returns the names of those that did
    /// change.
    pub fn write(
        &self,
        tensors: &[(usize, usize)],
        xor: &mut ContainerWriter,
        values: &mut ContainerWriter,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(Totals, Vec<String>), CommitError> {
        let mut output = Output { xor, values, totals: Totals::default(), names: Vec::new() };
        let threads = rayon::current_num_threads();
        let (large, mut small): (Vec<_>, Vec<_>) = tensors.iter().partition(|&&at| self.bytes(at) > LARGE);
        let mut done = 0;
        let mut scratch = None;
        for at in large {
            let used = match scratch.take() {
                Some(scratch) => scratch,
                None => Scratch::new(threads as u32).map_err(|e| self.failed(e))?,
            };
            scratch = Some(self.write_large(at, used, &mut output)?);
            done += self.bytes(at);
            progress(done);
        }
        // Largest first, so that the workers end together.
        small.sort_by_key(|&at| std::cmp::Reverse(self.bytes(at)));
        let next = AtomicUsize::new(0);
        let done = AtomicU64::new(done);
        let output = Mutex::new(output);
        (0..threads.min(small.len())).into_par_iter().with_max_len(1).try_for_each(|_| {
            let mut scratch = Scratch::new(1).map_err(|e| self.failed(e))?;
            let mut pieces = Pieces::default();
            let (mut xor, mut values) = (Vec::new(), Vec::new());
            while let Some(&at) = small.get(next.fetch_add(1, Ordering::Relaxed)) {
                xor.clear();
                values.clear();
                let (summary, used) = self.feed(at, scratch, &mut pieces, &mut xor, &mut values)?;
                scratch = used;
                if summary.changed_bytes > 0 {
                    self.append(at, &summary, &xor, &values, &mut output.lock())?;
                }
                progress(done.fetch_add(self.bytes(at), Ordering::Relaxed) + self.bytes(at));
            }
            Ok::<(), CommitError>(())
        })?;
        let Output { totals, names, .. } = output.into_inner();
        Ok((totals, names))
    }

    fn tensor(&self, (shard, tensor): (usize, usize)) -> &TensorLayout {
        &self.layout.shards[shard].tensors[tensor]
    }

    fn bytes(&self, at: (usize, usize)) -> u64 {
        self.tensor(at).end - self.tensor(at).start
    }

    fn failed(&self, e: std::io::Error) -> CommitError {
        self.layout.io("write", LOG, e)
    }

    /// A tensor too large to have its delta in memory goes to the files as it is made.
    fn write_large(&self, at: (usize, usize), scratch: Scratch, output: &mut Output) -> Result<Scratch, CommitError> {
        let name = &self.tensor(at).name;
        let Output { xor, values, .. } = output;
        xor.begin(name);
        values.begin(name);
        let (summary, scratch) = self.feed(at, scratch, &mut Pieces::default(), &mut **xor, &mut **values)?;
        xor.end();
        values.end();
        output.note(name, &summary);
        Ok(scratch)
    }

    fn append(
        &self,
        at: (usize, usize),
        summary: &Summary,
        xor: &[u8],
        values: &[u8],
        output: &mut Output,
    ) -> Result<(), CommitError> {
        let name = &self.tensor(at).name;
        for (file, bytes) in [(&mut *output.xor, xor), (&mut *output.values, values)] {
            file.begin(name);
            file.write_all(bytes).map_err(|e| self.failed(e))?;
            file.end();
        }
        output.note(name, summary);
        Ok(())
    }

    /// Sends a tensor's old and new bytes through an encoder, in pieces that end on blocks.
    fn feed<X: Write, V: Write>(
        &self,
        (shard, tensor): (usize, usize),
        scratch: Scratch,
        Pieces { old, new }: &mut Pieces,
        xor: X,
        values: V,
    ) -> Result<(Summary, Scratch), CommitError> {
        let io = |e| self.failed(e);
        let TensorLayout { start, end, element, .. } = *self.tensor((shard, tensor));
        let name = &self.layout.shards[shard].name;
        let file = self.storage.open(name, Access::Read).map_err(|e| self.layout.io("open", name, e))?;
        let mut committed = Replay::new(self.layout, shard, file, self.layers);
        let mut encoder = DeltaEncoder::new(scratch, xor, values, end - start, element).map_err(io)?;
        let mut at = start;
        while at < end {
            let stop = ((at / PIECE + 1) * PIECE).min(end);
            old.resize((stop - at) as usize, 0);
            committed.read(at, old, |_| ())?;
            if let NewBytes::Staged(staged) = self.new
                && let Some(new) = staged.whole(shard, at, stop)
            {
                encoder.push(old, new).map_err(io)?;
                at = stop;
                continue;
            }
            new.clone_from(old);
            let any = match self.new {
                NewBytes::Staged(staged) => staged.overlay(shard, at, new),
                NewBytes::Streamed(streamed) => streamed.overlay(self.layout, shard, at, new)?,
            };
            match any {
                true => encoder.push(old, new),
                false => encoder.push_unchanged(old),
            }
            .map_err(io)?;
            at = stop;
        }
        let (summary, _, _, scratch) = encoder.finish().map_err(io)?;
        Ok((summary, scratch))
    }
}

/// Old and new bytes of the piece at hand.
#[derive(Default)]
struct Pieces {
    old: Vec<u8>,
    new: Vec<u8>,
}

impl Output<'_> {
    fn note(&mut self, tensor: &str, summary: &Summary) {
        self.totals.changed_elements += summary.changed_elements;
        self.totals.changed_bytes += summary.changed_bytes;
        self.names.push(tensor.to_string());
        self.xor.metadata(tensor, hex(summary.checksum));
    }
}
