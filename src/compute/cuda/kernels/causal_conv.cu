// archs: 80
//
// What stands before the delta rule: a depthwise causal convolution of up to 4 taps with SiLU, and the lengths of q and k, by
// which the rule divides its products: rounding q and k once more would cost accuracy. Rows come as [q | k | v] of all heads and
// leave with every head padded to 128 columns, as delta_rule.cu has them. `taps` names, for every row, the rows under four taps,
// the row itself last; -1 where nothing stands. Half a warp goes down some rows of a head, and what stands under a row's taps moves
// on to the next one's; lane l has channels 8 l and the next seven. `*_wide` take heads and rows in multiples of 8.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef long long i64;

static const int D = 128;
static const int TAPS = 4;

struct Conv {
    const bf16 *x;
    const int *taps;
    const void *w;   // (channels, kernel)
    i64 ld;
    int kind, kernel;
    int rows, k_heads, v_heads, k_dim, v_dim, pad;
};

__device__ __forceinline__ float f32(bf16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ float from_f16(bf16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
// Element i of a weight of kind 0 (bf16), 1 (f16) or 2 (f32).
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
__device__ __forceinline__ float rounded(float x) { return __uint_as_float(pack(0, x)); }
// Of half a warp.
__device__ __forceinline__ float half_sum(float x) {
#pragma unroll
    for (int w = 8; w; w /= 2) x += __shfl_xor_sync(0xffffffff, x, w);
    return x;
}
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

// One head: its first channel, its width, and what its rows, divided by their length, are multiplied with (0: not divided).
struct Head { int channel, d; float scale; };
__device__ __forceinline__ Head head_at(const Conv &c, int head) {
    if (head < 2 * c.k_heads) return Head{head * c.k_dim, c.k_dim, head < c.k_heads ? 1.f / sqrtf((float)c.k_dim) : 1.f};
    return Head{2 * c.k_heads * c.k_dim + (head - 2 * c.k_heads) * c.v_dim, c.v_dim, 0};
}

__device__ __forceinline__ void spread(const uint4 &v, float (&x)[8]) {
    const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) x[2 * i] = __uint_as_float(w[i] << 16), x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000);
}
__device__ __forceinline__ uint4 packed(const float (&x)[8]) {
    return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}
// `have` of eight values, the others zero.
template <bool WIDE> __device__ __forceinline__ uint4 load8(const bf16 *from, int have) {
    if constexpr (WIDE) return have > 0 ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
    else {
        u32 w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = (2 * i < have ? from[2 * i] : 0) | (u32)(2 * i + 1 < have ? from[2 * i + 1] : 0) << 16;
        return make_uint4(w[0], w[1], w[2], w[3]);
    }
}
// The taps of eight channels; those in front that the kernel has not are zero.
__device__ __forceinline__ void load_taps(const Conv &c, int channel, int have, float (&w)[TAPS][8]) {
    const bf16 *from = (const bf16 *)c.w + channel * TAPS;
    if (c.kind == 0 && c.kernel == TAPS && have >= 8 && ((i64)from & 15) == 0) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float x[8];
            spread(((const uint4 *)from)[i], x);
#pragma unroll
            for (int j = 0; j < TAPS; j++) w[j][2 * i] = x[j], w[j][2 * i + 1] = x[TAPS + j];
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < TAPS; j++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int own = j + c.kernel - TAPS;
            w[j][i] = own >= 0 && i < have ? weight(c.w, c.kind, (i64)(channel + i) * c.kernel + own) : 0;
        }
}
// What stands under the taps of a row.
struct Window {
    int4 rows;
    float x[TAPS][8];
};
// Goes on to a row whose own values are `own`: those before it come from the window where they are there already.
template <bool WIDE>
__device__ __forceinline__ void go_on(Window &w, const Conv &c, const int4 &taps, const uint4 &own, int channel, int have) {
    if (taps.x == w.rows.y && taps.y == w.rows.z && taps.z == w.rows.w) {
#pragma unroll
        for (int j = 0; j + 1 < TAPS; j++)
#pragma unroll
            for (int i = 0; i < 8; i++) w.x[j][i] = w.x[j + 1][i];
    } else {
        const int rows[TAPS] = {taps.x, taps.y, taps.z, taps.w};
#pragma unroll
        for (int j = 0; j + 1 < TAPS; j++)
            spread(rows[j] < 0 ? make_uint4(0, 0, 0, 0) : load8<WIDE>(c.x + rows[j] * c.ld + channel, have), w.x[j]);
    }
    spread(own, w.x[TAPS - 1]);
    w.rows = taps;
}
__device__ __forceinline__ int4 taps_of(const Conv &c, int row) {
    return row < c.rows ? *(const int4 *)(c.taps + (i64)row * TAPS) : make_int4(-1, -1, -1, -1);
}
template <bool WIDE> __device__ __forceinline__ uint4 own_values(const Conv &c, const int4 &taps, int channel, int have) {
    return taps.w < 0 ? make_uint4(0, 0, 0, 0) : load8<WIDE>(c.x + taps.w * c.ld + channel, have);
}
// Before SiLU.
__device__ __forceinline__ void convolve(const Window &x, const float (&w)[TAPS][8], float (&z)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        z[i] = 0;
#pragma unroll
        for (int j = 0; j < TAPS; j++) z[i] += w[j][i] * x.x[j][i];
    }
}

