//! Many parts of device memory on their way to the host, beside the work of a step.

use super::{Gpu, Part, Result};
use crate::memory::cuda::{PinnedBuffer, Priority};
use cudarc::driver::{CudaStream, result};
use std::sync::Arc;

/// Copies into pinned memory, under way on a stream of their own. Whoever made them keeps the parts until they have ended;
/// dropping them waits.
pub struct Downloads {
    gpu: Arc<Gpu>,
    stream: Arc<CudaStream>,
    /// `None` once taken back.
    pinned: Option<PinnedBuffer>,
    /// Waited for, with success.
    arrived: bool,
}

impl Gpu {
    /// Begins to copy each part to its place in `pinned`. No work under way may write the parts.
    pub fn start_downloads(self: &Arc<Self>, pinned: PinnedBuffer, parts: &[(Part, usize)]) -> Result<Downloads> {
        let stream = self.device.stream(Priority::High)?;
        // From here on an error waits for the copies that have begun.
        let mut downloads = Downloads { gpu: self.clone(), stream, pinned: Some(pinned), arrived: false };
        let Downloads { stream, pinned: Some(pinned), .. } = &mut downloads else { unreachable!("put there just now") };
        self.device.bind()?;
        for (part, at) in parts {
            let dst = &mut pinned[*at..*at + part.bytes() as usize];
            // SAFETY: the part is as long as `dst`, which lies in memory that is neither read nor freed before the stream
            // was waited for (`arrived`, `drop`).
            let begun = unsafe { result::memcpy_dtoh_async(dst, part.address(), stream.cu_stream()) };
            self.noted(begun, "copy from the device")?;
        }
        Ok(downloads)
    }
}

impl Downloads {
    pub fn wait(&mut self) -> Result<()> {
        self.gpu.noted(self.stream.synchronize(), "copy from the device")?;
        self.arrived = true;
        Ok(())
    }

    /// What was copied, once it has arrived.
    pub fn bytes(&self) -> Option<&[u8]> {
        self.pinned.as_deref().filter(|_| self.arrived)
    }

    /// The pinned memory, after the copies; `None` when they cannot be waited for.
    pub fn take_back(&mut self) -> Option<PinnedBuffer> {
        if !self.arrived {
            self.wait().ok()?;
        }
        self.pinned.take()
    }
}

impl Drop for Downloads {
    fn drop(&mut self) {
        // A device that fails has no copies under way any more; its error is noted.
        let _ = self.stream.synchronize();
    }
}
