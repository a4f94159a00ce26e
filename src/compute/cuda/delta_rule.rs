//! The gated delta rule in chunks (see `cpu::delta_rule`, and the kernels for which of them makes what). Heads are padded to
//! [`HEAD`] columns, states are f32 between sequences and bf16 between the kernels of the backward pass.

use super::causal_conv::Convolved;
use super::{Buffer, Gpu, Part, Result, Weight, kernels, launch};
use crate::compute::cpu::delta_rule::{Sequence, Shape};
use cudarc::driver::DeviceRepr;

kernels!("delta_rule");

/// Columns of a head in every operand here, and so the most that a head may have.
pub const HEAD: usize = 128;
/// Tokens of a chunk.
const CHUNK: usize = 64;
/// Shared memory: of a chunk in the kernels that go chunk by chunk; of `delta_chunks`; of half of v's columns in `delta_backward`,
/// and of what it has beside them.
const STAGE: usize = 2 * CHUNK * HEAD * 2 + 5 * CHUNK * CHUNK * 2 + 4 * CHUNK * 4;
const CHUNKS: usize = 4 * (2 * CHUNK * (CHUNK + 4) + 4 * CHUNK + 2);
const HALF: usize = 3 * CHUNK * CHUNK * 2 + 2 * HEAD * CHUNK * 2;
const BACKWARD: usize = 2 * CHUNK * HEAD * 2 + 4 * (31 * CHUNK + 16);
/// Rows whose shares of the gates' gradients one block sums.
const STRIPE: usize = 256;

/// The kernels of `delta_rule_hopper.cu`.
mod hopper {
    use super::{Arguments, CHUNK, Gpu, Result, launch};

    static KERNELS: crate::memory::cuda::Ptx = crate::memory::cuda::Ptx {
        name: "compute/delta_rule_hopper",
        // For 9.0 alone, which `Prepared::new` sees to.
        baseline: (90, include_str!("kernels/delta_rule_hopper.ptx")),
        exact: &[],
    };

    /// Three stages of what a chunk needs, and room to align them.
    const SHARED: usize = 3 * (9 * CHUNK * CHUNK * 2 + 4 * CHUNK * 4) + 1024;

    pub fn launch(gpu: &Gpu, name: &str, grid: (u32, u32, u32), arguments: Arguments) -> Result<()> {
        launch!(gpu, name, grid, (256, 1, 1), SHARED as u32; arguments);
        Ok(())
    }
}

/// As `struct Delta` in the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Arguments {
    x: u64,
    lengths: u64,
    sums: u64,
    beta: u64,
    by_k: u64,
    by_q: u64,
    rest: u64,
    inverse: u64,
    scores: u64,
    contexts: u64,
    out: u64,
    news: u64,
    states: u64,
    dout: u64,
    solved: u64,
    dstates: u64,
    dq: u64,
    dk: u64,
    dv: u64,
    dg: u64,
    dbeta: u64,
    sequences: u64,
    chunks: u64,
    rows: i32,
    heads: i32,
    k_heads: i32,
    stages: i32,
}

/// As `struct Gates`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct GateArguments {
    a: u64,
    b: u64,
    a_log: u64,
    dt_bias: u64,
    ld: i64,
    log_kind: i32,
    bias_kind: i32,
}

// SAFETY: plain numbers in C's layout, the same fields in the same order as the kernels' structs.
unsafe impl DeviceRepr for Arguments {}
// SAFETY: as above.
unsafe impl DeviceRepr for GateArguments {}

/// Sequences of some rows and their chunks, on the device.
pub struct Plan {
    sequences: Buffer,
    /// Those that make states come first.
    contexts: usize,
    count: usize,
    chunks: Buffer,
    chunk_count: usize,
    rows: usize,
}

/// Numbers of the sequences, and of the chunks, of rows from `first` on.
fn lists(sequences: &[Sequence], first: usize) -> (Vec<i32>, Vec<i32>) {
    let number = |n: Option<usize>| n.map_or(-1, |n| n as i32);
    let (mut all, mut chunks) = (Vec::new(), Vec::new());
    for s in sequences {
        let (start, end) = (s.rows.start - first, s.rows.end - first);
        all.extend([start as i32, end as i32, chunks.len() as i32 / 2, number(s.begins), number(s.ends)]);
        chunks.extend((start..end).step_by(CHUNK).flat_map(|c| [c as i32, end.min(c + CHUNK) as i32]));
    }
    (all, chunks)
}

impl Plan {
    /// Of sequences over `rows` rows from `first` on; contexts, which make states, before those that begin with them.
    pub fn new(gpu: &Gpu, sequences: &[Sequence], first: usize, rows: usize) -> Result<Plan> {
        let contexts = sequences.iter().take_while(|s| s.ends.is_some()).count();
        assert!(
            sequences[contexts..].iter().all(|s| s.ends.is_none())
                && sequences[..contexts].iter().all(|s| s.begins.is_none())
        );
        assert!(sequences.iter().all(|s| s.rows.start >= first && s.rows.end <= first + rows));
        let (all, chunks) = lists(sequences, first);
        Ok(Plan {
            sequences: gpu.upload(&all)?,
            contexts,
            count: sequences.len(),
            chunks: gpu.upload(&chunks)?,
            chunk_count: chunks.len() / 2,
            rows,
        })
    }
}

