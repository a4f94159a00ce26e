// archs: 80
//
// Causal attention with grouped heads over packed sequences, forward and backward, without a T x T matrix: tiles of
// queries meet tiles of keys on the tensor cores (mma.sync), with the softmax made online going forward and again from
// the saved log-sums going back (Dao, FlashAttention-2, arXiv 2307.08691). `*_plain` are the same for any head
// dimension, a warp a row, and the reference of the others.
//
// The backward pass is two kernels, one for the queries' gradient and one for the keys' and values', so that no sum
// depends on the order in which blocks run, and so that frozen keys cost no gradient. Keys' and values' gradients come out
// by query head; whoever reads them adds those of a group.
//
// Rows of `q` are T x ldq with head h at column h d, and so on. A tile is six numbers: its first row and the end of its
// rows, the first row and the length of the prefix, the first row and the end of the span. Position p of a span's
// sequence is row prefix + p while p is below the prefix's length, and row start + p - length from there on.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef long long i64;

struct Attention {
    const bf16 *q, *k, *v;
    bf16 *out;
    float *log_sums;     // (heads, log_rows), natural; row r of the batch at r - log_shift
    const bf16 *dout;
    const float *delta;  // as log_sums
    bf16 *dq, *dk, *dv;  // dk and dv by query head
    const int *tiles;
    i64 ldq, ldk, ldv, ldo, lddq, lddk;
    int log_rows, log_shift;
    int q_shift;         // row r of the batch is row r - q_shift of q, dout, dq, dk and dv
    int group, d, window;
    float scale;
};

struct Tile { int first, end, prefix, length, start, stop; };

__device__ __forceinline__ Tile tile_at(const Attention &a, int i) {
    const int *t = a.tiles + 6 * i;
    return Tile{t[0], t[1], t[2], t[3], t[4], t[5]};
}

__device__ __forceinline__ int row_of(const Tile &t, int p) {
    return p < t.length ? t.prefix + p : t.start + p - t.length;
}

