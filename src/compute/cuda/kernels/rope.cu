// archs: 80
//
// Rotary position embedding (Su et al., arXiv 2104.09864), the half-split layout of Hugging Face: feature i of a head turns
// with feature i + d/2 or, where only a part of a head turns, i + half of that part; and before it, where a model has them, the
// norms of every head of q and k. A warp a head of a row.

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

// The first `turn` pairs of a head turn: features f and f + turn. Where that is not all of a head, the features after them stay
// as they are, and pair up as they come.
__device__ __forceinline__ int one(int f, int turn) { return f < turn ? f : f + turn; }
__device__ __forceinline__ int other(int f, int turn, int half) { return f + (f < turn ? turn : half); }
template <int W>
__device__ __forceinline__ void load_angle(const float *cosines, const float *sines, int row, int f, int turn, float (&c)[W], float (&s)[W]) {
    if (f < turn) {
        load(cosines + (i64)row * turn + f, c), load(sines + (i64)row * turn + f, s);
        return;
    }
#pragma unroll
    for (int e = 0; e < W; e++) c[e] = 1, s[e] = 0;
}

// A lane's pairs of a head, W side by side from (lane + 32 i) W on, for each i below TURNS: features p and the next, p2 and the
// next. Heads have 256 features at most.
#define TURNS (4 / W)
#define FEATURES                                 \
    _Pragma("unroll") for (int i = 0; i < TURNS; i++) \
        if (const int f = (lane + 32 * i) * W, p = one(f, turn), p2 = other(f, turn, half); f < half)
#define EACH _Pragma("unroll") for (int e = 0; e < W; e++)

struct Norms {
    const void *q_norm, *k_norm;
    int q_kind, k_kind;
    float eps;
};

template <int W>
__device__ __forceinline__ void turn_forward(const bf16 *x, i64 ld, int gated, int rows, int heads, int kv_heads, int d, int turn,
                                             const float *cosines, const float *sines, const Norms &norms, bf16 *q, bf16 *kv,
                                             bf16 *before, bf16 *kept, int first) {
    const int all = heads + 2 * kv_heads, lane = threadIdx.x & 31, half = d / 2;
    const i64 item = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (item >= (i64)rows * all) return;
    const int row = item / all, head = item % all;
    x += row * ld + (i64)(head + gated * min(head, heads)) * d;
    const bool is_q = head < heads, is_v = head >= heads + kv_heads;
    bf16 *to = is_q ? q + ((i64)row * heads + head) * d : kv + ((i64)row * 2 * kv_heads + head - heads) * d;
    const void *norm = is_q ? norms.q_norm : norms.k_norm;
    const int kind = is_q ? norms.q_kind : norms.k_kind;
    float a[TURNS][W], b[TURNS][W], c[TURNS][W], s[TURNS][W], sum = 0;
    FEATURES {
        load(x + p, a[i]), load(x + p2, b[i]);
        load_angle(cosines, sines, row, f, turn, c[i], s[i]);
        EACH sum += a[i][e] * a[i][e] + b[i][e] * b[i][e];
        if (is_v) store(to + p, a[i]), store(to + p2, b[i]);
        else if (before && row >= first) {
            bf16 *keep = before + ((i64)(row - first) * (heads + kv_heads) + head) * d;
            store(keep + p, a[i]), store(keep + p2, b[i]);
        }
    }
    if (is_v) return;
    const float r = norm ? 1.f / sqrtf(warp_sum(sum) / d + norms.eps) : 1.f;
    FEATURES {
        float y[W], z[W];
        EACH {
            if (norm) a[i][e] *= r * weight(norm, kind, p + e), b[i][e] *= r * weight(norm, kind, p2 + e);
            y[e] = a[i][e] * c[i][e] - b[i][e] * s[i][e], z[e] = b[i][e] * c[i][e] + a[i][e] * s[i][e];
        }
        store(to + p, y), store(to + p2, z);
        if (is_q && kept && row >= first) {
            bf16 *keep = kept + ((i64)(row - first) * heads + head) * d;
            store(keep + p, y), store(keep + p2, z);
        }
    }
}

