//! A GPU at work for us: copies between its memory and the host's, one lane a caller; gathering; hashing.

use super::error::Doing;
use super::hasher::Hasher;
use super::pinned::is_pinned;
use super::pool::Pool;
use super::{CudaError, Device, DeviceBuffer, PinnedBuffer, PinnedMapping, Priority, Ptx};
use crate::memory::{Accelerator, DeviceRange, Hash, HostBuffer, MemoryError, Piece, Span, Strided, WorkingMemory};
use cudarc::driver::{CudaEvent, CudaStream, LaunchConfig, PushKernelArg, sys};
use parking_lot::Mutex;
use std::any::Any;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Weak};

static GATHER: Ptx = Ptx { name: "gather", baseline: (75, include_str!("kernels/gather.ptx")), exact: &[] };

/// Pinned bytes of a lane: copies run at full speed from this size on, and a read of the kernel's is a quarter of it.
const LANE_BYTES: usize = 4 << 20;
/// Two copies of a lane are in flight, one on the bus and one in the processor's hands.
const HALF: usize = LANE_BYTES / 2;
/// Lanes at most: more threads than this wait for one to be free, while the bus is busy with the others.
const MAX_LANES: usize = 16;
/// What the copy engine takes over from the kernel that gathers: below, its start costs more than its speed gains.
const ENGINE_BYTES: usize = 512 << 10;
/// One warp of the kernel copies that much at a time.
const WARP_BYTES: u64 = 8 << 10;
/// Pieces of one launch.
const LAUNCH_PIECES: usize = 8192;
/// Polled that often before the thread goes to sleep: small copies are through by then.
const SPINS: usize = 2000;

/// Of a lane's table on the host, and of its copy on the device.
const TABLE_BYTES: usize = LAUNCH_PIECES * size_of::<RawStrided>();
/// A search for changed blocks is one; a commit and a move of the view may search at once.
const USUAL_HASHERS: usize = 2;

/// One device, shared by all memories on it.
#[derive(Debug)]
pub struct Gpu {
    device: Arc<Device>,
    lanes: Pool<Lane>,
    /// Without a limit: who hashes may run other tasks of the thread pool meanwhile, and those hash as well.
    hashers: Pool<Hasher>,
    /// Pinned memory that was given back.
    staging: Arc<Mutex<Vec<PinnedBuffer>>>,
}

/// A stream with a pinned buffer and room for the descriptions of pieces.
#[derive(Debug)]
struct Lane {
    stream: Arc<CudaStream>,
    done: [CudaEvent; 2],
    pinned: PinnedBuffer,
    table: PinnedBuffer,
    device_table: DeviceBuffer,
}

/// As kernels/gather.cu has it.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawPiece {
    from: u64,
    to: u64,
    bytes: u64,
}

/// As kernels/gather.cu has it.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawStrided {
    from: u64,
    to: u64,
    stride: u64,
    element: u32,
    count: u32,
}

static OPEN: Mutex<Vec<Weak<Gpu>>> = Mutex::new(Vec::new());

impl Gpu {
    pub fn of(device: &Arc<Device>) -> Arc<Gpu> {
        let mut open = OPEN.lock();
        open.retain(|g| g.strong_count() > 0);
        if let Some(gpu) = open.iter().filter_map(Weak::upgrade).find(|g| Arc::ptr_eq(&g.device, device)) {
            return gpu;
        }
        let gpu = Arc::new(Gpu {
            device: device.clone(),
            lanes: Pool::new(MAX_LANES),
            hashers: Pool::new(usize::MAX),
            staging: Arc::default(),
        });
        open.push(Arc::downgrade(&gpu));
        gpu
    }

    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Runs `work` with a lane of its own, and notes a fatal error.
    fn with_lane<T>(&self, work: impl FnOnce(&mut Lane) -> Result<T, CudaError>) -> Result<T, CudaError> {
        self.device.bind()?;
        let mut lane = self.device.noted(self.lanes.take(|| Lane::new(&self.device)))?;
        let result = self.device.noted(work(&mut lane));
        if result.is_err() {
            // Whatever is still on its way to the lane's buffer, or from it, must end before the next user.
            let _ = lane.stream.synchronize();
        }
        self.lanes.give_back(lane);
        result
    }

