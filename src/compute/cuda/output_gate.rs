//! The gate on attention's output (see `cpu::output_gate`): rows of `[q | gate]` a head.

use super::rope::Heads;
use super::{Gpu, Part, Result, blocks, kernels, launch};

kernels!("output_gate");

const BLOCK: usize = 256;

/// Where rows of q and gate lie, side by side head by head, `stride` elements apart.
#[derive(Clone, Copy)]
pub struct Both {
    pub part: Part,
    pub stride: usize,
}

impl Both {
    fn address(&self, rows: usize, heads: &Heads) -> u64 {
        self.part.bf16(if rows == 0 { 0 } else { (rows - 1) * self.stride + 2 * heads.q() })
    }

    /// The kernel, and columns of a block: eight at a time where heads, rows and addresses allow it.
    fn kernel(&self, name: &str, heads: &Heads, parts: &[Part]) -> (String, usize) {
        let eights = [heads.head_dim, self.stride].iter().all(|n| n.is_multiple_of(8));
        match eights && parts.iter().chain([&self.part]).all(|p| p.address.is_multiple_of(16)) {
            true => (format!("{name}_wide"), 8 * BLOCK),
            false => (name.to_string(), 2 * BLOCK),
        }
    }
}

/// `y (rows x qD) = x sigmoid(gate)`; the gate of rows from `first` on into `kept`, where given.
#[allow(clippy::too_many_arguments)] // as the kernel has them
pub fn forward(
    gpu: &Gpu,
    both: Both,
    x: Part,
    rows: usize,
    heads: &Heads,
    y: Part,
    kept: Part,
    first: usize,
) -> Result<()> {
    let size = rows * heads.q();
    let (name, columns) = both.kernel("output_gate_forward", heads, &[x, y, kept]);
    launch!(gpu, &name, (blocks(size, columns), 1, 1), (BLOCK as u32, 1, 1), 0;
        both.address(rows, heads), both.stride as i64, x.bf16(size), rows as i32, heads.heads as i32, heads.head_dim as i32,
        y.bf16(size), kept.bf16_or_none((rows - first) * heads.q()), first as i32);
    Ok(())
}

/// In place: `dy` becomes the gradient of `x`, `gate`, as it was kept, becomes y. The gate's gradient goes into `d_both`.
pub fn backward(gpu: &Gpu, dy: Part, x: Part, gate: Part, rows: usize, heads: &Heads, d_both: Both) -> Result<()> {
    let size = rows * heads.q();
    let (name, columns) = d_both.kernel("output_gate_backward", heads, &[dy, x, gate]);
    launch!(gpu, &name, (blocks(size, columns), 1, 1), (BLOCK as u32, 1, 1), 0;
        dy.bf16(size), x.bf16(size), gate.bf16(size), rows as i32, heads.heads as i32, heads.head_dim as i32,
        d_both.address(rows, heads), d_both.stride as i64);
    Ok(())
}
