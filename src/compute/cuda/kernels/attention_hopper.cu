// archs: 90a
//
// The same as attention.cu for head dimensions up to 128, in Hopper's own way: products of whole warp groups (wgmma; 64 rows
// of accumulators to four warps, operands read from shared memory or from registers) and copies of whole tiles by the copy
// engine (TMA). See there for the arguments and the arithmetic, and Shah et al., FlashAttention-3 (arXiv 2407.08608), for
// the shape: a block is one warp group that asks for tiles and two that work on them, 64 rows each, apart from each other;
// tiles go from one to the others through stages with a barrier "full" and one "empty" each.
//
// A block takes one pair of a tile and a head after the other. `tiles` begin with those that take longest.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct Attention {
    const bf16 *q, *k, *v;
    bf16 *out;
    float *log_sums;
    const bf16 *dout;
    float *delta;
    bf16 *dq, *dk, *dv;
    const int *tiles;
    i64 ldq, ldk, ldv, ldo, lddq, lddk;
    int log_rows, log_shift;
    int q_shift;
    int group, d, window;
    float scale;
};

// How the copy engine finds them: columns of a head, heads, rows; 64 columns of 64 rows at a time, zeros for what is outside.
struct __align__(64) Map { u64 opaque[16]; };
struct Maps { Map q, k, v, dout; };

struct Tile { int first, end, prefix, length, start, stop; };

__device__ __forceinline__ Tile tile_at(const Attention &a, int i) {
    const int *t = a.tiles + 6 * i;
    return Tile{t[0], t[1], t[2], t[3], t[4], t[5]};
}

