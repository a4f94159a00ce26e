//! The thin adapter: each FUSE request calls the [`Tree`], and the answer or its errno goes back.
//!
//! Requests that may take long (commands, opens that move the view, whatever looks at the model directory by its names) run
//! on threads of their own, so that `status` always answers. The kernel is told of changes from one thread that serves no
//! request: invalidating pages from a handler waits for a reader who waits for the handler.

use super::mounted::Event;
use super::tree::{Attributes, Content, Kind, Opening, Tree};
use super::{FsError, ctl};
use fuser::{
    BackingId, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, MountOption, Notifier, OpenFlags, PollEvents, PollFlags, PollNotifier,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyOpen,
    ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, SystemTime};

/// Requests served at the same time. Passthrough reads need none; direct reads copy at memory speed, a few of them fill it.
const THREADS: usize = 8;
/// Of these, as many may be in reads that wait; more of them wait on threads of their own.
const WAITING_READS: usize = THREADS / 2;
/// Attributes and names of directories and links of the model directory may be this old.
const TTL: Duration = Duration::from_secs(1);
/// Read-ahead of the mount for readers whose pages come through us: one request of the largest size (1 MiB); the kernel's
/// default of 128 KiB halves their speed.
const READ_AHEAD_KB: &str = "1024";

/// A tree being served. It goes on until the mount is gone.
pub struct Serving {
    /// Never dropped: fuser would unmount again at the end, which may hit another mount of that name by then.
    _session: ManuallyDrop<fuser::BackgroundSession>,
}

/// How a tree is mounted.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Other users may read what file modes let them.
    pub allow_other: bool,
    /// The kernel may read the view's copies without us, if it can.
    pub passthrough: bool,
}

/// Mounts `tree` at `mount_point` and serves it from threads of its own; `ended` is told when the mount is gone and the
/// last file on it closed.
pub fn serve(tree: Arc<Tree>, mount_point: &Path, options: Options, ended: Sender<()>) -> io::Result<Serving> {
    let mounted = tree.mounted().clone();
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("weightfs".into()),
        MountOption::Subtype("weightfs".into()),
        MountOption::DefaultPermissions,
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoExec,
        MountOption::NoAtime,
    ];
    config.acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    let polls = Arc::new(Mutex::new(HashMap::new()));
    let adapter = Adapter {
        tree: tree.clone(),
        backings: backings(&tree),
        polls: polls.clone(),
        waiting_reads: AtomicUsize::new(0),
        direct_maps: false,
        ended: Mutex::new(Some(ended)),
    };
    let session = Session::new(adapter, mount_point, &config)?;
    if let Some(view) = mounted.view() {
        // Asked once, before anybody opens: one inode must be served one way for as long as it is open.
        let probe = options.passthrough.then(|| BackingId::create_raw(&session, view.file(0))).transpose();
        mounted.set_passthrough(match probe {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err("asked for by --no-passthrough".into()),
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::PERM.raw_os_error()) => {
                Err("passthrough needs CAP_SYS_ADMIN".into())
            }
            Err(e) => Err(format!("the kernel refuses passthrough: {e}")),
        });
    }
    let (events, inbox) = channel();
    let notifier = session.notifier();
    let session = session.spawn()?;
    let told = tree.clone();
    thread::Builder::new().name("notify".into()).spawn(move || {
        for event in inbox {
            tell_kernel(&told, &notifier, &polls, event);
        }
    })?;
    mounted.on_event(Box::new(move |event| {
        // The notify thread lives as long as the process; if it is gone, so is the mount.
        let _ = events.send(event);
    }));
    set_read_ahead(mount_point);
    Ok(Serving { _session: ManuallyDrop::new(session) })
}

fn tell_kernel(tree: &Tree, notifier: &Notifier, polls: &Mutex<HashMap<u64, PollNotifier>>, event: Event) {
    match event {
        Event::ViewMoved => {
            for shard in 0..tree.mounted().directory.shards.len() {
                if let Some(ino) = tree.weights_ino(shard) {
                    // Pages and attributes; passthrough files have no pages of ours.
                    if let Err(e) = notifier.inval_inode(INodeNo(ino), 0, 0) {
                        log::debug!("the kernel could not be told of new weights: {e}");
                    }
                }
            }
        }
        Event::StatusChanged => {
            let waiting: Vec<PollNotifier> = polls.lock().drain().map(|(_, p)| p).collect();
            for poll in waiting {
                let _ = poll.notify();
            }
        }
    }
}

/// Raises the mount's read-ahead, if we may (root); without it readers are slower, nothing else.
fn set_read_ahead(mount_point: &Path) {
    // Asked of mountinfo and not by stat, which would be a request to ourselves.
    let Some(mount) = super::mounts::find(mount_point) else { return };
    let path = format!("/sys/class/bdi/{}/read_ahead_kb", mount.device);
    if let Err(e) = std::fs::write(&path, READ_AHEAD_KB) {
        log::debug!("{path}: {e}");
    }
}

