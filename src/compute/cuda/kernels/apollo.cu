// archs: 80
//
// The arithmetic of one update: APOLLO (Zhu et al., arXiv 2412.05270), and Adam for what is too small to project. The order
// is that of src/compute/cpu/apollo.rs, and so are the random numbers (src/compute/rng.rs) and the rounding of weights
// (src/compute/rounding.rs), to the bit: where a kernel draws, every operation is the exactly rounded one, never fused.
//
// A gradient is a matrix g in bf16 or f32. A channel is an index of the larger dimension. What decides whether a tensor is
// touched stays on the device: `verdict` is 0 to go on, 1 where the gradient is zero throughout, 2 where it is not finite or
// too large; `halted` is set with the latter and holds every later update of the step back too.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef long long i64;

__device__ __forceinline__ float f32(bf16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ bf16 to_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
// Element i of a weight of kind 0 (bf16), 1 (f16) or 2 (f32).
__device__ __forceinline__ float weight(const void *w, int kind, i64 i) {
    if (kind == 0) return f32(((const bf16 *)w)[i]);
    if (kind == 2) return ((const float *)w)[i];
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(((const bf16 *)w)[i]));
    return y;
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

__device__ __forceinline__ void store4(bf16 *to, const float (&x)[4]) {
    u32 w[2];
#pragma unroll
    for (int i = 0; i < 2; i++) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
    *(uint2 *)to = make_uint2(w[0], w[1]);
}

static const int ZERO = 1, BAD = 2;
static const double TINY = 1e-8;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int w = 16; w; w /= 2) x += __shfl_xor_sync(0xffffffff, x, w);
    return x;
}

// The sum over a block in f64, in one order.
__device__ __forceinline__ double block_sum(double x, double *scratch) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int w = 16; w; w /= 2) x += __shfl_xor_sync(0xffffffff, x, w);
    __syncthreads();
    if (lane == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = lane < blockDim.x / 32 ? scratch[lane] : 0;
#pragma unroll
    for (int w = 16; w; w /= 2) x += __shfl_xor_sync(0xffffffff, x, w);
    return x;
}

// Called by every thread of `total` blocks, after thread 0 has written what its block found: is this the last of them, which
// sees what all have written? `counter` is zero before and after.
__device__ __forceinline__ bool last_of(int total, int *counter) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(counter, 1) == total - 1;
        if (last) *counter = 0;
    }
    __syncthreads();
    if (last) __threadfence();
    return last;
}

__device__ __forceinline__ double number(const double *x) {
    double y;
    asm volatile("ld.global.cg.f64 %0, [%1];" : "=d"(y) : "l"(x) : "memory");
    return y;
}

// Is a gradient to be applied? By the sums of squares of its channels, of which thread 0 of block `block` of `total` has a
// part in `sum`, infinity where one of them is over the limit or not a number. The last block decides, in one order.
struct Judge {
    double *sums; // (total)
    int *verdict, *halted, *counter;
    float limit;
    int total;
};
__device__ __forceinline__ void judge(const Judge &j, int block, double sum) {
    __shared__ double scratch[32];
    if (threadIdx.x == 0) j.sums[block] = sum;
    if (!last_of(j.total, j.counter)) return;
    double all = 0;
    for (int i = threadIdx.x; i < j.total; i += blockDim.x) all += number(j.sums + i);
    all = block_sum(all, scratch);
    if (threadIdx.x) return;
    const bool bad = !(all <= j.limit);
    *j.verdict = bad ? BAD : all == 0 ? ZERO : 0;
    if (bad) *j.halted = 1;
}
__device__ __forceinline__ double judged(float square, float limit) {
    return square <= limit ? (double)square : __longlong_as_double(0x7ff0000000000000ll); // NaN is not
}

// ---- Random numbers: src/compute/rng.rs

struct Stream { u32 key0, key1, tensor, purpose, when; };

