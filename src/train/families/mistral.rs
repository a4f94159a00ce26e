//! Mistral 7B and its successors of the same shape: Llama with a sliding window in every layer, or in none.

use super::{Family, Options, head_dim_or_split};

pub const FAMILY: Family = Family {
    model_type: "mistral",
    text: None,
    options: |config| {
        // transformers takes 4096 where the key is absent, and no window where it is null.
        let window = if config.has("sliding_window") { config.count("sliding_window")? } else { Some(4096) };
        Ok(Options {
            kv_heads: config.count("num_key_value_heads")?.unwrap_or(8),
            head_dim: head_dim_or_split(config)?,
            windows: vec![window; config.required("num_hidden_layers")?],
            ..Options::default()
        })
    },
};
