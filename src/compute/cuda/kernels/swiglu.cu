// archs: 80
//
// The gated activation of the feed-forward block: silu(gate) * up (Shazeer, arXiv 2002.05202). Gate and up lie side by side
// in rows of 2 n. `*_wide` take n in multiples of 8.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef long long i64;

__device__ __forceinline__ float f32(bf16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ bf16 to_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
// W values in one access where W is 8 or 4: the caller knows that the address allows it.
template <int W> __device__ __forceinline__ void load(const bf16 *from, float (&x)[W]) {
    if constexpr (W == 8) {
        uint4 v = *(const uint4 *)from;
        u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[2 * i] = __uint_as_float(w[i] << 16);
            x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000);
        }
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) x[i] = f32(from[i]);
    }
}
template <int W> __device__ __forceinline__ void load(const float *from, float (&x)[W]) {
    if constexpr (W % 4 == 0) {
#pragma unroll
        for (int i = 0; i < W; i += 4) {
            float4 v = *(const float4 *)(from + i);
            x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) x[i] = from[i];
    }
}
template <int W> __device__ __forceinline__ void store(bf16 *to, const float (&x)[W]) {
    if constexpr (W == 8) {
        u32 w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
        *(uint4 *)to = make_uint4(w[0], w[1], w[2], w[3]);
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) to[i] = to_bf16(x[i]);
    }
}
template <int W> __device__ __forceinline__ void store(float *to, const float (&x)[W]) {
    if constexpr (W % 4 == 0) {
#pragma unroll
        for (int i = 0; i < W; i += 4) *(float4 *)(to + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) to[i] = x[i];
    }
}

template <int W> __device__ __forceinline__ void forward(const bf16 *both, i64 rows, int n, bf16 *out) {
    const i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (i >= rows * n) return;
    const i64 row = i / n, column = i % n;
    float g[W], u[W];
    load<W>(both + row * 2 * n + column, g);
    load<W>(both + row * 2 * n + n + column, u);
#pragma unroll
    for (int e = 0; e < W; e++) g[e] = g[e] / (1.f + __expf(-g[e])) * u[e];
    store<W>(out + i, g);
}

// `d`, the gradient of the activation, becomes the activation; `d_both`, which may be `both`, the gradients of gate and up.
template <int W>
__device__ __forceinline__ void backward(bf16 *d, const bf16 *both, i64 rows, int n, bf16 *d_both) {
    const i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (i >= rows * n) return;
    const i64 row = i / n, column = i % n;
    const i64 gate = row * 2 * n + column;
    float g[W], u[W], x[W];
    load<W>(both + gate, g);
    load<W>(both + gate + n, u);
    load<W>(d + i, x);
#pragma unroll
    for (int e = 0; e < W; e++) {
        const float sigmoid = 1.f / (1.f + __expf(-g[e])), silu = g[e] * sigmoid, act = silu * u[e];
        g[e] = x[e] * u[e] * (sigmoid + silu * (1.f - sigmoid));
        u[e] = x[e] * silu;
        x[e] = act;
    }
    store<W>(d_both + gate, g);
    store<W>(d_both + gate + n, u);
    store<W>(d + i, x);
}

extern "C" {
__global__ void swiglu_forward(const bf16 *both, i64 rows, int n, bf16 *out) { forward<1>(both, rows, n, out); }
__global__ void swiglu_forward_wide(const bf16 *both, i64 rows, int n, bf16 *out) { forward<8>(both, rows, n, out); }
__global__ void swiglu_backward(bf16 *d, const bf16 *both, i64 rows, int n, bf16 *d_both) {
    backward<1>(d, both, rows, n, d_both);
}
__global__ void swiglu_backward_wide(bf16 *d, const bf16 *both, i64 rows, int n, bf16 *d_both) {
    backward<8>(d, both, rows, n, d_both);
}
}
