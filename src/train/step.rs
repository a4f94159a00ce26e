//! The forward and backward passes of one step, which only read the weights. What comes out is enough to make the
//! gradient of any tensor, one at a time, and small beside a gradient of the whole model: for every linear its input
//! and its output's gradient, for every norm its gradient. Making them, and the update, come after ([`Gradients`]), when
//! everything is known to be finite: that is what lets a bad step end without having touched a weight.
//!
//! Activations are f32 whatever the weights are. Only rows that train are kept; those of contexts pass through.

use super::config::Refusal;
use super::delta_net;
use super::families::{Architecture, Attention, Layer, Linear, Mixer};
use super::gradients::{AttentionGradients, Gradients, LayerGradients, MixerGradients};
use super::pack::Batch;
use super::weights::{Weights, device_of};
use crate::compute::cpu::buffers::{Buffer, Pool};
use crate::compute::cpu::{self, attention, linear, output_gate, rms_norm, rope, swiglu, weight};
use crate::compute::cuda::GpuError;
use crate::image::ImageError;
use crate::memory::cuda::Device;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// A gradient above this is taken for overflow: its square, summed, no longer fits f32.
pub(super) const LARGEST: f64 = 1e15;

/// Why a step did not happen. The weights are as they were, unless it says that they are torn.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("the {what} of {} is not finite; the weights were left as they were", sample.map_or("a sample".into(), |s| format!("sample {s}")))]
    NotFinite { what: String, sample: Option<usize> },
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// On a GPU, where layers are updated one by one for want of memory.
    #[error("step {step} was cut while weights were being written ({what}): roll back to the last commit")]
    Cut { step: u64, what: String },
    #[error("step {step} was cut while weights were being written ({source}): roll back to the last commit")]
    Torn {
        step: u64,
        #[source]
        source: ImageError,
    },
}

impl StepError {
    /// What happened, without what became of the weights.
    pub(super) fn in_short(&self) -> String {
        match self {
            StepError::NotFinite { what, .. } => format!("the {what} is not finite"),
            other => other.to_string(),
        }
    }

    /// Whether weights were written and others of the step were not.
    pub fn is_torn(&self) -> bool {
        matches!(self, StepError::Torn { .. } | StepError::Cut { .. })
    }
}

/// A model whose weights are somewhere alive.
#[derive(Clone)]
pub struct Model {
    /// Bytes that a trainer holds on the device of the weights.
    pub(super) held: Arc<AtomicU64>,
    pub architecture: Arc<Architecture>,
    pub weights: Arc<dyn Weights>,
    pub(super) pool: Pool,
    /// Rows, frozen rows and targets of the last batch: while they stay, so do the sizes of buffers.
    last: Arc<Mutex<(usize, usize, usize)>>,
}

/// Buffers for one weight at a time.
#[derive(Default)]
pub(super) struct Loader {
    bytes: Vec<u8>,
    values: Vec<f32>,
}

/// What the backward pass needs of one layer, in rows that train.
struct Saved {
    x_in: Buffer,
    rstd_in: Buffer,
    mixer: SavedMixer,
    x_mid: Buffer,
    rstd_mid: Buffer,
    gate: Buffer,
    up: Buffer,
}

enum SavedMixer {
    Attention(SavedAttention),
    DeltaNet(delta_net::Saved),
}

/// Rows that train, unless said otherwise; heads apart where it says heads.
struct SavedAttention {
    /// Before their norms: q, its rstd, k, its rstd.
    before_norm: Option<[Buffer; 4]>,
    /// Heads.
    q: Buffer,
    /// Heads, all rows.
    k: Buffer,
    v: Buffer,
    log_sums: Buffer,
    attended: Buffer,
    output_gate: Option<Buffer>,
}

/// What [`Model::forward`] ends with.
struct Forward {
    saved: Vec<Saved>,
    /// The stream after the last layer, rows that train.
    x: Buffer,
    angles: rope::Angles,
}

impl Model {
    /// Checks that every tensor is there as config.json implies.
    pub fn new(architecture: Architecture, weights: Arc<dyn Weights>) -> Result<Model, Refusal> {
        architecture.check(&*weights)?;
        let (pool, last, held) = Default::default();
        Ok(Model { architecture: Arc::new(architecture), weights, pool, last, held })
    }

