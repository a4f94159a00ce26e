//! Weights on a GPU: an engine's, mapped here, or our own.

use super::{CudaError, Device, DeviceBuffer, Gpu, IpcHandle, IpcMemory};
use crate::memory::{Accelerator, BLOCK, DeviceMemory, DeviceRange, Hash, Memory, MemoryError, Strided};
use parking_lot::{Mutex, RwLock};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often the device is asked whether it is still there.
const PROBE: Duration = Duration::from_millis(200);

/// One allocation.
#[derive(Debug)]
pub struct CudaMemory {
    gpu: Arc<Gpu>,
    /// `None` once it was let go of.
    held: RwLock<Option<Arc<Held>>>,
    bytes: u64,
    writable: bool,
    what: String,
    probed: Mutex<Option<Instant>>,
}

#[derive(Debug)]
enum Held {
    Ipc(IpcMemory),
    Own(DeviceBuffer),
}

impl Held {
    fn address(&self) -> u64 {
        match self {
            Held::Ipc(memory) => memory.address(),
            Held::Own(memory) => memory.address(),
        }
    }
}

/// Why another process's memory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{0}")]
    Refused(#[from] CudaError),
    #[error("it has {has} bytes where {promised} were promised")]
    Short { has: u64, promised: u64 },
}

impl CudaMemory {
    /// Maps another process's allocation, of which the first `bytes` are used.
    pub fn open(
        device: &Arc<Device>,
        handle: &IpcHandle,
        bytes: u64,
        what: String,
        writable: bool,
    ) -> Result<CudaMemory, OpenError> {
        let memory = IpcMemory::open(device, handle)?;
        if memory.bytes() < bytes {
            return Err(OpenError::Short { has: memory.bytes(), promised: bytes });
        }
        Ok(CudaMemory::new(device, Held::Ipc(memory), bytes, what, writable))
    }

    /// Memory of our own, not initialised.
    pub fn own(device: &Arc<Device>, bytes: u64, what: String) -> Result<CudaMemory, CudaError> {
        let memory = device.alloc(bytes)?;
        Ok(CudaMemory::new(device, Held::Own(memory), bytes, what, true))
    }

    fn new(device: &Arc<Device>, held: Held, bytes: u64, what: String, writable: bool) -> CudaMemory {
        let held = RwLock::new(Some(Arc::new(held)));
        CudaMemory { gpu: Gpu::of(device), held, bytes, writable, what, probed: Mutex::default() }
    }

    pub fn device(&self) -> &Arc<Device> {
        self.gpu.device()
    }

    /// A handle by which another process can map memory of our own.
    pub fn handle(&self) -> Result<IpcHandle, MemoryError> {
        let held = self.held()?;
        IpcHandle::of(self.gpu.device(), held.address()).map_err(|e| e.about(&self.what))
    }

    fn held(&self) -> Result<Arc<Held>, MemoryError> {
        let held = self.held.read().clone();
        held.ok_or_else(|| MemoryError::Gone { what: self.what.clone(), why: "its engine has ended".into() })
    }

    fn outside(&self, offset: u64, end: u64) -> MemoryError {
        MemoryError::OutOfBounds { what: self.what.clone(), offset, end, bytes: self.bytes }
    }

    /// The memory, kept, and the address of bytes `offset..offset + len` of it.
    fn at(&self, offset: u64, len: u64) -> Result<(Arc<Held>, u64), MemoryError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.bytes => {
                let held = self.held()?;
                let address = held.address() + offset;
                Ok((held, address))
            }
            end => Err(self.outside(offset, end.unwrap_or(u64::MAX))),
        }
    }

    fn at_run(&self, run: Strided, packed: usize) -> Result<(Arc<Held>, Strided), MemoryError> {
        assert_eq!(run.count * run.element as u64, packed as u64, "the packed side has the run's size");
        let end = run.end().ok_or_else(|| self.outside(run.offset, u64::MAX))?;
        let (held, address) = self.at(run.offset, end - run.offset)?;
        Ok((held, Strided { offset: address, ..run }))
    }

    fn may_write(&self) -> Result<(), MemoryError> {
        match self.writable {
            true => Ok(()),
            false => Err(MemoryError::ReadOnly { what: self.what.clone() }),
        }
    }
}

impl Memory for CudaMemory {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&self, offset: u64, dst: &mut [u8]) -> Result<(), MemoryError> {
        let (_held, address) = self.at(offset, dst.len() as u64)?;
        self.gpu.read(address, dst).map_err(|e| e.about(&self.what))
    }

    fn write(&self, offset: u64, src: &[u8]) -> Result<(), MemoryError> {
        self.may_write()?;
        let (_held, address) = self.at(offset, src.len() as u64)?;
        self.gpu.write(address, src).map_err(|e| e.about(&self.what))
    }

    fn read_strided(&self, run: Strided, dst: &mut [u8]) -> Result<(), MemoryError> {
        let (_held, run) = self.at_run(run, dst.len())?;
        self.gpu.read_strided(run, dst).map_err(|e| e.about(&self.what))
    }

    fn write_strided(&self, run: Strided, src: &[u8]) -> Result<(), MemoryError> {
        self.may_write()?;
        let (_held, run) = self.at_run(run, src.len())?;
        self.gpu.write_strided(run, src).map_err(|e| e.about(&self.what))
    }

    fn hash_blocks(&self, offset: u64, out: &mut [Hash]) -> Result<(), MemoryError> {
        let run = self.range(offset, (out.len() * BLOCK) as u64)?;
        self.gpu.hash_runs(&[run], &mut |first, hashes| {
            out[first as usize..first as usize + hashes.len()].copy_from_slice(hashes);
        })
    }

    fn check(&self) -> Result<(), MemoryError> {
        self.held()?;
        let device = self.gpu.device();
        if let Some(e) = device.failure() {
            return Err(e.about(&self.what));
        }
        let mut probed = self.probed.lock();
        if probed.is_none_or(|p| p.elapsed() > PROBE) {
            *probed = Some(Instant::now());
            let asked = device.memory().map(|_| ());
            device.noted(asked).map_err(|e| e.about(&self.what))?;
        }
        Ok(())
    }

    fn device(&self) -> Option<&dyn DeviceMemory> {
        Some(self)
    }

    fn release(&self) {
        self.held.write().take();
    }
}

impl DeviceMemory for CudaMemory {
    fn cuda(&self) -> Option<&Arc<Device>> {
        Some(self.gpu.device())
    }

    fn accelerator(&self) -> Arc<dyn Accelerator> {
        self.gpu.clone()
    }

    fn range(&self, offset: u64, bytes: u64) -> Result<DeviceRange, MemoryError> {
        let (held, address) = self.at(offset, bytes)?;
        Ok(DeviceRange::new(address, bytes, held))
    }
}
