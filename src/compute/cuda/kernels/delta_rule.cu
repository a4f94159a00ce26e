// archs: 80
//
// The gated delta rule in chunks of 64 tokens (Yang et al., arXiv 2412.06464; the equations are in cpu/delta_rule.rs), for
// heads of up to 128 columns, which are padded to 128 with zeros. Products are on the tensor cores with bf16 operands and f32
// sums. q, k and v are bf16 as they are: q and k are not divided by their length but their products are, row by row and column
// by column (`lengths`). Every other operand of the forward pass (T, P, S, N and what N is made of) is the sum of two bf16, so
// that nothing there is less exact than in f32 but for 2^-17: rounding them once is what cost most of the accuracy of gradients
// below. On the way back they are bf16. With S the state before a chunk:
//
//     T = (I + A)^-1,  P = lower part of Q K^T * D                                  `delta_chunks`, all chunks at once
//     N = T (diag(beta) (V - diag(e^G) K S)),  O = diag(e^G) Q S + P N              `delta_forward`, chunk by chunk
//     S+ = e^(G_last) S + K^T diag(r) N
//     dN = P^T dO + diag(r) K dS+,  X = T^T dN,  Y = -diag(beta e^G) X               `delta_states`, chunk by chunk, from the end
//     dS = e^(G_last) dS+ + Q^T diag(e^G) dO + K^T Y
//     everything else                                                               `delta_backward`, all chunks at once
//
// A block of the kernels that go chunk by chunk has 64 columns of one head's state in registers. A sequence is five numbers:
// its first row and the end of its rows, its first chunk, the context whose last state it begins with and the one whose
// last state it makes, both -1 for none. A chunk is two: its first row and the end of its rows.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef long long i64;

static const int D = 128;  // columns of a head
static const int C = 64;   // tokens of a chunk

struct Delta {
    const bf16 *x;            // rows of q heads, k heads and v heads
    const float *lengths;     // (2 k_heads, rows): what q and k are to be multiplied with: 1 by their length, q by sqrt(k_dim) too
    float *sums, *beta;       // (heads, rows): G and beta
    bf16 *inverse, *scores;   // (chunks, heads, 2, C, C): T and P, in two summands
    float *contexts;          // (contexts, heads, D, D): last states of contexts
    bf16 *out;                // rows x heads D: O, where it is wanted
    bf16 *news, *states;      // rows x heads D: N; (chunks, heads, D, D): S before each chunk; where they are wanted
    const bf16 *dout;         // rows x heads D
    bf16 *solved, *dstates;   // X, and the gradient of S after each chunk
    bf16 *dq, *dk, *dv;       // rows x heads D: of each value head; of q and k before what their length does
    float *dg, *dbeta;        // (heads, rows)
    const int *sequences, *chunks;
    int rows, heads, k_heads;
    int stages;               // 2, or 1 where shared memory has no room for more
};
// What beta and g are made of: a and b are rows ld apart.
struct Gates {
    const bf16 *a, *b;
    const void *a_log, *dt_bias;
    i64 ld;
    int log_kind, bias_kind;
};

