//! Every way in which programs read files: each has to give the same bytes.

use super::{Mount, Scratch, have, python, succeeds};
use memmap2::MmapOptions;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// What reads a file, and how its bytes are had.
type Reader = (&'static str, fn(&Path, &Scratch) -> Option<Vec<u8>>);

const READERS: &[Reader] = &[
    ("read", |file, _| std::fs::read(file).ok()),
    ("pread at odd offsets", |file, _| Some(pread(file))),
    ("mmap shared", |file, _| Some(mmap(file, true))),
    ("mmap private", |file, _| Some(mmap(file, false))),
    ("sendfile", |file, scratch| Some(sendfile(file, scratch))),
    ("cp", |file, scratch| {
        let copy = scratch.join("cp");
        let _ = std::fs::remove_file(&copy);
        succeeds(Command::new("cp").arg(file).arg(&copy));
        std::fs::read(&copy).ok()
    }),
    ("dd iflag=direct", |file, _| {
        let output = Command::new("dd").arg(format!("if={}", file.display())).args(["bs=64k", "iflag=direct"]).output();
        Some(output.unwrap().stdout)
    }),
];

/// Backwards, in pieces that fit no page.
fn pread(file: &Path) -> Vec<u8> {
    let file = File::open(file).unwrap();
    let size = file.metadata().unwrap().len() as usize;
    let mut bytes = vec![0; size];
    let starts: Vec<usize> = (0..size).step_by(3989).collect();
    for start in starts.into_iter().rev() {
        let end = (start + 3989).min(size);
        file.read_exact_at(&mut bytes[start..end], start as u64).unwrap();
    }
    assert_eq!(file.read_at(&mut [0; 8], size as u64).unwrap(), 0, "there is nothing behind the end");
    bytes
}

fn mmap(file: &Path, shared: bool) -> Vec<u8> {
    let file = File::open(file).unwrap();
    // SAFETY: nothing is held across the copy, and the mount never cuts a file off.
    unsafe {
        match shared {
            true => MmapOptions::new().map(&file).unwrap().to_vec(),
            false => {
                let mut map = MmapOptions::new().map_copy(&file).unwrap();
                // Writing to a private mapping stays private.
                map[0] ^= 1;
                let mut bytes = map.to_vec();
                bytes[0] ^= 1;
                bytes
            }
        }
    }
}

fn sendfile(file: &Path, scratch: &Scratch) -> Vec<u8> {
    let (from, to) = (File::open(file).unwrap(), File::create(scratch.join("sendfile")).unwrap());
    let size = from.metadata().unwrap().len();
    let mut sent = 0;
    while sent < size {
        match rustix::fs::sendfile(&to, &from, None, (size - sent) as usize).unwrap() {
            0 => break,
            n => sent += n as u64,
        }
    }
    std::fs::read(scratch.join("sendfile")).unwrap()
}

/// All readers that start quickly, on all weights files, see `want`; `shards` are their names.
#[track_caller]
pub fn all_see(mount: &Mount, shards: &[String], want: &[Vec<u8>]) {
    let scratch = Scratch::new();
    for (name, want) in shards.iter().zip(want) {
        let file = mount.path(name);
        for (reader, read) in READERS {
            let got = read(&file, &scratch).unwrap_or_else(|| panic!("{reader} could not read {name}"));
            super::model::assert_same(&format!("{name} by {reader}"), &[got], std::slice::from_ref(want));
        }
        assert_eq!(checksum(&file), checksum_of(want), "{name} by sha256sum");
        assert_eq!(std::fs::metadata(&file).unwrap().len(), want.len() as u64, "size of {name}");
    }
    rsync(mount, shards, want);
}

fn checksum(file: &Path) -> String {
    succeeds(Command::new("sha256sum").arg(file)).split_whitespace().next().unwrap().to_string()
}

fn checksum_of(bytes: &[u8]) -> String {
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8_lossy(&output.stdout).split_whitespace().next().unwrap().to_string()
}

/// The directory as a whole, as `rsync -a` copies it.
#[track_caller]
fn rsync(mount: &Mount, shards: &[String], want: &[Vec<u8>]) {
    if !have("rsync") {
        return;
    }
    let scratch = Scratch::new();
    let (from, to) = (format!("{}/", mount.point.display()), scratch.join("copy"));
    succeeds(Command::new("rsync").arg("-a").arg(from).arg(&to));
    super::model::assert_same("rsync -a", &super::model::weights_in(&to, shards), want);
    assert_eq!(std::fs::read(to.join("tokenizer.json")).unwrap(), std::fs::read(mount.path("tokenizer.json")).unwrap());
}

/// Tensor by tensor, with the library that everybody loads models with.
#[track_caller]
pub fn safe_open_sees(mount: &Mount, shards: &[String], want: &[Vec<u8>]) {
    let Some(mut python) = python("safetensors, numpy") else { return };
    let scratch = Scratch::new();
    for (name, want) in shards.iter().zip(want) {
        std::fs::write(scratch.join(name), want).unwrap();
    }
    let compared = succeeds(python.arg("-c").arg(SAFE_OPEN).arg(&mount.point).arg(scratch.path()).args(shards));
    let tensors: usize = compared.trim().parse().unwrap();
    assert!(tensors > 0, "safe_open compared nothing");
}

/// Every tensor with torch, or those whose dtype numpy knows.
const SAFE_OPEN: &str = r#"
import sys
from safetensors import safe_open
try:
    import torch
    framework, same = "pt", lambda a, b: torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
except ImportError:
    framework, same = "np", lambda a, b: a.tobytes() == b.tobytes()
compared = 0
for name in sys.argv[3:]:
    with safe_open(f"{sys.argv[1]}/{name}", framework) as a, safe_open(f"{sys.argv[2]}/{name}", framework) as b:
        assert list(a.keys()) == list(b.keys()) and a.metadata() == b.metadata(), name
        for key in a.keys():
            if framework == "pt" or a.get_slice(key).get_dtype() in ("U8", "F16", "F32"):
                assert same(a.get_tensor(key), b.get_tensor(key)), key
                compared += 1
print(compared)
"#;