__device__ __forceinline__ uint4 philox(const Stream &s, u32 block) {
    u32 c0 = block, c1 = s.purpose, c2 = s.tensor, c3 = s.when, k0 = s.key0, k1 = s.key1;
#pragma unroll
    for (int i = 0; i < 10; i++) {
        const u32 a_high = __umulhi(0xD2511F53u, c0), a_low = 0xD2511F53u * c0;
        const u32 b_high = __umulhi(0xCD9E8D57u, c2), b_low = 0xCD9E8D57u * c2;
        c0 = b_high ^ c1 ^ k0, c1 = b_low, c2 = a_high ^ c3 ^ k1, c3 = a_low;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

__device__ __forceinline__ u32 bits16(const Stream &s, i64 i) {
    const uint4 b = philox(s, (u32)(i / 8));
    const u32 w[4] = {b.x, b.y, b.z, b.w};
    u32 word = w[0];
    const int at = i % 8 / 2;
    word = at == 1 ? w[1] : at == 2 ? w[2] : at == 3 ? w[3] : word;
    return (word >> (16 * (i % 2))) & 0xffff;
}

#define ADD __fadd_rn
#define MUL __fmul_rn
#define DIV __fdiv_rn

__device__ __forceinline__ float exact_ln(float x) {
    const u32 bits = __float_as_uint(x), shift = (bits - 0x3f3504f3u) & 0xff800000u;
    const float exponent = (float)((int)shift >> 23), m = __uint_as_float(bits - shift);
    const float s = DIV(ADD(m, -1.f), ADD(m, 1.f)), z = MUL(s, s);
    const float c3 = 2.0f / 3.0f, c5 = 2.0f / 5.0f, c7 = 2.0f / 7.0f, c9 = 2.0f / 9.0f;
    const float series = ADD(2.f, MUL(z, ADD(c3, MUL(z, ADD(c5, MUL(z, ADD(c7, MUL(z, c9))))))));
    return ADD(MUL(exponent, 0.693147180559945309417232121458f), MUL(s, series));
}

__device__ __forceinline__ float normal(u32 word) {
    const float near_[9] = {2.8102264e-8f, 3.4327394e-7f, -3.5233877e-6f, -4.3915065e-6f, 0.00021858087f, -0.001253725f,
                            -0.0041776816f, 0.24664073f, 1.5014094f};
    const float far_[9] = {-0.00020021426f, 0.00010095056f, 0.0013493432f, -0.0036734284f, 0.0057395077f, -0.0076224613f,
                           0.0094388705f, 1.001674f, 2.8329768f};
    const float u = ADD(MUL(ADD(MUL((float)(word >> 9), 2.f), 1.f), 1.f / 8388608.f), -1.f);
    const float w = -exact_ln(MUL(ADD(1.f, -u), ADD(1.f, u)));
    const bool near = w < 5.f;
    const float x = near ? ADD(w, -2.5f) : ADD(__fsqrt_rn(w), -3.f);
    float p = near ? near_[0] : far_[0];
#pragma unroll
    for (int i = 1; i < 9; i++) p = ADD(MUL(p, x), near ? near_[i] : far_[i]);
    return MUL(MUL(1.41421356237309504880168872421f, p), u);
}

// ---- Rounding of weights: src/compute/rounding.rs

__device__ __forceinline__ bf16 stochastic_bf16(float x, u32 random) {
    const u32 bits = __float_as_uint(x);
    const bf16 up = (bits + random) >> 16, down = bits >> 16;
    if ((up & 0x7f80) == 0x7f80) return x != x ? down | 0x40 : down;
    return up;
}

__device__ __forceinline__ bf16 nearest_f16(float x) {
    bf16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ bf16 stochastic_f16(float x, u32 random) {
    const int exponent = (int)((__float_as_uint(x) >> 23) & 0xff) - 127;
    if (exponent > 15) return nearest_f16(x); // infinities and NaN too
    const float spacing = __uint_as_float((u32)(max(exponent, -14) - 10 + 127) << 23);
    const float scaled = DIV(x, spacing), below = floorf(scaled);
    const bool up = MUL(ADD(scaled, -below), 65536.f) > (float)random;
    const bf16 y = nearest_f16(MUL(ADD(below, up ? 1.f : 0.f), spacing));
    return (y & 0x7fff) == 0x7c00 ? (bf16)((y & 0x8000) | 0x7bff) : y;
}

__device__ __forceinline__ void put(void *w, int kind, i64 i, float x, int stochastic, u32 random) {
    if (kind == 2) ((float *)w)[i] = x;
    else if (kind == 0) ((bf16 *)w)[i] = stochastic ? stochastic_bf16(x, random) : to_bf16(x);
    else ((bf16 *)w)[i] = stochastic ? stochastic_f16(x, random) : nearest_f16(x);
}

__device__ __forceinline__ float value(const void *g, int wide, i64 i) {
    return wide ? ((const float *)g)[i] : f32(((const bf16 *)g)[i]);
}

// A weight (of a kind, as for `weight`) that is a vector, its gradient, its moments and what becomes of it.
struct Vector {
    void *w;
    const float *g;
    float *m, *v;
    int *verdict;
    int n, kind;
    float rate;
    Stream s;
};
struct Vectors { Vector of[8]; };

// A matrix of several that are updated together: its projection's numbers (see `projection`), its projected gradient in two
// summands, its moments, factors and what becomes of it.
struct Matrix {
    bf16 *split;
    const float *r;
    float *m, *v, *factors;
    int *verdict;
    int count, inner, channels, tall;
    Stream numbers;
};
struct Matrices { Matrix of[8]; };

__device__ __forceinline__ void normals(const Stream &s, i64 count, float scale, float *p, bf16 *split, i64 inner) {
    const i64 block = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (block * 4 >= count) return;
    const uint4 b = philox(s, (u32)block);
    const u32 w[4] = {b.x, b.y, b.z, b.w};
    float x[4], high[4], rest[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
        x[e] = MUL(normal(w[e]), scale);
        high[e] = f32(to_bf16(x[e]));
        rest[e] = x[e] - high[e];
    }
    if (split && !p && inner % 4 == 0 && count % 4 == 0 && 2 * count < 0x7fffffff) {
        // All four lie beside each other.
        const u32 i = (u32)block * 4, at = i / (u32)inner * 2 * (u32)inner + i % (u32)inner;
        store4(split + at, high);
        store4(split + at + (u32)inner, rest);
        return;
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const i64 i = block * 4 + e;
        if (i >= count) return;
        if (p) p[i] = x[e];
        if (split) {
            const i64 at = i / inner * 2 * inner + i % inner;
            split[at] = to_bf16(high[e]);
            split[at + inner] = to_bf16(rest[e]);
        }
    }
}

// Moments of 64 channels of r, tall, whose rank is a multiple of 4: half a warp a channel. In the first lanes of each half, the
// sums of squares of r and of m / (sqrt(v) + eps) of the channel whose number comes back, else -1.
__device__ __forceinline__ i64 moments_of_rows(const float *r, int halves, int channels, int rank, float b1, float b2, float eps,
                                               float *m, float *v, float &raw, float &normed_) {
    const int EACH = 4, lane = threadIdx.x & 15;
    const i64 first = (i64)blockIdx.x * 64 + threadIdx.x / 32 * (2 * EACH) + (threadIdx.x >> 4 & 1);
    const i64 width = halves ? 2 * rank : rank;
    float sum[EACH], sum2[EACH];
#pragma unroll
    for (int u = 0; u < EACH; u++) sum[u] = sum2[u] = 0;
    for (int k = 4 * lane; k < rank; k += 64) {
        // All that is read is asked for before any of it is used.
        float x[EACH][4], y[EACH][4], mi[EACH][4], vi[EACH][4];
#pragma unroll
        for (int u = 0; u < EACH; u++) {
            const i64 c = min(first + 2 * u, (i64)channels - 1);
            load<4>(r + c * width + k, x[u]);
            if (halves) load<4>(r + c * width + rank + k, y[u]);
            load<4>(m + c * rank + k, mi[u]);
            load<4>(v + c * rank + k, vi[u]);
        }
#pragma unroll
        for (int u = 0; u < EACH; u++) {
            const i64 c = first + 2 * u;
            if (c >= channels) continue;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float z = halves ? x[u][e] + y[u][e] : x[u][e];
                mi[u][e] = ADD(MUL(b1, mi[u][e]), MUL(1.f - b1, z));
                vi[u][e] = ADD(MUL(b2, vi[u][e]), MUL(1.f - b2, MUL(z, z)));
                const float normed = DIV(mi[u][e], ADD(__fsqrt_rn(vi[u][e]), eps));
                sum[u] += z * z, sum2[u] += normed * normed;
            }
            store<4>(m + c * rank + k, mi[u]);
            store<4>(v + c * rank + k, vi[u]);
        }
    }
    raw = normed_ = 0;
#pragma unroll
    for (int u = 0; u < EACH; u++) {
#pragma unroll
        for (int w = 8; w; w /= 2) {
            sum[u] += __shfl_xor_sync(0xffffffff, sum[u], w);
            sum2[u] += __shfl_xor_sync(0xffffffff, sum2[u], w);
        }
        if (lane == u) raw = sum[u], normed_ = sum2[u];
    }
    const i64 c = first + 2 * lane;
    return lane < EACH && c < channels ? c : -1;
}

// Moments of 32 channels of r, flat, in a block of 256: 8 slices of the rank.
__device__ __forceinline__ i64 moments_of_columns(const float *r, int halves, int channels, int rank, float b1, float b2,
                                                  float eps, float *m, float *v, float &raw, float &normed) {
    __shared__ float sums[2][8][32];
    const int lane = threadIdx.x & 31, slice = threadIdx.x / 32;
    const i64 c = (i64)blockIdx.x * 32 + lane;
    float sum = 0, sum2 = 0;
    if (c < channels) {
#pragma unroll 4
        for (int k = slice; k < rank; k += 8) {
            const i64 i = (i64)k * channels + c;
            const float x = halves ? r[i] + r[i + (i64)rank * channels] : r[i];
            const float mi = ADD(MUL(b1, m[i]), MUL(1.f - b1, x)), vi = ADD(MUL(b2, v[i]), MUL(1.f - b2, MUL(x, x)));
            m[i] = mi, v[i] = vi;
            const float y = DIV(mi, ADD(__fsqrt_rn(vi), eps));
            sum += x * x, sum2 += y * y;
        }
    }
    sums[0][slice][lane] = sum, sums[1][slice][lane] = sum2;
    __syncthreads();
    raw = normed = 0;
    if (slice == 0 && c < channels) {
        for (int k = 0; k < 8; k++) raw += sums[0][k][lane], normed += sums[1][k][lane];
        return c;
    }
    return -1;
}

extern "C" {
// `count` normals times `scale` as f32; and for matrix products in bf16, where `split` is given: each as the sum of two bf16,
// `inner` of the first and then `inner` of the second in turn (inner = count: one after the other).
__global__ void projection(Stream s, i64 count, float scale, float *p, bf16 *split, i64 inner) {
    normals(s, count, scale, p, split, inner);
}

// The same for row blockIdx.y of `all`, whose numbers are no more than 2^30.
__global__ void projections(const Matrices all, float scale) {
    const Matrix &a = all.of[blockIdx.y];
    normals(a.numbers, a.count, scale, nullptr, a.split, a.inner);
}

// y (rows x 2 n, bf16) = sums of the two halves (of n) of each row of x, each as the sum of two bf16, side by side.
__global__ void split_sums(const float *x, int rows, int n, bf16 *y) {
    const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (i64)rows * n) return;
    const i64 i = at / n * 2 * n + at % n;
    const float sum = x[i] + x[i + n];
    const bf16 high = to_bf16(sum);
    y[i] = high;
    y[i + n] = to_bf16(sum - f32(high));
}

// Judges the gradients of `all` by their projections, in two summands. `sums`: one of every block (gridDim.x for each of them).
// One that is bad holds back all of them.
__global__ void __launch_bounds__(256) judge_projections(const Matrices all, int rank, double *sums, float limit, int *halted,
                                                         int *counter) {
    __shared__ double scratch[32];
    const Matrix &a = all.of[blockIdx.y];
    const i64 count = (i64)2 * rank * a.channels;
    float sum = 0;
#pragma unroll 4
    for (i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < count; i += (i64)gridDim.x * blockDim.x * 4) {
        float x[4];
        load<4>(a.r + i, x);
        sum += x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3];
    }
    const double own = block_sum(judged(sum, limit), scratch);
    if (threadIdx.x == 0) sums[blockIdx.y * gridDim.x + blockIdx.x] = own;
    if (!last_of(gridDim.x * gridDim.y, counter)) return;
    bool bad = false;
    for (int k = 0; k < gridDim.y; k++) {
        double square = 0;
        for (int i = threadIdx.x; i < gridDim.x; i += blockDim.x) square += number(sums + k * gridDim.x + i);
        square = block_sum(square, scratch);
        const bool large = !(square <= limit);
        if (threadIdx.x == 0) *all.of[k].verdict = large ? BAD : square == 0 ? ZERO : 0;
        bad |= large;
    }
    if (!bad || threadIdx.x) return;
    *halted = 1;
    // What is not touched is said not to be.
    for (int k = 0; k < gridDim.y; k++)
        if (*all.of[k].verdict == 0) *all.of[k].verdict = ZERO;
}

// squares (rows) = sums of squares of the rows of g, a warp each; with `p` (n): r (rows) = g p, the projection to rank 1. Rows
// are `first` .. of what is judged, 32 a block: four for each warp, so that the end of a block is a small part of it.
#define ROWS(NAME, T, W)                                                                                                     \
    __global__ void __launch_bounds__(256) square_rows##NAME(const T *g, int rows, int n, const float *p, float *r,          \
                                                             float *squares, int first, Judge j) {                           \
        __shared__ double parts[8];                                                                                          \
        double all = 0;                                                                                                      \
        for (int k = 0; k < 4; k++) {                                                                                        \
            const i64 row = (i64)blockIdx.x * 32 + k * 8 + threadIdx.x / 32;                                                 \
            if (row >= rows) break;                                                                                          \
            float sum[2] = {0, 0}, dot = 0, x[W], y[W];                                                                      \
            _Pragma("unroll 4") for (int i = (threadIdx.x & 31) * W; i < n; i += 32 * W) {                                   \
                load<W>(g + row * n + i, x);                                                                                 \
                if (p) load<W>(p + i, y);                                                                                    \
                _Pragma("unroll") for (int e = 0; e < W; e++) {                                                              \
                    sum[e & 1] += x[e] * x[e];                                                                               \
                    if (p) dot += x[e] * y[e];                                                                               \
                }                                                                                                            \
            }                                                                                                                \
            const float square = warp_sum(sum[0] + sum[1]);                                                                  \
            if (p) dot = warp_sum(dot);                                                                                      \
            if ((threadIdx.x & 31) == 0) {                                                                                   \
                squares[row] = square;                                                                                       \
                if (p) r[row] = dot;                                                                                         \
            }                                                                                                                \
            all += judged(square, j.limit);                                                                                  \
        }                                                                                                                    \
        if ((threadIdx.x & 31) == 0) parts[threadIdx.x / 32] = all;                                                          \
        __syncthreads();                                                                                                     \
        all = 0;                                                                                                             \
        if (threadIdx.x == 0)                                                                                                \
            for (int i = 0; i < 8; i++) all += parts[i];                                                                     \
        judge(j, first / 32 + blockIdx.x, all);                                                                              \
    }                                                                                                                        \
    /* By column, of the rows blockIdx.y * span ..: row blockIdx.y of `partial` (two planes with p: squares, then g^T p). */ \
    __global__ void square_columns##NAME(const T *g, int rows, int n, int span, const float *p, float *partial) {            \
        const i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * W;                                                      \
        if (i >= n) return;                                                                                                  \
        float sum[W], dot[W], x[W];                                                                                          \
        _Pragma("unroll") for (int e = 0; e < W; e++) sum[e] = dot[e] = 0;                                                   \
        const int end = min(rows, (int)(blockIdx.y + 1) * span);                                                             \
        _Pragma("unroll 4") for (int row = blockIdx.y * span; row < end; row++) {                                            \
            load<W>(g + (i64)row * n + i, x);                                                                                \
            const float f = p ? p[row] : 0;                                                                                  \
            _Pragma("unroll") for (int e = 0; e < W; e++) sum[e] += x[e] * x[e], dot[e] += x[e] * f;                         \
        }                                                                                                                    \
        store<W>(partial + (i64)blockIdx.y * n + i, sum);                                                                    \
        if (p) store<W>(partial + (i64)(gridDim.y + blockIdx.y) * n + i, dot);                                               \
    }
