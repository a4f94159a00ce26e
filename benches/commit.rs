//! What a commit costs, phase by phase, beside copying the model and beside writing the same bytes plainly.
//!
//! `cargo bench --bench commit -- [MODEL_DIR] [--runs N] [--size MB]`: works on a copy of MODEL_DIR, or of a made-up model (269 MB),
//! in the system's temporary directory (set TMPDIR to choose the disk). "plain" writes the bytes of the record to a new
//! file and the changed blocks over a copy of the weights, with one fdatasync each: the least that any commit with this
//! log could do. Changed elements are moved by one to three units in the last place.

#[path = "../tests/commit_support/mod.rs"]
mod commit_support;

use commit_support::{Random, shard};
use rayon::prelude::*;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use weightfs::commit::{CommitRequest, Committer, Options};
use weightfs::image::{ImageError, ShardBytes, StepHold};
use weightfs::memory::{BLOCK, Hash, hash_into};
use weightfs::model::ModelDirectory;

struct Live(Vec<Vec<u8>>);

impl ShardBytes for Live {
    fn shards(&self) -> usize {
        self.0.len()
    }

    fn shard_bytes(&self, shard: usize) -> u64 {
        self.0[shard].len() as u64
    }

    fn hold(&self) -> Result<StepHold, ImageError> {
        Ok(StepHold::new(()))
    }

    fn read(&self, shard: usize, offset: u64, dst: &mut [u8]) -> Result<(), ImageError> {
        dst.copy_from_slice(&self.0[shard][offset as usize..][..dst.len()]);
        Ok(())
    }

    fn hash(&self, shard: usize, first: u64, out: &mut [Hash]) -> Result<(), ImageError> {
        let start = first as usize * BLOCK;
        hash_into(&self.0[shard][start..(start + out.len() * BLOCK).min(self.0[shard].len())], out);
        Ok(())
    }

    fn write(&self, _: usize, _: u64, _: &[u8]) -> Result<(), ImageError> {
        unreachable!("a commit writes no live weights")
    }
}

