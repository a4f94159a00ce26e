//! How a step is laid out in the memory that there is: when weights are updated, and what of the forward pass is kept for the
//! way back and what is made again. The rule: rather whole than cheap in memory, rather fast than cheap, as far as it fits.

use super::delta_net;
use super::state::Moments;
use crate::compute::cpu::weight::Kind;
use crate::compute::cuda::{GpuError, causal_conv, delta_rule};
use crate::train::apollo::{form, moment_elements};
use crate::train::families::{Architecture, Layer, Linear, Mixer};
use crate::train::pack::Batch;
use crate::train::settings::Settings;
use crate::train::weights::Weights;

/// Bytes of the device's free memory that are left alone: an engine beside us may need some at any time.
pub const RESERVE: u64 = 512 << 20;

/// Bytes of both streams' workspaces, which are there before any step.
pub(super) const WORKSPACES: u64 = 2 * crate::compute::cuda::matmul::WORKSPACE;

/// What else than what fits decides on a layout: for tests and measurements, which want one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowed {
    /// Updates after the whole backward pass.
    pub after: bool,
    /// Updates of a layer beside the backward pass of the layers below it.
    pub beside: bool,
    /// Bytes of host memory that may keep what the device has no room for.
    pub host: u64,
    /// More of it than copies keep up with, which costs time.
    pub unhurried: bool,
}

impl Default for Allowed {
    fn default() -> Allowed {
        Allowed { after: true, beside: true, host: 0, unhurried: false }
    }
}

/// Floating-point operations of products in the forward pass for each byte that leaves the device meanwhile, so that copies
/// keep up with it: seen on an H200, whose forward passes run at 545 TFLOP/s, all counted, and its copies at 50 GB/s beside
/// them; a little more, since copies begin after the first layer.
const OPERATIONS_PER_BYTE: u64 = 11_500;

/// When weights are updated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// After the backward pass, when every gradient is known to be finite: the gradients' factors of all layers are kept.
    After,
    /// Each layer after its own backward pass.
    Layerwise,
}

/// What is kept of a layer's forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
pub enum Keep {
    /// The stream before it, and what of a context its rows see: a layer more to compute.
    Stream,
    /// All but gate and up: about half a layer more.
    Attention,
    All,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub order: Order,
    /// By layer.
    pub keep: Vec<Keep>,
    /// Layers whose gate and up, where the device does not keep them, are in host memory instead of made again; lowest first.
    pub offloaded: Vec<usize>,
    /// Bytes of each of these.
    pub piece: u64,
    /// Bytes at the peak, beyond the weights and the optimizer's state.
    pub bytes: u64,
    /// How many of them are of updates beside the backward pass; 0 where there are none beside it.
    pub side: u64,
}

/// Sizes that memory follows from.
struct Sizes {
    rows: u64,
    trained: u64,
    targets: u64,
    h: u64,
    inner: u64,
    vocabulary: u64,
    mixers: Vec<MixerSizes>,
    tied: bool,
    head_trains: bool,
    overlap: bool,
    /// Whether anything is in host memory meanwhile.
    offload: bool,
}

/// Bytes that one layer's mixer takes.
#[derive(Debug, Clone, Copy, Default)]
struct MixerSizes {
    /// Kept however little is kept.
    constant: u64,
    /// Of its forward pass, beside the stream, where it is not made again.
    kept: u64,
    /// Of its backward pass, waiting for the update, beyond what was kept.
    factors: u64,
    /// What only passes through.
    forward: u64,
    backward: u64,
    /// Outputs of the widest linear.
    widest: u64,
}