ROWS(, bf16, 1)
ROWS(_wide, bf16, 8)
ROWS(_f32, float, 1)

// squares (n) = sums over `count` rows of `partial`, in order, and judged; with `r`: r (n) = those of `count` rows more. Blocks
// of 256: 32 columns, 8 slices of the rows.
__global__ void __launch_bounds__(256) sum_columns(const float *partial, int count, int n, float *squares, float *r, Judge j) {
    __shared__ float sums[2][8][32];
    const int lane = threadIdx.x & 31, slice = threadIdx.x / 32;
    const i64 i = (i64)blockIdx.x * 32 + lane;
    float sum = 0, dot = 0;
    if (i < n) {
#pragma unroll 4
        for (int row = slice; row < count; row += 8) sum += partial[(i64)row * n + i];
        if (r)
            for (int row = slice; row < count; row += 8) dot += partial[(i64)(count + row) * n + i];
    }
    sums[0][slice][lane] = sum, sums[1][slice][lane] = dot;
    __syncthreads();
    double all = 0;
    if (slice == 0) {
        sum = dot = 0;
        for (int k = 0; k < 8; k++) sum += sums[0][k][lane], dot += sums[1][k][lane];
        if (i < n) {
            squares[i] = sum;
            if (r) r[i] = dot;
        }
        all = judged(sum, j.limit);
#pragma unroll
        for (int w = 16; w; w /= 2) all += __shfl_xor_sync(0xffffffff, all, w);
    }
    judge(j, blockIdx.x, all);
}

