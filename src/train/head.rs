//! The end of the model: final norm, head and loss, and the way back to the last layer. The vocabulary is the largest
//! dimension there is, so that logits exist for a block of rows, and widened weights for a part of the vocabulary.

use super::gradients::HeadGradient;
use super::pack::Batch;
use super::step::{LARGEST, Loader, Model, StepError};
use crate::compute::cpu::{self, cross_entropy, linear, rms_norm};

/// Logits that are in memory at once.
pub(super) const LOGITS: usize = 64 << 18;
/// Widened head weights that are in memory at once.
const HEAD_WEIGHTS: usize = 1 << 20;
pub(super) struct Normed {
    pub normed: Vec<f32>,
    pub rstd: Vec<f32>,
}

pub(super) struct Head {
    pub losses: Vec<f32>,
    pub d_normed: Vec<f32>,
    pub rstd: Vec<f32>,
    pub gradient: HeadGradient,
}

impl Model {
    pub(super) fn final_norm(&self, batch: &Batch, x: &[f32]) -> Result<Normed, StepError> {
        let a = &*self.architecture;
        let h = a.hidden;
        let rows: Vec<f32> = batch.targets.iter().flat_map(|(row, _)| &x[row * h..(row + 1) * h]).copied().collect();
        let (mut normed, mut rstd) = (vec![0.0; rows.len()], vec![0.0; batch.targets.len()]);
        rms_norm::forward(&rows, self.load_norm(&a.norm, &mut Loader::default())?, a.eps, &mut normed, &mut rstd);
        Ok(Normed { normed, rstd })
    }

    /// `logits (rows x V) = x W^T`, the head widened a part at a time.
    pub(super) fn logits_of(&self, x: &[f32], logits: &mut [f32]) -> Result<(), StepError> {
        let (a, rows) = (&*self.architecture, x.len() / self.architecture.hidden);
        self.head_parts(|w, first| {
            let part = w.len() / a.hidden;
            linear::forward_part(x, w, &mut logits[first..], a.hidden, part, a.vocabulary);
            debug_assert!(rows * a.vocabulary >= part);
        })
    }

    /// Calls `f` with the head's weights, some rows at a time, and the first of those rows.
    fn head_parts(&self, mut f: impl FnMut(&[f32], usize)) -> Result<(), StepError> {
        let a = &*self.architecture;
        let name = a.head.as_ref().unwrap_or(&a.embedding);
        let (loader, step) = (&mut Loader::default(), (HEAD_WEIGHTS / a.hidden).max(16));
        for first in (0..a.vocabulary).step_by(step) {
            let end = a.vocabulary.min(first + step);
            f(self.load_rows(name, first as u64..end as u64, loader)?, first);
        }
        Ok(())
    }

    /// Final norm, head and loss, in blocks of rows. The gradient of the head is kept as the gradient of the logits, from
    /// which any part of it follows, or, where there are more rows than the stream is wide, summed up.
    pub(super) fn head(&self, batch: &Batch, x: &[f32], backward: bool, trained: &[String]) -> Result<Head, StepError> {
        let a = &*self.architecture;
        let (h, v, count) = (a.hidden, a.vocabulary, batch.targets.len());
        let Normed { normed, rstd } = self.final_norm(batch, x)?;
        if let Some(bad) = normed.chunks_exact(h).position(|row| cpu::largest(row) as f64 >= LARGEST) {
            return Err(StepError::NotFinite { what: "output".into(), sample: batch.sample_of(batch.targets[bad].0) });
        }
        let targets: Vec<u32> = batch.targets.iter().map(|(_, id)| *id).collect();
        let mut losses = vec![0.0; count];
        let mut d_normed = vec![0.0; if backward { count * h } else { 0 }];
        let keep_logits = backward && !trained.is_empty() && count <= h;
        let block = if keep_logits { count } else { (LOGITS / v).clamp(16, count.max(16)) };
        let mut gradient = HeadGradient::None;
        if backward && !trained.is_empty() && !keep_logits {
            gradient = HeadGradient::Whole(self.pool.zeros(v * h));
        }
        for first in (0..count).step_by(block) {
            let end = count.min(first + block);
            let mut logits = self.pool.take((end - first) * v);
            let rows = &normed[first * h..end * h];
            self.logits_of(rows, &mut logits)?;
            let weight = 1.0 / count as f32;
            cross_entropy::forward_backward(&mut logits, &targets[first..end], weight, &mut losses[first..end]);
            if let Some(bad) = losses[first..end].iter().position(|l| !l.is_finite()) {
                let sample = batch.sample_of(batch.targets[first + bad].0);
                return Err(StepError::NotFinite { what: "loss".into(), sample });
            }
            if !backward {
                continue;
            }
            let d_rows = &mut d_normed[first * h..end * h];
            self.head_parts(|w, at| {
                let part = w.len() / h;
                linear::backward_input_part(&logits[at..], w, d_rows, h, part, v, at > 0);
            })?;
            match &mut gradient {
                HeadGradient::Whole(dw) => linear::backward_weight(&logits, rows, dw, h, v, 0, true),
                none if keep_logits => *none = HeadGradient::Logits { d_logits: logits, normed: self.pool.copy(rows) },
                _ => {}
            }
        }
        Ok(Head { losses, d_normed, rstd, gradient })
    }
}
