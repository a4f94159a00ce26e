//! Memory of another process on the same GPU.

use super::error::Doing;
use super::{CudaError, Device};
use cudarc::driver::sys;
use std::fmt;
use std::sync::Arc;

/// What a process gives to others so that they can open an allocation of its own (`cudaIpcMemHandle_t`).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct IpcHandle(pub [u8; 64]);

impl fmt::Debug for IpcHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IpcHandle({})", self.hex())
    }
}

impl IpcHandle {
    /// From 128 hex digits.
    pub fn parse(hex: &str) -> Option<IpcHandle> {
        if hex.len() != 128 || !hex.is_ascii() {
            return None;
        }
        let mut bytes = [0; 64];
        for (byte, digits) in bytes.iter_mut().zip(hex.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        }
        // from_str_radix takes a sign.
        (!hex.contains('+')).then_some(IpcHandle(bytes))
    }

    pub fn hex(&self) -> String {
        self.0.iter().map(|b| format!("{b:02x}")).collect()
    }

    fn raw(&self) -> sys::CUipcMemHandle {
        sys::CUipcMemHandle { reserved: self.0.map(|b| b as std::ffi::c_char) }
    }

    /// The handle of an allocation of our own (cuMemAlloc) that `address` is the start of.
    pub fn of(device: &Device, address: u64) -> Result<IpcHandle, CudaError> {
        device.bind()?;
        let mut raw = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: fills the 64 bytes.
        unsafe { sys::cuIpcGetMemHandle(&mut raw, address) }.doing("share memory")?;
        Ok(IpcHandle(raw.reserved.map(|b| b as u8)))
    }
}

/// An allocation of another process, mapped here; unmapped on drop, never freed.
#[derive(Debug)]
pub struct IpcMemory {
    device: Arc<Device>,
    address: u64,
    bytes: u64,
}

impl IpcMemory {
    /// Maps the whole allocation. Its owner may be on this device or on one that it reaches.
    pub fn open(device: &Arc<Device>, handle: &IpcHandle) -> Result<IpcMemory, CudaError> {
        device.bind()?;
        let mut address = 0;
        let lazy = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: writes the address of the mapping; a handle that is none is refused by the driver.
        unsafe { sys::cuIpcOpenMemHandle_v2(&mut address, handle.raw(), lazy) }
            .doing("open another process's memory")?;
        let mut memory = IpcMemory { device: device.clone(), address, bytes: 0 };
        let (mut base, mut bytes) = (0, 0);
        // SAFETY: writes base and size of the mapping made above.
        unsafe { sys::cuMemGetAddressRange_v2(&mut base, &mut bytes, address) }.doing("ask how large a memory is")?;
        memory.bytes = bytes as u64 - (address - base);
        Ok(memory)
    }

    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub fn address(&self) -> u64 {
        self.address
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for IpcMemory {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: the address is from cuIpcOpenMemHandle and closed once. Work that uses it has ended: whoever asked
            // for it waited, and held the memory meanwhile.
            let closed = unsafe { sys::cuIpcCloseMemHandle(self.address) }.doing("close another process's memory");
            if let Err(e) = self.device.noted(closed) {
                log::debug!("{e}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_is_128_hex_digits() {
        let handle = IpcHandle(std::array::from_fn(|i| (i * 5) as u8));
        assert_eq!(IpcHandle::parse(&handle.hex()), Some(handle));
        assert_eq!(IpcHandle::parse(&handle.hex()[1..]), None);
        assert_eq!(IpcHandle::parse(&"+1".repeat(64)), None);
        assert_eq!(IpcHandle::parse(&"zz".repeat(64)), None);
        assert_eq!(IpcHandle::parse(&"é".repeat(64)), None);
    }
}
