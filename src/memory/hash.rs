//! The 128-bit hash of a block of a shard file: XXH3-128 with the default secret and seed 0, which a GPU computes
//! bit-identically and which delta directories of other tools use as well (`docs/format.md`).

use xxhash_rust::xxh3::xxh3_128;

/// Bytes of a block, at a multiple of itself in the *shard file*. The last block of a file may be shorter.
pub const BLOCK: usize = 4096;

/// XXH3-128 of one block. Only ever compared with the hash of the same block of the same file, so that chance
/// collisions (2^-128 a comparison) are out of reach; it is no defence against somebody who makes weights collide.
pub type Hash = u128;

pub fn block_hash(block: &[u8]) -> Hash {
    xxh3_128(block)
}

/// Hashes each [`BLOCK`] of `bytes` into `out`; the last one may be short.
pub fn hash_into(bytes: &[u8], out: &mut [Hash]) {
    debug_assert_eq!(bytes.len().div_ceil(BLOCK), out.len());
    for (block, hash) in bytes.chunks(BLOCK).zip(out) {
        *hash = block_hash(block);
    }
}

/// Asks the processor for the block at `next` while the one before it is hashed: the hash itself runs at 35 GB/s out of
/// the cache, and waits for memory without this (16 against 24 GB/s measured; `cargo bench --bench hash`).
pub(super) fn prefetch(next: *const u8) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..BLOCK).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch is a hint: it reads nothing the program can see and never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = next;
}