__device__ __forceinline__ float f32(bf16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ float low(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(u32 x) { return __uint_as_float(x & 0xffff0000); }
// Element i of a weight of kind 0 (bf16), 1 (f16) or 2 (f32).
__device__ __forceinline__ float from_f16(bf16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
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
// What pack lost of these.
__device__ __forceinline__ u32 pack_rest(u32 packed, float first, float second) {
    return pack(first - low(packed), second - high(packed));
}
__device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
// 16 bytes, or 4, from global to shared memory, or zeros.
__device__ __forceinline__ void copy16(u32 to, const void *from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy4(u32 to, const void *from, bool real) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(real ? 4 : 0) : "memory");
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
__device__ __forceinline__ u32 load_word(u32 at) {
    u32 x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
    return x;
}
__device__ __forceinline__ void store_word(u32 at, u32 x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory"); }
// c (16 x 8) += a (16 x 16) b (16 x 8)
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
extern __shared__ __align__(128) unsigned char shared_memory[];

// Where 16-byte chunk c of row r lies in a tile of rows of W elements: chunks are swapped so that eight rows of one column
// fall on different banks.
template <int W> __device__ __forceinline__ u32 at(u32 base, int r, int c) {
    return base + r * (2 * W) + ((c ^ (r & 7)) << 4);
}
// The pair of elements at an even column.
template <int W> __device__ __forceinline__ u32 pair_at(u32 base, int r, int column) {
    return at<W>(base, r, column >> 3) + (column & 7) * 2;
}
// Starts the copy of ROWS rows of W elements, ld apart; those from `real` on are zeros.
template <int W, int ROWS> __device__ __forceinline__ void fetch(u32 to, const bf16 *from, i64 ld, int real) {
    for (int i = threadIdx.x; i < ROWS * (W / 8); i += blockDim.x) {
        const int r = i / (W / 8), c = i % (W / 8);
        copy16(at<W>(to, r, c), r < real ? from + r * ld + c * 8 : from, r < real);
    }
}
// c (16 x 8 NB) += rows m0.. of A times columns n0.. of B, over K. A tile has W elements a row. Turned, A is stored as its
// transpose (k x m); B is stored as k x n or, turned, as n x k.
template <int WA, bool TURNED_A, int WB, bool TURNED_B, int K, int NB>
__device__ __forceinline__ void product(float (&c)[NB][4], u32 a, int m0, u32 b, int n0) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        u32 fa[4];
        if (TURNED_A) load4_turned(fa, at<WA>(a, k + ((lane >> 4) << 3) + (lane & 7), (m0 >> 3) + ((lane >> 3) & 1)));
        else load4(fa, at<WA>(a, m0 + (lane & 15), (k >> 3) + (lane >> 4)));
#pragma unroll
        for (int n = 0; n < NB / 2; n++) {
            u32 fb[4];
            if (TURNED_B) load4(fb, at<WB>(b, n0 + n * 16 + (lane & 7) + ((lane >> 4) << 3), (k >> 3) + ((lane >> 3) & 1)));
            else load4_turned(fb, at<WB>(b, k + (lane & 15), (n0 >> 3) + 2 * n + (lane >> 4)));
            mma(c[2 * n], fa, fb[0], fb[1]);
            mma(c[2 * n + 1], fa, fb[2], fb[3]);
        }
    }
}
// The same with A turned or not, and B (k x n) in two summands.
template <int WA, bool TURNED_A, int WB, int K, int NB>
__device__ __forceinline__ void product_of_two(float (&c)[NB][4], u32 a, int m0, u32 b, u32 rest, int n0) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        u32 fa[4];
        if (TURNED_A) load4_turned(fa, at<WA>(a, k + ((lane >> 4) << 3) + (lane & 7), (m0 >> 3) + ((lane >> 3) & 1)));
        else load4(fa, at<WA>(a, m0 + (lane & 15), (k >> 3) + (lane >> 4)));
#pragma unroll
        for (int n = 0; n < NB / 2; n++) {
            u32 fb[4], fr[4];
            const u32 place = at<WB>(0, k + (lane & 15), (n0 >> 3) + 2 * n + (lane >> 4));
            load4_turned(fb, b + place);
            load4_turned(fr, rest + place);
            mma(c[2 * n], fa, fb[0], fb[1]);
            mma(c[2 * n + 1], fa, fb[2], fb[3]);
            mma(c[2 * n], fa, fr[0], fr[1]);
            mma(c[2 * n + 1], fa, fr[2], fr[3]);
        }
    }
}
template <int NB> __device__ __forceinline__ void clear(float (&c)[NB][4]) {
#pragma unroll
    for (int n = 0; n < NB; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
}
// Row and column of element e of column block n of a warp's product.
__device__ __forceinline__ int row_in(int m0, int e) { return m0 + ((threadIdx.x & 31) >> 2) + 8 * (e >> 1); }
__device__ __forceinline__ int column_in(int n0, int n) { return n0 + n * 8 + 2 * (threadIdx.x & 3); }
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

extern "C" {
// G and beta of a chunk's rows, T and P. A block of 128 a chunk and head; shared memory: two tiles of C x D, 4 C + 2 floats.
__global__ void __launch_bounds__(128) delta_chunks(Delta d, Gates g) {
    const int chunk = blockIdx.x, head = blockIdx.y, k_head = head / (d.heads / d.k_heads);
    const int first = d.chunks[2 * chunk], n = d.chunks[2 * chunk + 1] - first;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, m0 = warp * 16;
    const i64 ld = (i64)(2 * d.k_heads + d.heads) * D;
    const u32 sq = (u32)__cvta_generic_to_shared(shared_memory), sk = sq + C * D * 2;
    float *sums = (float *)(shared_memory + 2 * C * D * 2), *beta = sums + C, *of_q = beta + C, *of_k = of_q + C, *half = of_k + C;
    fetch<D, C>(sq, d.x + (i64)first * ld + k_head * D, ld, n);
    fetch<D, C>(sk, d.x + (i64)first * ld + (d.k_heads + k_head) * D, ld, n);
    copies_end();
    float sum = 0;
    if (threadIdx.x < C) {
        const int r = threadIdx.x;
        float b = 0;
        if (r < n) {
            const float a = f32(g.a[(i64)(first + r) * g.ld + head]) + weight(g.dt_bias, g.bias_kind, head);
            sum = -expf(weight(g.a_log, g.log_kind, head)) * softplus(a);
            b = sigmoid(f32(g.b[(i64)(first + r) * g.ld + head]));
        }
        beta[r] = b;
        of_q[r] = r < n ? d.lengths[(i64)k_head * d.rows + first + r] : 0;
        of_k[r] = r < n ? d.lengths[(i64)(d.k_heads + k_head) * d.rows + first + r] : 0;
#pragma unroll
        for (int w = 1; w < 32; w *= 2) {
            const float before = __shfl_up_sync(0xffffffff, sum, w);
            if (lane >= w) sum += before;
        }
        if (r == 31) half[0] = sum;
    }
    __syncthreads();
    if (threadIdx.x < C) {
        const int r = threadIdx.x;
        if (r >= 32) sum += half[0];
        sums[r] = sum;
        if (r < n) {
            d.sums[(i64)head * d.rows + first + r] = sum;
            d.beta[(i64)head * d.rows + first + r] = beta[r];
        }
    }
    copies_wait<0>();
    __syncthreads();
    float kk[8][4], qk[8][4];
    clear(kk);
    clear(qk);
    product<D, false, D, true, D>(kk, sk, m0, sk, 0);
    product<D, false, D, true, D>(qk, sq, m0, sk, 0);
    __syncthreads();
    // A takes the place of q and k.
    float *matrix = (float *)shared_memory;
    const i64 to = ((i64)chunk * d.heads + head) * 2 * C * C;
#pragma unroll
    for (int b = 0; b < 8; b++)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            const int i = row_in(m0, e), j = column_in(0, b);
            float p[2];
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const float decay = j + x <= i ? of_k[j + x] * expf(sums[i] - sums[j + x]) : 0;
                p[x] = of_q[i] * qk[b][e + x] * decay;
                matrix[i * C + j + x] = j + x < i ? beta[i] * of_k[i] * kk[b][e + x] * decay : 0;
            }
            const u32 both = pack(p[0], p[1]);
            *(u32 *)(d.scores + to + i * C + j) = both;
            *(u32 *)(d.scores + to + C * C + i * C + j) = pack_rest(both, p[0], p[1]);
        }
    __syncthreads();
    // T by columns: every thread has one, from its first row down.
    if (threadIdx.x < C) {
        const int j = threadIdx.x;
        float t[C];
#pragma unroll
        for (int i = 0; i < C; i++) {
            float x[4] = {i == j ? 1.f : 0.f, 0, 0, 0};
#pragma unroll
            for (int k = 0; k < i; k++) x[k & 3] -= matrix[i * C + k] * t[k];
            t[i] = (x[0] + x[1]) + (x[2] + x[3]);
            const u32 whole = pack(t[i], 0);
            d.inverse[to + i * C + j] = whole & 0xffff;
            d.inverse[to + C * C + i * C + j] = pack_rest(whole, t[i], 0) & 0xffff;
        }
    }
}
}

