//! Jobs through the queue: they train, wait, stop between steps, and fail without having touched a weight.

mod train_support;

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use train_support::{golden_memory, to_bytes};
use weightfs::image::ImageError;
use weightfs::model::Dtype;
use weightfs::train::queue::Options;
use weightfs::train::{
    InMemory, JobRecord, JobState, Model, OptimizerState, Queue, QueueError, Step, TensorSpec, TextModel, Weights,
};

const CONFIG: &str = include_str!("goldens/qwen3_tied.json");
const JOB: &str = r#"{"samples": [{"context_ids": [1, 2, 3], "continuation_ids": [4, 5, 6]},
                                  {"continuation_ids": [7, 8, 9, 10]}],
                      "config": {"lr": 1e-3, "rank": 4, "epochs": 40, "step_tokens": 1}}"#;

struct Rig {
    weights: Arc<InMemory>,
    queue: Queue,
}

fn rig(options: Options) -> Rig {
    let (architecture, weights) = golden_memory(CONFIG, Dtype::BF16);
    let model = Model::new(architecture, weights.clone()).unwrap();
    let text = TextModel::default();
    Rig { weights, queue: Queue::start(model, text, Default::default(), options).unwrap() }
}

fn wait(queue: &Queue, id: u64, until: impl Fn(&JobRecord) -> bool) -> JobRecord {
    let start = Instant::now();
    loop {
        let job = queue.job(id).unwrap();
        if until(&job) {
            return job;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "{job:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Until the step that was under way at a pause is over.
fn stands_still(queue: &Queue) {
    let start = Instant::now();
    while !queue.stands_still() {
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", queue.status());
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn ended(job: &JobRecord) -> bool {
    !matches!(job.state, JobState::Queued | JobState::Running)
}

fn all_bytes(weights: &InMemory) -> Vec<Vec<u8>> {
    weights.names().map(|n| weights.bytes(n).unwrap()).collect()
}

#[test]
fn a_job_runs_and_its_loss_falls() {
    let rig = rig(Options::default());
    let id = rig.queue.submit(JOB, "test").unwrap();
    let job = wait(&rig.queue, id, ended);
    assert_eq!((job.state, job.steps, job.steps_done, job.error.clone()), (JobState::Finished, 80, 80, None));
    assert_eq!(job.losses.len(), 80);
    assert!(job.losses[78] < 0.5 * job.losses[0], "{} to {}", job.losses[0], job.losses[78]);
    assert_eq!((job.tokens, job.trained_tokens), (40 * (5 + 3), 40 * (3 + 3)));
    assert_eq!((job.first_step, job.last_step, rig.weights.step()), (0, 80, 80));
    assert_eq!(rig.queue.state().lock().step, 80);
    // JSON keeps every digit but, at times, the last of an f64.
    let job = JobRecord { seconds: 0.5, ..job };
    let kept: JobRecord = serde_json::from_str(&serde_json::to_string(&job).unwrap()).unwrap();
    assert_eq!(kept, job);
}

/// Weights that somebody reads whenever an update is to begin.
struct Read(Arc<InMemory>);

const READING: Duration = Duration::from_millis(100);

impl Weights for Read {
    fn tensor(&self, name: &str) -> Option<TensorSpec> {
        self.0.tensor(name)
    }

    fn read_rows(&self, name: &str, rows: Range<u64>, dst: &mut [u8]) -> Result<(), ImageError> {
        self.0.read_rows(name, rows, dst)
    }

    fn write_rows(&self, name: &str, rows: Range<u64>, src: &[u8]) -> Result<(), ImageError> {
        self.0.write_rows(name, rows, src)
    }

    fn begin_step(&self) -> Result<Box<dyn Step + '_>, ImageError> {
        Ok(Box::new(ReadStep(self.0.begin_step()?)))
    }
}

struct ReadStep<'a>(Box<dyn Step + 'a>);

impl Step for ReadStep<'_> {
    fn begin_update(&mut self) -> Result<(), ImageError> {
        std::thread::sleep(READING);
        self.0.begin_update()
    }

    fn finish(self: Box<Self>, step: u64) -> Result<(), ImageError> {
        self.0.finish(step)
    }

    fn withdraw(self: Box<Self>) {
        self.0.withdraw();
    }
}

#[test]
fn what_a_step_waits_for_readers_is_not_its_time() {
    let (architecture, weights) = golden_memory(CONFIG, Dtype::BF16);
    let model = Model::new(architecture, Arc::new(Read(weights))).unwrap();
    let queue = Queue::start(model, TextModel::default(), Default::default(), Options::default()).unwrap();
    let start = Instant::now();
    let id = queue.submit(&JOB.replace("40", "5"), "test").unwrap();
    let job = wait(&queue, id, ended);
    // Of all the time that passed, at least this much was waiting.
    let rest = start.elapsed() - 10 * READING;
    assert_eq!((job.state, job.steps_done), (JobState::Finished, 10));
    assert!(job.seconds > 0.0 && job.seconds <= rest.as_secs_f64(), "{} of {rest:?}", job.seconds);
}

#[test]
fn jobs_wait_are_cancelled_and_paused_between_steps() {
    let rig = rig(Options::default());
    rig.queue.pause();
    let long = JOB.replace("40", "100000");
    let first = rig.queue.submit(&long, "test").unwrap();
    let second = rig.queue.submit(&long, "test").unwrap();
    let third = rig.queue.submit(JOB, "test").unwrap();
    assert_eq!((first, second, third), (1, 2, 3));
    stands_still(&rig.queue);
    assert_eq!(rig.queue.status().queued.len(), 3, "a paused queue begins nothing");
    rig.queue.cancel(second).unwrap();
    assert_eq!(rig.queue.job(second).unwrap().state, JobState::Cancelled);
    rig.queue.resume();
    wait(&rig.queue, first, |job| job.steps_done >= 3);
    rig.queue.pause();
    stands_still(&rig.queue);
    let held = rig.queue.job(first).unwrap().steps_done;
    let (bytes, step) = (all_bytes(&rig.weights), rig.weights.step());
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(rig.queue.job(first).unwrap().steps_done, held);
    assert_eq!((all_bytes(&rig.weights), rig.weights.step()), (bytes, step));
    rig.queue.cancel(first).unwrap();
    rig.queue.resume();
    let job = wait(&rig.queue, first, ended);
    assert_eq!((job.state, job.steps_done), (JobState::Cancelled, held));
    assert_eq!(wait(&rig.queue, third, ended).state, JobState::Finished);
    assert_eq!(rig.queue.cancel(third), Err(QueueError::NoSuchJob(3)));
    assert_eq!(rig.queue.cancel(99), Err(QueueError::NoSuchJob(99)));
}

#[test]
fn jobs_that_cannot_run_are_refused_by_name_and_touch_nothing() {
    let rig = rig(Options::default());
    let before = all_bytes(&rig.weights);
    for (job, word) in [
        (
            r#"{"samples": [{"continuation_ids": [1, 2]}, {"continuation_ids": [1, 32]}]}"#,
            "sample 2: continuation id 1 is 32",
        ),
        (r#"{"samples": [{"context_ids": [1, 2], "continuation_ids": []}]}"#, "sample 1: its continuation is empty"),
        (r#"{"samples": [{"continuation_ids": [1]}]}"#, "sample 1: it has one token"),
        (r#"{"samples": [{"text": "a"}]}"#, "sample 1: the model has no tokenizer.json"),
        (r#"{"samples": [{"continuation_ids": [1, 2]}], "config": {"rank": 17}}"#, "16 at most"),
        (r#"{"samples": [{"continuation_ids": [1, 2]}], "config": {"rank": 4, "trainable": ["*.mpl.*"]}}"#, "*.mpl.*"),
        (r#"{"samples": [{"continuation_ids": [1, 2]}], "config": {"rank": 4, "lr": -1}}"#, "config.lr"),
        (r#"{"samples": [{"continuation_ids": [1, 2, 3]}], "config": {"rank": 4, "max_length": 2}}"#, "limit of 2"),
        (
            r#"{"samples": [{"continuation_ids": [1, 2]}, {"continuation_ids": [3, 4]}],
                "config": {"rank": 4, "step_tokens": 1, "epochs": 9223372036854775808}}"#,
            "config.epochs",
        ),
    ] {
        let error = rig.queue.submit(job, "test").expect_err(job).to_string();
        assert!(error.contains(word), "{job}: {error}");
    }
    let long = format!(r#"{{"samples": [{{"continuation_ids": {:?}}}], "config": {{"rank": 4}}}}"#, vec![1; 65]);
    assert!(rig.queue.submit(&long, "test").unwrap_err().to_string().contains("65 tokens, more than the limit of 64"));
    assert_eq!(all_bytes(&rig.weights), before);
    assert_eq!(rig.queue.status().history, []);
}

#[test]
fn a_job_that_does_not_fit_is_refused_with_the_figure() {
    let rig = rig(Options { free_memory: || 100_000_000, ..Options::default() });
    assert!(rig.queue.submit(JOB, "test").is_ok());
    let rig = self::rig(Options { free_memory: || 1_000, ..Options::default() });
    let error = rig.queue.submit(JOB, "test").unwrap_err();
    assert!(matches!(&error, QueueError::NoMemory { needs, .. } if needs.ends_with("MB")), "{error}");
}

/// Overwrites values of a tensor, and runs a job that must fail at its first step without a trace.
type Change<'a> = &'a dyn Fn(usize, f32) -> f32;

fn fails_without_a_trace(changes: &[(&str, Change)]) -> String {
    let rig = rig(Options::default());
    for (tensor, change) in changes {
        let spec = rig.weights.tensor(tensor).unwrap();
        let old = rig.weights.bytes(tensor).unwrap();
        let value = |(i, b): (usize, &[u8])| change(i, half::bf16::from_le_bytes([b[0], b[1]]).to_f32());
        let new: Vec<f32> = old.chunks_exact(2).enumerate().map(value).collect();
        rig.weights.write_rows(tensor, 0..spec.shape[0], &to_bytes(Dtype::BF16, &new)).unwrap();
    }
    let before = all_bytes(&rig.weights);
    let id = rig.queue.submit(JOB, "test").unwrap();
    let job = wait(&rig.queue, id, ended);
    assert_eq!((job.state, job.steps_done), (JobState::Failed, 0));
    let error = job.error.unwrap();
    assert!(error.contains("not finite"), "{error}");
    assert_eq!(all_bytes(&rig.weights), before, "{error}");
    assert_eq!(*rig.queue.state().lock(), OptimizerState::default(), "{error}");
    error
}

#[test]
fn a_weight_that_is_not_finite_stops_the_job_and_names_the_sample() {
    for (tensor, value) in [
        ("model.layers.1.mlp.up_proj.weight", f32::NAN),
        ("model.layers.0.self_attn.k_proj.weight", f32::INFINITY),
        ("model.norm.weight", f32::NAN),
        ("model.layers.0.post_attention_layernorm.weight", 1e38),
    ] {
        let error = fails_without_a_trace(&[(tensor, &|i, old| if i == 0 { value } else { old })]);
        assert!(error.contains("of sample 1 is"), "{tensor}: {error}");
    }
}

/// A norm of 1e30 before matrices of 1e-30: the forward pass sees nothing odd, but the matrices' gradients do not fit.
#[test]
fn a_gradient_that_overflows_stops_the_job_though_the_loss_is_fine() {
    let small: Change = &|_, old| old * 1e-30;
    let error = fails_without_a_trace(&[
        ("model.layers.0.post_attention_layernorm.weight", &|_, old| old * 1e30),
        ("model.layers.0.mlp.gate_proj.weight", small),
        ("model.layers.0.mlp.up_proj.weight", small),
    ]);
    assert!(error.contains("gradient of gate_proj of layer 0"), "{error}");
}

#[test]
fn jobs_of_a_former_life_are_shown_and_those_cut_say_so() {
    let rig = rig(Options::default());
    let id = rig.queue.submit(JOB, "test").unwrap();
    let mut cut = wait(&rig.queue, id, ended);
    cut.state = JobState::Running;
    let rig = self::rig(Options { history: vec![cut], ..Options::default() });
    assert_eq!(rig.queue.job(id).unwrap().state, JobState::Cut);
    assert_eq!(rig.queue.submit(JOB, "test").unwrap(), id + 1);
}

/// Fifty steps, a new queue on the saved state, fifty more: the bits of a hundred. And those of one thread and of two.
#[test]
fn restarts_and_threads_change_no_bit() {
    let job = JOB.replace("\"epochs\": 40", "\"epochs\": 25");
    let train = |queue: &Queue| {
        let id = queue.submit(&job, "test").unwrap();
        assert_eq!(wait(queue, id, ended).state, JobState::Finished);
    };
    let whole = rig(Options { threads: 1, ..Options::default() });
    train(&whole.queue);
    train(&whole.queue);
    let Rig { weights, queue } = rig(Options { threads: 2, ..Options::default() });
    train(&queue);
    let saved = queue.state().lock().to_safetensors();
    drop(queue);
    let (architecture, _) = golden_memory(CONFIG, Dtype::BF16);
    let model = Model::new(architecture, weights.clone()).unwrap();
    let state = Arc::new(parking_lot::Mutex::new(OptimizerState::from_safetensors(&saved).unwrap()));
    let queue = Queue::start(model, TextModel::default(), state, Options { threads: 3, ..Options::default() }).unwrap();
    train(&queue);
    assert!(all_bytes(&weights) == all_bytes(&whole.weights), "the weights differ");
    assert!(*queue.state().lock() == *whole.queue.state().lock(), "the optimizer states differ");
}