    /// Copies from the device to the host.
    pub(super) fn read(&self, address: u64, dst: &mut [u8]) -> Result<(), CudaError> {
        if dst.is_empty() {
            return Ok(());
        }
        self.with_lane(|lane| match is_pinned(dst) {
            true => {
                lane.to_host(address, dst)?;
                lane.done[0].record(&lane.stream).doing("record an event")?;
                wait(&lane.done[0])
            }
            false => lane.read_through(address, dst),
        })
    }

    /// Copies from the host to the device.
    pub(super) fn write(&self, address: u64, src: &[u8]) -> Result<(), CudaError> {
        if src.is_empty() {
            return Ok(());
        }
        self.with_lane(|lane| match is_pinned(src) {
            true => {
                lane.to_device(address, src)?;
                lane.done[0].record(&lane.stream).doing("record an event")?;
                wait(&lane.done[0])
            }
            false => lane.write_through(address, src),
        })
    }

    /// Packs the elements of `run` (its offset is an address here) into `dst`.
    pub(super) fn read_strided(&self, run: Strided, dst: &mut [u8]) -> Result<(), CudaError> {
        let element = run.element as u64;
        self.with_lane(|lane| {
            for (i, part) in dst.chunks_mut(LANE_BYTES / run.element * run.element).enumerate() {
                let first = (i * (LANE_BYTES / run.element)) as u64;
                let count = part.len() as u64 / element;
                let from = run.offset + first * run.stride;
                let to = lane.pinned.as_ptr() as u64;
                let raw = RawStrided { from, to, stride: run.stride, element: run.element as u32, count: count as u32 };
                lane.launch_strided(&self.device, "gather_strided", &[raw])?;
                lane.finish()?;
                part.copy_from_slice(&lane.pinned[..part.len()]);
            }
            Ok(())
        })
    }

    /// The reverse of [`Gpu::read_strided`].
    pub(super) fn write_strided(&self, run: Strided, src: &[u8]) -> Result<(), CudaError> {
        let element = run.element as u64;
        self.with_lane(|lane| {
            for (i, part) in src.chunks(LANE_BYTES / run.element * run.element).enumerate() {
                let first = (i * (LANE_BYTES / run.element)) as u64;
                lane.pinned[..part.len()].copy_from_slice(part);
                let raw = RawStrided {
                    from: lane.pinned.as_ptr() as u64,
                    to: run.offset + first * run.stride,
                    stride: run.stride,
                    element: run.element as u32,
                    count: (part.len() as u64 / element) as u32,
                };
                lane.launch_strided(&self.device, "scatter_strided", &[raw])?;
                lane.finish()?;
            }
            Ok(())
        })
    }

    fn with_hasher<T>(&self, work: impl FnOnce(&mut Hasher) -> Result<T, CudaError>) -> Result<T, CudaError> {
        self.device.bind()?;
        let mut hasher = self.device.noted(self.hashers.take(|| Hasher::new(&self.device)))?;
        let result = self.device.noted(work(&mut hasher));
        if result.is_err() {
            let _ = hasher.drain();
        }
        self.hashers.give_back(hasher);
        result
    }

    fn what(&self) -> String {
        format!("memory of {}", self.device.id.name)
    }
}

impl Accelerator for Gpu {
    fn name(&self) -> String {
        format!("{} {}", self.device.id.name, self.device.id.uuid)
    }

    fn working_memory(&self) -> WorkingMemory {
        let (lanes, hashers) = (MAX_LANES as u64, self.hashers.made().max(USUAL_HASHERS) as u64);
        WorkingMemory {
            host: lanes * (LANE_BYTES + TABLE_BYTES) as u64 + hashers * Hasher::BYTES,
            device: lanes * TABLE_BYTES as u64 + hashers * Hasher::BYTES,
        }
    }

