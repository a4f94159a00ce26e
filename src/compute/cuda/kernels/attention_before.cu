// archs: 90a
//
// The same as attention.cu for head dimensions up to 128, with Hopper's products of whole warp groups (wgmma): 64 rows of
// accumulators to four warps, operands read from shared memory. See there for the arguments and the arithmetic, and
// Shah et al., FlashAttention-3 (arXiv 2407.08608), for what runs while what: a group's next scores are in the making while
// it works on its softmax.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct Attention {
    const bf16 *q, *k, *v;
    bf16 *out;
    float *log_sums;
    const bf16 *dout;
    const float *delta;
    bf16 *dq, *dk, *dv;
    const int *tiles;
    i64 ldq, ldk, ldv, ldo, lddq, lddk;
    int log_rows, log_shift;
    int q_shift;
    int group, d, window;
    float scale;
};

struct Tile { int first, end, prefix, length, start, stop; };

__device__ __forceinline__ Tile tile_at(const Attention &a, int i) {
    const int *t = a.tiles + 6 * i;
    return Tile{t[0], t[1], t[2], t[3], t[4], t[5]};
}

__device__ __forceinline__ int row_of(const Tile &t, int p) {
    return p + (p < t.length ? t.prefix : t.start - t.length);
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
// 16 or 4 bytes from global to shared memory, or zeros without a look at `from`.
__device__ __forceinline__ void copy16(u32 to, const void *from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy4(u32 to, const void *from, bool real) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(real ? 4 : 0) : "memory");
}
__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but the last N groups of copies of every thread, and shows them to products.
template <int N> __device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
}
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
// What `sign` comes of, which is never negative, is done before the wait that follows: the assembler would else wait first,
// and nothing would run beside the products. A branch on it is what it does not move a wait across; asleep for no time, a
// thread would lose nothing.
__device__ __forceinline__ void before_wait(float sign) {
    if (sign < 0) asm volatile("nanosleep.u32 0;" ::: "memory");
}
// The same of many numbers that are never negative: the sign of all of them is that of their bits together.
template <int N> __device__ __forceinline__ void before_wait(const float (&x)[N]) {
    int all = 0;
#pragma unroll
    for (int i = 0; i < N; i++) all |= __float_as_int(x[i]);
    if (all < 0) asm volatile("nanosleep.u32 0;" ::: "memory");
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

// c (64 x 64) = or += a (64 x 16) b (16 x 64), both in shared memory along k.
__device__ __forceinline__ void product(float (&c)[32], u64 a, u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_64 "}, %32, %33, p, 1, 1, 0, 0;}"
                 : OPERANDS_64(c) : "l"(a), "l"(b), "r"(add));
}
// c (64 x 64) += a (64 x 16, in registers) b (16 x 64, rows of k).
__device__ __forceinline__ void product_turned(float (&c)[32], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_64 "}, {%32,%33,%34,%35}, "
                 "%36, 1, 1, 1, 1;"
                 : OPERANDS_64(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// c (64 x 128) = or += a (64 x 16) b (16 x 128), both in shared memory along k.
__device__ __forceinline__ void product(float (&c)[64], u64 a, u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_128 "}, %64, %65, p, 1, 1, 0, 0;}"
                 : OPERANDS_128(c) : "l"(a), "l"(b), "r"(add));
}
// c (64 x 128) += a (64 x 16, in registers) b (16 x 128, rows of k).
__device__ __forceinline__ void product_turned(float (&c)[64], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_128 "}, {%64,%65,%66,%67}, "
                 "%68, 1, 1, 1, 1;"
                 : OPERANDS_128(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

static const float LOG2E = 1.4426950408889634f;
#define INFINITY __int_as_float(0x7f800000)
// Two groups of four warps, 64 rows each.
static const int THREADS = 256, BM = 128;
extern __shared__ unsigned char shared_memory[];

__device__ __forceinline__ u32 shared_start() {
    return ((u32)__cvta_generic_to_shared(shared_memory) + 1023) & ~1023u;
}

// A tile lies in panels of 64 columns (128 bytes a row), ROWS x 128 bytes each, chunks of 16 bytes swapped by row: the
// "128-byte swizzle" of the products' descriptions. Chunk c of row r:
template <int ROWS> __device__ __forceinline__ u32 at(u32 base, int r, int c) {
    return base + (c >> 3) * (ROWS * 128) + r * 128 + (((c ^ r) & 7) << 4);
}

// Starts the copy of ROWS rows into shared memory; row(i, real) is the row to take, where `real`, else zeros are. Few
// instructions a copy, and no copy's wait for another's: this is a third of what a block's threads do.
template <int D, int ROWS, typename F>
__device__ __forceinline__ void fetch(u32 to, const bf16 *from, i64 ld, int d, F row) {
    const int STEP = THREADS / (D / 8), c = threadIdx.x % (D / 8), r = threadIdx.x / (D / 8);
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "a thread's rows have their chunks swapped in one way");
    const bool inside = c * 8 < d;
    const char *start = (const char *)(from + c * 8);
    const int bytes = 2 * (int)ld;
    const u32 first = at<ROWS>(to, r, c);
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++) {
        bool real;
        const int g = row(r + i * STEP, real);
        copy16(first + i * STEP * 128, start + (i64)g * bytes, real && inside);
    }
}

__device__ __forceinline__ u64 describe(u32 address, u32 leading, u32 stride) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | 1ull << 62;
}
// Columns 16 x .. of rows from `row` of a tile, k along the row.
template <int ROWS> __device__ __forceinline__ u64 along(u32 base, int row, int x) {
    return describe(base + row * 128 + (x >> 2) * (ROWS * 128) + (x & 3) * 32, 16, 1024);
}
// Rows 16 x .. of a tile, all columns, k from row to row.
template <int ROWS> __device__ __forceinline__ u64 across(u32 base, int x) {
    return describe(base + x * 2048, ROWS * 128, 1024);
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Two numbers side by side in shared memory.
__device__ __forceinline__ float2 pair(u32 at) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at) : "memory");
    return x;
}

