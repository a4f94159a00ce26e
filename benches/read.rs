//! One reader through a real mount, beside the same file in /dev/shm in the same run: `read` in 1 MiB pieces and `mmap`
//! summed page by page, cold (the mount's first reading) and warm, for each way of serving. Also the time until a mount
//! is ready beside the time to read its files. Prints a table; `docs/performance.md` holds figures.
//!
//! `WEIGHTFS_BENCH_MB` sets the model's size (default 512). Needs /dev/fuse, and root for passthrough.

use memmap2::Mmap;
use std::collections::BTreeMap;
use std::fs::File;
use std::hint::black_box;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Mounts made anew, each read once cold and this many times warm.
const MOUNTS: usize = 5;
const ROUNDS: usize = 4;
const WEIGHTFS: &str = env!("CARGO_BIN_EXE_weightfs");

fn main() {
    let megabytes = std::env::var("WEIGHTFS_BENCH_MB").ok().and_then(|v| v.parse().ok()).unwrap_or(512usize);
    let scratch = tempfile::tempdir_in("/dev/shm").expect("/dev/shm");
    let model = scratch.path().join("model");
    make_model(&model, megabytes << 20);
    let peer = model.join("model.safetensors");
    let bytes = peer.metadata().expect("the model").len();
    println!(
        "{} MB, medians over {MOUNTS} mounts, GB/s; ratio to the same file in /dev/shm in the same run",
        bytes >> 20
    );
    println!("{:<26} {:>10} {:>10} {:>7}", "", "mount", "/dev/shm", "ratio");
    for view in ["held", "live"] {
        let mut figures = Figures::default();
        for _ in 0..MOUNTS {
            one_mount(view, &model, &peer, &mut figures);
        }
        figures.print(bytes);
    }
}

/// Seconds, of the mount and of its peer beside it.
#[derive(Default)]
struct Figures {
    label: String,
    rows: BTreeMap<&'static str, (Vec<f64>, Vec<f64>)>,
    ready: Vec<f64>,
    filled: Vec<f64>,
    read_files: Vec<f64>,
}

impl Figures {
    fn add(&mut self, row: &'static str, ours: f64, peer: f64) {
        let (a, b) = self.rows.entry(row).or_default();
        a.push(ours);
        b.push(peer);
    }

    fn print(self, bytes: u64) {
        let rate = |seconds: f64| bytes as f64 / seconds / 1e9;
        for (name, (ours, peer)) in self.rows {
            let (ours, peer) = (median(ours), median(peer));
            let name = format!("{} {name}", self.label);
            println!("{name:<26} {:>10.2} {:>10.2} {:>7.2}", rate(ours), rate(peer), peer / ours);
        }
        let (ready, filled, read_files) = (median(self.ready), median(self.filled), median(self.read_files));
        println!(
            "{}: ready after {ready:.2} s, view filled {filled:.2} s later; reading the files takes {read_files:.2} s",
            self.label
        );
    }
}

fn one_mount(view: &str, model: &Path, peer: &Path, figures: &mut Figures) {
    let point = tempfile::tempdir().expect("a mount point");
    let mounted = point.path().join("model.safetensors");
    figures.read_files.push(seconds(|| {
        black_box(read_all(peer));
    }));
    figures.ready.push(seconds(|| weightfs(&["mount", "--view", view], &[model, point.path()])));
    figures.filled.push(seconds(|| while fact(point.path(), "view_ready") != "yes" {}));
    figures.label = if view == "held" { fact(point.path(), "view") } else { "direct".into() };
    for (name, reader) in [("read", read_all as fn(&Path) -> u64), ("mmap", sum_mapped)] {
        for (round, temperature) in ["cold"].into_iter().chain(std::iter::repeat_n("warm", ROUNDS)).enumerate() {
            let ours = || {
                seconds(|| {
                    black_box(reader(&mounted));
                })
            };
            let theirs = || {
                seconds(|| {
                    black_box(reader(peer));
                })
            };
            // By turns first, so that neither always finds the caches as the other left them.
            let (a, b) = if round % 2 == 0 {
                (ours(), theirs())
            } else {
                let b = theirs();
                (ours(), b)
            };
            let row = match (name, temperature) {
                ("read", "cold") => "read cold",
                ("read", _) => "read warm",
                (_, "cold") => "mmap cold",
                _ => "mmap warm",
            };
            figures.add(row, a, b);
        }
    }
    weightfs(&["umount"], &[point.path()]);
}

fn make_model(dir: &Path, bytes: usize) {
    std::fs::create_dir(dir).expect("the model directory");
    let data: Vec<u8> = (0..bytes).map(|i| (i.wrapping_mul(2_654_435_761) >> 7) as u8).collect();
    let tensor = safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, vec![bytes / 2048, 1024], &data);
    let tensors = [("w", tensor.expect("a tensor"))];
    safetensors::serialize_to_file(tensors, None, &dir.join("model.safetensors")).expect("the weights");
    std::fs::write(dir.join("config.json"), "{}").expect("the config");
}

fn weightfs(words: &[&str], paths: &[&Path]) {
    let paths: Vec<PathBuf> = paths.iter().map(|p| p.to_path_buf()).collect();
    let status = Command::new(WEIGHTFS).args(words).args(paths).stdout(std::process::Stdio::null()).status();
    assert!(status.expect("weightfs runs").success(), "weightfs {words:?} failed");
}

/// The first word of a line of `status`.
fn fact(point: &Path, key: &str) -> String {
    let status = std::fs::read_to_string(point.join("status")).expect("status");
    let line = status.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' '));
    line.and_then(|l| l.split(' ').next()).unwrap_or("?").to_string()
}

fn read_all(path: &Path) -> u64 {
    let mut file = File::open(path).expect("the file opens");
    let mut buffer = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        match file.read(&mut buffer).expect("it reads") {
            0 => return total,
            n => total += n as u64,
        }
    }
}

/// Sums eight bytes of every cache line, which is what a loader that copies to a device makes the memory do.
fn sum_mapped(path: &Path) -> u64 {
    let file = File::open(path).expect("the file opens");
    // SAFETY: nobody truncates the file while the benchmark runs.
    let map = unsafe { Mmap::map(&file) }.expect("it maps");
    map.chunks_exact(64)
        .map(|line| u64::from_le_bytes(line[..8].try_into().unwrap_or_default()))
        .fold(0, u64::wrapping_add)
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