    fn hash_runs(&self, runs: &[DeviceRange], each: &mut dyn FnMut(u64, &[Hash])) -> Result<(), MemoryError> {
        self.with_hasher(|hasher| hasher.runs(&self.device, runs, each)).map_err(|e| e.about(&self.what()))
    }

    fn hash_spans(&self, spans: &[Span], starts: &[u32]) -> Result<Vec<Hash>, MemoryError> {
        self.with_hasher(|hasher| hasher.spans(&self.device, spans, starts)).map_err(|e| e.about(&self.what()))
    }

    fn gather(&self, pieces: &mut [Piece<'_>]) -> Result<(), MemoryError> {
        if pieces.is_empty() {
            return Ok(());
        }
        self.with_lane(|lane| lane.gather(&self.device, pieces)).map_err(|e| e.about(&self.what()))
    }

    fn host_memory(&self, bytes: usize) -> Result<HostBuffer, MemoryError> {
        let kept = {
            let mut kept = self.staging.lock();
            // One buffer is kept: the largest that was needed.
            let fits = kept.iter().position(|b| b.len() >= bytes);
            fits.map(|i| kept.swap_remove(i))
        };
        let buffer = match kept {
            Some(buffer) => buffer,
            None => {
                self.staging.lock().clear();
                PinnedBuffer::new(&self.device, bytes.next_multiple_of(64 << 20)).map_err(|e| e.about("host memory"))?
            }
        };
        Ok(HostBuffer::lent(Returning { buffer: Some(buffer), to: self.staging.clone() }, bytes))
    }

    unsafe fn pin(&self, start: *mut u8, bytes: usize) -> Result<Box<dyn Any + Send + Sync>, MemoryError> {
        // SAFETY: the caller's promise is the same.
        let pinned = unsafe { PinnedMapping::register(&self.device, start, bytes) };
        Ok(Box::new(pinned.map_err(|e| e.about("host memory"))?))
    }
}

/// Pinned memory that goes back where it came from.
struct Returning {
    buffer: Option<PinnedBuffer>,
    to: Arc<Mutex<Vec<PinnedBuffer>>>,
}

impl Deref for Returning {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.buffer.as_deref().unwrap_or_default()
    }
}

impl DerefMut for Returning {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.buffer.as_deref_mut().unwrap_or_default()
    }
}

impl Drop for Returning {
    fn drop(&mut self) {
        self.to.lock().extend(self.buffer.take());
    }
}

/// Waits for an event: polls for a moment, then sleeps.
pub(super) fn wait(event: &CudaEvent) -> Result<(), CudaError> {
    for _ in 0..SPINS {
        if event.try_is_complete().doing("copy")? {
            return Ok(());
        }
        std::hint::spin_loop();
    }
    event.synchronize().doing("copy")
}

impl Lane {
    fn new(device: &Arc<Device>) -> Result<Lane, CudaError> {
        Ok(Lane {
            stream: device.stream(Priority::High)?,
            done: [device.event()?, device.event()?],
            pinned: PinnedBuffer::new(device, LANE_BYTES)?,
            table: PinnedBuffer::new(device, TABLE_BYTES)?,
            device_table: device.alloc(TABLE_BYTES as u64)?,
        })
    }

    fn finish(&self) -> Result<(), CudaError> {
        self.done[0].record(&self.stream).doing("record an event")?;
        wait(&self.done[0])
    }

    /// Starts a copy; `dst` is pinned.
    fn to_host(&self, address: u64, dst: &mut [u8]) -> Result<(), CudaError> {
        // SAFETY: the range is mapped (its memory is held by the caller), `dst` is as long and stays borrowed until the
        // caller has waited for the stream.
        unsafe { sys::cuMemcpyDtoHAsync_v2(dst.as_mut_ptr().cast(), address, dst.len(), self.stream.cu_stream()) }
            .doing("copy to the host")
    }

