//! A memfd that we write through a mapping, so that a GPU can copy into it, while others read the file.

use super::{Accelerator, MemoryError};
use memmap2::MmapRaw;
use rayon::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::Advice;
use std::any::Any;
use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};

/// Populated and pinned by one thread at a time. Pieces of the file that start at multiples of it lie in one pin each.
pub const PIN_CHUNK: usize = 256 << 20;

/// The bytes of a file that has no name and never changes its size.
pub struct SharedBytes {
    /// Dropped before the mapping they are of.
    pins: Vec<Box<dyn Any + Send + Sync>>,
    map: MmapRaw,
    bytes: usize,
}

/// A memfd of `bytes`, its size sealed, so that nothing that maps it can ever be cut off. Its memory is taken as it is
/// written.
pub fn sealed_memfd(name: &str, bytes: u64) -> io::Result<File> {
    let name: String = name.chars().filter(|c| *c != '\0').take(200).collect();
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let file = File::from(fd);
    file.set_len(bytes)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(file)
}

impl SharedBytes {
    /// Maps all of a [`sealed_memfd`] and takes its memory, on all cores; pins it for `accelerator` as far as the system
    /// lets it.
    pub fn populated(file: &File, accelerator: &dyn Accelerator) -> io::Result<SharedBytes> {
        let bytes = file.metadata()?.len() as usize;
        let map = memmap2::MmapOptions::new().len(bytes.max(1)).map_raw(file)?;
        let start = map.as_mut_ptr() as usize;
        let chunks: Vec<(usize, usize)> =
            (0..bytes).step_by(PIN_CHUNK).map(|at| (at, PIN_CHUNK.min(bytes - at))).collect();
        // SAFETY: advice about our own mapping; refused where the system has no large pages for files.
        let _ = unsafe { rustix::mm::madvise(start as *mut _, bytes.max(1), Advice::LinuxHugepage) };
        let pins = chunks.into_par_iter().with_max_len(1).map(|(at, len)| {
            let start = (start + at) as *mut u8;
            // SAFETY: the range is part of our mapping. This touches every page and fails, where a write would raise
            // SIGBUS, when there is no memory for it.
            unsafe { rustix::mm::madvise(start.cast(), len, Advice::LinuxPopulateWrite) }?;
            // SAFETY: the mapping outlives the pins (field order), and its file's size is sealed.
            Ok(unsafe { accelerator.pin(start, len) })
        });
        let pins: Vec<Result<_, MemoryError>> = pins.collect::<io::Result<_>>()?;
        let refused = pins.iter().find_map(|p| p.as_ref().err());
        if let Some(e) = refused {
            log::warn!("copies from the GPU go through a buffer: {e}");
        }
        Ok(SharedBytes { pins: pins.into_iter().flatten().collect(), map, bytes })
    }

    /// Whether all of it is reached by copies at full speed.
    pub fn is_pinned(&self) -> bool {
        self.pins.len() == self.bytes.div_ceil(PIN_CHUNK)
    }
}

impl Deref for SharedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is `bytes` long and stays; its file cannot shrink. Readers in other processes and the kernel
        // only read; who writes has `self` mutably.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr(), self.bytes) }
    }
}

impl DerefMut for SharedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr(), self.bytes) }
    }
}