// ---- instructions

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
__device__ __forceinline__ float low(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(u32 x) { return __uint_as_float(x & 0xffff0000); }
__device__ __forceinline__ float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 4 bytes from global to shared memory, or zeros without a look at `from`.
__device__ __forceinline__ void copy4(u32 to, const void *from, bool real) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(real ? 4 : 0) : "memory");
}
// Arrives at a barrier once this thread's copies of 4 bytes are there.
__device__ __forceinline__ void copies_arrive(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Barriers that were made are there for the copy engine too.
__device__ __forceinline__ void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("{.reg .b64 t; mbarrier.arrive.shared.b64 t, [%0];}" ::"r"(barrier) : "memory");
}
// Arrives, and has the barrier wait for so many bytes of the copy engine.
__device__ __forceinline__ void arrive_expecting(u32 barrier, int bytes) {
    asm volatile("{.reg .b64 t; mbarrier.arrive.expect_tx.shared.b64 t, [%0], %1;}" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of a barrier's phase, even or odd.
__device__ __forceinline__ void await(u32 barrier, u32 phase) {
    asm volatile("{.reg .pred p;\n"
                 "AGAIN: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
                 "@p bra DONE;\n"
                 "bra AGAIN;\n"
                 "DONE:}" ::"r"(barrier), "r"(phase) : "memory");
}
// 64 columns of 64 rows of one head into shared memory.
__device__ __forceinline__ void copy_box(u32 to, const Map &map, u32 barrier, int column, int head, int row) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 ::"r"(to), "l"(&map), "r"(barrier), "r"(column), "r"(head), "r"(row) : "memory");
}
// Registers that each thread of this warp group has from here on.
template <int N> __device__ __forceinline__ void registers_fewer() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void registers_more() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
// Turns of the two groups at work: each waits for its own, and gives the other its.
__device__ __forceinline__ void turn_wait(int group) { asm volatile("bar.sync %0, 256;" ::"r"(group + 1) : "memory"); }
__device__ __forceinline__ void turn_give(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(group + 1) : "memory"); }

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
// The same with a in registers.
__device__ __forceinline__ void product(float (&c)[32], const u32 (&a)[4], u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_64 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;}"
                 : OPERANDS_64(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
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
// The same with a in registers.
__device__ __forceinline__ void product(float (&c)[64], const u32 (&a)[4], u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0;"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_128 "}, {%64,%65,%66,%67}, %68, p, 1, 1, 0;}"
                 : OPERANDS_128(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
// c (64 x 128) += a (64 x 16, in registers) b (16 x 128, rows of k).
__device__ __forceinline__ void product_turned(float (&c)[64], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_128 "}, {%64,%65,%66,%67}, "
                 "%68, 1, 1, 1, 1;"
                 : OPERANDS_128(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// Four 8 x 8 matrices from shared memory: lane l says where row l % 8 of matrix l / 8 is.
__device__ __forceinline__ void load4(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
// Four numbers side by side in shared memory.
__device__ __forceinline__ void load_floats(float (&x)[4], u32 at) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ int4 load_int4(u32 at) {
    int4 x;
    asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
    return x;
}
__device__ __forceinline__ void store_int4(u32 at, int x, int y, int z, int w) {
    asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

__device__ __forceinline__ float load_float(u32 at) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
    return x;
}
__device__ __forceinline__ void store_float(u32 at, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory"); }

// ---- tiles

static const float LOG2E = 1.4426950408889634f;
#define INFINITY __int_as_float(0x7f800000)
// One group of four warps that asks, two that work on 64 rows each.
static const int THREADS = 384, BM = 128;
extern __shared__ unsigned char shared_memory[];

__device__ __forceinline__ u32 shared_start() {
    return ((u32)__cvta_generic_to_shared(shared_memory) + 1023) & ~1023u;
}

// A tile lies in panels of 64 columns (128 bytes a row), ROWS x 128 bytes each, chunks of 16 bytes swapped by row: the
// "128-byte swizzle" of the products' descriptions and of the copy engine. Chunk c of row r:
template <int ROWS> __device__ __forceinline__ u32 at(u32 base, int r, int c) {
    return base + (c >> 3) * (ROWS * 128) + r * 128 + (((c ^ r) & 7) << 4);
}
// Descriptions of operands in shared memory. What starts later in a tile has a description so many 16 bytes larger.
__device__ __forceinline__ u64 describe(u32 address, u32 leading, u32 stride) {
    // The same in all threads of a warp, which the assembler cannot know.
    const u32 low = __shfl_sync(0xffffffff, (address & 0x3ffff) >> 4 | (leading >> 4) << 16, 0);
    return (u64)low | (u64)(stride >> 4) << 32 | 1ull << 62;
}
// Rows from `row` of a tile, k along the row.
__device__ __forceinline__ u64 along(u32 base, int row) { return describe(base + row * 128, 16, 1024); }
// Its columns 16 x ...
template <int ROWS> __device__ __forceinline__ u64 columns(u64 along, int x) {
    return along + ((x >> 2) * (ROWS * 128) + (x & 3) * 32) / 16;
}
// All columns of a tile, k from row to row.
template <int ROWS> __device__ __forceinline__ u64 across(u32 base) { return describe(base, ROWS * 128, 1024); }
// Its rows 16 x ...
__device__ __forceinline__ u64 rows(u64 across, int x) { return across + x * 2048 / 16; }

// Asks for ROWS rows of one head.
template <int D, int ROWS> __device__ __forceinline__ void copy_tile(u32 to, const Map &map, u32 barrier, int head, int row) {
#pragma unroll
    for (int panel = 0; panel < D / 64; panel++)
#pragma unroll
        for (int half = 0; half < ROWS / 64; half++)
            copy_box(to + panel * (ROWS * 128) + half * 8192, map, barrier, panel * 64, head, row + half * 64);
}

// Stages of a ring with barriers full and empty; stages count on over all tiles of a block.
template <int STAGES> struct Ring {
    u32 barriers;
    int stage;
    u32 phase;

    __device__ __forceinline__ Ring(u32 barriers) : barriers(barriers), stage(0), phase(0) {}
    static __device__ __forceinline__ void make(u32 barriers, int full, int empty) {
        for (int i = 0; i < STAGES; i++) barrier_init(barriers + 16 * i, full), barrier_init(barriers + 16 * i + 8, empty);
    }
    __device__ __forceinline__ u32 full() const { return barriers + 16 * stage; }
    __device__ __forceinline__ void await_full() const { await(full(), phase); }
    // Of a stage never filled, too.
    __device__ __forceinline__ void await_empty() const { await(full() + 8, phase ^ 1); }
    // By all of a warp, whose products have read what they will.
    __device__ __forceinline__ void release(int stage) const {
        __syncwarp();
        if ((threadIdx.x & 31) == 0) arrive(barriers + 16 * stage + 8);
    }
    __device__ __forceinline__ void release() const { release(stage); }
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    __device__ __forceinline__ void skip(int n) {
        stage += n;
        phase ^= stage / STAGES & 1;
        stage %= STAGES;
    }
};
// Warps that release a stage.
static const int WARPS = 8;

// Where what to do next lies, behind barriers.
static const int SLOT = 128;

// What this block does: pairs of a tile and a head, long and short ones in turn. The group that asks goes through them, and
// leaves each where the others find it once the tile's own rows are there.
struct Work {
    int heads, count, round, head;
    Tile tile;

    __device__ __forceinline__ Work(int heads, int tiles) : heads(heads), count(heads * tiles), round(0), head(0), tile() {}
    __device__ __forceinline__ bool next(const Attention &a) {
        const int g = gridDim.x, b = blockIdx.x, i = round * g + (round & 1 ? g - 1 - b : b);
        round++;
        if (i >= count) return false;
        head = i % heads;
        tile = tile_at(a, i / heads);
        return true;
    }
    __device__ __forceinline__ void leave(u32 barriers) const {
        store_int4(barriers + SLOT, tile.first, tile.end, tile.prefix, tile.length);
        store_int4(barriers + SLOT + 16, tile.start, tile.stop, head, 0);
    }
};
// No more.
__device__ __forceinline__ void leave_end(u32 barriers) { store_int4(barriers + SLOT + 16, 0, 0, -1, 0); }
__device__ __forceinline__ Tile find(u32 barriers, int &head) {
    const int4 x = load_int4(barriers + SLOT), y = load_int4(barriers + SLOT + 16);
    head = y.z;
    return Tile{x.x, x.y, x.z, x.w, y.x, y.y};
}

// What a tile of queries sees, N keys at a time: tiles of the prefix, then own rows. No tile has keys of both.
template <int N> struct Keys {
    int prefix, length, start, split, first, end;

    __device__ __forceinline__ Keys(const Tile &t, int window)
        : prefix(t.prefix), length(t.length), start(t.start), split((t.length + N - 1) / N) {
        const int position = length + t.first - start, from = window ? max(0, position + 1 - window) : 0;
        first = from < length ? from / N : split + (from - length) / N;
        end = until(t.end);
    }
    // The end of what own rows up to `row` see.
    __device__ __forceinline__ int until(int row) const { return split + (row - 1 - start) / N + 1; }
    __device__ __forceinline__ int row(int j) const { return j < split ? prefix + j * N : start + (j - split) * N; }
    // Position of a tile's first key in the sequence.
    __device__ __forceinline__ int position(int j) const { return j < split ? j * N : length + (j - split) * N; }
    // How many of a tile are of this sequence, or more than that.
    __device__ __forceinline__ int real(int j) const { return j < split ? length - j * N : N; }
};

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// s (64 x N) = rows `row` .. of a tile of M rows times the rows of a tile of N: both D wide.
template <int D, int M, int N> __device__ __forceinline__ void scores(float (&s)[N / 2], u32 a, int row, u32 b) {
    const u64 left = along(a, row), right = along(b, 0);
#pragma unroll
    for (int x = 0; x < D / 16; x++) product(s, columns<M>(left, x), columns<N>(right, x), x > 0);
}
// The same with the rows in registers.
template <int D, int N> __device__ __forceinline__ void scores(float (&s)[N / 2], const u32 (&a)[D / 16][4], u32 b) {
    const u64 right = along(b, 0);
#pragma unroll
    for (int x = 0; x < D / 16; x++) product(s, a[x], columns<N>(right, x), x > 0);
}
// 16 rows of a tile of M into the registers of a warp.
template <int D, int M> __device__ __forceinline__ void load_rows(u32 (&a)[D / 16][4], u32 from, int row) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int x = 0; x < D / 16; x++) load4(a[x], at<M>(from, row + (lane & 15), 2 * x + (lane >> 4)));
}
// o (64 x D) += p (64 x N, as a left operand) times a tile of N rows.
template <int D, int N> __device__ __forceinline__ void weigh(float (&o)[D / 2], const u32 (&p)[N / 16][4], u32 b) {
    const u64 right = across<N>(b);
#pragma unroll
    for (int x = 0; x < N / 16; x++) product_turned(o, p[x], rows(right, x));
}
template <int N> __device__ __forceinline__ void as_left(u32 (&p)[N / 16][4], const float (&s)[N / 2]) {
#pragma unroll
    for (int x = 0; x < N / 16; x++)
#pragma unroll
        for (int e = 0; e < 4; e++) p[x][e] = pack(s[8 * x + 2 * e], s[8 * x + 2 * e + 1]);
}

// Element i of a thread's 64 x N results is of column columns(i) + 2 * (lane & 3), and of the thread's first row or the one
// eight below.
__device__ __forceinline__ int column_of(int i) { return (i >> 2) * 8 + (i & 1); }
__device__ __forceinline__ int half_of(int i) { return (i >> 1) & 1; }

// Writes a thread's part of one row of 64 x D results times `by`, in bf16. All of a warp write: two lanes side by side trade, so
// that each writes 8 bytes, and a row gets 32 at a time.
template <int D> __device__ __forceinline__ void write(bf16 *to, const float (&x)[D / 2], int half, float by, int d, bool real) {
    const int odd = threadIdx.x & 1, right = threadIdx.x >> 1 & 1;
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
        const int i = 4 * n + 2 * half, column = (n + odd) * 8 + 4 * right;
        const u32 a = pack(x[i] * by, x[i + 1] * by), b = pack(x[i + 4] * by, x[i + 5] * by);
        const u32 other = __shfl_xor_sync(0xffffffff, odd ? a : b, 1);
        if (real && column < d) *(uint2 *)(to + column) = odd ? make_uint2(other, b) : make_uint2(a, other);
    }
}

// ---- forward

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

// 128 queries and 128 keys at a time. Beside a group's softmax run its products of weights and values, and the other's
// products: groups take turns to begin theirs.
template <int D> __device__ __forceinline__ void forward(const Attention &a, const Maps &maps, int heads, int tiles) {
    const int BN = 128, STAGES = 2, BYTES = BN * D * 2;
    const u32 sq = shared_start(), sk = sq + BM * D * 2, sv = sk + STAGES * BYTES, barriers = sv + STAGES * BYTES;
    if (threadIdx.x == 0) {
        Ring<1>::make(barriers, 1, WARPS);
        Ring<STAGES>::make(barriers + 16, 1, WARPS);
        Ring<STAGES>::make(barriers + 16 + 16 * STAGES, 1, WARPS);
        barriers_made();
    }
    __syncthreads();
    Ring<1> queries(barriers);
    Ring<STAGES> keys(barriers + 16), values(barriers + 16 + 16 * STAGES);
    if (threadIdx.x < 128) {
        registers_fewer<24>();
        if (threadIdx.x != 0) return;
        auto ask = [&](Ring<STAGES> &ring, u32 to, const Map &map, int head, int row) {
            ring.await_empty();
            arrive_expecting(ring.full(), BYTES);
            copy_tile<D, BN>(to + ring.stage * BYTES, map, ring.full(), head, row);
            ring.next();
        };
        Work work(heads, tiles);
        while (work.next(a)) {
            const Tile &t = work.tile;
            const Keys<BN> see(t, a.window);
            const int kv_head = work.head / a.group;
            queries.await_empty();
            work.leave(barriers);
            arrive_expecting(queries.full(), BM * D * 2);
            copy_tile<D, BM>(sq, maps.q, queries.full(), work.head, t.first - a.q_shift);
            queries.next();
            ask(keys, sk, maps.k, kv_head, see.row(see.first));
#pragma unroll 1
            for (int j = see.first; j < see.end; j++) {
                if (j + 1 < see.end) ask(keys, sk, maps.k, kv_head, see.row(j + 1));
                ask(values, sv, maps.v, kv_head, see.row(j));
            }
        }
        queries.await_empty();
        leave_end(barriers);
        arrive(queries.full());
        return;
    }
    registers_more<240>();
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) - 4, group = warp >> 2;
    const float c = a.scale * LOG2E;
    if (group == 1) turn_give(0);
    while (true) {
        int head;
        queries.await_full();
        const Tile t = find(barriers, head);
        if (head < 0) break;
        const Keys<BN> see(t, a.window);
        const int position = t.length + t.first - t.start, last = position + t.end - t.first - 1;
        float o[D / 2], s[BN / 2], m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0}, shrink[2];
        u32 p[BN / 16][4];
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] = 0;
        auto mask = [&](int j) {
            const int first = see.position(j), own = position + warp * 16;
            if (see.real(j) >= BN && first + BN - 1 <= own && !(a.window && first <= last - a.window)) return;
            int from[2], to[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = own + (lane >> 2) + 8 * half;
                to[half] = min(see.real(j), row + 1 - first) - 2 * (lane & 3);
                from[half] = (a.window ? row + 1 - a.window - first : 0) - 2 * (lane & 3);
            }
#pragma unroll
            for (int i = 0; i < BN / 2; i++)
                if (column_of(i) >= to[half_of(i)] || column_of(i) < from[half_of(i)]) s[i] = -INFINITY;
        };
        auto have_scores = [&](int j) {
            keys.release();
            keys.next();
            if (j + 1 == see.end) queries.release(), queries.next();
            mask(j);
            softmax<BN>(s, m, l, shrink, c);
        };
        keys.await_full();
        products_begin();
        scores<D, BM, BN>(s, sq, group * 64, sk + keys.stage * BYTES);
        products_end();
        products_wait<0>();
        arrived(s);
        have_scores(see.first);
        as_left<BN>(p, s);
        for (int j = see.first; j + 1 < see.end; j++) {
            keys.await_full();
            turn_wait(group);
            products_begin();
            scores<D, BM, BN>(s, sq, group * 64, sk + keys.stage * BYTES);
            products_end();
            values.await_full();
            weigh<D, BN>(o, p, sv + values.stage * BYTES);
            products_end();
            turn_give(1 - group);
            products_wait<1>();
            arrived(s);
            have_scores(j + 1);
            before_wait(l[0] + l[1]);
            products_wait<0>();
            arrived(o);
            values.release();
            values.next();
#pragma unroll
            for (int i = 0; i < D / 2; i++) o[i] *= shrink[half_of(i)];
            as_left<BN>(p, s);
        }
        values.await_full();
        products_begin();
        weigh<D, BN>(o, p, sv + values.stage * BYTES);
        products_end();
        products_wait<0>();
        arrived(o);
        values.release();
        values.next();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float sum = quad_sum(l[half]);
            const int r = t.first + warp * 16 + (lane >> 2) + 8 * half;
            write<D>(a.out + (i64)(r - a.q_shift) * a.ldo + (i64)head * a.d, o, half, 1.f / sum, a.d, r < t.end);
            if ((lane & 3) == 0 && r < t.end && r >= a.log_shift)
                a.log_sums[(i64)head * a.log_rows + r - a.log_shift] = m[half] * a.scale + logf(sum);
        }
    }
    // The last turn that the other group gave.
    if (group == 0) turn_wait(0);
}