// s (64 x N) = rows `row` .. of a tile of M rows times the rows of a tile of N: both D wide.
template <int D, int M, int N> __device__ __forceinline__ void scores(float (&s)[N / 2], u32 a, int row, u32 b) {
#pragma unroll
    for (int x = 0; x < D / 16; x++) product(s, along<M>(a, row, x), along<N>(b, 0, x), x > 0);
}
// o (64 x D) += p (64 x N, as a left operand) times a tile of N rows.
template <int D, int N> __device__ __forceinline__ void weigh(float (&o)[D / 2], const u32 (&p)[N / 16][4], u32 b) {
#pragma unroll
    for (int x = 0; x < N / 16; x++) product_turned(o, p[x], across<N>(b, x));
}
template <int N> __device__ __forceinline__ void as_left(u32 (&p)[N / 16][4], const float (&s)[N / 2]) {
#pragma unroll
    for (int x = 0; x < N / 16; x++)
#pragma unroll
        for (int e = 0; e < 4; e++) p[x][e] = pack(s[8 * x + 2 * e], s[8 * x + 2 * e + 1]);
}

// One tile's scores become weights: e to the scores less the largest so far. `shrink` takes what came before to that scale.
template <int N>
__device__ __forceinline__ void softmax(float (&s)[N / 2], float (&m)[2], float (&l)[2], float (&shrink)[2], float c) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = m[half];
#pragma unroll
        for (int n = 0; n < N / 8; n++) top = fmaxf(top, fmaxf(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]));
        top = quad_max(top);
        // A row that has seen no key yet must not make NaN of minus infinity less itself.
        const float base = top == -INFINITY ? 0.f : top * c;
        shrink[half] = exp2_(m[half] * c - base);
        m[half] = top;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int e = 4 * n + 2 * half; e < 4 * n + 2 * half + 2; e++) {
                s[e] = exp2_(s[e] * c - base);
                sum += s[e];
            }
        l[half] = l[half] * shrink[half] + sum;
    }
}

