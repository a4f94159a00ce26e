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

// losses (rows) of f32 logits (rows x n, ld apart); d_logits (bf16, n wide), where given: (softmax - target) * share.
extern "C" __global__ void cross_entropy(const float *logits, i64 ld, int n, const int *targets, float share, float *losses,
                                         bf16 *d_logits) {
    __shared__ float tops[32], sums[32];
    const i64 row = blockIdx.x;
    logits += row * ld;
    float m = -__int_as_float(0x7f800000), l = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const float x = logits[i];
        if (x <= m) l += expf(x - m);
        else merge(m, l, x, 1.f); // NaN comes here too, and stays in the sum
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
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        d_logits[i] = to_bf16(expf(logits[i] - m) * factor - (i == target ? share : 0.f));
}