// ---- backward

// dq of 128 queries of one head, 64 keys at a time. dS = P * (dO V^T - delta), dQ = dS K * scale. Queries and dO of 128 columns
// stay in registers: products would else wait for shared memory, which has as much to give as they take. Not of 64: ptxas 12.8
// to 13.0 then puts dS, a left operand of as many registers, into those of dO, which the next tile wants. SPLIT: of 64 queries, to which
// the two groups take every other tile of keys, for when tiles are fewer than multiprocessors.
template <int D, bool SPLIT = false> __device__ __forceinline__ void backward_q(const Attention &a, const Maps &maps, int heads, int tiles) {
    const int BN = 64, STAGES = 4, BYTES = BN * D * 2, ROWS = SPLIT ? 64 : BM;
    const bool HELD = D > 64;
    const u32 sq = shared_start(), so = sq + ROWS * D * 2, parts = so + ROWS * D * 2, sk = sq + 2 * BM * D * 2,
              sv = sk + STAGES * BYTES, barriers = sv + STAGES * BYTES;
    if (threadIdx.x == 0) {
        Ring<1>::make(barriers, 1, WARPS);
        Ring<STAGES>::make(barriers + 16, 1, SPLIT ? WARPS / 2 : WARPS);
        barriers_made();
    }
    __syncthreads();
    Ring<1> queries(barriers);
    Ring<STAGES> keys(barriers + 16);
    if (threadIdx.x < 128) {
        registers_fewer<24>();
        if (threadIdx.x != 0) return;
        Work work(heads, tiles);
        while (work.next(a)) {
            const Tile &t = work.tile;
            const Keys<BN> see(t, a.window);
            const int kv_head = work.head / a.group;
            queries.await_empty();
            work.leave(barriers);
            arrive_expecting(queries.full(), 2 * ROWS * D * 2);
            copy_tile<D, ROWS>(sq, maps.q, queries.full(), work.head, t.first - a.q_shift);
            copy_tile<D, ROWS>(so, maps.dout, queries.full(), work.head, t.first - a.q_shift);
            queries.next();
#pragma unroll 1
            for (int j = see.first; j < see.end; j++) {
                keys.await_empty();
                arrive_expecting(keys.full(), 2 * BYTES);
                copy_tile<D, BN>(sk + keys.stage * BYTES, maps.k, keys.full(), kv_head, see.row(j));
                copy_tile<D, BN>(sv + keys.stage * BYTES, maps.v, keys.full(), kv_head, see.row(j));
                keys.next();
            }
        }
        queries.await_empty();
        leave_end(barriers);
        arrive(queries.full());
        return;
    }
    registers_more<240>();
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) - 4, group = warp >> 2, mine = (SPLIT ? warp & 3 : warp) * 16;
    const float c = a.scale * LOG2E;
    while (true) {
        int head;
        queries.await_full();
        const Tile t = find(barriers, head);
        if (head < 0) break;
        const Keys<BN> see(t, a.window);
        const int position = t.length + t.first - t.start, last = position + t.end - t.first - 1;
        float log_sum[2], delta[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = t.first + mine + (lane >> 2) + 8 * half;
            const i64 i = (i64)head * a.log_rows + r - a.log_shift;
            log_sum[half] = r < t.end ? a.log_sums[i] * LOG2E : 0;
            delta[half] = r < t.end ? a.delta[i] : 0;
        }
        float dq[D / 2], s[BN / 2], dp[BN / 2];
        u32 q[D / 16][4], dout[D / 16][4], ds[BN / 16][4];
#pragma unroll
        for (int i = 0; i < D / 2; i++) dq[i] = 0;
        if (HELD) {
            load_rows<D, ROWS>(q, sq, mine);
            load_rows<D, ROWS>(dout, so, mine);
            queries.release();
            queries.next();
        }
        // The first half of the queries does not see the last keys that the other half sees.
        const int end = SPLIT ? see.end : see.until(min(t.end, t.first + 64 * group + 64));
        int before = -1;
        Ring<STAGES> ring = keys;
        if (SPLIT) ring.skip(group);
        for (int j = see.first + (SPLIT ? group : 0); j < end; j += SPLIT ? 2 : 1) {
            const int stage = ring.stage;
            ring.await_full();
            products_begin();
            if (HELD) scores<D, BN>(s, q, sk + stage * BYTES);
            else scores<D, ROWS, BN>(s, sq, mine & ~63, sk + stage * BYTES);
            products_end();
            if (HELD) scores<D, BN>(dp, dout, sv + stage * BYTES);
            else scores<D, ROWS, BN>(dp, so, mine & ~63, sv + stage * BYTES);
            products_end();
            products_wait<1>();
            arrived(s);
            // What the tile before adds to dq is made, too.
            if (before >= 0) ring.release(before);
            const int first = see.position(j), own = position + mine;
            const bool masked = see.real(j) < BN || first + BN - 1 > own || (a.window && first <= last - a.window);
#pragma unroll
            for (int i = 0; i < BN / 2; i++) s[i] = exp2_(s[i] * c - log_sum[half_of(i)]);
            if (masked) {
                int from[2], to[2];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row = own + (lane >> 2) + 8 * half;
                    to[half] = min(see.real(j), row + 1 - first) - 2 * (lane & 3);
                    from[half] = (a.window ? row + 1 - a.window - first : 0) - 2 * (lane & 3);
                }
#pragma unroll
                for (int i = 0; i < BN / 2; i++)
                    if (column_of(i) >= to[half_of(i)] || column_of(i) < from[half_of(i)]) s[i] = 0;
            }
            before_wait(s);
            products_wait<0>();
            arrived(dp);
#pragma unroll
            for (int i = 0; i < BN / 2; i++) s[i] *= dp[i] - delta[half_of(i)];
            as_left<BN>(ds, s);
            products_begin();
            weigh<D, BN>(dq, ds, sk + stage * BYTES);
            products_end();
            before = stage;
            ring.skip(SPLIT ? 2 : 1);
        }
        products_wait<0>();
        arrived(dq);
        if (!HELD) queries.release(), queries.next();
        if (before >= 0) ring.release(before);
        if (SPLIT) {
            keys.skip(see.end - see.first);
            // One half of the sum goes to the group that has the other.
            const u32 part = parts + (threadIdx.x & 127) * 4;
            if (group == 1) {
#pragma unroll
                for (int i = 0; i < D / 2; i++) store_float(part + i * 512, dq[i]);
            }
            turn_wait(0);
            if (group == 0) {
#pragma unroll
                for (int i = 0; i < D / 2; i++) dq[i] += load_float(part + i * 512);
            }
            turn_wait(1);
            if (group == 1) continue;
        } else {
            keys = ring;
#pragma unroll 1
            for (int j = end; j < see.end; j++) {
                keys.await_full();
                keys.release();
                keys.next();
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = t.first + mine + (lane >> 2) + 8 * half;
            write<D>(a.dq + (i64)(r - a.q_shift) * a.lddq + (i64)head * a.d, dq, half, a.scale, a.d, r < t.end);
        }
    }
}