template <int W>
__device__ __forceinline__ void turn_again(const bf16 *before, int rows, int heads, int kv_heads, int d, int turn,
                                           const float *cosines, const float *sines, const void *q_norm, int q_kind, float eps, bf16 *q) {
    const int lane = threadIdx.x & 31, half = d / 2;
    const i64 item = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (item >= (i64)rows * heads) return;
    const int row = item / heads, head = item % heads;
    const bf16 *x = before + ((i64)row * (heads + kv_heads) + head) * d;
    float a[TURNS][W], b[TURNS][W], c[TURNS][W], s[TURNS][W], sum = 0;
    FEATURES {
        load(x + p, a[i]), load(x + p2, b[i]);
        load_angle(cosines, sines, row, f, turn, c[i], s[i]);
        EACH sum += a[i][e] * a[i][e] + b[i][e] * b[i][e];
    }
    const float r = 1.f / sqrtf(warp_sum(sum) / d + eps);
    q += ((i64)row * heads + head) * d;
    FEATURES {
        float y[W], z[W];
        EACH {
            a[i][e] *= r * weight(q_norm, q_kind, p + e), b[i][e] *= r * weight(q_norm, q_kind, p2 + e);
            y[e] = a[i][e] * c[i][e] - b[i][e] * s[i][e], z[e] = b[i][e] * c[i][e] + a[i][e] * s[i][e];
        }
        store(q + p, y), store(q + p2, z);
    }
}

template <int W>
__device__ __forceinline__ void turn_back(const bf16 *dq, const bf16 *dk, const bf16 *dv, int rows, int heads, int kv_heads,
                                          int d, int turn, const float *cosines, const float *sines, const Norms &norms,
                                          const bf16 *before, bf16 *out, int gated, float *partial) {
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
        bf16 *to = out + ((i64)row * (heads + gated * heads + 2 * kv_heads) + place + gated * min(place, heads)) * d;
        FEATURES {
            const bf16 *x = from + ((i64)row * heads + head * members) * d;
            load(x + p, a[i]), load(x + p2, b[i]);
            if (norm) {
                const bf16 *old = before + ((i64)row * (heads + kv_heads) + place) * d;
                load(old + p, xa[i]), load(old + p2, xb[i]);
            }
#pragma unroll 4
            for (int m = 1; m < members; m++) {
                float y[W], z[W];
                load(x + (i64)m * d + p, y), load(x + (i64)m * d + p2, z);
                EACH a[i][e] += y[e], b[i][e] += z[e];
            }
            if (part < 2) {
                float c[W], s[W];
                load_angle(cosines, sines, row, f, turn, c, s);
                EACH {
                    const float y = a[i][e], z = b[i][e];
                    a[i][e] = y * c[e] + z * s[e], b[i][e] = z * c[e] - y * s[e];
                }
            }
            if (norm) EACH {
                squares += xa[i][e] * xa[i][e] + xb[i][e] * xb[i][e];
                sum += a[i][e] * weight(norm, kind, p + e) * xa[i][e] + b[i][e] * weight(norm, kind, p2 + e) * xb[i][e];
            }
        }
        if (norm) {
            const float r = 1.f / sqrtf(warp_sum(squares) / d + norms.eps), mean = warp_sum(sum) * r * r / d;
            FEATURES EACH {
                da[i][e] += a[i][e] * xa[i][e] * r, db[i][e] += b[i][e] * xb[i][e] * r;
                a[i][e] = r * (a[i][e] * weight(norm, kind, p + e) - xa[i][e] * mean);
                b[i][e] = r * (b[i][e] * weight(norm, kind, p2 + e) - xb[i][e] * mean);
            }
        }
        FEATURES store(to + p, a[i]), store(to + p2, b[i]);
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
                    partial[side ? other(f, turn, half) : one(f, turn)] = sum;
                }
            }
}

// The same three for heads of 16 LANES features, of which a multiple of eight pairs turns: eight pairs a lane, f and the next seven,
// LANES lanes a head. A block of 128 has a row at a time, so that a lane's angles serve all of its heads.
static const int THREADS = 128;
#define EIGHT _Pragma("unroll") for (int e = 0; e < 8; e++)

