//! The optimizer: against the equations in float64 (`tests/goldens/make_apollo.py`), with the same projections made twice;
//! what a zero gradient, a restart, and another number of threads may not change.

mod train_support;

use safetensors::SafeTensors;
use std::path::Path;
use train_support::{floats, relative_error, splitmix64, to_bytes};
use weightfs::model::Dtype;
use weightfs::train::apollo::{Updater, projection};
use weightfs::train::gradients::Gradient;
use weightfs::train::state::Form;
use weightfs::train::{InMemory, Optimizer, OptimizerState, Rounding, Settings, TensorSpec, Weights};

fn golden(name: &str) -> Vec<f32> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/apollo.safetensors");
    floats(SafeTensors::deserialize(&std::fs::read(path).unwrap()).unwrap().tensor(name).unwrap().data())
}

fn hashed(start: u64, count: usize, scale: f32) -> Vec<f32> {
    (0..count as u64).map(|i| (2.0 * (splitmix64(start + i) >> 56) as f32 - 255.0) * scale).collect()
}

fn gradient(step: u64, count: usize) -> Vec<f32> {
    let scale = if step == 7 { 0.0 } else { 2f32.powi(-12 + (step * step % 7) as i32) };
    hashed(1_000_000 * (step + 1), count, scale)
}

/// Trains one tensor on its hashed gradients.
struct Run {
    name: &'static str,
    shape: [usize; 2],
    settings: Settings,
    weights: InMemory,
    state: OptimizerState,
    updater: Updater,
}

impl Run {
    fn new(name: &'static str, shape: [usize; 2], dtype: Dtype, settings: Settings) -> Run {
        let bytes = to_bytes(dtype, &hashed(0, shape[0] * shape[1], 2f32.powi(-9)));
        let spec = TensorSpec { dtype, shape: shape.map(|n| n as u64).to_vec() };
        let weights = InMemory::new([(name.to_string(), spec, bytes)]);
        let settings = Settings { proj_refresh: 30, ..settings };
        Run { name, shape, settings, weights, state: OptimizerState::default(), updater: Updater::default() }
    }