// What the moments' blocks leave for the last of them, which makes the factors' limit of it.
struct Limits {
    const float *squares; // by channel, of the gradient
    double *sums;         // three of every block
    float *last, *factors, *gain;
    int *counter;
    float growth, rate; // the limiter's, 0 for none; the learning rate with its scale
    int by_channel;
};

// In the thread of a channel: sums of squares of its r and of m / (sqrt(v) + eps) make its factor. `part`: what it adds.
__device__ __forceinline__ void channel(const Limits &f, i64 c, float raw, float normed, double (&part)[3]) {
    if (f.by_channel) {
        const double x = sqrt((double)normed) / (sqrt((double)raw) + TINY);
        f.factors[c] = (float)x;
        part[0] += x * x * f.squares[c];
    } else part[0] += raw, part[1] += normed, part[2] += f.squares[c];
}

// In every thread, after all its channels. `last`: norm of the last update, negative before the first. gain = rate over what
// the limiter takes.
__device__ __forceinline__ void limit(const Limits &f, i64 channels, double (&part)[3]) {
    __shared__ double scratch[32];
    const int planes = f.by_channel ? 1 : 3;
    for (int k = 0; k < planes; k++) {
        part[k] = block_sum(part[k], scratch);
        if (threadIdx.x == 0) f.sums[(i64)k * gridDim.x + blockIdx.x] = part[k];
    }
    if (!last_of(gridDim.x, f.counter)) return;
    double all[3];
    for (int k = 0; k < planes; k++) {
        double sum = 0;
#pragma unroll 4
        for (int i = threadIdx.x; i < gridDim.x; i += blockDim.x) sum += number(f.sums + (i64)k * gridDim.x + i);
        all[k] = block_sum(sum, scratch);
    }
    double total = all[0];
    if (!f.by_channel) {
        const double one = sqrt(all[1]) / (sqrt(all[0]) + TINY);
        total = one * one * all[2];
        for (i64 c = threadIdx.x; c < channels; c += blockDim.x) f.factors[c] = (float)one;
    }
    if (threadIdx.x) return;
    const double norm = sqrt(total);
    double shrink = 1;
    if (f.growth > 0) {
        if (*f.last >= 0) {
            shrink = fmax(norm / ((double)*f.last + TINY), (double)f.growth) / (double)f.growth;
        }
        *f.last = (float)(norm / shrink);
    }
    *f.gain = (float)(f.rate / shrink);
}

