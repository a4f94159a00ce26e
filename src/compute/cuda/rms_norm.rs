//! Root-mean-square norm (see `cpu::rms_norm`): the stream is f32, what is normed bf16.

use super::{Gpu, Part, Result, Weight, blocks, kernels, launch};

kernels!("rms_norm");

const BLOCK: usize = 256;

/// The kernel for h columns, and the threads of its blocks: with a row in registers where it is in multiples of eight and fits.
fn kernel(name: &'static str, h: usize) -> (String, usize) {
    let held = |each: usize| (format!("{name}_{each}"), (h / 8).div_ceil(each).next_multiple_of(32));
    match h / 8 {
        0.. if !h.is_multiple_of(8) => (name.to_string(), BLOCK),
        0..=1024 => held(2),
        1025..=2048 => held(4),
        _ => (name.to_string(), BLOCK),
    }
}

/// What [`forward`] leaves for the way back: of rows from `first` on, their `rstd` (f32) and themselves (bf16, H wide).
#[derive(Clone, Copy)]
pub struct Kept {
    pub first: usize,
    pub rstd: Part,
    pub x: Part,
}

/// `y (rows x H, bf16)` = norm of `x (rows x H, f32)`, or of the rows of x that `index` (i32) names.
#[allow(clippy::too_many_arguments)]
pub fn forward(
    gpu: &Gpu,
    x: Part,
    index: Option<Part>,
    w: &Weight,
    eps: f32,
    rows: usize,
    y: Part,
    kept: Option<Kept>,
) -> Result<()> {
    let h = w.columns;
    if index.is_none() {
        x.f32(rows * h);
    }
    let kept = kept.unwrap_or(Kept { first: 0, rstd: Part::NONE, x: Part::NONE });
    let left = rows - kept.first;
    let (name, block) = kernel("rms_norm_forward", h);
    launch!(gpu, &name, (blocks(rows, 1), 1, 1), (block as u32, 1, 1), 0;
        x.address, index.map_or(0, |i| i.holds(rows, 4)), w.address, w.norm_number(), eps, h as i32, y.bf16(rows * h),
        kept.rstd.f32_or_none(left), kept.x.bf16_or_none(left * h), kept.first as i32);
    Ok(())
}

/// The same again from what was kept: `y = x * rstd * w`.
pub fn again(gpu: &Gpu, x: Part, rstd: Part, w: &Weight, rows: usize, y: Part) -> Result<()> {
    let h = w.columns;
    let (name, block) = kernel("rms_norm_again", h);
    launch!(gpu, &name, (blocks(rows, 1), 1, 1), (block as u32, 1, 1), 0;
        x.bf16(rows * h), rstd.f32(rows), w.address, w.norm_number(), h as i32, y.bf16(rows * h));
    Ok(())
}

/// `dx (f32) += ...` in row index[i] or i, `copy` its bf16 where given; `dw (H, f32) = ...`. `x` and `rstd` as they were kept.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    gpu: &Gpu,
    dy: Part,
    x: Part,
    rstd: Part,
    w: &Weight,
    rows: usize,
    index: Option<Part>,
    dx: Part,
    copy: Part,
    dw: Part,
) -> Result<()> {
    let h = w.columns;
    let (name, block) = kernel("rms_norm_backward", h);
    // Two waves of blocks at most: each leaves a row of sums.
    let count = rows.min(2 * gpu.device.multiprocessors as usize).max(1);
    let partial = gpu.f32(count * h)?;
    if index.is_none() {
        dx.f32(rows * h);
        copy.bf16_or_none(rows * h);
    }
    let shared = if name == "rms_norm_backward" { 4 * h.next_multiple_of(BLOCK) as u32 } else { 0 };
    launch!(gpu, &name, (count as u32, 1, 1), (block as u32, 1, 1), shared;
        dy.bf16(rows * h), x.bf16(rows * h), rstd.f32(rows), w.address, w.norm_number(), rows as i32, h as i32,
        index.map_or(0, |i| i.holds(rows, 4)), dx.address, copy.address, partial.part().address);
    sum_partial(gpu, partial.part(), count, h, dw)
}

/// `out (n)` = sums of the columns of `partial (count x n)`, f32, in one order.
pub fn sum_partial(gpu: &Gpu, partial: Part, count: usize, n: usize, out: Part) -> Result<()> {
    launch!(gpu, "sum_partial", (blocks(n, 32), 1, 1), (1024, 1, 1), 0;
        partial.f32(count * n), count as i32, n as i32, out.f32(n));
    Ok(())
}
