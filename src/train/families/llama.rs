//! Llama 2 and 3, SmolLM2, and the many models that call themselves `llama`.

use super::{Family, Options, head_dim_or_split};

pub const FAMILY: Family = Family {
    model_type: "llama",
    text: None,
    options: |config| {
        let bias = config.flag("attention_bias", false)?;
        Ok(Options {
            kv_heads: config.count("num_key_value_heads")?.unwrap_or(config.required("num_attention_heads")?),
            head_dim: head_dim_or_split(config)?,
            qkv_bias: bias,
            o_bias: bias,
            mlp_bias: config.flag("mlp_bias", false)?,
            ..Options::default()
        })
    },
};
