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

// Half a head's pairs: lane l has features l + 32 i and l + 32 i + d/2. Heads have 256 features at most.
static const int PAIRS = 4;

extern "C" {
// From rows of q, k and v side by side (ld apart): turned q (rows x heads d); turned k and v beside it (rows x 2 kv_heads d).
// Of rows from `first` on, q and k as they were before their norms (heads + kv_heads) into `before`, where given, and turned
// q into `kept`, where given. cos and sin: rows x d/2.
__global__ void rope_forward(const bf16 *x, i64 ld, int rows, int heads, int kv_heads, int d, const float *cosines,
                             const float *sines, const void *q_norm, int q_kind, const void *k_norm, int k_kind, float eps,
                             bf16 *q, bf16 *kv, bf16 *before, bf16 *kept, int first) {
    const int all = heads + 2 * kv_heads, lane = threadIdx.x & 31, half = d / 2;
    const i64 item = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (item >= (i64)rows * all) return;
    const int row = item / all, head = item % all;
    x += row * ld + (i64)head * d;
    const bool is_q = head < heads, is_v = head >= heads + kv_heads;
    bf16 *to = is_q ? q + ((i64)row * heads + head) * d : kv + ((i64)row * 2 * kv_heads + head - heads) * d;
    const void *norm = is_q ? q_norm : k_norm;
    const int kind = is_q ? q_kind : k_kind;
    float a[PAIRS], b[PAIRS], sum = 0;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int f = lane + 32 * i;
        if (f >= half) continue;
        a[i] = f32(x[f]), b[i] = f32(x[f + half]);
        sum += a[i] * a[i] + b[i] * b[i];
        if (is_v) to[f] = x[f], to[f + half] = x[f + half];
        else if (before && row >= first) {
            bf16 *keep = before + ((i64)(row - first) * (heads + kv_heads) + head) * d;
            keep[f] = x[f], keep[f + half] = x[f + half];
        }
    }
    if (is_v) return;
    const float r = norm ? 1.f / sqrtf(warp_sum(sum) / d + eps) : 1.f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int f = lane + 32 * i;
        if (f >= half) continue;
        if (norm) {
            a[i] *= r * weight(norm, kind, f);
            b[i] *= r * weight(norm, kind, f + half);
        }
        const float c = cosines[(i64)row * half + f], s = sines[(i64)row * half + f];
        const bf16 y = to_bf16(a[i] * c - b[i] * s), z = to_bf16(b[i] * c + a[i] * s);
        to[f] = y, to[f + half] = z;
        if (is_q && kept && row >= first) {
            bf16 *keep = kept + ((i64)(row - first) * heads + head) * d;
            keep[f] = y, keep[f + half] = z;
        }
    }
}

// Turned q of rows that train, again from `before`; cos and sin start with the first of these rows.
__global__ void rope_again(const bf16 *before, int rows, int heads, int kv_heads, int d, const float *cosines,
                           const float *sines, const void *q_norm, int q_kind, float eps, bf16 *q) {
    const int lane = threadIdx.x & 31, half = d / 2;
    const i64 item = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (item >= (i64)rows * heads) return;
    const int row = item / heads, head = item % heads;
    const bf16 *x = before + ((i64)row * (heads + kv_heads) + head) * d;
    float a[PAIRS], b[PAIRS], sum = 0;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int f = lane + 32 * i;
        if (f >= half) continue;
        a[i] = f32(x[f]), b[i] = f32(x[f + half]);
        sum += a[i] * a[i] + b[i] * b[i];
    }
    const float r = 1.f / sqrtf(warp_sum(sum) / d + eps);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const int f = lane + 32 * i;
        if (f >= half) continue;
        a[i] *= r * weight(q_norm, q_kind, f);
        b[i] *= r * weight(q_norm, q_kind, f + half);
        const float c = cosines[(i64)row * half + f], s = sines[(i64)row * half + f];
        q[((i64)row * heads + head) * d + f] = to_bf16(a[i] * c - b[i] * s);
        q[((i64)row * heads + head) * d + f + half] = to_bf16(b[i] * c + a[i] * s);
    }
}

