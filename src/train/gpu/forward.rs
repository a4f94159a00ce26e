//! The forward pass, and what of it is kept for the way back.

use super::plan::Keep;
use super::{Context, Result};
use crate::compute::cuda::rms_norm::{self, Kept};
use crate::compute::cuda::{Buffer, Part, attention, embedding, linear, rope, swiglu};
use crate::train::families::Layer;

/// What is kept of one layer, of rows that train unless said otherwise. What is not there is made again.
pub(super) struct Saved {
    /// The stream before the layer, and the norm's.
    pub x_in: Buffer,
    pub rstd_in: Buffer,
    /// Turned k, and v, of all rows.
    pub kv: Buffer,
    pub attention: Option<Attended>,
    pub gate_up: Option<Buffer>,
}

/// What attention left.
pub(super) struct Attended {
    /// q and k before their norms or, in models without, turned q.
    pub q: Buffer,
    pub log_sums: Buffer,
    pub attended: Buffer,
    /// The stream after attention, and the second norm's.
    pub x_mid: Buffer,
    pub rstd_mid: Buffer,
}

impl Context<'_> {
    /// Runs every layer over all rows. Returns the stream (rows x H, f32).
    pub fn forward(&self, keep: bool) -> Result<(Buffer, Vec<Saved>)> {
        let (gpu, r, h) = (self.gpu, &self.rows, self.a.hidden);
        let x = gpu.hold_f32(r.rows * h)?;
        embedding::forward(gpu, &self.weight(&self.a.embedding), r.ids.part(), r.rows, x.part())?;
        let mut saved = Vec::new();
        for (i, layer) in self.a.layers.iter().enumerate() {
            let state = self.layer_forward(layer, x.part(), if keep { self.plan.keep[i] } else { Keep::Stream })?;
            if keep {
                saved.push(state);
            }
        }
        Ok((x, saved))
    }

    /// The tail of a matrix of all rows: those that train.
    fn tail(&self, x: &Buffer, width: usize, size: usize) -> Result<Buffer> {
        let part = x.from((self.rows.frozen * width * size) as u64);
        let copy = self.gpu.hold(part.bytes())?;
        self.gpu.copy(part, copy.part())?;
        Ok(copy)
    }

    fn layer_forward(&self, layer: &Layer, x: Part, keep: Keep) -> Result<Saved> {
        let (gpu, r, a) = (self.gpu, &self.rows, self.a);
        let (rows, n, h) = (r.rows, r.trained, a.hidden);
        let heads = self.heads(layer);
        let (x_in, rstd_in) = (gpu.hold_bf16(n * h)?, gpu.hold_f32(n)?);
        let normed = gpu.bf16(rows * h)?;
        let kept = Kept { first: r.frozen, rstd: rstd_in.part(), x: x_in.part() };
        rms_norm::forward(gpu, x, None, &self.weight(&layer.input_norm), a.eps, rows, normed.part(), Some(kept))?;

        let whole = keep != Keep::Stream;
        let width = heads.q() + 2 * heads.kv();
        let qkv = gpu.bf16(rows * width)?;
        self.linears(
            &[&layer.attention().q, &layer.attention().k, &layer.attention().v],
            normed.part(),
            rows,
            qkv.part(),
        )?;
        let (q, kv) = (gpu.bf16(rows * heads.q())?, gpu.hold_bf16(rows * 2 * heads.kv())?);
        let normed_heads = heads.norms.is_some();
        let q_kept = match (whole, normed_heads) {
            (false, _) => None,
            (true, true) => Some(gpu.hold_bf16(n * (heads.q() + heads.kv()))?),
            (true, false) => Some(gpu.hold_bf16(n * heads.q())?),
        };
        let part = |wanted| q_kept.as_ref().filter(|_| wanted).map_or(Part::NONE, Buffer::part);
        let (before, turned) = (part(normed_heads), part(!normed_heads));
        rope::forward(gpu, qkv.part(), rows, &heads, &r.angles, q.part(), kv.part(), before, turned, r.frozen)?;
        drop(qkv);
        // What stays, and is kept as it is where all rows train, lies with what stays.
        let stays = |bytes: usize, kept: bool| {
            if kept { gpu.hold(bytes as u64) } else { gpu.take(bytes as u64) }
        };
        let attended = stays(2 * rows * heads.q(), whole && r.frozen == 0)?;
        let log_sums = stays(4 * n * a.heads, whole)?;
        let shape = self.shape(&heads, layer);
        attention::forward(gpu, &shape, q.part(), kv.part(), attended.part(), log_sums.part(), false)?;
        drop(q);
        self.onto_stream(&layer.attention().o, attended.part(), rows, x)?;

        let (x_mid, rstd_mid) = match whole {
            true => (Some(gpu.hold_bf16(n * h)?), Some(gpu.hold_f32(n)?)),
            false => (None, None),
        };
        let kept = x_mid.as_ref().zip(rstd_mid.as_ref()).map(|(x, rstd)| Kept {
            first: r.frozen,
            rstd: rstd.part(),
            x: x.part(),
        });
        rms_norm::forward(gpu, x, None, &self.weight(&layer.post_norm), a.eps, rows, normed.part(), kept)?;
        let attended = match whole {
            true if r.frozen == 0 => Some(attended),
            true => Some(self.tail(&attended, heads.q(), 2)?),
            false => None,
        };
        let gate_up = stays(4 * rows * a.intermediate, keep == Keep::All && r.frozen == 0)?;
        self.linears(&[&layer.gate, &layer.up], normed.part(), rows, gate_up.part())?;
        drop(normed);
        let act = gpu.bf16(rows * a.intermediate)?;
        swiglu::forward(gpu, gate_up.part(), rows, a.intermediate, act.part())?;
        let gate_up = match keep {
            Keep::All if r.frozen == 0 => Some(gate_up),
            Keep::All => Some(self.tail(&gate_up, 2 * a.intermediate, 2)?),
            _ => None,
        };
        self.onto_stream(&layer.down, act.part(), rows, x)?;
        let attention = match (q_kept, attended, x_mid, rstd_mid) {
            (Some(q), Some(attended), Some(x_mid), Some(rstd_mid)) => {
                Some(Attended { q, log_sums, attended, x_mid, rstd_mid })
            }
            _ => None,
        };
        Ok(Saved { x_in, rstd_in, kv, attention, gate_up })
    }

    /// What attention left, again from the stream before the layer; the rows' own keys and values too, of the stream as it
    /// was kept.
    pub(super) fn attend_again(&self, layer: &Layer, saved: &Saved) -> Result<Attended> {
        let (gpu, r, a) = (self.gpu, &self.rows, self.a);
        let (n, h) = (r.trained, a.hidden);
        let heads = self.heads(layer);
        let normed = gpu.bf16(n * h)?;
        let w = self.weight(&layer.input_norm);
        rms_norm::again(gpu, saved.x_in.part(), saved.rstd_in.part(), &w, n, normed.part())?;
        let qkv = gpu.bf16(n * (heads.q() + 2 * heads.kv()))?;
        self.linears(
            &[&layer.attention().q, &layer.attention().k, &layer.attention().v],
            normed.part(),
            n,
            qkv.part(),
        )?;
        let turned = gpu.bf16(n * heads.q())?;
        let own = saved.kv.from((4 * r.frozen * heads.kv()) as u64);
        let before = heads.norms.map(|_| gpu.bf16(n * (heads.q() + heads.kv()))).transpose()?;
        let angles = r.angles.from(r.frozen, a.head_dim);
        let kept = before.as_ref().map_or(Part::NONE, Buffer::part);
        rope::forward(gpu, qkv.part(), n, &heads, &angles, turned.part(), own, kept, Part::NONE, 0)?;
        let (attended, log_sums) = (gpu.bf16(n * heads.q())?, gpu.f32(n * a.heads)?);
        let shape = self.shape(&heads, layer);
        attention::forward(gpu, &shape, turned.part(), saved.kv.part(), attended.part(), log_sums.part(), true)?;
        let x = gpu.f32(n * h)?;
        linear::widen(gpu, saved.x_in.part(), n * h, x.part())?;
        self.onto_stream(&layer.attention().o, attended.part(), n, x.part())?;
        let (x_mid, rstd_mid) = (gpu.bf16(n * h)?, gpu.f32(n)?);
        let kept = Kept { first: 0, rstd: rstd_mid.part(), x: x_mid.part() };
        let w = self.weight(&layer.post_norm);
        rms_norm::forward(gpu, x.part(), None, &w, a.eps, n, normed.part(), Some(kept))?;
        Ok(Attended { q: before.unwrap_or(turned), log_sums, attended, x_mid, rstd_mid })
    }
}