    /// The device that the weights are on and train on; `None` for weights in host memory. The error says, in a sentence, why
    /// they do not train.
    pub fn device(&self) -> Result<Option<Arc<Device>>, String> {
        device_of(&*self.weights, self.architecture.tensors().into_iter().map(|(name, _)| name))
    }

    /// Gives the memory that steps share back to the system, when no more are coming.
    pub fn release_buffers(&self) {
        self.pool.clear();
    }

    pub(super) fn load<'l>(&self, name: &str, loader: &'l mut Loader) -> Result<&'l [f32], ImageError> {
        let spec = self.weights.tensor(name).expect("every tensor was found when the model was made");
        self.load_rows(name, 0..spec.shape[0], loader)
    }

    pub(super) fn load_rows<'l>(
        &self,
        name: &str,
        rows: std::ops::Range<u64>,
        loader: &'l mut Loader,
    ) -> Result<&'l [f32], ImageError> {
        let spec = self.weights.tensor(name).expect("every tensor was found when the model was made");
        let kind = spec.kind().expect("its dtype was checked when the model was made");
        let count = ((rows.end - rows.start) * spec.shape[1..].iter().product::<u64>()) as usize;
        loader.bytes.resize(count * kind.bytes(), 0);
        loader.values.resize(count, 0.0);
        self.weights.read_rows(name, rows, &mut loader.bytes)?;
        weight::widen(kind, &loader.bytes, &mut loader.values);
        Ok(&loader.values)
    }

    /// The weight of a norm of the stream or of heads, as it multiplies.
    pub(super) fn load_norm<'l>(&self, name: &str, loader: &'l mut Loader) -> Result<&'l [f32], ImageError> {
        self.load(name, loader)?;
        let offset = self.architecture.norm_offset;
        if offset != 0.0 {
            loader.values.iter_mut().for_each(|w| *w += offset);
        }
        Ok(&loader.values)
    }

    /// Rows that train, of all rows of `x`.
    pub(super) fn trained(&self, batch: &Batch, x: &[f32]) -> Buffer {
        self.pool.copy(&x[batch.frozen * (x.len() / batch.rows())..])
    }

    pub(super) fn linear(&self, l: &Linear, x: &[f32], y: &mut [f32], loader: &mut Loader) -> Result<(), ImageError> {
        let bias = match &l.bias {
            Some(bias) => Some(self.load(bias, loader)?.to_vec()),
            None => None,
        };
        let w = self.load(&l.weight, loader)?;
        linear::forward(x, w, bias.as_deref(), y, l.inputs, l.outputs);
        Ok(())
    }

    fn shape(&self, batch: &Batch, layer: &Attention) -> attention::Shape {
        let a = &self.architecture;
        attention::Shape {
            rows: batch.rows(),
            heads: a.heads,
            kv_heads: a.kv_heads,
            head_dim: a.head_dim,
            scale: 1.0 / (a.head_dim as f32).sqrt(),
            window: layer.window,
        }
    }

    /// Runs every layer; `keep` what the backward pass needs.
    fn forward(&self, batch: &Batch, keep: bool) -> Result<Forward, StepError> {
        let a = &*self.architecture;
        let (rows, h) = (batch.rows(), a.hidden);
        let loader = &mut Loader::default();
        let shape = (rows, batch.frozen, batch.targets.len());
        if std::mem::replace(&mut *self.last.lock(), shape) != shape {
            self.pool.clear();
        }
        let mut x = self.pool.take(rows * h);
        for (id, x) in batch.ids.iter().zip(x.chunks_exact_mut(h)) {
            x.copy_from_slice(self.load_rows(&a.embedding, *id as u64..*id as u64 + 1, loader)?);
        }
        let angles = rope::Angles::new(&batch.positions, &a.rope.inverse_frequencies, a.rope.factor, a.head_dim);
        let mut saved = Vec::new();
        for layer in &a.layers {
            let state = self.layer_forward(batch, layer, &mut x, &angles, loader)?;
            if keep {
                saved.push(state);
            }
        }
        let x = self.pool.copy(&x[batch.frozen * h..]);
        Ok(Forward { saved, x, angles })
    }

    fn layer_forward(
        &self,
        batch: &Batch,
        layer: &Layer,
        x: &mut [f32],
        angles: &rope::Angles,
        loader: &mut Loader,
    ) -> Result<Saved, StepError> {
        let a = &*self.architecture;
        let (rows, h) = (batch.rows(), a.hidden);
        let pool = &self.pool;
        let trained = |x: &[f32]| self.trained(batch, x);
        let x_in = trained(x);
        let (mut normed, mut rstd) = (pool.take(rows * h), pool.take(rows));
        rms_norm::forward(x, self.load_norm(&layer.input_norm, loader)?, a.eps, &mut normed, &mut rstd);
        let rstd_in = trained(&rstd);

        // `normed` is free after it was read: it takes what each half adds to the stream.
        let mixer = match &layer.mixer {
            Mixer::Attention(l) => {
                SavedMixer::Attention(self.attention_forward(batch, l, &mut normed, angles, loader)?)
            }
            Mixer::DeltaNet(net) => SavedMixer::DeltaNet(self.delta_net_forward(batch, net, &mut normed, loader)?),
        };
        cpu::add(x, &normed);
        let x_mid = trained(x);
        rms_norm::forward(x, self.load_norm(&layer.post_norm, loader)?, a.eps, &mut normed, &mut rstd);
        let rstd_mid = trained(&rstd);
        let mut gate = pool.take(rows * layer.gate.outputs);
        let mut up = pool.take(rows * layer.up.outputs);
        self.linear(&layer.gate, &normed, &mut gate, loader)?;
        self.linear(&layer.up, &normed, &mut up, loader)?;
        let mut act = pool.take(gate.len());
        swiglu::forward(&gate, &up, &mut act);
        self.linear(&layer.down, &act, &mut normed, loader)?;
        cpu::add(x, &normed);
        Ok(Saved { x_in, rstd_in, mixer, x_mid, rstd_mid, gate: trained(&gate), up: trained(&up) })
    }

    /// `normed` becomes what attention adds to the stream.
    fn attention_forward(
        &self,
        batch: &Batch,
        layer: &Attention,
        normed: &mut Buffer,
        angles: &rope::Angles,
        loader: &mut Loader,
    ) -> Result<SavedAttention, StepError> {
        let a = &*self.architecture;
        let (rows, d, pool) = (batch.rows(), a.head_dim, &self.pool);
        let trained = |x: &[f32]| self.trained(batch, x);
        let mut q = pool.take(rows * layer.q.outputs);
        let mut k = pool.take(rows * layer.k.outputs);
        let mut v = pool.take(rows * layer.v.outputs);
        self.linear(&layer.q, normed, &mut q, loader)?;
        self.linear(&layer.k, normed, &mut k, loader)?;
        self.linear(&layer.v, normed, &mut v, loader)?;
        let mut gate_of_output = None;
        if layer.output_gate {
            let both = std::mem::replace(&mut q, pool.take(rows * layer.o.inputs));
            let mut gate = q.like();
            output_gate::split(&both, d, &mut q, &mut gate);
            gate_of_output = Some(gate);
        }
        let before_norm = match &layer.qk_norm {
            Some((q_norm, k_norm)) => {
                let mut norm = |x: &mut Buffer, name: &str| -> Result<[Buffer; 2], ImageError> {
                    let before = std::mem::replace(x, pool.take(x.len()));
                    let mut rstd = pool.take(x.len() / d);
                    rms_norm::forward(&before, self.load_norm(name, loader)?, a.eps, x, &mut rstd);
                    Ok([trained(&before), trained(&rstd)])
                };
                let [q, q_rstd] = norm(&mut q, q_norm)?;
                let [k, k_rstd] = norm(&mut k, k_norm)?;
                Some([q, q_rstd, k, k_rstd])
            }
            None => None,
        };
        let mut heads = [pool.take(q.len()), pool.take(k.len()), pool.take(v.len())];
        rope::forward(&q, angles, &mut heads[0], rows);
        rope::forward(&k, angles, &mut heads[1], rows);
        rope::split_heads(&v, &mut heads[2], rows, d);
        let [query, key, value] = heads;
        let (mut attended_heads, mut log_sums) = (pool.take(q.len()), pool.take(a.heads * rows));
        let shape = self.shape(batch, layer);
        attention::forward(&query, &key, &value, &batch.spans, &shape, &mut attended_heads, &mut log_sums);
        let mut attended = q;
        rope::join_heads(&attended_heads, &mut attended, rows, d);
        drop((k, v, attended_heads));

        let attended_alone = trained(&attended);
        if let Some(gate) = &gate_of_output {
            output_gate::forward(&mut attended, gate);
        }
        self.linear(&layer.o, &attended, normed, loader)?;
        // Heads apart, the rows that train are the end of each.
        let ends = |x: &[f32], width: usize| {
            let mut out = pool.take(x.len() / rows * batch.trained());
            let of_heads = x.chunks_exact(rows * width).zip(out.chunks_exact_mut(batch.trained() * width));
            of_heads.for_each(|(x, out)| out.copy_from_slice(&x[batch.frozen * width..]));
            out
        };
        let (query, log_sums) = (ends(&query, d), ends(&log_sums, 1));
        Ok(SavedAttention {
            before_norm,
            q: query,
            k: key,
            v: value,
            log_sums,
            attended: attended_alone,
            output_gate: gate_of_output.map(|gate| trained(&gate)),
        })
    }

    /// Losses of the batch's targets, in their order. Changes nothing.
    pub fn losses(&self, batch: &Batch) -> Result<Vec<f32>, StepError> {
        let forward = self.forward(batch, false)?;
        let head = self.head(batch, &forward.x, false, &[])?;
        Ok(head.losses)
    }

    /// Logits (targets x V) of the rows that have a target. For tests: they are never all in memory in training.
    pub fn logits(&self, batch: &Batch) -> Result<Vec<f32>, StepError> {
        let forward = self.forward(batch, false)?;
        let normed = self.final_norm(batch, &forward.x)?;
        let mut logits = vec![0.0; batch.targets.len() * self.architecture.vocabulary];
        self.logits_of(&normed.normed, &mut logits)?;
        Ok(logits)
    }

    /// Losses, and gradients of everything that `trainable` says yes to.
    pub fn forward_backward(
        &self,
        batch: &Batch,
        trainable: &dyn Fn(&str) -> bool,
    ) -> Result<(Vec<f32>, Gradients), StepError> {
        let a = &*self.architecture;
        let h = a.hidden;
        let Forward { mut saved, x, angles } = self.forward(batch, true)?;
        let head_name = a.head.as_ref().unwrap_or(&a.embedding);
        let head =
            self.head(batch, &x, true, if trainable(head_name) { std::slice::from_ref(head_name) } else { &[] })?;

        // The gradient of the stream: only rows with a target have one so far.
        let (targets, mut dx) = (&batch.targets, self.pool.zeros(batch.trained() * h));
        let rows: Vec<f32> = targets.iter().flat_map(|(row, _)| &x[row * h..(row + 1) * h]).copied().collect();
        let (mut d_rows, mut d_norm) = (vec![0.0; rows.len()], vec![0.0; h]);
        let loader = &mut Loader::default();
        let norm = self.load_norm(&a.norm, loader)?;
        rms_norm::backward(&head.d_normed, &rows, norm, &head.rstd, &mut d_rows, &mut d_norm);
        for ((row, _), d) in targets.iter().zip(d_rows.chunks_exact(h)) {
            dx[row * h..(row + 1) * h].copy_from_slice(d);
        }
        drop((x, rows, d_rows));
        finite(&dx, h, batch, || "gradient of the last layer's output".into())?;
        if !product_is_finite(&d_norm, &[1.0], 1) {
            return Err(StepError::NotFinite { what: "gradient of the last norm".into(), sample: None });
        }

        // Below the lowest layer with something to train, and above an embedding that is not, nobody asks.
        let trains = |layer: &Layer| layer.tensors().into_iter().any(trainable);
        let lowest = match trainable(&a.embedding) {
            true => 0,
            false => a.layers.iter().position(trains).unwrap_or(a.layers.len()),
        };
        let mut layers = Vec::new();
        for (i, layer) in a.layers.iter().enumerate().skip(lowest).rev() {
            let state = saved.pop().expect("one was kept of every layer");
            let gradients = self.layer_backward(batch, layer, state, &mut dx, &angles, loader)?;
            finite(&dx, h, batch, || format!("gradient of layer {i}'s input"))?;
            gradients
                .check(layer)
                .map_err(|what| StepError::NotFinite { what: format!("{what} of layer {i}"), sample: None })?;
            layers.push((i, gradients));
        }
        let gradients = Gradients::new(a, batch, head.gradient, d_norm, layers, dx);
        // What only passed through is free, and the update wants other sizes.
        self.pool.clear();
        Ok((head.losses, gradients))
    }

    fn layer_backward(
        &self,
        batch: &Batch,
        layer: &Layer,
        saved: Saved,
        dx: &mut [f32],
        angles: &rope::Angles,
        loader: &mut Loader,
    ) -> Result<LayerGradients, StepError> {
        let a = &*self.architecture;
        let (trained, h, pool) = (batch.trained(), a.hidden, &self.pool);
        let Saved { mut gate, mut up, .. } = saved;
        // Feed-forward. `act` starts as its own gradient.
        let mut act = pool.take(gate.len());
        let back = |l: &Linear, dy: &[f32], dx: &mut [f32], add: bool, loader: &mut Loader| {
            self.linear_backward(l, dy, dx, add, loader)
        };
        back(&layer.down, dx, &mut act, false, loader)?;
        swiglu::backward(&mut act, &mut gate, &mut up);
        let mut d_normed = pool.take(trained * h);
        back(&layer.gate, &gate, &mut d_normed, false, loader)?;
        back(&layer.up, &up, &mut d_normed, true, loader)?;
        let d_out = pool.copy(dx);
        let mut d_post_norm = vec![0.0; h];
        let norm = self.load_norm(&layer.post_norm, loader)?;
        let post_norm = norm.to_vec();
        rms_norm::backward(&d_normed, &saved.x_mid, norm, &saved.rstd_mid, dx, &mut d_post_norm);
        let d_mid = pool.copy(dx);

        let mixer =
            match (&layer.mixer, saved.mixer) {
                (Mixer::Attention(l), SavedMixer::Attention(saved)) => MixerGradients::Attention(
                    self.attention_backward(batch, l, saved, dx, &mut d_normed, angles, loader)?,
                ),
                (Mixer::DeltaNet(net), SavedMixer::DeltaNet(saved)) => {
                    MixerGradients::DeltaNet(self.delta_net_backward(batch, net, saved, dx, &mut d_normed, loader)?)
                }
                _ => unreachable!("a layer saves what its own mixer needs"),
            };
        let mut d_input_norm = vec![0.0; h];
        let norm = self.load_norm(&layer.input_norm, loader)?;
        let input_norm = norm.to_vec();
        rms_norm::backward(&d_normed, &saved.x_in, norm, &saved.rstd_in, dx, &mut d_input_norm);
        Ok(LayerGradients {
            x_in: saved.x_in,
            rstd_in: saved.rstd_in,
            input_norm,
            mixer,
            d_mid,
            x_mid: saved.x_mid,
            rstd_mid: saved.rstd_mid,
            post_norm,
            d_gate: gate,
            d_up: up,
            act,
            d_out,
            d_input_norm,
            d_post_norm,
        })
    }

    pub(super) fn linear_backward(
        &self,
        l: &Linear,
        dy: &[f32],
        dx: &mut [f32],
        add: bool,
        loader: &mut Loader,
    ) -> Result<(), ImageError> {
        let w = self.load(&l.weight, loader)?;
        linear::backward_input(dy, w, dx, l.inputs, l.outputs, add);
        Ok(())
    }

    /// `dx` is the gradient of what attention added to the stream; `d_normed` becomes that of its input.
    #[allow(clippy::too_many_arguments)]
    fn attention_backward(
        &self,
        batch: &Batch,
        layer: &Attention,
        mut saved: SavedAttention,
        dx: &[f32],
        d_normed: &mut [f32],
        angles: &rope::Angles,
        loader: &mut Loader,
    ) -> Result<AttentionGradients, StepError> {
        let a = &*self.architecture;
        let (trained, d, pool) = (batch.trained(), a.head_dim, &self.pool);
        let back = |l: &Linear, dy: &[f32], dx: &mut [f32], add: bool, loader: &mut Loader| {
            self.linear_backward(l, dy, dx, add, loader)
        };
        let mut d_attended = pool.take(trained * layer.o.inputs);
        back(&layer.o, dx, &mut d_attended, false, loader)?;
        let mut delta = pool.take(a.heads * trained);
        let mut attended = saved.attended;
        if let Some(gate) = &mut saved.output_gate {
            // The input of o is wanted for its gradient, and what was gated here. `gate` becomes its own gradient.
            let mut gated = pool.copy(&attended);
            output_gate::backward(&mut d_attended, &mut gated, gate);
            attention::delta(&d_attended, &attended, a.heads, d, &mut delta);
            attended = gated;
        } else {
            attention::delta(&d_attended, &attended, a.heads, d, &mut delta);
        }
        let mut d_heads = pool.take(d_attended.len());
        rope::split_heads(&d_attended, &mut d_heads, trained, d);
        let mut dq_heads = d_attended;
        let mut dk_heads = pool.take(trained * layer.k.outputs);
        let mut dv_heads = pool.take(trained * layer.v.outputs);
        attention::backward(
            &d_heads,
            &delta,
            (&saved.q, &saved.k, &saved.v),
            &saved.log_sums,
            &batch.spans,
            &self.shape(batch, layer),
            batch.frozen,
            (&mut dq_heads, &mut dk_heads, &mut dv_heads),
        );
        let mut dq = d_heads;
        let (mut dk, mut dv) = (pool.take(dk_heads.len()), pool.take(dv_heads.len()));
        rope::backward(&dq_heads, angles, batch.frozen, &mut dq, trained);
        rope::backward(&dk_heads, angles, batch.frozen, &mut dk, trained);
        rope::join_heads(&dv_heads, &mut dv, trained, d);
        let mut d_qk_norm = None;
        if let (Some((q_norm, k_norm)), Some([q, q_rstd, k, k_rstd])) = (&layer.qk_norm, &saved.before_norm) {
            let mut norm = |dy: &mut Buffer, x: &[f32], rstd: &[f32], name: &str| {
                let (mut dx, mut dw) = (pool.zeros(dy.len()), vec![0.0; d]);
                rms_norm::backward(dy, x, self.load_norm(name, loader)?, rstd, &mut dx, &mut dw);
                *dy = dx;
                Ok::<_, ImageError>(dw)
            };
            d_qk_norm = Some((norm(&mut dq, q, q_rstd, q_norm)?, norm(&mut dk, k, k_rstd, k_norm)?));
        }
        if let Some(d_gate) = &saved.output_gate {
            let d_query = std::mem::replace(&mut dq, pool.take(trained * layer.q.outputs));
            output_gate::join(&d_query, d_gate, d, &mut dq);
        }
        back(&layer.q, &dq, d_normed, false, loader)?;
        back(&layer.k, &dk, d_normed, true, loader)?;
        back(&layer.v, &dv, d_normed, true, loader)?;
        Ok(AttentionGradients { dq, dk, dv, attended, d_qk_norm })
    }
}

/// Are rows of `x` (width `h`) finite and of a size that can be squared? If not, names the sample of the first that is not.
fn finite(x: &[f32], h: usize, batch: &Batch, what: impl Fn() -> String) -> Result<(), StepError> {
    if (cpu::largest(x) as f64) < LARGEST {
        return Ok(());
    }
    let bad = x.chunks_exact(h).position(|row| cpu::largest(row) as f64 >= LARGEST);
    Err(StepError::NotFinite { what: what(), sample: bad.and_then(|row| batch.sample_of(row)) })
}

/// Would the weight gradient `dy^T x` stay finite with certainty, squares included?
pub(super) fn product_is_finite(dy: &[f32], x: &[f32], rows: usize) -> bool {
    cpu::largest(dy) as f64 * cpu::largest(x) as f64 * rows as f64 <= LARGEST
}
