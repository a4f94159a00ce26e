//! The forward pass, and what of it is kept for the way back.

use super::plan::Keep;
use super::{Context, Result, delta_net};
use crate::compute::cuda::output_gate::{self, Both};
use crate::compute::cuda::rms_norm::{self, Kept};
use crate::compute::cuda::{Buffer, Part, attention, embedding, linear, rope, swiglu};
use crate::train::families::{Attention, Layer, Mixer};

/// What is kept of one layer, of rows that train unless said otherwise. What is not there is made again.
pub(super) struct Saved {
    /// The stream before the layer, and the norm's.
    pub x_in: Buffer,
    pub rstd_in: Buffer,
    pub constant: Constant,
    pub mixed: Option<Mixed>,
    pub gate_up: Option<Buffer>,
}

/// What of a layer cannot be made again from rows that train.
pub(super) enum Constant {
    /// Turned k, and v, of all rows.
    Attention(Buffer),
    DeltaNet(delta_net::Constants),
}

/// What the mixer left, the stream after it, and the second norm's.
pub(super) struct Mixed {
    pub of: OfMixer,
    pub x_mid: Buffer,
    pub rstd_mid: Buffer,
}

pub(super) enum OfMixer {
    Attention(Attended),
    DeltaNet(delta_net::Kept),
}

/// What attention left.
pub(super) struct Attended {
    /// q and k before their norms or, in models without, turned q.
    pub q: Buffer,
    pub log_sums: Buffer,
    pub attended: Buffer,
    /// The gate on its output.
    pub gate: Option<Buffer>,
}

