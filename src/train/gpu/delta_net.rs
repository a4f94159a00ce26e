//! A layer of Gated DeltaNet on a GPU, forward and backward (see [`super::super::delta_net`]). Rows `[q | k | v | z | b | a]` of
//! all heads come from one block of linears. Of a context, which trains nothing, two things reach its continuations: the state
//! after its last row (f32), and its last rows before the convolution; both are constants.

use super::backward::MixerGradients;
use super::forward::{Constant, OfMixer};
use super::{Context, Result};
use crate::compute::cpu::delta_rule;
use crate::compute::cuda::causal_conv::{self, Taps};
use crate::compute::cuda::delta_rule::{Gates, HEAD, Plan, Prepared, gates_backward, state};
use crate::compute::cuda::gated_norm::{self, Gate};
use crate::compute::cuda::{Buffer, Gpu, GpuError, Part};
use crate::train::delta_net::rebased;
use crate::train::families::{Architecture, DeltaNet, Linear, Mixer};
use crate::train::pack::Batch;
use std::ops::Range;

/// The sequences of a batch, as the kernels want them.
pub(super) struct Sequences {
    /// Of all rows.
    taps: Taps,
    plan: Plan,
    /// Of rows that train, behind the rows that stand before each sequence.
    own_taps: Taps,
    own_plan: Plan,
    /// How many rows those are, and which of all rows go where among them.
    before: usize,
    copies: Vec<(Range<usize>, usize)>,
    contexts: usize,
}

/// What the way back needs of such a layer beside its constants.
pub(super) struct Kept {
    /// What came of the linears, behind the rows that stand before each sequence.
    inputs: Buffer,
    /// What left the rule, heads padded.
    o: Buffer,
}

/// What a layer's continuations need of their contexts.
pub(super) struct Constants {
    contexts: Option<Buffer>,
    /// Where [`Kept`] is not there: the rows before each sequence.
    history: Option<Buffer>,
}

impl Sequences {
    /// `None` for a model without such layers.
    pub fn new(gpu: &Gpu, a: &Architecture, batch: &Batch) -> std::result::Result<Option<Sequences>, GpuError> {
        let nets = a.layers.iter().filter_map(|l| if let Mixer::DeltaNet(net) = &l.mixer { Some(net) } else { None });
        let Some(net) = nets.into_iter().next() else { return Ok(None) };
        let (frozen, rows) = (batch.frozen, batch.rows());
        let all = delta_rule::sequences(&batch.spans, frozen);
        let own: Vec<_> = all.iter().filter(|s| s.rows.start >= frozen).cloned().collect();
        let (spans, before) = rebased(batch, net.kernel);
        let reach = net.kernel - 1;
        let copy = |(i, span): (usize, &crate::compute::cpu::attention::Span)| {
            let count = span.prefix.len().min(reach);
            (span.prefix.end - count..span.prefix.end, (i + 1) * reach - count)
        };
        let copies = batch.spans.iter().filter(|s| s.rows.start >= frozen).enumerate().map(copy);
        Ok(Some(Sequences {
            taps: Taps::new(gpu, &batch.spans, 0, rows)?,
            plan: Plan::new(gpu, &all, 0, rows)?,
            own_taps: Taps::new(gpu, &spans, before, batch.trained())?,
            own_plan: Plan::new(gpu, &own, frozen, batch.trained())?,
            before,
            copies: copies.filter(|(rows, _)| !rows.is_empty()).collect(),
            contexts: all.iter().filter(|s| s.ends.is_some()).count(),
        }))
    }
}

/// The linears in the order of their outputs in a row.
pub(super) fn linears(net: &DeltaNet) -> [&Linear; 4] {
    [&net.qkv, &net.z, &net.b, &net.a]
}

/// Where z, b and a begin in such a row, and how wide it is.
pub(super) fn row(net: &DeltaNet) -> [usize; 4] {
    let [qkv, z, b, a] = linears(net).map(|l| l.outputs);
    [qkv, qkv + z, qkv + z + b, qkv + z + b + a]
}

