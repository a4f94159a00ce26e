// archs: 80
//
// The gate on attention's output, y = x * sigmoid(gate), where the projection of q gives rows of [q (d) | gate (d)] a head
// (Qiu et al., arXiv 2505.06708). x, y and what is kept of the gate are rows x heads d. A pair of columns a thread; `*_wide` four
// pairs, for heads, rows and addresses in multiples of eight columns.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef long long i64;

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
__device__ __forceinline__ float low(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(u32 x) { return __uint_as_float(x & 0xffff0000); }
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }

// W pairs, in one access where W is 4.
template <int W> __device__ __forceinline__ void load(const bf16 *from, u32 (&x)[W]) {
    if constexpr (W == 4) {
        const uint4 v = *(const uint4 *)from;
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else x[0] = from[0] | (u32)from[1] << 16;
}
template <int W> __device__ __forceinline__ void store(bf16 *to, const u32 (&x)[W]) {
    if constexpr (W == 4) *(uint4 *)to = make_uint4(x[0], x[1], x[2], x[3]);
    else to[0] = x[0] & 0xffff, to[1] = x[0] >> 16;
}

template <int W>
__device__ __forceinline__ void forward(const bf16 *both, i64 ld, const bf16 *x, int rows, int heads, int d, bf16 *y, bf16 *kept, int first) {
    const i64 width = (i64)heads * d, i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 2 * W;
    if (i >= rows * width) return;
    const int row = i / width, column = i - row * width, head = column / d;
    u32 a[W], g[W];
    load<W>(both + row * ld + (i64)head * d + d + column, g);
    load<W>(x + i, a);
    if (kept && row >= first) store<W>(kept + (row - first) * width + column, g);
#pragma unroll
    for (int p = 0; p < W; p++) a[p] = pack(low(a[p]) * sigmoid(low(g[p])), high(a[p]) * sigmoid(high(g[p])));
    store<W>(y + i, a);
}

template <int W>
__device__ __forceinline__ void backward(bf16 *dy, const bf16 *x, bf16 *gate, int rows, int heads, int d, bf16 *both, i64 ld) {
    const i64 width = (i64)heads * d, i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 2 * W;
    if (i >= rows * width) return;
    const int row = i / width, column = i - row * width, head = column / d;
    u32 up[W], a[W], g[W], dg[W];
    load<W>(dy + i, up);
    load<W>(x + i, a);
    load<W>(gate + i, g);
#pragma unroll
    for (int p = 0; p < W; p++) {
        const float s0 = sigmoid(low(g[p])), s1 = sigmoid(high(g[p])), u0 = low(up[p]), u1 = high(up[p]), a0 = low(a[p]), a1 = high(a[p]);
        up[p] = pack(u0 * s0, u1 * s1);
        g[p] = pack(a0 * s0, a1 * s1);
        dg[p] = pack(u0 * a0 * s0 * (1.f - s0), u1 * a1 * s1 * (1.f - s1));
    }
    store<W>(dy + i, up);
    store<W>(gate + i, g);
    store<W>(both + row * ld + (i64)head * d + d + column, dg);
}

extern "C" {
// forward: the gate lies in rows of q and gate, ld apart; of rows from `first` on it is kept, where that is asked for.
// backward: in place: `dy` becomes x's gradient, `gate`, as it was kept, becomes y. The gate's gradient goes to its place in rows of
// q and gate, ld apart.
#define GATE(NAME, W)                                                                                                             \
    __global__ void output_gate_forward##NAME(const bf16 *both, i64 ld, const bf16 *x, int rows, int heads, int d, bf16 *y,       \
                                              bf16 *kept, int first) {                                                            \
        forward<W>(both, ld, x, rows, heads, d, y, kept, first);                                                                  \
    }                                                                                                                             \
    __global__ void output_gate_backward##NAME(bf16 *dy, const bf16 *x, bf16 *gate, int rows, int heads, int d, bf16 *both,       \
                                               i64 ld) {                                                                          \
        backward<W>(dy, x, gate, rows, heads, d, both, ld);                                                                       \
    }
GATE(, 1)
GATE(_wide, 4)
}