impl Live {
    /// Moves a share of the BF16 elements by a few units in the last place.
    fn train(&mut self, model: &ModelDirectory, share: f64, seed: u64) -> u64 {
        let mut changed = 0;
        let threshold = (share * u32::MAX as f64) as u64;
        for (shard, bytes) in model.shards.iter().zip(&mut self.0) {
            let data = &mut bytes[shard.header.bytes.len()..];
            changed += data
                .par_chunks_mut(1 << 20)
                .enumerate()
                .map(|(i, part)| {
                    let mut random = Random(seed.wrapping_mul(1 << 40).wrapping_add(i as u64) ^ 0x5151);
                    let mut changed = 0;
                    for element in part.as_chunks_mut::<2>().0 {
                        let draw = random.next();
                        if (draw >> 32) <= threshold {
                            let delta = [1, 2, 3, 0xffff, 0xfffe][(draw as u32 % 5) as usize];
                            *element = u16::from_le_bytes(*element).wrapping_add(delta).to_le_bytes();
                            changed += 1;
                        }
                    }
                    changed
                })
                .sum::<u64>();
        }
        changed
    }
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn copy(from: &Path, to: &Path) {
    std::fs::copy(from, to).unwrap();
    File::open(to).unwrap().sync_data().unwrap();
}

/// Bytes and where they belong in a file.
type Runs = Vec<(u64, Vec<u8>)>;

/// The log's bytes into a new file, the changed blocks over a copy, plainly.
fn plain(work: &Path, log: &Path, shards: &[(PathBuf, Runs)]) -> Duration {
    let log: Vec<u8> =
        std::fs::read_dir(log).unwrap().flat_map(|e| std::fs::read(e.unwrap().path()).unwrap()).collect();
    timed(|| {
        let file = File::create(work.join("plain-log")).unwrap();
        file.write_all_at(&log, 0).unwrap();
        file.sync_data().unwrap();
        for (path, runs) in shards {
            let file = File::options().write(true).open(path).unwrap();
            for (at, bytes) in runs {
                file.write_all_at(bytes, *at).unwrap();
            }
            file.sync_data().unwrap();
        }
    })
}

fn runs(before: &[u8], after: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
    for (i, (a, b)) in before.chunks(BLOCK).zip(after.chunks(BLOCK)).enumerate() {
        if a != b {
            let at = (i * BLOCK) as u64;
            match runs.last_mut() {
                Some((start, bytes)) if *start + bytes.len() as u64 == at && bytes.len() < 4 << 20 => {
                    bytes.extend_from_slice(b)
                }
                _ => runs.push((at, b.to_vec())),
            }
        }
    }
    runs
}

fn made_up_model(directory: &Path, megabytes: usize) {
    let names: Vec<String> = (0..272).map(|i| format!("model.layers.{i}.weight")).collect();
    let tensors: Vec<_> = names.iter().map(|n| (n.as_str(), "BF16", megabytes * 1_000_000 / 2 / 272, 2)).collect();
    std::fs::write(directory.join("model.safetensors"), shard(&tensors, 1)).unwrap();
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let option = |name: &str, default: usize| {
        let at = arguments.iter().position(|a| a == name);
        at.and_then(|i| arguments.get(i + 1)?.parse().ok()).unwrap_or(default)
    };
    let count = option("--runs", 3);
    let work = tempfile::tempdir().unwrap();
    let base = work.path().join("base");
    std::fs::create_dir(&base).unwrap();
    match arguments.first().filter(|a| !a.starts_with("--")) {
        None => made_up_model(&base, option("--size", 269)),
        Some(path) => {
            let model = ModelDirectory::open(Path::new(path)).unwrap();
            let index = "model.safetensors.index.json";
            let names = model.shards.iter().map(|s| s.name.as_str()).chain([index]);
            for name in names.filter(|n| model.path.join(n).exists()) {
                copy(&model.path.join(name), &base.join(name));
            }
        }
    }
    let base_model = ModelDirectory::open(&base).unwrap();
    let names: Vec<String> = base_model.shards.iter().map(|s| s.name.clone()).collect();
    let original: Vec<Vec<u8>> = names.iter().map(|n| std::fs::read(base.join(n)).unwrap()).collect();
    let mb = |bytes: u64| bytes as f64 / 1e6;
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    println!(
        "{:.0} MB of weights, {count} runs each, the one of the median total shown; times in ms",
        mb(base_model.bytes())
    );
    println!(
        "{:>8} {:>9} {:>9} {:>9} | {:>6} {:>6} {:>7} {:>7} {:>7} | {:>7} {:>6} | {:>7}",
        "changed", "elements", "log MB", "blocks MB", "find", "stage", "log", "fold", "total", "plain", "ratio", "cp"
    );
    for share in [0.0001, 0.01, 0.1, 1.0] {
        let mut rows = Vec::new();
        for run in 0..count {
            let directory = work.path().join("model");
            let beside = work.path().join("beside");
            for place in [&directory, &beside] {
                let _ = std::fs::remove_dir_all(place);
                std::fs::create_dir(place).unwrap();
            }
            let index = "model.safetensors.index.json";
            for name in names.iter().map(String::as_str).chain([index]).filter(|n| base.join(n).exists()) {
                copy(&base.join(name), &directory.join(name));
                copy(&base.join(name), &beside.join(name));
            }
            let model = Arc::new(ModelDirectory::open(&directory).unwrap());
            let (committer, _) = Committer::open(model.clone(), Options::default()).unwrap();
            committer.ensure_baseline(&|_| ()).unwrap();
            let mut live = Live(original.clone());
            live.train(&model, share, run as u64);
            let start = Instant::now();
            let report = committer.commit(&live, &CommitRequest::new("bench", 1)).unwrap();
            let total = start.elapsed();
            let info = report.commit.unwrap();
            let changed: Vec<_> = names
                .iter()
                .zip(original.iter().zip(&live.0))
                .map(|(n, (a, b))| (beside.join(n), runs(a, b)))
                .collect();
            let blocks: u64 = changed.iter().flat_map(|(_, runs)| runs).map(|(_, bytes)| bytes.len() as u64).sum();
            let plain = plain(work.path(), &directory.join(".weightfs/log/weight_v000001"), &changed);
            let cp = timed(|| {
                for name in &names {
                    copy(&base.join(name), &work.path().join("copied"));
                }
            });
            rows.push((total, report.times, info, blocks, plain, cp));
        }
        rows.sort_by_key(|r| r.0);
        let (total, times, info, blocks, plain, cp) = &rows[rows.len() / 2];
        println!(
            "{:>7}% {:>9} {:>9.2} {:>9.2} | {:>6.0} {:>6.0} {:>7.0} {:>7.0} {:>7.0} | {:>7.0} {:>6.2} | {:>7.0}",
            share * 100.0,
            info.changed_elements,
            mb(info.logged_bytes),
            mb(*blocks),
            ms(times.find),
            ms(times.stage),
            ms(times.log),
            ms(times.fold),
            ms(*total),
            ms(*plain),
            total.as_secs_f64() / plain.as_secs_f64(),
            ms(*cp)
        );
    }
}