__device__ __forceinline__ void spread(const uint4 &v, float (&x)[8]) {
    const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) x[2 * i] = __uint_as_float(w[i] << 16), x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000);
}
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
__device__ __forceinline__ uint4 packed(const float (&x)[8]) {
    return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}
__device__ __forceinline__ void load8(const float *from, float (&x)[8]) {
    const float4 y = *(const float4 *)from, z = *(const float4 *)(from + 4);
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w, x[4] = z.x, x[5] = z.y, x[6] = z.z, x[7] = z.w;
}
template <int LANES> __device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
    for (int w = LANES / 2; w; w /= 2) x += __shfl_xor_sync(0xffffffff, x, w);
    return x;
}
// A lane's place in a head, and its angles of a row.
struct Place {
    int f, p, p2;
    float c[8], s[8];
};
template <int LANES> __device__ __forceinline__ Place place_of(int turn) {
    Place at;
    at.f = threadIdx.x % LANES * 8;
    at.p = one(at.f, turn), at.p2 = other(at.f, turn, 8 * LANES);
    EIGHT at.c[e] = 1, at.s[e] = 0;
    return at;
}
__device__ __forceinline__ void take_angles(Place &at, const float *cosines, const float *sines, int row, int turn) {
    if (at.f < turn) load8(cosines + (i64)row * turn + at.f, at.c), load8(sines + (i64)row * turn + at.f, at.s);
}
// A norm's weights at a lane's place.
__device__ __forceinline__ void take_weights(const void *norm, int kind, const Place &at, float (&a)[8], float (&b)[8]) {
    const float from = kind & 4 ? 1.f : 0.f;
    if (!norm) EIGHT a[e] = b[e] = 1;
    else if ((kind & 3) == 0) EIGHT a[e] = from + f32(((const bf16 *)norm)[at.p + e]), b[e] = from + f32(((const bf16 *)norm)[at.p2 + e]);
    else if ((kind & 3) == 2) EIGHT a[e] = from + ((const float *)norm)[at.p + e], b[e] = from + ((const float *)norm)[at.p2 + e];
    else EIGHT a[e] = from + from_f16(((const bf16 *)norm)[at.p + e]), b[e] = from + from_f16(((const bf16 *)norm)[at.p2 + e]);
}
// Eight pairs normed, with weights wa and wb, and turned.
template <int LANES>
__device__ __forceinline__ void norm_and_turn(const Place &at, float (&a)[8], float (&b)[8], bool normed, const float (&wa)[8], const float (&wb)[8],
                                              float eps) {
    float sum = 0;
    EIGHT sum += a[e] * a[e] + b[e] * b[e];
    const float r = normed ? 1.f / sqrtf(lanes_sum<LANES>(sum) / (16 * LANES) + eps) : 1.f;
    EIGHT {
        const float x = a[e] * (r * wa[e]), y = b[e] * (r * wb[e]);
        a[e] = x * at.c[e] - y * at.s[e], b[e] = y * at.c[e] + x * at.s[e];
    }
}

