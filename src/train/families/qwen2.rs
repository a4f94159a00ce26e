//! Qwen2 and Qwen2.5: biases on q, k and v; some checkpoints with a sliding window in the upper layers.

use super::{Family, Options, head_dim_or_split, qwen_windows};

pub const FAMILY: Family = Family {
    model_type: "qwen2",
    text: None,
    options: |config| {
        Ok(Options {
            kv_heads: config.count("num_key_value_heads")?.unwrap_or(32),
            head_dim: head_dim_or_split(config)?,
            qkv_bias: true,
            windows: qwen_windows(config, "qwen2")?,
            ..Options::default()
        })
    },
};
