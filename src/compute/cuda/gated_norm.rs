//! The norm behind the delta rule, gated after it (see `cpu::gated_norm`).

use super::delta_rule::HEAD;
use super::{Gpu, Part, Result, Weight, blocks, kernels, launch};

kernels!("gated_norm");

/// Threads of a block, and heads that it has at once.
const BLOCK: u32 = 256;
const HEADS: usize = 16;

/// Rows of the gate, `stride` elements apart.
#[derive(Clone, Copy)]
pub struct Gate {
    pub part: Part,
    pub stride: usize,
}

impl Gate {
    fn address(&self, rows: usize, width: usize) -> u64 {
        self.part.bf16(if rows == 0 { 0 } else { (rows - 1) * self.stride + width })
    }

    fn wide(&self, d: usize) -> bool {
        d.is_multiple_of(8) && self.stride.is_multiple_of(8) && self.part.address.is_multiple_of(16)
    }
}

/// `y (rows x heads d)` of `x (rows x heads HEAD)`; the weight is a head's.
pub fn forward(
    gpu: &Gpu,
    x: Part,
    z: Gate,
    w: &Weight,
    eps: f32,
    (rows, heads): (usize, usize),
    y: Part,
) -> Result<()> {
    let d = w.columns;
    assert!(d <= HEAD);
    launch!(gpu, "gated_norm_forward", (blocks(rows * heads, HEADS), 1, 1), (BLOCK, 1, 1), 0;
        x.bf16(rows * heads * HEAD), z.address(rows, heads * d), z.stride as i64, w.address, w.number(), eps, rows as i32,
        heads as i32, d as i32, z.wide(d) as i32, y.bf16(rows * heads * d));
    Ok(())
}

/// In place: `dy` becomes y, `x` its own gradient. Written: `dz`, and `dw (HEAD, f32)`, whose first values are the weight's.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    gpu: &Gpu,
    dy: Part,
    x: Part,
    z: Gate,
    w: &Weight,
    eps: f32,
    (rows, heads): (usize, usize),
    dz: Gate,
    dw: Part,
) -> Result<()> {
    let d = w.columns;
    assert!(d <= HEAD);
    let count = (rows * heads).div_ceil(HEADS).min(3 * gpu.device.multiprocessors as usize).max(1);
    let partial = gpu.f32(count * HEAD)?;
    launch!(gpu, "gated_norm_backward", (count as u32, 1, 1), (BLOCK, 1, 1), 0;
        dy.bf16(rows * heads * d), x.bf16(rows * heads * HEAD), z.address(rows, heads * d), z.stride as i64, w.address,
        w.number(), eps, rows as i32, heads as i32, d as i32, (z.wide(d) && dz.wide(d)) as i32, dz.address(rows, heads * d),
        dz.stride as i64, partial.part().address);
    super::rms_norm::sum_partial(gpu, partial.part(), count, HEAD, dw)
}
