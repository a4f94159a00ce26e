//! Rotary position embedding with the norms of heads before it (see `cpu::rope`). Rows stay as they are: heads lie side by
//! side in a row.

use super::{Gpu, Part, Result, Weight, blocks, kernels, launch};

kernels!("rope");

const BLOCK: u32 = 256;
/// Warps in a block: heads of rows that it takes.
const WARPS: usize = 8;
/// Largest head dimension.
pub const LARGEST_HEAD: usize = 256;

/// Sizes of the heads, and their norms where the model has them.
#[derive(Clone, Copy)]
pub struct Heads {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub norms: Option<(Weight, Weight)>,
    pub eps: f32,
}

/// Cosines and sines (f32, rows x D/2).
#[derive(Clone, Copy)]
pub struct Angles {
    pub cosines: Part,
    pub sines: Part,
}

impl Heads {
    pub fn q(&self) -> usize {
        self.heads * self.head_dim
    }

    pub fn kv(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    fn norm(&self) -> [(u64, i32); 2] {
        match &self.norms {
            Some((q, k)) => {
                assert!(q.columns == self.head_dim && k.columns == self.head_dim);
                [(q.address, q.number()), (k.address, k.number())]
            }
            None => [(0, 0); 2],
        }
    }
}

impl Angles {
    fn of(&self, rows: usize, head_dim: usize) -> (u64, u64) {
        (self.cosines.f32(rows * head_dim / 2), self.sines.f32(rows * head_dim / 2))
    }

    /// Those of rows from `row` on.
    pub fn from(&self, row: usize, head_dim: usize) -> Angles {
        let offset = (4 * row * head_dim / 2) as u64;
        Angles { cosines: self.cosines.from(offset), sines: self.sines.from(offset) }
    }
}

/// The kernel for heads of `d`: two features at a time where half of d is even.
fn kernel(name: &str, d: usize) -> String {
    if d.is_multiple_of(4) { format!("{name}_wide") } else { name.to_string() }
}

/// From rows of q, k and v side by side: turned `q (rows x qD)`, and turned k with v beside it, `kv (rows x 2 kvD)`. Of rows
/// from `first` on: q and k before their norms into `before` ((q + kv) wide), turned q into `kept`, where given.
#[allow(clippy::too_many_arguments)]
pub fn forward(
    gpu: &Gpu,
    qkv: Part,
    rows: usize,
    heads: &Heads,
    angles: &Angles,
    q: Part,
    kv: Part,
    before: Part,
    kept: Part,
    first: usize,
) -> Result<()> {
    let (d, all, left) = (heads.head_dim, heads.heads + 2 * heads.kv_heads, rows - first);
    let [qn, kn] = heads.norm();
    let (cosines, sines) = angles.of(rows, d);
    launch!(gpu, &kernel("rope_forward", d), (blocks(rows * all, WARPS), 1, 1), (BLOCK, 1, 1), 0;
        qkv.bf16(rows * all * d), (all * d) as i64, rows as i32, heads.heads as i32, heads.kv_heads as i32, d as i32,
        cosines, sines, qn.0, qn.1, kn.0, kn.1, heads.eps, q.bf16(rows * heads.q()), kv.bf16(rows * 2 * heads.kv()),
        before.bf16_or_none(left * (heads.q() + heads.kv())), kept.bf16_or_none(left * heads.q()), first as i32);
    Ok(())
}

/// Turned q again from `before`, in models whose heads have norms.
pub fn again(gpu: &Gpu, before: Part, rows: usize, heads: &Heads, angles: &Angles, q: Part) -> Result<()> {
    let [qn, _] = heads.norm();
    assert!(heads.norms.is_some());
    let (cosines, sines) = angles.of(rows, heads.head_dim);
    launch!(gpu, &kernel("rope_again", heads.head_dim), (blocks(rows * heads.heads, WARPS), 1, 1), (BLOCK, 1, 1), 0;
        before.bf16(rows * (heads.q() + heads.kv())), rows as i32, heads.heads as i32, heads.kv_heads as i32,
        heads.head_dim as i32, cosines, sines, qn.0, qn.1, heads.eps, q.bf16(rows * heads.q()));
    Ok(())
}

/// `d_qkv` (side by side) from the gradients of turned q and, by query head, of turned k and v. `dw` (2 D, f32): the norms'
/// gradients, q's first.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    gpu: &Gpu,
    [dq, dk, dv]: [Part; 3],
    rows: usize,
    heads: &Heads,
    angles: &Angles,
    before: Part,
    d_qkv: Part,
    dw: Part,
) -> Result<()> {
    let (d, all) = (heads.head_dim, heads.heads + 2 * heads.kv_heads);
    let [qn, kn] = heads.norm();
    let (cosines, sines) = angles.of(rows, d);
    let items = rows * heads.heads;
    let count = items.div_ceil(WARPS).min(2 * gpu.device.multiprocessors as usize).max(1);
    let normed = heads.norms.is_some();
    let partial = gpu.f32(if normed { 2 * count * d } else { 1 })?;
    if normed {
        before.bf16(rows * (heads.q() + heads.kv()));
    }
    let [dq, dk, dv] = [dq, dk, dv].map(|p| p.bf16(rows * heads.q()));
    launch!(gpu, &kernel("rope_backward", d), (count as u32, 3, 1), (BLOCK, 1, 1), 0;
        dq, dk, dv, rows as i32, heads.heads as i32, heads.kv_heads as i32, d as i32, cosines, sines, qn.0, qn.1, kn.0,
        kn.1, heads.eps, before.address, d_qkv.bf16(rows * all * d), partial.part().address);
    if normed {
        let plane = (4 * count * d) as u64;
        super::rms_norm::sum_partial(gpu, partial.part(), count, d, dw)?;
        super::rms_norm::sum_partial(gpu, partial.from(plane), count, d, dw.from(4 * d as u64))?;
    }
    Ok(())
}
