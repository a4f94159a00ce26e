//! Hashing blocks where they are. The kernel runs over a gibibyte of weights at a time while the hashes of the one before
//! are on their way to the host and those before them are looked at.

use super::error::Doing;
use super::gpu::wait;
use super::{CudaError, Device, DeviceBuffer, PinnedBuffer, Priority, Ptx};
use crate::memory::{BLOCK, DeviceRange, Hash, Span};
use cudarc::driver::{CudaEvent, CudaStream, LaunchConfig, PushKernelArg, sys};
use std::sync::Arc;

static HASH: Ptx = Ptx { name: "hash", baseline: (75, include_str!("kernels/hash.ptx")), exact: &[] };

/// Blocks of one launch: 1 GiB of weights, a quarter of a millisecond on an H200, 4 MiB of hashes.
const LAUNCH_BLOCKS: u64 = 1 << 18;
const HASH_BYTES: usize = size_of::<Hash>();
/// Launches under way.
const SLOTS: usize = 4;
/// Of a table that tells the kernel where blocks are.
const TABLE_BYTES: u64 = 1 << 20;
const THREADS: u32 = 256;
/// Threads that share a block.
const LANES: u32 = 8;
/// Blocks that one thread block of `hash_spans` hashes.
const SPAN_WARPS: u32 = 4;

#[derive(Debug)]
pub(super) struct Hasher {
    compute: Arc<CudaStream>,
    copy: Arc<CudaStream>,
    slots: Vec<Slot>,
    table: PinnedBuffer,
    device_table: DeviceBuffer,
}

#[derive(Debug)]
struct Slot {
    hashed: CudaEvent,
    copied: CudaEvent,
    device: DeviceBuffer,
    host: PinnedBuffer,
}

/// As kernels/hash.cu has it.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawRun {
    address: u64,
    first: u64,
}

/// As kernels/hash.cu has it.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawSpan {
    address: u64,
    at: u32,
    bytes: u32,
}

impl Hasher {
    /// What one takes on the host, and as much on the device.
    pub const BYTES: u64 = SLOTS as u64 * LAUNCH_BLOCKS * HASH_BYTES as u64 + TABLE_BYTES;

    pub fn new(device: &Arc<Device>) -> Result<Hasher, CudaError> {
        let bytes = LAUNCH_BLOCKS as usize * HASH_BYTES;
        let slot = || -> Result<Slot, CudaError> {
            Ok(Slot {
                hashed: device.event()?,
                copied: device.event()?,
                device: device.alloc(bytes as u64)?,
                host: PinnedBuffer::new(device, bytes)?,
            })
        };
        Ok(Hasher {
            compute: device.stream(Priority::High)?,
            copy: device.stream(Priority::High)?,
            slots: (0..SLOTS).map(|_| slot()).collect::<Result<_, _>>()?,
            table: PinnedBuffer::new(device, TABLE_BYTES as usize)?,
            device_table: device.alloc(TABLE_BYTES)?,
        })
    }

    /// After an error: nothing of ours is under way any more.
    pub fn drain(&self) -> Result<(), CudaError> {
        self.compute.synchronize().doing("finish")?;
        self.copy.synchronize().doing("finish")
    }

    /// Puts a table on the device.
    fn upload<T: Copy>(&mut self, at: usize, rows: &[T]) -> Result<u64, CudaError> {
        let bytes = size_of_val(rows);
        // SAFETY: plain old data without padding, read as bytes.
        let raw = unsafe { std::slice::from_raw_parts(rows.as_ptr().cast::<u8>(), bytes) };
        self.table[at..at + bytes].copy_from_slice(raw);
        let address = self.device_table.address() + at as u64;
        // SAFETY: both tables have room, and nobody touches them until the stream was waited for.
        unsafe {
            sys::cuMemcpyHtoDAsync_v2(address, self.table[at..].as_ptr().cast(), bytes, self.compute.cu_stream())
        }
        .doing("copy to the device")?;
        Ok(address)
    }

    pub fn runs(
        &mut self,
        device: &Arc<Device>,
        runs: &[DeviceRange],
        each: &mut dyn FnMut(u64, &[Hash]),
    ) -> Result<(), CudaError> {
        // The runs of one table are launched together.
        let rows = TABLE_BYTES as usize / size_of::<RawRun>() - 1;
        let mut first = 0;
        for runs in runs.chunks(rows) {
            first = self.runs_of_a_table(device, runs, first, each)?;
        }
        Ok(())
    }