template <int D> __device__ __forceinline__ void forward(const Attention &a) {
    const int BN = 128;
    const Tile t = tile_at(a, blockIdx.y);
    const int head = blockIdx.x, kv_head = head / a.group;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group_row = (warp >> 2) * 64;
    const u32 sq = shared_start(), sk = sq + BM * D * 2, sv = sk + 2 * BN * D * 2;
    const int rows = t.end - t.first, position = t.length + t.first - t.start, last = position + rows - 1;
    const int from = a.window ? max(0, position + 1 - a.window) : 0;
    const bf16 *q = a.q + (i64)head * a.d, *k = a.k + (i64)kv_head * a.d, *v = a.v + (i64)kv_head * a.d;
    const int j0 = from / BN, j1 = last / BN + 1;
    auto keys = [&](const bf16 *x, i64 ld, u32 to, int j) {
        if (j >= j1) return;
        fetch<D, BN>(to + ((j - j0) & 1) * (BN * D * 2), x, ld, a.d, [&](int r, bool &real) {
            const int p = j * BN + r;
            real = p <= last;
            return row_of(t, p);
        });
    };
    fetch<D, BM>(sq, q, a.ldq, a.d, [&](int r, bool &real) { return real = r < rows, t.first + r - a.q_shift; });
    keys(k, a.ldk, sk, j0);
    copies_end();
    keys(k, a.ldk, sk, j0 + 1);
    keys(v, a.ldv, sv, j0);
    copies_end();

    float o[D / 2], s[BN / 2], m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0}, shrink[2];
    u32 p[BN / 16][4];
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i] = 0;
    const float c = a.scale * LOG2E;
    // Of the thread's first row; the other is eight below.
    const int own = position + warp * 16 + (lane >> 2);
    auto mask = [&](int j) {
        if (j * BN + BN - 1 <= position + warp * 16 && !(a.window && j * BN <= last - a.window)) return;
#pragma unroll
        for (int i = 0; i < BN / 2; i++) {
            const int key = j * BN + (i >> 2) * 8 + 2 * (lane & 3) + (i & 1), at_row = own + 8 * ((i >> 1) & 1);
            if (key > at_row || (a.window && key <= at_row - a.window)) s[i] = -INFINITY;
        }
    };

    copies_wait<1>();
    products_begin();
    scores<D, BM, BN>(s, sq, group_row, sk);
    products_end();
    products_wait<0>();
    arrived(s);
    mask(j0);
    softmax<BN>(s, m, l, shrink, c);
    as_left<BN>(p, s);
    for (int j = j0; j + 1 < j1; j++) {
        const int stage = (j - j0) & 1;
        // The next keys and these values are there; all are done with these keys and the values before.
        copies_wait<0>();
        products_begin();
        scores<D, BM, BN>(s, sq, group_row, sk + (stage ^ 1) * (BN * D * 2));
        products_end();
        // Asked for while products run: it takes as long as they do to ask.
        keys(k, a.ldk, sk, j + 2);
        keys(v, a.ldv, sv, j + 1);
        copies_end();
        products_begin();
        weigh<D, BN>(o, p, sv + stage * (BN * D * 2));
        products_end();
        products_wait<1>();
        arrived(s);
        mask(j + 1);
        softmax<BN>(s, m, l, shrink, c);
        before_wait(l[0] + l[1]);
        products_wait<0>();
        arrived(o);
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] *= shrink[(i >> 1) & 1];
        as_left<BN>(p, s);
    }
    copies_wait<0>();
    products_begin();
    weigh<D, BN>(o, p, sv + ((j1 - 1 - j0) & 1) * (BN * D * 2));
    products_end();
    products_wait<0>();
    arrived(o);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float sum = quad_sum(l[half]);
        const int r = t.first + warp * 16 + (lane >> 2) + 8 * half;
        if (r >= t.end) continue;
        const float inverse = 1.f / sum;
        bf16 *out = a.out + (i64)(r - a.q_shift) * a.ldo + (i64)head * a.d;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const int column = n * 8 + 2 * (lane & 3), i = 4 * n + 2 * half;
            if (column < a.d) *(u32 *)(out + column) = pack(o[i] * inverse, o[i + 1] * inverse);
        }
        if ((lane & 3) == 0 && r >= a.log_shift)
            a.log_sums[(i64)head * a.log_rows + r - a.log_shift] = m[half] * a.scale + logf(sum);
    }
}

