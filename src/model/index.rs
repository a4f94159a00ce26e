//! `model.safetensors.index.json`: which shard holds which tensor.

use super::ModelError;
use super::small_file::read_small_text;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

#[derive(Deserialize)]
struct IndexFile {
    weight_map: BTreeMap<String, String>,
}

/// The checked index: tensor name to shard file name.
pub(super) struct Index {
    pub weight_map: BTreeMap<String, String>,
}

impl Index {
    pub fn read(path: &Path) -> Result<Index, ModelError> {
        let text = read_small_text(path).map_err(|e| ModelError::io(path, e))?;
        let bad = |why: String| ModelError::BadIndex { path: path.to_path_buf(), why };
        let file: IndexFile = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
        for name in file.weight_map.values() {
            // A shard is a file of this directory: an index must not name anything elsewhere.
            let mut parts = Path::new(name).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
                return Err(bad(format!("shard '{name}' is not a plain file name")));
            }
        }
        Ok(Index { weight_map: file.weight_map })
    }

    pub fn shards(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }
}
