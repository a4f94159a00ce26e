//! Finding changed blocks: hashing 4 KiB blocks where they are, beside `memcmp` of the same bytes with a second copy (what
//! a comparison on the CPU costs), on the same number of threads, in one run. Prints a table; `docs/performance.md`
//! holds figures.

use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;
use weightfs::memory::{BLOCK, HostMemory, Memory};

/// Larger than any cache; every round reads all of it.
const BYTES: usize = 512 << 20;
const ROUNDS: usize = 9;
/// What one thread takes at a time, as the view does.
const PIECE: usize = 4 << 20;

fn main() {
    let memory = HostMemory::anonymous(BYTES as u64, "bench").expect("memory for the benchmark");
    let first: Vec<u8> = (0..BYTES).map(|i| (i.wrapping_mul(2_654_435_761) >> 7) as u8).collect();
    memory.write(0, &first).expect("it fits");
    let second = first.clone();
    println!("{:>8} {:>14} {:>14} {:>7}", "threads", "hash GB/s", "memcmp GB/s", "ratio");
    for threads in [1, std::thread::available_parallelism().map_or(1, |n| n.get())] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
        let (mut hash, mut compare) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            hash.push(rate(|| {
                pool.install(|| {
                    (0..BYTES / PIECE).into_par_iter().for_each(|piece| {
                        let mut out = vec![0; PIECE / BLOCK];
                        memory.hash_blocks((piece * PIECE) as u64, &mut out).expect("inside the memory");
                        black_box(&out);
                    })
                })
            }));
            compare.push(rate(|| {
                pool.install(|| {
                    first.par_chunks(PIECE).zip(second.par_chunks(PIECE)).for_each(|(a, b)| {
                        for (a, b) in a.chunks(BLOCK).zip(b.chunks(BLOCK)) {
                            // Slices of bytes are compared by the C library's memcmp.
                            assert!(black_box(a) == black_box(b));
                        }
                    })
                })
            }));
        }
        let (hash, compare) = (median(hash), median(compare));
        println!("{threads:>8} {hash:>14.1} {compare:>14.1} {:>7.2}", hash / compare);
    }
}

fn rate(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    BYTES as f64 / start.elapsed().as_secs_f64() / 1e9
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
