// archs: 80
//
// The norm behind the delta rule, gated after it, a head of a row at a time: y = x / sqrt(mean(x^2) + eps) * w * silu(z), with
// x's heads padded to 128 columns, z's and y's not. Half a warp a head of a row; lane l has columns 8 l and the next seven.

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
__device__ __forceinline__ float half_sum(float x) {
#pragma unroll
    for (int w = 8; w; w /= 2) x += __shfl_xor_sync(0xffffffff, x, w);
    return x;
}
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
// `have` of eight values, the others zero. All eight in one access where d and the rows are multiples of 8.
__device__ __forceinline__ void load8(const bf16 *from, int have, bool wide, float (&x)[8]) {
    if (wide) {
        const uint4 v = have > 0 ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
        const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) x[2 * i] = __uint_as_float(w[i] << 16), x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = i < have ? f32(from[i]) : 0;
    }
}
__device__ __forceinline__ void store8(bf16 *to, int have, bool wide, const float (&x)[8]) {
    if (wide) {
        if (have > 0) *(uint4 *)to = make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < have) to[i] = pack(x[i], 0) & 0xffff;
    }
}
#define EIGHT _Pragma("unroll") for (int i = 0; i < 8; i++)
// A block of 256 has 16 heads at a time.
static const int AT_ONCE = 16;

extern "C" {
__global__ void __launch_bounds__(256) gated_norm_forward(const bf16 *x, const bf16 *z, i64 ldz, const void *w, int kind, float eps, int rows,
                                                          int heads, int d, int wide, bf16 *y) {
    const int items = rows * heads, wanted = blockIdx.x * AT_ONCE + threadIdx.x / 16, item = min(wanted, items - 1);
    const int lane = threadIdx.x & 15, row = item / heads, head = item - row * heads, have = d - 8 * lane;
    float a[8], g[8], sum = 0;
    load8(x + (i64)item * D + 8 * lane, 8, true, a);
    load8(z + row * ldz + head * d + 8 * lane, have, wide, g);
    EIGHT sum += i < have ? a[i] * a[i] : 0;
    const float r = 1.f / sqrtf(half_sum(sum) / d + eps);
    if (wanted >= items) return;
    EIGHT a[i] = i < have ? a[i] * r * weight(w, kind, 8 * lane + i) * (g[i] * sigmoid(g[i])) : 0;
    store8(y + (i64)item * d + 8 * lane, have, wide, a);
}

// In place: `dy` becomes y, `x` its gradient; dz has rows lddz apart. Row blockIdx of `partial` (D wide): sums for dw.
__global__ void __launch_bounds__(256) gated_norm_backward(bf16 *dy, bf16 *x, const bf16 *z, i64 ldz, const void *w, int kind, float eps,
                                                           int rows, int heads, int d, int wide, bf16 *dz, i64 lddz, float *partial) {
    __shared__ float sums[AT_ONCE][D];
    const int lane = threadIdx.x & 15, mine = threadIdx.x / 16, have = d - 8 * lane, items = rows * heads;
    float wi[8], dw[8] = {};
    EIGHT wi[i] = i < have ? weight(w, kind, 8 * lane + i) : 0;
    for (int begin = blockIdx.x * AT_ONCE; begin < items; begin += gridDim.x * AT_ONCE) {
        const int item = min(begin + mine, items - 1), row = item / heads, head = item - row * heads;
        const i64 tight = (i64)item * d + 8 * lane;
        float a[8], g[8], up[8], dn[8], squares = 0, sum = 0;
        load8(x + (i64)item * D + 8 * lane, 8, true, a);
        load8(z + row * ldz + head * d + 8 * lane, have, wide, g);
        load8(dy + tight, have, wide, up);
        EIGHT {
            if (i >= have) a[i] = 0;
            squares += a[i] * a[i];
        }
        const float r = 1.f / sqrtf(half_sum(squares) / d + eps);
        // Rows that are not there are another's: what they would add is not.
        const bool real = begin + mine < items;
        EIGHT {
            const float s = sigmoid(g[i]), silu = g[i] * s, n = a[i] * r;
            dw[i] += real ? up[i] * n * silu : 0;
            dn[i] = up[i] * wi[i] * silu;
            sum += dn[i] * a[i];
            g[i] = up[i] * wi[i] * n * (s + silu * (1.f - s));
            up[i] = n * wi[i] * silu;
        }
        const float mean = half_sum(sum) * r * r / d;
        if (!real) continue;
        EIGHT a[i] = r * (dn[i] - a[i] * mean);
        store8(dy + tight, have, wide, up);
        store8(dz + row * lddz + head * d + 8 * lane, have, wide, g);
        store8(x + (i64)item * D + 8 * lane, 8, true, a);
    }
    EIGHT sums[mine][8 * lane + i] = dw[i];
    __syncthreads();
    if (threadIdx.x < D) {
        float sum = 0;
        for (int k = 0; k < AT_ONCE; k++) sum += sums[k][threadIdx.x];
        partial[(i64)blockIdx.x * D + threadIdx.x] = sum;
    }
}
}
