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
// A block of the kernels that go chunk by chunk has 64 columns of one head's state in registers, 16 a warp, turned: what a
// product gives is then the next one's first operand as it lies in registers, so that warps go from chunk to chunk without each
// other, and without shared memory but for what they read. Of T and P, which are triangular, blocks of 16 x 16 above the diagonal
// are neither written nor read. A sequence is five numbers: its first row and the end of its rows, its first chunk, the context
// whose last state it begins with and the one whose last state it makes, both -1 for none. A chunk is two: its first row and the
// end of its rows.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef long long i64;

static const int D = 128;  // columns of a head
static const int C = 64;   // tokens of a chunk

struct Delta {
    const bf16 *x;            // rows of q heads, k heads and v heads
    const float *lengths;     // (2 k_heads, rows): what q and k are to be multiplied with: 1 by their length, q by sqrt(k_dim) too
    float *sums, *beta;       // (heads, rows): G and beta
    float *by_k, *by_q, *rest; // (heads, rows): lengths of k and q times e^G, of k times e^(G_last - G)
    bf16 *inverse, *scores;   // (chunks, heads, 2, C, C): T and P, in two summands
    float *contexts;          // (contexts, heads, D, D): last states of contexts
    bf16 *out;                // rows x heads D: O, where it is wanted
    bf16 *news, *states;      // rows x heads D: N; (chunks, heads, D, D): S before each chunk, turned; where they are wanted
    const bf16 *dout;         // rows x heads D
    bf16 *solved, *dstates;   // X, and the gradient of S after each chunk, turned
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
// An 8 x 8 of bf16, a pair of a row a lane, turned: a pair of a column.
__device__ __forceinline__ u32 turned(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
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
// Starts the copy of 64 rows of W elements, ld apart; those from `real` on are zeros. THREADS threads do it, each a column of
// 16 bytes of every so many rows, so that all of its places in shared memory are a constant apart.
template <int W, int THREADS> __device__ __forceinline__ void fetch(u32 to, const bf16 *from, i64 ld, int real) {
    const int thread = threadIdx.x & (THREADS - 1), c = thread % (W / 8), r0 = thread / (W / 8);
    const u32 place = at<W>(to, r0, c);
    from += c * 8;
    static_assert(THREADS * 8 / W % 8 == 0, "rows a round are whole groups of swapped chunks");
#pragma unroll
    for (int i = 0; i < C / (THREADS * 8 / W); i++) {
        const int r = r0 + i * (THREADS * 8 / W);
        copy16(place + i * THREADS * 16, from + (r < real ? r * ld : 0), r < real);
    }
}
// The same of a square's blocks of 16 x 16 on the diagonal and below it; 128 threads.
__device__ __forceinline__ void fetch_below(u32 to, const bf16 *from) {
    const int c = threadIdx.x & 7, r0 = (threadIdx.x & 127) >> 3;
    const u32 place = at<C>(to, r0, c);
    from += r0 * C + c * 8;
#pragma unroll
    for (int i = 0; i < C / 16; i++)
        if (c < 2 * (i + 1)) copy16(place + i * 16 * C * 2, from + i * 16 * C, true);
}
// Operands of 16 x 16 from a tile of W elements a row. The first: rows m and columns k, or, turned, from its transpose.
template <int W> __device__ __forceinline__ void first_operand(u32 (&f)[4], u32 tile, int m, int k) {
    const int lane = threadIdx.x & 31;
    load4(f, at<W>(tile, m + (lane & 15), (k >> 3) + (lane >> 4)));
}
template <int W> __device__ __forceinline__ void first_operand_turned(u32 (&f)[4], u32 tile, int m, int k) {
    const int lane = threadIdx.x & 31;
    load4_turned(f, at<W>(tile, k + ((lane >> 4) << 3) + (lane & 7), (m >> 3) + ((lane >> 3) & 1)));
}
// The second, from a tile of k x n, or, turned, of n x k: f[0] and f[1] for eight columns, f[2] and f[3] for the next.
template <int W> __device__ __forceinline__ void second_operand(u32 (&f)[4], u32 tile, int k, int n) {
    const int lane = threadIdx.x & 31;
    load4_turned(f, at<W>(tile, k + (lane & 15), (n >> 3) + (lane >> 4)));
}
template <int W> __device__ __forceinline__ void second_operand_turned(u32 (&f)[4], u32 tile, int k, int n) {
    const int lane = threadIdx.x & 31;
    load4(f, at<W>(tile, n + (lane & 7) + ((lane >> 4) << 3), (k >> 3) + ((lane >> 3) & 1)));
}
// c (16 x 16, of which two blocks of eight columns begin at c[0]) += a b
template <int NB> __device__ __forceinline__ void multiply(float (&c)[NB][4], int block, const u32 (&a)[4], const u32 (&b)[4]) {
    mma(c[block], a, b[0], b[1]);
    mma(c[block + 1], a, b[2], b[3]);
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

// Shared memory of delta_chunks: q and k, then A and T in f32 (P on its way out in T's place); sums, beta, lengths of q and k.
static const int PITCH = C + 4;  // floats of a row of A and T

// c (rows i.. and i + 1, four columns from j) = +- a (rows of K) b (K rows); all of them PITCH floats a row.
template <int K> __device__ __forceinline__ void small_product(const float *a, const float *b, float *c, float sign) {
    float x[2][4] = {};
#pragma unroll
    for (int k = 0; k < K; k += 4) {
        const float4 r0 = *(const float4 *)(a + k), r1 = *(const float4 *)(a + PITCH + k);
        const float first[4] = {r0.x, r0.y, r0.z, r0.w}, second[4] = {r1.x, r1.y, r1.z, r1.w};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float4 y = *(const float4 *)(b + (k + e) * PITCH);
            x[0][0] += first[e] * y.x, x[0][1] += first[e] * y.y, x[0][2] += first[e] * y.z, x[0][3] += first[e] * y.w;
            x[1][0] += second[e] * y.x, x[1][1] += second[e] * y.y, x[1][2] += second[e] * y.z, x[1][3] += second[e] * y.w;
        }
    }
    *(float4 *)c = make_float4(sign * x[0][0], sign * x[0][1], sign * x[0][2], sign * x[0][3]);
    *(float4 *)(c + PITCH) = make_float4(sign * x[1][0], sign * x[1][1], sign * x[1][2], sign * x[1][3]);
}

extern "C" {
// G and beta of a chunk's rows, T and P. A block of 128 a chunk and head.
__global__ void __launch_bounds__(128) delta_chunks(Delta d, Gates g) {
    const int chunk = blockIdx.x, head = blockIdx.y, k_head = head / (d.heads / d.k_heads);
    const int first = d.chunks[2 * chunk], n = d.chunks[2 * chunk + 1] - first;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, m0 = warp * 16;
    const i64 ld = (i64)(2 * d.k_heads + d.heads) * D;
    const u32 sq = (u32)__cvta_generic_to_shared(shared_memory), sk = sq + C * D * 2, sp = sq + C * PITCH * 4, sp_rest = sp + C * C * 2;
    float *a = (float *)shared_memory, *t = a + C * PITCH;
    float *sums = t + C * PITCH, *beta = sums + C, *of_q = beta + C, *of_k = of_q + C, *half = of_k + C;
    fetch<D, 128>(sq, d.x + (i64)first * ld + k_head * D, ld, n);
    fetch<D, 128>(sk, d.x + (i64)first * ld + (d.k_heads + k_head) * D, ld, n);
    copies_end();
    float sum = 0;
    if (threadIdx.x < C) {
        const int r = threadIdx.x;
        float b = 0;
        if (r < n) {
            const float x = f32(g.a[(i64)(first + r) * g.ld + head]) + weight(g.dt_bias, g.bias_kind, head);
            sum = -expf(weight(g.a_log, g.log_kind, head)) * softplus(x);
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
    if (threadIdx.x < C) sums[threadIdx.x] = threadIdx.x < 32 ? sum : sum + half[0];
    copies_wait<0>();
    __syncthreads();
    if (threadIdx.x < n) {
        const int r = threadIdx.x;
        const i64 to = (i64)head * d.rows + first + r;
        const float kept = expf(sums[r]);
        d.sums[to] = sums[r];
        d.beta[to] = beta[r];
        d.by_k[to] = kept * of_k[r];
        d.by_q[to] = kept * of_q[r];
        d.rest[to] = expf(sums[C - 1] - sums[r]) * of_k[r];
    }
    // Of 16 rows, the columns up to the diagonal.
    float kk[8][4], qk[8][4];
    clear(kk);
    clear(qk);
#pragma unroll
    for (int k = 0; k < D; k += 16) {
        u32 fk[4], fq[4];
        first_operand<D>(fk, sk, m0, k);
        first_operand<D>(fq, sq, m0, k);
#pragma unroll
        for (int b = 0; b < 4; b++) {
            if (b > warp) continue;
            u32 f[4];
            second_operand_turned<D>(f, sk, k, b * 16);
            multiply(kk, 2 * b, fk, f);
            multiply(qk, 2 * b, fq, f);
        }
    }
    __syncthreads();
    // A takes the place of q and k.
#pragma unroll
    for (int b = 0; b < 8; b++) {
        if (b > 2 * warp + 1) continue;
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            const int i = row_in(m0, e), j = column_in(0, b);
            float p[2];
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const float decay = j + x <= i ? of_k[j + x] * expf(sums[i] - sums[j + x]) : 0;
                p[x] = of_q[i] * qk[b][e + x] * decay;
                a[i * PITCH + j + x] = j + x < i ? beta[i] * of_k[i] * kk[b][e + x] * decay : 0;
            }
            const u32 both = pack(p[0], p[1]);
            store_word(pair_at<C>(sp, i, j), both);
            store_word(pair_at<C>(sp_rest, i, j), pack_rest(both, p[0], p[1]));
        }
    }
    __syncthreads();
    const i64 to = ((i64)chunk * d.heads + head) * 2 * C * C;
    const int c = threadIdx.x & 7, r0 = threadIdx.x >> 3;
#pragma unroll
    for (int i = 0; i < C / 16; i++) {
        const int r = r0 + 16 * i;
        if (c >= 2 * (i + 1)) continue;
        *(uint4 *)(d.scores + to + r * C + c * 8) = *(const uint4 *)(shared_memory + at<C>(sp - sq, r, c));
        *(uint4 *)(d.scores + to + C * C + r * C + c * 8) = *(const uint4 *)(shared_memory + at<C>(sp_rest - sq, r, c));
    }
    __syncthreads();
    // T: inverses of the four blocks of 16 x 16 on the diagonal, a column a thread; then of blocks of 32 and 64, whose lower left
    // quarter is -T' A T'' of the two smaller ones. What lies above A's diagonal has room for A T''.
    if (threadIdx.x < C) {
        const int begin = threadIdx.x & ~15, j = threadIdx.x & 15;
        float x[16];
#pragma unroll
        for (int i = 0; i < 16; i++) {
            x[i] = i == j ? 1.f : 0.f;
#pragma unroll
            for (int k = 0; k < i; k++) x[i] -= a[(begin + i) * PITCH + begin + k] * x[k];
            t[(begin + i) * PITCH + begin + j] = x[i];
        }
    }
    __syncthreads();
    {
        const int begin = threadIdx.x >= 32 ? 32 : 0, i = (threadIdx.x & 31) >> 2 << 1, j = (threadIdx.x & 3) * 4;
        if (threadIdx.x < 64)
            small_product<16>(a + (begin + 16 + i) * PITCH + begin, t + begin * PITCH + begin + j, a + (begin + i) * PITCH + begin + 16 + j, 1.f);
        __syncthreads();
        if (threadIdx.x < 64)
            small_product<16>(t + (begin + 16 + i) * PITCH + begin + 16, a + begin * PITCH + begin + 16 + j, t + (begin + 16 + i) * PITCH + begin + j, -1.f);
    }
    // The blocks of 32 still lack what is above their own diagonal.
    for (int i = threadIdx.x; i < 512; i += 128) {
        const int begin = i >> 8 << 5;
        t[(begin + ((i >> 4) & 15)) * PITCH + begin + 16 + (i & 15)] = 0;
    }
    __syncthreads();
    const int i = threadIdx.x >> 3 << 1, j = (threadIdx.x & 7) * 4;
    small_product<32>(a + (32 + i) * PITCH, t + j, a + i * PITCH + 32 + j, 1.f);
    __syncthreads();
    small_product<32>(t + (32 + i) * PITCH + 32, a + 32 + j, t + (32 + i) * PITCH + j, -1.f);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < C / 16; i++) {
        const int r = r0 + 16 * i;
        if (c >= 2 * (i + 1)) continue;
        const float4 x = *(const float4 *)(t + r * PITCH + c * 8), y = *(const float4 *)(t + r * PITCH + c * 8 + 4);
        const u32 whole[4] = {pack(x.x, x.y), pack(x.z, x.w), pack(y.x, y.y), pack(y.z, y.w)};
        *(uint4 *)(d.inverse + to + r * C + c * 8) = make_uint4(whole[0], whole[1], whole[2], whole[3]);
        *(uint4 *)(d.inverse + to + C * C + r * C + c * 8) =
            make_uint4(pack_rest(whole[0], x.x, x.y), pack_rest(whole[1], x.z, x.w), pack_rest(whole[2], y.x, y.y), pack_rest(whole[3], y.z, y.w));
    }
}
}

// What a chunk needs of each kernel that goes chunk by chunk: K, Q, T, P and V or dO, beta, by_k, by_q and rest; and what is left
// of T and P.
static const int STAGE = 2 * C * D * 2 + 5 * C * C * 2 + 4 * C * 4;

struct Staged { u32 k, q, t, p, v, t_rest, p_rest; const float *beta, *by_k, *by_q, *rest; };

__device__ __forceinline__ Staged staged(int stage) {
    const u32 base = (u32)__cvta_generic_to_shared(shared_memory) + stage * STAGE, squares = base + 2 * C * D * 2;
    const float *floats = (const float *)(shared_memory + stage * STAGE + 2 * C * D * 2 + 5 * C * C * 2);
    return Staged{base, base + C * D * 2, squares, squares + C * C * 2, squares + 2 * C * C * 2, squares + 3 * C * C * 2,
                  squares + 4 * C * C * 2, floats, floats + C, floats + 2 * C, floats + 3 * C};
}

// By 128 threads. `WHOLE`: with what is left of T and P; `READS`: with what reads from the state.
template <bool READS, bool WHOLE>
__device__ __forceinline__ void stage_chunk(const Delta &d, int stage, int first, int n, int chunk, int head, int k_head, const bf16 *v, i64 ldv) {
    const Staged s = staged(stage);
    const i64 ld = (i64)(2 * d.k_heads + d.heads) * D, square = ((i64)chunk * d.heads + head) * 2 * C * C;
    fetch<D, 128>(s.k, d.x + (i64)first * ld + (d.k_heads + k_head) * D, ld, n);
    fetch_below(s.t, d.inverse + square);
    if constexpr (WHOLE) fetch_below(s.t_rest, d.inverse + square + C * C);
    fetch<C, 128>(s.v, v + (i64)first * ldv, ldv, n);
    if constexpr (READS) {
        fetch<D, 128>(s.q, d.x + (i64)first * ld + k_head * D, ld, n);
        fetch_below(s.p, d.scores + square);
        if constexpr (WHOLE) fetch_below(s.p_rest, d.scores + square + C * C);
    }
    // Four rows of C floats, two at a time.
    const int r = threadIdx.x & (C - 1);
    const bool second = threadIdx.x & C;
    const i64 from = (i64)head * d.rows + first + (r < n ? r : 0);
    const u32 to = s.v + 3 * C * C * 2 + (threadIdx.x & 127) * 4;
    copy4(to, (second ? d.by_k : d.beta) + from, r < n);
    copy4(to + 2 * C * 4, (second ? d.rest : d.by_q) + from, r < n);
}

// What the second half of a block of 256 does: chunk after chunk comes to its stage, while the first half works on the one before
// it, or, with one stage, once that is done.
template <bool READS, bool WHOLE>
__device__ __forceinline__ void bring(const Delta &d, const int *sequence, int head, bool backwards, const bf16 *v, i64 ldv) {
    const int start = sequence[0], end = sequence[1], chunk0 = sequence[2], count = (end - start + C - 1) / C;
    const int k_head = head / (d.heads / d.k_heads);
    for (int i = 0; i < count; i++) {
        const int c = backwards ? count - 1 - i : i;
        stage_chunk<READS, WHOLE>(d, d.stages == 2 ? c & 1 : 0, start + c * C, min(C, end - start - c * C), chunk0 + c, head, k_head, v, ldv);
        copies_end();
        copies_wait<0>();
        __syncthreads();
        if (d.stages != 2) __syncthreads();
    }
}

// Pairs of two columns' values along a row, as operands of a product have them: a[b][h], of rows 8 b and column 8 h on.
struct Pairs { u32 x[8][2]; };
__device__ __forceinline__ void operand(u32 (&f)[4], const Pairs &a, int k) {
    f[0] = a.x[2 * k][0], f[1] = a.x[2 * k][1], f[2] = a.x[2 * k + 1][0], f[3] = a.x[2 * k + 1][1];
}
// The values of a tile (tokens x C) that a warp's 16 columns from `own` on have, turned.
__device__ __forceinline__ void turned_values(Pairs &a, u32 tile, int own) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
        u32 f[4];
        first_operand_turned<C>(f, tile, own, 16 * k);
        a.x[2 * k][0] = f[0], a.x[2 * k][1] = f[1], a.x[2 * k + 1][0] = f[2], a.x[2 * k + 1][1] = f[3];
    }
}
// Words i of four lanes side by side become words of lane i.
__device__ __forceinline__ uint4 across_four(u32 (&w)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const u32 other = __shfl_xor_sync(0xffffffff, odd ? w[i] : w[i + 1], 1);
        (odd ? w[i] : w[i + 1]) = other;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 other = __shfl_xor_sync(0xffffffff, upper ? w[i] : w[i + 2], 2);
        (upper ? w[i] : w[i + 2]) = other;
    }
    return make_uint4(w[0], w[1], w[2], w[3]);
}
// 16 columns (turned: rows) of the state before or after a chunk, to (v_dim x k_dim).
__device__ __forceinline__ void store_state(const float (&s)[16][4], bf16 *to) {
    to += ((threadIdx.x & 31) >> 2) * D + 8 * (threadIdx.x & 3);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int b = 0; b < 16; b += 4) {
            u32 w[4];
#pragma unroll
            for (int i = 0; i < 4; i++) w[i] = pack(s[b + i][2 * h], s[b + i][2 * h + 1]);
            *(uint4 *)(to + 8 * h * D + 8 * b) = across_four(w);
        }
}