    fn steps(&mut self, steps: std::ops::Range<u64>) {
        for step in steps {
            let [m, n] = self.shape;
            let g = gradient(step, m * n);
            let gradient = Gradient::dense(m, n, &g);
            let lr = self.settings.lr;
            let updated =
                self.updater.update(&self.weights, self.name, &gradient, &self.settings, lr, &mut self.state).unwrap();
            assert_eq!(updated, step != 7);
            self.state.step += 1;
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.weights.bytes(self.name).unwrap()
    }
}

fn settings(rank: usize, weight_decay: f64) -> Settings {
    Settings { lr: 1e-2, rank: Some(rank), weight_decay, ..Settings::default() }
}

fn cases() -> [(&'static str, [usize; 2], Settings); 5] {
    let mini = Settings { optimizer: Optimizer::ApolloMini, ..settings(1, 0.0) };
    let no_limit = Settings { norm_growth_limit: None, betas: [0.8, 0.99], ..settings(3, 0.0) };
    [
        ("tall", [24, 10], settings(4, 0.1)),
        ("wide", [10, 24], Settings { scale: Some(2.0), ..settings(4, 0.0) }),
        ("mini", [16, 16], mini),
        ("no_limit", [12, 20], no_limit),
        ("small", [3, 20], settings(4, 0.1)),
    ]
}

#[test]
fn a_hundred_steps_follow_the_equations() {
    for (name, shape, settings) in cases() {
        let mut run = Run::new(name, shape, Dtype::F32, settings);
        let before = floats(&run.bytes());
        run.steps(0..100);
        let (got, want) = (floats(&run.bytes()), golden(name));
        let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{name}: worst element {worst}, moved by {}", relative_error(&want, &before));
        assert!(worst < 1e-5, "{name}: {worst}");
        assert!(relative_error(&want, &before) > 0.1, "{name} hardly moved, which tests nothing");
    }
}

#[test]
fn projections_are_those_of_another_implementation_to_the_bit() {
    let settings = Settings { proj_refresh: 30, ..Settings::default() };
    let got = projection(&settings, "tall", 2 * 30, 1024, 4);
    assert_eq!(got, golden("projection"));
}

#[test]
fn a_zero_gradient_leaves_weight_and_state_alone() {
    for (name, shape, settings) in cases() {
        let mut run = Run::new(name, shape, Dtype::BF16, settings);
        run.steps(0..7);
        let (bytes, state) = (run.bytes(), run.state.tensors.clone());
        run.steps(7..8);
        assert_eq!(run.bytes(), bytes, "{name}");
        assert_eq!(run.state.tensors, state, "{name}");
    }
}

#[test]
fn fifty_steps_a_restart_and_fifty_more_are_a_hundred_steps_to_the_bit() {
    for (name, shape, settings) in cases() {
        let mut whole = Run::new(name, shape, Dtype::BF16, settings.clone());
        whole.steps(0..100);
        let mut first = Run::new(name, shape, Dtype::BF16, settings.clone());
        first.steps(0..50);
        let mut second = Run::new(name, shape, Dtype::BF16, settings);
        second.weights.write_rows(name, 0..shape[0] as u64, &first.bytes()).unwrap();
        second.state = OptimizerState::from_safetensors(&first.state.to_safetensors()).unwrap();
        second.steps(50..100);
        assert_eq!(whole.bytes(), second.bytes(), "{name}");
        assert_eq!(whole.state, second.state, "{name}");
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    // Large enough for several tasks of every kind.
    for (shape, optimizer) in [([700, 300], Optimizer::Apollo), ([300, 700], Optimizer::ApolloMini)] {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut run = Run::new("w", shape, Dtype::BF16, Settings { optimizer, lr: 1e-3, ..Settings::default() });
            pool.install(|| run.steps(0..3));
            (run.bytes(), run.state)
        };
        let one = run(1);
        assert_eq!(one, run(2));
        assert_eq!(one, run(3));
    }
}

/// The mean of many runs that differ in their seed alone is the unrounded result: every element's mean lies within five
/// standard errors, and nearest rounding, which loses the whole update here, does not.
#[test]
fn stochastic_rounding_is_unbiased_and_nearest_is_not() {
    let shape = [8, 16];
    let train = |rounding, seed, dtype| {
        let settings = Settings { rounding, seed, lr: 2e-6, weight_decay: 0.0, rank: Some(32), ..Settings::default() };
        let mut run = Run::new("w", shape, dtype, settings); // rank above 8: Adam, whose path no seed changes
        run.steps(0..5);
        assert_eq!(run.state.tensors["w"].form, Form::Adam);
        run.bytes()
    };
    let exact = floats(&train(Rounding::Stochastic, 0, Dtype::F32));
    let start = hashed(0, 128, 2f32.powi(-9));
    let widen = |b: Vec<u8>| -> Vec<f64> {
        b.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect()
    };
    assert!(widen(train(Rounding::Nearest, 0, Dtype::BF16)).iter().zip(&start).all(|(a, &b)| *a == b as f64));
    const RUNS: u64 = 40_000; // one standard error of all elements together is then 0.7 %
    let (mut sum, mut squares) = ([0.0f64; 128], [0.0f64; 128]);
    for seed in 0..RUNS {
        for (i, x) in widen(train(Rounding::Stochastic, seed, Dtype::BF16)).into_iter().enumerate() {
            let moved = x - start[i] as f64;
            sum[i] += moved;
            squares[i] += moved * moved;
        }
    }
    let mut total = (0.0, 0.0);
    for i in 0..128 {
        let mean = sum[i] / RUNS as f64;
        let error = ((squares[i] / RUNS as f64 - mean * mean) / RUNS as f64).sqrt();
        let want = exact[i] as f64 - start[i] as f64;
        assert!((mean - want).abs() < 5.0 * error + 1e-9, "element {i}: {mean} for {want}, standard error {error}");
        total = (total.0 + mean * want.signum(), total.1 + want.abs());
    }
    println!("all elements together: {:.4} of the exact update", total.0 / total.1);
    assert!((total.0 / total.1 - 1.0).abs() < 0.03);
}

#[test]
fn state_of_another_rank_starts_anew() {
    let mut run = Run::new("tall", [24, 10], Dtype::BF16, settings(4, 0.0));
    run.steps(0..5);
    run.settings.rank = Some(2);
    run.steps(5..6);
    let tensor = &run.state.tensors["tall"];
    assert_eq!((tensor.form, tensor.steps, tensor.m.len()), (Form::Channel { rank: 2 }, 1, 48));
}
