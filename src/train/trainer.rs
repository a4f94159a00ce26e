//! One optimizer step, whole or not at all: gradients first, while readers go on, then the update of every tensor.

use super::apollo::Updater;
use super::gpu::GpuTrainer;
use super::pack::Batch;
use super::settings::Settings;
use super::state::OptimizerState;
use super::step::{Model, StepError};
use crate::compute::cuda::GpuError;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Trains one model. The optimizer's state is shared: it changes only while readers of the weights are shut out (between
/// [`Step::begin_update`](super::weights::Step::begin_update) and `finish`), so that whoever holds a step of the weights
/// holds the state of the same step.
pub struct Trainer {
    pub model: Model,
    pub state: Arc<Mutex<OptimizerState>>,
    updater: Updater,
    /// Where the weights are on a GPU: made with the first step.
    gpu: Option<GpuTrainer>,
    /// Bytes of host memory that steps on a GPU may keep activations in; `None` for what they find.
    pub offload_memory: Option<u64>,
}

/// What a step did.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Mean over the trained tokens, before the update.
    pub loss: f64,
    /// Tokens that the loss counts.
    pub targets: usize,
    /// Rows run, contexts included.
    pub rows: usize,
    /// False where the loss was below the job's `min_loss`.
    pub taken: bool,
    /// Tensors left alone because their gradient was zero throughout.
    pub untouched: usize,
    /// Bytes of host memory that a step on a GPU kept activations in.
    pub host_memory: u64,
    /// How long readers, commits, a freeze or the engine kept the update from beginning.
    pub waited: Duration,
}

impl Trainer {
    pub fn new(model: Model, state: Arc<Mutex<OptimizerState>>) -> Trainer {
        Trainer { model, state, updater: Updater::default(), gpu: None, offload_memory: None }
    }

    /// Gives the memory that steps share back, when no more are coming.
    pub fn release_buffers(&self) {
        self.model.release_buffers();
        if let Some(gpu) = &self.gpu {
            gpu.release_buffers();
        }
    }

    /// One step on `batch` at learning rate `lr`. An error for which [`StepError::is_torn`] says no leaves weights and state as
    /// they were.
    pub fn step(&mut self, batch: &Batch, settings: &Settings, lr: f64) -> Result<StepReport, StepError> {
        if let Some(device) = self.model.device().map_err(GpuError::Library)? {
            let gpu = match &mut self.gpu {
                Some(gpu) if gpu.gpu().device.id == device.id => gpu,
                slot => slot.insert(GpuTrainer::new(self.model.clone(), &device)?),
            };
            gpu.host_budget = self.offload_memory;
            return gpu.step(batch, settings, lr, &self.state);
        }
        let trainable = |name: &str| settings.trains(name);
        let weights = self.model.weights.clone();
        let mut step = weights.begin_step()?;
        // Of a life on a GPU.
        self.state.lock().come_home().map_err(|e| GpuError::Library(e.to_string()))?;
        let (losses, gradients) = self.model.forward_backward(batch, &trainable)?;
        let loss = losses.iter().map(|&l| l as f64).sum::<f64>() / losses.len() as f64;
        let mut report = StepReport {
            loss,
            targets: losses.len(),
            rows: batch.rows(),
            taken: loss >= settings.min_loss,
            untouched: 0,
            host_memory: 0,
            waited: Duration::ZERO,
        };
        if !report.taken {
            return Ok(report);
        }
        let ready = Instant::now();
        step.begin_update()?;
        report.waited = ready.elapsed();
        let state = &mut *self.state.lock();
        let updated = gradients.visit(&self.model.architecture, &trainable, |name, gradient| {
            let touched = self.updater.update(&*weights, name, gradient, settings, lr, state)?;
            report.untouched += !touched as usize;
            Ok(())
        });
        // Its buffers would lie idle through the next backward pass, which is the peak.
        self.updater = Updater::default();
        match updated {
            Ok(()) => {}
            Err(source) => return Err(StepError::Torn { step: state.step + 1, source }),
        }
        state.step += 1;
        step.finish(state.step).map_err(|source| StepError::Torn { step: state.step, source })?;
        Ok(report)
    }
}