/// What beta and g are made of: rows of a and b, `stride` elements apart, and a value a head of the others.
#[derive(Clone, Copy)]
pub struct Gates {
    pub a: Part,
    pub b: Part,
    pub stride: usize,
    pub a_log: Weight,
    pub dt_bias: Weight,
}

impl Gates {
    fn arguments(&self, rows: usize, heads: usize) -> GateArguments {
        assert!(self.a_log.columns == heads && self.dt_bias.columns == heads);
        let holds = |p: Part| p.bf16(if rows == 0 { 0 } else { (rows - 1) * self.stride + heads });
        GateArguments {
            a: holds(self.a),
            b: holds(self.b),
            a_log: self.a_log.address,
            dt_bias: self.dt_bias.address,
            ld: self.stride as i64,
            log_kind: self.a_log.number(),
            bias_kind: self.dt_bias.number(),
        }
    }
}

/// What all chunks need before the first begins: gates, P and (I + A)^-1.
pub struct Prepared<'a> {
    plan: &'a Plan,
    shape: &'a Shape,
    x: &'a Convolved,
    contexts: Part,
    /// G, beta, and lengths with their decay, (v_heads, rows) each.
    gates: [Buffer; 5],
    inverse: Buffer,
    scores: Buffer,
    /// Chunks in shared memory at once: the next comes while one is worked on, where there is room (227 KB).
    stages: usize,
    /// Are there Hopper's own kernels for what goes from chunk to chunk?
    hopper: bool,
}

/// Elements of the states of one context, padded.
pub fn state(shape: &Shape) -> usize {
    shape.v_heads * HEAD * HEAD
}

impl<'a> Prepared<'a> {
    /// `x` is what [`causal_conv::forward`](super::causal_conv::forward) makes; `contexts`
    /// (contexts x v_heads x HEAD x HEAD, f32) has the states that sequences begin with and gets those that contexts make.
    pub fn new(
        gpu: &Gpu,
        plan: &'a Plan,
        shape: &'a Shape,
        x: &'a Convolved,
        gates: &Gates,
        contexts: Part,
    ) -> Result<Prepared<'a>> {
        let (rows, heads) = (plan.rows, shape.v_heads);
        let squares = plan.chunk_count * heads * 2 * CHUNK * CHUNK;
        let of_gates = || gpu.f32(rows * heads);
        x.x.part().bf16(rows * (2 * shape.k_heads + heads) * HEAD);
        x.lengths.part().f32(rows * 2 * shape.k_heads);
        assert!(contexts.bytes().is_multiple_of(4 * state(shape) as u64));
        let p = Prepared {
            plan,
            shape,
            x,
            contexts,
            gates: [of_gates()?, of_gates()?, of_gates()?, of_gates()?, of_gates()?],
            inverse: gpu.bf16(squares)?,
            scores: gpu.bf16(squares)?,
            stages: if matches!(gpu.device.capability, (9 | 10, 0)) && !gpu.is_portable() { 2 } else { 1 },
            hopper: gpu.device.capability == (9, 0) && !gpu.is_portable(),
        };
        launch!(gpu, "delta_chunks", (plan.chunk_count as u32, heads as u32, 1), (128, 1, 1), CHUNKS as u32;
            p.arguments(), gates.arguments(rows, heads));
        Ok(p)
    }

    fn arguments(&self) -> Arguments {
        let [sums, beta, by_k, by_q, rest] = self.gates.each_ref().map(|b| b.part().address);
        Arguments {
            x: self.x.x.part().address,
            lengths: self.x.lengths.part().address,
            sums,
            beta,
            by_k,
            by_q,
            rest,
            inverse: self.inverse.part().address,
            scores: self.scores.part().address,
            contexts: self.contexts.address,
            sequences: self.plan.sequences.part().address,
            chunks: self.plan.chunks.part().address,
            rows: self.plan.rows as i32,
            heads: self.shape.v_heads as i32,
            k_heads: self.shape.k_heads as i32,
            stages: self.stages as i32,
            ..Arguments::default()
        }
    }

    fn values(&self) -> usize {
        self.plan.rows * self.shape.v_heads * HEAD
    }

    fn chunk_states(&self) -> usize {
        self.plan.chunk_count * state(self.shape)
    }

    /// From chunk to chunk of `sequences` sequences.
    fn pass(&self, gpu: &Gpu, name: &'static str, sequences: usize, arguments: Arguments) -> Result<()> {
        let grid = ((HEAD / CHUNK) as u32, self.shape.v_heads as u32, sequences as u32);
        if self.hopper {
            return hopper::launch(gpu, &format!("hopper_{name}"), grid, arguments);
        }
        launch!(gpu, name, grid, (256, 1, 1), (self.stages * STAGE) as u32; arguments);
        Ok(())
    }

    fn go(&self, gpu: &Gpu, name: &'static str, more: Arguments) -> Result<()> {
        let plan = self.plan;
        // States must be there before what begins with them runs.
        for (first, end) in [(0, plan.contexts), (plan.contexts, plan.count)] {
            let arguments = Arguments { sequences: plan.sequences.from(20 * first as u64).address, ..more };
            self.pass(gpu, name, end - first, arguments)?;
        }
        Ok(())
    }

    /// `out (rows x v_heads HEAD)` = O, and the contexts' states.
    pub fn forward(&self, gpu: &Gpu, out: Part) -> Result<()> {
        self.go(gpu, "delta_forward", Arguments { out: out.bf16(self.values()), ..self.arguments() })
    }

    /// Gradients of rows that train, all from `dout (rows x v_heads HEAD)`: of q and k by value head, which
    /// [`causal_conv::backward`](super::causal_conv::backward) takes through their length, and of v, each as wide;
    /// of g and beta (v_heads, rows, f32).
    pub fn backward(&self, gpu: &Gpu, dout: Part) -> Result<Gradients> {
        assert_eq!(self.plan.contexts, 0);
        let (values, gates) = (self.values(), self.plan.rows * self.shape.v_heads);
        let (news, states) = (gpu.bf16(values)?, gpu.bf16(self.chunk_states())?);
        let more = Arguments { news: news.part().address, states: states.part().address, ..self.arguments() };
        self.go(gpu, "delta_news", more)?;
        let (dv, dstates) = (gpu.bf16(values)?, gpu.bf16(self.chunk_states())?);
        let of_gates = || gpu.f32(gates);
        let g = Gradients { dq: gpu.bf16(values)?, dk: gpu.bf16(values)?, dv, dg: of_gates()?, dbeta: of_gates()? };
        let arguments = Arguments {
            dout: dout.bf16(values),
            // v's gradient takes its place.
            solved: g.dv.part().address,
            dstates: dstates.part().address,
            dq: g.dq.part().address,
            dk: g.dk.part().address,
            dv: g.dv.part().address,
            dg: g.dg.part().address,
            dbeta: g.dbeta.part().address,
            ..more
        };
        let heads = self.shape.v_heads as u32;
        self.pass(gpu, "delta_states", self.plan.count, arguments)?;
        launch!(gpu, "delta_backward", (self.plan.chunk_count as u32, heads, 1), (512, 1, 1),
            (BACKWARD + self.stages * HALF) as u32; arguments);
        Ok(g)
    }
}

