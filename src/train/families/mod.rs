//! Model families: config.json in, a description of every layer out. The families here are one architecture with
//! switches (pre-norm, rotary attention with grouped heads, gated feed-forward), so a family is a file that reads its
//! switches from its config, and [`Architecture`] is all that the rest of training sees. To add one, write such a file
//! and name it in the list below.

mod llama;
mod mistral;
mod qwen2;
mod qwen3;
pub mod rope;

use super::config::{Config, Refusal};
use super::weights::Weights;
use rope::Rope;

/// A family by its `model_type`.
pub struct Family {
    pub model_type: &'static str,
    options: fn(&Config) -> Result<Options, Refusal>,
}

const FAMILIES: [Family; 4] = [llama::FAMILY, mistral::FAMILY, qwen2::FAMILY, qwen3::FAMILY];

/// In which ways a family differs from the others.
pub struct Options {
    pub kv_heads: usize,
    pub head_dim: usize,
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    pub qk_norm: bool,
    /// By layer; a row sees itself and `window - 1` rows before.
    pub windows: Vec<Option<usize>>,
}

/// `y = x W^T + b` by the names of its tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Linear {
    pub weight: String,
    pub bias: Option<String>,
    pub inputs: usize,
    pub outputs: usize,
}

/// One layer: attention and feed-forward, each after its norm and added to the stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    pub input_norm: String,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    /// Norms of each head of q and k, weight (D).
    pub qk_norm: Option<(String, String)>,
    pub window: Option<usize>,
    pub post_norm: String,
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}

/// A whole model.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    pub family: &'static str,
    pub vocabulary: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub eps: f32,
    pub max_positions: usize,
    pub rope: Rope,
    pub embedding: String,
    pub layers: Vec<Layer>,
    pub norm: String,
    /// `None` when the head is the embedding.
    pub head: Option<String>,
}

impl Architecture {
    pub fn from_config(config: &Config) -> Result<Architecture, Refusal> {
        let name = config.text("model_type").unwrap_or("(none)");
        let family = FAMILIES.iter().find(|f| f.model_type == name).ok_or_else(|| Refusal::Family {
            family: name.to_string(),
            supported: FAMILIES.map(|f| f.model_type).join(", "),
        })?;
        let refuse = |what: String, supported| Refusal::Option { family: family.model_type, what, supported };
        if let Some(quantization) = config.get("quantization_config") {
            let method = quantization.get("quant_method").and_then(|m| m.as_str()).unwrap_or("unknown");
            return Err(refuse(format!("quantized weights ({method})"), "weights in BF16, F16 or F32 do"));
        }
        if let Some(act) = config.text("hidden_act").filter(|&a| a != "silu") {
            return Err(refuse(format!("hidden_act '{act}'"), "'silu' does"));
        }
        let (hidden, heads) = (config.required("hidden_size")?, config.required("num_attention_heads")?);
        let layers = config.required("num_hidden_layers")?;
        let options = (family.options)(config)?;
        if heads % options.kv_heads != 0 {
            let why = format!("num_attention_heads {heads} is no multiple of num_key_value_heads {}", options.kv_heads);
            return Err(Refusal::Config(why));
        }
        if options.head_dim % 2 != 0 {
            return Err(Refusal::Config(format!("head_dim {} is odd", options.head_dim)));
        }
        let max_positions = config.required("max_position_embeddings")?;
        let intermediate = config.required("intermediate_size")?;
        let rope = Rope::from_config(config, family.model_type, options.head_dim, max_positions)?;
        let tied = config.flag("tie_word_embeddings", false)?;
        Ok(Architecture {
            family: family.model_type,
            vocabulary: config.required("vocab_size")?,
            hidden,
            intermediate,
            heads,
            kv_heads: options.kv_heads,
            head_dim: options.head_dim,
            eps: config.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            max_positions,
            rope,
            embedding: "model.embed_tokens.weight".into(),
            layers: (0..layers).map(|i| layer(i, hidden, intermediate, heads, &options)).collect(),
            norm: "model.norm.weight".into(),
            head: (!tied).then(|| "lm_head.weight".into()),
        })
    }

