//! Gradients tensor by tensor from what the backward pass left, and the update of each, in stream order and without a word
//! from the device until the end: what becomes of a tensor is decided there (`compute::cuda::apollo`).

use super::backward::{LayerGradients, MixerGradients};
use super::head::{Head, Stream};
use super::state::Moments;
use super::{Context, Result, delta_net};
use crate::compute::cuda::apollo::{self, Apply, Factors, Gradient, Judge, Rates, Vector, Verdict};
use crate::compute::cuda::embedding::{self, Lookups};
use crate::compute::cuda::factored::{self, Product, Shared, Task};
use crate::compute::cuda::matmul::Output;
use crate::compute::cuda::{Buffer, Gpu, Part, Weight, linear, rms_norm};
use crate::compute::rng::{Purpose, Stream as Random};
use crate::train::apollo::{form, moment_elements};
use crate::train::families::{Linear, Mixer};
use crate::train::settings::Rounding;
use crate::train::state::{Form, OptimizerState, TensorState};
use crate::train::step::{LARGEST, StepError};
use std::collections::HashMap;

/// Elements of the embedding's or the head's gradient that are in memory at once.
pub(super) const VOCABULARY: usize = 32 << 20;

/// The most that squares of a gradient may come to.
const LIMIT: f32 = (LARGEST * LARGEST) as f32;

/// Elements of a vector that one block updates by itself.
const VECTOR: usize = 1 << 16;

/// A gradient: all there; or made some rows at a time (bf16; `fill(first, rows, to)`); or a product of which that may be done, or
/// never is.
pub(super) enum Source<'s> {
    Whole(Gradient),
    Parts { at_once: usize, fill: &'s mut dyn FnMut(usize, usize, Part) -> Result<()> },
    Product { at_once: usize, product: Product },
}

impl Source<'_> {
    fn at_once(&self) -> Option<usize> {
        match self {
            Source::Whole(_) => None,
            Source::Parts { at_once, .. } | Source::Product { at_once, .. } => Some(*at_once),
        }
    }

    /// Rows of a gradient that is made.
    fn fill(&mut self, gpu: &Gpu, first: usize, rows: usize, to: Part) -> Result<()> {
        match self {
            Source::Parts { fill, .. } => fill(first, rows, to),
            Source::Product { product, .. } => Ok(product.fill(gpu, first, rows, Output::bf16(to, product.columns))?),
            Source::Whole(_) => unreachable!("it is there"),
        }
    }
}

/// Who takes gradients.
pub(super) trait Sink {
    fn take(&mut self, name: &str, w: &Weight, source: Source) -> Result<()>;

