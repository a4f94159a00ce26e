//! Weights on a device, many blocks at a time: what the device hashes where it is, what it gathers, and what is put
//! together here from pieces that it gathered (casts, transposed rows, blocks on two devices, ends of files).

use super::shard::{Attached, Extent};
use super::tensor::copy;
use super::{BATCH, ImageError, Part, ShardBytes, differing};
use crate::memory::{Accelerator, BLOCK, DeviceRange, Hash, Memory, MemoryError, Piece, Span, Strided, hash_into};
use parking_lot::Mutex;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Runs and spans of one plan, some hundred megabytes of them at most: tensors cut into rows have several for each block.
const PLAN_ENTRIES: usize = 2 << 20;
/// Hashes that one task compares.
const COMPARE: usize = 16 << 10;

/// Blocks of shards.
type Blocks = Vec<(usize, Range<u64>)>;

/// The plan for the blocks that were asked for last: usually all that are live.
#[derive(Debug, Default)]
pub(super) struct Plans(Mutex<Option<(Blocks, Arc<Vec<Plan>>)>>);

/// Who hashes which blocks.
#[derive(Debug, Default)]
struct Plan {
    devices: Vec<DevicePlan>,
    /// What no device can hash by itself.
    rest: Blocks,
}

#[derive(Debug)]
struct DevicePlan {
    accelerator: Arc<dyn Accelerator>,
    runs: Vec<Run>,
    /// Blocks that are put together from spans: shard and number of each.
    blocks: Vec<(usize, u64)>,
    spans: Vec<PlannedSpan>,
    /// Where each block's spans start in `spans`, and the end of the last one's.
    starts: Vec<u32>,
}

/// Consecutive blocks of a shard that lie in a row in one memory.
#[derive(Debug)]
struct Run {
    shard: usize,
    first: u64,
    blocks: u64,
    memory: Arc<dyn Memory>,
    offset: u64,
}

#[derive(Debug)]
struct PlannedSpan {
    memory: usize,
    offset: u64,
    at: u32,
    bytes: u32,
}

/// What reading a part asks of memories: a stand-in for the copies themselves.
struct Asked {
    memory: usize,
    run: Strided,
    /// Where in the part the bytes belong; `None` when they are cast first.
    at: Option<usize>,
    bytes: usize,
}

fn same(a: &Arc<dyn Accelerator>, b: &Arc<dyn Accelerator>) -> bool {
    std::ptr::addr_eq(Arc::as_ptr(a), Arc::as_ptr(b))
}

impl Plan {
    fn entries(&self) -> usize {
        self.rest.len() + self.devices.iter().map(|d| d.runs.len() + d.spans.len()).sum::<usize>()
    }

    fn device(&mut self, accelerator: Arc<dyn Accelerator>) -> &mut DevicePlan {
        let found = self.devices.iter().position(|d| same(&d.accelerator, &accelerator));
        let i = found.unwrap_or_else(|| {
            let (runs, blocks, spans) = Default::default();
            self.devices.push(DevicePlan { accelerator, runs, blocks, spans, starts: vec![0] });
            self.devices.len() - 1
        });
        &mut self.devices[i]
    }

    fn add_rest(&mut self, shard: usize, block: u64) {
        match self.rest.last_mut() {
            Some((s, range)) if *s == shard && range.end == block => range.end += 1,
            _ => self.rest.push((shard, block..block + 1)),
        }
    }
}

/// Finds out where the blocks of `ranges` lie. `ready` is given a plan each time one is large enough.
fn plan(
    image: &Attached,
    ranges: &[(usize, Range<u64>)],
    mut ready: impl FnMut(Plan) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let mut plan = Plan::default();
    let mut scratch = vec![0; BLOCK];
    for (shard, range) in ranges {
        let mut block = range.start;
        while block < range.end {
            if plan.entries() >= PLAN_ENTRIES {
                ready(std::mem::take(&mut plan))?;
            }
            let at = block * BLOCK as u64;
            if let Some((memory, offset, len)) = image.direct(*shard, at)
                && let Some(device) = memory.device()
                && len >= BLOCK as u64
            {
                let blocks = (len / BLOCK as u64).min(range.end - block);
                let run = Run { shard: *shard, first: block, blocks, memory: memory.clone(), offset };
                plan.device(device.accelerator()).runs.push(run);
                block += blocks;
                continue;
            }
            plan_block(image, *shard, block, &mut scratch, &mut plan)?;
            block += 1;
        }
    }
    ready(plan)
}

