//! Memory of the host: a file that an engine shares (in /dev/shm, usually), a memfd of ours, or anonymous memory.

use super::fault::{self, Guard};
use super::hash::prefetch;
use super::{BLOCK, Hash, Memory, MemoryError, Strided, block_hash};
use memmap2::{MmapOptions, MmapRaw};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

/// Mapped host memory. Copies go through raw pointers: no Rust reference to the bytes is ever held across a call,
/// since the engine writes them without asking us.
#[derive(Debug)]
pub struct HostMemory {
    /// Dropped before `map`: the guard must not outlive the mapping.
    guard: Option<Guard>,
    map: MmapRaw,
    file: Option<SharedFile>,
    writable: bool,
    /// For messages: a path, or what it is for.
    what: String,
}

#[derive(Debug)]
struct SharedFile {
    file: File,
    /// False for a file that had no name when it was opened (a memfd): having none later means nothing then.
    named: bool,
}

impl HostMemory {
    /// Zeroed memory of our own.
    pub fn anonymous(bytes: u64, what: &str) -> io::Result<HostMemory> {
        // A mapping of zero bytes is refused by the kernel; one spare page stands in for it.
        let map = MmapOptions::new().len(bytes.max(1) as usize).map_anon()?.into();
        Ok(HostMemory { guard: None, map, file: None, writable: true, what: what.to_string() })
    }

    /// Maps the first `bytes` of `file`, which must have that many. Writing to a memory mapped without `writable`
    /// is a mistake of the caller and refused.
    pub fn shared(file: File, bytes: u64, what: &str, writable: bool) -> io::Result<HostMemory> {
        let metadata = file.metadata()?;
        if metadata.len() < bytes {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("it has {} bytes where {bytes} were promised", metadata.len()),
            ));
        }
        if bytes == 0 {
            return HostMemory::anonymous(0, what);
        }
        let mut options = MmapOptions::new();
        options.len(bytes as usize);
        let map = if writable { options.map_raw(&file)? } else { options.map_raw_read_only(&file)? };
        let guard = fault::guard(map.as_mut_ptr() as usize, map.len())?;
        let file = SharedFile { file, named: metadata.nlink() > 0 };
        Ok(HostMemory { guard: Some(guard), map, file: Some(file), writable, what: what.to_string() })
    }

    fn gone(&self, why: &str) -> MemoryError {
        MemoryError::Gone { what: self.what.clone(), why: why.to_string() }
    }

    fn after_access(&self) -> Result<(), MemoryError> {
        match &self.guard {
            Some(guard) if guard.lost() => Err(self.gone("its file was truncated")),
            _ => Ok(()),
        }
    }

    /// The address of `offset`, once `len` bytes from there are known to lie inside.
    fn at(&self, offset: u64, len: u64) -> Result<*mut u8, MemoryError> {
        match offset.checked_add(len) {
            // SAFETY: the sum is within the mapping (or one past its end, for a length of zero).
            Some(end) if end <= self.map.len() as u64 => Ok(unsafe { self.map.as_mut_ptr().add(offset as usize) }),
            end => Err(self.outside(offset, end.unwrap_or(u64::MAX))),
        }
    }

    fn outside(&self, offset: u64, end: u64) -> MemoryError {
        MemoryError::OutOfBounds { what: self.what.clone(), offset, end, bytes: self.bytes() }
    }

    fn may_write(&self) -> Result<(), MemoryError> {
        match self.writable {
            true => Ok(()),
            false => Err(MemoryError::ReadOnly { what: self.what.clone() }),
        }
    }

    fn at_run(&self, run: Strided, packed: usize) -> Result<*mut u8, MemoryError> {
        assert_eq!(run.count * run.element as u64, packed as u64, "the packed side has the run's size");
        let end = run.end().ok_or_else(|| self.outside(run.offset, u64::MAX))?;
        self.at(run.offset, end - run.offset)
    }
}

impl Memory for HostMemory {
    fn bytes(&self) -> u64 {
        self.map.len() as u64
    }

    fn read(&self, offset: u64, dst: &mut [u8]) -> Result<(), MemoryError> {
        let src = self.at(offset, dst.len() as u64)?;
        // SAFETY: `src` is valid for the length (checked by `at`), `dst` is ours and does not overlap a mapping that
        // nobody holds a reference into. The engine may write meanwhile: any mix of bytes is a valid u8 value.
        unsafe { std::ptr::copy_nonoverlapping(src, dst.as_mut_ptr(), dst.len()) };
        self.after_access()
    }

