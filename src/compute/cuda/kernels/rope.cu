// archs: 80
//
// Rotary position embedding (Su et al., arXiv 2104.09864), the half-split layout of Hugging Face: feature i of a head turns
// with feature i + d/2; and before it, where a model has them, the norms of every head of q and k. A warp a head of a row.

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

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int w = 16; w; w /= 2) x += __shfl_xor_sync(0xffffffff, x, w);
    return x;
}

// W features side by side, in one access: the caller knows that the address allows it.
template <int W> __device__ __forceinline__ void load(const bf16 *from, float (&x)[W]) {
    if constexpr (W == 2) {
        const u32 y = *(const u32 *)from;
        x[0] = __uint_as_float(y << 16), x[1] = __uint_as_float(y & 0xffff0000);
    } else x[0] = f32(*from);
}
template <int W> __device__ __forceinline__ void load(const float *from, float (&x)[W]) {
    if constexpr (W == 2) {
        const float2 y = *(const float2 *)from;
        x[0] = y.x, x[1] = y.y;
    } else x[0] = *from;
}
template <int W> __device__ __forceinline__ void store(bf16 *to, const float (&x)[W]) {
    if constexpr (W == 2) {
        u32 y;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(x[1]), "f"(x[0]));
        *(u32 *)to = y;
    } else *to = to_bf16(x[0]);
}

// A lane's features of the first half of a head: W side by side from (lane + 32 i) W on, for each i below TURNS; and as many
// of the other half. Heads have 256 features at most.
#define TURNS (4 / W)
#define FEATURES                                 \
    _Pragma("unroll") for (int i = 0; i < TURNS; i++) \
        if (const int f = (lane + 32 * i) * W; f < half)
#define EACH _Pragma("unroll") for (int e = 0; e < W; e++)

struct Norms {
    const void *q_norm, *k_norm;
    int q_kind, k_kind;
    float eps;
};

template <int W>
__device__ __forceinline__ void turn(const bf16 *x, i64 ld, int rows, int heads, int kv_heads, int d, const float *cosines,
                                     const float *sines, const Norms &norms, bf16 *q, bf16 *kv, bf16 *before, bf16 *kept,
                                     int first) {
    const int all = heads + 2 * kv_heads, lane = threadIdx.x & 31, half = d / 2;
    const i64 item = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (item >= (i64)rows * all) return;
    const int row = item / all, head = item % all;
    x += row * ld + (i64)head * d;
    const bool is_q = head < heads, is_v = head >= heads + kv_heads;
    bf16 *to = is_q ? q + ((i64)row * heads + head) * d : kv + ((i64)row * 2 * kv_heads + head - heads) * d;
    const void *norm = is_q ? norms.q_norm : norms.k_norm;
    const int kind = is_q ? norms.q_kind : norms.k_kind;
    float a[TURNS][W], b[TURNS][W], c[TURNS][W], s[TURNS][W], sum = 0;
    FEATURES {
        load(x + f, a[i]), load(x + f + half, b[i]);
        load(cosines + (i64)row * half + f, c[i]), load(sines + (i64)row * half + f, s[i]);
        EACH sum += a[i][e] * a[i][e] + b[i][e] * b[i][e];
        if (is_v) store(to + f, a[i]), store(to + f + half, b[i]);
        else if (before && row >= first) {
            bf16 *keep = before + ((i64)(row - first) * (heads + kv_heads) + head) * d;
            store(keep + f, a[i]), store(keep + f + half, b[i]);
        }
    }
    if (is_v) return;
    const float r = norm ? 1.f / sqrtf(warp_sum(sum) / d + norms.eps) : 1.f;
    FEATURES {
        float y[W], z[W];
        EACH {
            if (norm) a[i][e] *= r * weight(norm, kind, f + e), b[i][e] *= r * weight(norm, kind, f + e + half);
            y[e] = a[i][e] * c[i][e] - b[i][e] * s[i][e], z[e] = b[i][e] * c[i][e] + a[i][e] * s[i][e];
        }
        store(to + f, y), store(to + f + half, z);
        if (is_q && kept && row >= first) {
            bf16 *keep = kept + ((i64)(row - first) * heads + head) * d;
            store(keep + f, y), store(keep + f + half, z);
        }
    }
}