template <bool WIDE> __device__ __forceinline__ void forward(const Conv &c, bf16 *y, float *lengths, int stripe) {
    const int lane = threadIdx.x & 15, heads = 2 * c.k_heads + c.v_heads, wanted = blockIdx.y * (blockDim.x / 16) + threadIdx.x / 16;
    const int head = min(wanted, heads - 1);
    const Head h = head_at(c, head);
    const int channel = h.channel + 8 * lane, have = wanted < heads ? h.d - 8 * lane : 0;
    float w[TAPS][8];
    load_taps(c, channel, have, w);
    Window x;
    x.rows = make_int4(-2, -2, -2, -2);
    // Four rows are asked for at once.
    const int end = min((int)(blockIdx.x + 1) * stripe, c.rows);
    for (int first = blockIdx.x * stripe; first < end; first += 4) {
        int4 taps[4];
        uint4 own[4];
#pragma unroll
        for (int i = 0; i < 4; i++) taps[i] = taps_of(c, first + i);
#pragma unroll
        for (int i = 0; i < 4; i++) own[i] = own_values<WIDE>(c, taps[i], channel, have);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = first + i;
            if (row >= end) return;
            float z[8], sum = 0;
            go_on<WIDE>(x, c, taps[i], own[i], channel, have);
            convolve(x, w, z);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                z[k] = rounded(z[k] * sigmoid(z[k]));
                sum += z[k] * z[k];
            }
            if (h.scale != 0) {
                const float by = h.scale / sqrtf(half_sum(sum) + 1e-6f);
                if (lane == 0 && wanted < heads) lengths[(i64)head * c.rows + row] = by;
            }
            if (wanted < heads) *(uint4 *)(y + ((i64)row * heads + head) * D + 8 * lane) = packed(z);
        }
    }
}