// dq of 128 queries of one head. dS = P * (dO V^T - delta) * scale, dQ = dS K. Keys and values in three stages: what one
// tile adds to dQ is made together with the next tile's scores.
template <int D> __device__ __forceinline__ void backward_q(const Attention &a) {
    const int BN = 64, STAGE = BN * D * 2;
    const Tile t = tile_at(a, blockIdx.y);
    const int head = blockIdx.x, kv_head = head / a.group;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group_row = (warp >> 2) * 64;
    const u32 sq = shared_start(), so = sq + BM * D * 2, sk = so + BM * D * 2, sv = sk + 3 * STAGE;
    const int rows = t.end - t.first, position = t.length + t.first - t.start, last = position + rows - 1;
    const int from = a.window ? max(0, position + 1 - a.window) : 0;
    const bf16 *k = a.k + (i64)kv_head * a.d, *v = a.v + (i64)kv_head * a.d;
    const int j0 = from / BN, j1 = last / BN + 1;
    auto keys = [&](int j, int stage) {
        auto row = [&](int r, bool &real) { return real = j * BN + r <= last, row_of(t, j * BN + r); };
        fetch<D, BN>(sk + stage * STAGE, k, a.ldk, a.d, row);
        fetch<D, BN>(sv + stage * STAGE, v, a.ldv, a.d, row);
    };
    auto mine = [&](int r, bool &real) { return real = r < rows, t.first + r - a.q_shift; };
    fetch<D, BM>(sq, a.q + (i64)head * a.d, a.ldq, a.d, mine);
    fetch<D, BM>(so, a.dout + (i64)head * a.d, a.ldo, a.d, mine);
    keys(j0, 0);
    copies_end();
    float log_sum[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = t.first + warp * 16 + (lane >> 2) + 8 * half;
        const i64 i = (i64)head * a.log_rows + r - a.log_shift;
        log_sum[half] = r < t.end ? a.log_sums[i] * LOG2E : 0;
        delta[half] = r < t.end ? a.delta[i] : 0;
    }
    float dq[D / 2], s[BN / 2], dp[BN / 2];
    u32 ds[BN / 16][4];
#pragma unroll
    for (int i = 0; i < D / 2; i++) dq[i] = 0;
    const float c = a.scale * LOG2E;
    const int own = position + warp * 16 + (lane >> 2);
    // Of the tile before, nothing yet: zeros times these keys.
#pragma unroll
    for (int x = 0; x < BN / 16; x++) ds[x][0] = ds[x][1] = ds[x][2] = ds[x][3] = 0;
    int stage = 0, before = 0;
    for (int j = j0; j < j1; j++) {
        const int next = stage == 2 ? 0 : stage + 1;
        copies_wait<0>();
        products_begin();
        scores<D, BM, BN>(s, sq, group_row, sk + stage * STAGE);
        products_end();
        scores<D, BM, BN>(dp, so, group_row, sv + stage * STAGE);
        products_end();
        if (j + 1 < j1) keys(j + 1, next);
        copies_end();
        products_begin();
        weigh<D, BN>(dq, ds, sk + before * STAGE);
        products_end();
        products_wait<2>();
        arrived(s);
        const bool masked = j * BN + BN - 1 > position + warp * 16 || (a.window && j * BN <= last - a.window);
#pragma unroll
        for (int i = 0; i < BN / 2; i++) {
            const int half = (i >> 1) & 1;
            s[i] = exp2_(s[i] * c - log_sum[half]);
            if (masked) {
                const int key = j * BN + (i >> 2) * 8 + 2 * (lane & 3) + (i & 1), at_row = own + 8 * half;
                if (key > at_row || (a.window && key <= at_row - a.window)) s[i] = 0;
            }
        }
        before_wait(s);
        products_wait<1>();
        arrived(dp);
#pragma unroll
        for (int i = 0; i < BN / 2; i++) s[i] *= (dp[i] - delta[(i >> 1) & 1]) * a.scale;
        products_wait<0>();
        arrived(dq);
        as_left<BN>(ds, s);
        before = stage, stage = next;
    }
    products_begin();
    weigh<D, BN>(dq, ds, sk + before * STAGE);
    products_end();
    products_wait<0>();
    arrived(dq);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = t.first + warp * 16 + (lane >> 2) + 8 * half;
        if (r >= t.end) continue;
        bf16 *out = a.dq + (i64)(r - a.q_shift) * a.lddq + (i64)head * a.d;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const int column = n * 8 + 2 * (lane & 3), i = 4 * n + 2 * half;
            if (column < a.d) *(u32 *)(out + column) = pack(dq[i], dq[i + 1]);
        }
    }
}