    /// Nothing that was given is looked at after this.
    fn done(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Context<'_> {
    fn give(&self, sink: &mut dyn Sink, name: &str, source: Source) -> Result<()> {
        if self.trains(name) { sink.take(name, &self.weight(name), source) } else { Ok(()) }
    }

    fn give_vector(&self, sink: &mut dyn Sink, name: &str, values: Part) -> Result<()> {
        let n = self.weight(name).columns;
        self.give(sink, name, Source::Whole(Gradient::new(values.first(4 * n as u64), true, 1, n)))
    }

    pub(super) fn give_norm(&self, head: &Head, sink: &mut dyn Sink) -> Result<()> {
        self.give_vector(sink, &self.a.norm, head.d_norm.part())?;
        sink.done()
    }

    pub(super) fn give_layer(&self, g: &LayerGradients, sink: &mut dyn Sink) -> Result<()> {
        let (gpu, a, layer, n) = (self.gpu, self.a, &self.a.layers[g.layer], self.rows.trained);
        let normed = gpu.bf16(n * a.hidden)?;
        let together = |sink: &mut dyn Sink, linears: &[&Linear], dy: &Buffer, x: Part| -> Result<()> {
            let width: usize = linears.iter().map(|l| l.outputs).sum();
            let mut at = 0;
            for l in linears {
                let dy = dy.from(2 * at as u64);
                let (rows, columns) = (l.outputs, l.inputs);
                let product = Product { dy, dy_stride: width, x, x_stride: columns, tokens: n, rows, columns };
                self.give(sink, &l.weight, Source::Product { at_once: rows, product })?;
                if let Some(bias) = l.bias.as_ref().filter(|b| self.trains(b)) {
                    let sums = gpu.f32(l.outputs)?;
                    linear::column_sums(gpu, dy, width, n, l.outputs, sums.part())?;
                    self.give_vector(sink, bias, sums.part())?;
                    sink.done()?;
                }
                at += l.outputs;
            }
            Ok(())
        };
        together(sink, &[&layer.down], &g.d_out, g.act.part())?;
        rms_norm::again(gpu, g.x_mid.part(), g.rstd_mid.part(), &self.weight(&layer.post_norm), n, normed.part())?;
        // Weights of the norms are read above and below, before they change.
        together(sink, &[&layer.gate, &layer.up], &g.d_gate_up, normed.part())?;
        match (&layer.mixer, &g.mixer) {
            (Mixer::Attention(l), MixerGradients::Attention { attended, .. }) => {
                together(sink, &[&l.o], &g.d_mid, attended.part())?
            }
            (Mixer::DeltaNet(l), MixerGradients::DeltaNet { mixed, .. }) => {
                together(sink, &[&l.out], &g.d_mid, mixed.part())?
            }
            _ => unreachable!("a layer's gradients are its own mixer's"),
        }
        // The layer's matrices are updated together where they are few rows' products: both stay until then.
        let normed_in = match factored::FEW * n <= a.hidden {
            true => gpu.bf16(n * a.hidden)?,
            false => {
                sink.done()?;
                normed
            }
        };
        rms_norm::again(gpu, g.x_in.part(), g.rstd_in.part(), &self.weight(&layer.input_norm), n, normed_in.part())?;
        match (&layer.mixer, &g.mixer) {
            (Mixer::Attention(l), MixerGradients::Attention { d_qkv, .. }) => {
                together(sink, &[&l.q, &l.k, &l.v], d_qkv, normed_in.part())?
            }
            (Mixer::DeltaNet(l), MixerGradients::DeltaNet { d_inputs, .. }) => {
                together(sink, &delta_net::linears(l), d_inputs, normed_in.part())?
            }
            _ => unreachable!("a layer's gradients are its own mixer's"),
        }
        // Vectors one behind the other: one kernel has them all.
        if let (Mixer::DeltaNet(l), MixerGradients::DeltaNet { d_convolution, .. }) = (&layer.mixer, &g.mixer) {
            let g = Gradient::new(d_convolution.part(), true, l.shape.channels(), l.kernel);
            self.give(sink, &l.convolution, Source::Whole(g))?;
        }
        self.give_vector(sink, &layer.input_norm, g.d_input_norm.part())?;
        self.give_vector(sink, &layer.post_norm, g.d_post_norm.part())?;
        match (&layer.mixer, &g.mixer) {
            (Mixer::Attention(l), MixerGradients::Attention { d_qk_norm, .. }) => {
                if let (Some((q, k)), Some(d)) = (&l.qk_norm, d_qk_norm) {
                    self.give_vector(sink, q, d.part())?;
                    self.give_vector(sink, k, d.from(4 * a.head_dim as u64))?;
                }
            }
            (Mixer::DeltaNet(l), MixerGradients::DeltaNet { d_gates, d_norm, .. }) => {
                self.give_vector(sink, &l.a_log, d_gates.part())?;
                self.give_vector(sink, &l.dt_bias, d_gates.from(4 * l.shape.v_heads as u64))?;
                self.give_vector(sink, &l.norm, d_norm.part())?;
            }
            _ => unreachable!("a layer's gradients are its own mixer's"),
        }
        sink.done()
    }

    /// Rows of a part of the vocabulary's gradient; all of a matrix that is wider than tall.
    fn vocabulary_part(&self) -> usize {
        let (v, h) = (self.a.vocabulary, self.a.hidden);
        // Whole blocks of rows, so that the library's operands stay aligned.
        if v < h { v } else { (VOCABULARY / h).next_multiple_of(64).min(v) }
    }

    fn head_product(&self, head: &Head) -> Product {
        let (h, v, tokens) = (self.a.hidden, self.a.vocabulary, self.rows.batch.targets.len());
        let d_logits = head.d_logits.as_ref().expect("kept, since the head trains");
        let (dy, x) = (d_logits.part(), head.normed.part());
        Product { dy, dy_stride: v, x, x_stride: h, tokens, rows: v, columns: h }
    }

    pub(super) fn give_own_head(&self, head: &Head, sink: &mut dyn Sink) -> Result<()> {
        let name = self.a.head.as_ref().expect("asked where the head is a tensor of its own");
        if !self.trains(name) {
            return Ok(());
        }
        let product = self.head_product(head);
        self.give(sink, name, Source::Product { at_once: self.vocabulary_part(), product })?;
        sink.done()
    }

    /// Sums of the gradient's rows by token.
    fn token_sums(&self, dx: &Stream) -> Result<(Lookups, Buffer)> {
        let lookups = Lookups::new(&self.rows.batch.ids[self.rows.frozen..]);
        let sums = self.gpu.f32(lookups.ids.len() * self.a.hidden)?;
        embedding::backward(self.gpu, dx.wide.part(), &lookups, self.a.hidden, sums.part())?;
        Ok((lookups, sums))
    }

    pub(super) fn give_own_embedding(&self, dx: &Stream, sink: &mut dyn Sink) -> Result<()> {
        if !self.trains(&self.a.embedding) {
            return Ok(());
        }
        let (h, v) = (self.a.hidden, self.a.vocabulary);
        let (lookups, sums) = self.token_sums(dx)?;
        let mut map = vec![-1i32; v];
        lookups.ids.iter().enumerate().for_each(|(i, &id)| map[id as usize] = i as i32);
        let map = self.gpu.upload(&map)?;
        if v >= h {
            let g = Gradient::new(sums.part(), true, lookups.ids.len(), h);
            return self.give(sink, &self.a.embedding, Source::Whole(Gradient { map: Some(map.part()), ..g }));
        }
        // Channels are columns: the rows that are zero count as little as they would add.
        let whole = self.gpu.f32(v * h)?;
        apollo::spread(self.gpu, sums.part(), map.part(), v, h, whole.part())?;
        self.give(sink, &self.a.embedding, Source::Whole(Gradient::new(whole.part(), true, v, h)))
    }

    /// Embedding and head, tied or not.
    pub(super) fn give_vocabulary(&self, head: &Head, dx: &Stream, sink: &mut dyn Sink) -> Result<()> {
        if self.a.head.is_some() {
            self.give_own_head(head, sink)?;
            return self.give_own_embedding(dx, sink);
        }
        if !self.trains(&self.a.embedding) {
            return Ok(());
        }
        let (lookups, sums) = self.token_sums(dx)?;
        let ids = self.gpu.upload(&lookups.ids)?;
        let product = self.head_product(head);
        let mut fill = |first: usize, rows: usize, to: Part| {
            product.fill(self.gpu, first, rows, Output::bf16(to, product.columns))?;
            let (tokens, h) = (lookups.ids.len(), self.a.hidden);
            Ok(embedding::add(self.gpu, sums.part(), ids.part(), tokens, h, first, rows, to)?)
        };
        self.give(sink, &self.a.embedding, Source::Parts { at_once: self.vocabulary_part(), fill: &mut fill })
    }

    /// The rank of a matrix that is updated without its gradient in memory.
    fn by_factors(&self, w: &Weight, source: &Source) -> Option<usize> {
        let Source::Product { product: g, .. } = source else { return None };
        let Form::Channel { rank } = form(self.settings, &[w.rows as u64, w.columns as u64]) else { return None };
        let pays = self.by_factors.unwrap_or_else(|| factored::pays(self.gpu, g.tokens, g.rows, g.columns));
        (pays && factored::fits(self.gpu, w, g, rank)).then_some(rank)
    }

    /// Every gradient as f32, for tests.
    pub(super) fn collect(
        &self,
        head: Head,
        x: Buffer,
        mut saved: Vec<super::forward::Saved>,
        keep: &mut dyn FnMut(&str, Vec<f32>),
    ) -> Result<()> {
        let mut dx = self.head_backward(&head, &x)?;
        let mut sink = Collector { c: self, keep };
        self.give_norm(&head, &mut sink)?;
        for i in (self.lowest()..self.a.layers.len()).rev() {
            let kept = saved.pop().expect("one was kept of every layer");
            let g = self.layer_backward(i, kept, &mut dx)?;
            self.give_layer(&g, &mut sink)?;
        }
        self.give_vocabulary(&head, &dx, &mut sink)
    }
}

struct Collector<'c, 'a> {
    c: &'c Context<'a>,
    keep: &'c mut dyn FnMut(&str, Vec<f32>),
}

impl Sink for Collector<'_, '_> {
    fn take(&mut self, name: &str, w: &Weight, source: Source) -> Result<()> {
        let gpu = self.c.gpu;
        let narrow =
            |values: Vec<u16>| -> Vec<f32> { values.into_iter().map(|x| half::bf16::from_bits(x).to_f32()).collect() };
        let exact = self.c.by_factors(w, &source).is_some();
        let values = match source {
            // As it is updated: never rounded.
            Source::Product { product, .. } if exact => {
                let g = gpu.f32(w.rows * w.columns)?;
                product.fill(gpu, 0, w.rows, Output::f32(g.part(), w.columns))?;
                gpu.download(g.part(), w.rows * w.columns)?
            }
            Source::Parts { at_once, .. } | Source::Product { at_once, .. } => {
                let (mut all, mut source) = (Vec::new(), source);
                for first in (0..w.rows).step_by(at_once) {
                    let rows = at_once.min(w.rows - first);
                    let g = gpu.bf16(rows * w.columns)?;
                    source.fill(gpu, first, rows, g.part())?;
                    all.extend(narrow(gpu.download(g.part(), rows * w.columns)?));
                }
                all
            }
            Source::Whole(g) => {
                let all: Vec<f32> = match g.wide {
                    true => gpu.download(g.part, g.rows * g.columns)?,
                    false => narrow(gpu.download(g.part, g.rows * g.columns)?),
                };
                match g.map {
                    None => all,
                    Some(map) => {
                        let row = |&i: &i32| match usize::try_from(i) {
                            Ok(i) => all[i * g.columns..(i + 1) * g.columns].to_vec(),
                            Err(_) => vec![0.0; g.columns],
                        };
                        gpu.download::<i32>(map, w.rows)?.iter().flat_map(row).collect()
                    }
                }
            }
        };
        (self.keep)(name, values);
        Ok(())
    }
}

/// Updates tensors in the order in which they come, on a stream of their own where there is one: what they are made from is
/// held until the backward pass has followed.
pub(super) struct Updater<'u, 'a> {
    c: Context<'a>,
    /// Whose buffers gradients are, where that is another.
    main: Option<&'a Gpu>,
    layer: Option<LayerGradients>,
    head: Option<Head>,
    moments: &'u Moments,
    state: &'u mut OptimizerState,
    lr: f64,
    /// Place of each tensor in `verdicts` and `lasts`.
    places: HashMap<&'a str, (usize, Vec<u64>)>,
    verdicts: Buffer,
    lasts: Buffer,
    /// Whether a gradient held everything back, and the kernels' counters.
    halted: Buffer,
    done: Vec<(String, Form, usize)>,
    /// What is not yet begun: vectors, which are the last of them, and matrices, which are none of them yet.
    vectors: Vec<Vector>,
    tasks: Vec<(String, Form, usize, Task)>,
    /// How many of them may have changed their moments or weights, where their verdict lets them.
    begun: usize,
}

impl<'u, 'a> Updater<'u, 'a> {
    pub fn new(
        c: &Context<'a>,
        side: Option<&'a Gpu>,
        moments: &'u Moments,
        state: &'u mut OptimizerState,
        lr: f64,
    ) -> Result<Self> {
        let main = side.map(|_| c.gpu);
        let c = Context { gpu: side.unwrap_or(c.gpu), ..c.clone() };
        if let Some(main) = main {
            // Moments were made there.
            c.gpu.follow(main)?;
        }
        let tensors = c.a.tensors();
        let last = |name: &str| state.tensors.get(name).and_then(|t| t.last_norm).unwrap_or(-1.0);
        let lasts: Vec<f32> = tensors.iter().map(|(name, _)| last(name)).collect();
        let verdicts = c.gpu.zeros(4 * tensors.len() as u64)?;
        let (lasts, halted) = (c.gpu.upload(&lasts)?, c.gpu.zeros(4 * (1 + factored::COUNTERS as u64))?);
        let places = tensors.into_iter().enumerate().map(|(i, (name, shape))| (name, (i, shape))).collect();
        let (done, vectors, tasks, begun, layer, head) = (Vec::new(), Vec::new(), Vec::new(), 0, None, None);
        Ok(Updater {
            c,
            main,
            layer,
            head,
            moments,
            state,
            lr,
            places,
            verdicts,
            lasts,
            halted,
            done,
            vectors,
            tasks,
            begun,
        })
    }

