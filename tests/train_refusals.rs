//! What does not train is refused by name before anything is touched, and a step writes only where it may.

mod train_support;

use parking_lot::Mutex;
use serde_json::{Value, json};
use std::ops::Range;
use std::sync::Arc;
use train_support::{golden_memory, to_bytes};
use weightfs::image::ImageError;
use weightfs::model::Dtype;
use weightfs::train::{
    Architecture, Batch, Config, InMemory, Model, Settings, Step, StepError, TensorSpec, Tokens, Trainer, Weights,
};

const CONFIG: &str = include_str!("goldens/llama.json");

fn with(changes: Value) -> String {
    let mut config: Value = serde_json::from_str(CONFIG).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config.to_string()
}

#[test]
fn families_and_options_that_do_not_train_are_named() {
    for (changes, words) in [
        (json!({"model_type": "gemma3_text"}), vec!["'gemma3_text'", "llama, mistral, qwen2, qwen3"]),
        (json!({"model_type": null}), vec!["(none)"]),
        (json!({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}), vec!["llama", "'dynamic'", "'yarn'"]),
        (
            json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
            vec!["partial_rotary_factor 0.5"],
        ),
        (json!({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}), vec!["low_freq_factor"]),
        (json!({"hidden_act": "gelu"}), vec!["'gelu'", "'silu'"]),
        (json!({"quantization_config": {"quant_method": "fp8"}}), vec!["fp8", "BF16"]),
        (
            json!({"model_type": "qwen3", "layer_types": ["full_attention", "linear_attention"]}),
            vec!["qwen3", "linear_attention"],
        ),
        (json!({"hidden_size": null}), vec!["hidden_size"]),
        (json!({"hidden_size": "16"}), vec!["hidden_size", "not a count"]),
        (json!({"num_key_value_heads": 3}), vec!["num_key_value_heads 3"]),
        // Would take all memory before a tensor is looked at.
        (json!({"num_hidden_layers": 1_000_000_000}), vec!["num_hidden_layers is 1000000000", "100 tensors"]),
        (json!({"model_type": "qwen3", "num_hidden_layers": 1_000_000_000}), vec!["num_hidden_layers is 1000000000"]),
        (json!({"head_dim": 1_000_000_000_000u64}), vec!["head_dim is 1000000000000"]),
    ] {
        let error = Architecture::within(&Config::parse(&with(changes.clone())).unwrap(), 100).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{changes}: {error}");
        }
    }
}

#[test]
fn tensors_that_are_missing_or_differ_are_named() {
    let (architecture, _) = golden_memory(CONFIG, Dtype::BF16);
    let made = |change: &dyn Fn(&str, TensorSpec) -> Option<TensorSpec>| {
        let tensors = architecture.tensors().into_iter().filter_map(|(name, shape)| {
            let spec = change(name, TensorSpec { dtype: Dtype::BF16, shape })?;
            let bytes = vec![0; spec.elements() as usize * 2];
            Some((name.to_string(), spec, bytes))
        });
        let weights = Arc::new(InMemory::new(tensors));
        Model::new(architecture.clone(), weights).err().map(|e| e.to_string())
    };
    let norm = "model.layers.1.input_layernorm.weight";
    assert_eq!(made(&|_, spec| Some(spec)), None);
    let error = made(&|name, spec| (name != norm).then_some(spec)).unwrap();
    assert!(error.contains(norm) && error.contains("do not have it"), "{error}");
    let error = made(&|name, spec| Some(if name == norm { TensorSpec { shape: vec![17], ..spec } } else { spec }));
    assert!(error.as_ref().unwrap().contains("[17]") && error.unwrap().contains("[16]"));
    let fp8 = |name: &str, spec| Some(if name == norm { TensorSpec { dtype: Dtype::F8_E4M3, ..spec } } else { spec });
    assert!(made(&fp8).unwrap().contains("does not train"));
}

/// Weights that note what is done to them, and can fail.
struct Watched {
    inner: Arc<InMemory>,
    log: Arc<Mutex<Vec<&'static str>>>,
    fail_write: Option<usize>,
}

impl Watched {
    fn note(&self, what: &'static str) {
        let mut log = self.log.lock();
        if log.last() != Some(&what) || what == "write" {
            log.push(what);
        }
    }
}

impl Weights for Watched {
    fn tensor(&self, name: &str) -> Option<TensorSpec> {
        self.inner.tensor(name)
    }

