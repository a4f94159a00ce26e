//! Qwen3.5 as a whole: a hundred steps beside transformers, samples that share a step, what is left alone, what is refused.
//! Its forward and backward passes are in train_goldens.rs.

mod train_support;

use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use train_support::{floats, golden_memory, golden_model, golden_weights, relative_error, to_bytes};
use weightfs::model::Dtype;
use weightfs::train::queue::Options;
use weightfs::train::{
    Architecture, Batch, Config, InMemory, JobState, Model, Queue, Settings, TensorSpec, TextModel, Tokens, Trainer,
};

const TEXT: &str = include_str!("goldens/qwen3_5.json");
const VISION: &str = include_str!("goldens/qwen3_5_vision_tied.json");

fn golden(file: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(file)).unwrap()
}

/// The golden's sequence.
fn ids() -> Vec<u32> {
    let file = golden("qwen3_5.safetensors");
    let ids = SafeTensors::deserialize(&file).unwrap().tensor("ids").unwrap().data().to_vec();
    ids.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn a_hundred_steps_lose_what_transformers_loses() {
    let (architecture, weights) = golden_memory(TEXT, Dtype::F32);
    let mut trainer = Trainer::new(Model::new(architecture, weights).unwrap(), Default::default());
    let context = serde_json::from_str::<serde_json::Value>(TEXT).unwrap()["context_length"].as_u64().unwrap() as usize;
    let settings = Settings { rank: Some(4), proj_refresh: 30, weight_decay: 0.01, ..Settings::default() };
    let whole = Tokens::new(vec![], ids());
    let end = Tokens::new(ids()[..context].to_vec(), ids()[context..].to_vec());
    let file = golden("qwen3_5_curve.safetensors");
    let read = |name: &str| floats(SafeTensors::deserialize(&file).unwrap().tensor(name).unwrap().data());
    let (want, nudged) = (read("losses"), read("nudged"));
    // Two walks that differ by rounding part ever faster. How fast is what transformers' own walk from weights that differ
    // by a millionth says; ours may part from it five times as far.
    let off = |a: f64, b: f32| (a / b as f64 - 1.0).abs();
    let (mut apart, mut worst) = (0.0f64, 0.0f64);
    for (step, (&want, &nudged)) in want.iter().zip(&nudged).enumerate() {
        let batch = Batch::pack([(0, if step % 2 == 0 { &whole } else { &end })]);
        let loss = trainer.step(&batch, &settings, 1e-3).unwrap().loss;
        apart = apart.max(off(nudged as f64, want));
        worst = worst.max(off(loss, want) / apart);
        assert!(off(loss, want) < 5.0 * apart, "step {step}: loss {loss}, transformers {want}");
    }
    println!("{} steps, losses {} to {}, {worst} times as far apart as nudged", want.len(), want[0], want[99]);
    assert!(want[99] < 0.2 * want[0], "it learnt, so that the comparison means something");
}

fn gradients(model: &Model, batch: &Batch) -> BTreeMap<String, Vec<f32>> {
    let mut all = BTreeMap::new();
    let gradients = model.forward_backward(batch, &|_| true).unwrap().1;
    let visited = gradients.visit(&model.architecture, &|_| true, |name, gradient| {
        let mut whole = vec![0.0; gradient.rows * gradient.columns];
        gradient.fill(0, &mut whole);
        all.insert(name.to_string(), whole);
        Ok::<_, ()>(())
    });
    visited.unwrap();
    all
}

/// Two samples on one context, one on another that is shorter than the convolution reaches, one without: the gradient is the
/// mean of theirs, weighted by tokens, so that no state or row leaks from one sequence into another.
#[test]
fn packed_samples_train_as_each_does_alone() {
    let model = golden_model(TEXT, Dtype::F32);
    let ids = ids();
    let samples = [
        Tokens::new(ids[..70].to_vec(), ids[70..140].to_vec()),
        Tokens::new(ids[..70].to_vec(), ids[150..153].to_vec()),
        Tokens::new(ids[160..163].to_vec(), ids[170..180].to_vec()),
        Tokens::new(vec![], ids[20..45].to_vec()),
    ];
    let together = Batch::pack(samples.iter().enumerate());
    assert_eq!(together.frozen, 69 + 2, "a shared context is there once");
    let packed = gradients(&model, &together);
    let mut sum: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    for sample in &samples {
        let share = sample.targets() as f32 / together.targets.len() as f32;
        for (name, gradient) in gradients(&model, &Batch::pack([(0, sample)])) {
            let all = sum.entry(name).or_insert(vec![0.0; gradient.len()]);
            all.iter_mut().zip(&gradient).for_each(|(a, g)| *a += share * g);
        }
    }
    for (name, want) in sum {
        let error = relative_error(&packed[&name], &want);
        assert!(error < 1e-4, "{name}: {error}");
    }
}

/// As vLLM holds it: A_log in F32 among BF16, beside a vision tower and layers for multi-token prediction.
#[test]
fn only_the_text_model_trains_whatever_else_the_checkpoint_holds() {
    let architecture = Architecture::from_config(&Config::parse(VISION).unwrap()).unwrap();
    let text = architecture.tensors().into_iter().map(|(name, shape)| (name.to_string(), shape));
    let others = ["model.visual.blocks.0.norm1.weight", "mtp.layers.0.input_layernorm.weight"];
    let others = others.map(|name| (name.to_string(), vec![16]));
    let tensors = text.chain(others.clone()).map(|(name, shape)| {
        let values = golden_weights(&name, shape.iter().product::<u64>() as usize, architecture.norm_offset);
        let dtype = if name.ends_with("A_log") { Dtype::F32 } else { Dtype::BF16 };
        (name, TensorSpec { dtype, shape }, to_bytes(dtype, &values))
    });
    let weights = Arc::new(InMemory::new(tensors));
    let before: BTreeMap<String, Vec<u8>> =
        weights.names().map(|n| (n.to_string(), weights.bytes(n).unwrap())).collect();
    let model = Model::new(architecture.clone(), weights.clone()).unwrap();
    let queue = Queue::start(model, TextModel::default(), Default::default(), Options::default()).unwrap();
    let job = r#"{"samples": [{"context_ids": [1, 2, 3], "continuation_ids": [4, 5, 6, 7, 8]}],
                  "config": {"lr": 1e-2, "rank": 4, "epochs": 20}}"#;
    let id = queue.submit(job, "test").unwrap();
    let start = std::time::Instant::now();
    let job = loop {
        let job = queue.job(id).unwrap();
        if job.has_ended() {
            break job;
        }
        assert!(start.elapsed().as_secs() < 60, "{job:?}");
        std::thread::yield_now();
    };
    assert_eq!((job.state, job.error.clone()), (JobState::Finished, None));
    assert!(job.losses[19] < 0.5 * job.losses[0], "{:?}", job.losses);
    assert!(job.notes.iter().any(|note| note.contains("model.visual.*")), "{:?}", job.notes);
    for (name, old) in before {
        let left_alone = others.iter().any(|(other, _)| *other == name);
        assert_eq!(weights.bytes(&name).unwrap() == old, left_alone, "{name}");
    }
}