    fn runs_of_a_table(
        &mut self,
        device: &Arc<Device>,
        runs: &[DeviceRange],
        before: u64,
        each: &mut dyn FnMut(u64, &[Hash]),
    ) -> Result<u64, CudaError> {
        let mut raw = Vec::with_capacity(runs.len() + 1);
        let mut blocks = 0;
        for run in runs {
            raw.push(RawRun { address: run.address(), first: blocks });
            blocks += run.bytes() / BLOCK as u64;
        }
        raw.push(RawRun { address: 0, first: blocks });
        let aligned = runs.iter().all(|r| r.address() % 8 == 0);
        let function = device.function(&HASH, if aligned { "hash_runs_aligned" } else { "hash_runs_unaligned" })?;
        let table = self.upload(0, &raw)?;
        let launches: Vec<u64> = (0..blocks).step_by(LAUNCH_BLOCKS as usize).collect();
        let size = |i: usize| LAUNCH_BLOCKS.min(blocks - launches[i]) as u32;
        for i in 0..launches.len() + SLOTS - 1 {
            if let Some(&from) = launches.get(i) {
                let (count, n) = (runs.len() as u32, size(i));
                let slot = &self.slots[i % SLOTS];
                let out = slot.device.address();
                let config = LaunchConfig {
                    grid_dim: ((n * LANES).div_ceil(THREADS), 1, 1),
                    block_dim: (THREADS, 1, 1),
                    shared_mem_bytes: 0,
                };
                let mut launch = self.compute.launch_builder(&function);
                launch.arg(&table).arg(&count).arg(&from).arg(&n).arg(&out);
                // SAFETY: the kernel's five arguments; runs are mapped (their memories are held by the ranges), the
                // slot's buffer has room for a launch's hashes, and what was in it before was waited for below.
                unsafe { launch.launch(config) }.doing("hash")?;
                slot.hashed.record(&self.compute).doing("record an event")?;
                self.copy.wait(&slot.hashed).doing("wait for an event")?;
                self.fetch(i % SLOTS, n)?;
            }
            // The launch that is SLOTS - 1 behind: its slot is the next one's.
            if let Some(done) = (i + 1).checked_sub(SLOTS).filter(|d| *d < launches.len()) {
                let slot = &self.slots[done % SLOTS];
                wait(&slot.copied)?;
                each(before + launches[done], hashes(&slot.host, size(done)));
            }
        }
        Ok(before + blocks)
    }

    /// Starts the copy of a slot's first `n` hashes to the host.
    fn fetch(&mut self, slot: usize, n: u32) -> Result<(), CudaError> {
        let slot = &mut self.slots[slot];
        let bytes = n as usize * HASH_BYTES;
        // SAFETY: both buffers have room; the host's is not read before the event was waited for.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                slot.host.as_mut_ptr().cast(),
                slot.device.address(),
                bytes,
                self.copy.cu_stream(),
            )
        }
        .doing("copy hashes")?;
        slot.copied.record(&self.copy).doing("record an event")
    }

    pub fn spans(&mut self, device: &Arc<Device>, spans: &[Span], starts: &[u32]) -> Result<Vec<Hash>, CudaError> {
        let function = device.function(&HASH, "hash_spans")?;
        let mut out = Vec::with_capacity(starts.len() - 1);
        let mut from = 0;
        while from + 1 < starts.len() {
            // As many blocks as the tables take, at least one: a block has at most 4096 spans.
            let first = starts[from];
            let fits = |to: &usize| {
                let spans = (starts[*to] - first) as usize * size_of::<RawSpan>();
                spans + (to - from + 1) * size_of::<u32>() <= TABLE_BYTES as usize
                    && to - from <= LAUNCH_BLOCKS as usize
            };
            let to = (from + 1..starts.len()).take_while(fits).last().unwrap_or(from + 1);
            let raw: Vec<RawSpan> = spans[first as usize..starts[to] as usize]
                .iter()
                .map(|s| RawSpan { address: s.range.address(), at: s.at, bytes: s.range.bytes() as u32 })
                .collect();
            let local: Vec<u32> = starts[from..=to].iter().map(|s| s - first).collect();
            let table = self.upload(0, &raw)?;
            let rows = self.upload(size_of_val(&raw[..]), &local)?;
            let n = (to - from) as u32;
            let address = self.slots[0].device.address();
            let config = LaunchConfig {
                grid_dim: (n.div_ceil(SPAN_WARPS), 1, 1),
                block_dim: (SPAN_WARPS * 32, 1, 1),
                shared_mem_bytes: 0,
            };
            let mut launch = self.compute.launch_builder(&function);
            launch.arg(&table).arg(&rows).arg(&n).arg(&address);
            // SAFETY: the kernel's four arguments; spans are mapped and lie inside their block, as `Span` promises.
            unsafe { launch.launch(config) }.doing("hash")?;
            self.slots[0].hashed.record(&self.compute).doing("record an event")?;
            self.copy.wait(&self.slots[0].hashed).doing("wait for an event")?;
            self.fetch(0, n)?;
            wait(&self.slots[0].copied)?;
            out.extend_from_slice(hashes(&self.slots[0].host, n));
            from = to;
        }
        Ok(out)
    }
}

fn hashes(bytes: &[u8], n: u32) -> &[Hash] {
    // SAFETY: any bytes are a hash; what is not aligned for it (nothing: pinned memory starts with a page) is left out.
    let (before, hashes, _) = unsafe { bytes[..n as usize * HASH_BYTES].align_to::<Hash>() };
    debug_assert!(before.is_empty());
    hashes
}