impl MixerSizes {
    fn new(mixer: &Mixer, a: &Architecture, batch: &Batch) -> MixerSizes {
        let (rows, n) = (batch.rows() as u64, batch.trained() as u64);
        match mixer {
            Mixer::Attention(l) => {
                let (q, kv, heads) = ((a.heads * a.head_dim) as u64, (a.kv_heads * a.head_dim) as u64, a.heads as u64);
                let gate = if l.output_gate { q } else { 0 };
                let q_kept = if l.qk_norm.is_some() { q + kv } else { q };
                MixerSizes {
                    constant: 4 * rows * kv,
                    kept: 2 * n * (q_kept + q + gate) + 4 * n * heads,
                    factors: 2 * n * (q + gate + 2 * kv),
                    forward: 2 * rows * (3 * q + 2 * kv + gate),
                    backward: 2 * n * 5 * q + 4 * n * heads,
                    widest: q + gate,
                }
            }
            Mixer::DeltaNet(net) => {
                let (shape, width) = (&net.shape, delta_net::row(net)[3] as u64);
                let values = (shape.v_heads * delta_rule::HEAD) as u64;
                let convolved = ((2 * shape.k_heads + shape.v_heads) * delta_rule::HEAD) as u64;
                let state = delta_rule::state(shape) as u64;
                let spans = |own: bool| batch.spans.iter().filter(move |s| (s.rows.start >= batch.frozen) == own);
                let own = delta_rule::chunks(spans(true).map(|s| s.rows.len())) as u64;
                let all = own + delta_rule::chunks(spans(false).map(|s| s.rows.len())) as u64;
                let before = spans(true).count() as u64 * (net.kernel as u64 - 1);
                let prepared = |rows: u64, chunks: u64| {
                    rows * (delta_rule::row_bytes(shape) + 8 * shape.k_heads as u64)
                        + chunks * delta_rule::chunk_bytes(shape)
                };
                let taps = (shape.channels() * net.kernel) as u64;
                MixerSizes {
                    constant: 4 * spans(false).count() as u64 * state + 2 * before * width,
                    kept: 2 * (n + before) * width + 2 * n * values,
                    factors: 2 * n * (width + net.out.inputs as u64) + 4 * taps,
                    forward: 2 * rows * (width + convolved + values + net.out.inputs as u64) + prepared(rows, all),
                    // The states before and after each chunk, four times the values, and the convolution's own.
                    backward: 2 * n * (convolved + 5 * values + a.hidden as u64)
                        + prepared(n, own)
                        + 4 * own * state
                        + 4 * taps * causal_conv::stripes(n as usize) as u64,
                    widest: shape.channels() as u64,
                }
            }
        }
    }
}

impl Sizes {
    fn new(a: &Architecture, batch: &Batch, settings: &Settings, overlap: bool, offload: bool) -> Sizes {
        let head = a.head.as_ref().unwrap_or(&a.embedding);
        Sizes {
            rows: batch.rows() as u64,
            trained: batch.trained() as u64,
            targets: batch.targets.len() as u64,
            h: a.hidden as u64,
            inner: a.intermediate as u64,
            vocabulary: a.vocabulary as u64,
            mixers: a.layers.iter().map(|l| MixerSizes::new(&l.mixer, a, batch)).collect(),
            tied: a.head.is_none(),
            head_trains: settings.trains(head),
            overlap,
            offload,
        }
    }

    /// The most of any layer.
    fn most(&self, f: impl Fn(&MixerSizes) -> u64) -> u64 {
        self.mixers.iter().map(f).max().unwrap_or(0)
    }

    fn kept(&self, mixer: &MixerSizes, keep: Keep) -> u64 {
        let n = self.trained;
        let stream = 2 * n * self.h + 4 * n + mixer.constant;
        let mixed = mixer.kept + 2 * n * self.h + 4 * n;
        match keep {
            Keep::Stream => stream,
            Keep::Attention => stream + mixed,
            Keep::All => stream + mixed + 4 * n * self.inner,
        }
    }

    /// Of one layer's backward pass: what its weights' gradients are made from, beyond what was kept of its forward pass
    /// (whose gate and up, and inputs, become part of it).
    fn factors(&self, mixer: &MixerSizes) -> u64 {
        2 * self.trained * (2 * self.h + self.inner) + mixer.factors
    }