    fn verdict(&self, place: usize) -> Verdict {
        let (halted, counter) = (self.halted.part(), self.halted.from(4));
        Verdict { verdict: self.verdicts.from(4 * place as u64), halted, counter }
    }

    /// Numbers of the optimizer, but for the rate, and what is kept of a weight.
    fn rates(&self) -> (Rates, f32) {
        let settings = self.c.settings;
        let rates = Rates {
            betas: (settings.betas[0] as f32, settings.betas[1] as f32),
            eps: settings.eps as f32,
            rate: 0.0,
            growth: settings.norm_growth_limit.unwrap_or(0.0) as f32,
        };
        (rates, (1.0 - self.lr * settings.weight_decay) as f32)
    }

    /// Begins the updates of vectors that wait.
    fn vectors(&mut self) -> Result<()> {
        self.begun = self.done.len();
        let (vectors, (rates, keep)) = (std::mem::take(&mut self.vectors), self.rates());
        let how = (self.c.settings.rounding == Rounding::Stochastic, keep);
        Ok(apollo::adam_vectors(self.c.gpu, &vectors, &rates, how, LIMIT, &self.verdict(0))?)
    }

    /// Begins the updates of matrices that wait.
    fn matrices(&mut self) -> Result<()> {
        self.vectors()?;
        let mut tasks = Vec::new();
        for (name, form, place, task) in std::mem::take(&mut self.tasks) {
            self.done.push((name, form, place));
            tasks.push(task);
        }
        self.begun = self.done.len();
        let (rates, keep) = self.rates();
        let (halted, counters, rank) = (self.halted.part(), self.halted.from(4), self.c.settings.rank());
        let shared = Shared { rank, rates: &rates, keep, limit: LIMIT, halted, counters };
        Ok(factored::update(self.c.gpu, &tasks, &shared)?)
    }

