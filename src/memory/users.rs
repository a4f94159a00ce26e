//! Who else uses a file of ours: the kernel serves passthrough mappings from it without telling us, also after the file
//! they were made through is closed.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// A second opening of a memfd, through which the kernel can be asked whether there are more.
#[derive(Debug)]
pub struct UsersProbe(File);

impl UsersProbe {
    /// `memfd` must not have been opened by its path in /proc before.
    pub fn new(memfd: &File) -> io::Result<UsersProbe> {
        let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
        let file = File::options().read(true).write(true).open(path)?;
        // Should a lease of ours ever stand in somebody's way, the signal for it is one that is ignored by default.
        // SAFETY: plain numbers, on a descriptor that is open.
        match unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(UsersProbe(file)),
        }
    }

    /// Whether anybody else has the file open or mapped. A write lease (fcntl(2)) is granted only if nobody has; it is
    /// given back at once. Nobody may be opening the file meanwhile. False if the kernel grants no leases here.
    pub fn has_others(&self) -> bool {
        let fd = self.0.as_raw_fd();
        // SAFETY: plain numbers, on a descriptor that is open.
        match unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_WRLCK) } {
            -1 => io::Error::last_os_error().raw_os_error() == Some(libc::EAGAIN),
            _ => {
                // SAFETY: as above.
                unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK) };
                false
            }
        }
    }
}

/// fcntl(2); libc has it for some targets only.
const F_SETSIG: libc::c_int = 10;

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::MemfdFlags;

    #[test]
    fn a_mapping_counts_until_it_goes() {
        let file = File::from(rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(8192).unwrap();
        let probe = UsersProbe::new(&file).unwrap();
        assert!(!probe.has_others());
        let reader = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        assert!(probe.has_others());
        // SAFETY: the file is not cut off.
        let map = unsafe { memmap2::Mmap::map(&reader) }.unwrap();
        drop(reader);
        assert!(probe.has_others());
        drop(map);
        assert!(!probe.has_others());
    }

    #[test]
    fn the_mapping_that_a_device_copies_into_does_not_count() {
        let file = crate::memory::sealed_memfd("test", 8192).unwrap();
        let probe = UsersProbe::new(&file).unwrap();
        let device = crate::memory::simulated::SimulatedDevice::default();
        let mut bytes = crate::memory::SharedBytes::populated(&file, &device).unwrap();
        assert!(!probe.has_others());
        bytes[5000] = 7;
        let mut back = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut back, 5000).unwrap();
        assert_eq!(back, [7]);
        assert!(!probe.has_others());
    }
}
