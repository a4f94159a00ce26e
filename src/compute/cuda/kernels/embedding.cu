// archs: 80
//
// Looking rows of the embedding up, and the gradient that comes back to them: of the rows that were looked up alone, added
// in the order of the batch.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef long long i64;

__device__ __forceinline__ float f32(bf16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ bf16 to_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
// Element i of a weight of kind 0 (bf16), 1 (f16) or 2 (f32).
__device__ __forceinline__ float weight(const void *w, int kind, i64 i) {
    if (kind == 0) return f32(((const bf16 *)w)[i]);
    if (kind == 2) return ((const float *)w)[i];
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(((const bf16 *)w)[i]));
    return y;
}

extern "C" {
// x (rows x h) = rows `ids` of the table, whose rows are ld apart.
__global__ void embedding_forward(const void *table, int kind, i64 ld, const int *ids, int h, float *x) {
    const i64 row = blockIdx.x, from = ids[row] * ld;
    for (int i = threadIdx.x; i < h; i += blockDim.x) x[row * h + i] = weight(table, kind, from + i);
}

// Row u of `out` = sum of the rows of dx that `rows[starts[u] .. starts[u + 1]]` names, in that order.
__global__ void embedding_backward(const float *dx, const int *starts, const int *rows, int h, float *out) {
    const i64 u = blockIdx.x;
    for (int i = threadIdx.x; i < h; i += blockDim.x) {
        float sum = 0;
        for (int r = starts[u]; r < starts[u + 1]; r++) sum += dx[(i64)rows[r] * h + i];
        out[u * h + i] = sum;
    }
}

// Adds row u of `sums` to row ids[u] - first of g, where that is among its `rows` rows: a tied head's part of a gradient.
__global__ void embedding_add(const float *sums, const int *ids, int first, int rows, int h, bf16 *g) {
    const i64 u = blockIdx.x, row = ids[u] - first;
    if (row < 0 || row >= rows) return;
    for (int i = threadIdx.x; i < h; i += blockDim.x) g[row * h + i] = to_bf16(f32(g[row * h + i]) + sums[u * h + i]);
}
}
