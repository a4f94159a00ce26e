// archs: 90a
//
// The update of a matrix whose gradient is a product over the step's tokens, dW = dy^T x, without that gradient in memory, on
// Hopper: products of whole warp groups (wgmma) on tiles that the copy engine brings. What the update needs to know of dW
// before comes of its factors: the projection (the library's products), and the norm of the scaled gradient,
//     |F dW|^2 = sum over tokens i, j of (C F^2 C^T)(i, j) (S S^T)(i, j),
// where C is the factor whose columns are dW's channels, F their factors, and S the other. Then every tile of dW is made
// once, in f32, and goes into the weights from where it was made. The rounding of weights is apollo.cu's, to the bit.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define ADD __fadd_rn
#define MUL __fmul_rn

// As the driver makes it: which matrix, in tiles of what size.
struct __align__(64) Map { u64 words[16]; };

static const double TINY = 1e-8;
static const int THREADS = 256, STAGES = 3, STAGE = 32768, TILE = 128;
extern __shared__ unsigned char shared_memory[];

__device__ __forceinline__ u32 shared_start() {
    return ((u32)__cvta_generic_to_shared(shared_memory) + 1023) & ~1023u;
}

// ---- Barriers that copies and warps arrive at, in shared memory

__device__ __forceinline__ void barrier_init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void await(u32 barrier, int parity) {
    asm volatile("{.reg .pred p;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done;\n"
                 "bra again;\n"
                 "done: }" ::"r"(barrier), "r"(parity) : "memory");
}
// A tile whose first column and row these are, from memory to shared memory; what lies outside is zero.
__device__ __forceinline__ void bring(u32 to, const Map &map, int column, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
__device__ __forceinline__ void take_away(u32 from, const Map &map, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                 ::"l"(&map), "r"(column), "r"(row), "r"(from) : "memory");
}

// What ordinary instructions wrote to shared memory is seen by the copy engine and the products from here on.
__device__ __forceinline__ void show() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void barriers_made() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    show();
}
// All that was to be taken away is.
__device__ __forceinline__ void taken_away() {
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
}
__device__ __forceinline__ u32 load_word(u32 at) {
    u32 x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
    return x;
}
__device__ __forceinline__ void store_word(u32 at, u32 x) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory"); }
// Four matrices of 8 x 8 whose rows lie where eight lanes each say.
__device__ __forceinline__ void load4(u32 (&x)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(at) : "memory");
}

template <int N> __device__ __forceinline__ void registers_fewer() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void registers_more() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
// The warps of a group wait for each other.
__device__ __forceinline__ void group_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }
// Bytes in a row, a multiple of 16.
__device__ __forceinline__ void bring_line(u32 to, const float *from, int bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void take_away_end() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// What was to be taken away has been read: its place may be written to.
__device__ __forceinline__ void taken_away_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ float2 load_two(u32 at) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at) : "memory");
    return x;
}
__device__ __forceinline__ u32 max_halves(u32 x, u32 y) {
    u32 z;
    asm("max.u16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}

// ---- Products

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
#define REGISTERS_128 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define OPERANDS_128(c) F16(c, 0), F16(c, 16), F16(c, 32), F16(c, 48)
#define REGISTERS_256 REGISTERS_128 "," \
    "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
    "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
    "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
    "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define OPERANDS_256(c) OPERANDS_128(c), F16(c, 64), F16(c, 80), F16(c, 96), F16(c, 112)

// c (64 x 256) = or += a^T (16 x 64, turned) b (16 x 256), both in shared memory in rows of k.
__device__ __forceinline__ void product_turned(float (&c)[128], u64 a, u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %130, 0;"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" REGISTERS_256 "}, %128, %129, p, 1, 1, 1, 1;}"
                 : OPERANDS_256(c) : "l"(a), "l"(b), "r"(add));
}
// c (64 x 128) = or += a (64 x 16, in registers) b^T (128 x 16 in shared memory, k along rows).
__device__ __forceinline__ void product_along(float (&c)[64], const u32 (&a)[4], u64 b, int add) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0;"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_128 "}, {%64,%65,%66,%67}, %68, p, 1, 1, 0;}"
                 : OPERANDS_128(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
// A tile lies in panels of 64 columns (128 bytes a row), chunks of 16 bytes swapped by row: the "128-byte swizzle" that the
// copy engine writes and the products read.
__device__ __forceinline__ u64 describe(u32 address, u32 leading, u32 stride) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | 1ull << 62;
}

// ---- As in apollo.cu

struct Stream { u32 key0, key1, tensor, purpose, when; };

