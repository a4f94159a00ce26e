//! Gradients of one step, a tensor at a time and parts of a tensor at a time, from what the backward pass left. All of
//! them are known to be finite before the first is asked for.

use super::families::{Architecture, Layer};
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
    pub dq: Buffer,
    pub dk: Buffer,
    pub dv: Buffer,
    pub attended: Buffer,
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
    pub d_qk_norm: Option<(Vec<f32>, Vec<f32>)>,
}

impl LayerGradients {
    /// Says which gradient may overflow, if one may.
    pub(super) fn check(&self) -> Result<(), String> {
        let rows = self.rstd_in.len();
        // A normed row is at most sqrt(H) times its weight.
        let bound = |w: &[f32]| w.iter().fold(0.0f32, |m, w| m.max(w.abs())) * (w.len() as f32).sqrt();
        let (n_in, n_mid) = ([bound(&self.input_norm)], [bound(&self.post_norm)]);
        let products: [(&[f32], &[f32], &str); 7] = [
            (&self.dq, &n_in, "q_proj"),
            (&self.dk, &n_in, "k_proj"),
            (&self.dv, &n_in, "v_proj"),
            (&self.d_mid, &self.attended, "o_proj"),
            (&self.d_gate, &n_mid, "gate_proj"),
            (&self.d_up, &n_mid, "up_proj"),
            (&self.d_out, &self.act, "down_proj"),
        ];
        for (dy, x, name) in products {
            if !product_is_finite(dy, x, rows) {
                return Err(format!("gradient of {name}"));
            }
        }
        let mut norms = vec![(&self.d_input_norm, "input_layernorm"), (&self.d_post_norm, "post_attention_layernorm")];
        if let Some((q, k)) = &self.d_qk_norm {
            norms.extend([(q, "q_norm"), (k, "k_norm")]);
        }
        for (dw, name) in norms {
            if !product_is_finite(dw, &[1.0], 1) {
                return Err(format!("gradient of {name}"));
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
            let mut linears = vec![(&layer.q, &g.dq, &normed), (&layer.k, &g.dk, &normed), (&layer.v, &g.dv, &normed)];
            linears.push((&layer.o, &g.d_mid, &g.attended));
            linears.push((&layer.down, &g.d_out, &g.act));
            let mut normed_mid = g.x_mid.like();
            rms_norm::apply(&g.x_mid, &g.post_norm, &g.rstd_mid, &mut normed_mid);
            linears.extend([(&layer.gate, &g.d_gate, &normed_mid), (&layer.up, &g.d_up, &normed_mid)]);
            for (l, dy, x) in linears {
                give(&l.weight, l.outputs, l.inputs, Source::Product { dy, x })?;
                if let Some(bias) = &l.bias {
                    let mut db = vec![0.0; l.outputs];
                    linear::backward_bias(dy, &mut db);
                    give(bias, 1, l.outputs, Source::Dense(&db))?;
                }
            }
            give(&layer.input_norm, 1, columns, Source::Dense(&g.d_input_norm))?;
            give(&layer.post_norm, 1, columns, Source::Dense(&g.d_post_norm))?;
            if let (Some((q, k)), Some((dq, dk))) = (&layer.qk_norm, &g.d_qk_norm) {
                give(q, 1, a.head_dim, Source::Dense(dq))?;
                give(k, 1, a.head_dim, Source::Dense(dk))?;
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