// blockIdx: half of the state's columns, head, sequence; 256 threads; shared memory: the stages. `READS`: O is wanted; else N and the
// states before each chunk.
template <bool READS> __device__ __forceinline__ void go_forward(const Delta &d) {
    const int v0 = blockIdx.x * C, head = blockIdx.y;
    const int *sequence = d.sequences + 5 * blockIdx.z;
    const i64 ld = (i64)(2 * d.k_heads + d.heads) * D, ldo = (i64)d.heads * D, of_head = (i64)D * D;
    if (threadIdx.x >= 128) return bring<READS, true>(d, sequence, head, false, d.x + (2 * d.k_heads + head) * D + v0, ld);
    const int start = sequence[0], end = sequence[1], chunk0 = sequence[2], begins = sequence[3], ends = sequence[4];
    const int lane = threadIdx.x & 31, own = (threadIdx.x >> 5) * 16, row = lane >> 2, pair = 2 * (lane & 3);
    const int count = (end - start + C - 1) / C;
    const bool two = d.stages == 2;
    // s[b][e]: column own + row + 8 (e / 2) of the block's, row 8 b + pair + e % 2.
    float s[16][4];
    const i64 corner = head * of_head + pair * D + v0 + own + row;
#pragma unroll
    for (int b = 0; b < 16; b++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            s[b][e] = begins < 0 ? 0 : d.contexts[begins * d.heads * of_head + corner + (8 * b + (e & 1)) * D + 8 * (e >> 1)];
    for (int c = 0; c < count; c++) {
        const int first = start + c * C, n = min(C, end - first);
        const Staged in = staged(two ? c & 1 : 0);
        const float last = d.sums[(i64)head * d.rows + first + n - 1];
        // It is there, and nobody reads the other stage any more.
        __syncthreads();
        if constexpr (!READS) store_state(s, d.states + ((i64)(chunk0 + c) * d.heads + head) * of_head + (v0 + own) * D);
        // S^T K^T, S^T Q^T
        float x[8][4], o[8][4];
        clear(x);
        clear(o);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            u32 a[4], rest[4], f[4][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float (&from)[4] = s[2 * k + (i >> 1)];
                a[i] = pack(from[2 * (i & 1)], from[2 * (i & 1) + 1]);
                rest[i] = pack_rest(a[i], from[2 * (i & 1)], from[2 * (i & 1) + 1]);
            }
#pragma unroll
            for (int b = 0; b < 4; b++) second_operand_turned<D>(f[b], in.k, 16 * k, 16 * b);
#pragma unroll
            for (int b = 0; b < 4; b++) multiply(x, 2 * b, a, f[b]);
#pragma unroll
            for (int b = 0; b < 4; b++) multiply(x, 2 * b, rest, f[b]);
            if constexpr (READS) {
#pragma unroll
                for (int b = 0; b < 4; b++) second_operand_turned<D>(f[b], in.q, 16 * k, 16 * b);
#pragma unroll
                for (int b = 0; b < 4; b++) multiply(o, 2 * b, a, f[b]);
#pragma unroll
                for (int b = 0; b < 4; b++) multiply(o, 2 * b, rest, f[b]);
            }
        }
        // R = diag(beta) (V - diag(by_k) K S), turned, in two summands
        Pairs r, r_rest;
        turned_values(r, in.v, own);
#pragma unroll
        for (int b = 0; b < 8; b++) {
            const float2 beta = *(const float2 *)(in.beta + 8 * b + pair), by_k = *(const float2 *)(in.by_k + 8 * b + pair);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float y = beta.x * (low(r.x[b][h]) - by_k.x * x[b][2 * h]), z = beta.y * (high(r.x[b][h]) - by_k.y * x[b][2 * h + 1]);
                r.x[b][h] = pack(y, z);
                r_rest.x[b][h] = pack_rest(r.x[b][h], y, z);
            }
        }
        // N^T = R^T T^T
        clear(x);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 a[4], rest[4], f[4][4], f_rest[4][4];
            operand(a, r, k), operand(rest, r_rest, k);
#pragma unroll
            for (int b = k; b < 4; b++) {
                second_operand_turned<C>(f[b], in.t, 16 * k, 16 * b);
                second_operand_turned<C>(f_rest[b], in.t_rest, 16 * k, 16 * b);
            }
#pragma unroll
            for (int b = k; b < 4; b++) multiply(x, 2 * b, a, f[b]);
#pragma unroll
            for (int b = k; b < 4; b++) multiply(x, 2 * b, rest, f[b]);
#pragma unroll
            for (int b = k; b < 4; b++) multiply(x, 2 * b, a, f_rest[b]);
        }
        if constexpr (!READS) {
            bf16 *to = d.news + (i64)first * ldo + head * D + v0 + own + pair;
#pragma unroll
            for (int b = 0; b < 8; b++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const u32 both = turned(pack(x[b][2 * h], x[b][2 * h + 1]));
                    if (8 * b + row < n) *(u32 *)(to + (8 * b + row) * ldo + 8 * h) = both;
                }
        } else {
            // O^T = (Q S)^T diag(by_q) + N^T P^T
#pragma unroll
            for (int b = 0; b < 8; b++) {
                const float2 by_q = *(const float2 *)(in.by_q + 8 * b + pair);
                o[b][0] *= by_q.x, o[b][1] *= by_q.y, o[b][2] *= by_q.x, o[b][3] *= by_q.y;
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    r.x[b][h] = pack(x[b][2 * h], x[b][2 * h + 1]);
                    r_rest.x[b][h] = pack_rest(r.x[b][h], x[b][2 * h], x[b][2 * h + 1]);
                }
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
                u32 a[4], rest[4], f[4][4], f_rest[4][4];
                operand(a, r, k), operand(rest, r_rest, k);
#pragma unroll
                for (int b = k; b < 4; b++) {
                    second_operand_turned<C>(f[b], in.p, 16 * k, 16 * b);
                    second_operand_turned<C>(f_rest[b], in.p_rest, 16 * k, 16 * b);
                }
#pragma unroll
                for (int b = k; b < 4; b++) multiply(o, 2 * b, a, f[b]);
#pragma unroll
                for (int b = k; b < 4; b++) multiply(o, 2 * b, rest, f[b]);
#pragma unroll
                for (int b = k; b < 4; b++) multiply(o, 2 * b, a, f_rest[b]);
            }
            bf16 *to = d.out + (i64)first * ldo + head * D + v0 + own + pair;