// What a chunk needs of each kernel that goes chunk by chunk: K, Q, T, P and V or dO, G, beta and lengths of k and q; and what
// is left of T and P.
static const int STAGE = 2 * C * D * 2 + 5 * C * C * 2 + 4 * C * 4;

struct Staged { u32 k, q, t, p, v, t_rest, p_rest; const float *sums, *beta, *of_k, *of_q; };

__device__ __forceinline__ Staged staged(int stage) {
    const u32 base = (u32)__cvta_generic_to_shared(shared_memory) + stage * STAGE, squares = base + 2 * C * D * 2;
    const float *floats = (const float *)(shared_memory + stage * STAGE + 2 * C * D * 2 + 5 * C * C * 2);
    return Staged{base, base + C * D * 2, squares, squares + C * C * 2, squares + 2 * C * C * 2, squares + 3 * C * C * 2,
                  squares + 4 * C * C * 2, floats, floats + C, floats + 2 * C, floats + 3 * C};
}

// `whole`: with what is left of T and P; `reads`: with what reads from the state.
__device__ __forceinline__ void stage_chunk(const Delta &d, int stage, int first, int n, int chunk, int head, const bf16 *v, i64 ldv,
                                            bool reads, bool whole) {
    const Staged s = staged(stage);
    const int k_head = head / (d.heads / d.k_heads);
    const i64 ld = (i64)(2 * d.k_heads + d.heads) * D, square = ((i64)chunk * d.heads + head) * 2 * C * C;
    fetch<D, C>(s.k, d.x + (i64)first * ld + (d.k_heads + k_head) * D, ld, n);
    fetch<C, C>(s.t, d.inverse + square, C, C);
    if (whole) fetch<C, C>(s.t_rest, d.inverse + square + C * C, C, C);
    fetch<C, C>(s.v, v + (i64)first * ldv, ldv, n);
    if (reads) {
        fetch<D, C>(s.q, d.x + (i64)first * ld + k_head * D, ld, n);
        fetch<C, C>(s.p, d.scores + square, C, C);
        if (whole) fetch<C, C>(s.p_rest, d.scores + square + C * C, C, C);
    }
    // 256 threads, 4 C floats.
    const int r = threadIdx.x & (C - 1), which = threadIdx.x / C;
    const float *from = (which == 0 ? d.sums + (i64)head * d.rows : which == 1 ? d.beta + (i64)head * d.rows
                         : d.lengths + (i64)(which == 2 ? d.k_heads + k_head : k_head) * d.rows) + first;
    copy4(s.v + 3 * C * C * 2 + threadIdx.x * 4, r < n ? from + r : from, r < n);
}