fn backings(tree: &Tree) -> Arc<Backings> {
    Arc::new(tree.mounted().directory.shards.iter().map(|_| OnceLock::new()).collect())
}

struct Adapter {
    tree: Arc<Tree>,
    /// One for each shard while the mount lives: all opens of an inode must name the same backing file.
    backings: Arc<Backings>,
    polls: Arc<Mutex<HashMap<u64, PollNotifier>>>,
    waiting_reads: AtomicUsize,
    /// Files that are not cached can be mapped all the same.
    direct_maps: bool,
    ended: Mutex<Option<Sender<()>>>,
}

fn errno(e: FsError) -> Errno {
    log::debug!("{e}");
    Errno::from_i32(e.errno.raw_os_error())
}

fn attr(a: &Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(a.ino),
        size: a.size,
        blocks: a.size.div_ceil(512),
        atime: a.mtime,
        mtime: a.mtime,
        ctime: a.ctime,
        crtime: a.mtime,
        kind: file_type(a.kind),
        perm: a.mode as u16,
        nlink: if a.kind == Kind::Directory { 2 } else { 1 },
        uid: a.uid,
        gid: a.gid,
        rdev: 0,
        // What readers should ask for at a time.
        blksize: 1 << 20,
        flags: 0,
    }
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Symlink => FileType::Symlink,
    }
}

fn ttl(a: &Attributes) -> Duration {
    if a.cacheable { TTL } else { Duration::ZERO }
}

impl Adapter {
    /// Answers here, or on a thread of its own where that may take long.
    fn serve(&self, name: &str, apart_from_others: bool, answer: impl FnOnce(&Tree) + Send + 'static) {
        if !apart_from_others {
            return guarded(|| answer(&self.tree));
        }
        let tree = self.tree.clone();
        apart(name, move || answer(&tree));
    }

    /// Answers an open, with the backing file of a shard of the view where the kernel takes one.
    fn reply_open(&self, opening: Opening, reply: ReplyOpen) {
        reply_open(&self.tree, &self.backings, self.direct_maps, opening, reply);
    }
}

type Backings = Vec<OnceLock<Option<Arc<BackingId>>>>;