template <int W>
__device__ __forceinline__ void turn_again(const bf16 *before, int rows, int heads, int kv_heads, int d, const float *cosines,
                                           const float *sines, const void *q_norm, int q_kind, float eps, bf16 *q) {
    const int lane = threadIdx.x & 31, half = d / 2;
    const i64 item = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (item >= (i64)rows * heads) return;
    const int row = item / heads, head = item % heads;
    const bf16 *x = before + ((i64)row * (heads + kv_heads) + head) * d;
    float a[TURNS][W], b[TURNS][W], c[TURNS][W], s[TURNS][W], sum = 0;
    FEATURES {
        load(x + f, a[i]), load(x + f + half, b[i]);
        load(cosines + (i64)row * half + f, c[i]), load(sines + (i64)row * half + f, s[i]);
        EACH sum += a[i][e] * a[i][e] + b[i][e] * b[i][e];
    }
    const float r = 1.f / sqrtf(warp_sum(sum) / d + eps);
    q += ((i64)row * heads + head) * d;
    FEATURES {
        float y[W], z[W];
        EACH {
            a[i][e] *= r * weight(q_norm, q_kind, f + e), b[i][e] *= r * weight(q_norm, q_kind, f + e + half);
            y[e] = a[i][e] * c[i][e] - b[i][e] * s[i][e], z[e] = b[i][e] * c[i][e] + a[i][e] * s[i][e];
        }
        store(q + f, y), store(q + f + half, z);
    }
}

template <int W>
__device__ __forceinline__ void turn_back(const bf16 *dq, const bf16 *dk, const bf16 *dv, int rows, int heads, int kv_heads,
                                          int d, const float *cosines, const float *sines, const Norms &norms,
                                          const bf16 *before, bf16 *out, float *partial) {
    __shared__ float sums[32][33];
    const int part = blockIdx.y, lane = threadIdx.x & 31, warp = threadIdx.x / 32, warps = blockDim.x / 32, half = d / 2;
    const int mine = part == 0 ? heads : kv_heads, members = part == 0 ? 1 : heads / kv_heads;
    const bf16 *from = part == 0 ? dq : part == 1 ? dk : dv;
    const void *norm = part == 0 ? norms.q_norm : part == 1 ? norms.k_norm : nullptr;
    const int kind = part == 0 ? norms.q_kind : norms.k_kind;
    float da[TURNS][W], db[TURNS][W];
#pragma unroll
    for (int i = 0; i < TURNS; i++) EACH da[i][e] = db[i][e] = 0;
    for (i64 item = (i64)blockIdx.x * warps + warp; item < (i64)rows * mine; item += (i64)gridDim.x * warps) {
        const int row = item / mine, head = item % mine;
        const int place = head + (part == 0 ? 0 : part == 1 ? heads : heads + kv_heads);
        float a[TURNS][W], b[TURNS][W], xa[TURNS][W], xb[TURNS][W], squares = 0, sum = 0;
        bf16 *to = out + ((i64)row * (heads + 2 * kv_heads) + place) * d;
        FEATURES {
            const bf16 *x = from + ((i64)row * heads + head * members) * d;
            load(x + f, a[i]), load(x + f + half, b[i]);
            if (norm) {
                const bf16 *old = before + ((i64)row * (heads + kv_heads) + place) * d;
                load(old + f, xa[i]), load(old + f + half, xb[i]);
            }
#pragma unroll 4
            for (int m = 1; m < members; m++) {
                float y[W], z[W];
                load(x + (i64)m * d + f, y), load(x + (i64)m * d + f + half, z);
                EACH a[i][e] += y[e], b[i][e] += z[e];
            }
            if (part < 2) {
                float c[W], s[W];
                load(cosines + (i64)row * half + f, c), load(sines + (i64)row * half + f, s);
                EACH {
                    const float y = a[i][e], z = b[i][e];
                    a[i][e] = y * c[e] + z * s[e], b[i][e] = z * c[e] - y * s[e];
                }
            }
            if (norm) EACH {
                squares += xa[i][e] * xa[i][e] + xb[i][e] * xb[i][e];
                sum += a[i][e] * weight(norm, kind, f + e) * xa[i][e] + b[i][e] * weight(norm, kind, f + e + half) * xb[i][e];
            }
        }
        if (norm) {
            const float r = 1.f / sqrtf(warp_sum(squares) / d + norms.eps), mean = warp_sum(sum) * r * r / d;
            FEATURES EACH {
                da[i][e] += a[i][e] * xa[i][e] * r, db[i][e] += b[i][e] * xb[i][e] * r;
                a[i][e] = r * (a[i][e] * weight(norm, kind, f + e) - xa[i][e] * mean);
                b[i][e] = r * (b[i][e] * weight(norm, kind, f + e + half) - xb[i][e] * mean);
            }
        }
        FEATURES store(to + f, a[i]), store(to + f + half, b[i]);
    }
    if (!norm || !partial) return;
    partial += ((i64)part * gridDim.x + blockIdx.x) * d;
    // The warps' sums, 32 features at a time, in the warps' order.
#pragma unroll
    for (int side = 0; side < 2; side++)
#pragma unroll
        for (int i = 0; i < TURNS; i++) EACH {
                __syncthreads();
                sums[warp][lane] = side ? db[i][e] : da[i][e];
                __syncthreads();
                const int f = (lane + 32 * i) * W + e;
                if (warp == 0 && f < half) {
                    float sum = 0;
                    for (int w = 0; w < warps; w++) sum += sums[w][lane];
                    partial[side * half + f] = sum;
                }
            }
}