// dk and dv of 128 keys from one query head. Keys are the rows, so that P and dS stay in registers as the left operand.
template <int D> __device__ __forceinline__ void backward_kv(const Attention &a) {
    const int BN = 64, STAGE = BN * D * 2;
    const Tile t = tile_at(a, blockIdx.y);
    const int head = blockIdx.x, kv_head = head / a.group;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group_row = (warp >> 2) * 64;
    const u32 sk = shared_start(), sv = sk + BM * D * 2, sq = sv + BM * D * 2, so = sq + 3 * STAGE, slog = so + 3 * STAGE,
              sdelta = slog + 3 * BN * 4;
    const int keys = t.end - t.first;
    const int stop = a.window ? min(t.stop, t.end - 1 + a.window) : t.stop;
    const int blocks = (stop - t.first + BN - 1) / BN;
    auto key = [&](int r, bool &real) { return real = r < keys, t.first + r; };
    fetch<D, BM>(sk, a.k + (i64)kv_head * a.d, a.ldk, a.d, key);
    fetch<D, BM>(sv, a.v + (i64)kv_head * a.d, a.ldv, a.d, key);
    auto queries = [&](int j, int stage) {
        const int first = t.first + j * BN;
        auto row = [&](int r, bool &real) { return real = first + r < stop, first + r - a.q_shift; };
        fetch<D, BN>(sq + stage * STAGE, a.q + (i64)head * a.d, a.ldq, a.d, row);
        fetch<D, BN>(so + stage * STAGE, a.dout + (i64)head * a.d, a.ldo, a.d, row);
        if (threadIdx.x < 2 * BN) {
            const int i = threadIdx.x % BN, r = first + i;
            const float *from = (threadIdx.x < BN ? a.log_sums : a.delta) + (i64)head * a.log_rows;
            const bool real = r < stop;
            copy4((threadIdx.x < BN ? slog : sdelta) + (stage * BN + i) * 4, real ? from + r - a.log_shift : from, real);
        }
    };
    queries(0, 0);
    copies_end();
    float dk[D / 2], dv[D / 2], s[BN / 2], dp[BN / 2];
    u32 p[BN / 16][4], ds[BN / 16][4];
#pragma unroll
    for (int i = 0; i < D / 2; i++) dk[i] = dv[i] = 0;
    const float c = a.scale * LOG2E;
    const int own = t.first + warp * 16 + (lane >> 2);
    // Of the tile before, nothing yet: zeros times these queries.
#pragma unroll
    for (int x = 0; x < BN / 16; x++)
#pragma unroll
        for (int e = 0; e < 4; e++) p[x][e] = ds[x][e] = 0;
    int stage = 0, before = 0;
    for (int j = 0; j < blocks; j++) {
        const int next = stage == 2 ? 0 : stage + 1;
        copies_wait<0>();
        products_begin();
        scores<D, BM, BN>(s, sk, group_row, sq + stage * STAGE);
        products_end();
        scores<D, BM, BN>(dp, sv, group_row, so + stage * STAGE);
        products_end();
        if (j + 1 < blocks) queries(j + 1, next);
        copies_end();
        products_begin();
        weigh<D, BN>(dv, p, so + before * STAGE);
        weigh<D, BN>(dk, ds, sq + before * STAGE);
        products_end();
        products_wait<2>();
        arrived(s);
        const int first = t.first + j * BN;
        const bool masked = first < t.first + BM || first + BN > stop || a.window;
#pragma unroll
        for (int n = 0; n < BN / 8; n++) {
            const float2 log_sum = pair(slog + (stage * BN + n * 8 + 2 * (lane & 3)) * 4);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float x = exp2_(s[4 * n + e] * c - (e & 1 ? log_sum.y : log_sum.x) * LOG2E);
                if (masked) {
                    const int query = first + n * 8 + 2 * (lane & 3) + (e & 1), at_row = own + 8 * (e >> 1);
                    if (at_row > query || query >= stop || (a.window && at_row <= query - a.window)) x = 0;
                }
                s[4 * n + e] = x;
            }
        }
        products_wait<1>();
        arrived(dp);
#pragma unroll
        for (int n = 0; n < BN / 8; n++) {
            const float2 delta = pair(sdelta + (stage * BN + n * 8 + 2 * (lane & 3)) * 4);
#pragma unroll
            for (int e = 0; e < 4; e++) dp[4 * n + e] = s[4 * n + e] * (dp[4 * n + e] - (e & 1 ? delta.y : delta.x)) * a.scale;
        }
        products_wait<0>();
        arrived(dk);
        arrived(dv);
        as_left<BN>(p, s);
        as_left<BN>(ds, dp);
        before = stage, stage = next;
    }
    products_begin();
    weigh<D, BN>(dv, p, so + before * STAGE);
    weigh<D, BN>(dk, ds, sq + before * STAGE);
    products_end();
    products_wait<0>();
    arrived(dk);
    arrived(dv);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = t.first + warp * 16 + (lane >> 2) + 8 * half;
        if (r >= t.end) continue;
        const i64 to = (i64)(r - a.q_shift) * a.lddk + (i64)head * a.d;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const int column = n * 8 + 2 * (lane & 3), i = 4 * n + 2 * half;
            if (column >= a.d) continue;
            *(u32 *)(a.dk + to + column) = pack(dk[i], dk[i + 1]);
            *(u32 *)(a.dv + to + column) = pack(dv[i], dv[i + 1]);
        }
    }
}

extern "C" {
__global__ void __launch_bounds__(THREADS, 1) hopper_forward_64(Attention a) { forward<64>(a); }
__global__ void __launch_bounds__(THREADS, 1) hopper_forward_128(Attention a) { forward<128>(a); }
__global__ void __launch_bounds__(THREADS, 1) hopper_backward_q_64(Attention a) { backward_q<64>(a); }
__global__ void __launch_bounds__(THREADS, 1) hopper_backward_q_128(Attention a) { backward_q<128>(a); }
__global__ void __launch_bounds__(THREADS, 1) hopper_backward_kv_64(Attention a) { backward_kv<64>(a); }
__global__ void __launch_bounds__(THREADS, 1) hopper_backward_kv_128(Attention a) { backward_kv<128>(a); }
}
