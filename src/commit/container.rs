//! safetensors files whose tensors are byte blobs, written from front to back before their sizes are known: room for the
//! header is left at the start (a header may end in spaces) and filled in at the end.

use super::error::CommitError;
use super::state::hex;
use super::storage::{Access, Storage, StoredFile};
use crate::memory::Hash;
use crate::model::MAX_HEADER_BYTES;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_128};

/// Bytes gathered before they are handed to the file.
const BUFFER: usize = 4 << 20;

/// What the head of a record says of a file beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFacts {
    pub file: String,
    pub bytes: u64,
    /// XXH3-128 of the header (the first 8 + N bytes), 32 hexadecimal digits.
    pub header: String,
    /// XXH3-128 of the bytes behind the header.
    pub data: String,
}

pub struct ContainerWriter {
    file: Arc<dyn StoredFile>,
    name: String,
    /// Header, with the eight bytes of its length.
    header_bytes: u64,
    /// Bytes of data so far, the buffered ones included.
    written: u64,
    buffer: Vec<u8>,
    hasher: Xxh3Default,
    entries: Map<String, Value>,
    metadata: Map<String, Value>,
    open: Option<(String, u64)>,
}

impl ContainerWriter {
    pub fn create<'a>(
        storage: &dyn Storage,
        directory: &str,
        name: &str,
        names: impl Iterator<Item = &'a str>,
    ) -> io::Result<ContainerWriter> {
        ContainerWriter::new(storage.open(&format!("{directory}/{name}"), Access::Create)?, name, names)
    }

    /// Room in the header is kept for `names`, each with a checksum of 32 digits in the metadata.
    pub fn new<'a>(
        file: Arc<dyn StoredFile>,
        name: &str,
        names: impl Iterator<Item = &'a str>,
    ) -> io::Result<ContainerWriter> {
        // An entry is at most `"name":{"dtype":"U8","shape":[n],"data_offsets":[n,n]},` and `"name":"checksum",`.
        let json: usize = names.map(|n| 2 * Value::from(n).to_string().len() + 160).sum::<usize>() + 64;
        let header_bytes = 8 + (json as u64).next_multiple_of(8);
        if header_bytes > MAX_HEADER_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the names of the tensors fill over 100 MB"));
        }
        Ok(ContainerWriter {
            file,
            name: name.to_string(),
            header_bytes,
            written: 0,
            buffer: Vec::with_capacity(BUFFER),
            hasher: Xxh3Default::new(),
            entries: Map::new(),
            metadata: Map::new(),
            open: None,
        })
    }

    pub fn begin(&mut self, tensor: &str) {
        self.open = Some((tensor.to_string(), self.written));
    }

    /// Ends the tensor begun last, which is the bytes written since.
    pub fn end(&mut self) {
        if let Some((tensor, start)) = self.open.take() {
            self.entry(tensor, "U8", json!([self.written - start]), start);
        }
    }

    pub fn entry(&mut self, tensor: String, dtype: &str, shape: Value, start: u64) {
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, self.written]});
        self.entries.insert(tensor, entry);
    }

    pub fn metadata(&mut self, key: &str, value: String) {
        self.metadata.insert(key.to_string(), value.into());
    }

    pub fn written(&self) -> u64 {
        self.written
    }

    fn flush_buffer(&mut self) -> io::Result<()> {
        let at = self.header_bytes + self.written - self.buffer.len() as u64;
        self.file.write_all_at(&self.buffer, at)?;
        self.file.write_behind(at, self.buffer.len() as u64);
        self.buffer.clear();
        Ok(())
    }

    /// Writes what is left and the header, and makes the file durable.
    pub fn finish(mut self) -> io::Result<FileFacts> {
        self.flush_buffer()?;
        let mut header = Map::new();
        header.insert("__metadata__".into(), Value::Object(std::mem::take(&mut self.metadata)));
        header.extend(std::mem::take(&mut self.entries));
        let mut bytes = vec![0; 8];
        bytes[..8].copy_from_slice(&(self.header_bytes - 8).to_le_bytes());
        bytes.extend(Value::Object(header).to_string().into_bytes());
        if bytes.len() as u64 > self.header_bytes {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the header does not fit the room kept for it"));
        }
        bytes.resize(self.header_bytes as usize, b' ');
        self.file.write_all_at(&bytes, 0)?;
        self.file.sync()?;
        Ok(FileFacts {
            file: self.name.clone(),
            bytes: self.header_bytes + self.written,
            header: hex(xxh3_128(&bytes)),
            data: hex(self.hasher.digest128()),
        })
    }
}