#pragma unroll
            for (int b = 0; b < 8; b++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const u32 both = turned(pack(o[b][2 * h], o[b][2 * h + 1]));
                    if (8 * b + row < n) *(u32 *)(to + (8 * b + row) * ldo + 8 * h) = both;
                }
        }
        // S^T = e^G_last S^T + (diag(rest) N)^T K
#pragma unroll
        for (int b = 0; b < 8; b++) {
            const float2 by = *(const float2 *)(in.rest + 8 * b + pair);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float y = by.x * x[b][2 * h], z = by.y * x[b][2 * h + 1];
                r.x[b][h] = pack(y, z);
                r_rest.x[b][h] = pack_rest(r.x[b][h], y, z);
            }
        }
        const float whole = expf(last);
#pragma unroll
        for (int b = 0; b < 16; b++) s[b][0] *= whole, s[b][1] *= whole, s[b][2] *= whole, s[b][3] *= whole;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 a[4], rest[4];
            operand(a, r, k), operand(rest, r_rest, k);
#pragma unroll
            for (int part = 0; part < 8; part += 4) {
                u32 f[4][4];
#pragma unroll
                for (int b = 0; b < 4; b++) second_operand<D>(f[b], in.k, 16 * k, 16 * (part + b));
#pragma unroll
                for (int b = 0; b < 4; b++) multiply(s, 2 * (part + b), a, f[b]);
#pragma unroll
                for (int b = 0; b < 4; b++) multiply(s, 2 * (part + b), rest, f[b]);
            }
        }
        // What this chunk read is overwritten from here on.
        if (!two) __syncthreads();
    }
    if (ends < 0) return;