    /// Starts a copy; `src` is pinned.
    fn to_device(&self, address: u64, src: &[u8]) -> Result<(), CudaError> {
        // SAFETY: as in `to_host`, the other way round.
        unsafe { sys::cuMemcpyHtoDAsync_v2(address, src.as_ptr().cast(), src.len(), self.stream.cu_stream()) }
            .doing("copy to the device")
    }

    /// Through both halves of the pinned buffer in turn: one fills while the other is emptied.
    fn read_through(&mut self, address: u64, dst: &mut [u8]) -> Result<(), CudaError> {
        let starts: Vec<usize> = (0..dst.len()).step_by(HALF).collect();
        let length = dst.len();
        let part = |i: usize| starts[i]..(starts[i] + HALF).min(length);
        for i in 0..=starts.len() {
            if i < starts.len() {
                let range = part(i);
                let half = (i % 2) * HALF;
                let pinned = &mut self.pinned[half..half + range.len()];
                // SAFETY: as in `to_host`; the half was waited for two turns ago.
                unsafe {
                    sys::cuMemcpyDtoHAsync_v2(
                        pinned.as_mut_ptr().cast(),
                        address + range.start as u64,
                        range.len(),
                        self.stream.cu_stream(),
                    )
                }
                .doing("copy to the host")?;
                self.done[i % 2].record(&self.stream).doing("record an event")?;
            }
            if i > 0 {
                let range = part(i - 1);
                let half = ((i - 1) % 2) * HALF;
                wait(&self.done[(i - 1) % 2])?;
                let bytes = range.len();
                dst[range].copy_from_slice(&self.pinned[half..half + bytes]);
            }
        }
        Ok(())
    }

    fn write_through(&mut self, address: u64, src: &[u8]) -> Result<(), CudaError> {
        for (i, part) in src.chunks(HALF).enumerate() {
            let half = (i % 2) * HALF;
            if i >= 2 {
                wait(&self.done[i % 2])?;
            }
            self.pinned[half..half + part.len()].copy_from_slice(part);
            self.to_device(address + (i * HALF) as u64, &self.pinned[half..half + part.len()])?;
            self.done[i % 2].record(&self.stream).doing("record an event")?;
        }
        self.finish()
    }