/// A block that lies in pieces: spans for its device, if one has all of them as they are in the file.
fn plan_block(
    image: &Attached,
    shard: usize,
    block: u64,
    scratch: &mut [u8],
    plan: &mut Plan,
) -> Result<(), ImageError> {
    let at = block * BLOCK as u64;
    if at + BLOCK as u64 > image.shard_bytes(shard) {
        plan.add_rest(shard, block);
        return Ok(());
    }
    let live = image.extents_from(shard, at).iter().take_while(|e| e.range().start < at + BLOCK as u64);
    if !live.into_iter().all(|e| matches!(e, Extent::Live(t) if !t.needs_base())) {
        plan.add_rest(shard, block);
        return Ok(());
    }
    let asked = ask(image, shard, at, scratch)?;
    let memories = &image.source().memories;
    let accelerator = memories[asked[0].memory].device().map(|d| d.accelerator());
    let whole = |a: &Asked| {
        let device = memories[a.memory].device().map(|d| d.accelerator());
        let here = device.zip(accelerator.as_ref()).is_some_and(|(a, b)| same(&a, b));
        here && a.at.is_some() && a.run.stride == a.run.element as u64
    };
    let accelerator = match &accelerator {
        Some(accelerator) if asked.iter().all(whole) => accelerator.clone(),
        _ => {
            plan.add_rest(shard, block);
            return Ok(());
        }
    };
    let device = plan.device(accelerator);
    for a in asked {
        let at = a.at.unwrap_or_default() as u32;
        device.spans.push(PlannedSpan { memory: a.memory, offset: a.run.offset, at, bytes: a.bytes as u32 });
    }
    device.blocks.push((shard, block));
    device.starts.push(device.spans.len() as u32);
    Ok(())
}

/// Walks through a read without the copies. What is not live is read into `dst`, and what is in host memory.
fn ask(image: &Attached, shard: usize, offset: u64, dst: &mut [u8]) -> Result<Vec<Asked>, ImageError> {
    let mut asked = Vec::new();
    let within = dst.as_ptr_range();
    image.read_with(shard, offset, dst, &mut |number, memory, run, out| {
        let at = within.contains(&out.as_ptr()).then(|| out.as_ptr() as usize - within.start as usize);
        if memory.device().is_none() {
            copy(number, memory, run, out)?;
        }
        asked.push(Asked { memory: number, run, at, bytes: out.len() });
        Ok(())
    })?;
    Ok(asked)
}

/// See [`ShardBytes::changed`].
pub(super) fn changed(
    image: &Attached,
    ranges: &[(usize, Range<u64>)],
    known: &[&[Hash]],
) -> Result<Blocks, ImageError> {
    let found = Mutex::new(Vec::new());
    let cached = image.plans.0.lock().as_ref().filter(|(asked, _)| asked == ranges).map(|(_, plans)| plans.clone());
    match cached {
        Some(plans) => plans.iter().try_for_each(|p| run(image, p, known, &found))?,
        None => {
            let mut plans = Vec::new();
            let mut many = false;
            plan(image, ranges, |plan| {
                run(image, &plan, known, &found)?;
                many |= plan.entries() >= PLAN_ENTRIES;
                if !many {
                    plans.push(plan);
                }
                Ok(())
            })?;
            if !many {
                *image.plans.0.lock() = Some((ranges.to_vec(), Arc::new(plans)));
            }
        }
    }
    let mut found = found.into_inner();
    found.sort_unstable_by_key(|(shard, range): &(usize, Range<u64>)| (*shard, range.start));
    let mut merged: Blocks = Vec::with_capacity(found.len());
    for (shard, range) in found {
        match merged.last_mut() {
            Some((s, last)) if *s == shard && last.end == range.start => last.end = range.end,
            _ => merged.push((shard, range)),
        }
    }
    Ok(merged)
}

/// Devices hash beside each other, and beside the processor.
fn run(image: &Attached, plan: &Plan, known: &[&[Hash]], found: &Mutex<Blocks>) -> Result<(), ImageError> {
    let rest = || rest(image, &plan.rest, known, found);
    if let [device] = &plan.devices[..]
        && plan.rest.is_empty()
    {
        return device.run(image, known, found);
    }
    std::thread::scope(|scope| {
        let devices = plan.devices.iter().map(|d| scope.spawn(move || d.run(image, known, found)));
        let devices: Vec<_> = devices.collect();
        let mut result = rest();
        for device in devices {
            let done = device.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result = result.and(done);
        }
        result
    })
}