extern "C" {
// blockIdx: half of the state's columns, head, sequence; 256 threads; shared memory: the stages; the state and three C x C, all in
// two summands.
__global__ void __launch_bounds__(256, 1) delta_forward(Delta d) {
    const int v0 = blockIdx.x * C, head = blockIdx.y;
    const int *sequence = d.sequences + 5 * blockIdx.z;
    const int start = sequence[0], end = sequence[1], chunk0 = sequence[2], begins = sequence[3], ends = sequence[4];
    const int warp = threadIdx.x >> 5;
    // Of products of C x C: 16 rows and 32 columns a warp. Of the state: 16 rows and all 64 columns.
    const int m0 = (warp & 3) * 16, n0 = (warp >> 2) * 32, s0 = warp * 16;
    const u32 ss = (u32)__cvta_generic_to_shared(shared_memory) + d.stages * STAGE, ss_rest = ss + D * C * 2, sr = ss_rest + D * C * 2,
              sr_rest = sr + C * C * 2, sn = sr_rest + C * C * 2, sn_rest = sn + C * C * 2, sw = sn_rest + C * C * 2,
              sw_rest = sw + C * C * 2;
    const bf16 *v = d.x + (2 * d.k_heads + head) * D + v0;
    const i64 ld = (i64)(2 * d.k_heads + d.heads) * D, ldo = (i64)d.heads * D;
    const int count = (end - start + C - 1) / C;
    const bool reads = d.out != nullptr, two = d.stages == 2;
    float s[8][4];
    const i64 of_head = (i64)D * D;
#pragma unroll
    for (int b = 0; b < 8; b++)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            const int i = row_in(s0, e), j = column_in(0, b);
            const float *from = d.contexts + ((i64)begins * d.heads + head) * of_head + i * D + v0 + j;
            s[b][e] = begins < 0 ? 0 : from[0];
            s[b][e + 1] = begins < 0 ? 0 : from[1];
        }
    auto fetch_chunk = [&](int c) { stage_chunk(d, two ? c & 1 : 0, start + c * C, min(C, end - start - c * C), chunk0 + c, head, v, ld, reads, true); };
    if (count > 0) fetch_chunk(0);
    copies_end();
    for (int c = 0; c < count; c++) {
        const int first = start + c * C, n = min(C, end - first);
        const Staged in = staged(two ? c & 1 : 0);
#pragma unroll
        for (int b = 0; b < 8; b++)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const int i = row_in(s0, e), j = column_in(0, b);
                const u32 both = pack(s[b][e], s[b][e + 1]);
                store_word(pair_at<C>(ss, i, j), both);
                store_word(pair_at<C>(ss_rest, i, j), pack_rest(both, s[b][e], s[b][e + 1]));
                if (d.states) *(u32 *)(d.states + ((i64)(chunk0 + c) * d.heads + head) * of_head + i * D + v0 + j) = both;
            }
        if (two && c + 1 < count) fetch_chunk(c + 1);
        copies_end();
        copies_wait<1>();
        __syncthreads();
        float ks[4][4], o[4][4];
        clear(ks);
        clear(o);
        product_of_two<D, false, C, D>(ks, in.k, m0, ss, ss_rest, n0);
        if (reads) product_of_two<D, false, C, D>(o, in.q, m0, ss, ss_rest, n0);
#pragma unroll
        for (int b = 0; b < 4; b++)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const int i = row_in(m0, e), j = column_in(n0, b);
                const float kept = expf(in.sums[i]), beta = in.beta[i], by_k = kept * in.of_k[i], by_q = kept * in.of_q[i];
                const u32 value = load_word(pair_at<C>(in.v, i, j));
                const float x = beta * (low(value) - by_k * ks[b][e]), y = beta * (high(value) - by_k * ks[b][e + 1]);
                const u32 both = pack(x, y);
                store_word(pair_at<C>(sr, i, j), both);
                store_word(pair_at<C>(sr_rest, i, j), pack_rest(both, x, y));
                o[b][e] *= by_q;
                o[b][e + 1] *= by_q;
            }
        __syncthreads();
        clear(ks);
        product_of_two<C, false, C, C>(ks, in.t, m0, sr, sr_rest, n0);
        product<C, false, C, false, C>(ks, in.t_rest, m0, sr, n0);
        const float last = in.sums[n - 1];
