//! What the driver says when it refuses.

use crate::memory::MemoryError;
use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

/// A call of the driver failed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("CUDA could not {doing}: {text} ({code:?})")]
pub struct CudaError {
    pub doing: String,
    pub code: CUresult,
    text: String,
}

impl CudaError {
    pub fn new(doing: impl Into<String>, error: DriverError) -> CudaError {
        let text = error.error_string().map(|t| t.to_string_lossy().into_owned());
        CudaError { doing: doing.into(), code: error.0, text: text.unwrap_or_else(|_| "unknown error".into()) }
    }

    /// The context is of no more use: every later call in it fails as well. The device was reset or lost, or a kernel
    /// touched memory that is not there.
    pub fn is_fatal(&self) -> bool {
        matches!(
            self.code,
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
                | CUresult::CUDA_ERROR_LAUNCH_FAILED
                | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
                | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
                | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
                | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
                | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
                | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
                | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
                | CUresult::CUDA_ERROR_INVALID_PC
                | CUresult::CUDA_ERROR_ASSERT
                | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED
                | CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE
                | CUresult::CUDA_ERROR_NO_DEVICE
                | CUresult::CUDA_ERROR_DEINITIALIZED
                | CUresult::CUDA_ERROR_MAP_FAILED
                | CUresult::CUDA_ERROR_UNKNOWN
        )
    }

    pub fn is_out_of_memory(&self) -> bool {
        self.code == CUresult::CUDA_ERROR_OUT_OF_MEMORY
    }

    /// About a memory of an engine: after a fatal error nothing of it can be had any more.
    pub fn about(&self, what: &str) -> MemoryError {
        match self.is_fatal() {
            true => MemoryError::Gone { what: what.to_string(), why: self.to_string() },
            false => MemoryError::Device { what: what.to_string(), why: self.to_string() },
        }
    }
}

/// `result.doing("copy")?`
pub(super) trait Doing<T> {
    fn doing(self, what: &str) -> Result<T, CudaError>;
}

impl<T> Doing<T> for Result<T, DriverError> {
    fn doing(self, what: &str) -> Result<T, CudaError> {
        self.map_err(|e| CudaError::new(what, e))
    }
}

impl Doing<()> for CUresult {
    fn doing(self, what: &str) -> Result<(), CudaError> {
        self.result().doing(what)
    }
}