    /// What only passes through in one layer's backward pass, and an update's scratch.
    fn passing_backward(&self, rank: u64) -> u64 {
        let n = self.trained;
        let widest = self.inner.max(self.most(|m| m.widest));
        // The last: gradients of linears with one input, added in f32 where these do not lie one behind the other.
        let mixer = self.most(|m| m.backward) + 2 * n * self.h + 4 * n * self.h;
        let one = 2 * self.h * widest + 8 * rank.max(1) * widest.max(self.h);
        let update = one.max(self.together(rank)) + self.inputs();
        mixer.max(update) + self.most(|m| self.kept(m, Keep::All)) + 4 * self.h * 600
    }

    /// Tokens may be few enough for updates without gradients in memory.
    fn few(&self) -> bool {
        crate::compute::cuda::factored::FEW as u64 * self.trained <= self.h
    }

    /// Normed inputs of a layer's matrices: both stay where matrices are updated together.
    fn inputs(&self) -> u64 {
        (1 + self.few() as u64) * 2 * self.trained * self.h
    }

    /// Of a layer's matrices that are updated together, without their gradients: projections and projected gradients, products
    /// of every two tokens' rows.
    fn together(&self, rank: u64) -> u64 {
        let (n, mixer) = (self.trained, self.most(|m| m.widest).max(self.h));
        if !self.few() {
            return 0;
        }
        8 * rank * (3 * self.inner.max(self.h) + 4 * mixer) + 28 * rank * self.h + 96 * rank * n + 28 * n * n
    }

    /// What an update beside the backward pass takes: its scratch, and what the layer above still holds of its own.
    fn beside(&self, order: Order, rank: u64) -> (u64, u64) {
        if order == Order::After || !self.overlap {
            return (0, 0);
        }
        let widest = self.inner.max(self.most(|m| m.widest));
        let matrix = self.h * widest;
        let one = 2 * matrix + 2 * matrix / 64 + 24 * rank.max(1) * widest;
        let layer = one.max(self.together(rank)) + self.inputs();
        let chunk = 2 * (super::update::VOCABULARY as u64).min(self.vocabulary * self.h)
            + 8 * rank.max(1) * self.vocabulary
            + 48 * self.vocabulary
            + 4 * self.trained * self.h;
        let lent =
            2 * self.trained * (4 * self.h + 3 * self.inner) + self.most(|m| m.factors + 2 * self.trained * m.widest);
        (layer.max(chunk) + (16 << 20), lent)
    }

    /// Gate and up of the rows that train.
    fn gate_up(&self) -> u64 {
        4 * self.trained * self.inner
    }

    fn passing_forward(&self) -> u64 {
        let mixer = 2 * self.rows * self.h + self.most(|m| m.forward);
        // Gate and up of rows that all train are made in a slot.
        let gate_up = if self.offload && self.rows == self.trained { 0 } else { 4 * self.rows * self.inner };
        let feed_forward = 2 * self.rows * (self.h + self.inner) + gate_up;
        mixer.max(feed_forward)
    }

    /// How many of all layers' gates and ups leave the device as fast as a forward pass makes them.
    fn in_time(&self, a: &Architecture) -> usize {
        let matrices: u64 = a.layers.iter().flat_map(|l| l.linears()).map(|l| (l.outputs * l.inputs) as u64).sum();
        let operations = 2 * self.rows * matrices;
        (operations / (self.gate_up() * OPERATIONS_PER_BYTE).max(1)) as usize
    }

    /// Of the head while it works, and what of it waits for its update.
    fn head(&self, rank: u64) -> (u64, u64) {
        let l = self.targets;
        let rows = 2 * l * (3 * self.h);
        let d_logits = if self.head_trains { 2 * l * self.vocabulary } else { 0 };
        let block = (super::head::LOGITS as u64).min(4 * l * self.vocabulary);
        // Where their gradient is not kept, it is made beside them, in half as many bytes.
        let block = if self.head_trains { block } else { block / 2 * 3 };
        let chunk = 2 * (super::update::VOCABULARY as u64).min(self.vocabulary * self.h)
            + 8 * rank.max(1) * self.vocabulary
            + 24 * self.vocabulary;
        (rows + d_logits + block.max(chunk), rows + d_logits)
    }