// Gradients of q, k and v side by side (rows x (heads + 2 kv_heads) d) from those of turned q and, by query head, of turned
// k and of v: those of a group are added here. blockIdx.y says which of q, k and v. With norms, `before` is their input, and
// row (y gridDim.x + x) of `partial` (d wide, two times gridDim.x rows) gets what the block's heads add to a norm's gradient.
__global__ void rope_backward(const bf16 *dq, const bf16 *dk, const bf16 *dv, int rows, int heads, int kv_heads, int d,
                              const float *cosines, const float *sines, const void *q_norm, int q_kind, const void *k_norm,
                              int k_kind, float eps, const bf16 *before, bf16 *out, float *partial) {
    __shared__ float sums[32][33];
    const int part = blockIdx.y, lane = threadIdx.x & 31, warp = threadIdx.x / 32, warps = blockDim.x / 32, half = d / 2;
    const int mine = part == 0 ? heads : kv_heads, members = part == 0 ? 1 : heads / kv_heads;
    const bf16 *from = part == 0 ? dq : part == 1 ? dk : dv;
    const void *norm = part == 0 ? q_norm : part == 1 ? k_norm : nullptr;
    const int kind = part == 0 ? q_kind : k_kind;
    float da[PAIRS] = {0, 0, 0, 0}, db[PAIRS] = {0, 0, 0, 0};
    for (i64 item = (i64)blockIdx.x * warps + warp; item < (i64)rows * mine; item += (i64)gridDim.x * warps) {
        const int row = item / mine, head = item % mine;
        const int place = head + (part == 0 ? 0 : part == 1 ? heads : heads + kv_heads);
        float a[PAIRS], b[PAIRS], xa[PAIRS], xb[PAIRS], squares = 0, sum = 0;
        bf16 *to = out + ((i64)row * (heads + 2 * kv_heads) + place) * d;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int f = lane + 32 * i;
            a[i] = b[i] = 0;
            if (f >= half) continue;
            for (int m = 0; m < members; m++) {
                const bf16 *x = from + ((i64)row * heads + head * members + m) * d;
                a[i] += f32(x[f]), b[i] += f32(x[f + half]);
            }
            if (part < 2) {
                const float c = cosines[(i64)row * half + f], s = sines[(i64)row * half + f], y = a[i], z = b[i];
                a[i] = y * c + z * s, b[i] = z * c - y * s;
            }
            if (norm) {
                const bf16 *x = before + ((i64)row * (heads + kv_heads) + place) * d;
                xa[i] = f32(x[f]), xb[i] = f32(x[f + half]);
                squares += xa[i] * xa[i] + xb[i] * xb[i];
                sum += a[i] * weight(norm, kind, f) * xa[i] + b[i] * weight(norm, kind, f + half) * xb[i];
            }
        }
        if (norm) {
            const float r = 1.f / sqrtf(warp_sum(squares) / d + eps), mean = warp_sum(sum) * r * r / d;
#pragma unroll
            for (int i = 0; i < PAIRS; i++) {
                const int f = lane + 32 * i;
                if (f >= half) continue;
                da[i] += a[i] * xa[i] * r, db[i] += b[i] * xb[i] * r;
                a[i] = r * (a[i] * weight(norm, kind, f) - xa[i] * mean);
                b[i] = r * (b[i] * weight(norm, kind, f + half) - xb[i] * mean);
            }
        }
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            const int f = lane + 32 * i;
            if (f < half) to[f] = to_bf16(a[i]), to[f + half] = to_bf16(b[i]);
        }
    }
    if (!norm || !partial) return;
    partial += ((i64)part * gridDim.x + blockIdx.x) * d;
    // The warps' sums, 32 features at a time, in the warps' order.
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; i++) {
        __syncthreads();
        sums[warp][lane] = i < PAIRS ? da[i % PAIRS] : db[i % PAIRS];
        __syncthreads();
        const int f = lane + 32 * (i % PAIRS);
        if (warp == 0 && f < half) {
            float sum = 0;
            for (int w = 0; w < warps; w++) sum += sums[w][lane];
            partial[i < PAIRS ? f : f + half] = sum;
        }
    }
}
}
