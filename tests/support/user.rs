//! Being another user for a while: a thread without root's rights, whose mounts go through fusermount3.

use super::have;
use rustix::fs::{FileType, Mode, mknodat};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// nobody, who owns nothing.
pub const NOBODY: u32 = 65534;

/// The command, copied to where that user can reach it.
static COPY: Mutex<Option<PathBuf>> = Mutex::new(None);

/// The weightfs program that the calling thread can run.
pub fn program() -> PathBuf {
    let copy = COPY.lock().unwrap().clone();
    match copy {
        Some(copy) if !rustix::process::geteuid().is_root() => copy,
        _ => env!("CARGO_BIN_EXE_weightfs").into(),
    }
}

/// Runs `test` as nobody, in a mount namespace of its own where /dev/fuse is open to all, as it is on most machines.
/// False where that cannot be done, which it says. One at a time.
pub fn as_nobody(test: impl FnOnce() + Send) -> bool {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    if !have("fusermount3") {
        return false;
    }
    let scratch = super::Scratch::new();
    let copy = scratch.join("weightfs");
    std::fs::copy(env!("CARGO_BIN_EXE_weightfs"), &copy).unwrap();
    for path in [scratch.path(), &copy] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    }
    let devices = scratch.dir("dev");
    *COPY.lock().unwrap() = Some(copy);
    let result = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            open_fuse_device(&devices);
            become_nobody();
            test();
        });
        thread.join()
    });
    *COPY.lock().unwrap() = None;
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
    true
}

/// For this thread and its children only.
fn open_fuse_device(devices: &Path) {
    // SAFETY: only the mount namespace and the working directory stop being shared with the other threads; no file
    // descriptors do.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    mount("none", devices, "tmpfs", MountFlags::empty(), None).unwrap();
    let device = devices.join("fuse");
    mknodat(
        rustix::fs::CWD,
        &device,
        FileType::CharacterDevice,
        Mode::from_raw_mode(0o666),
        rustix::fs::makedev(10, 229),
    )
    .unwrap();
    std::fs::set_permissions(&device, PermissionsExt::from_mode(0o666)).unwrap();
    mount_bind(&device, "/dev/fuse").unwrap();
}

/// Changes the calling thread alone: the raw calls, where libc's would change all threads.
fn become_nobody() {
    let id = NOBODY as libc::c_long;
    // SAFETY: system calls on this thread's credentials, with plain numbers and an empty list.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()), 0);
        assert_eq!(libc::syscall(libc::SYS_setresgid, id, id, id), 0);
        assert_eq!(libc::syscall(libc::SYS_setresuid, id, id, id), 0);
    }
}