__device__ __forceinline__ float f32(bf16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ bf16 to_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
__device__ __forceinline__ float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 16 bytes from global to shared memory, or zeros.
__device__ __forceinline__ void copy16(u32 to, const void *from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
__device__ __forceinline__ void load4(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void load4_turned(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
// c (16 x 8) += a (16 x 16) b (16 x 8)
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

static const float LOG2E = 1.4426950408889634f;
#define INFINITY __int_as_float(0x7f800000)
static const int THREADS = 128;
extern __shared__ __align__(128) unsigned char shared_memory[];

// Where 16-byte chunk c of row r lies in a tile of rows of D elements: chunks are swapped so that eight rows of one
// column fall on different banks.
template <int D> __device__ __forceinline__ u32 at(u32 base, int r, int c) {
    return base + r * (2 * D) + ((c ^ (r & 7)) << 4);
}

// Starts the copy of ROWS rows into shared memory; row(i) is the row to take, negative for zeros.
template <int D, int ROWS, typename F>
__device__ __forceinline__ void fetch(u32 to, const bf16 *from, i64 ld, int d, F row) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * (D / 8); i += THREADS) {
        int r = i / (D / 8), c = i % (D / 8);
        int g = row(r);
        bool real = g >= 0 && c * 8 < d;
        copy16(at<D>(to, r, c), real ? from + (i64)g * ld + c * 8 : from, real);
    }
}

// Fragments: of A from rows of k; of B from rows of n along k (B as k x n, column-major); of B from rows of k along n.
template <int D> __device__ __forceinline__ void a_fragment(u32 (&r)[4], u32 base, int row, int k, int lane) {
    load4(r, at<D>(base, row + (lane & 15), 2 * k + (lane >> 4)));
}
template <int D> __device__ __forceinline__ void b_fragments(u32 (&r)[4], u32 base, int n, int k, int lane) {
    load4(r, at<D>(base, n + (lane & 7) + ((lane >> 4) << 3), 2 * k + ((lane >> 3) & 1)));
}
template <int D> __device__ __forceinline__ void b_fragments_turned(u32 (&r)[4], u32 base, int k, int n8, int lane) {
    load4_turned(r, at<D>(base, k + (lane & 15), n8 + (lane >> 4)));
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// MT x 64 queries of one head in a block; every warp has 16 of each 64. Keys and values in tiles of 64, two in flight.
template <int D, int MT> __device__ __forceinline__ void forward(const Attention &a) {
    const int BM = 64 * MT, BN = 64;
    const Tile t = tile_at(a, blockIdx.y);
    const int head = blockIdx.x, kv_head = head / a.group;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 sq = (u32)__cvta_generic_to_shared(shared_memory), sk = sq + BM * D * 2, sv = sk + 2 * BN * D * 2;
    const int rows = t.end - t.first, position = t.length + t.first - t.start, last = position + rows - 1;
    const int from = a.window ? max(0, position + 1 - a.window) : 0;
    const bf16 *q = a.q + (i64)head * a.d, *k = a.k + (i64)kv_head * a.d, *v = a.v + (i64)kv_head * a.d;
    auto keys = [&](int j, int stage) {
        auto row = [&](int r) { int p = j * BN + r; return p > last ? -1 : row_of(t, p); };
        fetch<D, BN>(sk + stage * BN * D * 2, k, a.ldk, a.d, row);
        fetch<D, BN>(sv + stage * BN * D * 2, v, a.ldv, a.d, row);
    };
    const int j0 = from / BN, j1 = last / BN + 1;
    fetch<D, BM>(sq, q, a.ldq, a.d, [&](int r) { return r < rows ? t.first + r - a.q_shift : -1; });
    keys(j0, 0);
    copies_end();

    float o[MT][D / 8][4], m[MT][2], l[MT][2];
#pragma unroll
    for (int i = 0; i < MT; i++) {
        m[i][0] = m[i][1] = -INFINITY;
        l[i][0] = l[i][1] = 0;
#pragma unroll
        for (int n = 0; n < D / 8; n++) o[i][n][0] = o[i][n][1] = o[i][n][2] = o[i][n][3] = 0;
    }
    const float c = a.scale * LOG2E;
    for (int j = j0; j < j1; j++) {
        const int stage = (j - j0) & 1;
        if (j + 1 < j1) keys(j + 1, stage ^ 1);
        copies_end();
        copies_wait<1>();
        __syncthreads();
        const u32 kt = sk + stage * BN * D * 2, vt = sv + stage * BN * D * 2;
        float s[MT][BN / 8][4];
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int n = 0; n < BN / 8; n++) s[i][n][0] = s[i][n][1] = s[i][n][2] = s[i][n][3] = 0;
#pragma unroll
        for (int x = 0; x < D / 16; x++) {
            u32 qa[MT][4];
#pragma unroll
            for (int i = 0; i < MT; i++) a_fragment<D>(qa[i], sq, i * 64 + warp * 16, x, lane);
#pragma unroll
            for (int n = 0; n < BN / 16; n++) {
                u32 b[4];
                b_fragments<D>(b, kt, n * 16, x, lane);
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    mma(s[i][2 * n], qa[i], b[0], b[1]);
                    mma(s[i][2 * n + 1], qa[i], b[2], b[3]);
                }
            }
        }
        if (j * BN + BN - 1 > position || (a.window && j * BN <= last - a.window)) {
#pragma unroll
            for (int i = 0; i < MT; i++)
#pragma unroll
                for (int n = 0; n < BN / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int p = j * BN + n * 8 + 2 * (lane & 3) + (e & 1);
                        int at_row = position + i * 64 + warp * 16 + (lane >> 2) + 8 * (e >> 1);
                        if (p > at_row || (a.window && p <= at_row - a.window)) s[i][n][e] = -INFINITY;
                    }
        }
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float top = m[i][half];
#pragma unroll
                for (int n = 0; n < BN / 8; n++) top = fmaxf(top, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
                top = quad_max(top);
                // A row that has seen no key yet must not make NaN of minus infinity less itself.
                const float base = top == -INFINITY ? 0.f : top * c;
                const float shrink = exp2_(m[i][half] * c - base);
                m[i][half] = top;
                float sum = 0;
#pragma unroll
                for (int n = 0; n < BN / 8; n++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        s[i][n][e] = exp2_(s[i][n][e] * c - base);
                        sum += s[i][n][e];
                    }
                l[i][half] = l[i][half] * shrink + sum;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    o[i][n][2 * half] *= shrink;
                    o[i][n][2 * half + 1] *= shrink;
                }
            }
#pragma unroll
        for (int x = 0; x < BN / 16; x++) {
            u32 pa[MT][4];
#pragma unroll
            for (int i = 0; i < MT; i++) {
                pa[i][0] = pack(s[i][2 * x][0], s[i][2 * x][1]);
                pa[i][1] = pack(s[i][2 * x][2], s[i][2 * x][3]);
                pa[i][2] = pack(s[i][2 * x + 1][0], s[i][2 * x + 1][1]);
                pa[i][3] = pack(s[i][2 * x + 1][2], s[i][2 * x + 1][3]);
            }
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                u32 b[4];
                b_fragments_turned<D>(b, vt, x * 16, 2 * n, lane);
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    mma(o[i][2 * n], pa[i], b[0], b[1]);
                    mma(o[i][2 * n + 1], pa[i], b[2], b[3]);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float sum = quad_sum(l[i][half]);
            const int r = t.first + i * 64 + warp * 16 + (lane >> 2) + 8 * half;
            if (r >= t.end) continue;
            const float inverse = 1.f / sum;
            bf16 *out = a.out + (i64)(r - a.q_shift) * a.ldo + (i64)head * a.d;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                int column = n * 8 + 2 * (lane & 3);
                if (column < a.d)
                    *(u32 *)(out + column) = pack(o[i][n][2 * half] * inverse, o[i][n][2 * half + 1] * inverse);
            }
            if ((lane & 3) == 0 && r >= a.log_shift)
                a.log_sums[(i64)head * a.log_rows + r - a.log_shift] = m[i][half] * a.scale + logf(sum);
        }
}