__device__ __forceinline__ uint4 philox(const Stream &s, u32 block) {
    u32 c0 = block, c1 = s.purpose, c2 = s.tensor, c3 = s.when, k0 = s.key0, k1 = s.key1;
#pragma unroll
    for (int i = 0; i < 10; i++) {
        const u32 a_high = __umulhi(0xD2511F53u, c0), a_low = 0xD2511F53u * c0;
        const u32 b_high = __umulhi(0xCD9E8D57u, c2), b_low = 0xCD9E8D57u * c2;
        c0 = b_high ^ c1 ^ k0, c1 = b_low, c2 = a_high ^ c3 ^ k1, c3 = a_low;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}
__device__ __forceinline__ u32 stochastic_bf16(float x, u32 random) {
    const u32 bits = __float_as_uint(x), up = (bits + random) >> 16 & 0xffff, down = bits >> 16;
    if ((up & 0x7f80) == 0x7f80) return x != x ? down | 0x40 : down;
    return up;
}
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

__device__ __forceinline__ double block_sum(double x, double *scratch) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int w = 16; w; w /= 2) x += __shfl_xor_sync(0xffffffff, x, w);
    __syncthreads();
    if (lane == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = lane < blockDim.x / 32 ? scratch[lane] : 0;
#pragma unroll
    for (int w = 16; w; w /= 2) x += __shfl_xor_sync(0xffffffff, x, w);
    return x;
}
__device__ __forceinline__ bool last_of(int total, int *counter) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(counter, 1) == total - 1;
        if (last) *counter = 0;
    }
    __syncthreads();
    if (last) __threadfence();
    return last;
}
__device__ __forceinline__ double number(const double *x) {
    double y;
    asm volatile("ld.global.cg.f64 %0, [%1];" : "=d"(y) : "l"(x) : "memory");
    return y;
}

// What lane q of four has of four words (of its own block of random numbers) becomes the q-th word of each lane's.
__device__ __forceinline__ void turn(u32 (&w)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    u32 a = __shfl_xor_sync(0xffffffff, odd ? w[0] : w[1], 1), b = __shfl_xor_sync(0xffffffff, odd ? w[2] : w[3], 1);
    if (odd) w[0] = a, w[2] = b;
    else w[1] = a, w[3] = b;
    a = __shfl_xor_sync(0xffffffff, upper ? w[0] : w[2], 2), b = __shfl_xor_sync(0xffffffff, upper ? w[1] : w[3], 2);
    if (upper) w[0] = a, w[1] = b;
    else w[2] = a, w[3] = b;
}

struct Update {
    int m, n, tokens;
    const float *factors;
    int by;
    const float *gain;
    float keep;
    int stochastic;
    Stream s;
    const int *verdict, *halted;
};

// w (m x n, bf16) <- round((w - factor dW gain) keep), dW = dy^T x over `tokens` rows of dy (m wide) and x (n wide). Factors by
// row (1) or by column (2). Tiles of 128 x 256 of w; three warp groups: two with 64 rows each of the tile, and a warp of the
// third that has what they need brought. A block goes from tile to tile, so that the operands of the next come while this one
// goes into the weights; the random bits are made, and the weights come, while products run.
static const int WIDTH = 256, DEEP = 32, PIECE = DEEP * 128, STEP = 6 * PIECE, STEPS = 6, OLD = STEPS * STEP, LINES = OLD + 65536;
// Tiles of a column that run at the same time; parts of a tile's products with random bits after each.
static const int BAND = 16, PARTS = 8;

