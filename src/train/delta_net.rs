//! A layer of Gated DeltaNet, forward and backward: convolution over rows `[q | k | v]`, gates, the delta rule, a gated norm.
//! Of a context, which trains nothing, two things reach its continuations: the state after its last row, and its last
//! rows before the convolution; both are constants. What is kept for the backward pass is what enters the convolution and
//! the gates and what leaves the rule; the rest is made again.

use super::families::{DeltaNet, Linear};
use super::pack::Batch;
use super::step::{Loader, Model, StepError};
use crate::compute::cpu::attention::Span;
use crate::compute::cpu::buffers::Buffer;
use crate::compute::cpu::{causal_conv, delta_gates, delta_rule, gated_norm, rope};
use crate::image::ImageError;

/// What the backward pass needs, in rows that train.
pub(super) struct Saved {
    /// What enters the convolution, after the rows that stand before each sequence: `kernel - 1` of them, zeros where the
    /// context has not so many.
    qkv: Buffer,
    /// States that sequences begin with, as the forward pass of the rule left them.
    states: Buffer,
    a: Buffer,
    b: Buffer,
    z: Buffer,
    /// What leaves the rule, T x (v heads x v_dim), and its reciprocal lengths.
    o: Buffer,
    rstd: Buffer,
}

/// Gradients of the layer's own: of each linear's output, and of the small tensors.
pub(super) struct DeltaNetGradients {
    pub d_qkv: Buffer,
    pub d_z: Buffer,
    pub d_b: Buffer,
    pub d_a: Buffer,
    /// Input of the last linear.
    pub mixed: Buffer,
    pub d_convolution: Vec<f32>,
    pub d_a_log: Vec<f32>,
    pub d_dt_bias: Vec<f32>,
    pub d_norm: Vec<f32>,
}

/// The small tensors, widened.
struct Small {
    convolution: Vec<f32>,
    a_log: Vec<f32>,
    dt_bias: Vec<f32>,
    norm: Vec<f32>,
}

/// The spans that train as they lie in [`Saved::qkv`], and how many rows stand before them there.
pub(super) fn rebased(batch: &Batch, kernel: usize) -> (Vec<Span>, usize) {
    let own: Vec<&Span> = batch.spans.iter().filter(|s| s.rows.start >= batch.frozen).collect();
    let before = own.len() * (kernel - 1);
    let rebase = |(i, span): (usize, &&Span)| Span {
        rows: span.rows.start - batch.frozen + before..span.rows.end - batch.frozen + before,
        prefix: i * (kernel - 1)..(i + 1) * (kernel - 1),
    };
    (own.iter().enumerate().map(rebase).collect(), before)
}

impl Model {
    fn small(&self, net: &DeltaNet, loader: &mut Loader) -> Result<Small, ImageError> {
        let mut load = |name: &str| Ok::<_, ImageError>(self.load(name, loader)?.to_vec());
        Ok(Small {
            convolution: load(&net.convolution)?,
            a_log: load(&net.a_log)?,
            dt_bias: load(&net.dt_bias)?,
            norm: load(&net.norm)?,
        })
    }

    /// `normed` becomes what the layer adds to the stream.
    pub(super) fn delta_net_forward(
        &self,
        batch: &Batch,
        net: &DeltaNet,
        normed: &mut Buffer,
        loader: &mut Loader,
    ) -> Result<Saved, StepError> {
        let (rows, pool, shape) = (batch.rows(), &self.pool, net.shape);
        let (heads, width) = (shape.v_heads, shape.channels());
        let mut project = |l: &Linear| -> Result<Buffer, ImageError> {
            let mut y = pool.take(rows * l.outputs);
            self.linear(l, normed, &mut y, loader)?;
            Ok(y)
        };
        let (qkv, z, a, b) = (project(&net.qkv)?, project(&net.z)?, project(&net.a)?, project(&net.b)?);
        let small = self.small(net, loader)?;

        let mut convolved = qkv.like();
        causal_conv::forward(&qkv, &small.convolution, net.kernel, &batch.spans, &mut convolved);
        let (mut g, mut beta) = (a.like(), b.like());
        delta_gates::forward(&a, &b, &small.a_log, &small.dt_bias, &mut g, &mut beta);
        let sequences = delta_rule::sequences(&batch.spans, batch.frozen);
        let contexts = sequences.iter().filter(|s| s.ends.is_some()).count();
        let mut states = pool.take(contexts * shape.state());
        let mut of_heads = pool.take(rows * heads * shape.v_dim);
        let input = delta_rule::Input { qkv: &convolved, g: &g, beta: &beta };
        delta_rule::forward(input, &sequences, &shape, &mut of_heads, &mut states);
        drop((convolved, g, beta));
        let mut o = of_heads.like();
        rope::join_heads(&of_heads, &mut o, rows, shape.v_dim);
        let (mut mixed, mut rstd) = (of_heads, pool.take(rows * heads));
        gated_norm::forward(&o, &z, &small.norm, self.architecture.eps, &mut mixed, &mut rstd);
        self.linear(&net.out, &mixed, normed, loader)?;

        let trained = |x: &[f32]| self.trained(batch, x);
        let (spans, before) = rebased(batch, net.kernel);
        let mut kept = pool.take((before + batch.trained()) * width);
        kept[..before * width].fill(0.0);
        kept[before * width..].copy_from_slice(&qkv[batch.frozen * width..]);
        let own = batch.spans.iter().filter(|s| s.rows.start >= batch.frozen);
        for (span, place) in own.zip(&spans) {
            let count = span.prefix.len().min(net.kernel - 1);
            let from = &qkv[(span.prefix.end - count) * width..span.prefix.end * width];
            kept[(place.prefix.end - count) * width..place.prefix.end * width].copy_from_slice(from);
        }
        Ok(Saved {
            qkv: kept,
            states,
            a: trained(&a),
            b: trained(&b),
            z: trained(&z),
            o: trained(&o),
            rstd: trained(&rstd),
        })
    }

