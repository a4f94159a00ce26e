//! Model families: config.json in, a description of every layer out. The families here are one architecture with
//! switches (pre-norm, rotary attention with grouped heads or linear attention, gated feed-forward), so a family is a file
//! that reads its switches from its config, and [`Architecture`] is all that the rest of training sees. To add one, write
//! such a file and name it in the list below.

mod llama;
mod mistral;
mod qwen2;
mod qwen3;
mod qwen3_5;
pub mod rope;

use super::config::{Config, Refusal};
use super::weights::Weights;
use crate::compute::cpu::delta_rule;
use rope::Rope;

/// A family by its `model_type`.
pub struct Family {
    pub model_type: &'static str,
    /// Where it is one model of several: the key of its config, and what its tensors' names begin with.
    text: Option<(&'static str, &'static str)>,
    options: fn(&Config) -> Result<Options, Refusal>,
}

const FAMILIES: [Family; 6] =
    [llama::FAMILY, mistral::FAMILY, qwen2::FAMILY, qwen3::FAMILY, qwen3_5::TEXT, qwen3_5::VISION_LANGUAGE];

/// Families that are known and have experts, which do not train yet.
const EXPERTS: [&str; 4] = ["qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"];

/// Heads have some hundred features. Frequencies are made of each before any tensor is looked at.
const WIDEST_HEAD: usize = 1 << 16;

/// In which ways a family differs from the others.
#[derive(Default)]
pub struct Options {
    pub kv_heads: usize,
    pub head_dim: usize,
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    pub qk_norm: bool,
    /// By layer, empty for none; a row sees itself and `window - 1` rows before.
    pub windows: Vec<Option<usize>>,
    /// The projection of q gives a gate for each head's output as well.
    pub output_gate: bool,
    /// What norms of the stream and of heads add to their weight.
    pub norm_offset: f32,
    /// Which part of a head turns where the config does not say; `None` where whole heads turn.
    pub partial_rotary: Option<f64>,
    /// Layers of linear attention.
    pub delta_net: Option<DeltaNetOptions>,
    /// What of such a checkpoint is not trained.
    pub left_alone: Option<String>,
}

pub struct DeltaNetOptions {
    /// By layer: linear attention, or full.
    pub layers: Vec<bool>,
    pub shape: delta_rule::Shape,
    /// Taps of the convolution.
    pub kernel: usize,
}

/// `y = x W^T + b` by the names of its tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Linear {
    pub weight: String,
    pub bias: Option<String>,
    pub inputs: usize,
    pub outputs: usize,
}

/// One layer: a mixer of rows and a feed-forward, each after its norm and added to the stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    pub input_norm: String,
    pub mixer: Mixer,
    pub post_norm: String,
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}

/// What carries information from row to row.
#[derive(Debug, Clone, PartialEq)]
pub enum Mixer {
    Attention(Attention),
    DeltaNet(DeltaNet),
}

/// Attention by scores of every pair of rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    /// Norms of each head of q and k, weight (D).
    pub qk_norm: Option<(String, String)>,
    pub window: Option<usize>,
    /// q's rows are, head by head, a query and a gate on that head's output.
    pub output_gate: bool,
}

/// Gated DeltaNet: linear attention with a state a value head.
#[derive(Debug, Clone, PartialEq)]
pub struct DeltaNet {
    pub shape: delta_rule::Shape,
    /// Rows `[q | k | v]`, before the convolution.
    pub qkv: Linear,
    /// The gate of the norm.
    pub z: Linear,
    /// What beta and the decay are made of, one output a value head.
    pub b: Linear,
    pub a: Linear,
    /// (channels, 1, taps).
    pub convolution: String,
    pub kernel: usize,
    /// (value heads).
    pub a_log: String,
    pub dt_bias: String,
    /// (v_dim), shared by all heads.
    pub norm: String,
    pub out: Linear,
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
    /// What norms add to their weight: Qwen3.5 keeps them as their distance from 1.
    pub norm_offset: f32,
    pub max_positions: usize,
    pub rope: Rope,
    pub embedding: String,
    pub layers: Vec<Layer>,
    pub norm: String,
    /// `None` when the head is the embedding.
    pub head: Option<String>,
    /// What of the checkpoint is not trained, for people.
    pub left_alone: Option<String>,
}