impl DevicePlan {
    fn run(&self, image: &Attached, known: &[&[Hash]], found: &Mutex<Blocks>) -> Result<(), ImageError> {
        if !self.blocks.is_empty() {
            self.hash_spans(image, known, found)?;
        }
        let range = |r: &Run| range_of(&*r.memory, r.offset, r.blocks * BLOCK as u64);
        let ranges = self.runs.iter().map(range).collect::<Result<Vec<DeviceRange>, _>>()?;
        let mut starts = Vec::with_capacity(self.runs.len());
        let mut total = 0;
        for run in &self.runs {
            starts.push(total);
            total += run.blocks;
        }
        self.accelerator.hash_runs(&ranges, &mut |first, hashes| {
            // Cut where runs end, and small enough for a task.
            let mut parts: Vec<(usize, u64, &[Hash])> = Vec::new();
            let mut done = 0;
            while done < hashes.len() {
                let at = first + done as u64;
                let i = starts.partition_point(|s| *s <= at) - 1;
                let run = &self.runs[i];
                let left = (starts[i] + run.blocks - at) as usize;
                let n = left.min(hashes.len() - done).min(COMPARE);
                parts.push((run.shard, run.first + (at - starts[i]), &hashes[done..done + n]));
                done += n;
            }
            parts.into_par_iter().for_each(|(shard, first, hashes)| {
                let mut changed = Vec::new();
                differing(shard, first, hashes, known[shard], &mut changed);
                if !changed.is_empty() {
                    found.lock().append(&mut changed);
                }
            });
        })?;
        Ok(())
    }

    fn hash_spans(&self, image: &Attached, known: &[&[Hash]], found: &Mutex<Blocks>) -> Result<(), ImageError> {
        let memories = &image.source().memories;
        let span = |s: &PlannedSpan| {
            let range = range_of(&*memories[s.memory], s.offset, s.bytes as u64)?;
            Ok(Span { range, at: s.at })
        };
        let spans = self.spans.iter().map(span).collect::<Result<Vec<_>, MemoryError>>()?;
        let hashes = self.accelerator.hash_spans(&spans, &self.starts)?;
        let mut changed = Vec::new();
        for ((shard, block), hash) in self.blocks.iter().zip(hashes) {
            differing(*shard, *block, &[hash], known[*shard], &mut changed);
        }
        found.lock().append(&mut changed);
        Ok(())
    }
}

fn range_of(memory: &dyn Memory, offset: u64, bytes: u64) -> Result<DeviceRange, MemoryError> {
    match memory.device() {
        Some(device) => device.range(offset, bytes),
        None => unreachable!("only memories of devices are planned for"),
    }
}

/// Blocks that are copied here to be hashed, or that lie here, so many together as one task takes.
fn rest(
    image: &Attached,
    blocks: &[(usize, Range<u64>)],
    known: &[&[Hash]],
    found: &Mutex<Blocks>,
) -> Result<(), ImageError> {
    let mut tasks: Vec<Blocks> = Vec::new();
    let mut room = 0;
    for (shard, range) in blocks {
        let mut at = range.start;
        while at < range.end {
            if room == 0 {
                tasks.push(Vec::new());
                room = BATCH;
            }
            let n = room.min(range.end - at);
            if let Some(task) = tasks.last_mut() {
                task.push((*shard, at..at + n));
            }
            (at, room) = (at + n, room - n);
        }
    }
    tasks.into_par_iter().try_for_each(|task| {
        let bytes = |(shard, range): &(usize, Range<u64>)| {
            (range.end * BLOCK as u64).min(image.shard_bytes(*shard)) - range.start * BLOCK as u64
        };
        let mut buffer = vec![0; task.iter().map(bytes).sum::<u64>() as usize];
        let mut parts = Vec::with_capacity(task.len());
        let mut left = &mut buffer[..];
        for blocks in &task {
            let (dst, after) = left.split_at_mut(bytes(blocks) as usize);
            parts.push(Part { shard: blocks.0, offset: blocks.1.start * BLOCK as u64, dst });
            left = after;
        }
        read_parts(image, &mut parts)?;
        let mut changed = Vec::new();
        for ((shard, range), part) in task.iter().zip(&parts) {
            let mut hashes = vec![0; (range.end - range.start) as usize];
            hash_into(part.dst, &mut hashes);
            differing(*shard, range.start, &hashes, known[*shard], &mut changed);
        }
        found.lock().append(&mut changed);
        Ok(())
    })
}

/// Pieces for one device, and where they go: into a part, or into the buffer of what is cast.
struct Gathering {
    accelerator: Arc<dyn Accelerator>,
    pieces: Vec<Placed>,
}

