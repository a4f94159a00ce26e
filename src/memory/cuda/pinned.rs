//! Host memory that the GPU reads and writes by itself: ours, or a mapping that is registered with the driver.
//!
//! Copies to and from other host memory go through a buffer of the driver's and are forty times slower, so that whoever
//! copies asks [`is_pinned`] first.

use super::error::Doing;
use super::{CudaError, Device};
use cudarc::driver::sys;
use parking_lot::RwLock;
use std::collections::BTreeMap;
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

/// Pinned memory of our own, zeroed.
#[derive(Debug)]
pub struct PinnedBuffer {
    device: Arc<Device>,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory; references to it follow Rust's rules as those to a boxed slice do.
unsafe impl Send for PinnedBuffer {}
// SAFETY: as above.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<PinnedBuffer, CudaError> {
        device.bind()?;
        let bytes = bytes.max(1);
        let mut start = std::ptr::null_mut();
        // SAFETY: writes the address of the new allocation.
        let code = unsafe { sys::cuMemHostAlloc(&mut start, bytes, FLAGS) };
        code.doing(&format!("pin {bytes} bytes of host memory"))?;
        let start = start.cast::<u8>();
        // SAFETY: the allocation is `bytes` long and nobody else's.
        unsafe { start.write_bytes(0, bytes) };
        PINNED.write().insert(start as usize, start as usize + bytes);
        Ok(PinnedBuffer { device: device.clone(), start, bytes })
    }
}

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