fn reply_open(tree: &Tree, backings: &Backings, direct_maps: bool, opening: Opening, reply: ReplyOpen) {
    let handle = FileHandle(opening.handle);
    let mounted = tree.mounted();
    match opening.content {
        Content::Held(shard) if mounted.is_passthrough() => {
            let backing = backings[shard].get_or_init(|| {
                let file = mounted.view()?.file(shard);
                reply.open_backing(file).map(Arc::new).inspect_err(|e| log::error!("passthrough: {e}")).ok()
            });
            match backing {
                Some(id) => reply.opened_passthrough(handle, FopenFlags::empty(), id),
                None => reply.opened(handle, FopenFlags::empty()),
            }
        }
        // Opening drops the kernel's pages of the file, which may be of an older view.
        Content::Held(_) => reply.opened(handle, FopenFlags::empty()),
        Content::Stable => reply.opened(handle, FopenFlags::empty()),
        // Pages belong to the name: those of the file that had it before would be given to who opened this one. Where the
        // kernel maps no file without pages, that is the lesser evil.
        Content::Ordinary if !direct_maps => reply.opened(handle, FopenFlags::empty()),
        Content::Ordinary => reply.opened(handle, FopenFlags::FOPEN_DIRECT_IO),
        Content::Direct(_) | Content::Composed | Content::Control => reply.opened(handle, FopenFlags::FOPEN_DIRECT_IO),
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each is asked for alone: a kernel without one still has the others.
        if config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok() {
            // One level: our backing files are memfds, which are not stacked on anything.
            let _ = config.set_max_stack_depth(1);
        }
        self.direct_maps = config.add_capabilities(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP).is_ok();
        for wanted in [InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_AUTO_INVAL_DATA] {
            let _ = config.add_capabilities(wanted);
        }
        Ok(())
    }

    fn destroy(&mut self) {
        if let Some(ended) = self.ended.lock().take() {
            let _ = ended.send(());
        }
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_os_string();
        self.serve("lookup", self.tree.looks_at_name(parent.0, &name), move |tree| {
            match tree.lookup(parent.0, &name) {
                Ok(a) => reply.entry_with_ttls(&ttl(&a), &ttl(&a), &attr(&a), Generation(0)),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.tree.forget(ino.0, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.serve("getattr", self.tree.looks_at_names(ino.0), move |tree| match tree.attributes(ino.0) {
            Ok(a) => reply.attr(&ttl(&a), &attr(&a)),
            Err(e) => reply.error(errno(e)),
        });
    }

    /// Only what a shell's `>` does to `ctl`: truncation, which means nothing there.
    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let other = mode.is_some() || uid.is_some() || gid.is_some() || atime.is_some() || mtime.is_some();
        if other || size.is_none() || !self.tree.is_control(ino.0) {
            return reply.error(Errno::EROFS);
        }
        self.getattr(_req, ino, None, reply);
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        use std::os::unix::ffi::OsStrExt;
        self.serve("readlink", self.tree.looks_at_names(ino.0), move |tree| match tree.readlink(ino.0) {
            Ok(target) => reply.data(target.as_os_str().as_bytes()),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let write = !matches!(flags.acc_mode(), fuser::OpenAccMode::O_RDONLY);
        let pid = req.pid();
        if !self.tree.open_may_wait(ino.0) {
            return guarded(|| match self.tree.open(ino.0, write, pid) {
                Ok(opening) => self.reply_open(opening, reply),
                Err(e) => reply.error(errno(e)),
            });
        }
        let (tree, backings, direct_maps) = (self.tree.clone(), self.backings.clone(), self.direct_maps);
        apart("open", move || match tree.open(ino.0, write, pid) {
            Ok(opening) => reply_open(&tree, &backings, direct_maps, opening, reply),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = move |tree: &Tree| match tree.read(fh.0, offset, size as usize) {
            Ok(bytes) => reply.data(&bytes),
            Err(e) => reply.error(errno(e)),
        };
        if !self.tree.read_may_wait(fh.0) {
            return guarded(|| read(&self.tree));
        }
        if self.waiting_reads.fetch_add(1, Ordering::AcqRel) < WAITING_READS {
            guarded(|| read(&self.tree));
        } else {
            let tree = self.tree.clone();
            apart("read", move || read(&tree));
        }
        self.waiting_reads.fetch_sub(1, Ordering::AcqRel);
    }

    fn write(
        &self,
        req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mounted = self.tree.mounted().clone();
        // Only `ctl` can be open for writing. The mode keeps others out of it; with an open file passed on, this does.
        if req.uid() != 0 && req.uid() != mounted.owner.0 {
            return reply.error(Errno::EPERM);
        }
        let command = match ctl::parse(data) {
            Ok(command) => command,
            Err(e) => return reply.error(errno(mounted.refused(e))),
        };
        let (size, writer) = (data.len() as u32, req.pid());
        apart("command", move || match mounted.command(&command, writer) {
            Ok(_) => reply.written(size),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        self.tree.flush(fh.0);
        reply.ok();
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.polls.lock().remove(&fh.0);
        self.tree.release(fh.0);
        reply.ok();
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.serve("opendir", self.tree.lists_names(ino.0), move |tree| match tree.open_directory(ino.0) {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn readdir(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        match self.tree.entries(fh.0) {
            Ok(entries) => {
                for (i, entry) in entries.iter().enumerate().skip(offset as usize) {
                    if reply.add(INodeNo(entry.ino), i as u64 + 1, file_type(entry.kind), &entry.name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(e) => reply.error(errno(e)),
        }
    }

    fn releasedir(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        self.tree.release(fh.0);
        reply.ok();
    }

    /// No attributes beyond the usual; quietly, since every `ls -l` and copy asks.
    fn getxattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _req: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    // Names come from the model directory: none is made, moved or removed here.

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn symlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _target: &Path, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _newparent: INodeNo,
        _newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn link(&self, _req: &Request, _ino: INodeNo, _newparent: INodeNo, _newname: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match rustix::fs::statvfs(&self.tree.mounted().directory.path) {
            Ok(s) => reply.statfs(
                s.f_blocks,
                s.f_bfree,
                s.f_bavail,
                s.f_files,
                s.f_ffree,
                s.f_bsize as u32,
                s.f_namemax as u32,
                s.f_frsize as u32,
            ),
            Err(e) => reply.error(Errno::from_i32(e.raw_os_error())),
        }
    }

    /// `status` is readable when it says something that the file's reader has not read.
    /// No file here is a device: whoever asks (Python asks every file whether it is a terminal) hears so.
    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        notifier: PollNotifier,
        _events: PollEvents,
        flags: PollFlags,
        reply: ReplyPoll,
    ) {
        if flags.contains(PollFlags::FUSE_POLL_SCHEDULE_NOTIFY) {
            // Before the look, so that a change in between wakes the poller and is not lost.
            self.polls.lock().insert(fh.0, notifier);
        }
        match self.tree.has_news(fh.0) {
            Ok(true) => reply.poll(PollEvents::POLLIN | PollEvents::POLLRDNORM | PollEvents::POLLPRI),
            Ok(false) => reply.poll(PollEvents::empty()),
            Err(e) => reply.error(errno(e)),
        }
    }
}

/// Answers on one of the threads that serve requests: a fault of ours costs its answer (EIO, when the reply is dropped), and
/// not the thread, the last of which would take the mount with it.
fn guarded(answer: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(answer)).is_err() {
        log::error!("a request met a fault in weightfs and was answered EIO");
    }
}

/// Runs what may take long on a thread of its own. If there is no thread to be had, the reply inside is dropped, which
/// answers EIO.
fn apart(name: &str, work: impl FnOnce() + Send + 'static) {
    if let Err(e) = thread::Builder::new().name(name.into()).spawn(work) {
        log::error!("no thread for '{name}': {e}");
    }
}