impl Architecture {
    pub fn from_config(config: &Config) -> Result<Architecture, Refusal> {
        Architecture::within(config, usize::MAX)
    }

    /// Of a model that has so many tensors: what cannot be made of them is not built first, in all the memory there is.
    pub fn within(config: &Config, tensors: usize) -> Result<Architecture, Refusal> {
        let name = config.text("model_type").unwrap_or("(none)");
        if EXPERTS.contains(&name) {
            return Err(Refusal::Experts(name.to_string()));
        }
        let family = FAMILIES.iter().find(|f| f.model_type == name).ok_or_else(|| Refusal::Family {
            family: name.to_string(),
            supported: FAMILIES.map(|f| f.model_type).join(", "),
        })?;
        let refuse = |what: String, supported| Refusal::Option { family: family.model_type, what, supported };
        let outer = config;
        let inner = match family.text {
            Some((key, _)) => Some(config.object(key).ok_or_else(|| Refusal::Config(format!("it has no {key}")))?),
            None => None,
        };
        let config = inner.as_ref().unwrap_or(outer);
        if let Some(quantization) = outer.get("quantization_config").or(config.get("quantization_config")) {
            let method = quantization.get("quant_method").and_then(|m| m.as_str()).unwrap_or("unknown");
            return Err(refuse(format!("quantized weights ({method})"), "weights in BF16, F16 or F32 do"));
        }
        if let Some(act) = config.text("hidden_act").filter(|&a| a != "silu") {
            return Err(refuse(format!("hidden_act '{act}'"), "'silu' does"));
        }
        let (hidden, heads) = (config.required("hidden_size")?, config.required("num_attention_heads")?);
        let layers = config.required("num_hidden_layers")?;
        if layers > tensors {
            return Err(Refusal::Config(format!("num_hidden_layers is {layers}, but the model has {tensors} tensors")));
        }
        let options = (family.options)(config)?;
        if heads % options.kv_heads != 0 {
            let why = format!("num_attention_heads {heads} is no multiple of num_key_value_heads {}", options.kv_heads);
            return Err(Refusal::Config(why));
        }
        if options.head_dim % 2 != 0 {
            return Err(Refusal::Config(format!("head_dim {} is odd", options.head_dim)));
        }
        if options.head_dim > WIDEST_HEAD {
            return Err(Refusal::Config(format!("head_dim is {}: heads train up to {WIDEST_HEAD}", options.head_dim)));
        }
        let max_positions = config.required("max_position_embeddings")?;
        let intermediate = config.required("intermediate_size")?;
        let rope =
            Rope::from_config(config, family.model_type, options.head_dim, max_positions, options.partial_rotary)?;
        let tied = outer.flag("tie_word_embeddings", config.flag("tie_word_embeddings", false)?)?;
        let prefix = family.text.map_or("model", |(_, prefix)| prefix);
        let tower = family.text.is_some().then(|| "the vision tower's weights (model.visual.*)".to_string());
        let left_alone: Vec<String> = tower.into_iter().chain(options.left_alone.clone()).collect();
        Ok(Architecture {
            family: family.model_type,
            vocabulary: config.required("vocab_size")?,
            hidden,
            intermediate,
            heads,
            kv_heads: options.kv_heads,
            head_dim: options.head_dim,
            eps: config.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            norm_offset: options.norm_offset,
            max_positions,
            rope,
            embedding: format!("{prefix}.embed_tokens.weight"),
            layers: (0..layers).map(|i| layer(prefix, i, hidden, intermediate, heads, &options)).collect(),
            norm: format!("{prefix}.norm.weight"),
            head: (!tied).then(|| "lm_head.weight".into()),
            left_alone: (!left_alone.is_empty()).then(|| left_alone.join(" and ")),
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
            match &layer.mixer {
                Mixer::Attention(attention) => {
                    if let Some((q, k)) = &attention.qk_norm {
                        all.extend([(q.as_str(), vec![d]), (k, vec![d])]);
                    }
                }
                Mixer::DeltaNet(net) => {
                    let heads = net.shape.v_heads as u64;
                    all.push((&net.convolution, vec![net.shape.channels() as u64, 1, net.kernel as u64]));
                    all.extend([(net.a_log.as_str(), vec![heads]), (&net.dt_bias, vec![heads])]);
                    all.push((&net.norm, vec![net.shape.v_dim as u64]));
                }
            }
            all.push((&layer.post_norm, vec![h]));
        }
        all.push((&self.norm, vec![h]));
        if let Some(head) = &self.head {
            all.push((head, vec![v, h]));
        }
        all
    }

    /// The norms of the stream and of heads of q and k, which is what `norm_offset` is about.
    pub fn norms(&self) -> Vec<&str> {
        let mut all = vec![self.norm.as_str()];
        for layer in &self.layers {
            all.extend([layer.input_norm.as_str(), &layer.post_norm]);
            if let Mixer::Attention(Attention { qk_norm: Some((q, k)), .. }) = &layer.mixer {
                all.extend([q.as_str(), k]);
            }
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
    pub fn linears(&self) -> Vec<&Linear> {
        let mut linears = match &self.mixer {
            Mixer::Attention(a) => vec![&a.q, &a.k, &a.v, &a.o],
            Mixer::DeltaNet(net) => vec![&net.qkv, &net.z, &net.b, &net.a, &net.out],
        };
        linears.extend([&self.gate, &self.up, &self.down]);
        linears
    }

    /// Every tensor of the layer.
    pub fn tensors(&self) -> Vec<&str> {
        let mut names: Vec<&str> = vec![&self.input_norm, &self.post_norm];
        names.extend(self.linears().into_iter().flat_map(|l| [Some(l.weight.as_str()), l.bias.as_deref()]).flatten());
        match &self.mixer {
            Mixer::Attention(a) => names.extend(a.qk_norm.iter().flat_map(|(q, k)| [q.as_str(), k])),
            Mixer::DeltaNet(net) => names.extend([net.convolution.as_str(), &net.a_log, &net.dt_bias, &net.norm]),
        }
        names
    }
}

fn layer(prefix: &str, i: usize, hidden: usize, intermediate: usize, heads: usize, options: &Options) -> Layer {
    let named = |part: &str| format!("{prefix}.layers.{i}.{part}");
    let name = |part: &str| named(&format!("{part}.weight"));
    let linear = |part: &str, inputs, outputs, bias: bool| Linear {
        weight: name(part),
        bias: bias.then(|| named(&format!("{part}.bias"))),
        inputs,
        outputs,
    };
    let attention = || {
        let (q, kv) = (heads * options.head_dim, options.kv_heads * options.head_dim);
        let both = if options.output_gate { 2 * q } else { q };
        Mixer::Attention(Attention {
            q: linear("self_attn.q_proj", hidden, both, options.qkv_bias),
            k: linear("self_attn.k_proj", hidden, kv, options.qkv_bias),
            v: linear("self_attn.v_proj", hidden, kv, options.qkv_bias),
            o: linear("self_attn.o_proj", q, hidden, options.o_bias),
            qk_norm: options.qk_norm.then(|| (name("self_attn.q_norm"), name("self_attn.k_norm"))),
            window: options.windows.get(i).copied().flatten(),
            output_gate: options.output_gate,
        })
    };
    let delta_net = |net: &DeltaNetOptions| {
        let values = net.shape.v_heads * net.shape.v_dim;
        Mixer::DeltaNet(DeltaNet {
            shape: net.shape,
            qkv: linear("linear_attn.in_proj_qkv", hidden, net.shape.channels(), false),
            z: linear("linear_attn.in_proj_z", hidden, values, false),
            b: linear("linear_attn.in_proj_b", hidden, net.shape.v_heads, false),
            a: linear("linear_attn.in_proj_a", hidden, net.shape.v_heads, false),
            convolution: name("linear_attn.conv1d"),
            kernel: net.kernel,
            a_log: named("linear_attn.A_log"),
            dt_bias: named("linear_attn.dt_bias"),
            norm: name("linear_attn.norm"),
            out: linear("linear_attn.out_proj", values, hidden, false),
        })
    };
    Layer {
        input_norm: name("input_layernorm"),
        mixer: options.delta_net.as_ref().filter(|net| net.layers[i]).map_or_else(attention, delta_net),
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
