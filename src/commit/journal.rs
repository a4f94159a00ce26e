//! Log: compares changed blocks with the bytes they replace, and writes the record of the changed elements.
//!
//! Tensors are encoded on all cores, and appended as they are ready. The new bytes come from the staged copies, or, when
//! those would take more memory than allowed, from the live weights piece by piece.

use super::blocks::{Change, Table};
use super::container::ContainerWriter;
use super::delta::{DeltaEncoder, Difference, Scratch, Summary};
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
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Tensors of which more bytes than this may have changed are encoded one by one, all cores on each, straight into the
/// files. Of the others each core has the delta of one in memory, which is at most a little over twice that.
const LARGE: u64 = 16 << 20;
/// Bytes of a tensor that one core compares at a time: old and new ones, and what they make, fit its cache.
const PIECE: u64 = 256 << 10;
/// Pieces of a large tensor compared at the same time, for each core.
const PIECES: usize = 4;

/// What a core's encoders take: their windows, tables and what waits between them (zstd, level of `container`).
const ENCODERS: u64 = 8 << 20;

/// Bytes of memory that it takes to encode changes of `all` bytes of tensors, at most; staged blocks not included.
pub fn working_bytes(all: u64) -> u64 {
    let deltas = 2 * LARGE.min(all);
    let pieces = PIECES as u64 * 3 * PIECE.min(all);
    rayon::current_num_threads() as u64 * (deltas + pieces + ENCODERS)
}

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

    /// The changes of all blocks, once every tensor was encoded, in order.
    pub fn into_changes(self) -> Result<Vec<Change>, CommitError> {
        // What was read from an engine that is gone by now may be anything: its memory is somebody else's.
        self.live.check()?;
        let mut changes = self.seen.into_inner();
        changes.sort_by_key(|c| (c.shard, c.first));
        Ok(changes)
    }

    /// The bytes of the changed runs that overlap `start..end` of a shard.
    fn overlapping(&self, layout: &Layout, shard: usize, start: u64, end: u64) -> impl Iterator<Item = Range<u64>> {
        let from = self.runs.partition_point(|r| (r.shard, r.bytes(layout).end) <= (shard, start));
        let inside = self.runs[from..].iter().take_while(move |r| r.shard == shard).map(|r| r.bytes(layout));
        inside.take_while(move |r| r.start < end)
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
            let known = &self.table.0[shard][first as usize..(first + count) as usize];
            let changes = Change::differing(shard, first, &hashes, known);
            self.seen.lock().extend(changes);
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
        let (large, mut small): (Vec<_>, Vec<_>) = tensors.iter().partition(|&&at| self.changed_at_most(at) > LARGE);
        let mut done = 0;
        let mut scratch = None;
        let mut pieces = Pieces::new(threads * PIECES);
        for at in large {
            let used = match scratch.take() {
                Some(scratch) => scratch,
                None => Scratch::new(threads as u32).map_err(|e| self.failed(e))?,
            };
            scratch = Some(self.write_large(at, used, &mut pieces, &mut output)?);
            done += self.bytes(at);
            progress(done);
        }
        drop(pieces);
        // Largest first, so that the workers end together.
        small.sort_by_key(|&at| std::cmp::Reverse(self.bytes(at)));
        let next = AtomicUsize::new(0);
        let done = AtomicU64::new(done);
        let output = Mutex::new(output);
        (0..threads.min(small.len())).into_par_iter().with_max_len(1).try_for_each(|_| {
            let mut scratch = Scratch::new(1).map_err(|e| self.failed(e))?;
            let mut pieces = Pieces::new(1);
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

    /// Bytes of a tensor that may have changed.
    fn changed_at_most(&self, at: (usize, usize)) -> u64 {
        let TensorLayout { start, end, .. } = *self.tensor(at);
        let inside = |from: u64, to: u64| to.min(end).saturating_sub(from.max(start));
        match self.new {
            NewBytes::Staged(staged) => {
                staged.overlapping(at.0, start, end).iter().map(|r| inside(r.start(), r.end())).sum()
            }
            NewBytes::Streamed(streamed) => {
                streamed.overlapping(self.layout, at.0, start, end).map(|r| inside(r.start, r.end)).sum()
            }
        }
    }

    fn failed(&self, e: std::io::Error) -> CommitError {
        self.layout.io("write", LOG, e)
    }

    /// A tensor too large to have its delta in memory goes to the files as it is made.
    fn write_large(
        &self,
        at: (usize, usize),
        scratch: Scratch,
        pieces: &mut Pieces,
        output: &mut Output,
    ) -> Result<Scratch, CommitError> {
        let name = &self.tensor(at).name;
        let Output { xor, values, .. } = output;
        xor.begin(name);
        values.begin(name);
        let (summary, scratch) = self.feed(at, scratch, pieces, &mut **xor, &mut **values)?;
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
        Pieces(pieces): &mut Pieces,
        xor: X,
        values: V,
    ) -> Result<(Summary, Scratch), CommitError> {
        let io = |e| self.failed(e);
        let TensorLayout { start, end, element, .. } = *self.tensor((shard, tensor));
        let name = &self.layout.shards[shard].name;
        let file = self.storage.open(name, Access::Read).map_err(|e| self.layout.io("open", name, e))?;
        let mut committed = Replay::new(self.layout, shard, file.clone(), self.layers);
        let mut encoder = DeltaEncoder::new(scratch, xor, values, end - start, element).map_err(io)?;
        let mut at = start;
        while at < end {
            let mut used = 0;
            for piece in pieces.iter_mut() {
                if at == end {
                    break;
                }
                let stop = ((at / PIECE + 1) * PIECE).min(end);
                piece.start = at;
                piece.old.resize((stop - at) as usize, 0);
                (at, used) = (stop, used + 1);
            }
            let pieces = &mut pieces[..used];
            // Commits that are only in the log yet are read from front to back; files that hold them all, anyhow.
            if !self.layers.is_empty() {
                pieces.iter_mut().try_for_each(|p| committed.read(p.start, &mut p.old, |_| ()))?;
            }
            pieces.par_iter_mut().try_for_each(|p| {
                if self.layers.is_empty() {
                    file.read_exact_at(&mut p.old, p.start).map_err(|e| self.layout.io("read", name, e))?;
                }
                self.compare(shard, element, p)
            })?;
            for piece in pieces {
                match piece.found {
                    Found::Same => encoder.push_unchanged(&piece.old),
                    Found::New => encoder.push(&piece.new, &piece.difference),
                    Found::Staged => {
                        let stop = piece.start + piece.old.len() as u64;
                        encoder.push(self.new.whole(shard, piece.start, stop).unwrap_or(&piece.new), &piece.difference)
                    }
                }
                .map_err(io)?;
            }
        }
        let (summary, _, _, scratch) = encoder.finish().map_err(io)?;
        Ok((summary, scratch))
    }

    /// Finds the new bytes of a piece whose old ones are there, and what differs.
    fn compare(&self, shard: usize, element: usize, piece: &mut Piece) -> Result<(), CommitError> {
        let Piece { start, old, new, difference, found } = piece;
        if let Some(new) = self.new.whole(shard, *start, *start + old.len() as u64) {
            difference.compare(old, new, element);
            *found = Found::Staged;
            return Ok(());
        }
        new.clone_from(old);
        let any = match self.new {
            NewBytes::Staged(staged) => staged.overlay(shard, *start, new),
            NewBytes::Streamed(streamed) => streamed.overlay(self.layout, shard, *start, new)?,
        };
        *found = Found::Same;
        if any {
            difference.compare(old, new, element);
            *found = Found::New;
        }
        Ok(())
    }
}

impl NewBytes<'_> {
    /// The bytes `start..end` of a shard where all of them are staged in one piece.
    fn whole(&self, shard: usize, start: u64, end: u64) -> Option<&[u8]> {
        match self {
            NewBytes::Staged(staged) => staged.whole(shard, start, end),
            NewBytes::Streamed(_) => None,
        }
    }
}

/// The pieces at hand, kept for their memory.
struct Pieces(Vec<Piece>);

#[derive(Default)]
struct Piece {
    start: u64,
    old: Vec<u8>,
    new: Vec<u8>,
    difference: Difference,
    found: Found,
}

/// Where a piece's new bytes are.
#[derive(Default, Clone, Copy)]
enum Found {
    /// They are the old ones.
    #[default]
    Same,
    New,
    Staged,
}

impl Pieces {
    fn new(pieces: usize) -> Pieces {
        Pieces((0..pieces).map(|_| Piece::default()).collect())
    }
}

impl Output<'_> {
    fn note(&mut self, tensor: &str, summary: &Summary) {
        self.totals.changed_elements += summary.changed_elements;
        self.totals.changed_bytes += summary.changed_bytes;
        self.names.push(tensor.to_string());
        self.xor.metadata(tensor, hex(summary.checksum));
    }
}
