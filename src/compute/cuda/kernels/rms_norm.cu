// archs: 80
//
// Root-mean-square norm: y = x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich, arXiv 1910.07467). The stream is f32; what
// goes into products, and what is kept for the way back, is bf16. `*_2` and `*_4` have a row in registers, 2 or 4 times eight
// columns a thread, and so take h in multiples of 8, up to 16 or 32 times the threads of a block (512 at most).

typedef unsigned short bf16;
typedef unsigned int u32;
typedef long long i64;

__device__ __forceinline__ float f32(bf16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ bf16 to_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
// Element i of a weight of kind 0 (bf16), 1 (f16) or 2 (f32); 4 more where it is kept as its distance from 1.
__device__ __forceinline__ float from_f16(bf16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
__device__ __forceinline__ float weight(const void *w, int kind, i64 i) {
    const float from = kind & 4 ? 1.f : 0.f;
    kind &= 3;
    if (kind == 0) return from + f32(((const bf16 *)w)[i]);
    if (kind == 2) return from + ((const float *)w)[i];
    return from + from_f16(((const bf16 *)w)[i]);
}
// W values in one access where W is 8 or 4: the caller knows that the address allows it.
template <int W> __device__ __forceinline__ void load(const bf16 *from, float (&x)[W]) {
    if constexpr (W == 8) {
        uint4 v = *(const uint4 *)from;
        u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[2 * i] = __uint_as_float(w[i] << 16);
            x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000);
        }
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) x[i] = f32(from[i]);
    }
}
template <int W> __device__ __forceinline__ void load(const float *from, float (&x)[W]) {
    if constexpr (W % 4 == 0) {
#pragma unroll
        for (int i = 0; i < W; i += 4) {
            float4 v = *(const float4 *)(from + i);
            x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) x[i] = from[i];
    }
}
template <int W> __device__ __forceinline__ void store(bf16 *to, const float (&x)[W]) {
    if constexpr (W == 8) {
        u32 w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
        *(uint4 *)to = make_uint4(w[0], w[1], w[2], w[3]);
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) to[i] = to_bf16(x[i]);
    }
}
template <int W> __device__ __forceinline__ void store(float *to, const float (&x)[W]) {
    if constexpr (W % 4 == 0) {
#pragma unroll
        for (int i = 0; i < W; i += 4) *(float4 *)(to + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) to[i] = x[i];
    }
}
// The sum over the block, in one order whatever runs when. `scratch` has a float for every warp.
__device__ __forceinline__ float block_sum(float x, float *scratch) {
#pragma unroll
    for (int w = 16; w; w /= 2) x += __shfl_xor_sync(0xffffffff, x, w);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : 0;
#pragma unroll
    for (int w = 16; w; w /= 2) x += __shfl_xor_sync(0xffffffff, x, w);
    return x;
}

// Eight weights from i on.
__device__ __forceinline__ void load_weights(const void *w, int kind, int i, float (&x)[8]) {
    if ((kind & 3) == 0 && ((i64)w & 15) == 0) {
        load<8>((const bf16 *)w + i, x);
    } else if ((kind & 3) == 0) {
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] = f32(((const bf16 *)w)[i + e]);
    } else if ((kind & 3) == 2) {
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] = ((const float *)w)[i + e];
    } else {
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] = from_f16(((const bf16 *)w)[i + e]);
    }
    const float from = kind & 4 ? 1.f : 0.f;
#pragma unroll
    for (int e = 0; e < 8; e++) x[e] += from;
}
// The sum over the block with one barrier: the caller does not come back to the same `scratch` without another one between.
__device__ __forceinline__ float block_sum_once(float x, float *scratch) {
#pragma unroll
    for (int w = 16; w; w /= 2) x += __shfl_xor_sync(0xffffffff, x, w);
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < blockDim.x / 32 ? scratch[threadIdx.x % 32] : 0;
#pragma unroll
    for (int w = 16; w; w /= 2) x += __shfl_xor_sync(0xffffffff, x, w);
    return x;
}

// A block a row. Row i of the output is row index[i] of x, where there is an index. Rows from `first` on leave their
// rstd and their bf16 selves in `rstd` and `kept` (from 0 on), where those are given.
template <int W>
__device__ __forceinline__ void forward_any(const float *x, const int *index, const void *w, int kind, float eps, int h,
                                        bf16 *y, float *rstd, bf16 *kept, int first) {
    __shared__ float scratch[32];
    const int row = blockIdx.x;
    x += (i64)(index ? index[row] : row) * h;
    float sum = 0, v[W], k[W];
    for (int i = threadIdx.x * W; i < h; i += blockDim.x * W) {
        load<W>(x + i, v);
#pragma unroll
        for (int e = 0; e < W; e++) sum += v[e] * v[e];
    }
    const float r = 1.f / sqrtf(block_sum(sum, scratch) / h + eps);
    const bool keep = row >= first;
    if (keep && rstd && threadIdx.x == 0) rstd[row - first] = r;
    for (int i = threadIdx.x * W; i < h; i += blockDim.x * W) {
        load<W>(x + i, v);
        if (keep && kept) store<W>(kept + (i64)(row - first) * h + i, v);
#pragma unroll
        for (int e = 0; e < W; e++) k[e] = v[e] * r * weight(w, kind, i + e);
        store<W>(y + (i64)row * h + i, k);
    }
}