/// `x` from element `column` on.
fn column(x: Part, column: usize) -> Part {
    x.from(2 * column as u64)
}

impl Context<'_> {
    fn sequences(&self) -> &Sequences {
        self.rows.sequences.as_ref().expect("made for every model with such layers")
    }

    fn gates(&self, net: &DeltaNet, inputs: Part) -> Gates {
        let [_, b, a, stride] = row(net);
        let (a_log, dt_bias) = (self.weight(&net.a_log), self.weight(&net.dt_bias));
        Gates { a: column(inputs, a), b: column(inputs, b), stride, a_log, dt_bias }
    }

    /// `conv` names rows of `inputs`, which has `rows` of them.
    fn convolution<'c>(&self, net: &'c DeltaNet, inputs: Part, rows: usize, taps: &'c Taps) -> causal_conv::Input<'c> {
        let w = self.weight(&net.convolution);
        causal_conv::Input { x: inputs, stride: row(net)[3], rows, taps, w, shape: &net.shape }
    }

    /// What goes into the last linear.
    fn gated(&self, net: &DeltaNet, o: &Buffer, inputs: Part, rows: usize) -> Result<Buffer> {
        let [z, _, _, stride] = row(net);
        let mixed = self.gpu.bf16(rows * net.out.inputs)?;
        let gate = Gate { part: column(inputs, z), stride };
        let (w, size) = (self.weight(&net.norm), (rows, net.shape.v_heads));
        gated_norm::forward(self.gpu, o.part(), gate, &w, self.a.eps, size, mixed.part())?;
        Ok(mixed)
    }

    /// Adds to the stream what the layer makes of `normed`.
    pub(super) fn delta_net_forward(
        &self,
        net: &DeltaNet,
        normed: Part,
        stream: Part,
        whole: bool,
    ) -> Result<(Constant, Option<OfMixer>)> {
        let (gpu, r, s) = (self.gpu, &self.rows, self.sequences());
        let (rows, width, values) = (r.rows, row(net)[3], net.shape.v_heads * HEAD);
        // With nothing frozen this is what is kept, and the rows in front are those before each sequence.
        let front = if r.frozen == 0 { s.before } else { 0 };
        let inputs = self.stays(2 * (front + rows) * width, whole && r.frozen == 0)?;
        let real = column(inputs.part(), front * width);
        self.linears(&linears(net), normed, rows, real)?;
        let contexts = (s.contexts > 0).then(|| gpu.hold_f32(s.contexts * state(&net.shape))).transpose()?;
        let states = contexts.as_ref().map_or(Part::NONE, Buffer::part);
        let convolved = causal_conv::forward(gpu, &self.convolution(net, real, rows, &s.taps))?;
        let prepared = Prepared::new(gpu, &s.plan, &net.shape, &convolved, &self.gates(net, real), states)?;
        let o = self.stays(2 * rows * values, whole && r.frozen == 0)?;
        prepared.forward(gpu, o.part())?;
        drop(prepared);
        drop(convolved);
        let mixed = self.gated(net, &o, real, rows)?;
        self.onto_stream(&net.out, mixed.part(), rows, stream)?;
        drop(mixed);

        let history = |to: &Buffer| -> Result<()> {
            gpu.clear(to.part().first((2 * s.before * width) as u64))?;
            for (rows, at) in &s.copies {
                let from = column(real, rows.start * width).first((2 * rows.len() * width) as u64);
                gpu.copy(from, column(to.part(), at * width))?;
            }
            Ok(())
        };
        if !whole {
            let rows = gpu.hold_bf16(s.before * width)?;
            history(&rows)?;
            return Ok((Constant::DeltaNet(Constants { contexts, history: Some(rows) }), None));
        }
        let kept = match r.frozen {
            0 => {
                history(&inputs)?;
                Kept { inputs, o }
            }
            frozen => {
                let kept = gpu.hold_bf16((s.before + r.trained) * width)?;
                history(&kept)?;
                gpu.copy(column(real, frozen * width), column(kept.part(), s.before * width))?;
                Kept { inputs: kept, o: self.tail(&o, values, 2)? }
            }
        };
        Ok((Constant::DeltaNet(Constants { contexts, history: None }), Some(OfMixer::DeltaNet(kept))))
    }

    /// The same of the rows that train, again; `stream` is theirs.
    pub(super) fn delta_net_again(
        &self,
        net: &DeltaNet,
        constants: &Constants,
        normed: Part,
        stream: Part,
    ) -> Result<OfMixer> {
        let (gpu, s, n) = (self.gpu, self.sequences(), self.rows.trained);
        let width = row(net)[3];
        let inputs = gpu.bf16((s.before + n) * width)?;
        let history = constants.history.as_ref().expect("kept where nothing else was");
        gpu.copy(history.part(), inputs.part())?;
        let real = column(inputs.part(), s.before * width);
        self.linears(&linears(net), normed, n, real)?;
        let convolved = causal_conv::forward(gpu, &self.convolution(net, inputs.part(), s.before + n, &s.own_taps))?;
        let states = constants.contexts.as_ref().map_or(Part::NONE, Buffer::part);
        let prepared = Prepared::new(gpu, &s.own_plan, &net.shape, &convolved, &self.gates(net, real), states)?;
        let o = gpu.bf16(n * net.shape.v_heads * HEAD)?;
        prepared.forward(gpu, o.part())?;
        let mixed = self.gated(net, &o, real, n)?;
        self.onto_stream(&net.out, mixed.part(), n, stream)?;
        drop(prepared);
        Ok(OfMixer::DeltaNet(Kept { inputs, o }))
    }

    /// `d_mid` is the gradient of what the layer added to the stream; `d_normed` becomes that of its input.
    pub(super) fn delta_net_backward(
        &self,
        net: &DeltaNet,
        constants: Constants,
        kept: Kept,
        d_mid: Part,
        d_normed: Part,
    ) -> Result<MixerGradients> {
        let (gpu, s, n, shape) = (self.gpu, self.sequences(), self.rows.trained, &net.shape);
        let ([z, b, a, width], heads) = (row(net), shape.v_heads);
        let real = column(kept.inputs.part(), s.before * width);

        // Through the last linear and the norm: `mixed` begins as its own gradient, `o` ends as it.
        let (mixed, d_inputs) = (self.for_updates(2 * n * net.out.inputs)?, self.for_updates(2 * n * width)?);
        let d_norm = self.for_updates(4 * HEAD)?;
        self.back(&[&net.out], d_mid, n, mixed.part())?;
        let gate = |x: Part| Gate { part: column(x, z), stride: width };
        let (w, size) = (self.weight(&net.norm), (n, heads));
        let (o, dz) = (kept.o.part(), gate(d_inputs.part()));
        gated_norm::backward(gpu, mixed.part(), o, gate(real), &w, self.a.eps, size, dz, d_norm.part())?;

        // Through the rule, whose inputs are made again.
        let input = self.convolution(net, kept.inputs.part(), s.before + n, &s.own_taps);
        let convolved = causal_conv::forward(gpu, &input)?;
        let states = constants.contexts.as_ref().map_or(Part::NONE, Buffer::part);
        let gates = self.gates(net, real);
        let prepared = Prepared::new(gpu, &s.own_plan, shape, &convolved, &gates, states)?;
        let g = prepared.backward(gpu, o)?;
        drop(prepared);
        drop((convolved, kept.o, constants));

        // Through gates and convolution.
        let small = self.for_updates(4 * 2 * heads)?;
        let d_convolution = self.for_updates(4 * shape.channels() * net.kernel)?;
        let d = d_inputs.part();
        gates_backward(gpu, &gates, &g, (n, heads), (column(d, a), column(d, b), width), small.part())?;
        let by_head = [g.dq.part(), g.dk.part(), g.dv.part()];
        causal_conv::backward(gpu, &input, by_head, (d, width), d_convolution.part())?;
        self.back(&linears(net), d, n, d_normed)?;
        Ok(MixerGradients::DeltaNet { d_inputs, mixed, d_convolution, d_gates: small, d_norm })
    }
}
