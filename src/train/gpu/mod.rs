//! One optimizer step on a GPU: the twin of `step`, `gradients`, `head` and `apollo` for weights that live there, from the
//! same descriptions (`families`, `pack`, `settings`, `state`). Matrices are bf16, the stream and all sums f32.
//!
//! What differs is when weights are updated ([`plan::Order`]). Where memory allows, as on the CPU: after the whole backward pass,
//! when everything is known to be finite. Where it does not, each layer right after its own backward pass, so that no more than
//! one layer's gradients exist; loss and logits are known to be finite then, and a gradient that is not holds back
//! every update from there on.

mod backward;
mod delta_net;
mod forward;
mod head;
mod own;
pub mod plan;
mod state;
mod update;

pub use own::OnDevice;
pub use plan::{Allowed, Order, Plan};

use super::families::{Architecture, Attention, Layer, Linear, Mixer};
use super::pack::Batch;
use super::settings::Settings;
use super::state::{OptimizerState, Remote};
use super::step::{Model, StepError};
use super::trainer::StepReport;
use super::weights::{Location, Step};
use crate::compute::cpu::weight::Kind;
use crate::compute::cuda::attention::{Shape, Tiles};
use crate::compute::cuda::matmul::{Operand, Output, matmul};
use crate::compute::cuda::rope::{Angles, Heads, LARGEST_HEAD};
use crate::compute::cuda::{Buffer, Gpu, GpuError, Offload, Part, Shelf, Weight, causal_conv, delta_rule, linear};
use crate::memory::cuda::{Device, Library, load};
use parking_lot::Mutex;
use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, StepError>;

/// The most host memory that activations take unless more is asked for: the largest steps that were measured use six.
const LARGEST_SHELF: u64 = 8 << 30;

/// Rows that train are made up to a multiple of this: the library's products over 1023 rows, gradients of weights, take 7 %
/// more time than those over 1024 (an H200, CUDA 13.0).
const ROWS: usize = 8;

/// Values by tensor.
pub type ByName = HashMap<String, Vec<f32>>;

/// Trains a model whose weights are on one GPU.
pub struct GpuTrainer {
    model: Model,
    gpu: Arc<Gpu>,
    /// Where updates run beside the way back of the layers below.
    side: Arc<Gpu>,
    moments: Arc<state::Moments>,
    /// Bytes that steps may hold beyond the weights, optimizer state included; `None`: what is free.
    pub budget: Option<u64>,
    /// Layouts that are not ruled out.
    pub allowed: Allowed,
    /// Whether matrices are updated without their gradient in memory wherever they can be, or nowhere; `None`: where it pays.
    pub by_factors: Option<bool>,
    /// Bytes of host memory that steps may keep activations in; `None`: as [`GpuTrainer::host_memory`] finds.
    pub host_budget: Option<u64>,
    /// What it is for this job.
    host: Mutex<Option<u64>>,
    shelf: Mutex<Option<Arc<Shelf>>>,
    /// How the last step was laid out.
    pub plan: Option<Plan>,
    /// Host milliseconds and device milliseconds of the parts of the last step, where asked for.
    pub timed: Option<Vec<(&'static str, f32)>>,
}

/// A batch on the device.
struct Rows<'a> {
    batch: &'a Batch,
    rows: usize,
    frozen: usize,
    trained: usize,
    ids: Buffer,
    angles: Angles,
    _angles: [Buffer; 2],
    tiles: Tiles,
    /// In models with linear attention.
    sequences: Option<delta_net::Sequences>,
}

/// What a step works with.
#[derive(Clone)]
struct Context<'a> {
    gpu: &'a Gpu,
    a: &'a Architecture,
    /// Where each weight is.
    weights: Arc<HashMap<&'a str, Weight>>,
    rows: Arc<Rows<'a>>,
    plan: &'a Plan,
    settings: &'a Settings,
    by_factors: Option<bool>,
    /// Where the plan has something in host memory meanwhile.
    offload: Option<Arc<Mutex<Offload>>>,
    _mapped: Arc<Mapped<'a>>,
}

/// Keeps the weights mapped.
struct Mapped<'a> {
    gpu: &'a Gpu,
    _held: Vec<Arc<dyn Any + Send + Sync>>,
}

impl Drop for Mapped<'_> {
    /// After an error work may be under way that reads the weights, which others may unmap or write from here on.
    fn drop(&mut self) {
        let _ = self.gpu.wait();
    }
}