// A warp group's 64 x 256 of the weights: `at` is where the thread's first word lies, `line` where its first columns' factors.
template <int BY, int BITS>
__device__ __forceinline__ void move(const float (&c)[128], const u32 (&random)[16][4], u32 at, u32 line, const float (&by_row)[2],
                                     float all, float keep) {
    u32 next[8];
    float2 factor[4];
    auto load = [&](int four) {
#pragma unroll
        for (int i = 0; i < 8; i++) next[i] = load_word((at ^ ((4 * four + (i & 3)) & 7) << 4) + (four >> 1) * 8192 + (i >> 2) * 1024);
        if (BY == 2) {
#pragma unroll
            for (int k = 0; k < 4; k++) factor[k] = load_two(line + 128 * four + 32 * k);
        }
    };
    load(0);
#pragma unroll
    for (int four = 0; four < 8; four++) {
        u32 old[8];
        float f[8];
#pragma unroll
        for (int i = 0; i < 8; i++) old[i] = next[i];
        if (BY == 2) {
#pragma unroll
            for (int k = 0; k < 4; k++) f[2 * k] = MUL(factor[k].x, all), f[2 * k + 1] = MUL(factor[k].y, all);
        }
        if (four < 7) load(four + 1);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 most = 0, w[4];
            float y[8];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int j = 4 * four + k;
                const u32 o = old[4 * half + k], r = random[2 * four + half][k];
                const float f0 = BY == 2 ? f[2 * k] : by_row[half], f1 = BY == 2 ? f[2 * k + 1] : by_row[half];
                y[2 * k] = MUL(ADD(__uint_as_float(o << 16), -MUL(f0, c[4 * j + 2 * half])), keep);
                y[2 * k + 1] = MUL(ADD(__uint_as_float(o & 0xffff0000), -MUL(f1, c[4 * j + 2 * half + 1])), keep);
                if (BITS) {
                    w[k] = __byte_perm(__float_as_uint(y[2 * k]) + (r & 0xffff), __float_as_uint(y[2 * k + 1]) + (r >> 16), 0x7632);
                    most = max_halves(most, w[k] & 0x7fff7fff);
                } else w[k] = pack(y[2 * k], y[2 * k + 1]);
            }
            // What would round to infinity rounds down, and what is no number stays none.
            if (BITS && ((most & 0xffff) >= 0x7f80 || most >> 16 >= 0x7f80)) {
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const u32 r = random[2 * four + half][k];
                    w[k] = stochastic_bf16(y[2 * k], r & 0xffff) | stochastic_bf16(y[2 * k + 1], r >> 16) << 16;
                }
            }
#pragma unroll
            for (int k = 0; k < 4; k++)
                store_word((at ^ ((4 * four + k) & 7) << 4) + (four >> 1) * 8192 + half * 1024, w[k]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
update_product(const __grid_constant__ Map dy, const __grid_constant__ Map x, const __grid_constant__ Map weights,
               const __grid_constant__ Update a) {
    __shared__ __align__(8) u64 barriers[2 * STEPS + 2];
    if (*a.verdict || *a.halted) return;
    const int m = a.m, n = a.n, tiles_m = (m + TILE - 1) / TILE, tiles_n = (n + WIDTH - 1) / WIDTH;
    const int tiles = tiles_m * tiles_n, first = blockIdx.x, step = gridDim.x, count = (a.tokens + DEEP - 1) / DEEP;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = warp >> 2;
    const u32 start = shared_start();
    const u32 full = (u32)__cvta_generic_to_shared(barriers), empty = full + 8 * STEPS, ready = empty + 8 * STEPS;
    int row0, column0;
    // Tiles that run at the same time lie in a square, so that their operands come from the L2 cache.
    auto place = [&](int tile) {
        const int band = tile / (BAND * tiles_n), inside = tile - band * BAND * tiles_n, high = min(tiles_m - band * BAND, BAND);
        row0 = (band * BAND + inside % high) * TILE, column0 = inside / high * WIDTH;
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < STEPS; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, 8);
        barrier_init(ready, 1), barrier_init(ready + 8, 1);
        barriers_made();
    }
    __syncthreads();

    int at = 0, parity = 0; // of the next stage
    if (group == 2) {
        registers_fewer<24>();
        if (warp == 8 && lane == 0) {
            for (int tile = first; tile < tiles; tile += step) {
                place(tile);
#pragma unroll 1
                for (int i = 0; i < count; i++) {
                    const u32 to = start + at * STEP, barrier = full + 8 * at;
                    await(empty + 8 * at, parity ^ 1);
                    expect(barrier, STEP);
                    bring(to, dy, row0, DEEP * i, barrier);
                    bring(to + PIECE, dy, row0 + 64, DEEP * i, barrier);
#pragma unroll
                    for (int k = 0; k < 4; k++) bring(to + (2 + k) * PIECE, x, column0 + 64 * k, DEEP * i, barrier);
                    if (++at == STEPS) at = 0, parity ^= 1;
                }
            }
        }
        __syncwarp();
    } else {
        registers_more<240>();
        const u32 own = start + OLD + group * 32768, line = start + LINES + group * 1024, came = ready + 8 * group;
        const int q = lane & 3, top = (warp & 3) * 16 + (lane >> 2);
        const u32 word = own + top * 128 + ((lane >> 2) << 4) + 4 * q;
        const bool one = (threadIdx.x & 127) == 0;
        const float all = *a.gain;
        int turns = 0;
        auto release = [&](int stage) {
            if (lane == 0) arrive(empty + 8 * stage);
        };
        for (int tile = first; tile < tiles; tile += step) {
            place(tile);
            const int row = row0 + group * 64 + top;
            float by_row[2] = {0, 0};
#pragma unroll
            for (int half = 0; half < 2; half++)
                if (a.by == 1 && row + 8 * half < m) by_row[half] = MUL(a.factors[row + 8 * half], all);
            float c[128];
            u32 random[16][4];
            int i = 0, older = 0, newer = 0;
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                for (const int end = count * (part + 1) / PARTS; i < end; i++) {
                    const u32 stage = start + at * STEP;
                    await(full + 8 * at, parity);
                    // Two stages are with the tensor cores when a part ends: work for as long as its random bits take.
                    if (i > 1) {
                        products_wait<1>();
                        release(older);
                    }
                    products_begin();
#pragma unroll
                    for (int k = 0; k < DEEP / 16; k++)
                        product_turned(c, describe(stage + group * PIECE + k * 2048, PIECE, 1024), describe(stage + 2 * PIECE + k * 2048, PIECE, 1024),
                                       i > 0 || k > 0);
                    products_end();
                    older = newer, newer = at;
                    if (++at == STEPS) at = 0, parity ^= 1;
                }
                if (part == PARTS / 4 - 1 && one) {
                    // The weights of the tile before have left.
                    taken_away_read();
                    const int columns = min(n - column0, WIDTH);
                    expect(came, 32768 + (a.by == 2 ? 4 * columns : 0));
#pragma unroll
                    for (int k = 0; k < 4; k++) bring(own + 8192 * k, weights, column0 + 64 * k, row0 + group * 64, came);
                    if (a.by == 2) bring_line(line, a.factors + column0, 4 * columns, came);
                }
                if (a.stochastic) {
#pragma unroll
                    for (int k = 16 / PARTS * part; k < 16 / PARTS * (part + 1); k++) {
                        const uint4 b = philox(a.s, (u32)(row + 8 * (k & 1)) * (u32)(n / 8) + (u32)(column0 / 8 + 4 * (k >> 1) + q));
                        random[k][0] = b.x, random[k][1] = b.y, random[k][2] = b.z, random[k][3] = b.w;
                        turn(random[k]);
                    }
                }
            }
            products_wait<0>();
            arrived(c);
            if (count > 1) release(older);
            release(newer);
            await(came, turns++ & 1);
            const u32 factors = line + 8 * q;
            if (a.by == 1) {
                if (a.stochastic) move<1, 1>(c, random, word, factors, by_row, all, a.keep);
                else move<1, 0>(c, random, word, factors, by_row, all, a.keep);
            } else {
                if (a.stochastic) move<2, 1>(c, random, word, factors, by_row, all, a.keep);
                else move<2, 0>(c, random, word, factors, by_row, all, a.keep);
            }
            show();
            group_sync(group);
            if (one) {
#pragma unroll
                for (int k = 0; k < 4; k++) take_away(own + 8192 * k, weights, column0 + 64 * k, row0 + group * 64);
                take_away_end();
            }
        }
        if (one) taken_away();
        __syncwarp();
    }
}

