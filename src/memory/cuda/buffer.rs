//! Memory on a device: our own, which is freed with its owner, and anybody's, which never is.

use super::error::Doing;
use super::{CudaError, Device};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DeviceSlice, SyncOnDrop, sys};
use std::marker::PhantomData;
use std::sync::Arc;

/// Bytes on a device that are ours. Freed on drop, which waits for the work that uses them.
#[derive(Debug)]
pub struct DeviceBuffer {
    device: Arc<Device>,
    address: u64,
    bytes: u64,
}

impl DeviceBuffer {
    pub(super) fn new(device: &Arc<Device>, bytes: u64) -> Result<DeviceBuffer, CudaError> {
        device.bind()?;
        let mut address = 0;
        // SAFETY: writes the address of the new allocation; zero bytes are asked for as one.
        let code = unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1) as usize) };
        code.doing(&format!("have {bytes} bytes on {}", device.id.name))?;
        Ok(DeviceBuffer { device: device.clone(), address, bytes })
    }

    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// A multiple of 256.
    pub fn address(&self) -> u64 {
        self.address
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// `len` elements from byte `offset` on, for kernels and library calls. Panics if they lie outside.
    pub fn part<T>(&self, stream: &Arc<CudaStream>, offset: u64, len: usize) -> RawDev<T> {
        let end = offset + (len * size_of::<T>()) as u64;
        assert!(end <= self.bytes, "bytes {offset}..{end} of a device buffer of {}", self.bytes);
        RawDev::new(stream, self.address + offset, len)
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // A context that is lost took its memory with it.
        if self.device.bind().is_ok() {
            // SAFETY: the address is from cuMemAlloc and freed once; the call waits for work in flight.
            let freed = unsafe { sys::cuMemFree_v2(self.address) }.doing("free memory");
            if let Err(e) = self.device.noted(freed) {
                log::warn!("{e}");
            }
        }
    }
}

/// `len` values of `T` on a device, whoever owns them: never freed here. What cudarc's functions take in place of its own
/// slices, whose drop would free an engine's memory.
#[derive(Debug, Clone)]
pub struct RawDev<T> {
    stream: Arc<CudaStream>,
    address: u64,
    len: usize,
    of: PhantomData<T>,
}

impl<T> RawDev<T> {
    pub fn new(stream: &Arc<CudaStream>, address: u64, len: usize) -> RawDev<T> {
        RawDev { stream: stream.clone(), address, len, of: PhantomData }
    }

    pub fn address(&self) -> u64 {
        self.address
    }
}

impl<T> DeviceSlice<T> for RawDev<T> {
    fn len(&self) -> usize {
        self.len
    }

    fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }
}

impl<T> DevicePtr<T> for RawDev<T> {
    fn device_ptr<'a>(&'a self, _stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
        (self.address, SyncOnDrop::Record(None))
    }
}

impl<T> DevicePtrMut<T> for RawDev<T> {
    fn device_ptr_mut<'a>(&'a mut self, _stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
        (self.address, SyncOnDrop::Record(None))
    }
}