/// Why a model does not train on a GPU, in one sentence; `None` for one that does where its weights allow it.
pub fn refusal(a: &Architecture) -> Option<String> {
    let nets = || a.layers.iter().filter_map(|l| if let Mixer::DeltaNet(net) = &l.mixer { Some(net) } else { None });
    let widest = nets().map(|net| net.shape.k_dim.max(net.shape.v_dim)).max().unwrap_or(0);
    let taps = nets().map(|net| net.kernel).max().unwrap_or(0);
    let what = if widest > delta_rule::HEAD {
        format!("linear attention with heads of {widest} (at most {} do)", delta_rule::HEAD)
    } else if taps > causal_conv::TAPS {
        format!("a convolution of {taps} taps (at most {} do)", causal_conv::TAPS)
    } else if a.norm_offset != 0.0 && a.norm_offset != 1.0 {
        format!("norms whose weights are distances from {}", a.norm_offset)
    } else if a.head_dim > LARGEST_HEAD {
        format!("head_dim {} (at most {LARGEST_HEAD} does)", a.head_dim)
    } else {
        return None;
    };
    Some(format!("{} does not train on a GPU yet: {what}; weights in shared memory train on the CPU", a.family))
}

/// Loads what steps on a GPU need beside the driver, or says where it was looked for.
pub fn libraries() -> std::result::Result<(), String> {
    load(Library::CublasLt).map(drop).map_err(|why| format!("training on a GPU needs cuBLASLt: {why}"))
}