#pragma unroll
        for (int b = 0; b < 4; b++)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const int i = row_in(m0, e), j = column_in(n0, b);
                const float rest = in.of_k[i] * expf(last - in.sums[i]), x = rest * ks[b][e], y = rest * ks[b][e + 1];
                const u32 both = pack(ks[b][e], ks[b][e + 1]), scaled = pack(x, y);
                if (reads) {
                    store_word(pair_at<C>(sn, i, j), both);
                    store_word(pair_at<C>(sn_rest, i, j), pack_rest(both, ks[b][e], ks[b][e + 1]));
                }
                store_word(pair_at<C>(sw, i, j), scaled);
                store_word(pair_at<C>(sw_rest, i, j), pack_rest(scaled, x, y));
                if (d.news && i < n) *(u32 *)(d.news + (i64)(first + i) * ldo + head * D + v0 + j) = both;
            }
        __syncthreads();
        if (reads) {
            product_of_two<C, false, C, C>(o, in.p, m0, sn, sn_rest, n0);
            product<C, false, C, false, C>(o, in.p_rest, m0, sn, n0);
#pragma unroll
            for (int b = 0; b < 4; b++)
#pragma unroll
                for (int e = 0; e < 4; e += 2) {
                    const int i = row_in(m0, e), j = column_in(n0, b);
                    if (i < n) *(u32 *)(d.out + (i64)(first + i) * ldo + head * D + v0 + j) = pack(o[b][e], o[b][e + 1]);
                }
        }
        const float whole = expf(last);
#pragma unroll
        for (int b = 0; b < 8; b++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[b][e] *= whole;
        product_of_two<D, true, C, C>(s, in.k, s0, sw, sw_rest, 0);
        // What this chunk read is overwritten from here on.
        __syncthreads();
        if (!two && c + 1 < count) fetch_chunk(c + 1);
        copies_end();
    }
    copies_wait<0>();
    if (ends < 0) return;
#pragma unroll
    for (int b = 0; b < 8; b++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            d.contexts[((i64)ends * d.heads + head) * of_head + row_in(s0, e) * D + v0 + column_in(0, b) + (e & 1)] = s[b][e];
}

// The same backwards, for the gradient of the state: X, and the gradient after each chunk.
__global__ void __launch_bounds__(256, 1) delta_states(Delta d) {
    const int v0 = blockIdx.x * C, head = blockIdx.y;
    const int *sequence = d.sequences + 5 * blockIdx.z;
    const int start = sequence[0], end = sequence[1], chunk0 = sequence[2];
    const int warp = threadIdx.x >> 5;
    const int m0 = (warp & 3) * 16, n0 = (warp >> 2) * 32, s0 = warp * 16;
    const u32 ss = (u32)__cvta_generic_to_shared(shared_memory) + d.stages * STAGE, sr = ss + D * C * 2, sn = sr + C * C * 2, sw = sn + C * C * 2;
    const i64 ldo = (i64)d.heads * D, of_head = (i64)D * D;
    const bf16 *dout = d.dout + head * D + v0;
    const int count = (end - start + C - 1) / C;
    const bool two = d.stages == 2;
    float s[8][4];
    clear(s);
    auto fetch_chunk = [&](int c) { stage_chunk(d, two ? c & 1 : 0, start + c * C, min(C, end - start - c * C), chunk0 + c, head, dout, ldo, true, false); };
    if (count > 0) fetch_chunk(count - 1);
    copies_end();
    for (int c = count - 1; c >= 0; c--) {
        const int first = start + c * C, n = min(C, end - first);
        const Staged in = staged(two ? c & 1 : 0);
#pragma unroll
        for (int b = 0; b < 8; b++)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const int i = row_in(s0, e), j = column_in(0, b);
                const u32 both = pack(s[b][e], s[b][e + 1]);
                store_word(pair_at<C>(ss, i, j), both);
                *(u32 *)(d.dstates + ((i64)(chunk0 + c) * d.heads + head) * of_head + i * D + v0 + j) = both;
            }
        if (two && c > 0) fetch_chunk(c - 1);
        copies_end();
        copies_wait<1>();
        __syncthreads();
        const float last = in.sums[n - 1];
        float x[4][4];
        clear(x);
        product<D, false, C, false, D>(x, in.k, m0, ss, n0);
#pragma unroll
        for (int b = 0; b < 4; b++)
#pragma unroll
            for (int e = 0; e < 4; e++) x[b][e] *= in.of_k[row_in(m0, e)] * expf(last - in.sums[row_in(m0, e)]);
        product<C, true, C, false, C>(x, in.p, m0, in.v, n0);
#pragma unroll
        for (int b = 0; b < 4; b++)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const int i = row_in(m0, e), j = column_in(n0, b);
                const float kept = in.of_q[i] * expf(in.sums[i]);
                const u32 value = load_word(pair_at<C>(in.v, i, j));
                store_word(pair_at<C>(sr, i, j), pack(x[b][e], x[b][e + 1]));
                store_word(pair_at<C>(sw, i, j), pack(kept * low(value), kept * high(value)));
            }
        __syncthreads();
        clear(x);
        product<C, true, C, false, C>(x, in.t, m0, sr, n0);
