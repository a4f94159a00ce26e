//! Host memory to copy weights to.

use memmap2::{Advice, MmapMut};
use std::io;
use std::ops::{Deref, DerefMut};

/// A piece of host memory: anonymous, or one that a GPU copies to at full speed.
pub struct HostBuffer {
    memory: Backing,
    bytes: usize,
}

/// Memory that somebody else made. It is kept until the buffer is dropped.
pub trait Lent: Send + Sync + Deref<Target = [u8]> + DerefMut {}
impl<T: Send + Sync + Deref<Target = [u8]> + DerefMut> Lent for T {}

enum Backing {
    Anonymous(MmapMut),
    Lent(Box<dyn Lent>),
}

impl HostBuffer {
    /// Zeroed memory in large pages where the system has them: the pages of many small ones cost more than copies to them.
    pub fn anonymous(bytes: usize) -> io::Result<HostBuffer> {
        let memory = MmapMut::map_anon(bytes.max(1))?;
        let _ = memory.advise(Advice::HugePage);
        Ok(HostBuffer { memory: Backing::Anonymous(memory), bytes })
    }

    /// The first `bytes` of `memory`.
    pub fn lent(memory: impl Lent + 'static, bytes: usize) -> HostBuffer {
        debug_assert!(bytes <= memory.len());
        HostBuffer { memory: Backing::Lent(Box::new(memory)), bytes }
    }
}

impl Deref for HostBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all: &[u8] = match &self.memory {
            Backing::Anonymous(memory) => memory,
            Backing::Lent(memory) => memory,
        };
        &all[..self.bytes]
    }
}

impl DerefMut for HostBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let all: &mut [u8] = match &mut self.memory {
            Backing::Anonymous(memory) => memory,
            Backing::Lent(memory) => memory,
        };
        &mut all[..self.bytes]
    }
}

impl std::fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostBuffer({} bytes)", self.bytes)
    }
}
