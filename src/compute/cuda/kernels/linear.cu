// archs: 80
//
// What stands around matrix products: biases and their gradients, weights of another type as bf16;
// and a plain product, which is the reference of the library's and does what that one refuses.

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
// y (rows x n, ld apart) += bias, in bf16 or f32.
__global__ void add_bias(void *y, int wide, i64 ld, int rows, int n, const void *bias, int kind) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float b = weight(bias, kind, i);
    for (i64 row = blockIdx.y; row < rows; row += gridDim.y) {
        if (wide) ((float *)y)[row * ld + i] += b;
        else ((bf16 *)y)[row * ld + i] = to_bf16(f32(((bf16 *)y)[row * ld + i]) + b);
    }
}

// Row blockIdx.y of `partial` (n wide) = sums of the rows blockIdx.y, + gridDim.y, ... of x.
__global__ void column_sums(const bf16 *x, i64 ld, int rows, int n, float *partial) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float sum = 0;
    for (int r = blockIdx.y; r < rows; r += gridDim.y) sum += f32(x[r * ld + i]);
    partial[(i64)blockIdx.y * n + i] = sum;
}

// out (rows x n, tight) = w (rows ld apart) in bf16.
__global__ void narrow(const void *w, int kind, i64 ld, int rows, int n, bf16 *out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    for (i64 row = blockIdx.y; row < rows; row += gridDim.y) out[row * n + i] = to_bf16(weight(w, kind, row * ld + i));
}

// out = x in f32.
__global__ void widen(const bf16 *x, i64 count, float *out) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = f32(x[i]);
}

// *differ = 1 if any word of a and b does.
__global__ void compare(const u32 *a, const u32 *b, i64 count, int *differ) {
    bool same = true;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) same = same && a[i] == b[i];
    if (!same) *differ = 1;
}

// c (m x n) = a b, or c + a b: a(i, l) at i am + l ak, b(l, j) at l bk + j bn, c(i, j) at i ld + j, f32 where `wide`.
__global__ void matmul_plain(const bf16 *a, i64 am, i64 ak, const bf16 *b, i64 bk, i64 bn, void *c, i64 ld, int wide, int m,
                             int n, int k, int add) {
    __shared__ float sa[16][17], sb[16][17];
    const int i = blockIdx.y * 16 + threadIdx.y, j = blockIdx.x * 16 + threadIdx.x;
    float sum = 0;
    for (int l = 0; l < k; l += 16) {
        const int la = l + threadIdx.x, lb = l + threadIdx.y;
        sa[threadIdx.y][threadIdx.x] = i < m && la < k ? f32(a[i * am + la * ak]) : 0;
        sb[threadIdx.y][threadIdx.x] = j < n && lb < k ? f32(b[lb * bk + j * bn]) : 0;
        __syncthreads();
#pragma unroll
        for (int x = 0; x < 16; x++) sum += sa[threadIdx.y][x] * sb[x][threadIdx.x];
        __syncthreads();
    }
    if (i >= m || j >= n) return;
    if (wide) {
        float *to = (float *)c + i * ld + j;
        *to = add ? *to + sum : sum;
    } else {
        bf16 *to = (bf16 *)c + i * ld + j;
        *to = to_bf16(add ? f32(*to) + sum : sum);
    }
}
}
