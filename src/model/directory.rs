//! The model directory as a whole: its shards in a fixed order, each with its checked header and an open file.

use super::ModelError;
use super::header::{Header, TensorEntry};
use super::index::Index;
use super::regular::open_regular;
use parking_lot::RwLock;
use rustix::fs::OFlags;
use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Our own state beside the weights; hidden in a mount.
pub const STATE_DIR: &str = ".weightfs";
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// One weights file.
#[derive(Debug)]
pub struct Shard {
    /// File name inside the model directory.
    pub name: String,
    /// The name inside the directory, which may be a symbolic link (a hub cache holds links only).
    pub path: PathBuf,
    pub header: Header,
    file: RwLock<Arc<File>>,
}

impl Shard {
    fn open(dir: &Path, name: &str) -> Result<Shard, ModelError> {
        let path = dir.join(name);
        let file = open_weights(&path)?;
        let header = Header::read(&file, &path)?;
        Ok(Shard { name: name.to_string(), path, header, file: RwLock::new(Arc::new(file)) })
    }

    /// Open for reading. What no engine holds is read here, and what an engine's coarser values are rounded from.
    pub fn file(&self) -> Arc<File> {
        self.file.read().clone()
    }

    /// Takes the file that has the name now, where that is another one with the same header.
    fn reopen(&self) -> Result<(), ModelError> {
        let identity =
            |file: &File| file.metadata().map(|m| (m.dev(), m.ino())).map_err(|e| ModelError::io(&self.path, e));
        let file = open_weights(&self.path)?;
        if identity(&file)? == identity(&self.file())? {
            return Ok(());
        }
        let header = Header::read(&file, &self.path)?;
        if (&header.bytes, header.file_bytes) != (&self.header.bytes, self.header.file_bytes) {
            let why = "another file with other tensors took its place".into();
            return Err(ModelError::BadShard { path: self.path.clone(), why });
        }
        *self.file.write() = Arc::new(file);
        Ok(())
    }

    pub fn bytes(&self) -> u64 {
        self.header.file_bytes
    }
}

fn open_weights(path: &Path) -> Result<File, ModelError> {
    open_regular(File::options().read(true), OFlags::empty(), path).map_err(|e| ModelError::io(path, e))
}

/// A model directory whose shards were all found and checked.
#[derive(Debug)]
pub struct ModelDirectory {
    /// Canonical path.
    pub path: PathBuf,
    /// Sorted by name.
    pub shards: Vec<Shard>,
}

impl ModelDirectory {
    /// Opens `path`: the shards its index names, or `model.safetensors`, or the only safetensors file there is.
    pub fn open(path: &Path) -> Result<ModelDirectory, ModelError> {
        let path = path.canonicalize().map_err(|e| ModelError::io(path, e))?;
        let index_path = path.join(INDEX);
        let (names, index) = if index_path.exists() {
            let index = Index::read(&index_path)?;
            (index.shards().into_iter().map(String::from).collect(), Some(index))
        } else {
            (vec![single_file(&path)?], None)
        };
        if names.is_empty() {
            return Err(ModelError::NoWeights { path });
        }
        let shards =
            names.iter().map(|n| Shard::open(&path, n)).collect::<Result<Vec<_>, _>>().map_err(|e| match e {
                ModelError::Io { path, source } if source.kind() == ErrorKind::NotFound && index.is_some() => {
                    let why = format!("it names {}, which is not there: download it again", path.display());
                    ModelError::BadIndex { path: index_path.clone(), why }
                }
                other => other,
            })?;
        let directory = ModelDirectory { path, shards };
        let homes = directory.tensor_homes()?;
        if let Some(index) = index {
            for (tensor, shard) in &index.weight_map {
                let home = homes.get(tensor.as_str()).map(|&(s, _)| directory.shards[s].name.as_str());
                if home != Some(shard) {
                    let found = home.map_or("nowhere".to_string(), |h| format!("in {h}"));
                    let why = format!("it says that tensor '{tensor}' is in {shard}, but it is {found}");
                    return Err(ModelError::BadIndex { path: index_path, why });
                }
            }
        }
        Ok(directory)
    }

    /// Tensor name to (shard, position in that shard's header). Fails when two shards hold one name.
    pub fn tensor_homes(&self) -> Result<HashMap<&str, (usize, usize)>, ModelError> {
        let mut homes = HashMap::new();
        for (s, shard) in self.shards.iter().enumerate() {
            for (t, tensor) in shard.header.tensors.iter().enumerate() {
                if let Some((first, _)) = homes.insert(tensor.name.as_str(), (s, t)) {
                    return Err(ModelError::DuplicateTensor {
                        name: tensor.name.clone(),
                        first: self.shards[first].name.clone(),
                        second: shard.name.clone(),
                    });
                }
            }
        }
        Ok(homes)
    }

    pub fn tensors(&self) -> impl Iterator<Item = (usize, &TensorEntry)> {
        self.shards.iter().enumerate().flat_map(|(s, shard)| shard.header.tensors.iter().map(move |t| (s, t)))
    }

    /// Bytes of all shards.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().map(Shard::bytes).sum()
    }

    /// A fold puts private copies in the place of weights files that others share: reads the files that are there now. One that
    /// cannot be taken stays what it was; returns why.
    pub fn reopen(&self) -> Result<(), ModelError> {
        self.shards.iter().map(Shard::reopen).fold(Ok(()), Result::and)
    }

    pub fn state_dir(&self) -> PathBuf {
        self.path.join(STATE_DIR)
    }
}

fn single_file(dir: &Path) -> Result<String, ModelError> {
    if dir.join(SINGLE).exists() {
        return Ok(SINGLE.to_string());
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| ModelError::io(dir, e))? {
        let name = entry.map_err(|e| ModelError::io(dir, e))?.file_name();
        if let Some(name) = name.to_str().filter(|n| n.ends_with(".safetensors")) {
            found.push(name.to_string());
        }
    }
    match found.len() {
        1 => Ok(found.remove(0)),
        _ => Err(ModelError::NoWeights { path: dir.to_path_buf() }),
    }
}