template <int LANES>
__device__ __forceinline__ void forward_by_row(const bf16 *x, i64 ld, int gated, int rows, int heads, int kv_heads, int turn, const float *cosines,
                                               const float *sines, const Norms &norms, bf16 *q, bf16 *kv, bf16 *before, bf16 *kept, int first) {
    static const int d = 16 * LANES, AT_ONCE = THREADS / LANES;
    const int all = heads + 2 * kv_heads, mine = threadIdx.x / LANES, row = blockIdx.x;
    Place at = place_of<LANES>(turn);
    take_angles(at, cosines, sines, row, turn);
    float wa[8], wb[8];
    // First the heads of q, then those of k and v.
#pragma unroll
    for (int part = 0; part < 2; part++) {
        take_weights(part ? norms.k_norm : norms.q_norm, part ? norms.k_kind : norms.q_kind, at, wa, wb);
        const int from = part ? heads : 0, end = part ? all : heads;
#pragma unroll 2
        for (int begin = from; begin < end; begin += AT_ONCE) {
            const int head = min(begin + mine, end - 1);
            const bool real = begin + mine < end, is_v = head >= heads + kv_heads;
            const bf16 *at_head = x + row * ld + (i64)(head + gated * min(head, heads)) * d;
            const uint4 raw_a = *(const uint4 *)(at_head + at.p), raw_b = *(const uint4 *)(at_head + at.p2);
            float a[8], b[8];
            spread(raw_a, a), spread(raw_b, b);
            norm_and_turn<LANES>(at, a, b, (part ? norms.k_norm : norms.q_norm) != nullptr, wa, wb, norms.eps);
            if (!real) continue;
            const uint4 y = is_v ? raw_a : packed(a), z = is_v ? raw_b : packed(b);
            bf16 *to = part ? kv + ((i64)row * 2 * kv_heads + head - heads) * d : q + ((i64)row * heads + head) * d;
            *(uint4 *)(to + at.p) = y, *(uint4 *)(to + at.p2) = z;
            if (row < first || is_v) continue;
            if (before) {
                bf16 *keep = before + ((i64)(row - first) * (heads + kv_heads) + head) * d;
                *(uint4 *)(keep + at.p) = raw_a, *(uint4 *)(keep + at.p2) = raw_b;
            }
            if (!part && kept) {
                bf16 *keep = kept + ((i64)(row - first) * heads + head) * d;
                *(uint4 *)(keep + at.p) = y, *(uint4 *)(keep + at.p2) = z;
            }
        }
    }
}

template <int LANES>
__device__ __forceinline__ void again_by_row(const bf16 *before, int heads, int kv_heads, int turn, const float *cosines, const float *sines,
                                             const void *q_norm, int q_kind, float eps, bf16 *q) {
    static const int d = 16 * LANES, AT_ONCE = THREADS / LANES;
    const int mine = threadIdx.x / LANES, row = blockIdx.x;
    Place at = place_of<LANES>(turn);
    take_angles(at, cosines, sines, row, turn);
    float wa[8], wb[8];
    take_weights(q_norm, q_kind, at, wa, wb);
#pragma unroll 2
    for (int begin = 0; begin < heads; begin += AT_ONCE) {
        const int head = min(begin + mine, heads - 1);
        const bf16 *x = before + ((i64)row * (heads + kv_heads) + head) * d;
        float a[8], b[8];
        spread(*(const uint4 *)(x + at.p), a), spread(*(const uint4 *)(x + at.p2), b);
        norm_and_turn<LANES>(at, a, b, true, wa, wb, eps);
        if (begin + mine >= heads) continue;
        bf16 *to = q + ((i64)row * heads + head) * d;
        *(uint4 *)(to + at.p) = packed(a), *(uint4 *)(to + at.p2) = packed(b);
    }
}

// The block's share of a norm's gradient: its lanes' sums, in their order.
template <int LANES> __device__ __forceinline__ void add_up(const Place &at, const float (&da)[8], const float (&db)[8], float *to) {
    __shared__ float sums[THREADS / LANES][16 * LANES];
    __syncthreads();
    EIGHT sums[threadIdx.x / LANES][at.p + e] = da[e], sums[threadIdx.x / LANES][at.p2 + e] = db[e];
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * LANES; i += THREADS) {
        float sum = 0;
        for (int k = 0; k < THREADS / LANES; k++) sum += sums[k][i];
        to[i] = sum;
    }
}

