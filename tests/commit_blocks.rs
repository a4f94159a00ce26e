//! Power cuts under real file systems: ext4 and XFS on a loop device whose disk is a file that this test serves through
//! FUSE and of which it remembers every write and flush. Every prefix of them, with some of the writes after the last
//! flush lost or torn at 512 bytes, is put on another disk, mounted, and recovered.
//!
//! Needs root, /dev/fuse, loop devices, mkfs.ext4 and mkfs.xfs:
//! `cargo test --release --test commit_blocks -- --ignored --nocapture`

mod commit_support;

use commit_support::world::{Committed, optimizer};
use commit_support::*;
use fuser::*;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};
use weightfs::commit::{CommitRequest, Committer, FoldOutcome, Options};
use weightfs::model::ModelDirectory;

const PAGE: u64 = 4096;
const SECTOR: usize = 512;
/// Prefixes with a random fate of the writes after their last flush, beside each plain prefix.
const VARIANTS: u64 = 6;

#[derive(Clone)]
enum Event {
    Write(u64, Vec<u8>),
    Flush,
}

#[derive(Clone, Default)]
struct Pages(BTreeMap<u64, Vec<u8>>);

impl Pages {
    fn read(&self, offset: u64, buffer: &mut [u8]) {
        buffer.fill(0);
        let end = offset + buffer.len() as u64;
        for (page, bytes) in self.0.range(offset / PAGE..end.div_ceil(PAGE)) {
            let (from, to) = ((page * PAGE).max(offset), ((page + 1) * PAGE).min(end));
            let source = &bytes[(from - page * PAGE) as usize..(to - page * PAGE) as usize];
            buffer[(from - offset) as usize..(to - offset) as usize].copy_from_slice(source);
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut at = offset;
        let end = offset + bytes.len() as u64;
        while at < end {
            let to = ((at / PAGE + 1) * PAGE).min(end);
            let page = self.0.entry(at / PAGE).or_insert_with(|| vec![0; PAGE as usize]);
            page[(at % PAGE) as usize..][..(to - at) as usize]
                .copy_from_slice(&bytes[(at - offset) as usize..(to - offset) as usize]);
            at = to;
        }
    }
}

#[derive(Default)]
struct Recorded {
    pages: Pages,
    events: Vec<Event>,
}

/// One file, `disk`.
struct Recorder {
    bytes: u64,
    recorded: Arc<Mutex<Recorded>>,
}

impl Recorder {
    fn attr(&self, ino: INodeNo) -> FileAttr {
        let file = ino != INodeNo::ROOT;
        FileAttr {
            ino,
            size: if file { self.bytes } else { 0 },
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if file { FileType::RegularFile } else { FileType::Directory },
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        }
    }
}

const TTL: Duration = Duration::from_secs(3600);

impl Filesystem for Recorder {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == "disk" {
            true => reply.entry(&TTL, &self.attr(INodeNo(2)), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attr(ino));
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut buffer = vec![0; size as usize];
        self.recorded.lock().unwrap().pages.read(offset, &mut buffer);
        reply.data(&buffer);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut recorded = self.recorded.lock().unwrap();
        recorded.pages.write(offset, data);
        recorded.events.push(Event::Write(offset, data.to_vec()));
        reply.written(data.len() as u32);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.recorded.lock().unwrap().events.push(Event::Flush);
        reply.ok();
    }
}

fn run(program: &str, words: &[&dyn AsRef<OsStr>]) -> String {
    let output = Command::new(program).args(words.iter().map(|w| w.as_ref())).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_string()
}

/// Unmounted when it goes, also when the test fails.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

fn read(committer: &Committer, id: u64) -> Committed {
    let snapshot = committer.snapshot(id).unwrap();
    let read = |s| {
        let mut bytes = vec![0; snapshot.shard_bytes(s) as usize];
        snapshot.read(s, 0, &mut bytes).unwrap();
        bytes
    };
    let shards = (0..snapshot.shards()).map(read).collect();
    Committed { shards, optimizer: if id == 0 { None } else { committer.optimizer_state(id).unwrap() } }
}

fn play(kind: &str, bytes: u64, make: &[&str], mount: &str) {
    let work = tempfile::tempdir().unwrap();
    let at = |name: &str| {
        let path = work.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    };
    let (fuse, point) = (at("fuse"), at("mounted"));
    let recorded = Arc::new(Mutex::new(Recorded::default()));
    let recorder = Recorder { bytes, recorded: recorded.clone() };
    let session = fuser::spawn_mount(recorder, &fuse, &Config::default()).unwrap();
    let device = Loop(run("losetup", &[&"--find", &"--show", &fuse.join("disk")]));
    let words: Vec<&dyn AsRef<OsStr>> = make[1..].iter().map(|w| w as _).chain([&device.0 as _]).collect();
    run(make[0], &words);
    run("mount", &[&"-o", &mount, &device.0, &point]);
    let mounted = Mounted(point.clone());

    let directory = at("mounted/model");
    let shards = two_shards();
    let model = write_model(&directory, &shards);
    let live = Live::of(&shards);
    let mut random = Random(6);
    let mut commits = vec![Committed { shards: live.bytes(), optimizer: None }];
    let (committer, _) = Committer::open(model, Options::default()).unwrap();
    let mut commit = |n: u8, base: &mut Option<Recorded>| {
        live.scribble(&mut random, 200);
        if n == 3 {
            run("sync", &[&"-f", &point]);
            let mut recorded = recorded.lock().unwrap();
            recorded.events.clear();
            *base = Some(Recorded { pages: recorded.pages.clone(), events: Vec::new() });
        }
        let state = optimizer(n);
        let request = CommitRequest { optimizer: Some(&state), ..CommitRequest::new("on a disk", n as u64) };
        let report = committer.commit(&live, &request).unwrap();
        assert!(matches!(report.fold, FoldOutcome::Folded { .. }));
        commits.push(Committed { shards: live.bytes(), optimizer: Some(state) });
    };
    let mut base = None;
    for n in 1..=3 {
        commit(n, &mut base);
    }
    let acknowledged = recorded.lock().unwrap().events.len();
    run("sync", &[&"-f", &point]);
    let events = recorded.lock().unwrap().events.clone();
    drop(committer);
    drop(mounted);
    drop(device);
    drop(session);

    let base = base.unwrap().pages;
    let image = work.path().join("image");
    let (mut points, mut old, mut new) = (0, 0, 0);
    for n in 0..=events.len() {
        let flushed = events[..n].iter().rposition(|e| matches!(e, Event::Flush)).map_or(0, |f| f + 1);
        let variants = if events[flushed..n].is_empty() { 1 } else { 1 + VARIANTS };
        for variant in 0..variants {
            let mut pages = base.clone();
            for (i, event) in events[..n].iter().enumerate() {
                let Event::Write(offset, bytes) = event else { continue };
                match if variant == 0 || i < flushed { 0 } else { random.below(3) } {
                    0 => pages.write(*offset, bytes),
                    1 => {}
                    _ => {
                        for (s, sector) in bytes.chunks(SECTOR).enumerate() {
                            if random.below(2) == 0 {
                                pages.write(offset + (s * SECTOR) as u64, sector);
                            }
                        }
                    }
                }
            }
            let _ = std::fs::remove_file(&image);
            let file = File::create(&image).unwrap();
            file.set_len(bytes).unwrap();
            pages.0.iter().for_each(|(page, bytes)| file.write_all_at(bytes, page * PAGE).unwrap());
            drop(file);
            run("mount", &[&"-o", &format!("{mount},loop"), &image, &point]);
            let _mounted = Mounted(point.clone());
            let what = format!("{kind}: {n} of {} events, variant {variant}", events.len());
            let newest = check(&directory, &shards, &commits, if n >= acknowledged { 3 } else { 2 }, &what);
            points += 1;
            if newest == 2 { old += 1 } else { new += 1 }
        }
    }
    println!(
        "{kind}: {} writes and flushes, {points} power cuts: {old} recovered to the commit before, {new} to this one",
        events.len()
    );
}

fn check(directory: &Path, shards: &[(String, Vec<u8>)], commits: &[Committed], least: u64, what: &str) -> u64 {
    let model = Arc::new(ModelDirectory::open(directory).unwrap());
    let (committer, _) = Committer::open(model, Options::default()).unwrap_or_else(|e| panic!("{what}: {e}"));
    let newest = committer.newest().unwrap().id;
    assert!((least..=3).contains(&newest), "{what}: recovered to {newest}");
    assert_same!(disk(directory, shards), commits[newest as usize].shards, "{what}");
    assert!(committer.history().iter().map(|c| c.id).eq(1..=newest), "{what}");
    assert_eq!(committer.verify(None).unwrap().wrong, Vec::<String>::new(), "{what}");
    for id in 0..=newest {
        assert_same!(read(&committer, id), commits[id as usize], "{what}: commit {id}");
        assert_eq!(committer.verify(Some(id)).unwrap().wrong, Vec::<String>::new(), "{what}");
    }
    newest
}

#[test]
#[ignore = "needs root and loop devices; one command runs it, see above"]
fn power_cuts_under_ext4_recover() {
    play("ext4", 32 << 20, &["mkfs.ext4", "-qF", "-E", "lazy_itable_init=0,lazy_journal_init=0"], "noatime");
}

#[test]
#[ignore = "needs root and loop devices; one command runs it, see above"]
fn power_cuts_under_xfs_recover() {
    play("XFS", 320 << 20, &["mkfs.xfs", "-qf"], "noatime,nouuid");
}