    fn stream(&self) -> u64 {
        // The stream of all rows, or the gradient of those that train, in f32 and twice in bf16; rotary angles.
        (4 * self.rows * self.h).max(8 * self.trained * self.h)
    }

    fn peak(&self, order: Order, keep: &[Keep], rank: u64) -> u64 {
        let kept: u64 = self.mixers.iter().zip(keep).map(|(m, &k)| self.kept(m, k)).sum();
        let (head, waiting) = self.head(rank);
        let layerwise = order == Order::Layerwise && !self.tied;
        let stays = if layerwise { 0 } else { waiting };
        let backward = match order {
            Order::Layerwise => kept + self.most(|m| self.factors(m)) + self.passing_backward(rank) + stays,
            Order::After => {
                let all: u64 = self.mixers.iter().map(|m| self.kept(m, Keep::All) + self.factors(m)).sum();
                all.max(kept) + self.passing_backward(rank) + waiting
            }
        };
        let forward = kept + self.passing_forward();
        // The plans' workspace, and what cutting memory into pieces wastes.
        let wasted = WORKSPACES + (32 << 20);
        let (side, lent) = self.beside(order, rank);
        let slots = if self.offload { 2 * self.gate_up() } else { 0 };
        self.stream() + forward.max(backward + lent).max(kept + head) + slots + wasted + side
    }
}

impl Plan {
    pub(super) fn forward_only(a: &Architecture) -> Plan {
        let keep = vec![Keep::All; a.layers.len()];
        Plan { order: Order::Layerwise, keep, offloaded: Vec::new(), piece: 0, bytes: 0, side: 0 }
    }

    /// Bytes of host memory.
    pub fn host_bytes(&self) -> u64 {
        self.piece * self.offloaded.len() as u64
    }

    /// Where in host memory a layer's gate and up are.
    pub(super) fn place(&self, layer: usize) -> Option<usize> {
        Some(self.offloaded.binary_search(&layer).ok()? * self.piece as usize)
    }

    /// What is made again, in halves of a layer's forward pass, which its mixer and its feed-forward block are about.
    fn again(&self) -> usize {
        self.keep.iter().map(|&k| Keep::All as usize - k as usize).sum::<usize>() - self.offloaded.len()
    }

    /// The first of these that fits `budget`: everything kept and updated after; everything kept and updated layer by layer;
    /// ever more layers without gate and up; ever more with the stream alone. Gates and ups that are not kept go to host
    /// memory, as many as it has room for and as leave in time, where two slots for them on the device cost less than that
    /// saves. Updates run beside the backward pass where what that takes is not missed: it costs about as much time as it
    /// saves where a fifth of the layers keeps less for it.
    pub fn choose(
        a: &Architecture,
        batch: &Batch,
        settings: &Settings,
        budget: u64,
        allowed: Allowed,
    ) -> Result<Plan, GpuError> {
        let (layers, rank) = (a.layers.len(), settings.rank() as u64);
        let keep = |less: Keep, count: usize, more: Keep| -> Vec<Keep> {
            // The last layers' are used first: those that stay longest keep least.
            (0..layers).map(|i| if i < count { less } else { more }).collect()
        };
        let plan = |sizes: &Sizes, order: Order, keep: Vec<Keep>| {
            let (bytes, (side, _)) = (sizes.peak(order, &keep, rank), sizes.beside(order, rank));
            let less: Vec<usize> = (0..layers).filter(|&i| keep[i] != Keep::All).collect();
            let room = (allowed.host / sizes.gate_up().max(1)) as usize;
            let in_time = if allowed.unhurried { layers } else { sizes.in_time(a) };
            let count = if sizes.offload { less.len().min(room).min(in_time) } else { 0 };
            // Evenly among them, so that copies have the time of the layers between.
            let nth = |k: usize| k * count / less.len();
            let offloaded = (0..less.len()).filter(|&k| nth(k + 1) > nth(k)).map(|k| less[k]).collect();
            Plan { order, keep, offloaded, piece: sizes.gate_up(), bytes, side }
        };
        let sizes = |overlap, offload| Sizes::new(a, batch, settings, overlap, offload);
        let alone = sizes(false, false);
        let after = plan(&alone, Order::After, keep(Keep::All, 0, Keep::All));
        if allowed.after && after.bytes <= budget {
            return Ok(after);
        }
        let steps = || {
            (0..=layers)
                .map(|n| keep(Keep::Attention, n, Keep::All))
                .chain((1..=layers).map(|n| keep(Keep::Stream, n, Keep::Attention)))
        };
        let first = |sizes: Sizes| {
            let mut plans = steps().map(|keep| plan(&sizes, Order::Layerwise, keep));
            plans.find(|plan| plan.bytes <= budget && sizes.offload != plan.offloaded.is_empty())
        };
        let ways = [(true, false), (true, true), (false, false), (false, true)];
        let ways =
            ways.into_iter().filter(|(beside, offload)| (allowed.beside || !beside) && (allowed.host > 0 || !offload));
        let plans = ways.filter_map(|(beside, offload)| first(sizes(beside, offload)));
        // The first of those that take as long.
        match plans.min_by_key(|plan| plan.again() + if plan.side > 0 { 0 } else { layers / 5 }) {
            Some(plan) => Ok(plan),
            None => Err(GpuError::Memory(sizes_of_all(&alone, steps(), rank).saturating_sub(budget))),
        }
    }
}

