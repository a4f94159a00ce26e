//! The end of the model: final norm, head and loss in blocks of rows, and the way back to the last layer.

use super::{Context, Result};
use crate::compute::cuda::matmul::{Operand, Output, matmul};
use crate::compute::cuda::rms_norm::{self, Kept};
use crate::compute::cuda::{Buffer, Part, cross_entropy};

/// Bytes of f32 logits that are in memory at once.
pub(super) const LOGITS: usize = 256 << 20;

/// What the head left.
pub(super) struct Head {
    /// Rows of those that train that have a target (i32).
    pub index_trained: Buffer,
    pub losses: Buffer,
    /// Of rows with a target: normed, as they were, and the norm's.
    pub normed: Buffer,
    pub x: Buffer,
    pub rstd: Buffer,
    /// Gradient of the normed rows and, if the head trains, of the logits.
    pub d_normed: Option<Buffer>,
    pub d_logits: Option<Buffer>,
    /// The final norm's gradient (H, f32): after the way back.
    pub d_norm: Buffer,
}

impl Context<'_> {
    pub(super) fn head_name(&self) -> &str {
        self.a.head.as_ref().unwrap_or(&self.a.embedding)
    }

    /// Losses and, with `backward`, gradients of the logits and of the head's input.
    pub fn head(&self, x: &Buffer, backward: bool) -> Result<Head> {
        let (gpu, a, r) = (self.gpu, self.a, &self.rows);
        let (h, v) = (a.hidden, a.vocabulary);
        let targets = &r.batch.targets;
        let count = targets.len();
        let index: Vec<i32> = targets.iter().map(|(row, _)| (r.frozen + row) as i32).collect();
        let own: Vec<i32> = targets.iter().map(|(row, _)| *row as i32).collect();
        let ids: Vec<i32> = targets.iter().map(|(_, id)| *id as i32).collect();
        let (index, index_trained, ids) = (gpu.upload(&index)?, gpu.upload(&own)?, gpu.upload(&ids)?);
        let (normed, kept, rstd) = (gpu.hold_bf16(count * h)?, gpu.hold_bf16(count * h)?, gpu.hold_f32(count)?);
        let keep = Kept { first: 0, rstd: rstd.part(), x: kept.part() };
        let w = self.weight(&a.norm);
        rms_norm::forward(gpu, x.part(), Some(index.part()), &w, a.eps, count, normed.part(), Some(keep))?;
        let trains = backward && self.trains(self.head_name());
        let losses = gpu.hold_f32(count)?;
        let d_normed = backward.then(|| gpu.hold_bf16(count * h)).transpose()?;
        let d_logits = trains.then(|| gpu.hold_bf16(count * v)).transpose()?;
        let block = (LOGITS / (4 * v)).clamp(16, count.max(16)).min(count);
        let logits = gpu.f32(block * v)?;
        let passing = (backward && !trains).then(|| gpu.bf16(block * v)).transpose()?;
        let w = self.weight(self.head_name());
        let mut scratch = None;
        let head = self.operand(&w, &mut scratch)?;
        for first in (0..count).step_by(block.max(1)) {
            let rows = block.min(count - first);
            let x = Operand::new(normed.from((2 * first * h) as u64), h);
            matmul(gpu, Output::f32(logits.part(), v), rows, v, h, x, head.t())?;
            let d = match (&d_logits, &passing) {
                (Some(d), _) => d.from((2 * first * v) as u64),
                (None, Some(d)) => d.part(),
                (None, None) => Part::NONE,
            };
            let (ids, losses) = (ids.from(4 * first as u64), losses.from(4 * first as u64));
            let share = 1.0 / count as f32;
            cross_entropy::forward_backward(gpu, logits.part(), ids, rows, v, share, losses, d)?;
            if let Some(d_normed) = &d_normed {
                let out = Output::bf16(d_normed.from((2 * first * h) as u64), h);
                matmul(gpu, out, rows, h, v, Operand::new(d, v), head)?;
            }
        }
        let d_norm = gpu.f32(h)?;
        Ok(Head { index_trained, losses, normed, x: kept, rstd, d_normed, d_logits, d_norm })
    }

    /// The gradient of the stream after the last layer, of rows that train, in f32 and bf16.
    pub fn head_backward(&self, head: &Head, _x: &Buffer) -> Result<Stream> {
        let (gpu, h, n) = (self.gpu, self.a.hidden, self.rows.trained);
        let stream = Stream { wide: gpu.hold_f32(n * h)?, narrow: gpu.bf16(n * h)? };
        gpu.clear(stream.wide.part())?;
        gpu.clear(stream.narrow.part())?;
        let d_normed = head.d_normed.as_ref().map_or(Part::NONE, Buffer::part);
        let (count, w) = (self.rows.batch.targets.len(), self.weight(&self.a.norm));
        let index = Some(head.index_trained.part());
        let (wide, narrow) = (stream.wide.part(), stream.narrow.part());
        let (x, rstd) = (head.x.part(), head.rstd.part());
        rms_norm::backward(gpu, d_normed, x, rstd, &w, count, index, wide, narrow, head.d_norm.part())?;
        Ok(stream)
    }
}

/// The gradient of the stream (rows that train x H): f32, and rounded for products.
pub(super) struct Stream {
    pub wide: Buffer,
    pub narrow: Buffer,
}