impl GpuTrainer {
    /// Why a model cannot train on `device`, or its trainer.
    pub fn new(model: Model, device: &Arc<Device>) -> std::result::Result<GpuTrainer, GpuError> {
        let a = &model.architecture;
        if let Some(why) = refusal(a) {
            return Err(GpuError::Library(why));
        }
        match model.device().map_err(GpuError::Library)? {
            Some(on) if on.id == device.id => {}
            Some(on) => return Err(GpuError::Library(format!("the weights are on {}", on.id.uuid))),
            None => return Err(GpuError::Library("the weights are in host memory".into())),
        }
        let (gpu, side) = (Arc::new(Gpu::new(device)?), Arc::new(Gpu::new(device)?));
        let moments = Arc::new(state::Moments::new(gpu.clone()));
        Ok(GpuTrainer {
            model,
            gpu,
            side,
            moments,
            allowed: Allowed { host: u64::MAX, ..Allowed::default() },
            host_budget: None,
            host: Mutex::default(),
            shelf: Mutex::default(),
            budget: None,
            by_factors: None,
            plan: None,
            timed: None,
        })
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Bytes taken from the device now, and at most.
    pub fn held(&self) -> (u64, u64) {
        let ((now, peak), (side, side_peak)) = (self.gpu.held(), self.side.held());
        (now + side, peak + side_peak)
    }

    /// Gives memory of passing values back, when no steps are coming.
    pub fn release_buffers(&self) {
        self.gpu.release();
        self.side.release();
        *self.shelf.lock() = None;
        *self.host.lock() = None;
        self.model.held.store(0, Ordering::Relaxed);
    }

    /// Bytes of host memory that steps may keep activations in: what was set, or a quarter of what is available at the first
    /// of them. One answer for all steps of a job, since layers that are made again instead have other bits.
    fn host_memory(&self) -> u64 {
        let found = || (crate::memory::available().unwrap_or(0) / 4).min(LARGEST_SHELF);
        *self.host.lock().get_or_insert_with(|| self.host_budget.unwrap_or_else(found))
    }

    /// Host memory for all that the plan puts there; or why there is none.
    fn shelf_for(&self, plan: &Plan) -> std::result::Result<Option<Arc<Shelf>>, GpuError> {
        let bytes = plan.host_bytes();
        let mut shelf = self.shelf.lock();
        if bytes == 0 {
            return Ok(None);
        }
        if shelf.as_ref().is_none_or(|s| s.bytes() < bytes) {
            *shelf = None;
            *shelf = Some(Arc::new(Shelf::new(&self.gpu.device, bytes as usize)?));
        }
        Ok(shelf.clone())
    }

    /// Bytes that steps of these batches take at their peak beyond the weights, the growth of the optimizer's state not
    /// included; or that there is not enough, with what is needed and free.
    pub fn plan(&self, batch: &Batch, settings: &Settings) -> std::result::Result<Plan, GpuError> {
        let held = self.held().0;
        let state = self.moments.bytes();
        let budget = match self.budget {
            Some(budget) => budget.saturating_sub(state),
            None => {
                let (free, _) = self.gpu.device.memory()?;
                // What others on the device, an engine above all, may come to need between two steps.
                (free + held - state).saturating_sub(plan::RESERVE)
            }
        };
        let missing = plan::missing_state(&self.model.architecture, settings, &self.moments);
        let allowed = Allowed { host: self.allowed.host.min(self.host_memory()), ..self.allowed };
        let narrowed = plan::narrowed(&self.model.architecture, &*self.model.weights);
        let budget = budget.saturating_sub(missing + narrowed);
        let mut plan = Plan::choose(&self.model.architecture, batch, settings, budget, allowed)?;
        plan.bytes += narrowed;
        Ok(plan)
    }

    /// Both streams' memory for a plan. What one of them has free, the plan may have given to the other.
    fn reserve(&self, plan: &Plan) -> std::result::Result<(), GpuError> {
        let wanted = [plan.bytes - plan.side - plan::WORKSPACES, plan.side];
        let held = [self.gpu.passing(), self.side.passing()];
        let growth: u64 = (0..2).map(|i| wanted[i].saturating_sub(held[i])).sum();
        let fits = match self.budget {
            Some(budget) => held[0] + held[1] + growth + plan::WORKSPACES + self.moments.bytes() <= budget,
            None => growth + plan::RESERVE <= self.gpu.device.memory()?.0,
        };
        if growth > 0 && !fits {
            self.gpu.release();
            self.side.release();
        }
        self.gpu.reserve(wanted[0])?;
        self.side.reserve(wanted[1])
    }

    fn context<'a>(
        &'a self,
        batch: &'a Batch,
        settings: &'a Settings,
        plan: &'a Plan,
        shelf: Option<Arc<Shelf>>,
    ) -> Result<Context<'a>> {
        let (a, gpu) = (&*self.model.architecture, &*self.gpu);
        let (mut weights, mut held) = (HashMap::new(), Vec::new());
        for (name, shape) in a.tensors() {
            let spec = self.model.weights.tensor(name).expect("every tensor was found when the model was made");
            let Location::Device(place) = self.model.weights.location(name) else {
                return Err(GpuError::Library(format!("{name} is no longer on the GPU")).into());
            };
            if place.device.id != gpu.device.id {
                return Err(GpuError::Library(format!("{name} is on another GPU now")).into());
            }
            let kind = spec.kind().expect("its dtype was checked when the model was made");
            let (rows, columns) =
                if shape.len() == 1 { (1, shape[0]) } else { (shape[0], shape[1..].iter().product()) };
            let (rows, columns, stride) = (rows as usize, columns as usize, place.stride as usize);
            let weight = Weight { address: place.address, kind, rows, columns, stride, from_one: false };
            weights.insert(name, weight);
            held.push(place.held);
        }
        if a.norm_offset != 0.0 {
            for name in a.norms() {
                weights.get_mut(name).expect("a norm is one of the tensors").from_one = true;
            }
        }
        let angle = |f: fn(f32) -> f32| -> Vec<f32> {
            let of = |&p: &u32| a.rope.inverse_frequencies.iter().map(move |w| p as f32 * w);
            batch.positions.iter().flat_map(of).map(|x| f(x) * a.rope.factor).collect()
        };
        let turn = a.rope.inverse_frequencies.len();
        let angles = [gpu.upload(&angle(f32::cos))?, gpu.upload(&angle(f32::sin))?];
        let ids: Vec<i32> = batch.ids.iter().map(|&id| id as i32).collect();
        let rows = Rows {
            batch,
            rows: batch.rows(),
            frozen: batch.frozen,
            trained: batch.trained(),
            ids: gpu.upload(&ids)?,
            angles: Angles { cosines: angles[0].part(), sines: angles[1].part(), turn },
            _angles: angles,
            tiles: Tiles::new(gpu, &batch.spans, batch.rows(), batch.frozen, a.head_dim)?,
            sequences: delta_net::Sequences::new(gpu, a, batch)?,
        };
        let offload = shelf.map(|shelf| Offload::new(&self.gpu, shelf, plan.piece)).transpose()?;
        let offload = offload.map(|o| Arc::new(Mutex::new(o)));
        let mapped = Arc::new(Mapped { gpu, _held: held });
        let (weights, rows, by_factors) = (Arc::new(weights), Arc::new(rows), self.by_factors);
        Ok(Context { gpu, a, weights, rows, plan, settings, by_factors, offload, _mapped: mapped })
    }

    /// Losses of the batch's targets, in their order. Changes nothing.
    pub fn losses(&self, batch: &Batch) -> Result<Vec<f32>> {
        let settings = Settings::default();
        let plan = Plan::forward_only(&self.model.architecture);
        let c = self.context(batch, &settings, &plan, None)?;
        let (x, _) = c.forward(false)?;
        let head = c.head(&x, false)?;
        Ok(self.gpu.download(head.losses.part(), batch.targets.len())?)
    }

    /// Losses and the gradient of every tensor that trains, as f32 by name. For tests: all of them at once.
    pub fn gradients(&self, batch: &Batch, settings: &Settings) -> Result<(Vec<f32>, ByName)> {
        let batch = &batch.padded(ROWS);
        let plan = Plan { order: Order::After, ..Plan::forward_only(&self.model.architecture) };
        let c = self.context(batch, settings, &plan, None)?;
        let (x, saved) = c.forward(true)?;
        let head = c.head(&x, true)?;
        let losses: Vec<f32> = self.gpu.download(head.losses.part(), batch.targets.len())?;
        let mut all = HashMap::new();
        let mut keep = |name: &str, values: Vec<f32>| {
            all.insert(name.to_string(), values);
        };
        c.collect(head, x, saved, &mut keep)?;
        Ok((losses, all))
    }

    /// One step, as [`Trainer::step`](super::Trainer::step).
    pub fn step(
        &mut self,
        batch: &Batch,
        settings: &Settings,
        lr: f64,
        state: &Arc<Mutex<OptimizerState>>,
    ) -> Result<StepReport> {
        let rows = batch.rows();
        let batch = &batch.padded(ROWS);
        let weights = self.model.weights.clone();
        let step = weights.begin_step()?;
        let remembered = self.moments.bytes();
        self.moments.adopt(&mut state.lock(), settings, &self.model)?;
        let mut plan = self.plan(batch, settings)?;
        let shelf = match self.shelf_for(&plan) {
            Ok(shelf) => shelf,
            Err(e) => {
                log::warn!("activations are made again instead of kept in host memory: {e}");
                *self.host.lock() = Some(0);
                plan = self.plan(batch, settings)?;
                None
            }
        };
        // Nothing may be missing once weights change.
        self.reserve(&plan)?;
        self.moments.prepare(&self.model.architecture, settings)?;
        if self.moments.bytes() > remembered
            && let Err(e) = Remote::prepare(&*self.moments)
        {
            // While the driver pins memory, nothing else is done for this process: now, not when a commit comes.
            log::warn!("commits will copy moments more slowly: {e}");
        }
        // Jobs that are queued from here on count with it.
        self.model.held.store(self.held().0 - self.moments.bytes(), Ordering::Relaxed);
        let mut marks = Marks::new(self.timed.is_some());
        marks.add(&self.gpu, "start")?;
        let c = self.context(batch, settings, &plan, shelf)?;
        let (x, mut saved) = c.forward(true)?;
        marks.add(&self.gpu, "forward")?;
        let head = c.head(&x, true)?;
        marks.add(&self.gpu, "head")?;

        // The device goes on with the head's way back while the host waits for the losses alone.
        let losses: Vec<f32> = self.gpu.download(head.losses.part(), batch.targets.len())?;
        if let Some(bad) = losses.iter().position(|l| !l.is_finite()) {
            let sample = batch.sample_of(batch.targets[bad].0);
            return Err(StepError::NotFinite { what: "loss".into(), sample });
        }
        let loss = losses.iter().map(|&l| l as f64).sum::<f64>() / losses.len() as f64;
        let taken = loss >= settings.min_loss;
        let (targets, host_memory) = (losses.len(), plan.host_bytes());
        let mut report = StepReport { loss, targets, rows, taken, untouched: 0, host_memory, waited: Duration::ZERO };
        if !taken {
            return Ok(report);
        }
        let mut dx = c.head_backward(&head, &x)?;
        drop(x);
        let lowest = c.lowest();
        match plan.order {
            Order::After => {
                let mut layers = Vec::new();
                let peaks = self.gpu.zeros(4 * backward::PEAKS as u64 * (c.a.layers.len() + 1) as u64)?;
                c.peaks_of_head(&head, &dx, peaks.part())?;
                for i in (lowest..c.a.layers.len()).rev() {
                    let kept = saved.pop().expect("one was kept of every layer");
                    let g = c.layer_backward(i, kept, &mut dx)?;
                    c.peaks_of_layer(&g, &dx, peaks.from(4 * backward::PEAKS as u64 * (i + 1) as u64))?;
                    layers.push(g);
                }
                marks.add(&self.gpu, "backward")?;
                c.check_peaks(self.gpu.download(peaks.part(), backward::PEAKS * (c.a.layers.len() + 1))?)?;
                self.update(&c, step, lr, &mut report, state, |u| {
                    u.norm(&head)?;
                    for g in layers {
                        u.layer(g)?;
                    }
                    u.vocabulary(head, &dx)
                })?;
                marks.add(&self.gpu, "update")?;
            }
            Order::Layerwise => {
                self.update(&c, step, lr, &mut report, state, |u| {
                    u.norm(&head)?;
                    // A head of its own is done with; a tied one waits for the embedding.
                    let mut head = Some(head);
                    if c.a.head.is_some() {
                        u.own_head(head.take().expect("it was put there"))?;
                    }
                    for i in (lowest..c.a.layers.len()).rev() {
                        let kept = saved.pop().expect("one was kept of every layer");
                        let g = c.layer_backward(i, kept, &mut dx)?;
                        u.layer(g)?;
                    }
                    match head {
                        Some(head) => u.vocabulary(head, &dx),
                        None => u.own_embedding(&dx),
                    }
                })?;
                marks.add(&self.gpu, "backward and update")?;
            }
        }
        drop(c);
        if self.timed.is_some() {
            self.timed = Some(marks.times(&self.gpu)?);
        }
        self.plan = Some(plan);
        self.model.held.store(self.held().0 - self.moments.bytes(), Ordering::Relaxed);
        Ok(report)
    }

    /// The part of a step that writes: all of it, or none, or weights that are said to be torn.
    fn update(
        &self,
        c: &Context,
        mut step: Box<dyn Step + '_>,
        lr: f64,
        report: &mut StepReport,
        state: &Mutex<OptimizerState>,
        work: impl FnOnce(&mut update::Updater) -> Result<()>,
    ) -> Result<()> {
        let ready = Instant::now();
        step.begin_update()?;
        report.waited = ready.elapsed();
        let mut state = state.lock();
        let number = state.step + 1;
        let side = (c.plan.side > 0).then(|| &*self.side);
        let mut u = match update::Updater::new(c, side, &self.moments, &mut state, lr) {
            Ok(u) => u,
            Err(e) => {
                step.withdraw();
                return Err(e);
            }
        };
        match work(&mut u).and_then(|()| u.finish()) {
            Ok(untouched) => report.untouched = untouched,
            Err(e) if u.wrote() => return Err(StepError::Cut { step: number, what: e.in_short() }),
            Err(e) => {
                step.withdraw();
                return Err(e);
            }
        }
        drop(u);
        state.step = number;
        step.finish(number).map_err(|source| StepError::Torn { step: number, source })
    }
}