template <int LANES>
__device__ __forceinline__ void back_by_row(const bf16 *dq, const bf16 *dk, const bf16 *dv, int rows, int heads, int kv_heads, int turn,
                                            const float *cosines, const float *sines, const Norms &norms, const bf16 *before, bf16 *out,
                                            int gated, float *partial) {
    static const int d = 16 * LANES, AT_ONCE = THREADS / LANES;
    const int mine = threadIdx.x / LANES, group = heads / kv_heads;
    Place at = place_of<LANES>(turn);
    float wa[8], wb[8], sums[2][2][8];
#pragma unroll
    for (int part = 0; part < 2; part++) EIGHT sums[part][0][e] = sums[part][1][e] = 0;
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        take_angles(at, cosines, sines, row, turn);
        bf16 *row_out = out + (i64)row * (heads + gated * heads + 2 * kv_heads) * d;
#pragma unroll
        for (int part = 0; part < 2; part++) {
            const void *norm = part ? norms.k_norm : norms.q_norm;
            const int kind = part ? norms.k_kind : norms.q_kind, count = part ? 2 * kv_heads : heads, members = part ? group : 1;
            take_weights(norm, kind, at, wa, wb);
            for (int begin = 0; begin < count; begin += AT_ONCE) {
                const int item = min(begin + mine, count - 1);
                const bool real = begin + mine < count, is_v = part && item >= kv_heads, normed = norm && !is_v;
                const int head = is_v ? item - kv_heads : item;
                const bf16 *from = (part ? is_v ? dv : dk : dq) + ((i64)row * heads + head * members) * d;
                uint4 old_a = make_uint4(0, 0, 0, 0), old_b = old_a;
                if (normed) {
                    const bf16 *old = before + ((i64)row * (heads + kv_heads) + (part ? heads : 0) + head) * d;
                    old_a = *(const uint4 *)(old + at.p), old_b = *(const uint4 *)(old + at.p2);
                }
                float a[8], b[8], x[8], y[8], squares = 0, sum = 0;
                spread(*(const uint4 *)(from + at.p), a), spread(*(const uint4 *)(from + at.p2), b);
#pragma unroll 4
                for (int m = 1; m < members; m++) {
                    spread(*(const uint4 *)(from + (i64)m * d + at.p), x), spread(*(const uint4 *)(from + (i64)m * d + at.p2), y);
                    EIGHT a[e] += x[e], b[e] += y[e];
                }
                if (!is_v) EIGHT {
                    const float g = a[e], h = b[e];
                    a[e] = g * at.c[e] + h * at.s[e], b[e] = h * at.c[e] - g * at.s[e];
                }
                spread(old_a, x), spread(old_b, y);
                EIGHT {
                    squares += x[e] * x[e] + y[e] * y[e];
                    sum += a[e] * wa[e] * x[e] + b[e] * wb[e] * y[e];
                }
                squares = lanes_sum<LANES>(squares), sum = lanes_sum<LANES>(sum);
                if (!real) continue;
                if (normed) {
                    const float r = 1.f / sqrtf(squares / d + norms.eps), mean = sum * r * r / d;
                    EIGHT {
                        sums[part][0][e] += a[e] * x[e] * r, sums[part][1][e] += b[e] * y[e] * r;
                        a[e] = r * (a[e] * wa[e] - x[e] * mean);
                        b[e] = r * (b[e] * wb[e] - y[e] * mean);
                    }
                }
                bf16 *to = row_out + (i64)(part ? heads + gated * heads + item : item + gated * item) * d;
                *(uint4 *)(to + at.p) = packed(a), *(uint4 *)(to + at.p2) = packed(b);
            }
        }
    }
    if (!norms.q_norm || !partial) return;
#pragma unroll
    for (int part = 0; part < 2; part++) add_up<LANES>(at, sums[part][0], sums[part][1], partial + ((i64)part * gridDim.x + blockIdx.x) * d);
}