struct Placed {
    range: DeviceRange,
    element: usize,
    stride: u64,
    /// The part's number; `None` for the buffer.
    part: Option<usize>,
    at: usize,
    bytes: usize,
}

/// See [`ShardBytes::read_parts`].
pub(super) fn read_parts(image: &Attached, parts: &mut [Part<'_>]) -> Result<(), ImageError> {
    let memories = &image.source().memories;
    let mut gatherings: Vec<Gathering> = Vec::new();
    // Stretches of parts that hold casts: everything of a stretch goes through the buffer, in the order of its walk.
    let mut replayed: Vec<(usize, Range<usize>)> = Vec::new();
    let mut buffered = 0;
    for (p, part) in parts.iter_mut().enumerate() {
        for stretch in stretches(image, part.shard, part.offset, part.dst.len()) {
            let offset = part.offset + stretch.start as u64;
            let asked = ask(image, part.shard, offset, &mut part.dst[stretch.clone()])?;
            let is_placed = asked.iter().all(|a| a.at.is_some());
            if !is_placed {
                replayed.push((p, stretch.clone()));
            }
            for a in asked {
                let Some(device) = memories[a.memory].device() else { continue };
                let bytes = a.run.end().map_or(0, |end| end - a.run.offset);
                let (part, at) = match a.at.filter(|_| is_placed) {
                    Some(at) => (Some(p), stretch.start + at),
                    None => (None, buffered),
                };
                let (element, stride) = (a.run.element, a.run.stride);
                // Evenly strided without gaps is one element.
                let element = if stride == element as u64 { a.bytes } else { element };
                let range = device.range(a.run.offset, bytes)?;
                buffered += if part.is_none() { a.bytes } else { 0 };
                let accelerator = device.accelerator();
                let found = gatherings.iter().position(|g| same(&g.accelerator, &accelerator));
                let g = found.unwrap_or_else(|| {
                    gatherings.push(Gathering { accelerator, pieces: Vec::new() });
                    gatherings.len() - 1
                });
                gatherings[g].pieces.push(Placed { range, element, stride, part, at, bytes: a.bytes });
            }
        }
    }
    let mut buffer = vec![0; buffered];
    for gathering in &mut gatherings {
        gathering.pieces.sort_unstable_by_key(|p| (p.part, p.at));
        let mut pieces: Vec<Piece<'_>> = Vec::with_capacity(gathering.pieces.len());
        let mut wanted = gathering.pieces.iter().peekable();
        // `None` sorts first.
        place(&mut wanted, None, &mut buffer, &mut pieces);
        for (p, part) in parts.iter_mut().enumerate() {
            place(&mut wanted, Some(p), part.dst, &mut pieces);
        }
        gathering.accelerator.gather(&mut pieces)?;
    }
    let mut left = &buffer[..];
    for (p, stretch) in replayed {
        let part = &mut parts[p];
        let offset = part.offset + stretch.start as u64;
        image.read_with(part.shard, offset, &mut part.dst[stretch], &mut |number, memory, run, out| {
            if memory.device().is_none() {
                return copy(number, memory, run, out);
            }
            let (fetched, after) = left.split_at(out.len());
            out.copy_from_slice(fetched);
            left = after;
            Ok(())
        })?;
    }
    Ok(())
}

/// Cuts a part where extents of its shard end, so that a cast tensor does not make its neighbours take the longer way.
fn stretches(image: &Attached, shard: usize, offset: u64, len: usize) -> Vec<Range<usize>> {
    let end = offset + len as u64;
    let extents = image.extents_from(shard, offset).iter().map(Extent::range).take_while(|r| r.start < end);
    extents.map(|r| (r.start.max(offset) - offset) as usize..(r.end.min(end) - offset) as usize).collect()
}

/// Makes pieces of those that go into `dst`, which come in the order of their places.
fn place<'a, 'b>(
    wanted: &mut std::iter::Peekable<impl Iterator<Item = &'b Placed>>,
    part: Option<usize>,
    dst: &'a mut [u8],
    pieces: &mut Vec<Piece<'a>>,
) {
    let mut rest = dst;
    let mut at = 0;
    while let Some(placed) = wanted.next_if(|p| p.part == part) {
        let (_, tail) = rest.split_at_mut(placed.at - at);
        let (dst, tail) = tail.split_at_mut(placed.bytes);
        pieces.push(Piece { range: placed.range.clone(), element: placed.element, stride: placed.stride, dst });
        (rest, at) = (tail, placed.at + placed.bytes);
    }
}

#[cfg(test)]
mod tests;