    /// What is asked from here on sees all that the backward pass has done.
    fn follow(&self) -> Result<()> {
        Ok(self.main.map_or(Ok(()), |main| self.c.gpu.follow(main))?)
    }

    /// What the backward pass asks for from here on comes after all updates so far, whose gradients' buffers it may have then.
    fn give_back(&mut self) -> Result<()> {
        self.main.map_or(Ok(()), |main| main.follow(self.c.gpu))?;
        (self.layer, self.head) = (None, None);
        Ok(())
    }

    pub fn norm(&mut self, head: &Head) -> Result<()> {
        self.follow()?;
        self.c.clone().give_norm(head, self)
    }

    pub fn layer(&mut self, g: LayerGradients) -> Result<()> {
        // The layer above, beside whose updates this one's gradients were made.
        self.give_back()?;
        self.follow()?;
        let done = self.c.clone().give_layer(&g, self);
        self.layer = Some(g);
        done
    }

    pub fn own_head(&mut self, head: Head) -> Result<()> {
        self.follow()?;
        let done = self.c.clone().give_own_head(&head, self);
        self.head = Some(head);
        // The largest of all buffers is not held for longer than it takes.
        done.and_then(|()| self.give_back())
    }

    pub fn own_embedding(&mut self, dx: &Stream) -> Result<()> {
        self.follow()?;
        self.c.clone().give_own_embedding(dx, self)
    }