impl Write for ContainerWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.hasher.update(bytes);
        self.written += bytes.len() as u64;
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= BUFFER {
            self.flush_buffer()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A container whose header was checked against what the record's head says of it.
pub struct Container {
    storage: Arc<dyn Storage>,
    name: String,
    path: PathBuf,
    /// Open files are few: a file is opened when it is read, unless it was kept open before it was removed.
    kept: OnceLock<Arc<dyn StoredFile>>,
    facts: FileFacts,
    data_start: u64,
    pub entries: HashMap<String, Entry>,
    pub metadata: HashMap<String, String>,
}

#[derive(Debug, Deserialize)]
pub struct Entry {
    pub dtype: String,
    pub shape: Vec<u64>,
    /// Byte range in the data section.
    data_offsets: (u64, u64),
}

impl Container {
    /// `root` is the model directory, for messages.
    pub fn open(
        storage: &Arc<dyn Storage>,
        root: &Path,
        directory: &str,
        facts: &FileFacts,
    ) -> Result<Container, CommitError> {
        let name = format!("{directory}/{}", facts.file);
        let path = root.join(&name);
        let corrupt = |why: String| CommitError::corrupt(&path, why);
        let io = |e: io::Error| match e.kind() {
            io::ErrorKind::NotFound => corrupt("it is missing".into()),
            _ => CommitError::io("read", &path, e),
        };
        let file = storage.open(&name, Access::Read).map_err(io)?;
        let bytes = file.stat().map_err(io)?.bytes;
        if bytes != facts.bytes || bytes < 8 {
            return Err(corrupt(format!("it has {bytes} bytes where {} were committed", facts.bytes)));
        }
        let mut length = [0; 8];
        file.read_exact_at(&mut length, 0).map_err(io)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER_BYTES || length > bytes - 8 {
            return Err(corrupt(format!("its header claims {length} bytes")));
        }
        let mut header = vec![0; 8 + length as usize];
        file.read_exact_at(&mut header, 0).map_err(io)?;
        if hex(xxh3_128(&header)) != facts.header {
            return Err(corrupt("the checksum of its header does not fit".into()));
        }
        let mut json: HashMap<String, Value> =
            serde_json::from_slice(&header[8..]).map_err(|e| corrupt(e.to_string()))?;
        let metadata = match json.remove("__metadata__") {
            Some(value) => serde_json::from_value(value).map_err(|e| corrupt(e.to_string()))?,
            None => HashMap::new(),
        };
        let data_start = 8 + length;
        let mut entries = HashMap::with_capacity(json.len());
        for (tensor, value) in json {
            let entry: Entry = serde_json::from_value(value).map_err(|e| corrupt(format!("tensor '{tensor}': {e}")))?;
            let (start, end) = entry.data_offsets;
            if end < start || end > bytes - data_start {
                return Err(corrupt(format!("tensor '{tensor}' lies outside it")));
            }
            entries.insert(tensor, entry);
        }
        let (storage, facts, kept) = (storage.clone(), facts.clone(), OnceLock::new());
        Ok(Container { storage, name, path, kept, facts, data_start, entries, metadata })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn file(&self) -> Result<Arc<dyn StoredFile>, CommitError> {
        if let Some(file) = self.kept.get() {
            return Ok(file.clone());
        }
        match self.storage.open(&self.name, Access::Read) {
            Ok(file) => Ok(file),
            // Pruned this moment: then it was kept first.
            Err(e) => self.kept.get().cloned().ok_or_else(|| CommitError::io("open", &self.path, e)),
        }
    }

    /// Keeps the file readable after its removal.
    pub fn keep(&self) -> Result<(), CommitError> {
        let file = self.file()?;
        self.kept.get_or_init(|| file);
        Ok(())
    }

    /// The bytes of a tensor, in order.
    pub fn read(&self, tensor: &str) -> Result<FileSlice, CommitError> {
        let Some(entry) = self.entries.get(tensor) else {
            return Err(CommitError::corrupt(&self.path, format!("tensor '{tensor}' is not in it")));
        };
        let (start, end) = entry.data_offsets;
        Ok(FileSlice { file: self.file()?, at: self.data_start + start, end: self.data_start + end })
    }

    pub fn checksum(&self, tensor: &str) -> Option<Hash> {
        Hash::from_str_radix(self.metadata.get(tensor)?, 16).ok()
    }

    /// Reads all of it and compares its checksum.
    pub fn verify(&self) -> Result<(), CommitError> {
        let mut hasher = Xxh3Default::new();
        let mut slice = FileSlice { file: self.file()?, at: self.data_start, end: self.facts.bytes };
        let mut buffer = vec![0; 1 << 20];
        loop {
            match slice.read(&mut buffer).map_err(|e| CommitError::io("read", &self.path, e))? {
                0 => break,
                n => hasher.update(&buffer[..n]),
            }
        }
        match hex(hasher.digest128()) == self.facts.data {
            true => Ok(()),
            false => Err(CommitError::corrupt(&self.path, "the checksum of its data does not fit")),
        }
    }
}

/// A part of a file as a stream.
pub struct FileSlice {
    file: Arc<dyn StoredFile>,
    at: u64,
    end: u64,
}

impl Read for FileSlice {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = (self.end - self.at).min(buffer.len() as u64) as usize;
        self.file.read_exact_at(&mut buffer[..n], self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}
