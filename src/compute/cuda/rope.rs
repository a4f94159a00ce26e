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
    /// A gate lies behind every head of q.
    pub gated: bool,
}

/// Cosines and sines (f32, rows x `turn`), where the first 2 `turn` features of a head turn: all, or fewer.
#[derive(Clone, Copy)]
pub struct Angles {
    pub cosines: Part,
    pub sines: Part,
    pub turn: usize,
}

impl Heads {
    pub fn q(&self) -> usize {
        self.heads * self.head_dim
    }

    pub fn kv(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Of what gives q, k and v side by side: with gates, if there are.
    pub fn qkv(&self) -> usize {
        self.q() * (1 + self.gated as usize) + 2 * self.kv()
    }

    fn norm(&self) -> [(u64, i32); 2] {
        match &self.norms {
            Some((q, k)) => {
                assert!(q.columns == self.head_dim && k.columns == self.head_dim);
                [(q.address, q.norm_number()), (k.address, k.norm_number())]
            }
            None => [(0, 0); 2],
        }
    }
}

impl Angles {
    fn of(&self, rows: usize, head_dim: usize) -> (u64, u64) {
        assert!(2 * self.turn <= head_dim);
        (self.cosines.f32(rows * self.turn), self.sines.f32(rows * self.turn))
    }

    /// Those of rows from `row` on.
    pub fn from(&self, row: usize) -> Angles {
        let offset = (4 * row * self.turn) as u64;
        Angles { cosines: self.cosines.from(offset), sines: self.sines.from(offset), turn: self.turn }
    }
}

/// Threads of a block that has a row at a time.
const BY_ROW: u32 = 128;

/// Does a block have a row at a time, in accesses of 16 bytes?
fn by_row(d: usize, angles: &Angles, parts: &[Part]) -> bool {
    matches!(d, 64 | 128 | 256)
        && angles.turn.is_multiple_of(8)
        && parts.iter().chain([&angles.cosines, &angles.sines]).all(|p| p.address.is_multiple_of(16))
}

/// The kernel for heads of `d` where it is not so: two features at a time where half of d and the pairs that turn are even.
fn kernel(name: &str, d: usize, angles: &Angles) -> String {
    if d.is_multiple_of(4) && angles.turn.is_multiple_of(2) { format!("{name}_wide") } else { name.to_string() }
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
    let (name, count, block) = match by_row(d, angles, &[qkv, q, kv, before, kept]) {
        true => (format!("rope_forward_{d}"), rows as u32, BY_ROW),
        false => (kernel("rope_forward", d, angles), blocks(rows * all, WARPS), BLOCK),
    };
    launch!(gpu, &name, (count, 1, 1), (block, 1, 1), 0;
        qkv.bf16(rows * heads.qkv()), heads.qkv() as i64, heads.gated as i32, rows as i32, heads.heads as i32,
        heads.kv_heads as i32, d as i32, angles.turn as i32, cosines, sines, qn.0, qn.1, kn.0, kn.1, heads.eps, q.bf16(rows * heads.q()), kv.bf16(rows * 2 * heads.kv()),
        before.bf16_or_none(left * (heads.q() + heads.kv())), kept.bf16_or_none(left * heads.q()), first as i32);
    Ok(())
}

/// Turned q again from `before`, in models whose heads have norms.
pub fn again(gpu: &Gpu, before: Part, rows: usize, heads: &Heads, angles: &Angles, q: Part) -> Result<()> {
    let [qn, _] = heads.norm();
    assert!(heads.norms.is_some());
    let (d, (cosines, sines)) = (heads.head_dim, angles.of(rows, heads.head_dim));
    let (name, count, block) = match by_row(d, angles, &[before, q]) {
        true => (format!("rope_again_{d}"), rows as u32, BY_ROW),
        false => (kernel("rope_again", d, angles), blocks(rows * heads.heads, WARPS), BLOCK),
    };
    launch!(gpu, &name, (count, 1, 1), (block, 1, 1), 0;
        before.bf16(rows * (heads.q() + heads.kv())), rows as i32, heads.heads as i32, heads.kv_heads as i32,
        heads.head_dim as i32, angles.turn as i32, cosines, sines, qn.0, qn.1, heads.eps, q.bf16(rows * heads.q()));
    Ok(())
}

/// `d_qkv` (side by side; gates are left alone) from the gradients of turned q and, by query head, of turned k and v. `dw` (2 D, f32): the norms'
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
    let d = heads.head_dim;
    let [qn, kn] = heads.norm();
    let (cosines, sines) = angles.of(rows, d);
    let multiprocessors = gpu.device.multiprocessors as usize;
    let (name, count, parts, block) = match by_row(d, angles, &[dq, dk, dv, before, d_qkv]) {
        true => (format!("rope_backward_{d}"), rows.min(3 * multiprocessors), 1, BY_ROW),
        false => (
            kernel("rope_backward", d, angles),
            (rows * heads.heads).div_ceil(WARPS).min(2 * multiprocessors),
            3,
            BLOCK,
        ),
    };
    let count = count.max(1);
    let normed = heads.norms.is_some();
    let partial = gpu.f32(if normed { 2 * count * d } else { 1 })?;
    if normed {
        before.bf16(rows * (heads.q() + heads.kv()));
    }
    let [dq, dk, dv] = [dq, dk, dv].map(|p| p.bf16(rows * heads.q()));
    launch!(gpu, &name, (count as u32, parts, 1), (block, 1, 1), 0;
        dq, dk, dv, rows as i32, heads.heads as i32, heads.kv_heads as i32, d as i32, angles.turn as i32, cosines,
        sines, qn.0, qn.1, kn.0, kn.1, heads.eps, before.address, d_qkv.bf16(rows * heads.qkv()), heads.gated as i32, partial.part().address);
    if normed {
        let plane = (4 * count * d) as u64;
        super::rms_norm::sum_partial(gpu, partial.part(), count, d, dw)?;
        super::rms_norm::sum_partial(gpu, partial.from(plane), count, d, dw.from(4 * d as u64))?;
    }
    Ok(())
}
