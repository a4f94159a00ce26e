//! Qwen3.5, dense: three layers of four are Gated DeltaNet (linear attention), the fourth is full attention with a gate on
//! its output, a norm on every head of q and k, and a quarter of each head turning. Norms are kept as their distance from 1.
//! The vision-language class has the same text model one level down, in its config and in its tensors' names; its vision
//! tower is not trained, and neither are the layers for multi-token prediction that some checkpoints carry.

use super::{DeltaNetOptions, Family, Options};
use crate::compute::cpu::delta_rule::Shape;
use crate::train::config::{Config, Refusal};

pub const TEXT: Family = Family { model_type: "qwen3_5_text", text: None, options };

pub const VISION_LANGUAGE: Family =
    Family { model_type: "qwen3_5", text: Some(("text_config", "model.language_model")), options };

fn options(config: &Config) -> Result<Options, Refusal> {
    let layers = config.required("num_hidden_layers")?;
    let bias = config.flag("attention_bias", false)?;
    let shape = Shape {
        k_heads: config.count("linear_num_key_heads")?.unwrap_or(16),
        v_heads: config.count("linear_num_value_heads")?.unwrap_or(32),
        k_dim: config.count("linear_key_head_dim")?.unwrap_or(128),
        v_dim: config.count("linear_value_head_dim")?.unwrap_or(128),
    };
    if !shape.v_heads.is_multiple_of(shape.k_heads) {
        let (k, v) = (shape.k_heads, shape.v_heads);
        return Err(Refusal::Config(format!("linear_num_value_heads {v} is no multiple of linear_num_key_heads {k}")));
    }
    let predicting = config.get("mtp_num_hidden_layers").and_then(|n| n.as_u64()).unwrap_or(0) > 0;
    Ok(Options {
        kv_heads: config.count("num_key_value_heads")?.unwrap_or(4),
        head_dim: config.count("head_dim")?.unwrap_or(256),
        qkv_bias: bias,
        o_bias: bias,
        qk_norm: true,
        output_gate: true,
        norm_offset: 1.0,
        partial_rotary: Some(0.25),
        delta_net: Some(DeltaNetOptions {
            layers: linear_layers(config, layers)?,
            shape,
            kernel: config.count("linear_conv_kernel_dim")?.unwrap_or(4),
        }),
        left_alone: predicting.then(|| "those of multi-token prediction (mtp.*)".into()),
        ..Options::default()
    })
}

/// Which layers are linear attention: `layer_types`, or all but every fourth (`full_attention_interval`).
fn linear_layers(config: &Config, layers: usize) -> Result<Vec<bool>, Refusal> {
    let Some(types) = config.get("layer_types").and_then(|t| t.as_array()) else {
        let interval = config.count("full_attention_interval")?.unwrap_or(4);
        return Ok((0..layers).map(|i| (i + 1) % interval != 0).collect());
    };
    if types.len() != layers {
        return Err(Refusal::Config(format!("layer_types names {} layers of {layers}", types.len())));
    }
    let linear = |t: &serde_json::Value| match t.as_str() {
        Some("linear_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        _ => Err(Refusal::Option {
            family: "qwen3_5",
            what: format!("a layer of type {t}"),
            supported: "linear_attention and full_attention do",
        }),
    };
    types.iter().map(linear).collect()
}