/// What [`Prepared::backward`] makes.
pub struct Gradients {
    pub dq: Buffer,
    pub dk: Buffer,
    pub dv: Buffer,
    pub dg: Buffer,
    pub dbeta: Buffer,
}

/// Gradients of a and b, rows `stride` apart, and of A_log and dt_bias (2 heads, f32, one after the other).
pub fn gates_backward(
    gpu: &Gpu,
    gates: &Gates,
    g: &Gradients,
    (rows, heads): (usize, usize),
    (da, db, stride): (Part, Part, usize),
    small: Part,
) -> Result<()> {
    let stripes = rows.div_ceil(STRIPE).max(1);
    let partial = gpu.f32(stripes * 2 * heads)?;
    let holds = |p: Part| p.bf16(if rows == 0 { 0 } else { (rows - 1) * stride + heads });
    launch!(gpu, "delta_gates_backward", (stripes as u32, heads as u32, 1), (STRIPE as u32, 1, 1), 0;
        gates.arguments(rows, heads), g.dg.part().f32(rows * heads), g.dbeta.part().f32(rows * heads), rows as i32,
        heads as i32, holds(da), holds(db), stride as i64, partial.part().address);
    super::rms_norm::sum_partial(gpu, partial.part(), stripes, 2 * heads, small)
}

/// How many chunks the rows of sequences of these lengths have.
pub fn chunks(lengths: impl IntoIterator<Item = usize>) -> usize {
    lengths.into_iter().map(|n| n.div_ceil(CHUNK)).sum()
}

/// Bytes of gates, and of lengths with their decay, of a row's heads.
pub fn row_bytes(shape: &Shape) -> u64 {
    (5 * 4 * shape.v_heads) as u64
}

/// Bytes of the inverses and scores of a chunk's heads, each in two summands.
pub fn chunk_bytes(shape: &Shape) -> u64 {
    (2 * 2 * 2 * shape.v_heads * CHUNK * CHUNK) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_end_with_their_sequence() {
        let sequence = |rows, begins, ends| Sequence { rows, begins, ends };
        let (all, chunks) = lists(&[sequence(0..70, None, Some(0)), sequence(70..71, Some(0), None)], 0);
        assert_eq!(all, [0, 70, 0, -1, 0, 70, 71, 2, 0, -1]);
        assert_eq!(chunks, [0, 64, 64, 70, 70, 71]);
        assert_eq!(lists(&[sequence(70..71, Some(0), None)], 70).0, [0, 1, 0, 0, -1]);
    }
}
