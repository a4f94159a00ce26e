//! The model directory on disk: which files are shards, what their headers say, where each tensor's bytes lie.
//!
//! Everything here is read with suspicion: lengths and offsets come from files that anyone may have written, so
//! nothing is used as a size or an index before it was checked against the file it describes.

mod directory;
mod dtype;
mod header;
mod index;
mod regular;
mod small_file;
mod state_folder;

pub use directory::{ModelDirectory, STATE_DIR, Shard};
pub use dtype::{Dtype, bytes_of, cast_bytes, element_bytes, is_castable, parse_dtype, round_trips, same_value};
pub use header::{Header, MAX_HEADER_BYTES, TensorEntry};
pub use regular::{create_anew, open_regular};
pub use small_file::{read_small, read_small_no_link, read_small_text};
pub use state_folder::StateFolder;

use std::path::PathBuf;

/// Why a model directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("{path}: {source}")]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path} is not a valid safetensors file: {why}; download or convert it again")]
    BadShard { path: PathBuf, why: String },
    #[error("{path} is not a valid safetensors index: {why}")]
    BadIndex { path: PathBuf, why: String },
    #[error("{path} holds no safetensors weights: expected model.safetensors or model.safetensors.index.json")]
    NoWeights { path: PathBuf },
    #[error("tensor '{name}' is in both {first} and {second}: remove one of them")]
    DuplicateTensor { name: String, first: String, second: String },
}

impl ModelError {
    pub(crate) fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        ModelError::Io { path: path.into(), source }
    }
}
