// archs: 90a
//
// The same as attention.cu for head dimensions of 129 to 256, with Hopper's products of whole warp groups (wgmma). See there
// for the arguments and the arithmetic, and Shah et al., FlashAttention-3 (arXiv 2407.08608), for what runs while what.
//
// A block is three groups of four warps. The first has tiles copied into shared memory and hands registers to the others,
// which make products; barriers in shared memory say when a tile is there ("full") and when nobody reads it any more ("free"),
// so that the two groups of products need not keep step: what one does beside its products runs while the other's are made.
// The copy engine (TMA) copies for the forward pass and for the gradients of keys and values; for those of queries, which have
// room for one tile of values alone, four warps copy, which was faster.

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

// How the copy engine finds q, k, v and dout: 64 columns of a head, a head, as many rows as a tile has.
struct __align__(64) Map { u64 opaque[16]; };
struct Maps { Map q, k, v, dout; };

struct Tile { int first, end, prefix, length, start, stop; };

__device__ __forceinline__ Tile tile_at(const Attention &a, int i) {
    const int *t = a.tiles + 6 * i;
    return Tile{t[0], t[1], t[2], t[3], t[4], t[5]};
}

__device__ __forceinline__ int row_of(const Tile &t, int p) {
    return p + (p < t.length ? t.prefix : t.start - t.length);
}

static const float LOG2E = 1.4426950408889634f;
#define INFINITY __int_as_float(0x7f800000)
// D columns, of which the tensors have a.d; ROW bytes a row of a tile.
static const int THREADS = 384, D = 256, ROW = 2 * D;
extern __shared__ unsigned char shared_memory[];

// ---- instructions

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
// Waits for all but the last N groups of the thread's copies, and shows them to products.
template <int N> __device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// The thread arrives at the barrier when its copies so far are there.
__device__ __forceinline__ void copies_arrive(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_begin(u32 at, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 at) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(at) : "memory");
}
// Whether the barrier's phase of this parity is over: at once, or after some wait.
__device__ __forceinline__ bool barrier_over(u32 at, int parity) {
    int over;
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}"
                 : "=r"(over) : "r"(at), "r"(parity) : "memory");
    return over;
}
__device__ __forceinline__ bool barrier_over_soon(u32 at, int parity) {
    int over;
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}"
                 : "=r"(over) : "r"(at), "r"(parity) : "memory");
    return over;
}
// Two warps meet at one of the hardware's 16 barriers: one goes on at once, the other when both are there.
__device__ __forceinline__ void meet_arrive(int barrier) { asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ void meet_wait(int barrier) { asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory"); }
// Arrives at the barrier, which then waits for so many bytes of the copy engine as well.
__device__ __forceinline__ void barrier_expect(u32 at, int bytes) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;}" ::"r"(at), "r"(bytes) : "memory");
}
// Barriers that were begun are there for the copy engine.
__device__ __forceinline__ void barriers_show() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Has the copy engine copy 64 columns of a map's rows.
__device__ __forceinline__ void copy_box(u32 to, const Map &map, u32 barrier, int column, int head, int row) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 ::"r"(to), "l"(&map), "r"(barrier), "r"(column), "r"(head), "r"(row) : "memory");
}
// All warps that make products meet.
__device__ __forceinline__ void workers_meet() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
// The two blocks of a cluster meet, with all that they have written to shared memory.
__device__ __forceinline__ void blocks_meet() {
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}
template <int N> __device__ __forceinline__ void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
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
// Two or four numbers side by side in shared memory.
__device__ __forceinline__ float2 pair(u32 at) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at) : "memory");
    return x;
}
__device__ __forceinline__ float4 four(u32 at) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(at) : "memory");
    return x;
}
// The same in the shared memory of another block of the cluster.
__device__ __forceinline__ float4 four_of(int block, u32 at) {
    float4 x;
    asm volatile("{.reg .b32 there; mapa.shared::cluster.u32 there, %4, %5;"
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];}"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(at), "r"(block) : "memory");
    return x;
}
__device__ __forceinline__ void put_four(u32 at, float x, float y, float z, float w) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}

