//! Opens a memory of kind `cuda-ipc`, or says why it cannot be had and what to do.

use super::{CudaDevice, SourceError};
use crate::memory::cuda::{CudaError, CudaMemory, Device, DeviceId, DeviceName, IpcHandle, OpenError, devices};
use cudarc::driver::sys::CUresult;
use std::path::Path;

pub(super) fn open_ipc(
    manifest: &Path,
    number: usize,
    device: &CudaDevice,
    handle: &IpcHandle,
    bytes: u64,
    writable: bool,
) -> Result<CudaMemory, SourceError> {
    let no = |why: String| SourceError::NoCuda { path: manifest.to_path_buf(), why };
    let mut refused = None;
    for id in candidates(device).map_err(no)? {
        let device = Device::open(&id).map_err(|e| no(e.to_string()))?;
        let what = format!("engine memory {number} on {}", id.name);
        match CudaMemory::open(&device, handle, bytes, what, writable) {
            Ok(memory) => return Ok(memory),
            Err(OpenError::Refused(e)) => refused = refused.or(Some(e)),
            Err(e @ OpenError::Short { .. }) => {
                let why = format!("memory {number}: {e}");
                return Err(SourceError::BadManifest { path: manifest.to_path_buf(), why });
            }
        }
    }
    let why = refused.map_or("there is no GPU here".into(), |e| format!("{e}; {}", remedy(&e)));
    Err(SourceError::CudaMemory { path: manifest.to_path_buf(), number, why })
}

/// Devices that the memory may be on, the likeliest first.
fn candidates(device: &CudaDevice) -> Result<Vec<DeviceId>, String> {
    match device {
        CudaDevice::Uuid(uuid) => Ok(vec![DeviceName::Uuid(uuid.clone()).find().map_err(|e| e.to_string())?]),
        CudaDevice::Ordinal(n) => {
            let mut all = devices().map_err(|e| e.to_string())?;
            all.sort_by_key(|d| (d.ordinal != *n as usize, d.ordinal));
            Ok(all)
        }
    }
}

/// What usually is behind a refusal, and what helps.
fn remedy(e: &CudaError) -> &'static str {
    match e.code {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => "the GPU's memory is full: leave some to weightfs",
        CUresult::CUDA_ERROR_INVALID_CONTEXT | CUresult::CUDA_ERROR_INVALID_DEVICE => {
            "the engine runs in another container, or is this very process: share its process ids and IPC with weightfs \
             (--pid=container:…, --ipc=host)"
        }
        CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED
        | CUresult::CUDA_ERROR_NOT_SUPPORTED
        | CUresult::CUDA_ERROR_NOT_PERMITTED => {
            "memory is not shared across parts of a divided GPU (MIG) or on this system: run engine and weightfs on one \
             undivided GPU"
        }
        _ => {
            "the engine has freed the memory, or it has no handle that others can open: run it with \
             PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False and without sleep mode, and publish again"
        }
    }
}
