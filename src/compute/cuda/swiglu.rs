//! The gated activation (see `cpu::swiglu`); gate and up lie side by side in rows of 2 n.

use super::{Gpu, Part, Result, blocks, kernels, launch};

kernels!("swiglu");

const BLOCK: usize = 256;

/// `out (rows x n) = silu(gate) * up`.
pub fn forward(gpu: &Gpu, gate_up: Part, rows: usize, n: usize, out: Part) -> Result<()> {
    let (name, per) = if n.is_multiple_of(8) { ("swiglu_forward_wide", 8 * BLOCK) } else { ("swiglu_forward", BLOCK) };
    launch!(gpu, name, (blocks(rows * n, per), 1, 1), (BLOCK as u32, 1, 1), 0;
        gate_up.bf16(2 * rows * n), rows as i64, n as i32, out.bf16(rows * n));
    Ok(())
}

/// `d`, the activation's gradient, becomes the activation; `d_gate_up`, which may be `gate_up`, their gradients.
pub fn backward(gpu: &Gpu, d: Part, gate_up: Part, rows: usize, n: usize, d_gate_up: Part) -> Result<()> {
    let (name, per) =
        if n.is_multiple_of(8) { ("swiglu_backward_wide", 8 * BLOCK) } else { ("swiglu_backward", BLOCK) };
    launch!(gpu, name, (blocks(rows * n, per), 1, 1), (BLOCK as u32, 1, 1), 0;
        d.bf16(rows * n), gate_up.bf16(2 * rows * n), rows as i64, n as i32, d_gate_up.bf16(2 * rows * n));
    Ok(())
}
