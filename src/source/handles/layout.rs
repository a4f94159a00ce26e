//! Where each tensor of a checkpoint lies among an engine's parameters, by rule: a handle file says what the engine has, not
//! what became of the checkpoint's tensors. The rules are vLLM's (0.32 and 0.33, `WeightsMapper` and
//! `packed_modules_mapping` of each model): projections that share an input are one parameter, rows one after the other;
//! vocabularies are padded; `A_log` is kept in F32. config.json says which family's rules hold, the checkpoint's own shapes
//! how many rows each part has. A parameter under the checkpoint's own name is taken for that tensor first, which is all
//! there is to an engine that merges nothing.

use super::super::manifest::TensorMap;
use super::super::{Segment, row_major};
use super::tensors::LiveTensors;
use crate::model::{ModelDirectory, TensorEntry, element_bytes};
use serde_json::Value;
use std::collections::{HashMap, HashSet};

/// What the rules make of a handle file.
#[derive(Debug, Default)]
pub struct Layout {
    pub tensors: HashMap<String, TensorMap>,
    pub opaque: HashMap<String, String>,
    /// Tensors that a rule places where they do not fit, and why.
    pub wrong: HashMap<String, String>,
}

struct Family {
    model_type: &'static str,
    /// Start of a name in the checkpoint, and what the engine has instead; tried in this order, after the name itself.
    renames: &'static [(&'static str, &'static str)],
}

const TEXT: &[(&str, &str)] = &[];
/// The vision-language class puts the text model one level further down; the text class served from the same
/// checkpoint does not know the level at all.
const VISION_LANGUAGE: &[(&str, &str)] = &[
    ("model.language_model.", "language_model.model."),
    ("model.visual.", "visual."),
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "model."),
];

const FAMILIES: [Family; 10] = [
    Family { model_type: "llama", renames: TEXT },
    Family { model_type: "mistral", renames: TEXT },
    Family { model_type: "qwen2", renames: TEXT },
    Family { model_type: "qwen3", renames: TEXT },
    Family { model_type: "qwen3_moe", renames: TEXT },
    Family { model_type: "qwen3_next", renames: TEXT },
    Family { model_type: "qwen3_5_text", renames: TEXT },
    Family { model_type: "qwen3_5_moe_text", renames: TEXT },
    Family { model_type: "qwen3_5", renames: VISION_LANGUAGE },
    Family { model_type: "qwen3_5_moe", renames: VISION_LANGUAGE },
];

/// A module of the engine, and the checkpoint's whose rows it holds one after the other.
const MERGED: [(&str, &[&str]); 4] = [
    ("qkv_proj", &["q_proj", "k_proj", "v_proj"]),
    ("gate_up_proj", &["gate_proj", "up_proj"]),
    ("in_proj_qkvz", &["in_proj_qkv", "in_proj_z"]),
    ("in_proj_ba", &["in_proj_b", "in_proj_a"]),
];

/// Parameters with a row a token, which the engine may have padded.
const VOCABULARIES: [&str; 2] = ["embed_tokens.weight", "lm_head.weight"];

const EXPERTS: &str = "its engine may have repacked the experts for its kernels, and a handle file does not say: \
                       publish a manifest to have them live";

/// Places the tensors of `directory`. Fails where there is no rule for the whole model.
pub fn place(directory: &ModelDirectory, live: &LiveTensors) -> Result<Layout, String> {
    let config = config(directory)?;
    let model_type = config["model_type"].as_str().unwrap_or("(none)");
    let Some(family) = FAMILIES.iter().find(|f| f.model_type == model_type) else {
        let known = FAMILIES.map(|f| f.model_type).join(", ");
        return Err(format!(
            "handle files need a rule for how the engine lays weights out, and there is none for model_type '{model_type}' \
             (there is for {known}): publish a manifest instead"
        ));
    };
    if !config["quantization_config"].is_null() || !config["text_config"]["quantization_config"].is_null() {
        return Err("the model is quantized, and engines repack such weights: publish a manifest instead".into());
    }
    // In a nested config both levels have the key, and models ask the outer one; where that is silent, the inner one.
    let tied = |config: &Value| config["tie_word_embeddings"].as_bool();
    let tied = tied(&config).or(tied(&config["text_config"])).unwrap_or(false);
    let on_disk: HashMap<&str, &TensorEntry> = directory.tensors().map(|(_, t)| (t.name.as_str(), t)).collect();
    let rules = Rules { renames: family.renames, tied, live, on_disk };
    let mut layout = Layout::default();
    let mut used = HashSet::new();
    for (_, tensor) in directory.tensors() {
        match rules.find(&tensor.name) {
            Found::In(name, first) => {
                used.insert(name.clone());
                match rules.segment(tensor, &name, first) {
                    Ok(segment) => {
                        let entry =
                            TensorMap { dtype: tensor.dtype, shape: tensor.shape.clone(), segments: vec![segment] };
                        layout.tensors.insert(tensor.name.clone(), entry);
                    }
                    Err(why) => drop(layout.wrong.insert(tensor.name.clone(), why)),
                }
            }
            Found::Wrong(name, why) => {
                used.insert(name);
                layout.wrong.insert(tensor.name.clone(), why);
            }
            Found::Experts => drop(layout.opaque.insert(tensor.name.clone(), EXPERTS.into())),
            Found::Nothing => {}
        }
    }
    // What is left is only live: named so that users hear of it.
    for (name, tensor) in live.tensors.iter().filter(|(name, _)| !used.contains(*name)) {
        let entry = TensorMap { dtype: tensor.dtype, shape: tensor.shape.clone(), segments: Vec::new() };
        layout.tensors.entry(name.clone()).or_insert(entry);
    }
    Ok(layout)
}

