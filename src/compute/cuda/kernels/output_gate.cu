// archs: 80
//
// The gate on attention's output, y = x * sigmoid(gate), where the projection of q gives rows of [q (d) | gate (d)] a head
// (Qiu et al., arXiv 2505.06708). x, y and what is kept of the gate are rows x heads d. A pair of columns a thread.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef long long i64;

__device__ __forceinline__ float f32(bf16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
__device__ __forceinline__ float low(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(u32 x) { return __uint_as_float(x & 0xffff0000); }
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }

extern "C" {
// The gate lies in rows of q and gate, ld apart; of rows from `first` on it is kept, where that is asked for.
__global__ void output_gate_forward(const bf16 *both, i64 ld, const bf16 *x, int rows, int heads, int d, bf16 *y, bf16 *kept, int first) {
    const i64 width = (i64)heads * d, i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 2;
    if (i >= rows * width) return;
    const i64 row = i / width;
    const int column = i % width, head = column / d;
    const bf16 *gate = both + row * ld + (i64)head * 2 * d + d + column - head * d;
    const u32 a = *(const u32 *)(x + i);
    *(u32 *)(y + i) = pack(low(a) * sigmoid(f32(gate[0])), high(a) * sigmoid(f32(gate[1])));
    if (kept && row >= first) *(u32 *)(kept + (row - first) * width + column) = gate[0] | (u32)gate[1] << 16;
}

// In place: `dy` becomes x's gradient, `gate`, as it was kept, becomes y. The gate's gradient goes to its place in rows of q and
// gate, ld apart.
__global__ void output_gate_backward(bf16 *dy, const bf16 *x, bf16 *gate, int rows, int heads, int d, bf16 *both, i64 ld) {
    const i64 width = (i64)heads * d, i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 2;
    if (i >= rows * width) return;
    const i64 row = i / width;
    const int column = i % width, head = column / d;
    bf16 *to = both + row * ld + (i64)head * 2 * d + d + column - head * d;
    const u32 up = *(const u32 *)(dy + i), a = *(const u32 *)(x + i), g = *(const u32 *)(gate + i);
    const float s0 = sigmoid(low(g)), s1 = sigmoid(high(g));
    *(u32 *)(dy + i) = pack(low(up) * s0, high(up) * s1);
    *(u32 *)(gate + i) = pack(low(a) * s0, high(a) * s1);
    to[0] = pack(low(up) * low(a) * s0 * (1.f - s0), 0) & 0xffff;
    to[1] = pack(high(up) * high(a) * s1 * (1.f - s1), 0) & 0xffff;
}
}