    pub fn vocabulary(&mut self, head: Head, dx: &Stream) -> Result<()> {
        self.follow()?;
        let done = self.c.clone().give_vocabulary(&head, dx, self);
        self.head = Some(head);
        done
    }

    /// After an error: has anything been written, or may it have been? Waits for all.
    pub fn wrote(&self) -> bool {
        if self.begun == 0 {
            return false;
        }
        match self.c.gpu.download::<i32>(self.verdicts.part(), self.places.len()) {
            Ok(verdicts) => {
                // A gradient that is not finite holds all later ones back.
                let verdicts = self.done[..self.begun].iter().map(|(.., place)| verdicts[*place]);
                verdicts.take_while(|&v| v <= 1).any(|v| v == 0)
            }
            Err(_) => true,
        }
    }

    /// Waits for all, and notes what became of each tensor. Returns how many were left alone for a gradient of zeros.
    pub fn finish(&mut self) -> Result<usize> {
        let gpu = self.c.gpu;
        let count = self.places.len();
        let verdicts: Vec<i32> = gpu.download(self.verdicts.part(), count)?;
        let lasts: Vec<f32> = gpu.download(self.lasts.part(), count)?;
        if let Some((name, ..)) = self.done.iter().find(|(.., place)| verdicts[*place] > 1) {
            return Err(StepError::NotFinite { what: format!("gradient of {name}"), sample: None });
        }
        let mut untouched = 0;
        for (name, form, place) in self.done.drain(..) {
            if verdicts[place] == 0 {
                let fresh = || TensorState { form, steps: 0, last_norm: None, m: Vec::new(), v: Vec::new() };
                let tensor = self.state.tensors.entry(name).or_insert_with(fresh);
                tensor.steps += 1;
                tensor.last_norm = Some(lasts[place]).filter(|&x| x >= 0.0);
            } else {
                if !self.state.tensors.contains_key(&name) {
                    self.moments.forget(&name);
                }
                untouched += 1;
            }
        }
        self.begun = 0;
        Ok(untouched)
    }
}

impl Drop for Updater<'_, '_> {
    fn drop(&mut self) {
        // Buffers that were lent go back to their pool.
        if self.main.is_some() {
            let _ = self.c.gpu.wait();
        }
    }
}

impl Sink for Updater<'_, '_> {
    fn done(&mut self) -> Result<()> {
        // Vectors have their place behind what was done; matrices come after them.
        self.vectors()?;
        self.matrices()
    }