#pragma unroll
        for (int b = 0; b < 4; b++)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const int i = row_in(m0, e), j = column_in(n0, b);
                const float factor = -in.beta[i] * in.of_k[i] * expf(in.sums[i]);
                store_word(pair_at<C>(sn, i, j), pack(factor * x[b][e], factor * x[b][e + 1]));
                if (i < n) *(u32 *)(d.solved + (i64)(first + i) * ldo + head * D + v0 + j) = pack(x[b][e], x[b][e + 1]);
            }
        __syncthreads();
        const float whole = expf(last);
#pragma unroll
        for (int b = 0; b < 8; b++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[b][e] *= whole;
        product<D, true, C, false, C>(s, in.q, s0, sw, 0);
        product<D, true, C, false, C>(s, in.k, s0, sn, 0);
        __syncthreads();
        if (!two && c > 0) fetch_chunk(c - 1);
        copies_end();
    }
    copies_wait<0>();
}

// Gradients of one chunk of one value head: of q and k (by value head), v, the running sums' g, and beta. 256 threads; shared
// memory: q and k, three tiles of C x C, two of D x C, and floats.
__global__ void __launch_bounds__(256, 1) delta_backward(Delta d) {
    const int chunk = blockIdx.x, head = blockIdx.y, k_head = head / (d.heads / d.k_heads);
    const int first = d.chunks[2 * chunk], n = d.chunks[2 * chunk + 1] - first;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, half = warp >> 2, m0 = (warp & 3) * 16, n0 = half * 32, d0 = half * 64;
    const i64 ld = (i64)(2 * d.k_heads + d.heads) * D, ldo = (i64)d.heads * D, of_head = (i64)D * D;
    const u32 sq = (u32)__cvta_generic_to_shared(shared_memory), sk = sq + C * D * 2, sn = sk + C * D * 2, sx = sn + C * C * 2,
              so = sx + C * C * 2, ss = so + C * C * 2, sd = ss + D * C * 2;
    float *sums = (float *)(shared_memory + 2 * C * D * 2 + 3 * C * C * 2 + 2 * D * C * 2), *beta = sums + C, *lq = beta + C, *lk = lq + C;
    // By half: q's share of dG, what goes through r, k (X S^T), and of squares: rows of dG and of dbeta. By 16 rows: columns.
    float *of_q = lk + C, *of_r = of_q + 2 * C, *of_k = of_r + 2 * C, *of_rows = of_k + 2 * C, *of_beta = of_rows + 2 * C,
          *of_columns = of_beta + 2 * C, *of_v = of_columns + 4 * C, *of_states = of_v + C, *dsums = of_states + 8;
    fetch<D, C>(sq, d.x + (i64)first * ld + k_head * D, ld, n);
    fetch<D, C>(sk, d.x + (i64)first * ld + (d.k_heads + k_head) * D, ld, n);
    if (threadIdx.x < C) {
        // Rows that are not there go on as the last one is: differences of sums must not overflow.
        const i64 i = (i64)head * d.rows + first;
        sums[threadIdx.x] = d.sums[i + min((int)threadIdx.x, n - 1)];
        const i64 row = first + threadIdx.x;
        beta[threadIdx.x] = threadIdx.x < n ? d.beta[i + threadIdx.x] : 0;
        lq[threadIdx.x] = threadIdx.x < n ? d.lengths[(i64)k_head * d.rows + row] : 0;
        lk[threadIdx.x] = threadIdx.x < n ? d.lengths[(i64)(d.k_heads + k_head) * d.rows + row] : 0;
    }
    float dp[4][4], xn[4][4], dq[8][4], dk[8][4], xs[8][4], states = 0, of_value = 0;
    clear(dp);
    clear(xn);
    clear(dq);
    clear(dk);
    clear(xs);
    for (int v0 = 0; v0 < D; v0 += C) {
        const i64 rows = (i64)first * ldo + head * D + v0, state = ((i64)chunk * d.heads + head) * of_head + v0;
        fetch<C, C>(sn, d.news + rows, ldo, n);
        fetch<C, C>(sx, d.solved + rows, ldo, n);
        fetch<C, C>(so, d.dout + rows, ldo, n);
        fetch<C, D>(ss, d.states + state, D, D);
        fetch<C, D>(sd, d.dstates + state, D, D);
        copies_end();
        copies_wait<0>();
        __syncthreads();
        product<C, false, C, true, C>(dp, so, m0, sn, n0);
        product<C, false, C, true, C>(xn, sx, m0, sn, n0);
        product<C, false, C, true, C>(dq, so, m0, ss, d0);
        product<C, false, C, true, C>(dk, sn, m0, sd, d0);
        product<C, false, C, true, C>(xs, sx, m0, ss, d0);
        for (int i = threadIdx.x; i < D * C / 2; i += blockDim.x) {
            const u32 a = load_word(ss + 4 * i), b = load_word(sd + 4 * i);
            states += low(a) * low(b) + high(a) * high(b);
        }
        // Sixteen columns of a row a thread.
        const int r = threadIdx.x >> 2, c0 = (threadIdx.x & 3) * 16;
        if (r < n) {
            const bf16 *value = d.x + (i64)(first + r) * ld + (2 * d.k_heads + head) * D + v0 + c0;
#pragma unroll
            for (int c = 0; c < 16; c += 2) {
                const u32 a = load_word(pair_at<C>(sx, r, c0 + c)), b = *(const u32 *)(value + c);
                of_value += low(a) * low(b) + high(a) * high(b);
                *(u32 *)(d.dv + rows + r * ldo + c0 + c) = pack(beta[r] * low(a), beta[r] * high(a));
            }
        }
        __syncthreads();
    }
    of_value = quad_sum(of_value);
    if ((threadIdx.x & 3) == 0) of_v[threadIdx.x >> 2] = of_value;
#pragma unroll
    for (int w = 16; w; w /= 2) states += __shfl_xor_sync(0xffffffff, states, w);
    if (lane == 0) of_states[warp] = states;

    float kk[4][4], qk[4][4];
    clear(kk);
    clear(qk);
    product<D, false, D, true, D>(kk, sk, m0, sk, n0);
    product<D, false, D, true, D>(qk, sq, m0, sk, n0);
    // dP * D and -beta X N^T * D below the diagonal take the states' place, times both rows' lengths: so they give gradients of q
    // and k times their lengths, which is what is wanted.
    const u32 sp = ss, sa = sd;
    float by_row[2] = {0, 0}, by_beta[2] = {0, 0};
#pragma unroll
    for (int b = 0; b < 4; b++) {
        float by_column[2] = {0, 0};
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            const int i = row_in(m0, e), j = column_in(n0, b);
            float p[2], a[2];
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const float decay = j + x <= i ? lk[j + x] * expf(sums[i] - sums[j + x]) : 0;
                p[x] = lq[i] * dp[b][e + x] * decay;
                const float da = j + x < i ? -lk[i] * xn[b][e + x] * decay : 0, through_beta = da * kk[b][e + x];
                a[x] = beta[i] * da;
                const float through = p[x] * qk[b][e + x] + beta[i] * through_beta;
                by_row[e >> 1] += through;
                by_column[x] += through;
                by_beta[e >> 1] += through_beta;
            }
            store_word(pair_at<C>(sp, i, j), pack(p[0], p[1]));
            store_word(pair_at<C>(sa, i, j), pack(a[0], a[1]));
        }