/// The least that a layout layer by layer takes.
fn sizes_of_all(sizes: &Sizes, layouts: impl Iterator<Item = Vec<Keep>>, rank: u64) -> u64 {
    layouts.map(|keep| sizes.peak(Order::Layerwise, &keep, rank)).min().unwrap_or(u64::MAX)
}

/// Free bytes that a step of `batch` takes at the least, the growth of the optimizer's state not included.
pub fn least(a: &Architecture, batch: &Batch, settings: &Settings) -> u64 {
    let keep = vec![Keep::Stream; a.layers.len()];
    Sizes::new(a, batch, settings, false, false).peak(Order::Layerwise, &keep, settings.rank() as u64) + RESERVE
}

/// Bytes of the largest weights that are not bf16 as that: of linears that share their input, which are converted together, or
/// of the head. On top of what a plan says.
pub fn narrowed(a: &Architecture, weights: &dyn Weights) -> u64 {
    let other = |name: &str| weights.tensor(name).is_some_and(|spec| spec.kind() != Some(Kind::Bf16));
    let together = |linears: &[&Linear]| match linears.iter().any(|l| other(&l.weight)) {
        true => linears.iter().map(|l| 2 * (l.outputs * l.inputs) as u64).sum(),
        false => 0,
    };
    let of_layer = |layer: &Layer| -> u64 {
        let (inputs, out) = match &layer.mixer {
            Mixer::Attention(l) => (together(&[&l.q, &l.k, &l.v]), together(&[&l.o])),
            Mixer::DeltaNet(net) => (together(&delta_net::linears(net)), together(&[&net.out])),
        };
        inputs.max(out).max(together(&[&layer.gate, &layer.up])).max(together(&[&layer.down]))
    };
    let head = a.head.as_ref().unwrap_or(&a.embedding);
    let of_head = if other(head) { 2 * (a.vocabulary * a.hidden) as u64 } else { 0 };
    a.layers.iter().map(of_layer).max().unwrap_or(0).max(of_head)
}

