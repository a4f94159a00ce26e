//! APOLLO (Zhu et al., arXiv 2412.05270) on one tensor at a time: what the optimizer remembers, the length of the update,
//! and the update written into the live weights. Written from the paper's equations; the order of limiter, bias
//! correction and decay is that of the authors' code, so that learning rates carry over. `docs/training.md` has the formulas.

use super::gradients::Gradient;
use super::settings::{Optimizer, Rounding, Settings};
use super::state::{Form, OptimizerState, TensorState};
use super::weights::Weights;
use crate::compute::cpu::apollo::{
    Apply, Factors, apply, channel_squares, moments, project_tall, project_wide, square_sum,
};
use crate::compute::rng::{Purpose, Stream};
use crate::image::ImageError;

/// Added to the norm that a factor divides by.
const TINY: f64 = 1e-8;

/// How a tensor of this shape is remembered.
pub fn form(settings: &Settings, shape: &[u64]) -> Form {
    let rank = settings.rank();
    match shape {
        [m, n] if *m.min(n) >= rank as u64 => match settings.optimizer {
            Optimizer::Apollo => Form::Channel { rank },
            Optimizer::ApolloMini => Form::Tensor { rank },
        },
        _ => Form::Adam,
    }
}

/// Elements of each moment of a tensor of this shape.
pub fn moment_elements(form: Form, shape: &[u64]) -> u64 {
    match form {
        Form::Adam => shape.iter().product(),
        Form::Channel { rank } | Form::Tensor { rank } => rank as u64 * shape.iter().max().expect("a matrix"),
    }
}

/// Can what is remembered of a tensor go on under these settings?
pub fn fits(tensor: &TensorState, form: Form, shape: &[u64]) -> bool {
    let elements = moment_elements(form, shape) as usize;
    let elsewhere = tensor.m.is_empty() && tensor.v.is_empty();
    tensor.form == form && (elsewhere || tensor.m.len() == elements && tensor.v.len() == elements)
}

/// Updates tensors, with buffers that are kept from one to the next.
#[derive(Default)]
pub struct Updater {
    gradient: Vec<f32>,
    projected: Vec<f32>,
    bytes: Vec<u8>,
}

impl Updater {
    /// One update of tensor `name` at learning rate `lr`. Returns false, and changes neither weight nor state, where the
    /// gradient is zero throughout: the limiter would otherwise remember a norm of zero and hold the tensor down for
    /// thousands of steps.
    pub fn update(
        &mut self,
        weights: &dyn Weights,
        name: &str,
        gradient: &Gradient,
        settings: &Settings,
        lr: f64,
        state: &mut OptimizerState,
    ) -> Result<bool, ImageError> {
        let spec = weights.tensor(name).expect("every tensor was found when the model was made");
        let form = form(settings, &spec.shape);
        let step = state.step;
        if let Some(tensor) = state.tensors.get(name)
            && !fits(tensor, form, &spec.shape)
        {
            state.tensors.remove(name);
        }
        let fresh = || {
            let zeros = vec![0.0; moment_elements(form, &spec.shape) as usize];
            TensorState { form, steps: 0, last_norm: None, m: zeros.clone(), v: zeros }
        };
        let known = state.tensors.get(name).map_or(0, |t| t.steps);
        let (m, n) = (gradient.rows, gradient.columns);
        let stream = Stream::new(settings.seed, Purpose::Rounding, name, step);
        let vector = spec.shape.len() == 1;
        let mut pass = Pass { updater: self, gradient, chunk: gradient.chunk_rows(), weights, name, vector };
        let kind = spec.kind().expect("its dtype was checked when the model was made");
        let how = Apply {
            kind,
            stochastic: (settings.rounding == Rounding::Stochastic).then_some(&stream),
            keep: (1.0 - lr * settings.weight_decay) as f32,
        };
        let betas = (settings.betas[0] as f32, settings.betas[1] as f32);
        let eps = settings.eps as f32;
        // Bias correction, after everything else.
        let rate = |steps: u64| {
            let power = |beta: f64| 1.0 - beta.powf(steps as f64);
            lr * power(settings.betas[1]).sqrt() / power(settings.betas[0])
        };

        let (rank, by_channel) = match form {
            Form::Adam => {
                let mut square = 0.0;
                pass.each(false, |g, _| square += square_sum(g))?;
                if square == 0.0 {
                    return Ok(false);
                }
                let tensor = state.tensors.entry(name.to_string()).or_insert_with(fresh);
                tensor.steps += 1;
                let rate = rate(tensor.steps) as f32;
                pass.apply(&how, |g, first| {
                    let part = first * n..first * n + g.len();
                    moments(g, &mut tensor.m[part.clone()], &mut tensor.v[part], betas, eps);
                    Factors::One(rate)
                })?;
                return Ok(true);
            }
            Form::Channel { rank } => (rank, true),
            Form::Tensor { rank } => (rank, false),
        };

        // First pass: the projected gradient, and the sums of squares of the gradient itself, by channel.
        let (tall, channels) = (m >= n, m.max(n));
        let projection = projection(settings, name, known, m.min(n), rank);
        let mut squares = vec![0.0f64; channels];
        let mut projected = std::mem::take(&mut pass.updater.projected);
        projected.clear();
        projected.resize(rank * channels, 0.0);
        pass.each(false, |g, first| {
            let project = if tall { project_tall } else { project_wide };
            project(g, &projection, first, n, rank, &mut projected, &mut squares);
        })?;
        drop(projection);
        if squares.iter().all(|&s| s == 0.0) {
            pass.updater.projected = projected;
            return Ok(false);
        }
        let tensor = state.tensors.entry(name.to_string()).or_insert_with(fresh);
        tensor.steps += 1;

        // How much longer the normalised moments are than the projected gradient, by channel or in all.
        let raw = channel_squares(&projected, channels, tall);
        moments(&mut projected, &mut tensor.m, &mut tensor.v, betas, eps);
        let normed = channel_squares(&projected, channels, tall);
        pass.updater.projected = projected;
        let ratio = |normed: f64, raw: f64| normed.sqrt() / (raw.sqrt() + TINY);
        let mut factors: Vec<f64> = match by_channel {
            true => normed.iter().zip(&raw).map(|(&n, &r)| ratio(n, r)).collect(),
            false => vec![ratio(normed.iter().sum(), raw.iter().sum()); channels],
        };

        // The limiter: the update's norm may grow by 1 % a step.
        let norm = factors.iter().zip(&squares).map(|(f, s)| f * f * s).sum::<f64>().sqrt();
        if let Some(limit) = settings.norm_growth_limit.filter(|&l| l != 0.0) {
            let shrink = match tensor.last_norm {
                None => 1.0,
                Some(last) => (norm / (last as f64 + TINY)).max(limit) / limit,
            };
            factors.iter_mut().for_each(|f| *f /= shrink);
            tensor.last_norm = Some((norm / shrink) as f32);
        }

        // Second pass: scale and apply.
        let factor = rate(tensor.steps) * settings.scale(m, n);
        let factors: Vec<f32> = factors.iter().map(|f| (f * factor) as f32).collect();
        pass.apply(&how, |_, _| match (by_channel, tall) {
            (false, _) => Factors::One(factors[0]),
            (true, true) => Factors::Rows(&factors),
            (true, false) => Factors::Columns(&factors),
        })?;
        Ok(true)
    }
}