impl Context<'_> {
    /// Runs every layer over all rows. Returns the stream (rows x H, f32).
    pub fn forward(&self, keep: bool) -> Result<(Buffer, Vec<Saved>)> {
        let (gpu, r, h) = (self.gpu, &self.rows, self.a.hidden);
        let x = gpu.hold_f32(r.rows * h)?;
        embedding::forward(gpu, &self.weight(&self.a.embedding), r.ids.part(), r.rows, x.part())?;
        let mut saved = Vec::new();
        for (i, layer) in self.a.layers.iter().enumerate() {
            let (keep_it, place) = if keep { (self.plan.keep[i], self.plan.place(i)) } else { (Keep::Stream, None) };
            let last = i + 1 == self.a.layers.len();
            let state = self.layer_forward(layer, x.part(), keep_it, place, last)?;
            if keep {
                saved.push(state);
            }
        }
        if keep {
            self.fetch_below(self.a.layers.len())?;
        }
        Ok((x, saved))
    }

    /// Begins to bring back what was offloaded of the next layer below `i` that has something there.
    pub(super) fn fetch_below(&self, i: usize) -> Result<()> {
        let below = self.plan.offloaded.iter().rfind(|&&layer| layer < i && layer >= self.lowest());
        match (&self.offload, below) {
            (Some(offload), Some(&layer)) => {
                Ok(offload.lock().fetch(self.plan.place(layer).expect("it is one of them"))?)
            }
            _ => Ok(()),
        }
    }

    /// What stays, and is kept as it is, lies with what stays.
    pub(super) fn stays(&self, bytes: usize, kept: bool) -> Result<Buffer> {
        Ok(if kept { self.gpu.hold(bytes as u64)? } else { self.gpu.take(bytes as u64)? })
    }

    /// The tail of a matrix of all rows: those that train.
    pub(super) fn tail(&self, x: &Buffer, width: usize, size: usize) -> Result<Buffer> {
        let part = x.from((self.rows.frozen * width * size) as u64);
        let copy = self.gpu.hold(part.bytes())?;
        self.gpu.copy(part, copy.part())?;
        Ok(copy)
    }

    /// `place` is where in host memory gate and up go. Of the last layer's context nothing is wanted but keys and values.
    fn layer_forward(&self, layer: &Layer, x: Part, keep: Keep, place: Option<usize>, last: bool) -> Result<Saved> {
        let (gpu, r, a) = (self.gpu, &self.rows, self.a);
        let (rows, n, h) = (r.rows, r.trained, a.hidden);
        let (x_in, rstd_in) = (gpu.hold_bf16(n * h)?, gpu.hold_f32(n)?);
        let normed = gpu.bf16(rows * h)?;
        let kept = Kept { first: r.frozen, rstd: rstd_in.part(), x: x_in.part() };
        rms_norm::forward(gpu, x, None, &self.weight(&layer.input_norm), a.eps, rows, normed.part(), Some(kept))?;

        let whole = keep != Keep::Stream;
        let (constant, of) = match &layer.mixer {
            Mixer::Attention(l) => self.attention_forward(l, normed.part(), x, whole, last)?,
            Mixer::DeltaNet(net) => self.delta_net_forward(net, normed.part(), x, whole)?,
        };
        // Rows from here on, and which of them is the first that trains.
        let from = if last { r.frozen } else { 0 };
        let (rows, first, x) = (rows - from, r.frozen - from, x.from((4 * from * h) as u64));

        let (x_mid, rstd_mid) = match whole {
            true => (Some(gpu.hold_bf16(n * h)?), Some(gpu.hold_f32(n)?)),
            false => (None, None),
        };
        let kept =
            x_mid.as_ref().zip(rstd_mid.as_ref()).map(|(x, rstd)| Kept { first, rstd: rstd.part(), x: x.part() });
        rms_norm::forward(gpu, x, None, &self.weight(&layer.post_norm), a.eps, rows, normed.part(), kept)?;
        let slots = self.offload.as_ref().filter(|_| keep != Keep::All);
        let (room, gate_up) = match slots {
            Some(slots) if first == 0 => (slots.lock().room()?, None),
            _ => {
                let buffer = self.stays(4 * rows * a.intermediate, keep == Keep::All && first == 0)?;
                (buffer.part(), Some(buffer))
            }
        };
        self.linears(&[&layer.gate, &layer.up], normed.part(), rows, room)?;
        drop(normed);
        let act = gpu.bf16(rows * a.intermediate)?;
        swiglu::forward(gpu, room, rows, a.intermediate, act.part())?;
        if let (Some(slots), Some(place)) = (slots, place) {
            let mut slots = slots.lock();
            if gate_up.is_some() {
                gpu.copy(room.from((4 * first * a.intermediate) as u64), slots.room()?)?;
            }
            slots.send(place)?;
        }
        let gate_up = match (keep, gate_up) {
            (Keep::All, Some(gate_up)) if first > 0 => Some(self.tail(&gate_up, 2 * a.intermediate, 2)?),
            (Keep::All, gate_up) => gate_up,
            _ => None,
        };
        self.onto_stream(&layer.down, act.part(), rows, x)?;
        let mixed = match (of, x_mid, rstd_mid) {
            (Some(of), Some(x_mid), Some(rstd_mid)) => Some(Mixed { of, x_mid, rstd_mid }),
            _ => None,
        };
        Ok(Saved { x_in, rstd_in, constant, mixed, gate_up })
    }

    /// Adds to the stream what attention makes of `normed`.
    fn attention_forward(
        &self,
        l: &Attention,
        normed: Part,
        x: Part,
        whole: bool,
        last: bool,
    ) -> Result<(Constant, Option<OfMixer>)> {
        let (gpu, r, a) = (self.gpu, &self.rows, self.a);
        let (rows, n) = (r.rows, r.trained);
        let from = if last { r.frozen } else { 0 };
        let heads = self.heads(l);
        let qkv = gpu.bf16(rows * heads.qkv())?;
        self.linears(&[&l.q, &l.k, &l.v], normed, rows, qkv.part())?;
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
        let qkv = Some(qkv).filter(|_| heads.gated);
        // From here on, of these rows.
        let (rows, first, x) = (rows - from, r.frozen - from, x.from((4 * from * a.hidden) as u64));
        let attended = self.stays(2 * rows * heads.q(), whole && first == 0)?;
        let log_sums = self.stays(4 * n * a.heads, whole)?;
        let shape = self.shape(&heads, l);
        let queries = q.from((2 * from * heads.q()) as u64);
        attention::forward(gpu, &shape, queries, kv.part(), attended.part(), log_sums.part(), last)?;
        let mut gate = None;
        match &qkv {
            None => {
                drop(q);
                self.onto_stream(&l.o, attended.part(), rows, x)?;
            }
            Some(qkv) => {
                gate = whole.then(|| gpu.hold_bf16(n * heads.q())).transpose()?;
                let both = Both { part: qkv.from((2 * from * heads.qkv()) as u64), stride: heads.qkv() };
                let kept = gate.as_ref().map_or(Part::NONE, Buffer::part);
                // What was q is done with.
                output_gate::forward(gpu, both, attended.part(), rows, &heads, q.part(), kept, first)?;
                self.onto_stream(&l.o, q.part(), rows, x)?;
            }
        }
        drop(qkv);
        let of = match q_kept {
            Some(q) => {
                let attended = if first == 0 { attended } else { self.tail(&attended, heads.q(), 2)? };
                Some(OfMixer::Attention(Attended { q, log_sums, attended, gate }))
            }
            None => None,
        };
        Ok((Constant::Attention(kv), of))
    }

    /// What the mixer left, again from the stream before the layer as it was kept.
    pub(super) fn mix_again(&self, layer: &Layer, saved: &Saved) -> Result<Mixed> {
        let (gpu, a) = (self.gpu, self.a);
        let (n, h) = (self.rows.trained, a.hidden);
        let normed = gpu.bf16(n * h)?;
        let w = self.weight(&layer.input_norm);
        rms_norm::again(gpu, saved.x_in.part(), saved.rstd_in.part(), &w, n, normed.part())?;
        let x = gpu.f32(n * h)?;
        linear::widen(gpu, saved.x_in.part(), n * h, x.part())?;
        let of = match (&layer.mixer, &saved.constant) {
            (Mixer::Attention(l), Constant::Attention(kv)) => self.attend_again(l, kv, normed.part(), x.part())?,
            (Mixer::DeltaNet(net), Constant::DeltaNet(c)) => self.delta_net_again(net, c, normed.part(), x.part())?,
            _ => unreachable!("a layer saves what its own mixer needs"),
        };
        let (x_mid, rstd_mid) = (gpu.bf16(n * h)?, gpu.f32(n)?);
        let kept = Kept { first: 0, rstd: rstd_mid.part(), x: x_mid.part() };
        let w = self.weight(&layer.post_norm);
        rms_norm::forward(gpu, x.part(), None, &w, a.eps, n, normed.part(), Some(kept))?;
        Ok(Mixed { of, x_mid, rstd_mid })
    }

    /// Attention of rows that train, which adds to their stream; their keys and values too are made again.
    fn attend_again(&self, l: &Attention, kv: &Buffer, normed: Part, x: Part) -> Result<OfMixer> {
        let (gpu, r, n) = (self.gpu, &self.rows, self.rows.trained);
        let heads = self.heads(l);
        let qkv = gpu.bf16(n * heads.qkv())?;
        self.linears(&[&l.q, &l.k, &l.v], normed, n, qkv.part())?;
        let turned = gpu.bf16(n * heads.q())?;
        let own = kv.from((4 * r.frozen * heads.kv()) as u64);
        let before = heads.norms.map(|_| gpu.bf16(n * (heads.q() + heads.kv()))).transpose()?;
        let angles = r.angles.from(r.frozen);
        let kept = before.as_ref().map_or(Part::NONE, Buffer::part);
        rope::forward(gpu, qkv.part(), n, &heads, &angles, turned.part(), own, kept, Part::NONE, 0)?;
        let (attended, log_sums) = (gpu.bf16(n * heads.q())?, gpu.f32(n * self.a.heads)?);
        let shape = self.shape(&heads, l);
        attention::forward(gpu, &shape, turned.part(), kv.part(), attended.part(), log_sums.part(), true)?;
        let mut gate = None;
        if heads.gated {
            let (kept, y) = (gpu.bf16(n * heads.q())?, gpu.bf16(n * heads.q())?);
            let both = Both { part: qkv.part(), stride: heads.qkv() };
            output_gate::forward(gpu, both, attended.part(), n, &heads, y.part(), kept.part(), 0)?;
            self.onto_stream(&l.o, y.part(), n, x)?;
            gate = Some(kept);
        } else {
            self.onto_stream(&l.o, attended.part(), n, x)?;
        }
        Ok(OfMixer::Attention(Attended { q: before.unwrap_or(turned), log_sums, attended, gate }))
    }
}
