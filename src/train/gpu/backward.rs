//! The way back through a layer: gradients of everything that its weights' gradients are products of.

use super::forward::{Attended, Constant, Mixed, OfMixer, Saved};
use super::head::{Head, Stream};
use super::{Context, Order, Result};
use crate::compute::cuda::output_gate::{self, Both};
use crate::compute::cuda::peaks::Peaks;
use crate::compute::cuda::{Buffer, Part, attention, rms_norm, rope, swiglu};
use crate::train::families::{Attention, Mixer};
use crate::train::step::{LARGEST, StepError};

/// Inputs and gradients of one layer's linears, side by side where they share their input; gradients of its norms.
pub(super) struct LayerGradients {
    pub layer: usize,
    pub x_in: Buffer,
    pub rstd_in: Buffer,
    pub mixer: MixerGradients,
    /// The stream's gradient after the mixer.
    pub d_mid: Buffer,
    pub x_mid: Buffer,
    pub rstd_mid: Buffer,
    pub d_gate_up: Buffer,
    pub act: Buffer,
    /// The stream's gradient after the layer.
    pub d_out: Buffer,
    /// f32: H each.
    pub d_input_norm: Buffer,
    pub d_post_norm: Buffer,
}

/// What the gradients of a mixer's tensors are made of. Vectors are f32.
pub(super) enum MixerGradients {
    Attention {
        /// Side by side, q's with their gates'.
        d_qkv: Buffer,
        /// Input of o.
        attended: Buffer,
        /// Two times D.
        d_qk_norm: Option<Buffer>,
    },
    DeltaNet {
        /// Of rows `[qkv | z | b | a]`.
        d_inputs: Buffer,
        /// Input of the last linear.
        mixed: Buffer,
        /// Channels x taps.
        d_convolution: Buffer,
        /// Of A_log, then dt_bias.
        d_gates: Buffer,
        d_norm: Buffer,
    },
}

impl MixerGradients {
    /// The gradient of what the first linears gave, and the last linear's input.
    fn rows(&self) -> [&Buffer; 2] {
        match self {
            MixerGradients::Attention { d_qkv, attended, .. } => [d_qkv, attended],
            MixerGradients::DeltaNet { d_inputs, mixed, .. } => [d_inputs, mixed],
        }
    }
}

/// Largest values that are looked at for each layer (see [`Context::peaks_of_layer`]).
pub(super) const PEAKS: usize = 14;