/// Bytes by which the optimizer's state on the device will grow.
pub(super) fn missing_state(a: &Architecture, settings: &Settings, moments: &Moments) -> u64 {
    let trained = a.tensors().into_iter().filter(|(name, _)| settings.trains(name));
    let grows = |(name, shape): (&str, Vec<u64>)| match moments.has(name) {
        true => 0,
        false => 8 * moment_elements(form(settings, &shape), &shape),
    };
    trained.map(grows).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Dtype;
    use crate::train::weights::{InMemory, TensorSpec};
    use crate::train::{Config, Tokens};

    fn qwen3_8b() -> Architecture {
        let config = r#"{"model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
            "max_position_embeddings": 40960, "tie_word_embeddings": false}"#;
        Architecture::from_config(&Config::parse(config).unwrap()).unwrap()
    }

    fn batch(context: usize, trained: usize) -> Batch {
        Batch::pack([(0, &Tokens::new(vec![1; context], vec![2; trained]))])
    }

    #[test]
    fn less_memory_costs_atomic_updates_first_then_time_and_then_the_job() {
        let (a, settings, batch) = (qwen3_8b(), Settings::default(), batch(1024, 1024));
        let plan = |gb: f64| Plan::choose(&a, &batch, &settings, (gb * 1e9) as u64, Allowed::default());
        let all = plan(100.0).unwrap();
        assert_eq!((all.order, all.keep[0]), (Order::After, Keep::All));
        let mut last = all.bytes;
        for gb in [6.0, 4.0, 3.0, 2.6, 2.0] {
            let Ok(less) = plan(gb) else { continue };
            assert!(less.bytes <= (gb * 1e9) as u64 && less.bytes <= last);
            assert!(less.keep.is_sorted(), "the last layers keep most");
            last = less.bytes;
        }
        assert_eq!(plan(5.5).unwrap().order, Order::Layerwise);
        assert!(plan(0.3).is_err());
    }

    #[test]
    fn the_shapes_that_must_fit_do() {
        // The limits of docs/training.md less the optimizer's state (rank 64).
        let (a, settings) = (qwen3_8b(), Settings::default());
        let state = missing(&a, &settings);
        for (context, trained, gb) in [(1024, 1024, 4.0), (0, 4096, 8.0), (2048, 256, 4.0)] {
            let budget = (gb * 1e9) as u64 - state;
            let plan = Plan::choose(&a, &batch(context, trained), &settings, budget, Allowed::default());
            let count = |k| plan.as_ref().map_or(0, |p| p.keep.iter().filter(|x| **x == k).count());
            let counts = [Keep::All, Keep::Attention, Keep::Stream].map(count);
            println!(
                "{context}+{trained} in {gb} GB, {state} of them state: {counts:?}, {:?}",
                plan.as_ref().map(|p| p.bytes)
            );
            assert!(plan.is_ok());
        }
    }

    #[test]
    fn what_the_device_has_no_room_for_goes_to_the_host_as_far_as_that_has_room_and_time() {
        let (a, settings) = (qwen3_8b(), Settings::default());
        let state = missing(&a, &settings);
        for (context, trained, gb) in [(1024, 1024, 4.0), (0, 4096, 8.0)] {
            let (budget, batch) = ((gb * 1e9) as u64 - state, batch(context, trained));
            let plan =
                |host| Plan::choose(&a, &batch, &settings, budget, Allowed { host, ..Allowed::default() }).unwrap();
            let (without, with) = (plan(0), plan(u64::MAX));
            println!("{context}+{trained}: again {} {}, {with:?}", without.again(), with.again());
            assert!(without.offloaded.is_empty() && with.bytes <= budget);
            assert!(with.again() + 15 < without.again());
            assert!(with.offloaded.is_sorted() && with.offloaded.iter().all(|&i| with.keep[i] != Keep::All));
            assert_eq!(with.place(with.offloaded[1]), Some(with.piece as usize));
            // Of rows that all train, fewer leave than are made.
            assert_eq!(with.offloaded.len() < with.keep.iter().filter(|k| **k != Keep::All).count(), context == 0);
            let some = plan(5 * with.piece + 1);
            assert!(some.host_bytes() <= 5 * with.piece && some.again() >= with.again() && some.bytes <= budget);
            assert_eq!(plan(with.piece - 1), without, "room for none");
        }
    }

    /// Qwen3.5-27B: bytes beyond the weights, and that a long context costs no more than its rows.
    #[test]
    fn a_model_with_linear_attention_fits_too() {
        let config = r#"{"model_type": "qwen3_5_text", "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 24,
            "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 17408, "vocab_size": 248320,
            "linear_num_key_heads": 16, "linear_num_value_heads": 48, "max_position_embeddings": 262144,
            "tie_word_embeddings": false}"#;
        let a = Architecture::from_config(&Config::parse(config).unwrap()).unwrap();
        let settings = Settings::default();
        let state = missing(&a, &settings);
        for (context, trained, gb) in [(0, 1024, 8.0), (4096, 256, 8.0), (32768, 1024, 20.0), (32768, 4096, 30.0)] {
            let plan = Plan::choose(
                &a,
                &batch(context, trained),
                &settings,
                (gb * 1e9) as u64 - state,
                Allowed { host: 8 << 30, ..Allowed::default() },
            );
            let count = |k| plan.as_ref().map_or(0, |p| p.keep.iter().filter(|x| **x == k).count());
            let counts = [Keep::All, Keep::Attention, Keep::Stream].map(count);
            println!(
                "{context}+{trained} in {gb} GB, {state} of them state: {counts:?}, {:?}",
                plan.as_ref().map(|p| p.bytes)
            );
            assert!(plan.is_ok());
        }
    }

    #[test]
    fn matrices_of_another_type_take_room_as_bf16() {
        let config = r#"{"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 60, "max_position_embeddings": 64,
            "tie_word_embeddings": false}"#;
        let a = Architecture::from_config(&Config::parse(config).unwrap()).unwrap();
        let bytes = |other: &dyn Fn(&str) -> bool| {
            let tensors = a.tensors().into_iter().map(|(name, shape)| {
                let dtype = if other(name) { Dtype::F16 } else { Dtype::BF16 };
                let bytes = vec![0; 2 * shape.iter().product::<u64>() as usize];
                (name.to_string(), TensorSpec { dtype, shape }, bytes)
            });
            narrowed(&a, &InMemory::new(tensors))
        };
        assert_eq!(bytes(&|_| false), 0);
        assert_eq!(bytes(&|name| name == "model.embed_tokens.weight"), 0, "its rows are read as they are");
        assert_eq!(bytes(&|name| name.ends_with("k_proj.weight")), 2 * 32 * (32 + 16 + 16));
        assert_eq!(bytes(&|name| name.ends_with("1.mlp.down_proj.weight")), 2 * 32 * 48);
        assert_eq!(bytes(&|name| name == "lm_head.weight"), 2 * 32 * 60);
        assert_eq!(bytes(&|_| true), 2 * 32 * 96);
    }

    #[test]
    fn updates_beside_the_backward_pass_cost_no_layout_its_place() {
        let (a, settings, batch) = (qwen3_8b(), Settings::default(), batch(1024, 1024));
        let plan = |bytes: u64, allowed| Plan::choose(&a, &batch, &settings, bytes, allowed);
        let [alone, both] = [false, true].map(|beside| Allowed { after: false, beside, ..Allowed::default() });
        assert_eq!(plan(u64::MAX, alone).unwrap().side, 0);
        let most = plan(u64::MAX, both).unwrap();
        assert!(most.side > 0 && most.order == Order::Layerwise && most.keep[0] == Keep::All);
        // What fits without them fits with them, and keeps no less than a fifth of the layers more; down to the least.
        let mut budget = most.bytes;
        let mut without = 0;
        while let Ok(least) = plan(budget, alone) {
            let chosen = plan(budget, both).unwrap();
            assert!(chosen.bytes <= budget);
            let lost = |p: &Plan| p.keep.iter().map(|k| 2 - *k as usize).sum::<usize>();
            assert!(lost(&chosen) <= lost(&least) + a.layers.len() / 5, "{chosen:?} for {least:?}");
            without += (chosen.side == 0) as usize;
            budget = least.bytes - 1;
        }
        assert!(without > 0, "with the least memory nothing runs beside");
    }

    fn missing(a: &Architecture, settings: &Settings) -> u64 {
        a.tensors().iter().map(|(_, s)| 8 * moment_elements(form(settings, s), s)).sum()
    }
}