#pragma unroll
    for (int b = 0; b < 16; b++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            d.contexts[ends * d.heads * of_head + corner + (8 * b + (e & 1)) * D + 8 * (e >> 1)] = s[b][e];
}

extern "C" {
__global__ void __launch_bounds__(256, 1) delta_forward(Delta d) { go_forward<true>(d); }
__global__ void __launch_bounds__(256, 1) delta_news(Delta d) { go_forward<false>(d); }

// The same backwards, for the gradient of the state: X, and the gradient after each chunk.
__global__ void __launch_bounds__(256, 1) delta_states(Delta d) {
    const int v0 = blockIdx.x * C, head = blockIdx.y;
    const int *sequence = d.sequences + 5 * blockIdx.z;
    const i64 ldo = (i64)d.heads * D, of_head = (i64)D * D;
    if (threadIdx.x >= 128) return bring<true, false>(d, sequence, head, true, d.dout + head * D + v0, ldo);
    const int start = sequence[0], end = sequence[1], chunk0 = sequence[2];
    const int lane = threadIdx.x & 31, own = (threadIdx.x >> 5) * 16, row = lane >> 2, pair = 2 * (lane & 3);
    const int count = (end - start + C - 1) / C;
    const bool two = d.stages == 2;
    float s[16][4];
    clear(s);
    for (int c = count - 1; c >= 0; c--) {
        const int first = start + c * C, n = min(C, end - first);
        const Staged in = staged(two ? c & 1 : 0);
        const float last = d.sums[(i64)head * d.rows + first + n - 1];
        __syncthreads();
        store_state(s, d.dstates + ((i64)(chunk0 + c) * d.heads + head) * of_head + (v0 + own) * D);
        // dN^T = dS^T K^T diag(rest) + dO^T P
        float x[8][4];
        clear(x);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            u32 a[4], f[4][4];
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = pack(s[2 * k + (i >> 1)][2 * (i & 1)], s[2 * k + (i >> 1)][2 * (i & 1) + 1]);
#pragma unroll
            for (int b = 0; b < 4; b++) second_operand_turned<D>(f[b], in.k, 16 * k, 16 * b);
#pragma unroll
            for (int b = 0; b < 4; b++) multiply(x, 2 * b, a, f[b]);
        }
        Pairs up, r;
        turned_values(up, in.v, own);
#pragma unroll
        for (int b = 0; b < 8; b++) {
            const float2 by = *(const float2 *)(in.rest + 8 * b + pair);
            x[b][0] *= by.x, x[b][1] *= by.y, x[b][2] *= by.x, x[b][3] *= by.y;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 a[4], f[4][4];
            operand(a, up, k);
#pragma unroll
            for (int b = 0; b <= k; b++) second_operand<C>(f[b], in.p, 16 * k, 16 * b);
#pragma unroll
            for (int b = 0; b <= k; b++) multiply(x, 2 * b, a, f[b]);
        }
        // X^T = dN^T T
#pragma unroll
        for (int b = 0; b < 8; b++)
#pragma unroll
            for (int h = 0; h < 2; h++) r.x[b][h] = pack(x[b][2 * h], x[b][2 * h + 1]);
        clear(x);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 a[4], f[4][4];
            operand(a, r, k);
#pragma unroll
            for (int b = 0; b <= k; b++) second_operand<C>(f[b], in.t, 16 * k, 16 * b);
#pragma unroll
            for (int b = 0; b <= k; b++) multiply(x, 2 * b, a, f[b]);
        }
        // dS^T = e^G_last dS^T + dO^T diag(by_q) Q + Y^T K
        bf16 *to = d.solved + (i64)first * ldo + head * D + v0 + own + pair;
#pragma unroll
        for (int b = 0; b < 8; b++) {
            const float2 beta = *(const float2 *)(in.beta + 8 * b + pair), by_k = *(const float2 *)(in.by_k + 8 * b + pair),
                         by_q = *(const float2 *)(in.by_q + 8 * b + pair);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const u32 both = turned(pack(x[b][2 * h], x[b][2 * h + 1]));
                if (8 * b + row < n) *(u32 *)(to + (8 * b + row) * ldo + 8 * h) = both;
                up.x[b][h] = pack(by_q.x * low(up.x[b][h]), by_q.y * high(up.x[b][h]));
                r.x[b][h] = pack(-beta.x * by_k.x * x[b][2 * h], -beta.y * by_k.y * x[b][2 * h + 1]);
            }
        }
        const float whole = expf(last);
