//! CUDA through the driver alone: no toolkit to build, none to mount, read, hash and commit. The driver's library is
//! loaded when it is first asked for; a machine without one is told so ([`NoCuda`]) and nothing panics.
//!
//! Kernels are `.cu` files in `kernels/` folders beside their launchers. `tools/kernels.py` compiles them to the PTX that
//! is part of the program; the driver makes machine code of it once and keeps that (`~/.nv/ComputeCache`).
//!
//! Work of one thread goes to a stream of its own. Nothing here relies on cudarc's events per slice: who uses a buffer on
//! two streams orders them.

mod buffer;
mod device;
mod error;
mod gpu;
mod hasher;
mod ipc;
mod libraries;
mod memory;
mod modules;
mod pinned;
mod pool;

pub use buffer::{DeviceBuffer, RawDev};
pub use device::{Device, DeviceId, DeviceName, Priority, devices};
pub use error::CudaError;
pub use gpu::Gpu;
pub use ipc::{IpcHandle, IpcMemory};
pub use libraries::{Found, Library, add_search_process, load};
pub use memory::{CudaMemory, OpenError};
pub use modules::Ptx;
pub use pinned::{PinnedBuffer, PinnedMapping};

use cudarc::driver::{result, sys};
use std::sync::OnceLock;

/// The lowest version of the driver's interface that is asked for: CUDA 12.0, driver 525.
const OLDEST_DRIVER: i32 = 12000;

/// Why there is no CUDA on this machine, in a sentence.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct NoCuda(String);

/// The version of the driver's interface (13000 for CUDA 13.0), once it was found and initialised. The answer stays the
/// same for the life of the process.
pub fn driver() -> Result<i32, NoCuda> {
    static DRIVER: OnceLock<Result<i32, NoCuda>> = OnceLock::new();
    DRIVER.get_or_init(find_driver).clone()
}

fn find_driver() -> Result<i32, NoCuda> {
    // SAFETY: looks whether the library can be loaded; its initialisers are the vendor's.
    if !unsafe { sys::is_culib_present() } {
        return Err(NoCuda("no NVIDIA driver (libcuda.so.1) was found".into()));
    }
    result::init().map_err(|e| NoCuda(format!("the NVIDIA driver cannot be used: {}", CudaError::new("start", e))))?;
    let mut version = 0;
    // SAFETY: writes one integer.
    let code = unsafe { sys::cuDriverGetVersion(&mut version) };
    code.result().map_err(|e| NoCuda(CudaError::new("ask the driver's version", e).to_string()))?;
    if version < OLDEST_DRIVER {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(NoCuda(format!("the NVIDIA driver is of CUDA {major}.{minor}: CUDA 12.0 (driver 525) is needed")));
    }
    Ok(version)
}
