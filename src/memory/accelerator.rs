//! What a GPU does with memory of its own, many blocks at a time: hash them where they are, gather scattered pieces.
//! Behind a trait, so that everything that plans such work is tested without a GPU.

use super::cuda::Device;
use super::{Hash, HostBuffer, MemoryError};
use std::any::Any;
use std::fmt::{self, Debug};
use std::sync::Arc;

/// Bytes of device memory. They stay mapped as long as this lives.
#[derive(Clone)]
pub struct DeviceRange {
    address: u64,
    bytes: u64,
    held: Arc<dyn Any + Send + Sync>,
}

impl DeviceRange {
    /// Only memories make these: that the range is mapped while `held` lives is theirs to know.
    pub(super) fn new(address: u64, bytes: u64, held: Arc<dyn Any + Send + Sync>) -> DeviceRange {
        DeviceRange { address, bytes, held }
    }

    /// Where it begins, on its device: for kernels and library calls.
    pub fn address(&self) -> u64 {
        self.address
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// `bytes` bytes from `offset` on. Panics if they lie outside.
    pub fn part(&self, offset: u64, bytes: u64) -> DeviceRange {
        assert!(offset + bytes <= self.bytes, "{bytes} bytes at {offset} of a range of {}", self.bytes);
        DeviceRange { address: self.address + offset, bytes, held: self.held.clone() }
    }
}

impl Debug for DeviceRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{}", self.address, self.bytes)
    }
}

/// Bytes that an accelerator takes for buffers and tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkingMemory {
    pub host: u64,
    pub device: u64,
}

/// A piece of one block: its bytes from `at` on.
#[derive(Debug, Clone)]
pub struct Span {
    pub range: DeviceRange,
    pub at: u32,
}

/// Something to copy to the host: elements of `element` bytes, `stride` bytes apart in `range`, packed in `dst`.
/// Contiguous bytes are one element.
#[derive(Debug)]
pub struct Piece<'a> {
    pub range: DeviceRange,
    pub element: usize,
    pub stride: u64,
    pub dst: &'a mut [u8],
}

impl<'a> Piece<'a> {
    pub fn contiguous(range: DeviceRange, dst: &'a mut [u8]) -> Piece<'a> {
        debug_assert_eq!(range.bytes(), dst.len() as u64);
        Piece { element: dst.len(), stride: dst.len() as u64, range, dst }
    }

    pub fn is_contiguous(&self) -> bool {
        self.element == self.dst.len()
    }
}

/// One device that works on the memories that say so ([`DeviceMemory`]). Ranges given to it are of its own memories.
pub trait Accelerator: Send + Sync + Debug {
    /// For people: what it is called and which one it is.
    fn name(&self) -> String;

    /// What it takes for its own work, at most or by now, whichever is more.
    fn working_memory(&self) -> WorkingMemory;

    /// Hashes the blocks of `runs` (each a multiple of [`BLOCK`](super::BLOCK) long) in order, and gives `each` the hashes
    /// as they come, with the number of the first one's block counted over all runs.
    fn hash_runs(&self, runs: &[DeviceRange], each: &mut dyn FnMut(u64, &[Hash])) -> Result<(), MemoryError>;

    /// Hashes blocks that are put together from spans: block b from `spans[starts[b]..starts[b + 1]]`, which fill it.
    fn hash_spans(&self, spans: &[Span], starts: &[u32]) -> Result<Vec<Hash>, MemoryError>;

    /// Copies every piece to its place; returns when all bytes are there. Callers call it from several threads at once.
    fn gather(&self, pieces: &mut [Piece<'_>]) -> Result<(), MemoryError>;

    /// Host memory that copies from the device reach fastest. What is given back is kept for the next one to ask.
    fn host_memory(&self, bytes: usize) -> Result<HostBuffer, MemoryError>;

    /// Makes a mapping reachable for copies at full speed until what it returns is dropped.
    ///
    /// # Safety
    /// The mapping stays, with all its pages, until the returned value is dropped.
    unsafe fn pin(&self, start: *mut u8, bytes: usize) -> Result<Box<dyn Any + Send + Sync>, MemoryError>;
}

/// Memory that an accelerator can work on.
pub trait DeviceMemory {
    /// The CUDA device that it is on, if it is on one.
    fn cuda(&self) -> Option<&Arc<Device>> {
        None
    }
    fn accelerator(&self) -> Arc<dyn Accelerator>;
    /// Bytes `offset..offset + bytes` of the memory.
    fn range(&self, offset: u64, bytes: u64) -> Result<DeviceRange, MemoryError>;
}