// The same again from what was kept.
template <int W>
__device__ __forceinline__ void again_any(const bf16 *x, const float *rstd, const void *w, int kind, int h, bf16 *y) {
    const i64 row = blockIdx.x;
    const float r = rstd[row];
    float v[W];
    for (int i = threadIdx.x * W; i < h; i += blockDim.x * W) {
        load<W>(x + row * h + i, v);
#pragma unroll
        for (int e = 0; e < W; e++) v[e] = v[e] * r * weight(w, kind, i + e);
        store<W>(y + row * h + i, v);
    }
}

// dx (row index[i], or i) += ..., its bf16 copy where asked for; sums for dw of the rows that this block did, into row
// blockIdx of `partial`. Shared memory: h floats, rounded up to whole rounds of the block; every thread owns its columns'
// sums, which lie blockDim apart, each thread's on a bank of its own.
template <int W>
__device__ __forceinline__ void backward_any(const bf16 *dy, const bf16 *x, const float *rstd, const void *w, int kind, int rows,
                                         int h, const int *index, float *dx, bf16 *copy, float *partial) {
    extern __shared__ float dw[];
    __shared__ float scratch[32];
    for (int i = threadIdx.x * W; i < h; i += blockDim.x * W)
#pragma unroll
        for (int e = 0; e < W; e++) dw[i - threadIdx.x * W + e * blockDim.x + threadIdx.x] = 0;
    float a[W], b[W], d[W];
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        const bf16 *yr = dy + (i64)row * h, *xr = x + (i64)row * h;
        const float r = rstd[row];
        float sum = 0;
        for (int i = threadIdx.x * W; i < h; i += blockDim.x * W) {
            load<W>(yr + i, a);
            load<W>(xr + i, b);
#pragma unroll
            for (int e = 0; e < W; e++) {
                dw[i - threadIdx.x * W + e * blockDim.x + threadIdx.x] += a[e] * b[e] * r;
                sum += a[e] * weight(w, kind, i + e) * b[e];
            }
        }
        const float mean = block_sum(sum, scratch) * r * r / h;
        const i64 to = (i64)(index ? index[row] : row) * h;
        for (int i = threadIdx.x * W; i < h; i += blockDim.x * W) {
            load<W>(yr + i, a);
            load<W>(xr + i, b);
            load<W>(dx + to + i, d);
#pragma unroll
            for (int e = 0; e < W; e++) d[e] += r * (a[e] * weight(w, kind, i + e) - b[e] * mean);
            store<W>(dx + to + i, d);
            if (copy) store<W>(copy + to + i, d);
        }
    }
    for (int i = threadIdx.x * W; i < h; i += blockDim.x * W)
#pragma unroll
        for (int e = 0; e < W; e++) partial[(i64)blockIdx.x * h + i + e] = dw[i - threadIdx.x * W + e * blockDim.x + threadIdx.x];
}

// The same three with rows in registers: thread t has columns (t + v blockDim) 8 and the next seven, for each v below V.
#define VECTORS \
    _Pragma("unroll") for (int v = 0; v < V; v++) \
        if (const int i = (threadIdx.x + v * blockDim.x) * 8; i < h)
#define EIGHT _Pragma("unroll") for (int e = 0; e < 8; e++)

template <int V>
__device__ __forceinline__ void forward_held(const float *x, const int *index, const void *w, int kind, float eps, int h, bf16 *y,
                                             float *rstd, bf16 *kept, int first) {
    __shared__ float scratch[32];
    const int row = blockIdx.x;
    x += (i64)(index ? index[row] : row) * h;
    float sum = 0, values[V][8], k[8];
    VECTORS load<8>(x + i, values[v]);
    VECTORS EIGHT sum += values[v][e] * values[v][e];
    const float r = 1.f / sqrtf(block_sum_once(sum, scratch) / h + eps);
    const bool keep = row >= first;
    if (keep && rstd && threadIdx.x == 0) rstd[row - first] = r;
    VECTORS {
        if (keep && kept) store<8>(kept + (i64)(row - first) * h + i, values[v]);
        load_weights(w, kind, i, k);
        EIGHT k[e] *= values[v][e] * r;
        store<8>(y + (i64)row * h + i, k);
    }
}