// From gradients of q and k by value head, as the rule gives them, and of v: dx (rows ldd apart, channels as in x) and, by stripe of
// `stripe` rows, a row of `partial` (channels x kernel): what the taps' gradient is summed from. The three rows behind a stripe
// are made here too, since the stripe's last rows stand under their taps.
template <bool WIDE>
__device__ __forceinline__ void backward(const Conv &c, const bf16 *dq, const bf16 *dk, const bf16 *dv, bf16 *dx, i64 ldd, int stripe,
                                         float *partial) {
    const int lane = threadIdx.x & 15, heads = 2 * c.k_heads + c.v_heads, wanted = blockIdx.y * (blockDim.x / 16) + threadIdx.x / 16;
    const int head = min(wanted, heads - 1), group = c.v_heads / c.k_heads;
    const Head h = head_at(c, head);
    const int channel = h.channel + 8 * lane, have = wanted < heads ? h.d - 8 * lane : 0;
    float w[TAPS][8], dw[TAPS][8] = {};
    load_taps(c, channel, have, w);
    const int member0 = h.scale != 0 ? head % c.k_heads * group : head - 2 * c.k_heads, members = h.scale != 0 ? group : 1;
    const bf16 *from = (head < c.k_heads ? dq : head < 2 * c.k_heads ? dk : dv) + member0 * D + 8 * lane;
    const i64 ldg = (i64)c.v_heads * D;
    const int first = blockIdx.x * stripe, end = min(first + stripe, c.rows);
    Window x;
    x.rows = make_int4(-2, -2, -2, -2);
    // Gradients of this row and the three before it; rows of x that those three are.
    float acc[TAPS][8] = {};
    int own[TAPS] = {-2, -2, -2, -2};
    // A row's values are asked for while the one before it is worked on, its taps one row earlier.
    static const int AHEAD = 3;
    int4 taps = taps_of(c, first), taps_next = taps_of(c, first + 1);
    uint4 value, up[AHEAD];
    auto ask = [&](int row, const int4 &taps) {
        value = own_values<WIDE>(c, taps, channel, have);
#pragma unroll
        for (int m = 0; m < AHEAD; m++)
            up[m] = m < members && row < c.rows && have > 0 ? *(const uint4 *)(from + row * ldg + m * D) : make_uint4(0, 0, 0, 0);
    };
    ask(first, taps);
#pragma unroll(WIDE ? 4 : 1)
    for (int row = first; row < end + TAPS - 1; row++) {
#pragma unroll
        for (int b = TAPS - 1; b > 0; b--) {
            own[b] = own[b - 1];
#pragma unroll
            for (int i = 0; i < 8; i++) acc[b][i] = acc[b - 1][i];
        }
#pragma unroll
        for (int i = 0; i < 8; i++) acc[0][i] = 0;
        own[0] = taps.w;
        if (row < c.rows) {
            float z[8], y[8], g[8], part[8], squares = 0, along = 0;
            go_on<WIDE>(x, c, taps, value, channel, have);
            spread(up[0], g);
#pragma unroll
            for (int m = 1; m < AHEAD; m++) {
                spread(up[m], part);
#pragma unroll
                for (int i = 0; i < 8; i++) g[i] += part[i];
            }
            for (int m = AHEAD; m < members; m++) {
                spread(*(const uint4 *)(from + row * ldg + m * D), part);
#pragma unroll
                for (int i = 0; i < 8; i++) g[i] += part[i];
            }
            const int4 now = taps;
            taps = taps_next;
            taps_next = taps_of(c, row + 2);
            ask(row + 1, taps);
            convolve(x, w, z);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float s = sigmoid(z[i]);
                if (i >= have) g[i] = 0;
                y[i] = rounded(z[i] * s);
                z[i] = s + z[i] * s * (1.f - s);
                squares += y[i] * y[i];
                along += y[i] * g[i];
            }
            if (h.scale != 0) {
                // n = s y / |y|, dy = s (dn - y (y dn) / |y|^2) / |y|; g is s dn / |y|.
                along = half_sum(along) / (half_sum(squares) + 1e-6f);
#pragma unroll
                for (int i = 0; i < 8; i++) g[i] -= y[i] * along;
            }
#pragma unroll
            for (int i = 0; i < 8; i++) g[i] *= z[i];
            // Does this row see the one b before it? Not if another sequence has begun.
            const bool sees[TAPS] = {true, now.z == own[1], now.y == own[2], now.x == own[3]};
#pragma unroll
            for (int b = 0; b < TAPS; b++)
                if (sees[b])
#pragma unroll
                    for (int i = 0; i < 8; i++) acc[b][i] += w[TAPS - 1 - b][i] * g[i];
            if (row < end)
#pragma unroll
                for (int j = 0; j < TAPS; j++)
#pragma unroll
                    for (int i = 0; i < 8; i++) dw[j][i] += g[i] * x.x[j][i];
        }
        const int done = row - (TAPS - 1);
        if (done < first || have <= 0) continue;
        bf16 *to = dx + done * ldd + channel;
        if (WIDE) *(uint4 *)to = packed(acc[TAPS - 1]);
        else
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (i < have) to[i] = pack(acc[TAPS - 1][i], 0) & 0xffff;
    }
    if (have <= 0) return;
    const int channels = 2 * c.k_heads * c.k_dim + c.v_heads * c.v_dim;
    float *sums = partial + ((i64)blockIdx.x * channels + channel) * c.kernel;
    if (c.kernel == TAPS && have >= 8) {
#pragma unroll
        for (int i = 0; i < 8; i++) ((float4 *)sums)[i] = make_float4(dw[0][i], dw[1][i], dw[2][i], dw[3][i]);
        return;
    }
#pragma unroll
    for (int j = 0; j < TAPS; j++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int own = j + c.kernel - TAPS;
            if (own >= 0 && i < have) sums[i * c.kernel + own] = dw[j][i];
        }
}

extern "C" {
// A block does 8 heads of `stripe` rows. lengths (2 k_heads, rows): 1 by the length of q and k, of q divided by the root of k_dim too.
__global__ void __launch_bounds__(128) conv_forward(Conv c, bf16 *y, float *lengths, int stripe) { forward<false>(c, y, lengths, stripe); }
__global__ void __launch_bounds__(128) conv_forward_wide(Conv c, bf16 *y, float *lengths, int stripe) {
    forward<true>(c, y, lengths, stripe);
}
__global__ void __launch_bounds__(64) conv_backward(Conv c, const bf16 *dq, const bf16 *dk, const bf16 *dv, bf16 *dx, i64 ldd, int stripe,
                                                    float *partial) {
    backward<false>(c, dq, dk, dv, dx, ldd, stripe, partial);
}
__global__ void __launch_bounds__(64) conv_backward_wide(Conv c, const bf16 *dq, const bf16 *dk, const bf16 *dv, bf16 *dx, i64 ldd,
                                                         int stripe, float *partial) {
    backward<true>(c, dq, dk, dv, dx, ldd, stripe, partial);
}
}
