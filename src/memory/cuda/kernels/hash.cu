// archs: 75
//
// XXH3-128 (seed 0, default secret) of blocks of 4096 bytes, bit for bit what the CPU computes in src/memory/hash.rs.
// Follows XXH3_hashLong_128b in xxhash.h (https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md, "XXH3 Algorithm
// Description for large inputs"). For 4096 bytes: three rounds of 16 stripes of 64 bytes, each ended by a scramble, then
// 15 stripes, then the last 64 bytes once more with a secret of their own.
//
// Eight threads share a block, one a lane of the accumulator, so that a stripe is one access of 64 bytes in a row. What a
// lane adds from its neighbour's data is summed apart and exchanged once a round.

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned char u8;

#define BLOCK 4096
#define LANES 8
#define STRIPES_A_ROUND 16

#define PRIME32_1 0x9E3779B1U
#define PRIME32_2 0x85EBCA77U
#define PRIME32_3 0xC2B2AE3DU
#define PRIME64_1 0x9E3779B185EBCA87ULL
#define PRIME64_2 0xC2B2AE3D27D4EB4FULL
#define PRIME64_3 0x165667B19E3779F9ULL
#define PRIME64_4 0x85EBCA77C2B2AE63ULL
#define PRIME64_5 0x27D4EB2F165667C5ULL
#define PRIME_MX1 0x165667919E3779F9ULL

// The default secret of XXH3 (kSecret), 192 bytes as little-endian words.
__constant__ u64 SECRET[24] = {
    0xbe4ba423396cfeb8ULL, 0x1cad21f72c81017cULL, 0xdb979083e96dd4deULL, 0x1f67b3b7a4a44072ULL,
    0x78e5c0cc4ee679cbULL, 0x2172ffcc7dd05a82ULL, 0x8e2443f7744608b8ULL, 0x4c263a81e69035e0ULL,
    0xcb00c391bb52283cULL, 0xa32e531b8b65d088ULL, 0x4ef90da297486471ULL, 0xd8acdea946ef1938ULL,
    0x3f349ce33f76faa8ULL, 0x1d4f0bc7c7bbdcf9ULL, 0x3159b4cd4be0518aULL, 0x647378d9c97e9fc8ULL,
    0xc3ebd33483acc5eaULL, 0xeb6313faffa081c5ULL, 0x49daf0b751dd0d17ULL, 0x9e68d429265516d3ULL,
    0xfca1477d58be162bULL, 0xce31d07ad1b8f88fULL, 0x280416958f3acb45ULL, 0x7e404bbbcafbd7afULL,
};

// The secret's 8 bytes at any offset up to 184.
__device__ __forceinline__ u64 secret_at(int offset) {
    int word = offset >> 3, shift = (offset & 7) * 8;
    u64 low = SECRET[word];
    return shift == 0 ? low : (low >> shift) | (SECRET[word + 1] << (64 - shift));
}