template <int V>
__device__ __forceinline__ void again_held(const bf16 *x, const float *rstd, const void *w, int kind, int h, bf16 *y) {
    const i64 row = blockIdx.x;
    const float r = rstd[row];
    float values[V][8], k[8];
    VECTORS load<8>(x + row * h + i, values[v]);
    VECTORS {
        load_weights(w, kind, i, k);
        EIGHT k[e] *= values[v][e] * r;
        store<8>(y + row * h + i, k);
    }
}

template <int V>
__device__ __forceinline__ void backward_held(const bf16 *dy, const bf16 *x, const float *rstd, const void *w, int kind, int rows, int h,
                                              const int *index, float *dx, bf16 *copy, float *partial) {
    __shared__ float scratch[2][32];
    // With few columns a thread there is room for their weights, and for dx while the block's sum is on its way.
    static const bool ROOM = V <= 2;
    float weights[V][8], dw[V][8];
    VECTORS {
        if (ROOM) load_weights(w, kind, i, weights[v]);
        EIGHT dw[v][e] = 0;
    }
    int turn = 0;
    for (int row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 1) {
        const i64 to = (i64)(index ? index[row] : row) * h;
        const float r = rstd[row];
        uint4 up[V], kept[V];
        float d[V][8], a[8], b[8], sum = 0;
        VECTORS up[v] = *(const uint4 *)(dy + (i64)row * h + i), kept[v] = *(const uint4 *)(x + (i64)row * h + i);
        if (ROOM) VECTORS load<8>(dx + to + i, d[v]);
        VECTORS {
            load<8>((const bf16 *)&up[v], a), load<8>((const bf16 *)&kept[v], b);
            if (!ROOM) load_weights(w, kind, i, weights[v]);
            EIGHT {
                dw[v][e] += a[e] * b[e] * r;
                sum += a[e] * weights[v][e] * b[e];
            }
        }
        const float mean = block_sum_once(sum, scratch[turn]) * r * r / h;
        VECTORS {
            load<8>((const bf16 *)&up[v], a), load<8>((const bf16 *)&kept[v], b);
            if (!ROOM) load<8>(dx + to + i, d[v]), load_weights(w, kind, i, weights[v]);
            EIGHT d[v][e] += r * (a[e] * weights[v][e] - b[e] * mean);
            store<8>(dx + to + i, d[v]);
            if (copy) store<8>(copy + to + i, d[v]);
        }
    }
    VECTORS store<8>(partial + (i64)blockIdx.x * h + i, dw[v]);
}

extern "C" {
#define NORM(NAME, BOUND, HOW)                                                                                               \
    __global__ void BOUND rms_norm_forward##NAME(const float *x, const int *index, const void *w, int kind, float eps,       \
                                                 int h, bf16 *y, float *rstd, bf16 *kept, int first) {                       \
        forward##HOW(x, index, w, kind, eps, h, y, rstd, kept, first);                                                       \
    }                                                                                                                        \
    __global__ void BOUND rms_norm_again##NAME(const bf16 *x, const float *rstd, const void *w, int kind, int h, bf16 *y) {  \
        again##HOW(x, rstd, w, kind, h, y);                                                                                  \
    }                                                                                                                        \
    __global__ void BOUND rms_norm_backward##NAME(const bf16 *dy, const bf16 *x, const float *rstd, const void *w, int kind, \
                                                  int rows, int h, const int *index, float *dx, bf16 *copy,                  \
                                                  float *partial) {                                                          \
        backward##HOW(dy, x, rstd, w, kind, rows, h, index, dx, copy, partial);                                              \
    }
NORM(, , _any<1>)
NORM(_2, __launch_bounds__(512), _held<2>)
NORM(_4, __launch_bounds__(512), _held<4>)

// out (n) = sums over `count` rows of `partial`, in one order. Blocks of 1024: 32 columns, 32 slices of the rows.
__global__ void __launch_bounds__(1024) sum_partial(const float *partial, int count, int n, float *out) {
    __shared__ float sums[32][32];
    const int lane = threadIdx.x & 31, slice = threadIdx.x / 32;
    const i64 i = (i64)blockIdx.x * 32 + lane;
    float sum = 0;
    if (i < n)
#pragma unroll 8
        for (int r = slice; r < count; r += 32) sum += partial[(i64)r * n + i];
    sums[slice][lane] = sum;
    __syncthreads();
    if (slice || i >= n) return;
    sum = 0;
#pragma unroll
    for (int k = 0; k < 32; k++) sum += sums[k][lane];
    out[i] = sum;
}
}