    fn read_rows(&self, name: &str, rows: Range<u64>, dst: &mut [u8]) -> Result<(), ImageError> {
        self.inner.read_rows(name, rows, dst)
    }

    fn write_rows(&self, name: &str, rows: Range<u64>, src: &[u8]) -> Result<(), ImageError> {
        self.note("write");
        if self.fail_write == Some(self.log.lock().iter().filter(|&&l| l == "write").count()) {
            return Err(ImageError::EngineGone("it was killed".into()));
        }
        self.inner.write_rows(name, rows, src)
    }

    fn begin_step(&self) -> Result<Box<dyn Step + '_>, ImageError> {
        self.note("begin step");
        Ok(Box::new(WatchedStep(self)))
    }
}

struct WatchedStep<'a>(&'a Watched);

impl Step for WatchedStep<'_> {
    fn begin_update(&mut self) -> Result<(), ImageError> {
        self.0.note("begin update");
        Ok(())
    }

    fn finish(self: Box<Self>, step: u64) -> Result<(), ImageError> {
        assert_eq!(step, 1);
        self.0.note("finish");
        Ok(())
    }

    fn withdraw(self: Box<Self>) {}
}

fn trainer(fail_write: Option<usize>, change: impl Fn(&InMemory)) -> (Trainer, Arc<Mutex<Vec<&'static str>>>) {
    let (architecture, inner) = golden_memory(CONFIG, Dtype::BF16);
    change(&inner);
    let log = Arc::default();
    let weights = Watched { inner, log: Arc::clone(&log), fail_write };
    (Trainer::new(Model::new(architecture, Arc::new(weights)).unwrap(), Default::default()), log)
}

fn step(trainer: &mut Trainer, settings: &Settings) -> Result<weightfs::train::StepReport, StepError> {
    trainer.step(&Batch::pack([(1, &Tokens::new(vec![1, 2], vec![3, 4]))]), settings, 1e-3)
}

#[test]
fn weights_are_written_inside_the_update_alone_and_each_once() {
    let (mut trainer, log) = trainer(None, |_| {});
    step(&mut trainer, &Settings { rank: Some(4), ..Settings::default() }).unwrap();
    let log = log.lock();
    let tensors = trainer.model.architecture.tensors().len();
    assert_eq!(log[..2], ["begin step", "begin update"]);
    assert_eq!(log[2..log.len() - 1], vec!["write"; tensors]);
    assert_eq!(log[log.len() - 1], "finish");
}

#[test]
fn tensors_that_the_job_does_not_name_are_not_written() {
    let (mut trainer, log) = trainer(None, |_| {});
    let settings =
        Settings { trainable: Some(vec!["*.1.mlp.*".into(), "model.norm.weight".into()]), ..Settings::default() };
    step(&mut trainer, &settings).unwrap();
    assert_eq!(log.lock().iter().filter(|&&l| l == "write").count(), 4);
    let names: Vec<String> = trainer.state.lock().tensors.keys().cloned().collect();
    assert!(names.iter().all(|n| settings.trains(n)) && names.len() == 4, "{names:?}");
}

#[test]
fn a_bad_step_never_begins_its_update() {
    let (mut trainer, log) = trainer(None, |weights| {
        let spec = weights.tensor("model.norm.weight").unwrap();
        let bytes = to_bytes(Dtype::BF16, &[f32::NAN; 16]);
        weights.write_rows("model.norm.weight", 0..spec.shape[0], &bytes).unwrap();
    });
    assert!(matches!(step(&mut trainer, &Settings::default()), Err(StepError::NotFinite { .. })));
    assert_eq!(*log.lock(), ["begin step"]);
}

#[test]
fn a_step_whose_loss_is_below_the_jobs_limit_is_not_taken() {
    let (mut trainer, log) = trainer(None, |_| {});
    let report = step(&mut trainer, &Settings { min_loss: 1e9, ..Settings::default() }).unwrap();
    assert!(!report.taken && trainer.state.lock().step == 0);
    assert_eq!(*log.lock(), ["begin step"]);
}

#[test]
fn memory_that_fails_in_the_middle_of_an_update_is_told_as_a_torn_step() {
    let (mut trainer, log) = trainer(Some(5), |_| {});
    let error = step(&mut trainer, &Settings::default()).unwrap_err();
    assert!(matches!(error, StepError::Torn { step: 1, .. }), "{error}");
    assert!(error.to_string().contains("roll back"), "{error}");
    assert!(!log.lock().contains(&"finish"));
}
