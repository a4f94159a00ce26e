//! What stands around matrix products: weights of another type, biases and their gradients.

use super::{Gpu, Part, Result, Weight, blocks, kernels, launch};

kernels!("linear");

const BLOCK: usize = 256;
/// Rows of a grid that share many rows of a matrix.
const STRIPES: usize = 64;

/// `y (rows x n)`, rows `stride` apart, += bias; y is f32 where `wide`, else bf16.
pub fn add_bias(gpu: &Gpu, y: Part, wide: bool, stride: usize, rows: usize, bias: &Weight) -> Result<()> {
    let n = bias.columns;
    y.holds(if rows == 0 { 0 } else { (rows - 1) * stride + n }, if wide { 4 } else { 2 });
    launch!(gpu, "add_bias", (blocks(n, BLOCK), rows.clamp(1, 4096) as u32, 1), (BLOCK as u32, 1, 1), 0;
        y.address, wide as i32, stride as i64, rows as i32, n as i32, bias.address, bias.number());
    Ok(())
}

/// `sums (n, f32)` = columns of `x (rows x n, bf16)`, rows `stride` apart: a bias's gradient.
pub fn column_sums(gpu: &Gpu, x: Part, stride: usize, rows: usize, n: usize, sums: Part) -> Result<()> {
    let count = rows.clamp(1, STRIPES);
    let partial = gpu.f32(count * n)?;
    x.bf16(if rows == 0 { 0 } else { (rows - 1) * stride + n });
    launch!(gpu, "column_sums", (blocks(n, BLOCK), count as u32, 1), (BLOCK as u32, 1, 1), 0;
        x.address, stride as i64, rows as i32, n as i32, partial.part().address);
    super::rms_norm::sum_partial(gpu, partial.part(), count, n, sums)
}

/// `out (rows x columns, bf16, tight)` = a weight of any kind.
pub fn narrow(gpu: &Gpu, w: &Weight, out: Part) -> Result<()> {
    launch!(gpu, "narrow", (blocks(w.columns, BLOCK), w.rows.min(65535) as u32, 1), (BLOCK as u32, 1, 1), 0;
        w.address, w.number(), w.stride as i64, w.rows as i32, w.columns as i32, out.bf16(w.rows * w.columns));
    Ok(())
}

/// `out (f32)` = `x (bf16)`.
pub fn widen(gpu: &Gpu, x: Part, count: usize, out: Part) -> Result<()> {
    launch!(gpu, "widen", (blocks(count, BLOCK), 1, 1), (BLOCK as u32, 1, 1), 0;
        x.bf16(count), count as i64, out.f32(count));
    Ok(())
}

/// `*differ` (i32) is set where any of `count` bytes of a and b, a multiple of four, differ.
pub(super) fn compare(gpu: &Gpu, a: Part, b: Part, bytes: usize, differ: Part) -> Result<()> {
    let words = bytes / 4;
    let grid = blocks(words, 4 * BLOCK).min(8 * gpu.device.multiprocessors);
    launch!(gpu, "compare", (grid, 1, 1), (BLOCK as u32, 1, 1), 0;
        a.holds(words, 4), b.holds(words, 4), words as i64, differ.holds(1, 4));
    Ok(())
}

/// A matrix product without the library: its reference, and what does the sizes that it refuses. See
/// [`matmul`](super::matmul::matmul).
pub(super) fn matmul_plain(gpu: &Gpu, p: &super::matmul::Product, add: bool) -> Result<()> {
    let strides = |m: &super::matmul::Operand| match m.turned {
        false => (m.stride as i64, 1i64),
        true => (1, m.stride as i64),
    };
    let ((am, ak), (bk, bn)) = (strides(&p.a), strides(&p.b));
    launch!(gpu, "matmul_plain", (blocks(p.n, 16), blocks(p.m, 16), 1), (16, 16, 1), 0;
        p.a.address, am, ak, p.b.address, bk, bn, p.out, p.stride as i64, p.wide as i32, p.m as i32, p.n as i32,
        p.k as i32, add as i32);
    Ok(())
}