/// P of a tensor whose smaller dimension is `small`, at its update number `steps` (from 0): variance 1/rank, elements
/// `rank x small` of a tall matrix and `small x rank` of a wide one, in the stream's order.
pub fn projection(settings: &Settings, name: &str, steps: u64, small: usize, rank: usize) -> Vec<f32> {
    use rayon::prelude::*;
    let stream = Stream::new(settings.seed, Purpose::Projection, name, steps / settings.proj_refresh);
    let scale = 1.0 / (rank as f32).sqrt();
    let mut p = vec![0.0; rank * small];
    p.par_chunks_mut(4096).enumerate().for_each(|(i, part)| {
        stream.fill_normals(i as u64 * 4096, part);
        part.iter_mut().for_each(|x| *x *= scale);
    });
    p
}

/// Passes over one tensor's gradient, some rows at a time.
struct Pass<'a> {
    updater: &'a mut Updater,
    gradient: &'a Gradient<'a>,
    chunk: usize,
    weights: &'a dyn Weights,
    name: &'a str,
    /// A vector's rows are its elements, though its gradient is one row.
    vector: bool,
}

impl Pass<'_> {
    /// Calls `f` with each part of the gradient and its first row. `again`: a gradient in one part is still there.
    fn each(&mut self, again: bool, mut f: impl FnMut(&mut [f32], usize)) -> Result<(), ImageError> {
        self.parts(again, |_, g, first| {
            f(g, first);
            Ok(())
        })
    }

    fn parts(
        &mut self,
        again: bool,
        mut f: impl FnMut(&mut Vec<u8>, &mut [f32], usize) -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let (rows, n) = (self.gradient.rows, self.gradient.columns);
        for first in (0..rows).step_by(self.chunk) {
            let end = rows.min(first + self.chunk);
            if !(again && self.chunk >= rows) {
                self.updater.gradient.resize((end - first) * n, 0.0);
                self.gradient.fill(first, &mut self.updater.gradient);
            }
            let Updater { gradient, bytes, .. } = &mut *self.updater;
            f(bytes, gradient, first)?;
        }
        Ok(())
    }

    /// The second pass: `f` may change each part of the gradient and gives its factors.
    fn apply<'f>(
        &mut self,
        how: &Apply,
        mut f: impl FnMut(&mut [f32], usize) -> Factors<'f>,
    ) -> Result<(), ImageError> {
        let (weights, name, n) = (self.weights, self.name, self.gradient.columns);
        let unit = if self.vector { n } else { 1 };
        self.parts(true, |bytes, g, first| {
            let factors = f(g, first);
            bytes.resize(g.len() * how.kind.bytes(), 0);
            let rows = (first * unit) as u64..(first * unit + g.len() * unit / n) as u64;
            weights.read_rows(name, rows.clone(), bytes)?;
            apply(bytes, g, first, n, factors, how);
            weights.write_rows(name, rows, bytes)
        })
    }
}