// dq of 64 queries of one head. dS = P * (dO V^T - delta) * scale, dQ = dS K.
template <int D> __device__ __forceinline__ void backward_q(const Attention &a) {
    const int BM = 64, BN = 64;
    const Tile t = tile_at(a, blockIdx.y);
    const int head = blockIdx.x, kv_head = head / a.group;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 sq = (u32)__cvta_generic_to_shared(shared_memory), so = sq + BM * D * 2, sk = so + BM * D * 2,
              sv = sk + 2 * BN * D * 2;
    const int rows = t.end - t.first, position = t.length + t.first - t.start, last = position + rows - 1;
    const int from = a.window ? max(0, position + 1 - a.window) : 0;
    const bf16 *k = a.k + (i64)kv_head * a.d, *v = a.v + (i64)kv_head * a.d;
    auto keys = [&](int j, int stage) {
        auto row = [&](int r) { int p = j * BN + r; return p > last ? -1 : row_of(t, p); };
        fetch<D, BN>(sk + stage * BN * D * 2, k, a.ldk, a.d, row);
        fetch<D, BN>(sv + stage * BN * D * 2, v, a.ldv, a.d, row);
    };
    const int j0 = from / BN, j1 = last / BN + 1;
    auto own = [&](int r) { return r < rows ? t.first + r - a.q_shift : -1; };
    fetch<D, BM>(sq, a.q + (i64)head * a.d, a.ldq, a.d, own);
    fetch<D, BM>(so, a.dout + (i64)head * a.d, a.ldo, a.d, own);
    keys(j0, 0);
    copies_end();
    float log_sum[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int r = t.first + warp * 16 + (lane >> 2) + 8 * half;
        i64 i = (i64)head * a.log_rows + r - a.log_shift;
        log_sum[half] = r < t.end ? a.log_sums[i] * LOG2E : 0;
        delta[half] = r < t.end ? a.delta[i] : 0;
    }
    float dq[D / 8][4];
#pragma unroll
    for (int n = 0; n < D / 8; n++) dq[n][0] = dq[n][1] = dq[n][2] = dq[n][3] = 0;
    const float c = a.scale * LOG2E;
    for (int j = j0; j < j1; j++) {
        const int stage = (j - j0) & 1;
        if (j + 1 < j1) keys(j + 1, stage ^ 1);
        copies_end();
        copies_wait<1>();
        __syncthreads();
        const u32 kt = sk + stage * BN * D * 2, vt = sv + stage * BN * D * 2;
        float s[BN / 8][4], dp[BN / 8][4];
#pragma unroll
        for (int n = 0; n < BN / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] = dp[n][e] = 0;
#pragma unroll
        for (int x = 0; x < D / 16; x++) {
            u32 qa[4], oa[4];
            a_fragment<D>(qa, sq, warp * 16, x, lane);
            a_fragment<D>(oa, so, warp * 16, x, lane);
#pragma unroll
            for (int n = 0; n < BN / 16; n++) {
                u32 b[4];
                b_fragments<D>(b, kt, n * 16, x, lane);
                mma(s[2 * n], qa, b[0], b[1]);
                mma(s[2 * n + 1], qa, b[2], b[3]);
                b_fragments<D>(b, vt, n * 16, x, lane);
                mma(dp[2 * n], oa, b[0], b[1]);
                mma(dp[2 * n + 1], oa, b[2], b[3]);
            }
        }
        const bool masked = j * BN + BN - 1 > position || (a.window && j * BN <= last - a.window);
#pragma unroll
        for (int n = 0; n < BN / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float p = exp2_(s[n][e] * c - log_sum[e >> 1]);
                if (masked) {
                    int key = j * BN + n * 8 + 2 * (lane & 3) + (e & 1);
                    int at_row = position + warp * 16 + (lane >> 2) + 8 * (e >> 1);
                    if (key > at_row || (a.window && key <= at_row - a.window)) p = 0;
                }
                s[n][e] = p * (dp[n][e] - delta[e >> 1]) * a.scale;
            }
#pragma unroll
        for (int x = 0; x < BN / 16; x++) {
            u32 da[4] = {pack(s[2 * x][0], s[2 * x][1]), pack(s[2 * x][2], s[2 * x][3]),
                         pack(s[2 * x + 1][0], s[2 * x + 1][1]), pack(s[2 * x + 1][2], s[2 * x + 1][3])};
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                u32 b[4];
                b_fragments_turned<D>(b, kt, x * 16, 2 * n, lane);
                mma(dq[2 * n], da, b[0], b[1]);
                mma(dq[2 * n + 1], da, b[2], b[3]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = t.first + warp * 16 + (lane >> 2) + 8 * half;
        if (r >= t.end) continue;
        bf16 *out = a.dq + (i64)(r - a.q_shift) * a.lddq + (i64)head * a.d;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            int column = n * 8 + 2 * (lane & 3);
            if (column < a.d) *(u32 *)(out + column) = pack(dq[n][2 * half], dq[n][2 * half + 1]);
        }
    }
}

// dk and dv of 64 keys from one query head: columns OUT z .. of them, where registers do not hold all. Everything is
// turned (keys are the rows), so that P and dS stay in registers as the left operand.
template <int D, int OUT, int BM> __device__ __forceinline__ void backward_kv(const Attention &a) {
    const int BN = 64;
    const Tile t = tile_at(a, blockIdx.y);
    const int head = blockIdx.x, kv_head = head / a.group, column0 = blockIdx.z * OUT;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 sk = (u32)__cvta_generic_to_shared(shared_memory), sv = sk + BN * D * 2, sq = sv + BN * D * 2,
              so = sq + 2 * BM * D * 2;
    float *slog = (float *)(shared_memory + (2 * BN + 4 * BM) * D * 2), *sdelta = slog + 2 * BM;
    const int keys = t.end - t.first;
    const int stop = a.window ? min(t.stop, t.end - 1 + a.window) : t.stop;
    const int blocks = (stop - t.first + BM - 1) / BM;
    auto key = [&](int r) { return r < keys ? t.first + r : -1; };
    fetch<D, BN>(sk, a.k + (i64)kv_head * a.d, a.ldk, a.d, key);
    fetch<D, BN>(sv, a.v + (i64)kv_head * a.d, a.ldv, a.d, key);
    auto queries = [&](int j, int stage) {
        const int first = t.first + j * BM;
        auto row = [&](int r) { return first + r < stop ? first + r - a.q_shift : -1; };
        fetch<D, BM>(sq + stage * BM * D * 2, a.q + (i64)head * a.d, a.ldq, a.d, row);
        fetch<D, BM>(so + stage * BM * D * 2, a.dout + (i64)head * a.d, a.ldo, a.d, row);
        if (threadIdx.x < BM) {
            int r = first + threadIdx.x;
            i64 i = (i64)head * a.log_rows + r - a.log_shift;
            slog[stage * BM + threadIdx.x] = r < stop ? a.log_sums[i] * LOG2E : 0;
            sdelta[stage * BM + threadIdx.x] = r < stop ? a.delta[i] : 0;
        }
    };
    queries(0, 0);
    copies_end();
    float dk[OUT / 8][4], dv[OUT / 8][4];
#pragma unroll
    for (int n = 0; n < OUT / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) dk[n][e] = dv[n][e] = 0;
    const float c = a.scale * LOG2E;
    for (int j = 0; j < blocks; j++) {
        const int stage = j & 1;
        if (j + 1 < blocks) queries(j + 1, stage ^ 1);
        copies_end();
        copies_wait<1>();
        __syncthreads();
        const u32 qt = sq + stage * BM * D * 2, ot = so + stage * BM * D * 2;
        float s[BM / 8][4], dp[BM / 8][4];
#pragma unroll
        for (int n = 0; n < BM / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] = dp[n][e] = 0;
#pragma unroll
        for (int x = 0; x < D / 16; x++) {
            u32 ka[4], va[4];
            a_fragment<D>(ka, sk, warp * 16, x, lane);
            a_fragment<D>(va, sv, warp * 16, x, lane);
#pragma unroll
            for (int n = 0; n < BM / 16; n++) {
                u32 b[4];
                b_fragments<D>(b, qt, n * 16, x, lane);
                mma(s[2 * n], ka, b[0], b[1]);
                mma(s[2 * n + 1], ka, b[2], b[3]);
                b_fragments<D>(b, ot, n * 16, x, lane);
                mma(dp[2 * n], va, b[0], b[1]);
                mma(dp[2 * n + 1], va, b[2], b[3]);
            }
        }
        const int first = t.first + j * BM;
        const bool masked = first < t.first + BN || first + BM > stop || a.window;
#pragma unroll
        for (int n = 0; n < BM / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int column = n * 8 + 2 * (lane & 3) + (e & 1);
                float p = exp2_(s[n][e] * c - slog[stage * BM + column]);
                if (masked) {
                    const int query = first + column, own = t.first + warp * 16 + (lane >> 2) + 8 * (e >> 1);
                    if (own > query || query >= stop || (a.window && own <= query - a.window)) p = 0;
                }
                s[n][e] = p;
                dp[n][e] = p * (dp[n][e] - sdelta[stage * BM + column]) * a.scale;
            }
#pragma unroll
        for (int x = 0; x < BM / 16; x++) {
            u32 pa[4] = {pack(s[2 * x][0], s[2 * x][1]), pack(s[2 * x][2], s[2 * x][3]),
                         pack(s[2 * x + 1][0], s[2 * x + 1][1]), pack(s[2 * x + 1][2], s[2 * x + 1][3])};
            u32 da[4] = {pack(dp[2 * x][0], dp[2 * x][1]), pack(dp[2 * x][2], dp[2 * x][3]),
                         pack(dp[2 * x + 1][0], dp[2 * x + 1][1]), pack(dp[2 * x + 1][2], dp[2 * x + 1][3])};
#pragma unroll
            for (int n = 0; n < OUT / 16; n++) {
                u32 b[4];
                b_fragments_turned<D>(b, ot, x * 16, column0 / 8 + 2 * n, lane);
                mma(dv[2 * n], pa, b[0], b[1]);
                mma(dv[2 * n + 1], pa, b[2], b[3]);
                b_fragments_turned<D>(b, qt, x * 16, column0 / 8 + 2 * n, lane);
                mma(dk[2 * n], da, b[0], b[1]);
                mma(dk[2 * n + 1], da, b[2], b[3]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = t.first + warp * 16 + (lane >> 2) + 8 * half;
        if (r >= t.end) continue;
        const i64 to = (i64)(r - a.q_shift) * a.lddk + (i64)head * a.d;
#pragma unroll
        for (int n = 0; n < OUT / 8; n++) {
            int column = column0 + n * 8 + 2 * (lane & 3);
            if (column >= a.d) continue;
            *(u32 *)(a.dk + to + column) = pack(dk[n][2 * half], dk[n][2 * half + 1]);
            *(u32 *)(a.dv + to + column) = pack(dv[n][2 * half], dv[n][2 * half + 1]);
        }
    }
}

extern "C" {
__global__ void __launch_bounds__(THREADS) attention_forward_64(Attention a) { forward<64, 2>(a); }
__global__ void __launch_bounds__(THREADS) attention_forward_128(Attention a) { forward<128, 2>(a); }
__global__ void __launch_bounds__(THREADS) attention_forward_256(Attention a) { forward<256, 1>(a); }
__global__ void __launch_bounds__(THREADS) attention_backward_q_64(Attention a) { backward_q<64>(a); }
__global__ void __launch_bounds__(THREADS) attention_backward_q_128(Attention a) { backward_q<128>(a); }
__global__ void __launch_bounds__(THREADS) attention_backward_q_256(Attention a) { backward_q<256>(a); }
__global__ void __launch_bounds__(THREADS) attention_backward_kv_64(Attention a) { backward_kv<64, 64, 64>(a); }
__global__ void __launch_bounds__(THREADS) attention_backward_kv_128(Attention a) { backward_kv<128, 128, 64>(a); }
__global__ void __launch_bounds__(THREADS) attention_backward_kv_256(Attention a) { backward_kv<256, 128, 32>(a); }

// delta (heads, rows) = sums over d of dout * out, a warp each.
__global__ void attention_delta(const bf16 *dout, const bf16 *out, i64 ld, int rows, int heads, int d, float *delta) {
    const i64 item = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (item >= (i64)rows * heads) return;
    const int row = item / heads, head = item % heads, lane = threadIdx.x & 31;
    const i64 from = (i64)row * ld + (i64)head * d;
    float sum = 0;
    for (int i = lane; i < d; i += 32) sum += f32(dout[from + i]) * f32(out[from + i]);
#pragma unroll
    for (int w = 16; w; w /= 2) sum += __shfl_xor_sync(0xffffffff, sum, w);
    if (lane == 0) delta[(i64)head * rows + row] = sum;
}
}

// Any d up to 256: every lane holds d / 32 columns.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int w = 16; w; w /= 2) x += __shfl_xor_sync(0xffffffff, x, w);
    return x;
}
struct Columns {
    float x[8];
    __device__ __forceinline__ void zero() {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = 0;
    }
    __device__ __forceinline__ void load(const bf16 *from, int d, int lane) {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = lane + 32 * i < d ? f32(from[lane + 32 * i]) : 0;
    }
    __device__ __forceinline__ void store(bf16 *to, int d, int lane) const {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (lane + 32 * i < d) to[lane + 32 * i] = to_bf16(x[i]);
    }
    __device__ __forceinline__ float dot(const Columns &y) const {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) sum += x[i] * y.x[i];
        return warp_sum(sum);
    }
    __device__ __forceinline__ void add(float f, const Columns &y) {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] += f * y.x[i];
    }
    __device__ __forceinline__ void times(float f) {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] *= f;
    }
};

