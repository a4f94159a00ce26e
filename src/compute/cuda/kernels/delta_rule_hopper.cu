// archs: 90a
//
// What goes from chunk to chunk in delta_rule.cu, in Hopper's own way: products of whole warp groups (wgmma), whose first operand is
// in registers, 64 columns of a head's state or of what is made of it, turned, and whose second one is a tile in shared memory. See
// there for the arguments, the arithmetic and which product has how many summands; blocks are the same. A block is four warps
// that work and four that bring the next chunks.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;
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
__device__ __forceinline__ float low(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(u32 x) { return __uint_as_float(x & 0xffff0000); }
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
// What pack lost of these.
__device__ __forceinline__ u32 pack_rest(u32 packed, float first, float second) {
    return pack(first - low(packed), second - high(packed));
}
// 16 bytes, or 4, from global to shared memory, or zeros.
__device__ __forceinline__ void copy16(u32 to, const void *from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy4(u32 to, const void *from, bool real) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(real ? 4 : 0) : "memory");
}
__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
__device__ __forceinline__ void load4_turned(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
// An 8 x 8 of bf16, a pair of a row a lane, turned: a pair of a column.
__device__ __forceinline__ u32 turned(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
// Is this of the warps that bring? The same in all threads of a warp, which the assembler cannot know.
__device__ __forceinline__ bool brings() { return __shfl_sync(0xffffffff, (int)(threadIdx.x >> 7), 0); }
__device__ __forceinline__ void bringers_meet() { asm volatile("bar.sync 1, 128;" ::: "memory"); }
// What was copied is there for products too.
__device__ __forceinline__ void show() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Results of products are there from here on: nothing that reads them moves up.
template <int N> __device__ __forceinline__ void arrived(float (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");
}

#define F4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define F16(c, i) F4(c, i), F4(c, i + 4), F4(c, i + 8), F4(c, i + 12)
#define REGISTERS_64 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define OPERANDS_64(c) F16(c, 0), F16(c, 16)
#define REGISTERS_128 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define OPERANDS_128(c) F16(c, 0), F16(c, 16), F16(c, 32), F16(c, 48)

// c (64 x 64) = or += a (64 x 16, in registers) b (16 x 64, along k).
__device__ __forceinline__ void product(float (&c)[32], const u32 (&a)[4], u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_64 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;}"
                 : OPERANDS_64(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
// The same of b by rows of k.
__device__ __forceinline__ void product_turned(float (&c)[32], const u32 (&a)[4], u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_64 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;}"
                 : OPERANDS_64(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
// c (64 x 128) += a (64 x 16, in registers) b (16 x 128, rows of k).
__device__ __forceinline__ void product_turned(float (&c)[64], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_128 "}, {%64,%65,%66,%67}, "
                 "%68, 1, 1, 1, 1;"
                 : OPERANDS_128(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

extern __shared__ __align__(128) unsigned char shared_memory[];
__device__ __forceinline__ u32 shared_start() { return ((u32)__cvta_generic_to_shared(shared_memory) + 1023) & ~1023u; }

// A tile is 64 rows of 64 columns, chunks of 16 bytes swapped by row (the "128-byte swizzle" of products' descriptions); K and Q are
// two of them side by side. Chunk c of row r:
static const u32 TILE = C * C * 2;
__device__ __forceinline__ u32 at(u32 base, int r, int c) { return base + r * 128 + ((c ^ (r & 7)) << 4); }
__device__ __forceinline__ u64 describe(u32 address, u32 leading, u32 stride) {
    // The same in all threads of a warp, which the assembler cannot know.
    const u32 low = __shfl_sync(0xffffffff, (address & 0x3ffff) >> 4 | (leading >> 4) << 16, 0);
    return (u64)low | (u64)(stride >> 4) << 32 | 1ull << 62;
}
// Tiles with k along the rows, and columns 16 x ... of them.
__device__ __forceinline__ u64 along(u32 base) { return describe(base, 16, 1024); }
__device__ __forceinline__ u64 columns(u64 along, int x) { return along + ((x >> 2) * TILE + (x & 3) * 32) / 16; }
// Tiles with k from row to row, and rows 16 x ... of them.
__device__ __forceinline__ u64 across(u32 base) { return describe(base, TILE, 1024); }
__device__ __forceinline__ u64 rows(u64 across, int x) { return across + x * 2048 / 16; }

// Starts the copy of 64 rows of 64 columns, ld apart; those from `real` on are zeros. By 128 threads.
__device__ __forceinline__ void fetch(u32 to, const bf16 *from, i64 ld, int real) {
    const int c = threadIdx.x & 7, r0 = (threadIdx.x & 127) >> 3;
    const u32 place = at(to, r0, c);
    from += c * 8;
#pragma unroll
    for (int i = 0; i < C / 16; i++) {
        const int r = r0 + i * 16;
        copy16(place + i * 16 * 128, from + (r < real ? r * ld : 0), r < real);
    }
}
// The same of a square's blocks of 16 x 16 on the diagonal and below it. What is above is zero from the start.
__device__ __forceinline__ void fetch_below(u32 to, const bf16 *from) {
    const int c = threadIdx.x & 7, r0 = (threadIdx.x & 127) >> 3;
    const u32 place = at(to, r0, c);
    from += r0 * C + c * 8;
#pragma unroll
    for (int i = 0; i < C / 16; i++)
        if (c < 2 * (i + 1)) copy16(place + i * 16 * 128, from + i * 16 * C, true);
}

// What a chunk needs: K, Q, T, P and V or dO, what is left of T and P; beta, by_k, by_q and rest.
static const u32 STAGE = 9 * TILE + 4 * C * 4;
static const int STAGES = 3;

struct Staged { u32 k, q, t, p, v, t_rest, p_rest; const float *beta, *by_k, *by_q, *rest; };

__device__ __forceinline__ Staged staged(int stage) {
    const u32 start = shared_start(), base = start + stage * STAGE;
    const float *floats = (const float *)(shared_memory + (base - (u32)__cvta_generic_to_shared(shared_memory)) + 9 * TILE);
    return Staged{base, base + 2 * TILE, base + 4 * TILE, base + 5 * TILE, base + 6 * TILE, base + 7 * TILE,
                  base + 8 * TILE, floats, floats + C, floats + 2 * C, floats + 3 * C};
}
// By 128 threads. `WHOLE`: with what is left of T and P; `READS`: with what reads from the state.
template <bool READS, bool WHOLE>
__device__ __forceinline__ void stage_chunk(const Delta &d, int stage, int first, int n, int chunk, int head, int k_head, const bf16 *v, i64 ldv) {
    const Staged s = staged(stage);
    const i64 ld = (i64)(2 * d.k_heads + d.heads) * D, square = ((i64)chunk * d.heads + head) * 2 * C * C;
    const bf16 *k = d.x + (i64)first * ld + (d.k_heads + k_head) * D;
    fetch(s.k, k, ld, n);
    fetch(s.k + TILE, k + C, ld, n);
    fetch_below(s.t, d.inverse + square);
    if constexpr (WHOLE) fetch_below(s.t_rest, d.inverse + square + C * C);
    fetch(s.v, v + (i64)first * ldv, ldv, n);
    if constexpr (READS) {
        const bf16 *q = d.x + (i64)first * ld + k_head * D;
        fetch(s.q, q, ld, n);
        fetch(s.q + TILE, q + C, ld, n);
        fetch_below(s.p, d.scores + square);
        if constexpr (WHOLE) fetch_below(s.p_rest, d.scores + square + C * C);
    }
    // Four rows of C floats, two at a time.
    const int r = threadIdx.x & (C - 1);
    const bool second = threadIdx.x & C;
    const i64 from = (i64)head * d.rows + first + (r < n ? r : 0);
    const u32 to = s.v + 3 * TILE + (threadIdx.x & 127) * 4;
    copy4(to, (second ? d.by_k : d.beta) + from, r < n);
    copy4(to + 2 * C * 4, (second ? d.rest : d.by_q) + from, r < n);
}

// What the second half of a block of 256 does: chunk after chunk comes to its stage, while the first half works on those before it.
template <bool READS, bool WHOLE>
__device__ __forceinline__ void bring(const Delta &d, const int *sequence, int head, bool backwards, const bf16 *v, i64 ldv) {
    const int start = sequence[0], end = sequence[1], chunk0 = sequence[2], count = (end - start + C - 1) / C;
    const int k_head = head / (d.heads / d.k_heads);
    uint4 *squares = (uint4 *)(shared_memory + (shared_start() - (u32)__cvta_generic_to_shared(shared_memory)));
    for (u32 i = threadIdx.x & 127; i < STAGES * STAGE / 16; i += 128) squares[i] = make_uint4(0, 0, 0, 0);
    // Zeros of others lie where this thread copies to.
    bringers_meet();
    auto ask = [&](int i) {
        const int c = backwards ? count - 1 - i : i;
        if (i < count)
            stage_chunk<READS, WHOLE>(d, i % STAGES, start + c * C, min(C, end - start - c * C), chunk0 + c, head, k_head, v, ldv);
        copies_end();
    };
    for (int i = 0; i + 1 < STAGES; i++) ask(i);
    for (int i = 0; i < count; i++) {
        copies_wait<STAGES - 2>();
        show();
        // From here on the chunk before this one is worked on no more.
        __syncthreads();
        ask(i + STAGES - 1);
    }
}

// Operands of products over tokens: a[k], 16 of them each, of the 16 columns that a warp has, turned.
struct Pairs { u32 x[4][4]; };
// What lies in a tile (tokens x C).
__device__ __forceinline__ void turned_values(Pairs &a, u32 tile, int own) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < 4; k++)
        load4_turned(a.x[k], at(tile, 16 * k + ((lane >> 4) << 3) + (lane & 7), (own >> 3) + ((lane >> 3) & 1)));
}
// Element pair i of operand k is of tokens 8 (2 k + i / 2) + pair, and of column row + 8 (i % 2): that is c[8 k + 4 (i / 2) + 2 (i % 2)].
#define TOKENS _Pragma("unroll") for (int k = 0; k < 4; k++) _Pragma("unroll") for (int i = 0; i < 4; i++)
#define TOKEN (8 * (2 * k + (i >> 1)) + pair)
#define ELEMENT (8 * k + 4 * (i >> 1) + 2 * (i & 1))
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
// 16 columns (turned: rows) of the state before or after a chunk, as operands have it, to (v_dim x k_dim).
__device__ __forceinline__ void store_state(const u32 (&s)[8][4], bf16 *to) {
    to += ((threadIdx.x & 31) >> 2) * D + 8 * (threadIdx.x & 3);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int k = 0; k < 8; k += 2) {
            u32 w[4] = {s[k][h], s[k][2 + h], s[k + 1][h], s[k + 1][2 + h]};
            *(uint4 *)(to + 8 * h * D + 16 * k) = across_four(w);
        }
}
// A row of columns' values of each token, rows ldo apart, of which n are there.
__device__ __forceinline__ void store_values(const float (&c)[32], bf16 *to, i64 ldo, int n) {
    const int lane = threadIdx.x & 31, row = lane >> 2;
    to += 2 * (lane & 3);
    TOKENS {
        const u32 both = turned(pack(c[ELEMENT], c[ELEMENT + 1]));
        const int t = 8 * (2 * k + (i >> 1)) + row;
        if (t < n) *(u32 *)(to + t * ldo + 8 * (i & 1)) = both;
    }
}

// blockIdx: half of the state's columns, head, sequence; 256 threads; shared memory: the stages. `READS`: O is wanted; else N and the
// states before each chunk.
template <bool READS> __device__ __forceinline__ void go_forward(const Delta &d) {
    const int v0 = blockIdx.x * C, head = blockIdx.y;
    const int *sequence = d.sequences + 5 * blockIdx.z;
    const i64 ld = (i64)(2 * d.k_heads + d.heads) * D, ldo = (i64)d.heads * D, of_head = (i64)D * D;
    if (brings()) return bring<READS, true>(d, sequence, head, false, d.x + (2 * d.k_heads + head) * D + v0, ld);
    const int start = sequence[0], end = sequence[1], chunk0 = sequence[2], begins = sequence[3], ends = sequence[4];
    const int lane = threadIdx.x & 31, own = (threadIdx.x >> 5) * 16, row = lane >> 2, pair = 2 * (lane & 3);
    const int count = (end - start + C - 1) / C;
    // s[4 b + e]: column own + row + 8 (e / 2) of the block's, row 8 b + pair + e % 2.
    float s[64];
    const i64 corner = head * of_head + pair * D + v0 + own + row;
#pragma unroll
    for (int b = 0; b < 16; b++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            s[4 * b + e] = begins < 0 ? 0 : d.contexts[begins * d.heads * of_head + corner + (8 * b + (e & 1)) * D + 8 * (e >> 1)];
    for (int c = 0; c < count; c++) {
        const int first = start + c * C, n = min(C, end - first);
        const Staged in = staged(c % STAGES);
        const float last = d.sums[(i64)head * d.rows + first + n - 1];
        const u64 k_along = along(in.k), q_along = along(in.q), t_along = along(in.t), t_rest = along(in.t_rest),
                  p_along = along(in.p), p_rest = along(in.p_rest), k_across = across(in.k);
        u32 whole[8][4], left[8][4];
#pragma unroll
        for (int k = 0; k < 8; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float x = s[8 * k + 2 * i], y = s[8 * k + 2 * i + 1];
                whole[k][i] = pack(x, y);
                left[k][i] = pack_rest(whole[k][i], x, y);
            }
        // It is there, and nobody reads the other stage any more.
        __syncthreads();
        // S^T K^T, S^T Q^T
        float x[32], o[32];
        products_begin();
#pragma unroll
        for (int k = 0; k < 8; k++) product(x, whole[k], columns(k_along, k), k > 0), product(x, left[k], columns(k_along, k), 1);
        products_end();
        if constexpr (READS) {
#pragma unroll
            for (int k = 0; k < 8; k++) product(o, whole[k], columns(q_along, k), k > 0), product(o, left[k], columns(q_along, k), 1);
            products_end();
        }
        if constexpr (!READS) store_state(whole, d.states + ((i64)(chunk0 + c) * d.heads + head) * of_head + (v0 + own) * D);
        Pairs r, r_rest;
        turned_values(r, in.v, own);
        const float decay = expf(last);
        products_wait<READS ? 1 : 0>();
        arrived(x);
        // R = diag(beta) (V - diag(by_k) K S), turned, in two summands
        TOKENS {
            const float2 beta = *(const float2 *)(in.beta + TOKEN), by_k = *(const float2 *)(in.by_k + TOKEN);
            const float y = beta.x * (low(r.x[k][i]) - by_k.x * x[ELEMENT]), z = beta.y * (high(r.x[k][i]) - by_k.y * x[ELEMENT + 1]);
            r.x[k][i] = pack(y, z);
            r_rest.x[k][i] = pack_rest(r.x[k][i], y, z);
        }
        // N^T = R^T T^T
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; k++) {
            product(x, r.x[k], columns(t_along, k), k > 0);
            product(x, r_rest.x[k], columns(t_along, k), 1);
            product(x, r.x[k], columns(t_rest, k), 1);
        }
        products_end();
        products_wait<0>();
        arrived(x);
        if constexpr (READS) {
            arrived(o);
            // O^T = (Q S)^T diag(by_q) + N^T P^T
            TOKENS {
                const float2 by_q = *(const float2 *)(in.by_q + TOKEN);
                o[ELEMENT] *= by_q.x, o[ELEMENT + 1] *= by_q.y;
                r.x[k][i] = pack(x[ELEMENT], x[ELEMENT + 1]);
                r_rest.x[k][i] = pack_rest(r.x[k][i], x[ELEMENT], x[ELEMENT + 1]);
            }
            products_begin();
#pragma unroll
            for (int k = 0; k < 4; k++) {
                product(o, r.x[k], columns(p_along, k), 1);
                product(o, r_rest.x[k], columns(p_along, k), 1);
                product(o, r.x[k], columns(p_rest, k), 1);
            }
            products_end();
        }
        // S^T = e^G_last S^T + (diag(rest) N)^T K
        Pairs n_whole, n_left;
        TOKENS {
            const float2 by = *(const float2 *)(in.rest + TOKEN);
            const float y = by.x * x[ELEMENT], z = by.y * x[ELEMENT + 1];
            n_whole.x[k][i] = pack(y, z);
            n_left.x[k][i] = pack_rest(n_whole.x[k][i], y, z);
        }
#pragma unroll
        for (int b = 0; b < 64; b++) s[b] *= decay;
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; k++) product_turned(s, n_whole.x[k], rows(k_across, k)), product_turned(s, n_left.x[k], rows(k_across, k));
        products_end();
        if constexpr (READS) {
            products_wait<1>();
            arrived(o);
            store_values(o, d.out + (i64)first * ldo + head * D + v0 + own, ldo, n);
        } else store_values(x, d.news + (i64)first * ldo + head * D + v0 + own, ldo, n);
        products_wait<0>();
        arrived(s);
    }
    if (ends < 0) return;
#pragma unroll
    for (int b = 0; b < 16; b++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            d.contexts[ends * d.heads * of_head + corner + (8 * b + (e & 1)) * D + 8 * (e >> 1)] = s[4 * b + e];
}

extern "C" {
__global__ void __launch_bounds__(256, 1) hopper_delta_forward(Delta d) { go_forward<true>(d); }
__global__ void __launch_bounds__(256, 1) hopper_delta_news(Delta d) { go_forward<false>(d); }

// The same backwards, for the gradient of the state: X, and the gradient after each chunk.
__global__ void __launch_bounds__(256, 1) hopper_delta_states(Delta d) {
    const int v0 = blockIdx.x * C, head = blockIdx.y;
    const int *sequence = d.sequences + 5 * blockIdx.z;
    const i64 ldo = (i64)d.heads * D, of_head = (i64)D * D;
    if (brings()) return bring<true, false>(d, sequence, head, true, d.dout + head * D + v0, ldo);
    const int start = sequence[0], end = sequence[1], chunk0 = sequence[2];
    const int lane = threadIdx.x & 31, own = (threadIdx.x >> 5) * 16, pair = 2 * (lane & 3);
    const int count = (end - start + C - 1) / C;
    float s[64];
#pragma unroll
    for (int b = 0; b < 64; b++) s[b] = 0;
    for (int i = 0; i < count; i++) {
        const int c = count - 1 - i, first = start + c * C, n = min(C, end - first);
        const Staged in = staged(i % STAGES);
        const float last = d.sums[(i64)head * d.rows + first + n - 1];
        const u64 k_along = along(in.k), k_across = across(in.k), q_across = across(in.q), t_across = across(in.t), p_across = across(in.p);
        u32 whole[8][4];
#pragma unroll
        for (int k = 0; k < 8; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) whole[k][i] = pack(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
        __syncthreads();
        // dN^T = dS^T K^T diag(rest) + dO^T P
        float x[32];
        products_begin();
#pragma unroll
        for (int k = 0; k < 8; k++) product(x, whole[k], columns(k_along, k), k > 0);
        products_end();
        Pairs up, scaled, r;
        turned_values(up, in.v, own);
        // dS^T = e^G_last dS^T + dO^T diag(by_q) Q + Y^T K
        TOKENS {
            const float2 by_q = *(const float2 *)(in.by_q + TOKEN);
            scaled.x[k][i] = pack(by_q.x * low(up.x[k][i]), by_q.y * high(up.x[k][i]));
        }
        const float decay = expf(last);
#pragma unroll
        for (int b = 0; b < 64; b++) s[b] *= decay;
        store_state(whole, d.dstates + ((i64)(chunk0 + c) * d.heads + head) * of_head + (v0 + own) * D);
        products_wait<0>();
        arrived(x);
        TOKENS {
            const float2 by = *(const float2 *)(in.rest + TOKEN);
            x[ELEMENT] *= by.x, x[ELEMENT + 1] *= by.y;
        }
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; k++) product_turned(x, up.x[k], rows(p_across, k), 1);
        products_end();
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; k++) product_turned(s, scaled.x[k], rows(q_across, k));
        products_end();
        products_wait<1>();
        arrived(x);
        // X^T = dN^T T
        TOKENS r.x[k][i] = pack(x[ELEMENT], x[ELEMENT + 1]);
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; k++) product_turned(x, r.x[k], rows(t_across, k), k > 0);
        products_end();
        products_wait<0>();
        arrived(x);
        arrived(s);
        TOKENS {
            const float2 beta = *(const float2 *)(in.beta + TOKEN), by_k = *(const float2 *)(in.by_k + TOKEN);
            r.x[k][i] = pack(-beta.x * by_k.x * x[ELEMENT], -beta.y * by_k.y * x[ELEMENT + 1]);
        }
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; k++) product_turned(s, r.x[k], rows(k_across, k));
        products_end();
        store_values(x, d.solved + (i64)first * ldo + head * D + v0 + own, ldo, n);
        products_wait<0>();
        arrived(s);
    }
}
}