// A matrix of several whose norms are made together.
struct Norm {
    const float *gram, *factors;
    float *last, *gain; // the norm of the update before, negative before the first; what multiplies the gradient besides
    const int *verdict;
    int channels;
    float rate;
};
struct Norms {
    Map side[8];
    Norm of[8];
    int first[9]; // parts of the matrices before
};

// The norm of F dW (see above), and from it the gain: the rate over what the limiter takes, as in apollo.cu. `side`: C, rows of
// tokens, channels wide; `gram` (tokens x ld, f32): S S^T, of which what lies on or below the diagonal is read. Block (pair, part,
// matrix): a tile of 128 x 128 of C F^2 C^T on or below the diagonal, of the channels 64 first .. that are the part's. `sums`: one of
// every block.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
gram_norms(const __grid_constant__ Norms all, int ld, int tokens, float growth, double *sums, const int *halted, int *counters) {
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    __shared__ double scratch[32];
    int which = 0;
    while (which < 7 && blockIdx.y >= all.first[which + 1]) which++;
    const Norm &f = all.of[which];
    if (*f.verdict || *halted) return;
    const Map &side = all.side[which];
    const float *factors = f.factors;
    const int channels = f.channels;
    int low = 0, pair = blockIdx.x;
    while (pair > low) pair -= ++low;
    const int a0 = low * TILE, b0 = pair * TILE;
    const bool square = low == pair;
    const int chunks = (channels + 63) / 64, parts = all.first[which + 1] - all.first[which], part = blockIdx.y - all.first[which];
    const int from = chunks * part / parts, count = chunks * (part + 1) / parts - from;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, q = lane & 3;
    const u32 stages = shared_start();
    const u32 full = (u32)__cvta_generic_to_shared(barriers), empty = full + 8 * STAGES;
    auto ask = [&](int i) {
        const u32 to = stages + i % STAGES * STAGE, barrier = full + i % STAGES * 8;
        const int column = 64 * (from + i), bytes = 4 * min(64, (channels - column + 3) & ~3);
        expect(barrier, (square ? STAGE / 2 : STAGE) + bytes);
        bring_line(stages + STAGES * STAGE + i % STAGES * 256, factors + column, bytes, barrier);
        bring(to, side, 64 * (from + i), a0, barrier);
        if (!square) bring(to + 16384, side, 64 * (from + i), b0, barrier);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, THREADS / 32);
        barriers_made();
        for (int i = 0; i < min(STAGES, count); i++) ask(i);
    }
    __syncthreads();

    float c[64];