#pragma unroll
        for (int x = 0; x < 2; x++) {
#pragma unroll
            for (int w = 4; w < 32; w *= 2) by_column[x] += __shfl_xor_sync(0xffffffff, by_column[x], w);
            if (lane < 4) of_columns[(warp & 3) * C + column_in(n0, b) + x] = by_column[x];
        }
    }
    const float last = sums[C - 1];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int i = row_in(m0, 2 * h);
        const float kept = expf(sums[i]), rest = lk[i] * expf(last - sums[i]), by_q = lq[i] * kept, by_k = lk[i] * kept;
        float q_share = 0, r_share = 0, k_share = 0;
#pragma unroll
        for (int b = 0; b < 8; b++) {
            const u32 q = load_word(pair_at<D>(sq, i, column_in(d0, b))), k = load_word(pair_at<D>(sk, i, column_in(d0, b)));
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const int e = 2 * h + x;
                const float kx = x ? high(k) : low(k);
                dq[b][e] *= by_q;
                dk[b][e] *= rest;
                q_share += (x ? high(q) : low(q)) * dq[b][e];
                r_share += kx * dk[b][e];
                k_share += kx * xs[b][e];
                dk[b][e] -= by_k * beta[i] * xs[b][e];
            }
        }
        q_share = quad_sum(q_share), r_share = quad_sum(r_share), k_share = quad_sum(k_share);
        const float row = quad_sum(by_row[h]), of_b = quad_sum(by_beta[h]);
        if ((lane & 3) == 0) {
            of_q[half * C + i] = q_share, of_r[half * C + i] = r_share, of_k[half * C + i] = k_share;
            of_rows[half * C + i] = row, of_beta[half * C + i] = of_b;
        }
    }
    __syncthreads();
    if (threadIdx.x < C) {
        const int i = threadIdx.x;
        const float kept = expf(sums[i]), through = of_r[i] + of_r[C + i], ks = kept * lk[i] * (of_k[i] + of_k[C + i]);
        float sum = of_q[i] + of_q[C + i] - through - beta[i] * ks + of_rows[i] + of_rows[C + i];
        for (int w = 0; w < 4; w++) sum -= of_columns[w * C + i];
        dsums[i] = sum;
        dsums[C + i] = through;
        if (i < n) d.dbeta[(i64)head * d.rows + first + i] = of_beta[i] + of_beta[C + i] + of_v[i] - ks;
    }
    __syncthreads();
    if (threadIdx.x < n) {
        // G is a running sum; through its last value go S and what r scales.
        float sum = 0, all = 0;
        for (int w = 0; w < 8; w++) all += of_states[w];
        all *= expf(last);
        for (int j = 0; j < C; j++) {
            all += dsums[C + j];
            if (j >= threadIdx.x) sum += dsums[j];
        }
        d.dg[(i64)head * d.rows + first + threadIdx.x] = sum + all;
    }
    product<C, false, D, false, C>(dq, sp, m0, sk, d0);
    product<C, true, D, false, C>(dk, sp, m0, sq, d0);
    product<C, false, D, false, C>(dk, sa, m0, sk, d0);
    product<C, true, D, false, C>(dk, sa, m0, sk, d0);
