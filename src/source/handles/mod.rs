//! Handle files: what `torch.save` writes of `{parameter: reduce_tensor(parameter)}`, a quick way for an engine to share its
//! CUDA memory. Read without Python and without running anything in it: [`archive`] finds the pickle, [`pickle`] reads it
//! as data, [`tensors`] makes memories and tensors of it, and [`layout`] finds the checkpoint's tensors among them. The result
//! is a manifest like any other.

mod archive;
mod layout;
mod pickle;
mod tensors;

pub(super) use layout::place;
pub(super) use tensors::{LiveMemory, LiveTensors};

use crate::memory::process_start;
use std::os::unix::fs::MetadataExt;

/// Told by its first bytes, whatever its name: a zip file, or a bare pickle.
pub(super) fn is_handle_file(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04") || is_bare_pickle(bytes)
}

fn is_bare_pickle(bytes: &[u8]) -> bool {
    matches!(bytes, [0x80, 2..=5, ..])
}

pub(super) fn read(file: &[u8]) -> Result<LiveTensors, String> {
    if file.len() as u64 > archive::MAX_BYTES {
        return Err(format!("it has {} bytes, over the limit of {}", file.len(), archive::MAX_BYTES));
    }
    let pickle = match is_bare_pickle(file) {
        true => pickle::Pickle::read(file)?,
        false => pickle::Pickle::read(&archive::pickle(file)?)?,
    };
    tensors::read(&pickle)
}

/// When process `pid` started (clock ticks since boot), if that was before the file was written: else the process that
/// wrote it has ended, and its number is another's now. `None` when there is no such process.
pub(super) fn started_before(pid: u32, file: &std::fs::Metadata) -> Result<Option<u64>, String> {
    let Some(start) = process_start(pid) else { return Ok(None) };
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let boot = stat.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse::<i64>().ok());
    // Without the time of boot nothing can be said against it. The kernel rounds both times to seconds or less.
    let Some(boot) = boot else { return Ok(Some(start)) };
    let started = boot + (start / rustix::param::clock_ticks_per_second().max(1)) as i64;
    match started > file.mtime() + 2 {
        true => Err(format!("process {pid} is another one now (it started after the file was written)")),
        false => Ok(Some(start)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOLDEN: &[u8] = include_bytes!("../../../tests/goldens/handles/qwen3_5/handles.pt");

    /// Every pickle that is read gives tensors inside their memories, whatever its bytes are.
    fn holds_together(bytes: &[u8]) {
        let Ok(live) = read(bytes) else { return };
        for tensor in live.tensors.values() {
            assert!(tensor.offset < live.memories[tensor.memory].bytes);
        }
    }

    #[test]
    fn the_zip_file_and_its_bare_pickle_are_the_same() {
        let (zip, bare) = (read(GOLDEN).unwrap(), read(&archive::pickle(GOLDEN).unwrap()).unwrap());
        assert_eq!((zip.memories.len(), zip.tensors.len(), zip.pid), (2, 22, Some(1)));
        assert_eq!((zip.memories, zip.tensors), (bare.memories, bare.tensors));
    }

    #[test]
    fn every_cut_of_the_file_is_refused() {
        let pickle = archive::pickle(GOLDEN).unwrap();
        for length in 0..pickle.len() {
            assert!(read(&pickle[..length]).is_err());
        }
        for length in (0..GOLDEN.len()).step_by(7) {
            assert!(read(&GOLDEN[..length]).is_err());
        }
    }

    proptest! {
        #[test]
        fn changed_bytes_never_panic(changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8)) {
            for mut bytes in [GOLDEN.to_vec(), archive::pickle(GOLDEN).unwrap()] {
                for (index, byte) in &changes {
                    let at = index.index(bytes.len());
                    bytes[at] = *byte;
                }
                holds_together(&bytes);
            }
        }
    }
}