    /// `dx` is the gradient of what the layer added to the stream; `d_normed` becomes that of its input.
    pub(super) fn delta_net_backward(
        &self,
        batch: &Batch,
        net: &DeltaNet,
        saved: Saved,
        dx: &[f32],
        d_normed: &mut [f32],
        loader: &mut Loader,
    ) -> Result<DeltaNetGradients, StepError> {
        let (rows, pool, shape) = (batch.trained(), &self.pool, net.shape);
        let (heads, width) = (shape.v_heads, shape.channels());
        let Saved { qkv, states, mut a, mut b, mut z, mut o, rstd } = saved;
        let small = self.small(net, loader)?;

        // Through the last linear and the norm. `o` becomes the linear's input, `z` its own gradient.
        let mut d_mixed = pool.take(rows * net.out.inputs);
        self.linear_backward(&net.out, dx, &mut d_mixed, false, loader)?;
        let (mut d_o, mut d_norm) = (d_mixed.like(), vec![0.0; shape.v_dim]);
        gated_norm::backward(&d_mixed, &mut o, &mut z, &small.norm, &rstd, &mut d_o, &mut d_norm);
        let mut d_of_heads = d_mixed;
        rope::split_heads(&d_o, &mut d_of_heads, rows, shape.v_dim);

        // Through the rule, whose inputs are made again.
        let (spans, before) = rebased(batch, net.kernel);
        let mut convolved = qkv.like();
        causal_conv::forward(&qkv, &small.convolution, net.kernel, &spans, &mut convolved);
        let (mut g, mut beta) = (a.like(), b.like());
        delta_gates::forward(&a, &b, &small.a_log, &small.dt_bias, &mut g, &mut beta);
        let sequences = delta_rule::sequences(&batch.spans, batch.frozen).into_iter();
        let own: Vec<_> = sequences
            .filter(|s| s.rows.start >= batch.frozen)
            .map(|s| delta_rule::Sequence { rows: s.rows.start - batch.frozen..s.rows.end - batch.frozen, ..s })
            .collect();
        let keys = rows * shape.k_heads * shape.k_dim;
        let (mut dq, mut dk, mut dv) = (pool.take(keys), pool.take(keys), d_o);
        let (mut dg, mut dbeta) = (pool.take(rows * heads), pool.take(rows * heads));
        delta_rule::backward(
            &d_of_heads,
            delta_rule::Input { qkv: &convolved[before * width..], g: &g, beta: &beta },
            &own,
            &states,
            &shape,
            (&mut dq, &mut dk, &mut dv),
            (&mut dg, &mut dbeta),
        );
        drop((convolved, g, beta, d_of_heads));

        // Through gates and convolution. `a` and `b` become their own gradients.
        let (mut d_a_log, mut d_dt_bias) = (vec![0.0; heads], vec![0.0; heads]);
        let (a_log, dt_bias) = (&small.a_log, &small.dt_bias);
        delta_gates::backward(&dg, &dbeta, &mut a, &mut b, a_log, dt_bias, &mut d_a_log, &mut d_dt_bias);
        let mut d_convolved = pool.take(rows * width);
        delta_rule::join(&dq, &dk, &dv, &shape, &mut d_convolved);
        drop((dq, dk, dv));
        let (mut d_qkv, mut d_convolution) = (d_convolved.like(), vec![0.0; small.convolution.len()]);
        causal_conv::backward(
            &mut d_convolved,
            &qkv,
            &small.convolution,
            net.kernel,
            &spans,
            before,
            &mut d_qkv,
            &mut d_convolution,
        );
        self.linear_backward(&net.qkv, &d_qkv, d_normed, false, loader)?;
        for (l, dy) in [(&net.z, &z), (&net.b, &b), (&net.a, &a)] {
            self.linear_backward(l, dy, d_normed, true, loader)?;
        }
        Ok(DeltaNetGradients { d_qkv, d_z: z, d_b: b, d_a: a, mixed: o, d_convolution, d_a_log, d_dt_bias, d_norm })
    }
}