    /// Every tensor that the model uses, with its shape, in the order of the forward pass.
    pub fn tensors(&self) -> Vec<(&str, Vec<u64>)> {
        let (h, d, v) = (self.hidden as u64, self.head_dim as u64, self.vocabulary as u64);
        let mut all: Vec<(&str, Vec<u64>)> = vec![(&self.embedding, vec![v, h])];
        for layer in &self.layers {
            all.push((&layer.input_norm, vec![h]));
            for linear in layer.linears() {
                all.push((&linear.weight, vec![linear.outputs as u64, linear.inputs as u64]));
                if let Some(bias) = &linear.bias {
                    all.push((bias, vec![linear.outputs as u64]));
                }
            }
            if let Some((q, k)) = &layer.qk_norm {
                all.extend([(q.as_str(), vec![d]), (k, vec![d])]);
            }
            all.push((&layer.post_norm, vec![h]));
        }
        all.push((&self.norm, vec![h]));
        if let Some(head) = &self.head {
            all.push((head, vec![v, h]));
        }
        all
    }

    /// Checks that `weights` has every tensor, of the shape the config implies and a dtype that trains.
    pub fn check(&self, weights: &dyn Weights) -> Result<(), Refusal> {
        for (name, shape) in self.tensors() {
            let refuse = |why: String| Err(Refusal::Tensor { name: name.to_string(), why });
            match weights.tensor(name) {
                None => return refuse("the live weights do not have it".into()),
                Some(spec) if spec.shape != shape => {
                    return refuse(format!("its shape is {:?}, but config.json implies {shape:?}", spec.shape));
                }
                Some(spec) if spec.kind().is_none() => {
                    return refuse(format!("{:?} does not train; BF16, F16 and F32 do", spec.dtype));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }
}

impl Layer {
    pub fn linears(&self) -> [&Linear; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }
}

fn layer(i: usize, hidden: usize, intermediate: usize, heads: usize, options: &Options) -> Layer {
    let name = |part: &str| format!("model.layers.{i}.{part}.weight");
    let linear = |part: &str, inputs, outputs, bias: bool| Linear {
        weight: name(part),
        bias: bias.then(|| format!("model.layers.{i}.{part}.bias")),
        inputs,
        outputs,
    };
    let (q, kv) = (heads * options.head_dim, options.kv_heads * options.head_dim);
    Layer {
        input_norm: name("input_layernorm"),
        q: linear("self_attn.q_proj", hidden, q, options.qkv_bias),
        k: linear("self_attn.k_proj", hidden, kv, options.qkv_bias),
        v: linear("self_attn.v_proj", hidden, kv, options.qkv_bias),
        o: linear("self_attn.o_proj", q, hidden, options.o_bias),
        qk_norm: options.qk_norm.then(|| (name("self_attn.q_norm"), name("self_attn.k_norm"))),
        window: options.windows[i],
        post_norm: name("post_attention_layernorm"),
        gate: linear("mlp.gate_proj", hidden, intermediate, options.mlp_bias),
        up: linear("mlp.up_proj", hidden, intermediate, options.mlp_bias),
        down: linear("mlp.down_proj", intermediate, hidden, options.mlp_bias),
    }
}

/// `head_dim`, or what the heads divide the stream into.
fn head_dim_or_split(config: &Config) -> Result<usize, Refusal> {
    Ok(match config.count("head_dim")? {
        Some(d) => d,
        None => config.required("hidden_size")? / config.required("num_attention_heads")?,
    })
}

/// No layer has a window.
fn no_windows(config: &Config) -> Result<Vec<Option<usize>>, Refusal> {
    Ok(vec![None; config.required("num_hidden_layers")?])
}

/// Qwen's rule: `layer_types` where there is one, else the layers from `max_window_layers` on, if `use_sliding_window`.
fn qwen_windows(config: &Config, family: &'static str) -> Result<Vec<Option<usize>>, Refusal> {
    let layers = config.required("num_hidden_layers")?;
    let window = match config.flag("use_sliding_window", false)? {
        true => config.count("sliding_window")?,
        false => None,
    };
    if let Some(types) = config.get("layer_types").and_then(|t| t.as_array()) {
        if types.len() != layers {
            return Err(Refusal::Config(format!("layer_types names {} layers of {layers}", types.len())));
        }
        let by_type = |t: &serde_json::Value| match t.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => Ok(window),
            _ => Err(Refusal::Option {
                family,
                what: format!("a layer of type {t}"),
                supported: "full_attention and sliding_attention do",
            }),
        };
        return types.iter().map(by_type).collect();
    }
    let full = config.count("max_window_layers")?.unwrap_or(28);
    Ok((0..layers).map(|i| window.filter(|_| i >= full)).collect())
}
