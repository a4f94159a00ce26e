//! Gradients of one step, a tensor at a time and parts of a tensor at a time, from what the backward pass left. All of
//! them are known to be finite before the first is asked for.

use super::delta_net::DeltaNetGradients;
use super::families::{Architecture, Layer, Linear, Mixer};
use super::pack::Batch;
use super::step::product_is_finite;
use crate::compute::cpu::buffers::Buffer;
use crate::compute::cpu::{embedding, linear, rms_norm};

/// Elements of the embedding's or the head's gradient that are in memory at once.
const VOCABULARY_PART: usize = 1 << 20;

/// What one layer left: for each linear its input and its output's gradient, in rows that train.
pub(super) struct LayerGradients {
    /// Inputs of the two norms and what makes the normed rows again.
    pub x_in: Buffer,
    pub rstd_in: Buffer,
    pub input_norm: Vec<f32>,
    pub mixer: MixerGradients,
    pub d_mid: Buffer,
    pub x_mid: Buffer,
    pub rstd_mid: Buffer,
    pub post_norm: Vec<f32>,
    pub d_gate: Buffer,
    pub d_up: Buffer,
    pub act: Buffer,
    pub d_out: Buffer,
    pub d_input_norm: Vec<f32>,
    pub d_post_norm: Vec<f32>,
}

pub(super) enum MixerGradients {
    Attention(AttentionGradients),
    DeltaNet(DeltaNetGradients),
}

pub(super) struct AttentionGradients {
    pub dq: Buffer,
    pub dk: Buffer,
    pub dv: Buffer,
    /// Input of o.
    pub attended: Buffer,
    pub d_qk_norm: Option<(Vec<f32>, Vec<f32>)>,
}

/// What a linear was given.
#[derive(Clone, Copy)]
enum Input<'a> {
    /// The layer's input after its norm.
    Normed,
    /// The stream after the mixer and the norm that follows.
    NormedMid,
    Rows(&'a [f32]),
}

/// A small tensor's gradient: name, rows, columns, values.
type Small<'a> = (&'a str, usize, usize, &'a [f32]);

impl LayerGradients {
    /// Every linear of the layer, with its output's gradient.
    fn linears<'a>(&'a self, layer: &'a Layer) -> Vec<(&'a Linear, &'a [f32], Input<'a>)> {
        let mut all: Vec<(&Linear, &[f32], Input)> = match (&layer.mixer, &self.mixer) {
            (Mixer::Attention(l), MixerGradients::Attention(g)) => vec![
                (&l.q, &g.dq, Input::Normed),
                (&l.k, &g.dk, Input::Normed),
                (&l.v, &g.dv, Input::Normed),
                (&l.o, &self.d_mid, Input::Rows(&g.attended)),
            ],
            (Mixer::DeltaNet(l), MixerGradients::DeltaNet(g)) => vec![
                (&l.qkv, &g.d_qkv, Input::Normed),
                (&l.z, &g.d_z, Input::Normed),
                (&l.b, &g.d_b, Input::Normed),
                (&l.a, &g.d_a, Input::Normed),
                (&l.out, &self.d_mid, Input::Rows(&g.mixed)),
            ],
            _ => unreachable!("a layer's gradients are its own mixer's"),
        };
        all.push((&layer.down, &self.d_out, Input::Rows(&self.act)));
        all.extend([(&layer.gate, &*self.d_gate, Input::NormedMid), (&layer.up, &self.d_up, Input::NormedMid)]);
        all
    }

    /// Every other tensor of the layer, biases aside.
    fn small<'a>(&'a self, layer: &'a Layer) -> Vec<Small<'a>> {
        let vector = |name: &'a str, dw: &'a [f32]| (name, 1, dw.len(), dw);
        let mut all = vec![vector(&layer.input_norm, &self.d_input_norm), vector(&layer.post_norm, &self.d_post_norm)];
        match (&layer.mixer, &self.mixer) {
            (Mixer::Attention(l), MixerGradients::Attention(g)) => {
                if let (Some((q, k)), Some((dq, dk))) = (&l.qk_norm, &g.d_qk_norm) {
                    all.extend([vector(q, dq), vector(k, dk)]);
                }
            }
            (Mixer::DeltaNet(l), MixerGradients::DeltaNet(g)) => {
                all.push((&l.convolution, l.shape.channels(), l.kernel, &g.d_convolution));
                all.extend([
                    vector(&l.a_log, &g.d_a_log),
                    vector(&l.dt_bias, &g.d_dt_bias),
                    vector(&l.norm, &g.d_norm),
                ]);
            }
            _ => unreachable!("a layer's gradients are its own mixer's"),
        }
        all
    }

    /// Says which gradient may overflow, if one may.
    pub(super) fn check(&self, layer: &Layer) -> Result<(), String> {
        let rows = self.rstd_in.len();
        // A normed row is at most sqrt(H) times its weight.
        let bound = |w: &[f32]| w.iter().fold(0.0f32, |m, w| m.max(w.abs())) * (w.len() as f32).sqrt();
        let (n_in, n_mid) = ([bound(&self.input_norm)], [bound(&self.post_norm)]);
        // The module's own name, without where it is.
        let short = |name: &str| {
            let name = name.strip_suffix(".weight").unwrap_or(name);
            format!("gradient of {}", name.rsplit('.').next().unwrap_or(name))
        };
        for (l, dy, x) in self.linears(layer) {
            let x = match x {
                Input::Normed => &n_in,
                Input::NormedMid => &n_mid,
                Input::Rows(x) => x,
            };
            if !product_is_finite(dy, x, rows) {
                return Err(short(&l.weight));
            }
        }
        for (name, _, _, dw) in self.small(layer) {
            if !product_is_finite(dw, &[1.0], 1) {
                return Err(short(name));
            }
        }
        Ok(())
    }
}

