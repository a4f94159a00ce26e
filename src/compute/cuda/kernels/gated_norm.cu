// archs: 80
//
// The norm behind the delta rule, gated after it, a head of a row at a time: y = x / sqrt(mean(x^2) + eps) * w * silu(z), with
// x's heads padded to 128 columns, z's and y's not. A warp a head of a row; lane l has columns 4 l and the next three.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef long long i64;

static const int D = 128;

__device__ __forceinline__ float f32(bf16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ float from_f16(bf16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
// Element i of a weight of kind 0 (bf16), 1 (f16) or 2 (f32).
__device__ __forceinline__ float weight(const void *w, int kind, i64 i) {
    if (kind == 0) return f32(((const bf16 *)w)[i]);
    if (kind == 2) return ((const float *)w)[i];
    return from_f16(((const bf16 *)w)[i]);
}
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int w = 16; w; w /= 2) x += __shfl_xor_sync(0xffffffff, x, w);
    return x;
}
// `have` of four values, the others zero. All four in one access where d and the rows are multiples of 4.
__device__ __forceinline__ void load4(const bf16 *from, int have, bool wide, float (&x)[4]) {
    if (wide) {
        const uint2 v = have > 0 ? *(const uint2 *)from : make_uint2(0, 0);
        x[0] = __uint_as_float(v.x << 16), x[1] = __uint_as_float(v.x & 0xffff0000);
        x[2] = __uint_as_float(v.y << 16), x[3] = __uint_as_float(v.y & 0xffff0000);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = i < have ? f32(from[i]) : 0;
    }
}
__device__ __forceinline__ void store4(bf16 *to, int have, bool wide, const float (&x)[4]) {
    if (wide) {
        if (have > 0) *(uint2 *)to = make_uint2(pack(x[0], x[1]), pack(x[2], x[3]));
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i < have) to[i] = pack(x[i], 0) & 0xffff;
    }
}

extern "C" {
__global__ void gated_norm_forward(const bf16 *x, const bf16 *z, i64 ldz, const void *w, int kind, float eps, int rows, int heads, int d,
                                   int wide, bf16 *y) {
    const i64 item = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (item >= (i64)rows * heads) return;
    const int lane = threadIdx.x & 31, head = item % heads, have = d - 4 * lane;
    const i64 row = item / heads;
    float a[4], g[4], sum = 0;
    load4(x + item * D + 4 * lane, have, true, a);
    load4(z + row * ldz + head * d + 4 * lane, have, wide, g);
#pragma unroll
    for (int i = 0; i < 4; i++) sum += i < have ? a[i] * a[i] : 0;
    const float r = 1.f / sqrtf(warp_sum(sum) / d + eps);
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = i < have ? a[i] * r * weight(w, kind, 4 * lane + i) * (g[i] / (1.f + __expf(-g[i]))) : 0;
    store4(y + row * heads * d + head * d + 4 * lane, have, wide, a);
}

// In place: `dy` becomes y, `x` its gradient; dz has rows lddz apart. Row blockIdx of `partial` (D wide): sums for dw.
__global__ void __launch_bounds__(256) gated_norm_backward(bf16 *dy, bf16 *x, const bf16 *z, i64 ldz, const void *w, int kind, float eps,
                                                           int rows, int heads, int d, int wide, bf16 *dz, i64 lddz, float *partial) {
    __shared__ float sums[8][D];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, have = d - 4 * lane;
    float wi[4], dw[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4; i++) wi[i] = i < have ? weight(w, kind, 4 * lane + i) : 0;
    for (i64 item = (i64)blockIdx.x * 8 + warp; item < (i64)rows * heads; item += (i64)gridDim.x * 8) {
        const int head = item % heads;
        const i64 row = item / heads, tight = item * d + 4 * lane;
        float a[4], g[4], up[4], dn[4], squares = 0, sum = 0;
        load4(x + item * D + 4 * lane, have, true, a);
        load4(z + row * ldz + head * d + 4 * lane, have, wide, g);
        load4(dy + tight, have, wide, up);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i >= have) a[i] = 0;
            squares += a[i] * a[i];
        }
        const float r = 1.f / sqrtf(warp_sum(squares) / d + eps);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float sigmoid = 1.f / (1.f + __expf(-g[i])), silu = g[i] * sigmoid, n = a[i] * r;
            dw[i] += up[i] * n * silu;
            dn[i] = up[i] * wi[i] * silu;
            sum += dn[i] * a[i];
            g[i] = up[i] * wi[i] * n * (sigmoid + silu * (1.f - sigmoid));
            up[i] = n * wi[i] * silu;
        }
        const float mean = warp_sum(sum) * r * r / d;
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = r * (dn[i] - a[i] * mean);
        store4(dy + tight, have, wide, up);
        store4(dz + row * lddz + head * d + 4 * lane, have, wide, g);
        store4(x + item * D + 4 * lane, 4, true, a);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) sums[warp][4 * lane + i] = dw[i];
    __syncthreads();
    if (threadIdx.x < D) {
        float sum = 0;
        for (int w = 0; w < 8; w++) sum += sums[w][threadIdx.x];
        partial[(i64)blockIdx.x * D + threadIdx.x] = sum;
    }
}
}