// Each for heads of any size, and `_wide` for those of a multiple of four of which an even number of pairs turns.
extern "C" {
#define KERNELS(NAME, W)                                                                                                     \
    /* From rows of q, k and v side by side (ld apart; gated: every head of q has its gate behind it): turned q (rows x      \
       heads d); turned k and v beside it (rows x 2 kv_heads d). Of rows from `first` on, q and k as they were before their  \
       norms (heads + kv_heads) into `before`, where given, and turned q into `kept`, where given. cos and sin: rows x turn. \
     */                                                                                                                      \
    __global__ void rope_forward##NAME(                                                                                      \
        const bf16 *x, i64 ld, int gated, int rows, int heads, int kv_heads, int d, int turn, const float *cosines,          \
        const float *sines, const void *q_norm, int q_kind, const void *k_norm, int k_kind, float eps, bf16 *q, bf16 *kv,    \
        bf16 *before, bf16 *kept, int first) {                                                                               \
        const Norms norms{q_norm, k_norm, q_kind, k_kind, eps};                                                              \
        turn_forward<W>(x, ld, gated, rows, heads, kv_heads, d, turn, cosines, sines, norms, q, kv, before, kept, first);    \
    }                                                                                                                        \
    /* Turned q of rows that train, again from `before`; cos and sin start with the first of these rows. */                  \
    __global__ void rope_again##NAME(const bf16 *before, int rows, int heads, int kv_heads, int d, int turn,                 \
                                     const float *cosines, const float *sines, const void *q_norm, int q_kind, float eps,    \
                                     bf16 *q) {                                                                              \
        turn_again<W>(before, rows, heads, kv_heads, d, turn, cosines, sines, q_norm, q_kind, eps, q);                       \
    }                                                                                                                        \
    /* Gradients of q, k and v, laid out as they came, from those of turned q and, by query head, of turned k and of v:      \
       those of a group are added here; gates are left alone. blockIdx.y says which of q, k and v. With norms, `before` is   \
       their input, and row (y gridDim.x + x) of `partial` (d wide, two times gridDim.x rows) gets what the block's heads    \
       add to a norm's gradient. */                                                                                          \
    __global__ void __launch_bounds__(256) rope_backward##NAME(                                                              \
        const bf16 *dq, const bf16 *dk, const bf16 *dv, int rows, int heads, int kv_heads, int d, int turn,                  \
        const float *cosines, const float *sines, const void *q_norm, int q_kind, const void *k_norm, int k_kind, float eps, \
        const bf16 *before, bf16 *out, int gated, float *partial) {                                                          \
        const Norms norms{q_norm, k_norm, q_kind, k_kind, eps};                                                              \
        turn_back<W>(dq, dk, dv, rows, heads, kv_heads, d, turn, cosines, sines, norms, before, out, gated, partial);        \
    }
KERNELS(, 1)
KERNELS(_wide, 2)
#define BY_ROW(D, LANES)                                                                                                     \
    __global__ void __launch_bounds__(THREADS) rope_forward_##D(                                                             \
        const bf16 *x, i64 ld, int gated, int rows, int heads, int kv_heads, int d, int turn, const float *cosines,          \
        const float *sines, const void *q_norm, int q_kind, const void *k_norm, int k_kind, float eps, bf16 *q, bf16 *kv,    \
        bf16 *before, bf16 *kept, int first) {                                                                               \
        const Norms norms{q_norm, k_norm, q_kind, k_kind, eps};                                                              \
        forward_by_row<LANES>(x, ld, gated, rows, heads, kv_heads, turn, cosines, sines, norms, q, kv, before, kept, first); \
    }                                                                                                                        \
    __global__ void __launch_bounds__(THREADS) rope_again_##D(const bf16 *before, int rows, int heads, int kv_heads, int d,  \
                                                              int turn, const float *cosines, const float *sines,            \
                                                              const void *q_norm, int q_kind, float eps, bf16 *q) {          \
        again_by_row<LANES>(before, heads, kv_heads, turn, cosines, sines, q_norm, q_kind, eps, q);                          \
    }                                                                                                                        \
    __global__ void __launch_bounds__(THREADS) rope_backward_##D(                                                            \
        const bf16 *dq, const bf16 *dk, const bf16 *dv, int rows, int heads, int kv_heads, int d, int turn,                  \
        const float *cosines, const float *sines, const void *q_norm, int q_kind, const void *k_norm, int k_kind, float eps, \
        const bf16 *before, bf16 *out, int gated, float *partial) {                                                          \
        const Norms norms{q_norm, k_norm, q_kind, k_kind, eps};                                                              \
        back_by_row<LANES>(dq, dk, dv, rows, heads, kv_heads, turn, cosines, sines, norms, before, out, gated, partial);     \
    }
BY_ROW(64, 4)
BY_ROW(128, 8)
BY_ROW(256, 16)
}