    fn take(&mut self, name: &str, w: &Weight, source: Source) -> Result<()> {
        let c = self.c.clone();
        let (gpu, settings) = (c.gpu, c.settings);
        let (place, shape) = self.places[name].clone();
        let form = form(settings, &shape);
        let steps = self.state.tensors.get(name).map_or(0, |t| t.steps);
        let pair = self.moments.of(name, moment_elements(form, &shape) as usize)?;
        let moments = (pair.m.part(), pair.v.part());
        let at = 4 * place as u64;
        let verdict = self.verdict(place);
        let random = Random::new(settings.seed, Purpose::Rounding, name, self.state.step);
        let (rates, keep) = self.rates();
        let how = Apply { stochastic: (settings.rounding == Rounding::Stochastic).then_some(&random), keep };
        // Bias correction, after everything else.
        let power = |beta: f64| 1.0 - beta.powf((steps + 1) as f64);
        let rate = self.lr * power(settings.betas[1]).sqrt() / power(settings.betas[0]);
        let rates = Rates { rate: rate as f32, ..rates };
        let (m, n) = (w.rows, w.columns);
        if let (Some(_), Source::Product { product, .. }) = (c.by_factors(w, &source), &source) {
            let numbers = Random::new(settings.seed, Purpose::Projection, name, steps / settings.proj_refresh);
            let rounding = how.stochastic.is_some().then_some(random);
            let (rate, last) = ((rate * settings.scale(m, n)) as f32, self.lasts.from(at));
            let (weight, gradient, verdict) = (*w, *product, verdict.verdict);
            let task = Task { weight, gradient, numbers, moments, rate, last, verdict, rounding };
            self.tasks.push((name.to_string(), form, place, task));
            return if self.tasks.len() == factored::TASKS { self.matrices() } else { Ok(()) };
        }
        if let (Form::Adam, Source::Whole(g)) = (form, &source)
            && let (1, true, true, None) = (m, n <= VECTOR, g.wide, g.map)
        {
            self.done.push((name.to_string(), form, place));
            self.vectors.push(Vector::new(w, g.part, moments, rates.rate, &random, verdict.verdict));
            return if self.vectors.len() == apollo::VECTORS { self.vectors() } else { Ok(()) };
        }
        self.vectors()?;
        self.done.push((name.to_string(), form, place));
        let mut pass = Pass::new(&c, w, source)?;

        let (rank, by_channel) = match form {
            Form::Adam => {
                let judge = Judge::new(gpu, &verdict, LIMIT, pass.channels(m), true)?;
                let squares = pass.squares(m)?;
                pass.each(|g, first| {
                    Ok(apollo::measure(gpu, g, true, first, None, squares.part(), Part::NONE, &judge)?)
                })?;
                self.begun = self.done.len();
                return pass.each(|g, first| Ok(apollo::adam(gpu, w, g, first, moments, &rates, &how, &verdict)?));
            }
            Form::Channel { rank } => (rank, true),
            Form::Tensor { rank } => (rank, false),
        };

        let (tall, channels) = (m >= n, m.max(n));
        let random_p = Random::new(settings.seed, Purpose::Projection, name, steps / settings.proj_refresh);
        let projection = apollo::projection(gpu, &random_p, m.min(n), rank, tall)?;
        let width = if rank > 1 { 2 * rank } else { 1 };
        let (mut squares, mut projected) = (pass.squares(channels)?, gpu.f32(width * pass.channels(channels))?);
        let judge = Judge::new(gpu, &verdict, LIMIT, pass.channels(channels), tall)?;
        pass.each(|g, first| {
            let (s, r) = (squares.part(), projected.part());
            Ok(apollo::measure(gpu, g, tall, first, Some(&projection), s, r, &judge)?)
        })?;
        if let Some(map) = pass.map() {
            // Measured by the rows that there are; channels without one have zeros.
            let (s, r) = (gpu.f32(m)?, gpu.f32(m * width)?);
            apollo::spread(gpu, squares.part(), map, m, 1, s.part())?;
            apollo::spread(gpu, projected.part(), map, m, width, r.part())?;
            (squares, projected) = (s, r);
        }
        self.begun = self.done.len();
        let rates = Rates { rate: (rate * settings.scale(m, n)) as f32, ..rates };
        let (factors, gain) = (gpu.f32(channels)?, gpu.f32(1)?);
        let sizes = (channels, rank, tall, by_channel);
        let results = (factors.part(), gain.part());
        let last = self.lasts.from(at);
        apollo::factors(gpu, sizes, projected.part(), squares.part(), moments, &rates, last, results, &verdict)?;
        drop((squares, projected, projection));
        let factors = if tall { Factors::Rows(factors.part()) } else { Factors::Columns(factors.part()) };
        pass.each(|g, first| Ok(apollo::apply(gpu, w, g, first, factors, gain.part(), &how, &verdict)?))
    }
}

/// Passes over one tensor's gradient, some rows at a time.
struct Pass<'p, 's> {
    c: &'p Context<'p>,
    w: Weight,
    source: Source<'s>,
    buffer: Option<Buffer>,
    filled: bool,
}

impl<'p, 's> Pass<'p, 's> {
    fn new(c: &'p Context<'_>, w: &Weight, source: Source<'s>) -> Result<Pass<'p, 's>> {
        let buffer = source.at_once().map(|rows| c.gpu.bf16(rows.min(w.rows) * w.columns)).transpose()?;
        Ok(Pass { c, w: *w, source, buffer, filled: false })
    }