__device__ __forceinline__ u64 shuffle_xor(u64 value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

__device__ __forceinline__ u64 multiply_halves(u64 value) { return (u64)(u32)value * (u64)(u32)(value >> 32); }

__device__ __forceinline__ u64 fold(u64 a, u64 b) { return (a * b) ^ __umul64hi(a, b); }

__device__ __forceinline__ u64 avalanche(u64 h) {
    h ^= h >> 37;
    h *= PRIME_MX1;
    return h ^ (h >> 32);
}

// Eight bytes from any address, by aligned loads that stay within the words the bytes lie in.
struct Unaligned {
    const u64 *words;
    int shift;
    __device__ __forceinline__ Unaligned(const u8 *address) {
        words = (const u64 *)((u64)address & ~7ULL);
        shift = (int)((u64)address & 7) * 8;
    }
    __device__ __forceinline__ u64 operator[](int i) const {
        u64 low = __ldcs(words + i);
        return shift == 0 ? low : (low >> shift) | (__ldcs(words + i + 1) << (64 - shift));
    }
};

struct Aligned {
    const u64 *words;
    __device__ __forceinline__ Aligned(const u8 *address) : words((const u64 *)address) {}
    __device__ __forceinline__ u64 operator[](int i) const { return __ldcs(words + i); }
};

// A block in shared memory.
struct Shared {
    const u64 *words;
    __device__ __forceinline__ Shared(const u64 *at) : words(at) {}
    __device__ __forceinline__ u64 operator[](int i) const { return words[i]; }
};

// The hash of one block by eight neighbouring threads of a warp, all 32 of which are here. Lane 0 returns the low half,
// lane 1 the high one. `data[8 * s + lane]` is what lane `lane` takes of stripe `s`.
template <class Data>
__device__ __forceinline__ u64 hash_block(const Data &data, int lane) {
    const u64 starts[LANES] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    u64 acc = starts[0];
#pragma unroll
    for (int i = 1; i < LANES; i++) acc = lane == i ? starts[i] : acc;
    u64 keys[STRIPES_A_ROUND];
#pragma unroll
    for (int s = 0; s < STRIPES_A_ROUND; s++) keys[s] = SECRET[s + lane];
    const u64 scramble_key = SECRET[16 + lane];

    for (int round = 0; round < 4; round++) {
        u64 value[STRIPES_A_ROUND];
#pragma unroll
        for (int s = 0; s < STRIPES_A_ROUND; s++) value[s] = data[(round * STRIPES_A_ROUND + s) * LANES + lane];
        // The last stripe of the block is not the round's sixteenth: it has its own key.
        if (round == 3) keys[STRIPES_A_ROUND - 1] = secret_at(121 + 8 * lane);
        u64 theirs = 0;
#pragma unroll
        for (int s = 0; s < STRIPES_A_ROUND; s++) {
            theirs += value[s];
            acc += multiply_halves(value[s] ^ keys[s]);
        }
        acc += shuffle_xor(theirs, 1);
        if (round < 3) {
            acc ^= acc >> 47;
            acc ^= scramble_key;
            acc *= PRIME32_1;
        }
    }
    // Pairs of lanes: the even one folds for the low half, the odd one for the high half.
    u64 other = shuffle_xor(acc, 1);
    bool high = lane & 1;
    int pair = (high ? 192 - 64 - 11 : 11) + 16 * (lane >> 1);
    u64 first = high ? other : acc, second = high ? acc : other;
    u64 sum = fold(first ^ secret_at(pair), second ^ secret_at(pair + 8));
    sum += shuffle_xor(sum, 2);
    sum += shuffle_xor(sum, 4);
    u64 start = high ? ~((u64)BLOCK * PRIME64_2) : (u64)BLOCK * PRIME64_1;
    return avalanche(start + sum);
}

// Consecutive blocks in memory.
struct Run {
    u64 address;
    // How many blocks the runs before it have.
    u64 first;
};

// Hashes `blocks` blocks from block `from` of the runs on, which follow each other in `out` (two words a block, low half
// first). `runs` has one entry more than there are runs, which tells where the last one ends. Aligned: every address
// is a multiple of 8.
template <class Data>
__device__ __forceinline__ void hash_runs(const Run *runs, u32 count, u64 from, u32 blocks, u64 *out) {
    u32 at = (blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    int lane = threadIdx.x % LANES;
    bool mine = at < blocks;
    u64 block = from + (mine ? at : blocks - 1);
    u32 low = 0, high = count;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (runs[middle].first <= block) low = middle; else high = middle;
    }
    Data data((const u8 *)(runs[low].address + (block - runs[low].first) * BLOCK));
    u64 half = hash_block(data, lane);
    if (mine && lane < 2) out[2 * (u64)at + lane] = half;
}

extern "C" __global__ void __launch_bounds__(256) hash_runs_aligned(const Run *runs, u32 count, u64 from, u32 blocks, u64 *out) {
    hash_runs<Aligned>(runs, count, from, blocks, out);
}

extern "C" __global__ void __launch_bounds__(256) hash_runs_unaligned(const Run *runs, u32 count, u64 from, u32 blocks, u64 *out) {
    hash_runs<Unaligned>(runs, count, from, blocks, out);
}

// A piece of a block: `bytes` bytes from `address` on, at byte `at` of the block.
struct Span {
    u64 address;
    u32 at;
    u32 bytes;
};

// Hashes blocks that are put together from spans: those of block b are starts[b]..starts[b + 1], and fill it. One warp of
// each thread block has a block of weights at a time, in shared memory.
extern "C" __global__ void __launch_bounds__(128) hash_spans(const Span *spans, const u32 *starts, u32 blocks, u64 *out) {
    __shared__ u64 gathered[4][BLOCK / 8];
    int warp = threadIdx.x / 32, thread = threadIdx.x % 32;
    u32 block = blockIdx.x * 4 + warp;
    if (block >= blocks) return;
    u8 *bytes = (u8 *)gathered[warp];
    for (u32 s = starts[block]; s < starts[block + 1]; s++) {
        Span span = spans[s];
        const u8 *from = (const u8 *)span.address;
        if (((span.address | span.at | span.bytes) & 7) == 0) {
            for (u32 i = thread; i < span.bytes / 8; i += 32) gathered[warp][span.at / 8 + i] = ((const u64 *)from)[i];
        } else {
            for (u32 i = thread; i < span.bytes; i += 32) bytes[span.at + i] = from[i];
        }
    }
    __syncwarp();
    // All four groups of eight hash the same block; the first one's result counts.
    u64 half = hash_block(Shared(gathered[warp]), thread % LANES);
    if (thread < 2) out[2 * (u64)block + thread] = half;
}