impl Context<'_> {
    /// What updates that come after the whole backward pass are made from stays until then.
    pub(super) fn for_updates(&self, bytes: usize) -> Result<Buffer> {
        self.stays(bytes, self.plan.order == Order::After)
    }

    /// `dx` becomes the gradient of the stream before layer `i`.
    pub fn layer_backward(&self, i: usize, saved: Saved, dx: &mut Stream) -> Result<LayerGradients> {
        let (gpu, a, layer) = (self.gpu, self.a, &self.a.layers[i]);
        let (n, h, inner) = (self.rows.trained, a.hidden, a.intermediate);
        let mut saved = saved;
        let place = self.plan.place(i);
        if let (Some(offload), Some(place)) = (&self.offload, place) {
            offload.lock().fetch(place)?;
        }
        // While this one is computed.
        self.fetch_below(i)?;
        let mixed = match saved.mixed.take() {
            Some(kept) => kept,
            None => self.mix_again(layer, &saved)?,
        };
        let Saved { x_in, rstd_in, constant, gate_up, .. } = saved;
        let Mixed { of, x_mid, rstd_mid } = mixed;

        let bf16 = |elements: usize| self.for_updates(2 * elements);
        let f32 = |elements: usize| self.for_updates(4 * elements);

        // Feed-forward. `act` starts as its own gradient.
        let d_normed = gpu.bf16(n * h)?;
        let mut fetched = None;
        let gate_up = match (gate_up, &self.offload, place) {
            (Some(kept), ..) => kept,
            (None, Some(offload), Some(place)) => {
                fetched = Some(offload.lock().fetched(place)?);
                gpu.bf16(n * 2 * inner)?
            }
            (None, ..) => {
                let w = self.weight(&layer.post_norm);
                rms_norm::again(gpu, x_mid.part(), rstd_mid.part(), &w, n, d_normed.part())?;
                let gate_up = gpu.bf16(n * 2 * inner)?;
                self.linears(&[&layer.gate, &layer.up], d_normed.part(), n, gate_up.part())?;
                gate_up
            }
        };
        let act = bf16(n * inner)?;
        self.back(&[&layer.down], dx.narrow.part(), n, act.part())?;
        swiglu::backward(gpu, act.part(), fetched.unwrap_or(gate_up.part()), n, inner, gate_up.part())?;
        self.back(&[&layer.gate, &layer.up], gate_up.part(), n, d_normed.part())?;
        let d_out = std::mem::replace(&mut dx.narrow, bf16(n * h)?);
        let d_post_norm = f32(h)?;
        let w = self.weight(&layer.post_norm);
        let narrow = dx.narrow.part();
        let wide = dx.wide.part();
        let dw = d_post_norm.part();
        rms_norm::backward(gpu, d_normed.part(), x_mid.part(), rstd_mid.part(), &w, n, None, wide, narrow, dw)?;
        let d_mid = std::mem::replace(&mut dx.narrow, bf16(n * h)?);

        let mixer = match (&layer.mixer, constant, of) {
            (Mixer::Attention(l), Constant::Attention(kv), OfMixer::Attention(kept)) => {
                self.attention_backward(l, kv, kept, d_mid.part(), d_normed.part())?
            }
            (Mixer::DeltaNet(net), Constant::DeltaNet(constants), OfMixer::DeltaNet(kept)) => {
                self.delta_net_backward(net, constants, kept, d_mid.part(), d_normed.part())?
            }
            _ => unreachable!("a layer saves what its own mixer needs"),
        };
        let d_input_norm = f32(h)?;
        let w = self.weight(&layer.input_norm);
        let (narrow, dw) = (dx.narrow.part(), d_input_norm.part());
        rms_norm::backward(gpu, d_normed.part(), x_in.part(), rstd_in.part(), &w, n, None, wide, narrow, dw)?;
        Ok(LayerGradients {
            layer: i,
            x_in,
            rstd_in,
            mixer,
            d_mid,
            x_mid,
            rstd_mid,
            d_gate_up: gate_up,
            act,
            d_out,
            d_input_norm,
            d_post_norm,
        })
    }

    /// `d_mid` is the gradient of what attention added to the stream; `d_normed` becomes that of its input.
    fn attention_backward(
        &self,
        l: &Attention,
        kv: Buffer,
        kept: Attended,
        d_mid: Part,
        d_normed: Part,
    ) -> Result<MixerGradients> {
        let (gpu, a, n) = (self.gpu, self.a, self.rows.trained);
        let heads = self.heads(l);
        let Attended { q, log_sums, attended, gate } = kept;
        let (d_attended, d_qkv) = (gpu.bf16(n * heads.q())?, self.for_updates(2 * n * heads.qkv())?);
        self.back(&[&l.o], d_mid, n, d_attended.part())?;
        if let Some(gate) = &gate {
            let both = Both { part: d_qkv.part(), stride: heads.qkv() };
            output_gate::backward(gpu, d_attended.part(), attended.part(), gate.part(), n, &heads, both)?;
        }
        let angles = self.rows.angles.from(self.rows.frozen);
        let turned = match heads.norms {
            Some(_) => {
                let turned = gpu.bf16(n * heads.q())?;
                rope::again(gpu, q.part(), n, &heads, &angles, turned.part())?;
                Some(turned)
            }
            None => None,
        };
        let turned_q = turned.as_ref().unwrap_or(&q).part();
        let [dq, dk, dv] = [gpu.bf16(n * heads.q())?, gpu.bf16(n * heads.q())?, gpu.bf16(n * heads.q())?];
        let shape = self.shape(&heads, l);
        let forward = (turned_q, kv.part(), attended.part(), log_sums.part());
        let by_head = [dq.part(), dk.part(), dv.part()];
        attention::backward(gpu, &shape, forward, d_attended.part(), by_head)?;
        drop((kv, log_sums, d_attended, turned));
        let d_qk_norm = heads.norms.map(|_| self.for_updates(4 * 2 * a.head_dim)).transpose()?;
        let dw = d_qk_norm.as_ref().map_or(Part::NONE, Buffer::part);
        let before = if heads.norms.is_some() { q.part() } else { Part::NONE };
        rope::backward(gpu, by_head, n, &heads, &angles, before, d_qkv.part(), dw)?;
        drop((q, dq, dk, dv));
        self.back(&[&l.q, &l.k, &l.v], d_qkv.part(), n, d_normed)?;
        // Where there is a gate, what went into the last linear took its place.
        Ok(MixerGradients::Attention { d_qkv, attended: gate.unwrap_or(attended), d_qk_norm })
    }

    /// The largest values of a layer's gradients and inputs into `peaks`: by pairs whose product a weight's gradient is, then
    /// the stream's gradient below, the norms', and the norms' weights. Inputs behind a norm stand for it: no value of it is
    /// larger than the root of its width, times the weight.
    pub fn peaks_of_layer(&self, g: &LayerGradients, dx: &Stream, peaks: Part) -> Result<()> {
        let layer = &self.a.layers[g.layer];
        let [d_inputs, mixed] = g.mixer.rows();
        let mut all = Peaks::default();
        let pairs = [d_inputs, &g.x_in, &g.d_mid, mixed, &g.d_gate_up, &g.x_mid, &g.d_out, &g.act];
        for (i, x) in pairs.into_iter().enumerate() {
            all.bf16(x.part(), i);
        }
        all.f32(dx.wide.part(), 8);
        all.f32(g.d_input_norm.part(), 9);
        all.f32(g.d_post_norm.part(), 10);
        match &g.mixer {
            MixerGradients::Attention { d_qk_norm, .. } => d_qk_norm.iter().for_each(|d| all.f32(d.part(), 11)),
            MixerGradients::DeltaNet { d_convolution, d_gates, d_norm, .. } => {
                [d_convolution, d_gates, d_norm].into_iter().for_each(|d| all.f32(d.part(), 11))
            }
        }
        all.vector(&self.weight(&layer.input_norm), 12);
        all.vector(&self.weight(&layer.post_norm), 13);
        Ok(all.find(self.gpu, peaks, PEAKS)?)
    }

    /// The same of the head, in its place before the layers.
    pub fn peaks_of_head(&self, head: &Head, dx: &Stream, peaks: Part) -> Result<()> {
        let mut all = Peaks::default();
        all.bf16(head.normed.part(), 1);
        head.d_logits.iter().for_each(|d| all.bf16(d.part(), 0));
        all.f32(dx.wide.part(), 8);
        all.f32(head.d_norm.part(), 9);
        Ok(all.find(self.gpu, peaks, PEAKS)?)
    }

    /// Would every gradient stay finite with certainty, squares included? Else says which may not.
    pub fn check_peaks(&self, peaks: Vec<u32>) -> Result<()> {
        // NaN and infinity, by their bits the largest of all, fail every comparison as they should.
        let value = |bits: u32| f32::from_bits(bits) as f64;
        for (i, p) in peaks.chunks_exact(PEAKS).enumerate() {
            // Infinite where the input of a norm is not finite.
            let normed = |x: usize, weight: usize| match value(p[x]) < LARGEST {
                true => (self.a.hidden as f64).sqrt() * (value(p[weight]) + self.a.norm_offset.abs() as f64),
                false => f64::INFINITY,
            };
            let inputs_of = |b: usize| match (i, b) {
                (1.., 1) => normed(1, 12),
                (1.., 5) => normed(5, 13),
                _ => value(p[b]),
            };
            let product = |a: usize, b: usize| {
                let largest = inputs_of(b);
                // Nothing times infinity is no number, and infinite here.
                if largest < LARGEST { value(p[a]) * largest * self.rows.trained as f64 } else { f64::INFINITY }
            };
            let place = |what: &str| match i {
                0 => format!("{what} of the head"),
                i => format!("{what} of layer {}", i - 1),
            };
            let linear = i.checked_sub(1).is_some_and(|i| matches!(self.a.layers[i].mixer, Mixer::DeltaNet(_)));
            let (inputs, out) = match linear {
                true => ("gradient of in_proj_qkv, in_proj_z, in_proj_b or in_proj_a", "gradient of out_proj"),
                false => ("gradient of q_proj, k_proj or v_proj", "gradient of o_proj"),
            };
            let checks = [
                (inputs, product(0, 1)),
                (out, product(2, 3)),
                ("gradient of gate_proj or up_proj", product(4, 5)),
                ("gradient of down_proj", product(6, 7)),
                ("gradient of the input", value(p[8])),
                (
                    if linear { "gradient of a norm, conv1d, A_log or dt_bias" } else { "gradient of a norm" },
                    value(p[9]).max(value(p[10])).max(value(p[11])),
                ),
            ];
            for (k, (what, size)) in checks.into_iter().enumerate() {
                let finite = size < LARGEST && (k != 5 || p[9..12].iter().all(|&b| value(b) < LARGEST));
                if !finite {
                    let what = if i == 0 && k == 0 { "gradient" } else { what };
                    return Err(StepError::NotFinite { what: place(what), sample: None });
                }
            }
        }
        Ok(())
    }
}