fn config(directory: &ModelDirectory) -> Result<Value, String> {
    let path = directory.path.join("config.json");
    let needed = |why: String| format!("its layout follows from {}: {why}", path.display());
    let text = crate::model::read_small_text(&path).map_err(|e| needed(e.to_string()))?;
    serde_json::from_str(&text).map_err(|e| needed(e.to_string()))
}

enum Found {
    /// In this parameter: all of it, or from this row on.
    In(String, Option<u64>),
    Wrong(String, String),
    Experts,
    Nothing,
}

struct Rules<'a> {
    renames: &'static [(&'static str, &'static str)],
    tied: bool,
    live: &'a LiveTensors,
    on_disk: HashMap<&'a str, &'a TensorEntry>,
}

impl Rules<'_> {
    fn find(&self, name: &str) -> Found {
        let renamed =
            self.renames.iter().filter_map(|(ours, theirs)| Some(format!("{theirs}{}", name.strip_prefix(ours)?)));
        let candidates: Vec<String> = std::iter::once(name.to_string()).chain(renamed).collect();
        for candidate in &candidates {
            if self.live.tensors.contains_key(candidate) {
                return Found::In(candidate.clone(), None);
            }
            if let Some(found) = self.merged(name, candidate) {
                return found;
            }
        }
        for candidate in &candidates {
            // An engine that ties the head to the embedding has one parameter for both.
            if let Some(prefix) = candidate.strip_suffix("lm_head.weight").filter(|_| self.tied) {
                let embeddings =
                    [format!("{prefix}model.embed_tokens.weight"), "model.language_model.embed_tokens.weight".into()];
                if let Some(embedding) = embeddings.into_iter().find(|e| self.live.tensors.contains_key(e)) {
                    return Found::In(embedding, None);
                }
            }
            if let Some((layer, _)) = candidate.split_once(".mlp.experts.") {
                let experts = format!("{layer}.mlp.experts.");
                if self.live.tensors.keys().any(|live| live.starts_with(&experts)) {
                    return Found::Experts;
                }
            }
        }
        Found::Nothing
    }

    /// `name` as a part of a parameter of several, where the engine has such a one under `candidate`'s module.
    fn merged(&self, name: &str, candidate: &str) -> Option<Found> {
        // MODULE.PART.weight, or .bias
        let split = |name: &str| -> Option<(usize, usize)> {
            let kind = name.rfind('.')?;
            Some((name[..kind].rfind('.')? + 1, kind))
        };
        let (at, kind) = split(candidate)?;
        let (merged, parts) = MERGED.iter().find(|(_, parts)| parts.contains(&&candidate[at..kind]))?;
        let live_name = format!("{}{merged}{}", &candidate[..at], &candidate[kind..]);
        let live = self.live.tensors.get(&live_name)?;
        let wrong = |why: String| Some(Found::Wrong(live_name.clone(), why));
        let (at, kind) = split(name).expect("a name differs from its candidate at the start only");
        let (mut rows, mut first) = (0, None);
        for part in *parts {
            if *part == &name[at..kind] {
                first = Some(rows);
            }
            let sibling = format!("{}{part}{}", &name[..at], &name[kind..]);
            match self.on_disk.get(sibling.as_str()).and_then(|t| t.shape.first()) {
                Some(n) => rows += n,
                None => {
                    return wrong(format!("the engine merges it with {sibling}, which the checkpoint does not have"));
                }
            }
        }
        if live.shape.first() != Some(&rows) {
            return wrong(format!(
                "the engine's {live_name} has shape {:?}, and its parts in the checkpoint have {rows} rows{RANKS}",
                live.shape
            ));
        }
        Some(Found::In(live_name, first))
    }

    /// `tensor` as all of the parameter `name`, or as its rows `first..`, which were counted.
    fn segment(&self, tensor: &TensorEntry, name: &str, first: Option<u64>) -> Result<Segment, String> {
        let live = &self.live.tensors[name];
        let padded = VOCABULARIES.iter().any(|v| name.ends_with(v));
        let fits = match (live.shape.split_first(), tensor.shape.split_first()) {
            (Some((rows, rest)), Some((ours, our_rest))) => {
                rest == our_rest && (rows == ours || (padded && rows > ours) || first.is_some())
            }
            (live, ours) => live.is_none() && ours.is_none(),
        };
        if !fits {
            return Err(format!(
                "its shape is {:?} in the checkpoint, and {:?} as the engine's {name}{RANKS}",
                tensor.shape, live.shape
            ));
        }
        let element = element_bytes(live.dtype).ok_or("its dtype is smaller than a byte")? as u64;
        let row = live.strides.first().copied().unwrap_or(0);
        let skipped = first
            .unwrap_or(0)
            .checked_mul(row)
            .and_then(|n| n.checked_mul(element))
            .and_then(|n| n.checked_add(live.offset));
        let mut strides = live.strides.clone();
        // A dimension of one index may have any stride; ours is the one that checks later expect.
        let packed = row_major(&tensor.shape);
        for (d, &size) in tensor.shape.iter().enumerate() {
            if size == 1 {
                strides[d] = packed[d];
            }
        }
        Ok(Segment {
            memory: live.memory,
            offset: skipped.ok_or("it lies beyond any memory")?,
            at: vec![0; tensor.shape.len()],
            shape: tensor.shape.clone(),
            strides,
            dtype: live.dtype,
            replica: false,
        })
    }
}

/// What a wrong number of rows means most often.
const RANKS: &str = " (a handle file describes one rank: for tensor parallel engines publish manifests)";
