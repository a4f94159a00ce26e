//! Host memory that the GPU reads and writes by itself: ours, or a mapping that is registered with the driver.
//!
//! Copies to and from other host memory go through a buffer of the driver's and are forty times slower, so that whoever
//! copies asks [`is_pinned`] first.

use super::error::Doing;
use super::{CudaError, Device};
use cudarc::driver::sys;
use memmap2::{MmapOptions, MmapRaw};
use parking_lot::RwLock;
use rayon::prelude::*;
use rustix::mm::{Advice, madvise};
use std::collections::BTreeMap;
use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// Start and end of everything pinned. Neighbours that were registered apart stay apart: one copy must not span them.
static PINNED: RwLock<BTreeMap<usize, usize>> = RwLock::new(BTreeMap::new());

/// Whether all of `bytes` lies in one pinned piece.
pub(super) fn is_pinned(bytes: &[u8]) -> bool {
    let (start, end) = (bytes.as_ptr() as usize, bytes.as_ptr() as usize + bytes.len());
    PINNED.read().range(..=start).next_back().is_some_and(|(_, &e)| end <= e)
}

/// Portable: for all contexts. Mapped: kernels reach it at its own address.
const FLAGS: u32 = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;

/// From here on memory is taken by all cores at once, and then pinned: the driver takes it page by page on one.
const LARGE: usize = 64 << 20;

/// Pinned memory of our own, zeroed.
#[derive(Debug)]
pub struct PinnedBuffer {
    device: Arc<Device>,
    start: *mut u8,
    bytes: usize,
    /// Large ones: the mapping, and its registration, which is dropped first.
    mapping: Option<(PinnedMapping, MmapRaw)>,
}

// SAFETY: plain memory; references to it follow Rust's rules as those to a boxed slice do.
unsafe impl Send for PinnedBuffer {}
// SAFETY: as above.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<PinnedBuffer, CudaError> {
        device.bind()?;
        let bytes = bytes.max(1);
        if bytes >= LARGE {
            match PinnedBuffer::populated(device, bytes) {
                Ok(buffer) => return Ok(buffer),
                Err(why) => log::debug!("{bytes} bytes of host memory are left to the driver: {why}"),
            }
        }
        let mut start = std::ptr::null_mut();
        // SAFETY: writes the address of the new allocation.
        let code = unsafe { sys::cuMemHostAlloc(&mut start, bytes, FLAGS) };
        code.doing(&format!("pin {bytes} bytes of host memory"))?;
        let start = start.cast::<u8>();
        // SAFETY: the allocation is `bytes` long and nobody else's.
        unsafe { start.write_bytes(0, bytes) };
        PINNED.write().insert(start as usize, start as usize + bytes);
        Ok(PinnedBuffer { device: device.clone(), start, bytes, mapping: None })
    }

    /// For copies that a device does by itself. Who asks for them sees to it that nobody looks at the bytes meanwhile, and
    /// that they end before this does.
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    fn populated(device: &Arc<Device>, bytes: usize) -> io::Result<PinnedBuffer> {
        let map = MmapOptions::new().len(bytes.next_multiple_of(PIECE)).map_anon()?;
        let map = MmapRaw::from(map);
        let (start, length) = (map.as_mut_ptr() as usize, map.len());
        // SAFETY: advice about a mapping of ours; refused where the system has no large pages.
        let _ = unsafe { madvise(start as *mut _, length, Advice::LinuxHugepage) };
        (0..length).into_par_iter().step_by(PIECE).with_max_len(1).try_for_each(|at| {
            // SAFETY: the range is part of that mapping. This touches every page, and fails where there is no memory for it.
            unsafe { madvise((start + at) as *mut _, PIECE, Advice::LinuxPopulateWrite) }
        })?;
        // SAFETY: the mapping is kept beside its registration, which is dropped before it.
        let pin = unsafe { PinnedMapping::register(device, map.as_mut_ptr(), length) }.map_err(io::Error::other)?;
        Ok(PinnedBuffer { device: device.clone(), start: map.as_mut_ptr(), bytes, mapping: Some((pin, map)) })
    }
}

/// What one core takes at a time.
const PIECE: usize = 16 << 20;

impl Deref for PinnedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: initialised memory of that length, ours until drop.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }
}

impl DerefMut for PinnedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if self.mapping.is_some() {
            return;
        }
        PINNED.write().remove(&(self.start as usize));
        if self.device.bind().is_ok() {
            // SAFETY: from cuMemHostAlloc, freed once, no reference left.
            let freed = unsafe { sys::cuMemFreeHost(self.start.cast()) }.doing("free pinned memory");
            if let Err(e) = self.device.noted(freed) {
                log::debug!("{e}");
            }
        }
    }
}

/// Registration of a piece of somebody's mapping; ends on drop, before the mapping does.
#[derive(Debug)]
pub struct PinnedMapping {
    device: Arc<Device>,
    start: usize,
}

impl PinnedMapping {
    /// Registers `bytes` bytes at `start`, both multiples of the page size.
    ///
    /// # Safety
    /// The mapping stays where it is, with all its pages, until this is dropped.
    pub unsafe fn register(device: &Arc<Device>, start: *mut u8, bytes: usize) -> Result<PinnedMapping, CudaError> {
        device.bind()?;
        // SAFETY: the caller promises that the range is mapped and stays so.
        let code = unsafe { sys::cuMemHostRegister_v2(start.cast(), bytes, FLAGS) };
        code.doing(&format!("pin {bytes} bytes of a mapping"))?;
        let start = start as usize;
        PINNED.write().insert(start, start + bytes);
        Ok(PinnedMapping { device: device.clone(), start })
    }
}

impl Drop for PinnedMapping {
    fn drop(&mut self) {
        PINNED.write().remove(&self.start);
        if self.device.bind().is_ok() {
            // SAFETY: registered by `register` and unregistered once.
            let done = unsafe { sys::cuMemHostUnregister(self.start as *mut _) }.doing("unpin a mapping");
            if let Err(e) = self.device.noted(done) {
                log::debug!("{e}");
            }
        }
    }
}