// Moments after one more projected gradient r, and the factors of it. With `halves` r comes in two summands. Tall: r
// (channels x rank), the halves side by side in a row; a warp a channel.
__global__ void __launch_bounds__(256) moments_tall(const float *r, int halves, int channels, int rank, float b1, float b2,
                                                    float eps, float *m, float *v, Limits f, const int *verdict,
                                                    const int *halted) {
    if (*verdict || *halted) return;
    const i64 c = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    double part[3] = {0, 0, 0};
    if (c < channels) {
        float sum = 0, sum2 = 0;
        for (int k = threadIdx.x & 31; k < rank; k += 32) {
            const float x = halves ? r[c * 2 * rank + k] + r[c * 2 * rank + rank + k] : r[c * rank + k];
            const i64 i = c * rank + k;
            const float mi = ADD(MUL(b1, m[i]), MUL(1.f - b1, x)), vi = ADD(MUL(b2, v[i]), MUL(1.f - b2, MUL(x, x)));
            m[i] = mi, v[i] = vi;
            const float y = DIV(mi, ADD(__fsqrt_rn(vi), eps));
            sum += x * x, sum2 += y * y;
        }
        sum = warp_sum(sum), sum2 = warp_sum(sum2);
        if ((threadIdx.x & 31) == 0) channel(f, c, sum, sum2, part);
    }
    limit(f, channels, part);
}

