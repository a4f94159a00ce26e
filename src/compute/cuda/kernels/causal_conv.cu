// archs: 80
//
// What stands before the delta rule: a depthwise causal convolution of up to 4 taps with SiLU, and the lengths of q and k, by
// which the rule divides its products: rounding q and k once more would cost accuracy. Rows come as [q | k | v] of all heads and leave with every head padded to 128 columns, as delta_rule.cu has
// them. `taps` names, for every row, the rows under four taps, the row itself last; -1 where nothing stands. A warp a head of a
// row; lane l has channels 4 l and the next three. `*_wide` take heads and rows in multiples of 4.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef long long i64;

static const int D = 128;
static const int TAPS = 4;
// Rows of a warp.
static const int ROWS = 4;

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
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int w = 16; w; w /= 2) x += __shfl_xor_sync(0xffffffff, x, w);
    return x;
}

// One head: its first channel, its width, and what its rows, divided by their length, are multiplied with (0: not divided).
struct Head { int channel, d; float scale; };
__device__ __forceinline__ Head head_at(const Conv &c, int head) {
    if (head < 2 * c.k_heads) return Head{head * c.k_dim, c.k_dim, head < c.k_heads ? 1.f / sqrtf((float)c.k_dim) : 1.f};
    return Head{2 * c.k_heads * c.k_dim + (head - 2 * c.k_heads) * c.v_dim, c.v_dim, 0};
}

template <bool WIDE> __device__ __forceinline__ void load4(const bf16 *from, int have, float (&x)[4]) {
    if (WIDE) {
        uint2 v = have > 0 ? *(const uint2 *)from : make_uint2(0, 0);
        x[0] = __uint_as_float(v.x << 16), x[1] = __uint_as_float(v.x & 0xffff0000);
        x[2] = __uint_as_float(v.y << 16), x[3] = __uint_as_float(v.y & 0xffff0000);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = i < have ? f32(from[i]) : 0;
    }
}
__device__ __forceinline__ void store4(bf16 *to, const float (&x)[4]) {
    *(uint2 *)to = make_uint2(pack(x[0], x[1]), pack(x[2], x[3]));
}
// The taps of four channels; those in front that the kernel has not are zero.
__device__ __forceinline__ void load_taps(const Conv &c, int channel, int have, float (&w)[TAPS][4]) {
#pragma unroll
    for (int j = 0; j < TAPS; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int own = j + c.kernel - TAPS;
            w[j][i] = own >= 0 && i < have ? weight(c.w, c.kind, (i64)(channel + i) * c.kernel + own) : 0;
        }
}
// Before SiLU.
template <bool WIDE>
__device__ __forceinline__ void convolve(const Conv &c, int row, int channel, int have, const float (&w)[TAPS][4], float (&z)[4]) {
    const int4 taps = *(const int4 *)(c.taps + (i64)row * TAPS);
    const int rows[TAPS] = {taps.x, taps.y, taps.z, taps.w};
    z[0] = z[1] = z[2] = z[3] = 0;
#pragma unroll
    for (int j = 0; j < TAPS; j++) {
        if (rows[j] < 0) continue;
        float x[4];
        load4<WIDE>(c.x + rows[j] * c.ld + channel, have, x);
#pragma unroll
        for (int i = 0; i < 4; i++) z[i] += w[j][i] * x[i];
    }
}

template <bool WIDE> __device__ __forceinline__ void forward(const Conv &c, bf16 *y, float *lengths) {
    const int lane = threadIdx.x & 31, heads = 2 * c.k_heads + c.v_heads, head = blockIdx.y;
    const Head h = head_at(c, head);
    const int channel = h.channel + 4 * lane, have = h.d - 4 * lane;
    float w[TAPS][4];
    load_taps(c, channel, have, w);
    const int first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * ROWS;
    for (int row = first; row < min(first + ROWS, c.rows); row++) {
        float z[4], sum = 0;
        convolve<WIDE>(c, row, channel, have, w, z);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            z[i] = rounded(z[i] / (1.f + __expf(-z[i])));
            sum += z[i] * z[i];
        }
        if (h.scale != 0) {
            const float by = h.scale / sqrtf(warp_sum(sum) + 1e-6f);
            if (lane == 0) lengths[(i64)head * c.rows + row] = by;
        }
        store4(y + ((i64)row * heads + head) * D + 4 * lane, z);
    }
}

