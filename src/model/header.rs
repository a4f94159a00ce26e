//! The header of one safetensors file: `u64 length, JSON of that length`, then the tensors' bytes without holes.
//!
//! Format: <https://huggingface.co/docs/safetensors>. The JSON is kept byte for byte, since a mount shows it as it is.

use super::{Dtype, ModelError, bytes_of};
use safetensors::tensor::TensorInfo;
use serde::de::{Deserializer, MapAccess, Visitor};
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The limit that safetensors itself sets on the JSON (tensor.rs, `MAX_HEADER_SIZE`).
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// One tensor as its header names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    pub name: String,
    pub dtype: Dtype,
    /// Row-major, in elements.
    pub shape: Vec<u64>,
    /// Byte range in the *file* (not in the data section).
    pub start: u64,
    pub end: u64,
}

impl TensorEntry {
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }

    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// The checked header of one shard.
#[derive(Debug, Clone)]
pub struct Header {
    /// The file's first `8 + N` bytes.
    pub bytes: Vec<u8>,
    /// In order of their place in the file; together they fill `bytes.len()..file_bytes` exactly.
    pub tensors: Vec<TensorEntry>,
    pub file_bytes: u64,
}

impl Header {
    /// Reads and checks the header of `file`; `path` is for messages.
    pub fn read(file: &File, path: &Path) -> Result<Header, ModelError> {
        let bad = |why: String| ModelError::BadShard { path: path.to_path_buf(), why };
        let io = |e| ModelError::io(path, e);
        let file_bytes = file.metadata().map_err(io)?.len();
        if file_bytes < 8 {
            return Err(bad(format!("it has {file_bytes} bytes, fewer than the 8 of the header's length")));
        }
        let mut length = [0; 8];
        file.read_exact_at(&mut length, 0).map_err(io)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER_BYTES {
            return Err(bad(format!("its header claims {length} bytes, over the limit of {MAX_HEADER_BYTES}")));
        }
        if length > file_bytes - 8 {
            return Err(bad(format!(
                "its header claims {length} bytes, but the file has only {file_bytes}: truncated?"
            )));
        }
        let mut bytes = vec![0; 8 + length as usize];
        file.read_exact_at(&mut bytes, 0).map_err(io)?;
        let tensors = parse(&bytes[8..], 8 + length, file_bytes).map_err(bad)?;
        Ok(Header { bytes, tensors, file_bytes })
    }
}

fn parse(json: &[u8], data_start: u64, file_bytes: u64) -> Result<Vec<TensorEntry>, String> {
    let text = std::str::from_utf8(json).map_err(|e| format!("its header is not UTF-8 ({e})"))?;
    let Entries(entries) = serde_json::from_str(text).map_err(|e| format!("its header is not valid JSON ({e})"))?;
    let mut seen = HashSet::new();
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, info) in entries {
        if !seen.insert(name.clone()) {
            return Err(format!("tensor '{name}' is in its header twice"));
        }
        let shape: Vec<u64> = info.shape.iter().map(|&n| n as u64).collect();
        let (start, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
        let expected =
            shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).and_then(|n| bytes_of(info.dtype, n)).ok_or_else(
                || format!("tensor '{name}': shape {shape:?} of {:?} is not a whole number of bytes", info.dtype),
            )?;
        if end < start || end - start != expected {
            return Err(format!(
                "tensor '{name}': offsets {start}..{end} do not hold shape {shape:?} of {:?}",
                info.dtype
            ));
        }
        let file_end = end.checked_add(data_start).filter(|&e| e <= file_bytes);
        let Some(file_end) = file_end else {
            return Err(format!("tensor '{name}' ends beyond the end of the file: truncated?"));
        };
        tensors.push(TensorEntry { name, dtype: info.dtype, shape, start: data_start + start, end: file_end });
    }
    tensors.sort_by_key(|t| (t.start, t.end));
    let mut at = data_start;
    for t in &tensors {
        if t.start < at {
            return Err(format!("tensor '{}' overlaps the one before it", t.name));
        }
        if t.start > at {
            return Err(format!("there is a hole of {} bytes before tensor '{}'", t.start - at, t.name));
        }
        at = t.end;
    }
    if at != file_bytes {
        return Err(format!("it has {} bytes after its last tensor", file_bytes - at));
    }
    Ok(tensors)
}

/// The header's JSON object as a list, so that a name that occurs twice is seen (a map would keep the last one).
struct Entries(Vec<(String, TensorInfo)>);

impl<'de> serde::Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Walk;
        impl<'de> Visitor<'de> for Walk {
            type Value = Entries;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<Option<HashMap<String, String>>>()?;
                    } else {
                        entries.push((name, map.next_value::<TensorInfo>()?));
                    }
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Walk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(json: &str, data: usize) -> Result<Header, ModelError> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json.as_bytes());
        bytes.resize(bytes.len() + data, 7);
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), bytes).unwrap();
        Header::read(&File::open(path.path()).unwrap(), path.path())
    }

    fn refusal(json: &str, data: usize) -> String {
        shard(json, data).unwrap_err().to_string()
    }

    #[test]
    fn a_good_header_is_kept_byte_for_byte() {
        let json = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[],"data_offsets":[4,8]},"a":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}  "#;
        let header = shard(json, 8).unwrap();
        assert_eq!(&header.bytes[8..], json.as_bytes());
        assert_eq!(header.tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(header.tensors[1].start, 8 + json.len() as u64 + 4);
        assert_eq!(header.tensors[1].elements(), 1);
    }

    #[test]
    fn hostile_headers_are_refused_with_the_reason() {
        let one =
            |start: u64, end: u64| format!(r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":[{start},{end}]}}}}"#);
        assert!(refusal(&one(0, 4), 3).contains("beyond the end"));
        assert!(refusal(&one(0, 4), 5).contains("1 bytes after"));
        assert!(refusal(&one(4, 0), 4).contains("do not hold"));
        assert!(refusal(&one(0, 5), 5).contains("do not hold"));
        assert!(refusal(&one(u64::MAX - 3, u64::MAX), 4).contains("a"));
        assert!(refusal(&one(2, 6), 6).contains("hole"));
        let two = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#;
        assert!(refusal(two, 6).contains("overlaps"));
        let twice = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#;
        assert!(refusal(twice, 8).contains("twice"));
        let huge = r#"{"a":{"dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#;
        assert!(refusal(huge, 0).contains("whole number"));
        assert!(refusal(r#"{"a":{"dtype":"F999","shape":[],"data_offsets":[0,0]}}"#, 0).contains("F999"));
        assert!(refusal("[]", 0).contains("JSON"));
    }

    #[test]
    fn a_length_beyond_the_file_or_the_limit_is_refused() {
        let path = tempfile::NamedTempFile::new().unwrap();
        for (length, word) in [(200_000_000u64, "limit"), (50, "truncated")] {
            let mut bytes = length.to_le_bytes().to_vec();
            bytes.extend(b"{}");
            std::fs::write(path.path(), bytes).unwrap();
            let e = Header::read(&File::open(path.path()).unwrap(), path.path()).unwrap_err().to_string();
            assert!(e.contains(word), "{e}");
        }
        std::fs::write(path.path(), b"1234").unwrap();
        assert!(Header::read(&File::open(path.path()).unwrap(), path.path()).is_err());
    }
}