// The same for ranks in multiples of 4: half a warp a channel, 64 channels a block.
__global__ void __launch_bounds__(256) moments_tall_wide(const float *r, int halves, int channels, int rank, float b1, float b2,
                                                         float eps, float *m, float *v, Limits f, const int *verdict,
                                                         const int *halted) {
    if (*verdict || *halted) return;
    float raw, normed;
    double part[3] = {0, 0, 0};
    const i64 c = moments_of_rows(r, halves, channels, rank, b1, b2, eps, m, v, raw, normed);
    if (c >= 0) channel(f, c, raw, normed, part);
    limit(f, channels, part);
}

// Not tall: r (rank x channels), the halves one below the other. Blocks of 256: 32 channels, 8 slices of the rank.
__global__ void __launch_bounds__(256) moments_flat(const float *r, int halves, int channels, int rank, float b1, float b2,
                                                    float eps, float *m, float *v, Limits f, const int *verdict,
                                                    const int *halted) {
    if (*verdict || *halted) return;
    float raw, normed;
    double part[3] = {0, 0, 0};
    const i64 c = moments_of_columns(r, halves, channels, rank, b1, b2, eps, m, v, raw, normed);
    if (c >= 0) channel(f, c, raw, normed, part);
    limit(f, channels, part);
}

