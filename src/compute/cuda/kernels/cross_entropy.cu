// archs: 80
//
// Softmax cross-entropy of rows of logits, and its gradient. A block a row.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef long long i64;

__device__ __forceinline__ float f32(bf16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ bf16 to_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// Maximum and sum of exponentials of two runs of values, as one.
__device__ __forceinline__ void merge(float &m, float &l, float m2, float l2) {
    const float top = fmaxf(m, m2);
    // The first is minus infinity, its sum nothing, before anything was seen.
    l = (l == 0.f ? 0.f : l * expf(m - top)) + (l2 == 0.f ? 0.f : l2 * expf(m2 - top));
    m = top;
}

// Four values, as one access where WIDE.
template <bool WIDE> __device__ __forceinline__ float4 four(const float *logits, int i, int n) {
    if (WIDE) return *(const float4 *)(logits + i);
    const float none = -__int_as_float(0x7f800000);
    return make_float4(logits[i], i + 1 < n ? logits[i + 1] : none, i + 2 < n ? logits[i + 2] : none, i + 3 < n ? logits[i + 3] : none);
}

template <bool WIDE>
__device__ __forceinline__ void forward_backward(const float *logits, i64 ld, int n, const int *targets, float share, float *losses, bf16 *d_logits) {
    __shared__ float tops[32], sums[32];
    const i64 row = blockIdx.x;
    logits += row * ld;
    float m = -__int_as_float(0x7f800000), l = 0;
    const int step = 4 * blockDim.x;
#pragma unroll 4
    for (int i = 4 * threadIdx.x; i < n; i += step) {
        const float4 x = four<WIDE>(logits, i, n);
        const float top = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
        // A new top is rare. NaN is in no maximum, and stays in the sum.
        if (top > m) l *= l == 0.f ? 1.f : expf(m - top), m = top;
        if (WIDE || i + 3 < n) l += (expf(x.x - m) + expf(x.y - m)) + (expf(x.z - m) + expf(x.w - m));
        else
            for (int e = i; e < n; e++) l += expf(logits[e] - m);
    }
#pragma unroll
    for (int w = 16; w; w /= 2) {
        const float m2 = __shfl_xor_sync(0xffffffff, m, w), l2 = __shfl_xor_sync(0xffffffff, l, w);
        merge(m, l, m2, l2);
    }
    if ((threadIdx.x & 31) == 0) tops[threadIdx.x / 32] = m, sums[threadIdx.x / 32] = l;
    __syncthreads();
    m = tops[0], l = sums[0];
    for (int w = 1; w < blockDim.x / 32; w++) merge(m, l, tops[w], sums[w]);
    const int target = targets[row];
    if (threadIdx.x == 0) losses[row] = logf(l) + (m - logits[target]);
    if (!d_logits) return;
    d_logits += row * n;
    const float factor = share / l;
#pragma unroll 4
    for (int i = 4 * threadIdx.x; i < n; i += step) {
        const float4 x = four<WIDE>(logits, i, n);
        bf16 y[4] = {to_bf16(expf(x.x - m) * factor - (i == target ? share : 0.f)), to_bf16(expf(x.y - m) * factor - (i + 1 == target ? share : 0.f)),
                     to_bf16(expf(x.z - m) * factor - (i + 2 == target ? share : 0.f)), to_bf16(expf(x.w - m) * factor - (i + 3 == target ? share : 0.f))};
        if (WIDE) *(uint2 *)(d_logits + i) = make_uint2(y[0] | (u32)y[1] << 16, y[2] | (u32)y[3] << 16);
        else
            for (int e = 0; e < 4 && i + e < n; e++) d_logits[i + e] = y[e];
    }
}

// losses (rows) of f32 logits (rows x n, ld apart); d_logits (bf16, n wide), where given: (softmax - target) * share. `*_wide` takes n and
// ld in multiples of 4.
extern "C" {
__global__ void __launch_bounds__(1024) cross_entropy(const float *logits, i64 ld, int n, const int *targets, float share, float *losses,
                                                      bf16 *d_logits) {
    forward_backward<false>(logits, ld, n, targets, share, losses, d_logits);
}
__global__ void __launch_bounds__(1024) cross_entropy_wide(const float *logits, i64 ld, int n, const int *targets, float share, float *losses,
                                                           bf16 *d_logits) {
    forward_backward<true>(logits, ld, n, targets, share, losses, d_logits);
}
}