#pragma unroll
    for (int i = 0; i < 64; i++) c[i] = 0;
    const int row = (warp >> 2) * 64 + (warp & 3) * 16 + (lane & 15);
    for (int i = 0; i < count; i++) {
        const u32 stage = stages + i % STAGES * STAGE;
        await(full + i % STAGES * 8, i / STAGES & 1);
        // Squares of the factors of the columns that the thread has: 2 q, 2 q + 1, and 8 more on, of every 16.
        float2 f2[8];
        const bool whole = 64 * (from + i + 1) <= channels;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const int column = 8 * k + 2 * q;
            f2[k] = load_two(stages + STAGES * STAGE + i % STAGES * 256 + 4 * column);
            f2[k].x *= f2[k].x, f2[k].y *= f2[k].y;
            if (!whole) {
                if (64 * (from + i) + column >= channels) f2[k].x = 0;
                if (64 * (from + i) + column + 1 >= channels) f2[k].y = 0;
            }
        }
        u32 a[4][4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            load4(a[k], stage + row * 128 + (((2 * k + (lane >> 4)) ^ (row & 7)) << 4));
#pragma unroll
            for (int e = 0; e < 4; e++) {
                // Rounded once, by itself: over all tokens and channels that comes to nothing.
                const float2 f = f2[2 * k + (e >> 1)];
                a[k][e] = pack(__uint_as_float(a[k][e] << 16) * f.x, __uint_as_float(a[k][e] & 0xffff0000) * f.y);
            }
        }
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; k++)
            product_along(c, a[k], describe(stage + (square ? 0 : 16384) + k * 32, 16, 1024), 1);
        products_end();
        products_wait<0>();
        if (lane == 0) arrive(empty + i % STAGES * 8);
        if (threadIdx.x == 0 && i + STAGES < count) {
            await(empty + i % STAGES * 8, i / STAGES & 1);
            ask(i + STAGES);
        }
    }
    arrived(c);
    float sum = 0;
    const int top = a0 + (warp >> 2) * 64 + (warp & 3) * 16 + (lane >> 2);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (top + 8 * half >= tokens) continue;
        const float *other = f.gram + (i64)(top + 8 * half) * ld + b0 + 2 * q;
#pragma unroll
        for (int j = 0; j < 16; j++) {
            // Rows of `gram` are whole pairs: there is a number beside the last.
            if (b0 + 8 * j + 2 * q >= tokens) continue;
            const float2 g = *(const float2 *)(other + 8 * j);
            sum += c[4 * j + 2 * half] * g.x;
            if (b0 + 8 * j + 2 * q + 1 < tokens) sum += c[4 * j + 2 * half + 1] * g.y;
        }
    }
    double square_sum = block_sum(square ? sum : 2. * sum, scratch);
    const int blocks = gridDim.x * parts;
    double *own = sums + all.first[which] * gridDim.x;
    if (threadIdx.x == 0) own[part * gridDim.x + blockIdx.x] = square_sum;
    if (!last_of(blocks, counters + which)) return;
    square_sum = 0;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) square_sum += number(own + i);
    square_sum = block_sum(square_sum, scratch);
    if (threadIdx.x) return;
    // The projection was finite, and so is this, but for a gradient just below what is too large: nothing moves by that.
    const double most = 3e38;
    const double norm = square_sum <= 0 ? 0 : square_sum < most * most ? fmin(sqrt(square_sum), most) : most;
    double shrink = 1;
    if (growth > 0) {
        if (*f.last >= 0) shrink = fmax(norm / ((double)*f.last + TINY), (double)growth) / (double)growth;
        *f.last = (float)(norm / shrink);
    }
    *f.gain = (float)(f.rate / shrink);
}
