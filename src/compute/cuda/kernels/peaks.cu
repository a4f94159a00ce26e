// archs: 80
//
// The largest absolute values of many arrays in one launch: a layer's gradients and inputs are a dozen arrays, most of them
// read in less time than a launch takes.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef long long i64;

// `count` values of kind 0 (bf16), 1 (f16) or 2 (f32), whose largest goes to out[to].
struct Array { const void *x; i64 count; int kind, to; };
struct Arrays { Array of[16]; u32 *out; };

// Bits of the absolute value as f32, where larger bits are a larger value and NaN is above infinity.
__device__ __forceinline__ u32 magnitude(const Array &a, i64 i) {
    if (a.kind == 0) return ((u32)((const bf16 *)a.x)[i] << 16) & 0x7fffffff;
    if (a.kind == 2) return ((const u32 *)a.x)[i] & 0x7fffffff;
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(((const bf16 *)a.x)[i]));
    return __float_as_uint(y) & 0x7fffffff;
}
__device__ __forceinline__ u32 magnitude(u32 word, bool pair) {
    return pair ? max(word & 0x7fff0000, (word << 16) & 0x7fff0000) : word & 0x7fffffff;
}

extern "C" {
// Array blockIdx.y, shared by the blocks of x.
__global__ void peaks(const Arrays arrays) {
    const Array a = arrays.of[blockIdx.y];
    const i64 first = (i64)blockIdx.x * blockDim.x + threadIdx.x, step = (i64)gridDim.x * blockDim.x;
    const int size = a.kind == 2 ? 4 : 2;
    u32 top = 0;
    if (a.kind == 1) {
        for (i64 i = first; i < a.count; i += step) top = max(top, magnitude(a, i));
    } else {
        // Values before the first whole 16 bytes, those, and the rest.
        const i64 before = min(a.count, (i64)((16 - (unsigned long long)a.x % 16) % 16 / size));
        const i64 wide = (a.count - before) * size / 16, after = before + wide * 16 / size;
        const uint4 *words = (const uint4 *)((const char *)a.x + before * size);
        const bool pair = a.kind == 0;
        for (i64 i = first; i < wide; i += step) {
            const uint4 w = words[i];
            top = max(top, max(max(magnitude(w.x, pair), magnitude(w.y, pair)), max(magnitude(w.z, pair), magnitude(w.w, pair))));
        }
        if (first < before) top = max(top, magnitude(a, first));
        if (after + first < a.count) top = max(top, magnitude(a, after + first));
    }
#pragma unroll
    for (int w = 16; w; w /= 2) top = max(top, __shfl_xor_sync(0xffffffff, top, w));
    if ((threadIdx.x & 31) == 0 && top) atomicMax(arrays.out + a.to, top);
}
}
