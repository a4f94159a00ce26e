//! Survives the engine truncating a file that we have mapped.
//!
//! Touching a page beyond the end of a mapped file raises SIGBUS. The handler here puts anonymous zero pages in place
//! of the whole mapping and marks it lost, so that the copy in flight finishes (on zeros) and its caller, which checks
//! the mark after every copy, reports the memory as gone. Wayland compositors guard their clients' buffers this way.

use std::io;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Memories of all manifests together: an engine has a handful, a process that shares each tensor on its own some thousands.
const SLOTS: usize = 16384;

struct Slot {
    taken: AtomicBool,
    start: AtomicUsize,
    end: AtomicUsize,
    lost: AtomicBool,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }
}; SLOTS];

/// A mapping under guard, from [`guard`] to drop. Drop it before the mapping goes.
#[derive(Debug)]
pub(super) struct Guard {
    slot: usize,
}

impl Guard {
    /// True once a page of the mapping had vanished: what was copied since is not the engine's.
    pub fn lost(&self) -> bool {
        TABLE[self.slot].lost.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let slot = &TABLE[self.slot];
        slot.start.store(0, Ordering::SeqCst);
        slot.end.store(0, Ordering::SeqCst);
        slot.lost.store(false, Ordering::SeqCst);
        slot.taken.store(false, Ordering::SeqCst);
    }
}

/// Guards the mapping at `start..start + bytes` (page-aligned, owned by the caller while the guard lives).
pub(super) fn guard(start: usize, bytes: usize) -> io::Result<Guard> {
    install()?;
    for (i, slot) in TABLE.iter().enumerate() {
        if slot.taken.compare_exchange(false, true, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            slot.end.store(start + bytes, Ordering::SeqCst);
            slot.start.store(start, Ordering::SeqCst);
            return Ok(Guard { slot: i });
        }
    }
    Err(io::Error::other(format!("more than {SLOTS} memories are mapped")))
}

fn install() -> io::Result<()> {
    static ONCE: Once = Once::new();
    static FAILED: AtomicBool = AtomicBool::new(false);
    ONCE.call_once(|| {
        // SAFETY: an all-zero sigaction is a valid value of the C struct; its fields are set below.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: `action` is initialised, the handler has the signature that SA_SIGINFO asks for and calls only
        // async-signal-safe functions.
        let rc = unsafe {
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut())
        };
        FAILED.store(rc != 0, Ordering::SeqCst);
    });
    match FAILED.load(Ordering::SeqCst) {
        true => Err(io::Error::other("the SIGBUS handler could not be installed")),
        false => Ok(()),
    }
}

extern "C" fn on_sigbus(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler; for SIGBUS its address field is set.
    let address = unsafe { (*info).si_addr() } as usize;
    for slot in &TABLE {
        let (start, end) = (slot.start.load(Ordering::SeqCst), slot.end.load(Ordering::SeqCst));
        if start != 0 && (start..end).contains(&address) {
            slot.lost.store(true, Ordering::SeqCst);
            // SAFETY: the range is a live mapping of ours (its guard is dropped before it is unmapped), so MAP_FIXED
            // replaces our own pages only; mmap and errno are async-signal-safe on Linux, and errno is put back.
            let done = unsafe {
                let errno = *libc::__errno_location();
                let page = libc::mmap(
                    start as *mut libc::c_void,
                    end - start,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    -1,
                    0,
                );
                *libc::__errno_location() = errno;
                page != libc::MAP_FAILED
            };
            if done {
                return;
            }
        }
    }
    // Not ours: the default action, so that the process dies of the fault as it would have.
    // SAFETY: signal() with SIG_DFL is async-signal-safe; on return the faulting instruction runs again.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}
