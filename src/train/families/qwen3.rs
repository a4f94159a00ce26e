//! Qwen3: a norm on every head of q and k, and a head dimension of its own.

use super::{Family, Options, qwen_windows};

pub const FAMILY: Family = Family {
    model_type: "qwen3",
    text: None,
    options: |config| {
        let bias = config.flag("attention_bias", false)?;
        Ok(Options {
            kv_heads: config.count("num_key_value_heads")?.unwrap_or(32),
            head_dim: config.count("head_dim")?.unwrap_or(128),
            qkv_bias: bias,
            o_bias: bias,
            qk_norm: true,
            windows: qwen_windows(config, "qwen3")?,
            ..Options::default()
        })
    },
};