#pragma unroll
    for (int b = 0; b < 8; b++)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            const int i = row_in(m0, e), j = column_in(d0, b);
            if (i >= n) continue;
            const i64 to = (i64)(first + i) * ldo + head * D + j;
            *(u32 *)(d.dq + to) = pack(dq[b][e], dq[b][e + 1]);
            *(u32 *)(d.dk + to) = pack(dk[b][e], dk[b][e + 1]);
        }
}

// Gradients of a and b (rows ldd apart) from those of g and beta, and by stripe of 256 rows, rows of `partial` (2 heads wide):
// what A_log's and dt_bias's are summed from. A block a stripe and head.
__global__ void __launch_bounds__(256) delta_gates_backward(Gates g, const float *dg, const float *dbeta, int rows, int heads, bf16 *da,
                                                            bf16 *db, i64 ldd, float *partial) {
    __shared__ float scratch[2][8];
    const int head = blockIdx.y, t = blockIdx.x * 256 + threadIdx.x;
    float of_log = 0, of_bias = 0;
    if (t < rows) {
        const float x = f32(g.a[t * g.ld + head]) + weight(g.dt_bias, g.bias_kind, head);
        const float keep = -expf(weight(g.a_log, g.log_kind, head)), d = dg[(i64)head * rows + t] * keep;
        of_log = d * softplus(x);
        of_bias = d * sigmoid(x);
        da[t * ldd + head] = pack(of_bias, 0) & 0xffff;
        const float beta = sigmoid(f32(g.b[t * g.ld + head]));
        db[t * ldd + head] = pack(dbeta[(i64)head * rows + t] * beta * (1.f - beta), 0) & 0xffff;
    }
#pragma unroll
    for (int w = 16; w; w /= 2) {
        of_log += __shfl_xor_sync(0xffffffff, of_log, w);
        of_bias += __shfl_xor_sync(0xffffffff, of_bias, w);
    }
    if ((threadIdx.x & 31) == 0) scratch[0][threadIdx.x >> 5] = of_log, scratch[1][threadIdx.x >> 5] = of_bias;
    __syncthreads();
    if (threadIdx.x < 2) {
        float sum = 0;
        for (int w = 0; w < 8; w++) sum += scratch[threadIdx.x][w];
        partial[(i64)blockIdx.x * 2 * heads + threadIdx.x * heads + head] = sum;
    }
}
}