/// What is kept of the head's gradient.
pub(super) enum HeadGradient {
    None,
    /// Gradient of the logits (rows x V) and the head's input (rows x H).
    Logits {
        d_logits: Buffer,
        normed: Buffer,
    },
    /// V x H.
    Whole(Buffer),
}

/// The gradient of one tensor, seen as a matrix `rows x columns` (a vector is one row).
pub struct Gradient<'a> {
    pub rows: usize,
    pub columns: usize,
    source: Source<'a>,
}

enum Source<'a> {
    Dense(&'a [f32]),
    Product { dy: &'a [f32], x: &'a [f32] },
    Vocabulary { head: Option<&'a HeadGradient>, embedding: Option<(&'a [u32], &'a [f32])> },
}

impl<'a> Gradient<'a> {
    /// A gradient that is all there.
    pub fn dense(rows: usize, columns: usize, values: &'a [f32]) -> Gradient<'a> {
        assert_eq!(values.len(), rows * columns);
        Gradient { rows, columns, source: Source::Dense(values) }
    }

    /// How many rows to make at a time: all of a layer's matrix, but parts of the vocabulary.
    pub fn chunk_rows(&self) -> usize {
        match self.source {
            Source::Vocabulary { .. } => (VOCABULARY_PART / self.columns).clamp(1, self.rows),
            _ => self.rows,
        }
    }

    /// Writes rows `first..` into `out`, as many as fit it.
    pub fn fill(&self, first: usize, out: &mut [f32]) {
        match &self.source {
            Source::Dense(x) => out.copy_from_slice(&x[first * self.columns..first * self.columns + out.len()]),
            Source::Product { dy, x } => linear::backward_weight(dy, x, out, self.columns, self.rows, first, false),
            Source::Vocabulary { head, embedding } => {
                match head {
                    Some(HeadGradient::Logits { d_logits, normed }) => {
                        linear::backward_weight(d_logits, normed, out, self.columns, self.rows, first, false)
                    }
                    Some(HeadGradient::Whole(dw)) => {
                        out.copy_from_slice(&dw[first * self.columns..first * self.columns + out.len()])
                    }
                    Some(HeadGradient::None) | None => out.fill(0.0),
                }
                if let Some((ids, dx)) = embedding {
                    embedding::backward_rows(ids, dx, out, self.columns, first);
                }
            }
        }
    }
}

/// All gradients of a step.
pub struct Gradients {
    ids: Vec<u32>,
    head: HeadGradient,
    d_norm: Vec<f32>,
    /// From the last layer down, with their numbers; those below the lowest that trains are not there.
    layers: Vec<(usize, LayerGradients)>,
    /// Of the embedded rows.
    dx: Buffer,
}

impl Gradients {
    pub(super) fn new(
        a: &Architecture,
        batch: &Batch,
        head: HeadGradient,
        d_norm: Vec<f32>,
        layers: Vec<(usize, LayerGradients)>,
        dx: Buffer,
    ) -> Gradients {
        debug_assert_eq!(dx.len(), batch.trained() * a.hidden);
        Gradients { ids: batch.ids[batch.frozen..].to_vec(), head, d_norm, layers, dx }
    }

    /// Calls `f` with the name and the gradient of every tensor that `trainable` says yes to, and frees what is past.
    pub fn visit<E>(
        self,
        a: &Architecture,
        trainable: &dyn Fn(&str) -> bool,
        mut f: impl FnMut(&str, &Gradient) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut give = |name: &str, rows: usize, columns: usize, source: Source<'_>| {
            if trainable(name) { f(name, &Gradient { rows, columns, source }) } else { Ok(()) }
        };
        let (rows, columns) = (a.vocabulary, a.hidden);
        give(&a.norm, 1, columns, Source::Dense(&self.d_norm))?;
        for (i, g) in self.layers {
            let layer: &Layer = &a.layers[i];
            let mut normed = g.x_in.like();
            rms_norm::apply(&g.x_in, &g.input_norm, &g.rstd_in, &mut normed);
            let mut normed_mid = g.x_mid.like();
            rms_norm::apply(&g.x_mid, &g.post_norm, &g.rstd_mid, &mut normed_mid);
            for (l, dy, x) in g.linears(layer) {
                let x = match x {
                    Input::Normed => &normed,
                    Input::NormedMid => &normed_mid,
                    Input::Rows(x) => x,
                };
                give(&l.weight, l.outputs, l.inputs, Source::Product { dy, x })?;
                if let Some(bias) = &l.bias {
                    let mut db = vec![0.0; l.outputs];
                    linear::backward_bias(dy, &mut db);
                    give(bias, 1, l.outputs, Source::Dense(&db))?;
                }
            }
            for (name, rows, columns, dw) in g.small(layer) {
                give(name, rows, columns, Source::Dense(dw))?;
            }
        }
        // Last, when the layers have left room for it: its parts, their bytes, and what the updater projects them to.
        self.dx.pool().release(8 * VOCABULARY_PART + 4 * 64 * rows);
        let embedded = Some((self.ids.as_slice(), &*self.dx));
        match &a.head {
            None => {
                give(&a.embedding, rows, columns, Source::Vocabulary { head: Some(&self.head), embedding: embedded })?
            }
            Some(head) => {
                give(head, rows, columns, Source::Vocabulary { head: Some(&self.head), embedding: None })?;
                give(&a.embedding, rows, columns, Source::Vocabulary { head: None, embedding: embedded })?;
            }
        }
        Ok(())
    }
}