// Moments and factors by channel of matrix blockIdx.y of `all`, of a rank in multiples of 4.
__global__ void __launch_bounds__(256) moments_all(const Matrices all, int rank, float b1, float b2, float eps,
                                                   const int *halted) {
    const Matrix &a = all.of[blockIdx.y];
    if (*a.verdict || *halted || (i64)blockIdx.x * (a.tall ? 64 : 32) >= a.channels) return;
    float raw, normed;
    const i64 c = a.tall ? moments_of_rows(a.r, 1, a.channels, rank, b1, b2, eps, a.m, a.v, raw, normed)
                         : moments_of_columns(a.r, 1, a.channels, rank, b1, b2, eps, a.m, a.v, raw, normed);
    if (c >= 0) a.factors[c] = (float)(sqrt((double)normed) / (sqrt((double)raw) + TINY));
}

// w <- round((w - factor g) keep) for rows first .. of a matrix of n columns, its rows ld apart. Factors by row (1), by
// column (2) or none (0), times gain. With `map`, row i of the matrix has row map[i] of g, or none where that is negative.
__global__ void apply(void *w, int kind, i64 ld, const void *g, int wide, int rows, int n, i64 first, const int *map,
                      const float *factors, int by, const float *gain, float keep, int stochastic, Stream s,
                      const int *verdict, const int *halted) {
    if (*verdict || *halted) return;
    const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (i64)rows * n) return;
    const i64 row = at / n, column = at % n, i = first * n + at;
    const i64 from = map ? map[first + row] : row;
    const float x = from < 0 ? 0.f : value(g, wide, from * n + column);
    const float f = MUL(by == 0 ? 1.f : by == 1 ? factors[first + row] : factors[column], *gain);
    const i64 to = (first + row) * ld + column;
    const u32 random = stochastic && kind != 2 ? bits16(s, i) : 0;
    put(w, kind, to, MUL(ADD(weight(w, kind, to), -MUL(f, x)), keep), stochastic, random);
}

// The same for bf16 weights, eight elements a thread: n, ld and the addresses in multiples of 8 elements.
#define APPLY(NAME, T)                                                                                                       \
    __global__ void __launch_bounds__(256) apply_wide##NAME(                                                                 \
        bf16 *w, i64 ld, const T *g, int rows, int n, i64 first, const int *map, const float *factors, int by,               \
        const float *gain, float keep, int stochastic, Stream s, const int *verdict, const int *halted) {                    \
        if (*verdict || *halted) return;                                                                                     \
        const u32 eighths = n / 8;                                                                                           \
        const u32 total = (u32)rows * eighths, step = gridDim.x * blockDim.x;                                                \
        const float all = *gain;                                                                                             \
        for (u32 at = blockIdx.x * blockDim.x + threadIdx.x; at < total; at += step) {                                       \
            const u32 row = at / eighths, column = (at - row * eighths) * 8;                                                 \
            /* Not the type that C finds common to both: that is unsigned, and -1 none of it. */                             \
            const i64 from = map ? (i64)map[first + row] : (i64)row;                                                         \
            float x[8], old[8], f[8];                                                                                        \
            bf16 *to = w + (first + row) * ld + column;                                                                      \
            if (from < 0) {                                                                                                  \
                _Pragma("unroll") for (int e = 0; e < 8; e++) x[e] = 0;                                                      \
            } else load<8>(g + from * n + column, x);                                                                        \
            load<8>(to, old);                                                                                                \
            if (by == 2) load<8>(factors + column, f);                                                                       \
            else {                                                                                                           \
                const float one = by == 1 ? factors[first + row] : 1.f;                                                      \
                _Pragma("unroll") for (int e = 0; e < 8; e++) f[e] = one;                                                    \
            }                                                                                                                \
            _Pragma("unroll") for (int e = 0; e < 8; e++) old[e] = MUL(ADD(old[e], -MUL(MUL(f[e], all), x[e])), keep);       \
            if (stochastic) {                                                                                                \
                const uint4 b = philox(s, (u32)((first * n + (i64)row * n + column) / 8));                                   \
                const u32 words[4] = {b.x, b.y, b.z, b.w};                                                                   \
                u32 y[4];                                                                                                    \
                _Pragma("unroll") for (int e = 0; e < 4; e++)                                                                \
                    y[e] = stochastic_bf16(old[2 * e], words[e] & 0xffff)                                                    \
                         | (u32)stochastic_bf16(old[2 * e + 1], words[e] >> 16) << 16;                                       \
                *(uint4 *)to = make_uint4(y[0], y[1], y[2], y[3]);                                                           \
            } else store<8>(to, old);                                                                                        \
        }                                                                                                                    \
    }
