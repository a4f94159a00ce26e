//! Softmax cross-entropy of rows of f32 logits (see `cpu::cross_entropy`).

use super::{Gpu, Part, Result, blocks, kernels, launch};

kernels!("cross_entropy");

/// `losses (rows)` against `targets` (i32); `d_logits (rows x V, bf16)`, where given: (softmax - target) * share.
#[allow(clippy::too_many_arguments)]
pub fn forward_backward(
    gpu: &Gpu,
    logits: Part,
    targets: Part,
    rows: usize,
    vocabulary: usize,
    share: f32,
    losses: Part,
    d_logits: Part,
) -> Result<()> {
    let wide = vocabulary.is_multiple_of(4) && logits.address.is_multiple_of(16) && d_logits.address.is_multiple_of(8);
    let name = if wide { "cross_entropy_wide" } else { "cross_entropy" };
    launch!(gpu, name, (blocks(rows, 1), 1, 1), (1024, 1, 1), 0;
        logits.f32(rows * vocabulary), vocabulary as i64, vocabulary as i32, targets.holds(rows, 4), share,
        losses.f32(rows), d_logits.bf16_or_none(rows * vocabulary));
    Ok(())
}