    fn map(&self) -> Option<Part> {
        match &self.source {
            Source::Whole(g) => g.map,
            Source::Parts { .. } | Source::Product { .. } => None,
        }
    }

    /// How many of `channels` are measured: with a map, those that have a row.
    fn channels(&self, channels: usize) -> usize {
        match &self.source {
            Source::Whole(g) if g.map.is_some() => g.rows,
            _ => channels,
        }
    }

    fn squares(&self, channels: usize) -> Result<Buffer> {
        Ok(self.c.gpu.f32(self.channels(channels))?)
    }

    /// Calls `f` with each part and its first row. A gradient in one part is made once.
    fn each(&mut self, mut f: impl FnMut(&Gradient, usize) -> Result<()>) -> Result<()> {
        match (self.source.at_once(), &self.buffer, &self.source) {
            (Some(at_once), Some(buffer), _) => {
                let one = at_once >= self.w.rows;
                for first in (0..self.w.rows).step_by(at_once) {
                    let rows = at_once.min(self.w.rows - first);
                    if !(one && self.filled) {
                        self.source.fill(self.c.gpu, first, rows, buffer.part())?;
                    }
                    f(&Gradient::new(buffer.part(), false, rows, self.w.columns), first)?;
                }
                self.filled = true;
                Ok(())
            }
            (_, _, Source::Whole(g)) => f(g, 0),
            _ => unreachable!("made with a buffer"),
        }
    }
}