// Gradients before SiLU (laid out as y) from those of q and k by value head, as the rule gives them, and of v.
template <bool WIDE>
__device__ __forceinline__ void backward_rows(const Conv &c, const bf16 *dq, const bf16 *dk, const bf16 *dv, bf16 *dz) {
    const int lane = threadIdx.x & 31, heads = 2 * c.k_heads + c.v_heads, head = blockIdx.y, group = c.v_heads / c.k_heads;
    const Head h = head_at(c, head);
    const int channel = h.channel + 4 * lane, have = h.d - 4 * lane;
    float w[TAPS][4];
    load_taps(c, channel, have, w);
    const bf16 *from = head < c.k_heads ? dq : head < 2 * c.k_heads ? dk : dv;
    const int member0 = h.scale != 0 ? head % c.k_heads * group : head - 2 * c.k_heads, members = h.scale != 0 ? group : 1;
    const int first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * ROWS;
    for (int row = first; row < min(first + ROWS, c.rows); row++) {
        float z[4], y[4], slope[4], g[4] = {0, 0, 0, 0}, squares = 0, along = 0;
        convolve<WIDE>(c, row, channel, have, w, z);
        for (int m = 0; m < members; m++) {
            float x[4];
            load4<true>(from + ((i64)row * c.v_heads + member0 + m) * D + 4 * lane, have, x);
#pragma unroll
            for (int i = 0; i < 4; i++) g[i] += i < have ? x[i] : 0;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float sigmoid = 1.f / (1.f + __expf(-z[i]));
            slope[i] = sigmoid + z[i] * sigmoid * (1.f - sigmoid);
            y[i] = rounded(z[i] * sigmoid);
            squares += y[i] * y[i];
            along += y[i] * g[i];
        }
        if (h.scale != 0) {
            // n = s y / |y|, dy = s (dn - y (y dn) / |y|^2) / |y|; g is s dn / |y|.
            along = warp_sum(along) / (warp_sum(squares) + 1e-6f);
#pragma unroll
            for (int i = 0; i < 4; i++) g[i] -= y[i] * along;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) g[i] *= slope[i];
        store4(dz + ((i64)row * heads + head) * D + 4 * lane, g);
    }
}

extern "C" {
// lengths (2 k_heads, rows): 1 by the length of q and k, of q divided by the root of k_dim too.
__global__ void conv_forward(Conv c, bf16 *y, float *lengths) { forward<false>(c, y, lengths); }
__global__ void conv_forward_wide(Conv c, bf16 *y, float *lengths) { forward<true>(c, y, lengths); }
__global__ void conv_backward_rows(Conv c, const bf16 *dq, const bf16 *dk, const bf16 *dv, bf16 *dz) {
    backward_rows<false>(c, dq, dk, dv, dz);
}
__global__ void conv_backward_rows_wide(Conv c, const bf16 *dq, const bf16 *dk, const bf16 *dv, bf16 *dz) {
    backward_rows<true>(c, dq, dk, dv, dz);
}

// dx (rows ldd apart, channels as in x) and, by stripe of `stripe` rows, a row of `partial` (channels x kernel): what the
// taps' gradient is summed from. A block of 128 a stripe and head, a channel a thread.
__global__ void conv_backward(Conv c, const bf16 *dz, bf16 *dx, i64 ldd, int stripe, float *partial) {
    const int heads = 2 * c.k_heads + c.v_heads, head = blockIdx.y;
    const Head h = head_at(c, head);
    if (threadIdx.x >= h.d) return;
    const int channel = h.channel + threadIdx.x, channels = 2 * c.k_heads * c.k_dim + c.v_heads * c.v_dim;
    float w[TAPS], dw[TAPS] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < TAPS; j++) {
        const int own = j + c.kernel - TAPS;
        w[j] = own >= 0 ? weight(c.w, c.kind, (i64)channel * c.kernel + own) : 0;
    }
    const int first = blockIdx.x * stripe, end = min(first + stripe, c.rows);
    auto at = [&](int row) { return row < c.rows ? f32(dz[((i64)row * heads + head) * D + threadIdx.x]) : 0.f; };
    // Of this row and the three after it.
    float next[TAPS];
#pragma unroll
    for (int b = 1; b < TAPS; b++) next[b] = at(first + b - 1);
    for (int row = first; row < end; row++) {
#pragma unroll
        for (int b = 0; b + 1 < TAPS; b++) next[b] = next[b + 1];
        next[TAPS - 1] = at(row + TAPS - 1);
        const int *taps = c.taps + (i64)row * TAPS;
        const int own = taps[TAPS - 1];
        float sum = 0;
#pragma unroll
        for (int b = 0; b < TAPS; b++) {
            // Does row + b see this row? Not if another sequence has begun.
            if (row + b < c.rows && taps[b * TAPS + TAPS - 1 - b] == own) sum += w[TAPS - 1 - b] * next[b];
            const int from = taps[b];
            if (from >= 0) dw[b] += next[0] * f32(c.x[from * c.ld + channel]);
        }
        dx[row * ldd + channel] = pack(sum, 0) & 0xffff;
    }
#pragma unroll
    for (int j = 0; j < TAPS; j++) {
        const int own = j + c.kernel - TAPS;
        if (own >= 0) partial[((i64)blockIdx.x * channels + channel) * c.kernel + own] = dw[j];
    }
}
}
