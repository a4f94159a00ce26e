// archs: 75
//
// Copies many pieces of memory in one launch: changed blocks that lie scattered, rows of a tensor that is split between
// ranks. Either side may be memory of this device, of another one that it reaches, or pinned memory of the host: writes of
// whole lines to the latter go over the bus at nearly the speed of a copy engine.

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned char u8;

// `bytes` bytes, at most a block of weights or so: a warp copies one piece at a time.
struct Piece {
    u64 from;
    u64 to;
    u64 bytes;
};

extern "C" __global__ void __launch_bounds__(256) gather(const Piece *pieces, u32 count) {
    u32 warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, warps = gridDim.x * blockDim.x / 32;
    u32 thread = threadIdx.x % 32;
    for (u32 p = warp; p < count; p += warps) {
        Piece piece = pieces[p];
        const u8 *from = (const u8 *)piece.from;
        u8 *to = (u8 *)piece.to;
        if (((piece.from | piece.to) & 15) == 0) {
            u64 wide = piece.bytes / 16;
#pragma unroll 4
            for (u64 i = thread; i < wide; i += 32) ((uint4 *)to)[i] = __ldcs((const uint4 *)from + i);
            for (u64 i = wide * 16 + thread; i < piece.bytes; i += 32) to[i] = from[i];
            continue;
        }
        // Bytes up to where words of the target begin, then words put together from aligned ones of the source.
        u64 head = (0 - piece.to) & 7;
        head = head < piece.bytes ? head : piece.bytes;
        if (thread < head) to[thread] = from[thread];
        u64 words = (piece.bytes - head) / 8;
        u64 start = piece.from + head;
        const u64 *source = (const u64 *)(start & ~7ULL);
        u64 *target = (u64 *)(piece.to + head);
        int shift = (int)(start & 7) * 8;
        if (shift == 0) {
#pragma unroll 8
            for (u64 i = thread; i < words; i += 32) target[i] = __ldcs(source + i);
        } else {
#pragma unroll 4
            for (u64 i = thread; i < words; i += 32) target[i] = (source[i] >> shift) | (source[i + 1] << (64 - shift));
        }
        for (u64 i = head + words * 8 + thread; i < piece.bytes; i += 32) to[i] = from[i];
    }
}

// `count` elements of `element` bytes, `stride` bytes apart on the side that is not packed.
struct Strided {
    u64 from;
    u64 to;
    u64 stride;
    u32 element;
    u32 count;
};

template <class T>
__device__ __forceinline__ void copy_elements(const u8 *from, u64 from_step, u8 *to, u64 to_step, u32 count) {
    for (u32 i = threadIdx.x % 32; i < count; i += 32) *(T *)(to + i * to_step) = *(const T *)(from + i * from_step);
}

__device__ __forceinline__ void copy_strided(Strided s, u64 from_step, u64 to_step) {
    const u8 *from = (const u8 *)s.from;
    u8 *to = (u8 *)s.to;
    u64 together = s.from | s.to | s.stride | s.element;
    if (s.element == 2 && (together & 1) == 0) return copy_elements<unsigned short>(from, from_step, to, to_step, s.count);
    if (s.element == 4 && (together & 3) == 0) return copy_elements<u32>(from, from_step, to, to_step, s.count);
    if (s.element == 8 && (together & 7) == 0) return copy_elements<u64>(from, from_step, to, to_step, s.count);
    for (u64 b = threadIdx.x % 32; b < (u64)s.element * s.count; b += 32) {
        u64 i = b / s.element, in = b % s.element;
        to[i * to_step + in] = from[i * from_step + in];
    }
}

extern "C" __global__ void __launch_bounds__(256) gather_strided(const Strided *runs, u32 count) {
    u32 warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, warps = gridDim.x * blockDim.x / 32;
    for (u32 r = warp; r < count; r += warps) copy_strided(runs[r], runs[r].stride, runs[r].element);
}

extern "C" __global__ void __launch_bounds__(256) scatter_strided(const Strided *runs, u32 count) {
    u32 warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, warps = gridDim.x * blockDim.x / 32;
    for (u32 r = warp; r < count; r += warps) copy_strided(runs[r], runs[r].element, runs[r].stride);
}
