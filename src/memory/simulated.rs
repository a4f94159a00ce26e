//! A device that is no device: host memory under made-up addresses, for tests of what plans work for a GPU.

use super::{
    Accelerator, BLOCK, DeviceMemory, DeviceRange, Hash, HostBuffer, HostMemory, Memory, MemoryError, Piece, Span,
    Strided, WorkingMemory, block_hash,
};
use parking_lot::Mutex;
use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug, Default)]
pub struct SimulatedDevice {
    memories: Mutex<Vec<(u64, Arc<HostMemory>)>>,
    pub hashed: AtomicU64,
    pub gathered: AtomicU64,
}

#[derive(Debug)]
pub struct SimulatedMemory {
    device: Arc<SimulatedDevice>,
    memory: Arc<HostMemory>,
    base: u64,
}

impl SimulatedDevice {
    pub fn memory(self: &Arc<Self>, bytes: u64) -> SimulatedMemory {
        let mut memories = self.memories.lock();
        let base = memories.last().map_or(1 << 40, |(base, m)| (base + m.bytes()).next_multiple_of(512) + 4096);
        let memory = Arc::new(HostMemory::anonymous(bytes, "simulated").unwrap());
        memories.push((base, memory.clone()));
        SimulatedMemory { device: self.clone(), memory, base }
    }

    fn read(&self, address: u64, dst: &mut [u8]) -> Result<(), MemoryError> {
        let memories = self.memories.lock();
        let (base, memory) = memories.iter().rev().find(|(base, _)| *base <= address).expect("a mapped address");
        memory.read(address - base, dst)
    }
}

impl Accelerator for SimulatedDevice {
    fn name(&self) -> String {
        "simulated".into()
    }

    fn working_memory(&self) -> WorkingMemory {
        WorkingMemory { host: 0, device: 0 }
    }

    fn hash_runs(&self, runs: &[DeviceRange], each: &mut dyn FnMut(u64, &[Hash])) -> Result<(), MemoryError> {
        let mut hashes = Vec::new();
        for run in runs {
            assert_eq!(run.bytes() % BLOCK as u64, 0);
            let mut bytes = vec![0; run.bytes() as usize];
            self.read(run.address(), &mut bytes)?;
            hashes.extend(bytes.chunks(BLOCK).map(block_hash));
        }
        self.hashed.fetch_add(hashes.len() as u64, Ordering::Relaxed);
        for (i, part) in hashes.chunks(3).enumerate() {
            each(3 * i as u64, part);
        }
        Ok(())
    }

    fn hash_spans(&self, spans: &[Span], starts: &[u32]) -> Result<Vec<Hash>, MemoryError> {
        starts
            .windows(2)
            .map(|w| {
                let mut block = vec![0; BLOCK];
                let mut filled = 0;
                for span in &spans[w[0] as usize..w[1] as usize] {
                    let at = span.at as usize;
                    self.read(span.range.address(), &mut block[at..at + span.range.bytes() as usize])?;
                    filled += span.range.bytes() as usize;
                }
                assert_eq!(filled, BLOCK, "spans fill their block");
                self.hashed.fetch_add(1, Ordering::Relaxed);
                Ok(block_hash(&block))
            })
            .collect()
    }

    fn gather(&self, pieces: &mut [Piece<'_>]) -> Result<(), MemoryError> {
        self.gathered.fetch_add(pieces.len() as u64, Ordering::Relaxed);
        for piece in pieces {
            for (i, element) in piece.dst.chunks_mut(piece.element).enumerate() {
                self.read(piece.range.address() + i as u64 * piece.stride, element)?;
            }
        }
        Ok(())
    }

    fn host_memory(&self, bytes: usize) -> Result<HostBuffer, MemoryError> {
        Ok(HostBuffer::anonymous(bytes).unwrap())
    }

    unsafe fn pin(&self, _start: *mut u8, _bytes: usize) -> Result<Box<dyn Any + Send + Sync>, MemoryError> {
        Ok(Box::new(()))
    }
}

impl Memory for SimulatedMemory {
    fn bytes(&self) -> u64 {
        self.memory.bytes()
    }
    fn read(&self, offset: u64, dst: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(offset, dst)
    }
    fn write(&self, offset: u64, src: &[u8]) -> Result<(), MemoryError> {
        self.memory.write(offset, src)
    }
    fn read_strided(&self, run: Strided, dst: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read_strided(run, dst)
    }
    fn write_strided(&self, run: Strided, src: &[u8]) -> Result<(), MemoryError> {
        self.memory.write_strided(run, src)
    }
    fn hash_blocks(&self, offset: u64, out: &mut [Hash]) -> Result<(), MemoryError> {
        self.memory.hash_blocks(offset, out)
    }
    fn check(&self) -> Result<(), MemoryError> {
        Ok(())
    }
    fn device(&self) -> Option<&dyn DeviceMemory> {
        Some(self)
    }
}

impl DeviceMemory for SimulatedMemory {
    fn accelerator(&self) -> Arc<dyn Accelerator> {
        self.device.clone()
    }
    fn range(&self, offset: u64, bytes: u64) -> Result<DeviceRange, MemoryError> {
        assert!(offset + bytes <= self.bytes());
        Ok(DeviceRange::new(self.base + offset, bytes, Arc::new(())))
    }
}