#define F8(c, i) \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define F16(c, i) F8(c, i), F8(c, i + 8)
#define REGISTERS_48 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23"
#define OPERANDS_48(c) F16(c, 0), F8(c, 16)
#define REGISTERS_64 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define OPERANDS_64(c) F16(c, 0), F16(c, 16)
#define REGISTERS_80 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39"
#define OPERANDS_80(c) F16(c, 0), F16(c, 16), F8(c, 32)
#define REGISTERS_256 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63," \
    "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
    "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
    "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
    "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define OPERANDS_256(c) \
    F16(c, 0), F16(c, 16), F16(c, 32), F16(c, 48), F16(c, 64), F16(c, 80), F16(c, 96), F16(c, 112)

// c (64 x 48, 64 or 80) = or += a (64 x 16) b (16 x N), both in shared memory along k.
__device__ __forceinline__ void product(float (&c)[24], u64 a, u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %26, 0;"
                 "wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {" REGISTERS_48 "}, %24, %25, p, 1, 1, 0, 0;}"
                 : OPERANDS_48(c) : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void product(float (&c)[32], u64 a, u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_64 "}, %32, %33, p, 1, 1, 0, 0;}"
                 : OPERANDS_64(c) : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void product(float (&c)[40], u64 a, u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %42, 0;"
                 "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {" REGISTERS_80 "}, %40, %41, p, 1, 1, 0, 0;}"
                 : OPERANDS_80(c) : "l"(a), "l"(b), "r"(add));
}
// c (64 x 256) += a (64 x 16, in registers) b (16 x 256, rows of k).
__device__ __forceinline__ void product_turned(float (&c)[128], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" REGISTERS_256 "}, {%128,%129,%130,%131}, "
                 "%132, 1, 1, 1, 1;"
                 : OPERANDS_256(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// ---- tiles

__device__ __forceinline__ u32 shared_start() {
    return ((u32)__cvta_generic_to_shared(shared_memory) + 1023) & ~1023u;
}

// A tile lies in panels of 64 columns (128 bytes a row), ROWS x 128 bytes each, chunks of 16 bytes swapped by row: the
// "128-byte swizzle" of the products' descriptions. Chunk c of row r:
template <int ROWS> __device__ __forceinline__ u32 at(u32 base, int r, int c) {
    return base + (c >> 3) * (ROWS * 128) + r * 128 + (((c ^ r) & 7) << 4);
}

// Starts the copy of ROWS rows into shared memory by four warps; row(i, real) is the row to take, where `real`, else zeros
// are. A thread has two chunks, half a row apart, of every eighth row: these have their chunks swapped in one way.
template <int ROWS, typename F>
__device__ __forceinline__ void fetch(u32 to, const bf16 *from, i64 ld, int d, F row) {
    const int c = threadIdx.x & 15, r = threadIdx.x >> 4;
    const bool inside = D / 2 + c * 8 < d;
    const char *start = (const char *)(from + c * 8);
    const int bytes = 2 * (int)ld;
    const u32 first = at<ROWS>(to, r, c);
#pragma unroll 4
    for (int i = 0; i < ROWS / 8; i++) {
        bool real;
        const char *x = start + (i64)row(r + i * 8, real) * bytes;
        copy16(first + i * 1024, x, real);
        copy16(first + i * 1024 + 2 * ROWS * 128, x + D, real && inside);
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

// s (64 x N) = rows `row` .. of a tile of M rows times the rows of a tile of N.
template <int M, int N> __device__ __forceinline__ void scores(float (&s)[N / 2], u32 a, int row, u32 b) {
#pragma unroll
    for (int x = 0; x < D / 16; x++) product(s, along<M>(a, row, x), along<N>(b, 0, x), x > 0);
}
// o (64 x D) += p (64 x N, as a left operand) times a tile of N rows.
template <int N> __device__ __forceinline__ void weigh(float (&o)[D / 2], const u32 (&p)[N / 16][4], u32 b) {
#pragma unroll
    for (int x = 0; x < N / 16; x++) product_turned(o, p[x], across<N>(b, x));
}
template <int N> __device__ __forceinline__ void as_left(u32 (&p)[N / 16][4], const float (&s)[N / 2]) {
#pragma unroll
    for (int x = 0; x < N / 16; x++)
#pragma unroll
        for (int e = 0; e < 4; e++) p[x][e] = pack(s[8 * x + 2 * e], s[8 * x + 2 * e + 1]);
}

// ---- full and free

// N tiles of one kind in turn, with a barrier for "full" and one for "free" (the eight warps that make products arrive) each.
template <int N> struct Ring {
    u32 barriers;
    __device__ __forceinline__ void begin(int copying) const {
        for (int i = 0; i < N; i++) barrier_begin(full(i), copying), barrier_begin(free(i), 8);
    }
    __device__ __forceinline__ u32 full(int slot) const { return barriers + slot * 16; }
    __device__ __forceinline__ u32 free(int slot) const { return barriers + slot * 16 + 8; }
};

// The how manieth tile, its slot, and the parity of the slot's phase.
template <int N> struct Turn {
    int i, slot, parity;
    __device__ __forceinline__ Turn(int i = 0) : i(i), slot((u32)i % N), parity((u32)i / N & 1) {}
    __device__ __forceinline__ void next() {
        i++, slot++;
        if (slot == N) slot = 0, parity ^= 1;
    }
};

__device__ __forceinline__ void wait_for(u32 barrier, int parity) {
    while (!barrier_over_soon(barrier, parity));
}
template <int N> __device__ __forceinline__ void wait_full(const Ring<N> &ring, const Turn<N> &turn) {
    wait_for(ring.full(turn.slot), turn.parity);
}
// A slot never filled is free.
template <int N> __device__ __forceinline__ void wait_free(const Ring<N> &ring, const Turn<N> &turn) {
    wait_for(ring.free(turn.slot), turn.parity ^ 1);
}
// The warp reads the tile no more.
template <int N> __device__ __forceinline__ void release(const Ring<N> &ring, const Turn<N> &turn) {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(ring.free(turn.slot));
}

// What warps do that copy themselves: tiles are said to be full one tile later, so that copies of two are under way.
struct Copies {
    u32 under_way = 0;
    __device__ __forceinline__ void say() {
        __syncwarp();
        if ((threadIdx.x & 31) == 0) barrier_arrive(under_way);
    }
    // Waits until the slot may be filled. What is under way is said to be there first, if there is a wait: the wait may be for it.
    template <int N> __device__ __forceinline__ void before(const Ring<N> &ring, const Turn<N> &turn) {
        if (turn.i < N) return;
        const u32 barrier = ring.free(turn.slot);
        const int parity = turn.parity ^ 1;
        if (__all_sync(0xffffffff, barrier_over(barrier, parity))) return;
        finish();
        wait_for(barrier, parity);
    }
    template <int N> __device__ __forceinline__ void begun(const Ring<N> &ring, const Turn<N> &turn) {
        copies_end();
        if (under_way) {
            copies_wait<1>();
            say();
        }
        under_way = ring.full(turn.slot);
    }
    __device__ __forceinline__ void finish() {
        if (!under_way) return;
        copies_wait<0>();
        say();
        under_way = 0;
    }
};

// What a tile of queries sees, N keys at a time: tiles of the prefix, then of own rows. No tile has keys of both.
template <int N> struct Seen {
    int prefix, length, start, split, first, end;

    __device__ __forceinline__ Seen() {}
    __device__ __forceinline__ Seen(const Tile &t, int window)
        : prefix(t.prefix), length(t.length), start(t.start), split((t.length + N - 1) / N) {
        const int position = length + t.first - start, from = window ? max(0, position + 1 - window) : 0;
        first = from < length ? from / N : split + (from - length) / N;
        end = until(t.end - 1);
    }
    // The end of what a row sees.
    __device__ __forceinline__ int until(int row) const { return split + (row - start) / N + 1; }
    __device__ __forceinline__ int row(int j) const { return j < split ? prefix + j * N : start + (j - split) * N; }
    // Position of a tile's first key in the sequence.
    __device__ __forceinline__ int position(int j) const { return j < split ? j * N : length + (j - split) * N; }
    // How many of a tile are of this sequence, or more than that.
    __device__ __forceinline__ int real(int j) const { return j < split ? length - j * N : N; }
};

// ---- forward

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
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

// 128 queries of one head; tiles of 80 keys and of 80 values, two of each.
struct Forward {
    static const int BM = 128, BN = 80, STAGE = BN * ROW;
    Tile t;
    Seen<BN> seen;
    u32 sq, sk, sv, queries;
    Ring<2> keys, values;
    int head;

    __device__ __forceinline__ Forward() {
        sq = shared_start(), sk = sq + BM * ROW, sv = sk + 2 * STAGE;
        keys.barriers = sv + 2 * STAGE, values.barriers = keys.barriers + 32, queries = values.barriers + 32;
    }
    __device__ __forceinline__ static void begin() {
        const Forward f;
        f.keys.begin(1), f.values.begin(1);
        barrier_begin(f.queries, 1);
        barriers_show();
    }
    __device__ __forceinline__ Forward(const Attention &a) : Forward() {
        t = tile_at(a, blockIdx.y), seen = Seen<BN>(t, a.window), head = blockIdx.x;
    }

    // By one thread.
    __device__ __forceinline__ void copy(const Attention &a, const Maps &maps) const {
        if (threadIdx.x) return;
        const int kv_head = head / a.group;
        auto tile = [&](const Map &map, u32 to, const Ring<2> &ring, int j) {
            const Turn<2> turn(j - seen.first);
            const u32 full = ring.full(turn.slot);
            wait_free(ring, turn);
            barrier_expect(full, STAGE);
            to += turn.slot * STAGE;
            for (int panel = 0; panel < 4; panel++)
                copy_box(to + panel * (BN * 128), map, full, panel * 64, kv_head, seen.row(j));
        };
        barrier_expect(queries, BM * ROW);
        for (int panel = 0; panel < 4; panel++)
            copy_box(sq + panel * (BM * 128), maps.q, queries, panel * 64, head, t.first - a.q_shift);
        // In the order in which they are wanted: keys of the next tile before values of this one.
        for (int j = seen.first; j <= seen.end; j++) {
            if (j < seen.end) tile(maps.k, sk, keys, j);
            if (j > seen.first) tile(maps.v, sv, values, j - 1);
        }
    }

    __device__ __forceinline__ void work(const Attention &a) const {
        const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) - 4, group_row = (warp >> 2) * 64;
        // Where the warp's rows begin.
        const int low = t.length + t.first - t.start + warp * 16, first = seen.first, split = seen.split, length = t.length;
        // The group's own end: below it, the other group's keys alone.
        const int end = min(seen.end, seen.until(t.first + group_row + 63)) - first;
        float o[D / 2], s[BN / 2], m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0}, shrink[2];
        u32 p[BN / 16][4];
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] = 0;
        const float c = a.scale * LOG2E;
        auto mask = [&](int j) {
            const int position = j * BN + (j < split ? 0 : length - split * BN), real = j < split ? length - position : BN;
            if (position + BN - 1 <= low && real >= BN && !(a.window && position <= low + 15 - a.window)) return;
#pragma unroll
            for (int i = 0; i < BN / 2; i++) {
                const int key = (i >> 2) * 8 + 2 * (lane & 3) + (i & 1), ahead = position + key - low - (lane >> 2) - 8 * ((i >> 1) & 1);
                if (ahead > 0 || key >= real || (a.window && ahead <= -a.window)) s[i] = -INFINITY;
            }
        };
        auto turn = [](int j) { return Turn<2>(j); };
        wait_for(queries, 0);
        wait_full(keys, turn(0));
        products_begin();
        scores<BM, BN>(s, sq, group_row, sk);
        products_end();
        products_wait<0>();
        arrived(s);
        release(keys, turn(0));
        mask(first);
        softmax<BN>(s, m, l, shrink, c);
        as_left<BN>(p, s);
        int j = 1;
        for (; j < end; j++) {
            wait_full(keys, turn(j));
            products_begin();
            scores<BM, BN>(s, sq, group_row, sk + turn(j).slot * STAGE);
            products_end();
            wait_full(values, turn(j - 1));
            products_begin();
            weigh<BN>(o, p, sv + turn(j - 1).slot * STAGE);
            products_end();
            products_wait<1>();
            arrived(s);
            release(keys, turn(j));
            mask(first + j);
            softmax<BN>(s, m, l, shrink, c);
            before_wait(l[0] + l[1]);
            products_wait<0>();
            arrived(o);
            release(values, turn(j - 1));
            // Once the largest have been seen, nothing shrinks.
            if (__any_sync(0xffffffff, shrink[0] != 1.f || shrink[1] != 1.f)) {
#pragma unroll
                for (int i = 0; i < D / 2; i++) o[i] *= shrink[(i >> 1) & 1];
            }
            as_left<BN>(p, s);
        }
        wait_full(values, turn(j - 1));
        products_begin();
        weigh<BN>(o, p, sv + turn(j - 1).slot * STAGE);
        products_end();
        products_wait<0>();
        arrived(o);
        release(values, turn(j - 1));
        // Read once more, rather than held all the while.
        const Forward again(a);
        for (; j < again.seen.end - again.seen.first; j++) {
            wait_full(keys, turn(j));
            release(keys, turn(j));
            wait_full(values, turn(j));
            release(values, turn(j));
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float sum = quad_sum(l[half]);
            const int r = again.t.first + warp * 16 + (lane >> 2) + 8 * half;
            if (r >= again.t.end) continue;
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
};

// ---- backward

__device__ __forceinline__ void write_row(bf16 *to, const float (&x)[D / 2], int half, int d) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        const int column = n * 8 + 2 * (lane & 3), i = 4 * n + 2 * half;
        if (column < d) *(u32 *)(to + column) = pack(x[i], x[i + 1]);
    }
}

// dq of 128 queries of one head. dS = P * (dO V^T - delta) * scale, dQ = dS K. Tiles of 64 keys in two stages; of values in
// one, which a tile's dP alone needs. Of PARTS blocks each has every PARTS-th tile; two are a cluster, and each adds what the
// other has to half of the rows: few queries of many keys would else leave the device idle.
template <int PARTS> struct BackwardQ {
    static const int BM = 128, BN = 64, STAGE = BN * ROW;
    Tile t;
    u32 sq, so, sk, sv;
    Ring<2> keys;
    Ring<1> values;
    int head, part, rows, position, last, j0, tiles;

    __device__ __forceinline__ BackwardQ() {
        sq = shared_start(), so = sq + BM * ROW, sk = so + BM * ROW, sv = sk + 2 * STAGE;
        keys.barriers = sv + STAGE, values.barriers = keys.barriers + 32;
    }
    __device__ __forceinline__ static void begin() {
        const BackwardQ b;
        b.keys.begin(4), b.values.begin(4);
    }
    __device__ __forceinline__ BackwardQ(const Attention &a) : BackwardQ() {
        t = tile_at(a, blockIdx.y);
        head = blockIdx.x, part = PARTS == 1 ? 0 : blockIdx.z;
        rows = t.end - t.first, position = t.length + t.first - t.start, last = position + rows - 1;
        j0 = (a.window ? max(0, position + 1 - a.window) : 0) / BN, tiles = mine(last / BN + 1 - j0);
    }

    // How many of this many tiles are the block's.
    __device__ __forceinline__ int mine(int all) const { return (all - part + PARTS - 1) / PARTS; }

    __device__ __forceinline__ void copy(const Attention &a) const {
        const int kv_head = head / a.group;
        const bf16 *k = a.k + (i64)kv_head * a.d, *v = a.v + (i64)kv_head * a.d;
        Copies copies;
        Turn<2> key;
        Turn<1> value;
        auto query = [&](int r, bool &real) { return real = r < rows, t.first + r - a.q_shift; };
        // Nothing is on its way where rows will be handed over.
        if (tiles > 0) fetch<BM>(sq, a.q + (i64)head * a.d, a.ldq, a.d, query);
        for (int j = 0; j < tiles; j++) {
            const int first = (j0 + j * PARTS + part) * BN;
            auto row = [&](int r, bool &real) { return real = first + r <= last, row_of(t, first + r); };
            copies.before(keys, key);
            fetch<BN>(sk + key.slot * STAGE, k, a.ldk, a.d, row);
            copies.begun(keys, key);
            key.next();
            if (j == 0) fetch<BM>(so, a.dout + (i64)head * a.d, a.ldo, a.d, query);
            copies.before(values, value);
            fetch<BN>(sv, v, a.ldv, a.d, row);
            copies.begun(values, value);
            value.next();
        }
        copies.finish();
        if (PARTS > 1) blocks_meet(), blocks_meet();
    }

    __device__ __forceinline__ void work(const Attention &a) const {
        const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) - 4, group_row = (warp >> 2) * 64;
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
        // Registers are scarce: tiles, keys and rows are counted from the block's first key. Where the warp's rows begin:
        const int STEP = PARTS * BN, low = position + warp * 16 - (j0 + part) * BN;
        auto key = [](int j) { return Turn<2>(j); };
        auto value = [](int j) { return Turn<1>(j); };
        // dS of tile j, whose scores are in the making.
        auto rest = [&](int j) {
            wait_full(values, value(j));
            if (j) {
                // What the tile before adds to dQ is done, so that its dS gives its registers back.
                products_wait<1>();
                arrived(dq);
                release(keys, key(j - 1));
            }
            products_begin();
            scores<BM, BN>(dp, so, group_row, sv);
            products_end();
            products_wait<1>();
            arrived(s);
            const int here = j * STEP;
            const bool masked = here + BN - 1 > low || (a.window && here <= low + 15 - a.window);
#pragma unroll
            for (int i = 0; i < BN / 2; i++) s[i] = exp2_(s[i] * c - log_sum[(i >> 1) & 1]);
            if (masked) {
#pragma unroll
                for (int i = 0; i < BN / 2; i++) {
                    const int at_key = (i >> 2) * 8 + 2 * (lane & 3) + (i & 1);
                    const int ahead = here + at_key - low - (lane >> 2) - 8 * ((i >> 1) & 1);
                    if (ahead > 0 || (a.window && ahead <= -a.window)) s[i] = 0;
                }
            }
            before_wait(s);
            products_wait<0>();
            arrived(dp);
            release(values, value(j));
#pragma unroll
            for (int i = 0; i < BN / 2; i++) s[i] *= (dp[i] - delta[(i >> 1) & 1]) * a.scale;
            as_left<BN>(ds, s);
        };
        // The group's own end: below it, the other group's keys alone.
        const int end = min(tiles, mine((position + group_row + 63) / BN + 1 - j0));
        int j = 0;
        if (end > 0) {
            wait_full(keys, key(0));
            products_begin();
            scores<BM, BN>(s, sq, group_row, sk);
            products_end();
            rest(0);
            for (j = 1; j < end; j++) {
                products_begin();
                weigh<BN>(dq, ds, sk + key(j - 1).slot * STAGE);
                products_end();
                wait_full(keys, key(j));
                products_begin();
                scores<BM, BN>(s, sq, group_row, sk + key(j).slot * STAGE);
                products_end();
                rest(j);
            }
            products_begin();
            weigh<BN>(dq, ds, sk + key(j - 1).slot * STAGE);
            products_end();
            products_wait<0>();
            arrived(dq);
            release(keys, key(j - 1));
        }
        // Read once more, rather than held all the while.
        const BackwardQ again(a);
        for (; j < again.tiles; j++) {
            wait_full(keys, key(j));
            release(keys, key(j));
            wait_full(values, value(j));
            release(values, value(j));
        }
        if (PARTS > 1) {
            const int group = warp >> 2;
            const u32 room = (group ? so : sq) + (threadIdx.x & 127) * 16;
            workers_meet();
            if (group != part) {
#pragma unroll
                for (int i = 0; i < D / 8; i++) put_four(room + i * 2048, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
            }
            blocks_meet();
            if (group == part) {
#pragma unroll
                for (int i = 0; i < D / 8; i++) {
                    const float4 x = four_of(part ^ 1, room + i * 2048);
                    dq[4 * i] += x.x, dq[4 * i + 1] += x.y, dq[4 * i + 2] += x.z, dq[4 * i + 3] += x.w;
                }
            }
            blocks_meet();
            if (group != part) return;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = again.t.first + warp * 16 + (lane >> 2) + 8 * half;
            if (r < again.t.end) write_row(a.dq + (i64)(r - a.q_shift) * a.lddq + (i64)head * a.d, dq, half, a.d);
        }
    }
};

// dk and dv of 64 keys from one query head. Keys are the rows, so that P and dS stay in registers as the left operand. The
// gradient of the values is all that one group of warps has registers for, that of the keys all that the other has: the
// first makes P and hands it to the second, thread by thread.
//
// A tile of `tiles` is 128 keys, two blocks. The last tiles, of the latest rows, are of the keys that the fewest queries see.
struct BackwardKV {
    static const int BM = 64, BN = 48, STAGES = 3, STAGE = BN * ROW;
    Tile t;
    u32 sk, sv, sq, so, slog, sdelta, sp;
    Ring<STAGES> queries, outs;
    u32 own;
    int head, first, stop, blocks;

    __device__ __forceinline__ BackwardKV() {
        sk = shared_start(), sv = sk + BM * ROW, sq = sv + BM * ROW, so = sq + STAGES * STAGE, sp = so + STAGES * STAGE;
        slog = sp + BM * BN * 4, sdelta = slog + STAGES * BN * 4;
        queries.barriers = sdelta + STAGES * BN * 4, outs.barriers = queries.barriers + STAGES * 16;
        own = outs.barriers + STAGES * 16;
    }
    __device__ __forceinline__ static void begin() {
        const BackwardKV b;
        // A warp that copies numbers, and the thread of it that asks for the rest.
        b.queries.begin(33), b.outs.begin(33);
        barrier_begin(b.own, 1), barrier_begin(b.own + 8, 1), barriers_show();
    }
    __device__ __forceinline__ BackwardKV(const Attention &a) : BackwardKV() {
        t = tile_at(a, blockIdx.y >> 1);
        head = blockIdx.x, first = t.first + (blockIdx.y & 1) * BM;
        t.end = min(t.end, first + BM);
        stop = a.window ? min(t.stop, t.end - 1 + a.window) : t.stop;
        blocks = (stop - first + BN - 1) / BN;
    }

    // By one warp, which copies numbers itself.
    __device__ __forceinline__ void copy(const Attention &a, const Maps &maps) const {
        // Past the end of a tile that has a first half alone, nobody has work.
        if (threadIdx.x >= 32 || first >= t.end) return;
        const int lane = threadIdx.x;
        Turn<STAGES> turn;
        auto rows = [&](u32 to, const Map &map, u32 barrier) {
            if (lane) return;
            barrier_expect(barrier, BM * ROW);
            for (int panel = 0; panel < 4; panel++)
                copy_box(to + panel * (BM * 128), map, barrier, panel * 64, head / a.group, first);
        };
        auto tile = [&](const Ring<STAGES> &ring, u32 to, const Map &map, u32 to_numbers, const float *x, int j) {
            const u32 full = ring.full(turn.slot);
            const int row = first + j * BN;
            wait_free(ring, turn);
            if (lane == 0) {
                barrier_expect(full, STAGE);
                to += turn.slot * STAGE;
                for (int panel = 0; panel < 4; panel++)
                    copy_box(to + panel * (BN * 128), map, full, panel * 64, head, row - a.q_shift);
            }
            x += (i64)head * a.log_rows;
#pragma unroll
            for (int i = lane; i < BN; i += 32) {
                const int r = row + i;
                copy4(to_numbers + (turn.slot * BN + i) * 4, r < stop ? x + r - a.log_shift : x, r < stop);
            }
            copies_arrive(full);
        };
        for (int j = 0; j < blocks; j++) {
            if (j == 0) rows(sk, maps.k, own);
            tile(queries, sq, maps.q, slog, a.log_sums, j);
            if (j == 0) rows(sv, maps.v, own + 8);
            tile(outs, so, maps.dout, sdelta, a.delta, j);
            turn.next();
        }
        copies_end();
        copies_wait<0>();
    }

    // P of a block of queries out of scores.
    __device__ __forceinline__ void weights(const Attention &a, float (&s)[BN / 2], int j, int slot) const {
        const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
        const float c = a.scale * LOG2E;
        const int own = first + warp * 16 + (lane >> 2), start = first + j * BN;
        const bool masked = start < first + BM || start + BN > stop || a.window;
#pragma unroll
        for (int n = 0; n < BN / 8; n++) {
            const float2 log_sum = pair(slog + (slot * BN + n * 8 + 2 * (lane & 3)) * 4);
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[4 * n + e] = exp2_(s[4 * n + e] * c - (e & 1 ? log_sum.y : log_sum.x) * LOG2E);
        }
        if (!masked) return;
#pragma unroll
        for (int i = 0; i < BN / 2; i++) {
            const int query = start + (i >> 2) * 8 + 2 * (lane & 3) + (i & 1), at_row = own + 8 * ((i >> 1) & 1);
            if (at_row > query || query >= stop || (a.window && at_row <= query - a.window)) s[i] = 0;
        }
    }

    // Of warp w of the one group to warp w of the other: 1 + w says that P is there, 5 + w that it has been read.
    __device__ __forceinline__ void hand_over(const float (&p)[BN / 2], int j) const {
        const int thread = threadIdx.x & 127, warp = thread >> 5;
        if (j) meet_wait(5 + warp);
#pragma unroll
        for (int i = 0; i < BN / 8; i++) put_four(sp + (i * 128 + thread) * 16, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]);
        meet_arrive(1 + warp);
    }

    // dS over dP, with P from the other group.
    __device__ __forceinline__ void differences(const Attention &a, float (&dp)[BN / 2], int j, int slot) const {
        const int thread = threadIdx.x & 127, lane = thread & 31, warp = thread >> 5;
        meet_wait(1 + warp);
#pragma unroll
        for (int n = 0; n < BN / 8; n++) {
            const float4 p = four(sp + (n * 128 + thread) * 16);
            const float2 delta = pair(sdelta + (slot * BN + n * 8 + 2 * (lane & 3)) * 4);
            dp[4 * n] = p.x * (dp[4 * n] - delta.x) * a.scale;
            dp[4 * n + 1] = p.y * (dp[4 * n + 1] - delta.y) * a.scale;
            dp[4 * n + 2] = p.z * (dp[4 * n + 2] - delta.x) * a.scale;
            dp[4 * n + 3] = p.w * (dp[4 * n + 3] - delta.y) * a.scale;
        }
        if (j + 1 < blocks) meet_arrive(5 + warp);
    }

    __device__ __forceinline__ void write(bf16 *to, const Attention &a, const float (&x)[D / 2]) const {
        const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = first + warp * 16 + (lane >> 2) + 8 * half;
            if (r < t.end) write_row(to + (i64)(r - a.q_shift) * a.lddk + (i64)head * a.d, x, half, a.d);
        }
    }

    // A group's gradient, with tiles of `near` for its scores and of `far` for what it sums: queries and outputs' gradients, or
    // the other way round.
    template <typename F>
    __device__ __forceinline__ void go_over(const Ring<STAGES> &near, const Ring<STAGES> &far, u32 rows, u32 snear, u32 sfar,
                                            float (&sum)[D / 2], F make) const {
        float s[BN / 2];
        u32 p[BN / 16][4];
#pragma unroll
        for (int i = 0; i < D / 2; i++) sum[i] = 0;
        Turn<STAGES> next, now;
        wait_full(near, next);
        products_begin();
        scores<BM, BN>(s, rows, 0, snear);
        products_end();
        products_wait<0>();
        arrived(s);
        make(s, 0, 0);
        release(near, next);
        as_left<BN>(p, s);
        for (int j = 1; j < blocks; j++) {
            next.next();
            wait_full(near, next);
            products_begin();
            scores<BM, BN>(s, rows, 0, snear + next.slot * STAGE);
            products_end();
            wait_full(far, now);
            products_begin();
            weigh<BN>(sum, p, sfar + now.slot * STAGE);
            products_end();
            products_wait<1>();
            arrived(s);
            make(s, j, next.slot);
            release(near, next);
            products_wait<0>();
            arrived(sum);
            release(far, now);
            now.next();
            as_left<BN>(p, s);
        }
        wait_full(far, now);
        products_begin();
        weigh<BN>(sum, p, sfar + now.slot * STAGE);
        products_end();
        products_wait<0>();
        arrived(sum);
    }

    __device__ __forceinline__ void work(const Attention &a) const {
        if (first >= t.end) return;
        if (threadIdx.x < 256) work_values(a);
        else work_keys(a);
    }
    __device__ __forceinline__ void work_values(const Attention &a) const {
        float dv[D / 2];
        wait_for(own, 0);
        go_over(queries, outs, sk, sq, so, dv, [&](float (&s)[BN / 2], int j, int slot) {
            weights(a, s, j, slot);
            hand_over(s, j);
        });
        write(a.dv, a, dv);
    }
    __device__ __forceinline__ void work_keys(const Attention &a) const {
        float dk[D / 2];
        wait_for(own + 8, 0);
        go_over(outs, queries, sv, so, sq, dk, [&](float (&dp)[BN / 2], int j, int slot) { differences(a, dp, j, slot); });
        write(a.dk, a, dk);
    }
};

// The roles of a block's warps, which read where they are for themselves: what all knew would take registers from those
// that copy.
template <typename Work, int COPY, int WORK, typename... MAPS>
__device__ __forceinline__ void roles(const Attention &a, const MAPS &...maps) {
    if (threadIdx.x == 0) Work::begin();
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_down<COPY>();
        Work(a).copy(a, maps...);
    } else {
        registers_up<WORK>();
        Work(a).work(a);
    }
}

extern "C" {
__global__ void __launch_bounds__(THREADS, 1) hopper_forward_256(Attention a, const __grid_constant__ Maps maps) {
    roles<Forward, 24, 240>(a, maps);
}
__global__ void __launch_bounds__(THREADS, 1) hopper_backward_q_256(Attention a) { roles<BackwardQ<1>, 40, 232>(a); }
__global__ void __cluster_dims__(1, 1, 2) __launch_bounds__(THREADS, 1) hopper_backward_q_256_pair(Attention a) {
    roles<BackwardQ<2>, 40, 232>(a);
}
__global__ void __launch_bounds__(THREADS, 1) hopper_backward_kv_256(Attention a, const __grid_constant__ Maps maps) {
    roles<BackwardKV, 40, 232>(a, maps);
}
}