extern "C" {
__global__ void __launch_bounds__(THREADS) attention_forward_plain(Attention a) {
    const Tile t = tile_at(a, blockIdx.y);
    const int head = blockIdx.x, lane = threadIdx.x & 31;
    const i64 kv = (i64)(head / a.group) * a.d;
    for (int r = t.first + threadIdx.x / 32; r < t.end; r += THREADS / 32) {
        Columns q, o, x;
        q.load(a.q + (i64)(r - a.q_shift) * a.ldq + (i64)head * a.d, a.d, lane);
        o.zero();
        const int position = t.length + r - t.start;
        float m = -INFINITY, l = 0;
        for (int p = a.window ? max(0, position + 1 - a.window) : 0; p <= position; p++) {
            const i64 row = row_of(t, p);
            x.load(a.k + row * a.ldk + kv, a.d, lane);
            const float s = q.dot(x) * a.scale, top = fmaxf(m, s), shrink = expf(m - top), e = expf(s - top);
            x.load(a.v + row * a.ldv + kv, a.d, lane);
            o.times(shrink);
            o.add(e, x);
            l = l * shrink + e;
            m = top;
        }
        o.times(1.f / l);
        o.store(a.out + (i64)(r - a.q_shift) * a.ldo + (i64)head * a.d, a.d, lane);
        if (lane == 0 && r >= a.log_shift) a.log_sums[(i64)head * a.log_rows + r - a.log_shift] = m + logf(l);
    }
}

__global__ void __launch_bounds__(THREADS) attention_backward_q_plain(Attention a) {
    const Tile t = tile_at(a, blockIdx.y);
    const int head = blockIdx.x, lane = threadIdx.x & 31;
    const i64 kv = (i64)(head / a.group) * a.d;
    for (int r = t.first + threadIdx.x / 32; r < t.end; r += THREADS / 32) {
        Columns q, o, dq, k, v;
        q.load(a.q + (i64)(r - a.q_shift) * a.ldq + (i64)head * a.d, a.d, lane);
        o.load(a.dout + (i64)(r - a.q_shift) * a.ldo + (i64)head * a.d, a.d, lane);
        dq.zero();
        const i64 at_row = (i64)head * a.log_rows + r - a.log_shift;
        const float log_sum = a.log_sums[at_row], delta = a.delta[at_row];
        const int position = t.length + r - t.start;
        for (int p = a.window ? max(0, position + 1 - a.window) : 0; p <= position; p++) {
            const i64 row = row_of(t, p);
            k.load(a.k + row * a.ldk + kv, a.d, lane);
            v.load(a.v + row * a.ldv + kv, a.d, lane);
            const float pr = expf(q.dot(k) * a.scale - log_sum);
            dq.add(pr * (o.dot(v) - delta) * a.scale, k);
        }
        dq.store(a.dq + (i64)(r - a.q_shift) * a.lddq + (i64)head * a.d, a.d, lane);
    }
}

__global__ void __launch_bounds__(THREADS) attention_backward_kv_plain(Attention a) {
    const Tile t = tile_at(a, blockIdx.y);
    const int head = blockIdx.x, lane = threadIdx.x & 31;
    const i64 kv = (i64)(head / a.group) * a.d;
    for (int r = t.first + threadIdx.x / 32; r < t.end; r += THREADS / 32) {
        Columns k, v, dk, dv, q, o;
        k.load(a.k + (i64)r * a.ldk + kv, a.d, lane);
        v.load(a.v + (i64)r * a.ldv + kv, a.d, lane);
        dk.zero();
        dv.zero();
        const int stop = a.window ? min(t.stop, r + a.window) : t.stop;
        for (int query = r; query < stop; query++) {
            q.load(a.q + (i64)(query - a.q_shift) * a.ldq + (i64)head * a.d, a.d, lane);
            o.load(a.dout + (i64)(query - a.q_shift) * a.ldo + (i64)head * a.d, a.d, lane);
            const i64 at_row = (i64)head * a.log_rows + query - a.log_shift;
            const float p = expf(q.dot(k) * a.scale - a.log_sums[at_row]);
            dv.add(p, o);
            dk.add(p * (o.dot(v) - a.delta[at_row]) * a.scale, q);
        }
        const i64 to = (i64)(r - a.q_shift) * a.lddk + (i64)head * a.d;
        dk.store(a.dk + to, a.d, lane);
        dv.store(a.dv + to, a.d, lane);
    }
}
}