APPLY(, bf16)
APPLY(_f32, float)

// Adam, whose moments are of the gradient itself: elements first n .. of m and v.
__global__ void adam(void *w, int kind, i64 ld, const void *g, int wide, int rows, int n, i64 first, const int *map, float *m,
                     float *v, float b1, float b2, float eps, float rate, float keep, int stochastic, Stream s,
                     const int *verdict, const int *halted) {
    if (*verdict || *halted) return;
    const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (i64)rows * n) return;
    const i64 row = at / n, column = at % n, i = first * n + at;
    const i64 from = map ? map[first + row] : row;
    const float x = from < 0 ? 0.f : value(g, wide, from * n + column);
    const float mi = ADD(MUL(b1, m[i]), MUL(1.f - b1, x)), vi = ADD(MUL(b2, v[i]), MUL(1.f - b2, MUL(x, x)));
    m[i] = mi, v[i] = vi;
    const float y = DIV(mi, ADD(__fsqrt_rn(vi), eps));
    const i64 to = (first + row) * ld + column;
    const u32 random = stochastic && kind != 2 ? bits16(s, i) : 0;
    put(w, kind, to, MUL(ADD(weight(w, kind, to), -MUL(rate, y)), keep), stochastic, random);
}

// Adam on vectors whose gradients are f32, each judged by itself and applied unless one before it is bad: a block of 1024 each.
__global__ void __launch_bounds__(1024) adam_vectors(const Vectors all, float b1, float b2, float eps, float keep,
                                                     int stochastic, float limit, int *halted, int *counter) {
    __shared__ double scratch[32];
    // Set by the last block alone, after all have looked.
    bool held = *halted, zero = false;
    for (int k = 0; k <= blockIdx.x && !held; k++) {
        const Vector &a = all.of[k];
        double sum = 0;
        for (int i = threadIdx.x; i < a.n; i += blockDim.x) sum += judged(a.g[i] * a.g[i], limit);
        sum = block_sum(sum, scratch);
        held = !(sum <= limit), zero = sum == 0;
        if (k == blockIdx.x && threadIdx.x == 0) *a.verdict = held ? BAD : zero ? ZERO : 0;
        // What is held back is judged none the less.
        if (held && k < blockIdx.x && threadIdx.x == 0) *all.of[blockIdx.x].verdict = 0;
    }
    if (!held && !zero) {
        const Vector &a = all.of[blockIdx.x];
        for (int i = threadIdx.x; i < a.n; i += blockDim.x) {
            const float x = a.g[i];
            const float mi = ADD(MUL(b1, a.m[i]), MUL(1.f - b1, x)), vi = ADD(MUL(b2, a.v[i]), MUL(1.f - b2, MUL(x, x)));
            a.m[i] = mi, a.v[i] = vi;
            const float y = DIV(mi, ADD(__fsqrt_rn(vi), eps));
            const u32 random = stochastic && a.kind != 2 ? bits16(a.s, i) : 0;
            put(a.w, a.kind, i, MUL(ADD(weight(a.w, a.kind, i), -MUL(a.rate, y)), keep), stochastic, random);
        }
    }
    if (!last_of(gridDim.x, counter) || threadIdx.x) return;
    for (int k = 0; k < gridDim.x; k++) {
        int verdict;
        asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(verdict) : "l"(all.of[k].verdict) : "memory");
        if (verdict == BAD) *halted = 1;
    }
}

// Row i of `to` (n wide) = row map[i] of `from`, or zeros.
__global__ void spread(const float *from, const int *map, int rows, int n, float *to) {
    const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (i64)rows * n) return;
    const int row = map[at / n];
    to[at] = row < 0 ? 0.f : from[(i64)row * n + at % n];
}
}