#pragma unroll
        for (int b = 0; b < 16; b++) s[b][0] *= whole, s[b][1] *= whole, s[b][2] *= whole, s[b][3] *= whole;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 a[4], y[4];
            operand(a, up, k), operand(y, r, k);
#pragma unroll
            for (int part = 0; part < 8; part += 4) {
                u32 f[4][4];
#pragma unroll
                for (int b = 0; b < 4; b++) second_operand<D>(f[b], in.q, 16 * k, 16 * (part + b));
#pragma unroll
                for (int b = 0; b < 4; b++) multiply(s, 2 * (part + b), a, f[b]);
#pragma unroll
                for (int b = 0; b < 4; b++) second_operand<D>(f[b], in.k, 16 * k, 16 * (part + b));
#pragma unroll
                for (int b = 0; b < 4; b++) multiply(s, 2 * (part + b), y, f[b]);
            }
        }
        if (!two) __syncthreads();
    }
}

// Gradients of one chunk of one value head: of q and k (by value head), v, the running sums' g, and beta. 512 threads; shared
// memory: q and k; N, X, dO (C x C) and S, dS (C x D, turned) of half of v's columns, or, with two stages, of either half; floats.
__global__ void __launch_bounds__(512, 1) delta_backward(Delta d) {
    const int chunk = blockIdx.x, head = blockIdx.y, k_head = head / (d.heads / d.k_heads);
    const int first = d.chunks[2 * chunk], n = d.chunks[2 * chunk + 1] - first;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, quarter = warp >> 2, m0 = (warp & 3) * 16, n0 = quarter * 16, d0 = quarter * 32;
    const i64 ld = (i64)(2 * d.k_heads + d.heads) * D, ldo = (i64)d.heads * D, of_head = (i64)D * D;
    static const int HALF = 3 * C * C * 2 + 2 * D * C * 2;
    const bool two = d.stages == 2;
    const u32 sq = (u32)__cvta_generic_to_shared(shared_memory), sk = sq + C * D * 2, halves = sk + C * D * 2;
    float *sums = (float *)(shared_memory + 2 * C * D * 2 + d.stages * HALF), *beta = sums + C, *lq = beta + C, *lk = lq + C;
    // By quarter of the columns: q's share of dG, what goes through r, k (X S^T), and of squares: rows of dG and of dbeta. By 16 rows: columns.
    float *of_q = lk + C, *of_r = of_q + 4 * C, *of_k = of_r + 4 * C, *of_rows = of_k + 4 * C, *of_beta = of_rows + 4 * C,
          *of_columns = of_beta + 4 * C, *of_v = of_columns + 4 * C, *of_states = of_v + C, *dsums = of_states + 16;
    auto fetch_half = [&](int i) {
        const u32 to = halves + (two ? i : 0) * HALF;
        const i64 rows = (i64)first * ldo + head * D + i * C, state = ((i64)chunk * d.heads + head) * of_head + i * C * D;
        fetch<C, 512>(to, d.news + rows, ldo, n);
        fetch<C, 512>(to + C * C * 2, d.solved + rows, ldo, n);
        fetch<C, 512>(to + 2 * C * C * 2, d.dout + rows, ldo, n);
        fetch<D, 512>(to + 3 * C * C * 2, d.states + state, D, C);
        fetch<D, 512>(to + 5 * C * C * 2, d.dstates + state, D, C);
        copies_end();
    };
    fetch_half(0);
    fetch<D, 512>(sq, d.x + (i64)first * ld + k_head * D, ld, n);
    fetch<D, 512>(sk, d.x + (i64)first * ld + (d.k_heads + k_head) * D, ld, n);
    if (two) fetch_half(1);
    else copies_end();
    if (threadIdx.x < C) {
        // Rows that are not there go on as the last one is: differences of sums must not overflow.
        const i64 i = (i64)head * d.rows + first;
        sums[threadIdx.x] = d.sums[i + min((int)threadIdx.x, n - 1)];
        const i64 row = first + threadIdx.x;
        beta[threadIdx.x] = threadIdx.x < n ? d.beta[i + threadIdx.x] : 0;
        lq[threadIdx.x] = threadIdx.x < n ? d.lengths[(i64)k_head * d.rows + row] : 0;
        lk[threadIdx.x] = threadIdx.x < n ? d.lengths[(i64)(d.k_heads + k_head) * d.rows + row] : 0;
    }
    // Squares from the diagonal down only.
    const bool below = n0 <= m0;
    float dp[2][4], xn[2][4], dq[4][4], dk[4][4], xs[4][4], states = 0, of_value = 0;
    clear(dp);
    clear(xn);
    clear(dq);
    clear(dk);
    clear(xs);
    for (int v0 = 0; v0 < D; v0 += C) {
        const u32 sn = halves + (two && v0 ? HALF : 0), sx = sn + C * C * 2, so = sx + C * C * 2, ss = so + C * C * 2, sd = ss + D * C * 2;
        // Eight columns of a row a thread.
        const int r = threadIdx.x >> 3, c0 = (threadIdx.x & 7) * 8;
        uint4 values = {};
        if (r < n) values = *(const uint4 *)(d.x + (i64)(first + r) * ld + (2 * d.k_heads + head) * D + v0 + c0);
        if (two && v0 == 0) copies_wait<1>();
        else copies_wait<0>();
        __syncthreads();
#pragma unroll
        for (int k = 0; k < C; k += 16) {
            u32 fo[4], fx[4], fn[4], f[4];
            first_operand<C>(fo, so, m0, k);
            first_operand<C>(fx, sx, m0, k);
            first_operand<C>(fn, sn, m0, k);
            if (below) {
                second_operand_turned<C>(f, sn, k, n0);
                multiply(dp, 0, fo, f);
                multiply(xn, 0, fx, f);
            }
#pragma unroll
            for (int b = 0; b < 2; b++) {
                second_operand<D>(f, ss, k, d0 + 16 * b);
                multiply(dq, 2 * b, fo, f);
                multiply(xs, 2 * b, fx, f);
                second_operand<D>(f, sd, k, d0 + 16 * b);
                multiply(dk, 2 * b, fn, f);
            }
        }
        auto both = [&](const uint4 &a, const uint4 &b) {
            return low(a.x) * low(b.x) + high(a.x) * high(b.x) + low(a.y) * low(b.y) + high(a.y) * high(b.y) + low(a.z) * low(b.z) +
                   high(a.z) * high(b.z) + low(a.w) * low(b.w) + high(a.w) * high(b.w);
        };
        for (int i = threadIdx.x; i < D * C / 8; i += 512)
            states += both(*(const uint4 *)(shared_memory + (ss - sq) + 16 * i), *(const uint4 *)(shared_memory + (sd - sq) + 16 * i));
        if (r < n) {
            bf16 *to = d.dv + (i64)(first + r) * ldo + head * D + v0 + c0;
            const float by = beta[r];
            const uint4 a = *(const uint4 *)(shared_memory + at<C>(sx - sq, r, c0 >> 3));
            of_value += both(a, values);
            *(uint4 *)to = make_uint4(pack(by * low(a.x), by * high(a.x)), pack(by * low(a.y), by * high(a.y)),
                                      pack(by * low(a.z), by * high(a.z)), pack(by * low(a.w), by * high(a.w)));
        }
        __syncthreads();
        if (!two && v0 == 0) fetch_half(1);
    }
    of_value = quad_sum(of_value);
    of_value += __shfl_xor_sync(0xffffffff, of_value, 4);
    if ((threadIdx.x & 7) == 0) of_v[threadIdx.x >> 3] = of_value;
#pragma unroll
    for (int w = 16; w; w /= 2) states += __shfl_xor_sync(0xffffffff, states, w);
    if (lane == 0) of_states[warp] = states;

    float kk[2][4], qk[2][4];
    clear(kk);
    clear(qk);
#pragma unroll
    for (int k = 0; k < D; k += 16) {
        u32 fk[4], fq[4], f[4];
        if (!below) continue;
        first_operand<D>(fk, sk, m0, k);
        first_operand<D>(fq, sq, m0, k);
        second_operand_turned<D>(f, sk, k, n0);
        multiply(kk, 0, fk, f);
        multiply(qk, 0, fq, f);
    }
    // dP * D takes a state's place, and so does -beta X N^T * D below the diagonal, with its transpose above it, times both rows'
    // lengths: so they give gradients of q and k times their lengths, which is what is wanted.
    const u32 sp = halves + 3 * C * C * 2, sa = sp + C * C * 2;
    float by_row[2] = {0, 0}, by_beta[2] = {0, 0};
#pragma unroll
    for (int b = 0; b < 2; b++) {
        float by_column[2] = {0, 0};
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            if (!below) continue;
            const int i = row_in(m0, e), j = column_in(n0, b), place = (n0 >> 3) + b - (m0 >> 3) - (e >> 1);
            float p[2], a[2];
#pragma unroll
            for (int x = 0; x < 2; x++) {
                const float decay = j + x <= i ? lk[j + x] * expf(sums[i] - sums[j + x]) : 0;
                p[x] = lq[i] * dp[b][e + x] * decay;
                const float da = j + x < i ? -lk[i] * xn[b][e + x] * decay : 0, through_beta = da * kk[b][e + x];
                a[x] = j + x < i ? beta[i] * da : 0;
                const float through = p[x] * qk[b][e + x] + beta[i] * through_beta;
                by_row[e >> 1] += through;
                by_column[x] += through;
                by_beta[e >> 1] += through_beta;
            }
            store_word(pair_at<C>(sp, i, j), pack(p[0], p[1]));
            const u32 of_a = pack(a[0], a[1]), across = turned(of_a);
            if (place <= 0) store_word(pair_at<C>(sa, i, j), place == 0 ? of_a | across : of_a);
            if (place < 0) store_word(pair_at<C>(sa, n0 + 8 * b + (lane >> 2), m0 + 4 * e + 2 * (lane & 3)), across);
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
        for (int b = 0; b < 4; b++) {
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
            of_q[quarter * C + i] = q_share, of_r[quarter * C + i] = r_share, of_k[quarter * C + i] = k_share;
            of_rows[quarter * C + i] = row, of_beta[quarter * C + i] = of_b;
        }
    }
    __syncthreads();
    if (threadIdx.x < C) {
        const int i = threadIdx.x;
        auto all = [&](const float *x) { return (x[i] + x[C + i]) + (x[2 * C + i] + x[3 * C + i]); };
        const float kept = expf(sums[i]), through = all(of_r), ks = kept * lk[i] * all(of_k);
        float sum = all(of_q) - through - beta[i] * ks + all(of_rows);
        for (int w = 0; w < 4; w++) sum -= of_columns[w * C + i];
        dsums[i] = sum;
        dsums[C + i] = through;
        if (i < n) d.dbeta[(i64)head * d.rows + first + i] = all(of_beta) + of_v[i] - ks;
    }
#pragma unroll
    for (int k = 0; k < C; k += 16) {
        u32 fp[4], across[4], fa[4], f[4];
        first_operand<C>(fa, sa, m0, k);
        if (k <= m0) first_operand<C>(fp, sp, m0, k);
        if (k >= m0) first_operand_turned<C>(across, sp, m0, k);
#pragma unroll
        for (int b = 0; b < 2; b++) {
            second_operand<D>(f, sk, k, d0 + 16 * b);
            multiply(dk, 2 * b, fa, f);
            if (k <= m0) multiply(dq, 2 * b, fp, f);
            if (k >= m0) {
                second_operand<D>(f, sq, k, d0 + 16 * b);
                multiply(dk, 2 * b, across, f);
            }
        }
    }
#pragma unroll
    for (int b = 0; b < 4; b++)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            const int i = row_in(m0, e), j = column_in(d0, b);
            if (i >= n) continue;
            const i64 to = (i64)(first + i) * ldo + head * D + j;
            *(u32 *)(d.dq + to) = pack(dq[b][e], dq[b][e + 1]);
            *(u32 *)(d.dk + to) = pack(dk[b][e], dk[b][e + 1]);
        }
    __syncthreads();
    // G is a running sum; through its last value go S and what r scales. Sums of what comes after, a warp's 32 rows and the
    // other's.
    if (threadIdx.x < C) {
        float all = 0, of_last = dsums[C + (threadIdx.x ^ 32)] + dsums[C + threadIdx.x], sum = dsums[threadIdx.x], other = dsums[threadIdx.x ^ 32];
        for (int w = 0; w < 16; w++) all += of_states[w];
#pragma unroll
        for (int w = 16; w; w /= 2) of_last += __shfl_xor_sync(0xffffffff, of_last, w), other += __shfl_xor_sync(0xffffffff, other, w);
#pragma unroll
        for (int w = 1; w < 32; w *= 2) {
            const float after = __shfl_down_sync(0xffffffff, sum, w);
            if (lane + w < 32) sum += after;
        }
        if (threadIdx.x < 32) sum += other;
        if (threadIdx.x < n) d.dg[(i64)head * d.rows + first + threadIdx.x] = sum + all * expf(last) + of_last;
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