/// Times on the device between parts of a step.
struct Marks(Option<Vec<(&'static str, cudarc::driver::CudaEvent)>>);

impl Marks {
    fn new(on: bool) -> Marks {
        Marks(on.then(Vec::new))
    }

    fn add(&mut self, gpu: &Gpu, name: &'static str) -> Result<()> {
        if let Some(marks) = &mut self.0 {
            marks.push((name, gpu.mark()?));
        }
        Ok(())
    }

    fn times(&self, gpu: &Gpu) -> Result<Vec<(&'static str, f32)>> {
        let marks = self.0.as_deref().unwrap_or_default();
        let time = |pair: &[(&'static str, _)]| Ok((pair[1].0, gpu.between(&pair[0].1, &pair[1].1)?));
        marks.windows(2).map(time).collect::<std::result::Result<_, GpuError>>().map_err(Into::into)
    }
}

impl<'a> Context<'a> {
    fn weight(&self, name: &str) -> Weight {
        self.weights[name]
    }

    fn heads(&self, layer: &Attention) -> Heads {
        let a = self.a;
        let norms = layer.qk_norm.as_ref().map(|(q, k)| (self.weight(q), self.weight(k)));
        let gated = layer.output_gate;
        Heads { heads: a.heads, kv_heads: a.kv_heads, head_dim: a.head_dim, norms, eps: a.eps, gated }
    }

    fn shape<'s>(&'s self, heads: &'s Heads, layer: &Attention) -> Shape<'s> {
        Shape { heads, tiles: &self.rows.tiles, window: layer.window }
    }

    fn trains(&self, name: &str) -> bool {
        self.settings.trains(name)
    }

    /// The lowest layer that a gradient must reach.
    fn lowest(&self) -> usize {
        let trains = |layer: &Layer| layer.tensors().into_iter().any(|name| self.trains(name));
        match self.trains(&self.a.embedding) {
            true => 0,
            false => self.a.layers.iter().position(trains).unwrap_or(self.a.layers.len()),
        }
    }

    /// A weight as an operand: where it lives, or as bf16 in `scratch`.
    fn operand(&self, w: &Weight, scratch: &mut Option<Buffer>) -> Result<Operand> {
        if w.kind == Kind::Bf16 {
            return Ok(Operand::weight(w));
        }
        let narrow = self.gpu.bf16(w.rows * w.columns)?;
        linear::narrow(self.gpu, w, narrow.part())?;
        let operand = Operand::new(narrow.part(), w.columns);
        *scratch = Some(narrow);
        Ok(operand)
    }

    /// The weights of linears with the same input, those that lie one behind the other as one, with their first output.
    fn joined(&self, linears: &[&Linear]) -> Vec<(Weight, usize)> {
        let mut all: Vec<(Weight, usize)> = Vec::new();
        let mut at = 0;
        for l in linears {
            let w = self.weight(&l.weight);
            match all.last_mut().and_then(|(last, first)| Some((last.join(&w)?, *first))) {
                Some(joined) => *all.last_mut().expect("one was joined") = joined,
                None => all.push((w, at)),
            }
            at += w.rows;
        }
        all
    }

    /// `y (rows x all outputs, bf16) = x W^T + b` of linears side by side.
    fn linears(&self, linears: &[&Linear], x: Part, rows: usize, y: Part) -> Result<()> {
        let width: usize = linears.iter().map(|l| l.outputs).sum();
        for (w, first) in self.joined(linears) {
            let mut scratch = None;
            let operand = self.operand(&w, &mut scratch)?.t();
            let out = Output::bf16(y.from(2 * first as u64), width);
            matmul(self.gpu, out, rows, w.rows, w.columns, Operand::new(x, w.columns), operand)?;
        }
        let mut at = 0;
        for l in linears {
            if let Some(bias) = &l.bias {
                linear::add_bias(self.gpu, y.from(2 * at as u64), false, width, rows, &self.weight(bias))?;
            }
            at += l.outputs;
        }
        Ok(())
    }

    /// `stream (rows x H, f32) += x W^T + b`.
    fn onto_stream(&self, l: &Linear, x: Part, rows: usize, stream: Part) -> Result<()> {
        let w = self.weight(&l.weight);
        let mut scratch = None;
        let operand = self.operand(&w, &mut scratch)?.t();
        let out = Output::f32(stream, w.rows).added();
        matmul(self.gpu, out, rows, w.rows, w.columns, Operand::new(x, w.columns), operand)?;
        if let Some(bias) = &l.bias {
            linear::add_bias(self.gpu, stream, true, w.rows, rows, &self.weight(bias))?;
        }
        Ok(())
    }

    /// `dx (rows x inputs, bf16) = dy W`, summed over linears side by side in dy. Where these do not lie one behind the other
    /// their parts are added in f32 and rounded once, as one product does: where weights lie is no reason to be less exact.
    fn back(&self, linears: &[&Linear], dy: Part, rows: usize, dx: Part) -> Result<()> {
        let width: usize = linears.iter().map(|l| l.outputs).sum();
        let joined = self.joined(linears);
        let columns = joined[0].0.columns;
        let sums = if joined.len() > 1 { Some(self.gpu.f32(rows * columns)?) } else { None };
        for (i, (w, first)) in joined.into_iter().enumerate() {
            let mut scratch = None;
            let operand = self.operand(&w, &mut scratch)?;
            let out = match &sums {
                Some(sums) => Output { add: i > 0, ..Output::f32(sums.part(), columns) },
                None => Output::bf16(dx, columns),
            };
            let dy = Operand::new(dy.from(2 * first as u64), width);
            matmul(self.gpu, out, rows, columns, w.rows, dy, operand)?;
        }
        if let Some(sums) = sums {
            let address = sums.part().address();
            let sums = Weight { address, kind: Kind::F32, rows, columns, stride: columns, from_one: false };
            linear::narrow(self.gpu, &sums, dx)?;
        }
        Ok(())
    }
}