// Each for heads of any size, and `_wide` for those of a multiple of four.
extern "C" {
#define KERNELS(NAME, W)                                                                                                     \
    /* From rows of q, k and v side by side (ld apart): turned q (rows x heads d); turned k and v beside it (rows x 2        \
       kv_heads d). Of rows from `first` on, q and k as they were before their norms (heads + kv_heads) into `before`, where \
       given, and turned q into `kept`, where given. cos and sin: rows x d/2. */                                             \
    __global__ void rope_forward##NAME(                                                                                      \
        const bf16 *x, i64 ld, int rows, int heads, int kv_heads, int d, const float *cosines, const float *sines,           \
        const void *q_norm, int q_kind, const void *k_norm, int k_kind, float eps, bf16 *q, bf16 *kv, bf16 *before,          \
        bf16 *kept, int first) {                                                                                             \
        const Norms norms{q_norm, k_norm, q_kind, k_kind, eps};                                                              \
        turn<W>(x, ld, rows, heads, kv_heads, d, cosines, sines, norms, q, kv, before, kept, first);                         \
    }                                                                                                                        \
    /* Turned q of rows that train, again from `before`; cos and sin start with the first of these rows. */                  \
    __global__ void rope_again##NAME(const bf16 *before, int rows, int heads, int kv_heads, int d, const float *cosines,     \
                                     const float *sines, const void *q_norm, int q_kind, float eps, bf16 *q) {               \
        turn_again<W>(before, rows, heads, kv_heads, d, cosines, sines, q_norm, q_kind, eps, q);                             \
    }                                                                                                                        \
    /* Gradients of q, k and v side by side (rows x (heads + 2 kv_heads) d) from those of turned q and, by query head, of    \
       turned k and of v: those of a group are added here. blockIdx.y says which of q, k and v. With norms, `before` is      \
       their input, and row (y gridDim.x + x) of `partial` (d wide, two times gridDim.x rows) gets what the block's heads    \
       add to a norm's gradient. */                                                                                          \
    __global__ void __launch_bounds__(256) rope_backward##NAME(                                                              \
        const bf16 *dq, const bf16 *dk, const bf16 *dv, int rows, int heads, int kv_heads, int d, const float *cosines,      \
        const float *sines, const void *q_norm, int q_kind, const void *k_norm, int k_kind, float eps, const bf16 *before,   \
        bf16 *out, float *partial) {                                                                                         \
        const Norms norms{q_norm, k_norm, q_kind, k_kind, eps};                                                              \
        turn_back<W>(dq, dk, dv, rows, heads, kv_heads, d, cosines, sines, norms, before, out, partial);                     \
    }
KERNELS(, 1)
KERNELS(_wide, 2)
}
