//! What a GPU does for weightfs: checks against the processor first, then figures beside the hardware's own.
//!
//! `cargo bench --bench gpu` (`WEIGHTFS_BENCH_GB` of device memory, 16; needs a driver, nothing else)

use std::sync::Arc;
use std::time::{Duration, Instant};
use weightfs::memory::cuda::{CudaMemory, Device, DeviceName, Gpu};
use weightfs::memory::{
    Accelerator, BLOCK, DeviceMemory, Hash, Memory, Piece, SharedBytes, Span, Strided, block_hash, hash_into,
    sealed_memfd,
};

/// Anything that looks random and is made fast.
fn noise(bytes: &mut [u8], seed: u64) {
    let mut state = seed.wrapping_mul(0x9E3779B97F4A7C15) | 1;
    for word in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

fn timed(n: usize, mut work: impl FnMut()) -> f64 {
    work();
    median(
        (0..n)
            .map(|_| {
                let start = Instant::now();
                work();
                start.elapsed()
            })
            .collect(),
    )
}

fn check(name: &str, ok: bool) {
    println!("{} {name}", if ok { "ok  " } else { "FAIL" });
    if !ok {
        // Figures of what is wrong are none.
        std::process::exit(1);
    }
}

fn main() {
    let id = match DeviceName::Ordinal(0).find() {
        Ok(id) => id,
        Err(e) => {
            println!("{e}");
            std::process::exit(1);
        }
    };
    let start = Instant::now();
    let device = Device::open(&id).expect("the device opens");
    let gpu = Gpu::of(&device);
    println!("{} sm_{}{} opened in {:.2?}", id.name, device.capability.0, device.capability.1, start.elapsed());
    checks(&device, &gpu);
    figures(&device, &gpu);
}

fn checks(device: &Arc<Device>, gpu: &Arc<Gpu>) {
    let bytes = 64 << 20;
    let memory = CudaMemory::own(device, bytes, "a check".into()).expect("memory");
    let mut host = vec![0; bytes as usize];
    noise(&mut host, 1);
    memory.write(0, &host).expect("write");
    let mut back = vec![0; bytes as usize];
    memory.read(0, &mut back).expect("read");
    check("write and read", back == host);

    for offset in [0u64, 8, 16, 2, 3, 4093] {
        let n = 1000;
        let mut out = vec![0; n];
        memory.hash_blocks(offset, &mut out).expect("hash");
        let mut expected = vec![0; n];
        hash_into(&host[offset as usize..offset as usize + n * BLOCK], &mut expected);
        check(&format!("hash at offset {offset}"), out == expected);
    }
    for fill in [0u8, 0xFF] {
        let block = vec![fill; BLOCK];
        memory.write(0, &block).expect("write");
        let mut out = [0];
        memory.hash_blocks(0, &mut out).expect("hash");
        check(&format!("hash of a block of {fill:#x}"), out[0] == block_hash(&block));
    }
    memory.write(0, &host[..BLOCK]).expect("write");

    // Blocks in pieces, cut anywhere.
    let (mut spans, mut starts, mut expected) = (Vec::new(), vec![0u32], Vec::new());
    for b in 0..3000u64 {
        let mut block = vec![0; BLOCK];
        let mut at = 0u64;
        while at < BLOCK as u64 {
            let len = (1 + (b * 977 + at * 31) % 3001).min(BLOCK as u64 - at);
            let from = (b * 12_289 + at * 7) % (bytes - 4096);
            block[at as usize..(at + len) as usize].copy_from_slice(&host[from as usize..(from + len) as usize]);
            spans.push(Span { range: memory.range(from, len).expect("inside"), at: at as u32 });
            at += len;
        }
        starts.push(spans.len() as u32);
        expected.push(block_hash(&block));
    }
    check("hash of blocks in spans", gpu.hash_spans(&spans, &starts).expect("spans") == expected);

    // Runs that end and begin anywhere, and many of them.
    let mut expected = Vec::new();
    let runs: Vec<_> = (0..2000u64)
        .map(|i| {
            let (at, n) = ((i * 7919 * 8) % (bytes / 2), 1 + i % 5);
            for b in 0..n {
                let from = at as usize + b as usize * BLOCK;
                expected.push(block_hash(&host[from..from + BLOCK]));
            }
            memory.range(at, n * BLOCK as u64).expect("inside")
        })
        .collect();
    let mut out = vec![0; expected.len()];
    gpu.hash_runs(&runs, &mut |first, h| out[first as usize..first as usize + h.len()].copy_from_slice(h))
        .expect("runs");
    check("hash of many runs", out == expected);

    for pinned in [true, false] {
        let mut dst = match pinned {
            true => gpu.host_memory(32 << 20).expect("pinned memory"),
            false => weightfs::memory::HostBuffer::anonymous(32 << 20).expect("memory"),
        };
        dst.fill(0xEE);
        let mut expected = vec![0xEE; 32 << 20];
        let mut pieces = Vec::new();
        let mut rest = &mut dst[..];
        let (mut at, mut i) = (0usize, 0u64);
        while at + (3 << 20) < 32 << 20 {
            let gap = (i * 13 % 40) as usize;
            let (len, element, stride) = match i % 8 {
                0 => (1 + (i as usize * 7919) % 70_000, 0, 0),
                1 => (4096, 0, 0),
                2 => (600 * 2, 2, 6),
                3 => (600 * 4, 4, 12),
                4 => (77 * 3, 3, 11),
                5 => (8 * 500, 8, 8 * 100),
                6 if i % 64 == 6 => (600 << 10, 0, 0),
                _ => (1 + (i as usize * 31) % 64, 0, 0),
            };
            let from = (i * 104_729) % (bytes - (1 << 20));
            let (_, tail) = rest.split_at_mut(gap);
            let (dst, tail) = tail.split_at_mut(len);
            rest = tail;
            let into = &mut expected[at + gap..at + gap + len];
            if element == 0 {
                into.copy_from_slice(&host[from as usize..from as usize + len]);
                pieces.push(Piece::contiguous(memory.range(from, len as u64).expect("inside"), dst));
            } else {
                for (e, out) in into.chunks_mut(element).enumerate() {
                    let a = from as usize + e * stride;
                    out.copy_from_slice(&host[a..a + element]);
                }
                let span = ((len / element - 1) * stride + element) as u64;
                let range = memory.range(from, span).expect("inside");
                pieces.push(Piece { range, element, stride: stride as u64, dst });
            }
            (at, i) = (at + gap + len, i + 1);
        }
        let n = pieces.len();
        gpu.gather(&mut pieces).expect("gather");
        check(&format!("gather of {n} pieces, pinned {pinned}"), dst[..] == expected[..]);
    }

    let run = Strided { offset: 6, stride: 10, element: 2, count: 3_000_000 };
    let mut out = vec![0; 6_000_000];
    memory.read_strided(run, &mut out).expect("strided");
    let expected: Vec<u8> = (0..3_000_000).flat_map(|i| host[6 + i * 10..8 + i * 10].to_vec()).collect();
    check("strided read", out == expected);
    let mut fresh = vec![0; 6_000_000];
    noise(&mut fresh, 9);
    memory.write_strided(run, &fresh).expect("strided");
    memory.read_strided(run, &mut out).expect("strided");
    let mut all = vec![0; bytes as usize];
    memory.read(0, &mut all).expect("read");
    for (i, e) in fresh.chunks(2).enumerate() {
        host[6 + i * 10..8 + i * 10].copy_from_slice(e);
    }
    check("strided write", out == fresh && all == host);
    check("outside is refused", memory.read(bytes - 1, &mut [0; 2]).is_err() && memory.range(bytes, 1).is_err());
}

fn figures(device: &Arc<Device>, gpu: &Arc<Gpu>) {
    let gb: u64 = std::env::var("WEIGHTFS_BENCH_GB").ok().and_then(|v| v.parse().ok()).unwrap_or(16);
    let bytes = gb << 30;
    let memory = CudaMemory::own(device, bytes, "a benchmark".into()).expect("memory");
    let mut host = gpu.host_memory(1 << 30).expect("pinned memory");
    noise(&mut host, 3);
    let start = Instant::now();
    for i in 0..gb {
        memory.write(i << 30, &host).expect("write");
    }
    let rate = |seconds: f64, bytes: u64| bytes as f64 / seconds / 1e9;
    println!("to the device, pinned, 1 GiB each: {:.1} GB/s", rate(start.elapsed().as_secs_f64(), bytes));

    let range = memory.range(0, bytes).expect("inside");
    let known: Vec<Hash> = vec![1; (bytes / BLOCK as u64) as usize];
    let seconds = timed(9, || gpu.hash_runs(std::slice::from_ref(&range), &mut |_, _| {}).expect("hash"));
    println!("hash, {gb} GiB: {:.2} ms, {:.0} GB/s", seconds * 1e3, rate(seconds, bytes));
    let seconds = timed(9, || {
        let mut differ = 0;
        gpu.hash_runs(std::slice::from_ref(&range), &mut |first, hashes| {
            use rayon::prelude::*;
            let known = &known[first as usize..first as usize + hashes.len()];
            differ += known.par_chunks(16 << 10).zip(hashes.par_chunks(16 << 10)).filter(|(a, b)| a != b).count();
        })
        .expect("hash");
        assert!(differ > 0);
    });
    println!("hash and compare, {gb} GiB: {:.2} ms, {:.0} GB/s", seconds * 1e3, rate(seconds, bytes));
    let odd = memory.range(2, bytes - BLOCK as u64).expect("inside");
    let seconds = timed(5, || gpu.hash_runs(std::slice::from_ref(&odd), &mut |_, _| {}).expect("hash"));
    println!("hash of data that starts at odd places: {:.2} ms, {:.0} GB/s", seconds * 1e3, rate(seconds, bytes));
    let quarter = bytes / 4;
    let copy = timed(9, || device.copy(memory.range(0, quarter * 2).expect("inside"), quarter).expect("copy"));
    println!("device copy, bytes read and written: {:.0} GB/s", rate(copy, 2 * quarter * 2));

    // To the host.
    for size in [4096usize, 64 << 10, 1 << 20, 4 << 20, 16 << 20, 256 << 20] {
        let n = ((1u64 << 30) / size as u64).min(4096);
        let seconds = timed(3, || {
            for i in 0..n {
                let at = i as usize * size;
                memory.read(at as u64, &mut host[at..at + size]).expect("read");
            }
        });
        println!("read to pinned memory, {size} bytes each, one thread: {:.2} GB/s", rate(seconds, n * size as u64));
    }
    let mut pageable = vec![0u8; 1 << 30];
    let seconds = timed(3, || memory.read(0, &mut pageable).expect("read"));
    println!("read to memory that is not pinned, one thread: {:.2} GB/s", rate(seconds, 1 << 30));
    let seconds = timed(5, || {
        use rayon::prelude::*;
        host.par_chunks_mut(4 << 20).enumerate().for_each(|(i, dst)| {
            memory.read((i * (4 << 20)) as u64, dst).expect("read");
        });
    });
    println!("read to pinned memory, 4 MiB each, all threads: {:.2} GB/s", rate(seconds, 1 << 30));
    let seconds = timed(5, || {
        use rayon::prelude::*;
        host.par_chunks_mut(4 << 20).enumerate().for_each(|(i, dst)| {
            memory.read((i * (4 << 20)) as u64, dst).expect("read");
            let mut hashes = vec![0; dst.len() / BLOCK];
            hash_into(dst, &mut hashes);
        });
    });
    println!("the same, and hashed by the processor: {:.2} GB/s", rate(seconds, 1 << 30));
    for size in [4096usize, 16 << 10, 64 << 10, 256 << 10] {
        let seconds = timed(5, || {
            use rayon::prelude::*;
            host.par_chunks_mut(4 << 20).enumerate().for_each(|(i, dst)| {
                let mut pieces: Vec<Piece<'_>> = Vec::with_capacity(dst.len() / size);
                for (j, dst) in dst.chunks_mut(size).enumerate() {
                    // Every other piece of the memory.
                    let from = (i * (4 << 20) + j * size) as u64 * 2;
                    pieces.push(Piece::contiguous(memory.range(from, size as u64).expect("inside"), dst));
                }
                gpu.gather(&mut pieces).expect("gather");
            });
        });
        println!("gather pieces of {size} bytes to pinned memory: {:.2} GB/s", rate(seconds, 1 << 30));
    }
    view(gpu, &memory);
}

/// A memfd as the view has it: taken, pinned, filled.
fn view(gpu: &Arc<Gpu>, memory: &CudaMemory) {
    let bytes = memory.bytes().min(16 << 30);
    let file = sealed_memfd("bench", bytes).expect("memfd");
    let start = Instant::now();
    let mut shared = SharedBytes::populated(&file, &**gpu).expect("memory");
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "a memfd of {} GiB taken and pinned ({}): {:.2} s, {:.1} GB/s",
        bytes >> 30,
        shared.is_pinned(),
        seconds,
        bytes as f64 / seconds / 1e9
    );
    for size in [4usize << 20, 16 << 20, 64 << 20] {
        let seconds = timed(3, || {
            use rayon::prelude::*;
            shared.par_chunks_mut(size).enumerate().for_each(|(i, dst)| {
                memory.read((i * size) as u64, dst).expect("read");
            });
        });
        println!("filled from the device, {} MiB each: {:.2} GB/s", size >> 20, bytes as f64 / seconds / 1e9);
    }
}
