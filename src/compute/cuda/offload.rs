//! Activations that a step keeps in host memory: they leave while the forward pass goes on, and come back while the backward
//! pass is at the layers above theirs. The copies have a stream of their own, and the device's copy engines do them.
//!
//! A slot is device memory that takes turns with the other: the step's stream writes one and sends it off, or finds in it
//! what was fetched. What the two streams owe each other is written in events, so that nobody on the host waits.

use super::{Buffer, Gpu, Part, Result};
use crate::memory::cuda::{CudaError, Device, PinnedBuffer, Priority};
use cudarc::driver::{CudaEvent, CudaStream, sys};
use std::collections::VecDeque;
use std::sync::Arc;

/// Host memory for activations, which outlives the step that uses it. Freed when no copy of it is under way.
pub struct Shelf {
    device: Arc<Device>,
    stream: Arc<CudaStream>,
    memory: PinnedBuffer,
}

/// The activations of one step under way. Dropped, the step's stream goes on after the last copy.
pub struct Offload {
    gpu: Arc<Gpu>,
    shelf: Arc<Shelf>,
    slots: [Slot; 2],
    /// The slot that is used next.
    next: usize,
    /// Slots with what was fetched, oldest first, and where that came from.
    fetched: VecDeque<(usize, usize)>,
}

struct Slot {
    memory: Buffer,
    /// The last copy of it, where the step's stream did not wait for that yet.
    copied: Option<CudaEvent>,
}

impl Shelf {
    /// Takes and pins `bytes` bytes of host memory.
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<Shelf> {
        let memory = PinnedBuffer::new(device, bytes)?;
        Ok(Shelf { device: device.clone(), stream: device.stream(Priority::High)?, memory })
    }

    pub fn bytes(&self) -> u64 {
        self.memory.len() as u64
    }
}

impl Drop for Shelf {
    fn drop(&mut self) {
        // A device that fails has no copies under way any more.
        let _ = self.device.bind();
        let _ = self.stream.synchronize();
    }
}

impl Offload {
    /// Takes two slots of `bytes` bytes.
    pub fn new(gpu: &Arc<Gpu>, shelf: Arc<Shelf>, bytes: u64) -> Result<Offload> {
        let slot = || Ok::<_, super::GpuError>(Slot { memory: gpu.hold(bytes)?, copied: None });
        Ok(Offload { gpu: gpu.clone(), shelf, slots: [slot()?, slot()?], next: 0, fetched: VecDeque::new() })
    }

    /// A slot to write, until the next but one is asked for.
    pub fn room(&mut self) -> Result<Part> {
        assert!(self.fetched.is_empty(), "slots are written before any is fetched");
        self.next = 1 - self.next;
        self.arrive(self.next)?;
        Ok(self.slots[self.next].memory.part())
    }

    /// Begins to copy the slot that was written last to byte `at` of the host's memory.
    pub fn send(&mut self, at: usize) -> Result<()> {
        let host = self.place(at);
        self.after_the_step()?;
        let slot = self.slots[self.next].memory.part();
        // SAFETY: the place lies in the shelf and is as long as the slot. The slot is written again after this copy (`room`,
        // `fetch`, `drop`); nobody on the host looks at the memory, which is not freed before the copy's end (`Shelf`).
        let done = unsafe {
            sys::cuMemcpyDtoHAsync_v2(host.cast(), slot.address(), slot.bytes() as usize, self.shelf.stream.cu_stream())
        };
        self.gpu.noted(done.result(), "copy activations from the device")?;
        self.slots[self.next].copied = Some(self.mark()?);
        Ok(())
    }

    /// Begins to copy what was sent to `at` back, unless that has begun. At most two are on their way or waited for.
    pub fn fetch(&mut self, at: usize) -> Result<()> {
        if self.fetched.iter().any(|(_, from)| *from == at) {
            return Ok(());
        }
        assert!(self.fetched.len() < 2, "a slot for what is fetched");
        let host = self.place(at);
        let slot = 1 - self.fetched.back().map_or(self.next, |(slot, _)| *slot);
        // What the step did with the slot before comes first; copies of it do, in their stream.
        self.after_the_step()?;
        let to = self.slots[slot].memory.part();
        // SAFETY: as in `send`.
        let done = unsafe {
            sys::cuMemcpyHtoDAsync_v2(to.address(), host.cast(), to.bytes() as usize, self.shelf.stream.cu_stream())
        };
        self.gpu.noted(done.result(), "copy activations to the device")?;
        self.slots[slot].copied = Some(self.mark()?);
        self.fetched.push_back((slot, at));
        Ok(())
    }

    /// What was fetched from `at`, once it is there: until the next `fetch`.
    pub fn fetched(&mut self, at: usize) -> Result<Part> {
        self.fetch(at)?;
        let (slot, from) = self.fetched.pop_front().expect("one was asked for just now");
        assert_eq!(from, at, "what was fetched is used in that order");
        self.next = slot;
        self.arrive(slot)?;
        Ok(self.slots[slot].memory.part())
    }

    /// Where byte `at` of the host's memory is, and after it as many as a slot has.
    fn place(&self, at: usize) -> *mut u8 {
        assert!(at + self.slots[0].memory.bytes() as usize <= self.shelf.memory.len(), "byte {at} of the shelf");
        // SAFETY: inside the memory, by the check above.
        unsafe { self.shelf.memory.start().add(at) }
    }

    /// Copies from here on come after what the step was asked for so far.
    fn after_the_step(&self) -> Result<()> {
        let event = self.gpu.stream.record_event(None).map_err(|e| CudaError::new("mark a place in a stream", e));
        let event = self.gpu.device.noted(event)?;
        self.gpu.noted(self.shelf.stream.wait(&event), "wait for a step")
    }

    fn mark(&self) -> Result<CudaEvent> {
        let event = self.shelf.stream.record_event(None).map_err(|e| CudaError::new("mark a place in a stream", e));
        Ok(self.gpu.device.noted(event)?)
    }

    /// The step goes on after the slot's last copy.
    fn arrive(&mut self, slot: usize) -> Result<()> {
        match self.slots[slot].copied.take() {
            Some(event) => self.gpu.noted(self.gpu.stream.wait(&event), "wait for activations"),
            None => Ok(()),
        }
    }
}

impl Drop for Offload {
    fn drop(&mut self) {
        // Slots go back to their pool after this.
        for slot in 0..2 {
            if self.arrive(slot).is_err() {
                // Without an order between the streams, by waiting; a device that fails has no copies under way any more.
                let _ = self.shelf.stream.synchronize();
            }
        }
    }
}