// dk and dv of 128 keys from one query head, 64 queries at a time. Keys are the rows, so that P and dS stay in registers as
// the left operand. Groups of 128 columns take turns to begin the products of a tile's scores, so that P and dS of one are made
// beside the products of the other.
template <int D> __device__ __forceinline__ void backward_kv(const Attention &a, const Maps &maps, int heads, int tiles) {
    const int BN = 64, STAGES = 4, BYTES = BN * D * 2;
    const bool TURNS = D > 64;
    // The 16 numbers of queries that one lane of four wants lie together, and apart from the next lane's by so much that the four
    // read from different banks.
    const int LANE = 20 * 4, NUMBERS = 4 * LANE;
    const u32 sk = shared_start(), sv = sk + BM * D * 2, sq = sv + BM * D * 2, so = sq + STAGES * BYTES, slog = so + STAGES * BYTES,
              sdelta = slog + STAGES * NUMBERS, barriers = sdelta + STAGES * NUMBERS;
    if (threadIdx.x == 0) {
        Ring<1>::make(barriers, 1, WARPS);
        Ring<STAGES>::make(barriers + 16, 33, WARPS);
        barriers_made();
    }
    __syncthreads();
    Ring<1> keys(barriers);
    Ring<STAGES> queries(barriers + 16);
    if (threadIdx.x < 128) {
        registers_fewer<24>();
        if (threadIdx.x >= 32) return;
        const int lane = threadIdx.x;
        Work work(heads, tiles);
        while (work.next(a)) {
            const Tile &t = work.tile;
            const int stop = a.window ? min(t.stop, t.end - 1 + a.window) : t.stop;
            if (lane == 0) {
                keys.await_empty();
                work.leave(barriers);
                arrive_expecting(keys.full(), 2 * BM * D * 2);
                copy_tile<D, BM>(sk, maps.k, keys.full(), work.head / a.group, t.first);
                copy_tile<D, BM>(sv, maps.v, keys.full(), work.head / a.group, t.first);
            }
            keys.next();
            const i64 row = (i64)work.head * a.log_rows - a.log_shift;
#pragma unroll 1
            for (int first = t.first; first < stop; first += BN) {
                queries.await_empty();
                if (lane == 0) {
                    arrive_expecting(queries.full(), 2 * BYTES);
                    copy_tile<D, BN>(sq + queries.stage * BYTES, maps.q, queries.full(), work.head, first - a.q_shift);
                    copy_tile<D, BN>(so + queries.stage * BYTES, maps.dout, queries.full(), work.head, first - a.q_shift);
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int i = half * 32 + lane, r = first + i;
                    const u32 to = queries.stage * NUMBERS + (i >> 1 & 3) * LANE + ((i >> 3) * 2 + (i & 1)) * 4;
                    const i64 from = r < stop ? row + r : 0;
                    copy4(slog + to, a.log_sums + from, r < stop);
                    copy4(sdelta + to, a.delta + from, r < stop);
                }
                copies_arrive(queries.full());
                queries.next();
            }
        }
        if (lane == 0) {
            keys.await_empty();
            leave_end(barriers);
            arrive(keys.full());
        }
        return;
    }
    registers_more<240>();
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) - 4, group = warp >> 2;
    const float c = a.scale * LOG2E;
    if (TURNS && group == 1) turn_give(0);
    while (true) {
        int head;
        keys.await_full();
        const Tile t = find(barriers, head);
        if (head < 0) break;
        const int stop = a.window ? min(t.stop, t.end - 1 + a.window) : t.stop;
        float dk[D / 2], dv[D / 2], s[BN / 2], dp[BN / 2];
        u32 p[BN / 16][4], ds[BN / 16][4];
#pragma unroll
        for (int i = 0; i < D / 2; i++) dk[i] = dv[i] = 0;
        // The first queries see none of the last keys.
        if (group == 1) {
            queries.await_full();
            queries.release();
            queries.next();
            if (TURNS) turn_wait(1), turn_give(0);
        }
        int before = -1;
        for (int first = t.first + 64 * group; first < stop; first += BN) {
            const int stage = queries.stage;
            queries.await_full();
            if (TURNS) turn_wait(group);
            products_begin();
            scores<D, BM, BN>(s, sk, group * 64, sq + stage * BYTES);
            products_end();
            // What the tile before adds to dk and dv is made: its registers are free.
            products_wait<1>();
            if (before >= 0) queries.release(before);
            products_begin();
            scores<D, BM, BN>(dp, sv, group * 64, so + stage * BYTES);
            products_end();
            if (TURNS) turn_give(1 - group);
            products_wait<1>();
            arrived(s);
            const u32 logs = slog + stage * NUMBERS + (lane & 3) * LANE, deltas = sdelta + stage * NUMBERS + (lane & 3) * LANE;
#pragma unroll
            for (int n = 0; n < BN / 8; n += 2) {
                float log_sum[4];
                load_floats(log_sum, logs + n * 8);
#pragma unroll
                for (int e = 0; e < 4; e++) log_sum[e] *= LOG2E;
#pragma unroll
                for (int e = 0; e < 8; e++) s[4 * n + e] = exp2_(s[4 * n + e] * c - log_sum[(e >> 2) * 2 + (e & 1)]);
            }
            if (first < t.first + 64 * group + 64 || first + BN > stop || a.window) {
#pragma unroll
                for (int i = 0; i < BN / 2; i++) {
                    const int query = first + column_of(i) + 2 * (lane & 3), key = t.first + warp * 16 + (lane >> 2) + 8 * half_of(i);
                    if (key > query || query >= stop || (a.window && key <= query - a.window)) s[i] = 0;
                }
            }
            as_left<BN>(p, s);
            products_begin();
            weigh<D, BN>(dv, p, so + stage * BYTES);
            products_end();
            products_wait<1>();
            arrived(dp);
#pragma unroll
            for (int n = 0; n < BN / 8; n += 2) {
                float delta[4];
                load_floats(delta, deltas + n * 8);
#pragma unroll
                for (int e = 0; e < 8; e++) dp[4 * n + e] = s[4 * n + e] * (dp[4 * n + e] - delta[(e >> 2) * 2 + (e & 1)]);
            }
            as_left<BN>(ds, dp);
            products_begin();
            weigh<D, BN>(dk, ds, sq + stage * BYTES);
            products_end();
            if (first + BN >= stop) keys.release();
            before = stage;
            queries.next();
        }
        products_wait<0>();
        arrived(dk);
        arrived(dv);
        if (before >= 0) queries.release(before);
        else keys.release();
        keys.next();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = t.first + warp * 16 + (lane >> 2) + 8 * half;
            const i64 to = (i64)(r - a.q_shift) * a.lddk + (i64)head * a.d;
            write<D>(a.dk + to, dk, half, a.scale, a.d, r < t.end);
            write<D>(a.dv + to, dv, half, 1, a.d, r < t.end);
        }
    }
    // The last turn that the other group gave.
    if (TURNS && group == 0) turn_wait(0);
}

#define KERNEL(NAME, OF) \
    __global__ void __launch_bounds__(THREADS, 1) NAME(const __grid_constant__ Attention a, const __grid_constant__ Maps maps, int heads, int tiles) { \
        OF(a, maps, heads, tiles); \
    }
extern "C" {
KERNEL(hopper_forward_64, forward<64>)
KERNEL(hopper_forward_128, forward<128>)
KERNEL(hopper_backward_q_64, backward_q<64>)
KERNEL(hopper_backward_q_128, backward_q<128>)
KERNEL(hopper_backward_q_split_64, (backward_q<64, true>))
KERNEL(hopper_backward_q_split_128, (backward_q<128, true>))
KERNEL(hopper_backward_kv_64, backward_kv<64>)
KERNEL(hopper_backward_kv_128, backward_kv<128>)
}