#[test]
fn families_with_experts_are_refused_by_name_and_said_to_mount() {
    for family in ["qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next", "qwen3_moe"] {
        let config = TEXT.replace("qwen3_5_text", family);
        let error = Architecture::from_config(&Config::parse(&config).unwrap()).unwrap_err().to_string();
        assert!(error.contains(family) && error.contains("experts") && error.contains("mounted"), "{error}");
    }
}

#[test]
fn configs_that_do_not_hold_together_are_refused() {
    let refused = |from: &str, to: &str| {
        assert!(TEXT.contains(from), "{from}");
        Architecture::from_config(&Config::parse(&TEXT.replace(from, to)).unwrap()).unwrap_err().to_string()
    };
    assert!(refused("\"linear_num_value_heads\": 4", "\"linear_num_value_heads\": 5").contains("no multiple"));
    assert!(refused("\"full_attention\"", "\"sliding_attention\"").contains("sliding_attention"));
    assert!(refused("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4").contains("names 3 layers of 4"));
    assert!(
        refused("\"partial_rotary_factor\": 0.25", "\"partial_rotary_factor\": 0.2").contains("partial_rotary_factor")
    );
    let vision = Config::parse(&VISION.replace("\"text_config\"", "\"other\"")).unwrap();
    assert!(Architecture::from_config(&vision).unwrap_err().to_string().contains("text_config"));
}

/// Without `layer_types` and rope parameters, config.json means what transformers takes it for.
#[test]
fn defaults_are_those_of_transformers() {
    let mut config: serde_json::Value = serde_json::from_str(TEXT).unwrap();
    let config = config.as_object_mut().unwrap();
    for key in ["layer_types", "rope_parameters", "head_dim", "linear_num_key_heads", "linear_num_value_heads"] {
        config.remove(key);
    }
    config["num_hidden_layers"] = 8.into();
    let text = serde_json::to_string(config).unwrap();
    let architecture = Architecture::from_config(&Config::parse(&text).unwrap()).unwrap();
    let full: Vec<usize> =
        (0..8).filter(|&i| architecture.layers[i].tensors().iter().any(|n| n.contains("self_attn"))).collect();
    assert_eq!(full, [3, 7]);
    assert_eq!((architecture.head_dim, architecture.rope.inverse_frequencies.len()), (256, 32));
}