    fn gather(&mut self, device: &Arc<Device>, pieces: &mut [Piece<'_>]) -> Result<(), CudaError> {
        // What the copy engine does straight into its place, and what the kernel does.
        let mut small: Vec<usize> = Vec::with_capacity(pieces.len());
        for (i, piece) in pieces.iter_mut().enumerate() {
            if !piece.is_contiguous() || piece.dst.len() < ENGINE_BYTES {
                small.push(i);
            } else if is_pinned(piece.dst) {
                self.to_host(piece.range.address(), piece.dst)?;
            } else {
                self.read_through(piece.range.address(), piece.dst)?;
            }
        }
        let mut at = 0;
        while at < small.len() {
            at = self.launch_group(device, pieces, &small, at)?;
        }
        self.finish()
    }

    /// Gathers pieces `small[from..]` as far as one launch takes them, and returns how far that is. Pieces whose place the
    /// kernel cannot write itself are packed into the lane's buffer and copied from there.
    fn launch_group(
        &mut self,
        device: &Arc<Device>,
        pieces: &mut [Piece<'_>],
        small: &[usize],
        from: usize,
    ) -> Result<usize, CudaError> {
        // The tables of the launch before are still read until it is through.
        if from > 0 {
            self.finish()?;
        }
        let (mut plain, mut strided) = (Vec::new(), Vec::new());
        let mut packed: Vec<(usize, usize)> = Vec::new();
        let (mut used, mut next) = (0, from);
        while next < small.len() && plain.len() < LAUNCH_PIECES / 2 && strided.len() < LAUNCH_PIECES / 2 {
            let piece = &mut pieces[small[next]];
            let bytes = piece.dst.len();
            let to = match is_pinned(piece.dst) {
                true => piece.dst.as_mut_ptr() as u64,
                false if used + bytes > LANE_BYTES && used > 0 => break,
                // Strided pieces may be of any size.
                false if bytes > LANE_BYTES => {
                    let run = self.strided_of(piece);
                    self.large_strided(device, run, piece.dst)?;
                    next += 1;
                    continue;
                }
                false => {
                    packed.push((small[next], used));
                    let to = self.pinned.as_ptr() as u64 + used as u64;
                    used = (used + bytes).next_multiple_of(16);
                    to
                }
            };
            let address = piece.range.address();
            if piece.is_contiguous() {
                let mut done = 0;
                while done < bytes as u64 {
                    let part = WARP_BYTES.min(bytes as u64 - done);
                    plain.push(RawPiece { from: address + done, to: to + done, bytes: part });
                    done += part;
                }
            } else {
                let count = (bytes / piece.element) as u32;
                strided.push(RawStrided {
                    from: address,
                    to,
                    stride: piece.stride,
                    element: piece.element as u32,
                    count,
                });
            }
            next += 1;
        }
        if !plain.is_empty() {
            self.launch(device, "gather", &plain, 0)?;
        }
        if !strided.is_empty() {
            self.launch_strided(device, "gather_strided", &strided)?;
        }
        if !packed.is_empty() {
            self.finish()?;
            for (i, at) in packed {
                let dst = &mut *pieces[i].dst;
                dst.copy_from_slice(&self.pinned[at..at + dst.len()]);
            }
        }
        Ok(next)
    }

    fn strided_of(&self, piece: &Piece<'_>) -> Strided {
        let count = (piece.dst.len() / piece.element) as u64;
        Strided { offset: piece.range.address(), stride: piece.stride, element: piece.element, count }
    }

    fn large_strided(&mut self, device: &Arc<Device>, run: Strided, dst: &mut [u8]) -> Result<(), CudaError> {
        let each = LANE_BYTES / run.element;
        for (i, part) in dst.chunks_mut(each * run.element).enumerate() {
            let raw = RawStrided {
                from: run.offset + (i * each) as u64 * run.stride,
                to: self.pinned.as_ptr() as u64,
                stride: run.stride,
                element: run.element as u32,
                count: (part.len() / run.element) as u32,
            };
            self.finish()?;
            self.launch_strided(device, "gather_strided", &[raw])?;
            self.finish()?;
            part.copy_from_slice(&self.pinned[..part.len()]);
        }
        Ok(())
    }

    fn launch_strided(&mut self, device: &Arc<Device>, name: &str, raw: &[RawStrided]) -> Result<(), CudaError> {
        // Behind the plain pieces, which may be on their way.
        self.launch(device, name, raw, self.table.len() / 2)
    }

    /// Puts a table of pieces on the device, from byte `at` of the lane's table on, and starts the kernel on it.
    fn launch<T: Copy>(&mut self, device: &Arc<Device>, name: &str, raw: &[T], at: usize) -> Result<(), CudaError> {
        let function = device.function(&GATHER, name)?;
        let bytes = size_of_val(raw);
        assert!(at + bytes <= self.table.len(), "the table of a launch has room");
        // SAFETY: plain old data without padding, read as bytes.
        let raw_bytes = unsafe { std::slice::from_raw_parts(raw.as_ptr().cast::<u8>(), bytes) };
        self.table[at..at + bytes].copy_from_slice(raw_bytes);
        let address = self.device_table.address() + at as u64;
        self.to_device(address, &self.table[at..at + bytes])?;
        let count = raw.len() as u32;
        let grid = count.div_ceil(8).min(device.multiprocessors * 8);
        let config = LaunchConfig { grid_dim: (grid, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the kernel takes a table and its length. Its pieces lie in memories that the caller holds, and their
        // targets in pinned memory that stays borrowed until the stream was waited for.
        unsafe { self.stream.launch_builder(&function).arg(&address).arg(&count).launch(config) }.doing("gather")?;
        Ok(())
    }
}
