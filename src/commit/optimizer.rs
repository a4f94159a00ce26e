//! The optimizer's state: a blob of named tensors and a JSON header from the trainer, one safetensors file a commit in
//! `.weightfs/optimizer/`, durable before the record that names it is.

use super::container::{Container, ContainerWriter, FileFacts};
use super::error::CommitError;
use super::layout::Layout;
use super::record;
use super::storage::{Access, Stat, Storage, StoredFile};
use serde_json::json;
use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::sync::Arc;

pub const OPTIMIZER: &str = ".weightfs/optimizer";
/// The key of the trainer's JSON in the file's metadata.
const HEADER: &str = "weightfs";

/// What a trainer hands over, and gets back.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OptimizerState {
    /// JSON of the trainer's own: settings, counters, random state.
    pub header: String,
    /// Keyed by Hugging Face tensor name and what it is of that tensor.
    pub tensors: Vec<OptimizerTensor>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptimizerTensor {
    pub name: String,
    /// As in a safetensors header: "F32", "BF16", …
    pub dtype: String,
    pub shape: Vec<u64>,
    pub bytes: Vec<u8>,
}

pub fn file_name(id: u64) -> String {
    format!("{}.safetensors", record::name(id))
}

/// Writes the state as of commit `id`. Durable when it returns, but for the directory's entry.
pub fn write(
    storage: &dyn Storage,
    layout: &Layout,
    id: u64,
    state: &OptimizerState,
) -> Result<FileFacts, CommitError> {
    let name = file_name(id);
    let path = format!("{OPTIMIZER}/{name}");
    let written = storage.open(&path, Access::Create).and_then(|file| put(file, &name, state));
    written.map_err(|e| layout.io("write", &path, e))
}

/// What [`write`] would say of the state, without writing it.
pub fn facts(state: &OptimizerState) -> io::Result<FileFacts> {
    put(Arc::new(Nowhere), "", state)
}

fn put(file: Arc<dyn StoredFile>, name: &str, state: &OptimizerState) -> io::Result<FileFacts> {
    let names = state.tensors.iter().map(|t| t.name.as_str());
    // The trainer's JSON counts as a name: there is room for it twice over. Shapes may be longer than a blob's.
    let shapes: Vec<String> = state.tensors.iter().map(|t| format!("{:?}", t.shape)).collect();
    let names = names.chain([state.header.as_str()]).chain(shapes.iter().map(String::as_str));
    let mut file = ContainerWriter::new(file, name, names)?;
    file.metadata(HEADER, state.header.clone());
    for tensor in &state.tensors {
        let start = file.written();
        file.write_all(&tensor.bytes)?;
        file.entry(tensor.name.clone(), &tensor.dtype, json!(tensor.shape), start);
    }
    file.finish()
}

/// A file that keeps nothing.
struct Nowhere;

impl StoredFile for Nowhere {
    fn read_exact_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::UnexpectedEof.into())
    }

    fn write_all_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Ok(())
    }

    fn set_mtime(&self, _: i64) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn stat(&self) -> io::Result<Stat> {
        Ok(Stat { bytes: 0, mtime_ns: 0, inode: 0 })
    }

    fn forget_cache(&self) {}
}

/// Is the state in a file this one? Compares checksums only.
pub fn is_same(facts: &FileFacts, written: &FileFacts) -> bool {
    facts.data == written.data && facts.header == written.header && facts.bytes == written.bytes
}

pub fn read(storage: &Arc<dyn Storage>, layout: &Layout, facts: &FileFacts) -> Result<OptimizerState, CommitError> {
    let container = Container::open(storage, &layout.root, OPTIMIZER, facts)?;
    container.verify()?;
    let header = container.metadata.get(HEADER).cloned().unwrap_or_default();
    let mut tensors = Vec::with_capacity(container.entries.len());
    for (name, entry) in &container.entries {
        let mut bytes = Vec::new();
        container.read(name)?.read_to_end(&mut bytes).map_err(|e| CommitError::io("read", container.path(), e))?;
        let (dtype, shape) = (entry.dtype.clone(), entry.shape.clone());
        tensors.push(OptimizerTensor { name: name.clone(), dtype, shape, bytes });
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(OptimizerState { header, tensors })
}

/// Removes the files that no record names.
pub fn remove_unnamed(storage: &dyn Storage, named: &HashSet<&str>) -> io::Result<()> {
    for file in storage.list(OPTIMIZER)? {
        if !named.contains(file.as_str()) {
            storage.remove_file(&format!("{OPTIMIZER}/{file}"))?;
        }
    }
    Ok(())
}