    fn write(&self, offset: u64, src: &[u8]) -> Result<(), MemoryError> {
        self.may_write()?;
        let dst = self.at(offset, src.len() as u64)?;
        // SAFETY: as in `read`; the mapping is writable and no reference to its bytes exists.
        unsafe { std::ptr::copy_nonoverlapping(src.as_ptr(), dst, src.len()) };
        self.after_access()
    }

    fn read_strided(&self, run: Strided, dst: &mut [u8]) -> Result<(), MemoryError> {
        let base = self.at_run(run, dst.len())?;
        for (i, element) in dst.chunks_exact_mut(run.element).enumerate() {
            // SAFETY: element i of the run ends at or before `run.end()`, which `at_run` found inside the mapping.
            unsafe {
                std::ptr::copy_nonoverlapping(base.add(i * run.stride as usize), element.as_mut_ptr(), run.element)
            };
        }
        self.after_access()
    }

    fn write_strided(&self, run: Strided, src: &[u8]) -> Result<(), MemoryError> {
        self.may_write()?;
        let base = self.at_run(run, src.len())?;
        for (i, element) in src.chunks_exact(run.element).enumerate() {
            // SAFETY: as in `read_strided`; the mapping is writable.
            unsafe { std::ptr::copy_nonoverlapping(element.as_ptr(), base.add(i * run.stride as usize), run.element) };
        }
        self.after_access()
    }

    fn hash_blocks(&self, offset: u64, out: &mut [Hash]) -> Result<(), MemoryError> {
        let base = self.at(offset, (out.len() * BLOCK) as u64)?;
        for (i, hash) in out.iter_mut().enumerate() {
            prefetch(base.wrapping_add((i + 1) * BLOCK));
            // SAFETY: block i is inside the range checked above. The slice lives for this one call; the hash reads
            // every byte once and branches on none, so an engine's concurrent write can change the result, which is
            // compared or taken again after a copy, and nothing else.
            *hash = block_hash(unsafe { std::slice::from_raw_parts(base.add(i * BLOCK), BLOCK) });
        }
        self.after_access()
    }

    fn check(&self) -> Result<(), MemoryError> {
        self.after_access()?;
        if let Some(shared) = &self.file {
            let metadata = shared.file.metadata().map_err(|e| self.gone(&e.to_string()))?;
            if metadata.len() < self.bytes() {
                return Err(self.gone("its file was truncated"));
            }
            if shared.named && metadata.nlink() == 0 {
                return Err(self.gone("its file was deleted"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_truncated_under_its_mapping_is_gone_and_nothing_crashes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let memory = HostMemory::shared(file.try_clone().unwrap(), 1 << 20, "test", true).unwrap();
        memory.write(0, &[1; 8]).unwrap();
        file.set_len(4096).unwrap();
        let mut buffer = vec![9; 1 << 20];
        assert!(matches!(memory.read(0, &mut buffer), Err(MemoryError::Gone { .. })));
        assert!(matches!(memory.write(1 << 19, &[1]), Err(MemoryError::Gone { .. })));
        assert!(matches!(memory.hash_blocks(0, &mut [0; 2]), Err(MemoryError::Gone { .. })));
        assert!(memory.check().is_err());
    }

    #[test]
    fn a_deleted_file_is_noticed_by_check() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(10).unwrap();
        let memory = HostMemory::shared(file.reopen().unwrap(), 10, "test", true).unwrap();
        memory.check().unwrap();
        drop(file);
        assert!(memory.check().unwrap_err().to_string().contains("deleted"));
    }

    #[test]
    fn accesses_outside_are_refused() {
        let memory = HostMemory::anonymous(100, "test").unwrap();
        assert!(memory.read(90, &mut [0; 11]).is_err());
        assert!(memory.write(u64::MAX, &[0; 2]).is_err());
        let run = Strided { offset: 0, stride: 50, element: 2, count: 3 };
        assert!(memory.read_strided(run, &mut [0; 6]).is_err());
        assert!(memory.hash_blocks(0, &mut [0; 1]).is_err());
    }

    #[test]
    fn strided_copies_put_elements_where_they_belong() {
        let memory = HostMemory::anonymous(64, "test").unwrap();
        let run = Strided { offset: 3, stride: 5, element: 2, count: 4 };
        memory.write_strided(run, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        let mut all = [0; 64];
        memory.read(0, &mut all).unwrap();
        assert_eq!(&all[3..10], [1, 2, 0, 0, 0, 3, 4]);
        let mut back = [0; 8];
        memory.read_strided(run, &mut back).unwrap();
        assert_eq!(back, [1, 2, 3, 4, 5, 6, 7, 8]);
    }
}
