//! The zip file that `torch.save` writes: one folder with `data.pkl` and small files about itself, nothing compressed.

use std::io::{Cursor, Read};

/// Far beyond a file of handles, which has some 500 bytes a parameter.
pub const MAX_BYTES: u64 = 64 << 20;

/// The pickle inside.
pub fn pickle(file: &[u8]) -> Result<Vec<u8>, String> {
    let mut archive = zip::ZipArchive::new(Cursor::new(file)).map_err(|e| format!("it is no whole zip file ({e})"))?;
    let is_pickle = |name: &str| name.split_once('/').is_some_and(|(_, rest)| rest == "data.pkl");
    let names: Vec<_> =
        archive.file_names().filter_map(Result::ok).filter(|n| is_pickle(n)).map(String::from).collect();
    let [name] = names.as_slice() else {
        return Err(format!("it holds {} files data.pkl, and torch.save writes one", names.len()));
    };
    let entry = archive.by_name(name).map_err(|e| format!("its data.pkl cannot be read ({e})"))?;
    if entry.compression() != zip::CompressionMethod::Stored {
        return Err("its data.pkl is compressed, which torch.save never does".into());
    }
    let mut bytes = Vec::new();
    entry.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| format!("its data.pkl cannot be read ({e})"))?;
    match bytes.len() as u64 > MAX_BYTES {
        true => Err(format!("its data.pkl is over the limit of {MAX_BYTES} bytes")),
        false => Ok(bytes),
    }
}
