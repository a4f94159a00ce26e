//! An earlier commit as if it were live: what a rollback commits and writes back.

use super::error::CommitError;
use super::snapshot::Snapshot;
use super::stage;
use crate::image::{ImageError, ShardBytes, StepHold};
use crate::memory::{BLOCK, Hash, HostBuffer, available, hash_into};
use rayon::prelude::*;
use std::ops::Range;

/// The tensors that may differ from the newest commit are decoded into memory, once and on all cores: deltas are read from
/// front to back only, and a rollback reads them three times. Where memory does not have room for them, each read decodes
/// what the snapshot has not kept.
pub(super) struct Past<'a> {
    snapshot: &'a Snapshot,
    /// In order of shard and place.
    decoded: Vec<Decoded>,
    memory: HostBuffer,
}

/// Bytes `file` of a shard, at `at` of the memory.
struct Decoded {
    shard: usize,
    file: Range<u64>,
    at: usize,
}

/// Bytes that may be decoded into: what commits may stage in, or half of what the machine has left.
pub(super) fn limit(staging_memory: u64) -> u64 {
    staging_memory.max(available().unwrap_or(0) / 2)
}

impl<'a> Past<'a> {
    /// `differences` are the snapshot's. The memory is what `live` copies from at full speed, if it fits the memory that
    /// commits stage in.
    pub fn new(
        snapshot: &'a Snapshot,
        differences: &[(usize, Range<u64>)],
        live: Option<&dyn ShardBytes>,
        staging_memory: u64,
        limit: u64,
    ) -> Result<Past<'a>, CommitError> {
        let layout = snapshot.layout();
        let total: u64 = differences.iter().map(|(_, file)| file.end - file.start).sum();
        let failed = |e| CommitError::io("decode an earlier commit of", &layout.root, e);
        if total > limit {
            snapshot.prepare()?;
            let memory = HostBuffer::anonymous(0).map_err(failed)?;
            return Ok(Past { snapshot, decoded: Vec::new(), memory });
        }
        let mut memory = match live {
            Some(live) if total <= staging_memory => stage::arena(live, layout, total as usize)?,
            _ => HostBuffer::anonymous(total as usize).map_err(failed)?,
        };
        let mut tasks: Vec<(usize, u64, &mut [u8])> = Vec::with_capacity(differences.len());
        let (mut decoded, mut rest, mut at) = (Vec::with_capacity(differences.len()), &mut memory[..], 0);
        for (shard, file) in differences {
            let bytes = (file.end - file.start) as usize;
            let (part, after) = rest.split_at_mut(bytes);
            tasks.push((*shard, file.start, part));
            decoded.push(Decoded { shard: *shard, file: file.clone(), at });
            (rest, at) = (after, at + bytes);
        }
        // Largest first, so that the workers end together.
        tasks.sort_by_key(|(_, _, part)| std::cmp::Reverse(part.len()));
        tasks.into_par_iter().with_max_len(1).try_for_each(|(shard, start, part)| {
            snapshot.read_tensor(shard, layout.shards[shard].tensor_at(start), part)
        })?;
        Ok(Past { snapshot, decoded, memory })
    }

    /// Whether any place is as quickly read as any other.
    pub fn is_decoded(&self) -> bool {
        !self.decoded.is_empty()
    }

    /// Bytes `range` of a shard, where they lie in memory in one piece.
    pub fn bytes(&self, shard: usize, range: Range<u64>) -> Option<&[u8]> {
        let i = self.decoded.partition_point(|d| (d.shard, d.file.end) <= (shard, range.start));
        let found = self.decoded.get(i).filter(|d| d.shard == shard && d.file.start <= range.start)?;
        (range.end <= found.file.end).then(|| found.part(&self.memory, range.start, range.end))
    }

    pub fn read(&self, shard: usize, offset: u64, dst: &mut [u8]) -> Result<(), CommitError> {
        let end = offset + dst.len() as u64;
        let mut at = offset;
        let place = |from: u64, to: u64| (from - offset) as usize..(to - offset) as usize;
        let first = self.decoded.partition_point(|d| (d.shard, d.file.end) <= (shard, offset));
        for d in self.decoded[first..].iter().take_while(|d| (d.shard, d.file.start) < (shard, end)) {
            let (from, to) = (d.file.start.max(offset), d.file.end.min(end));
            if at < from {
                self.snapshot.read(shard, at, &mut dst[place(at, from)])?;
            }
            dst[place(from, to)].copy_from_slice(d.part(&self.memory, from, to));
            at = to;
        }
        match at < end {
            true => self.snapshot.read(shard, at, &mut dst[place(at, end)]),
            false => Ok(()),
        }
    }
}

impl Decoded {
    /// Bytes `from..to` of the shard.
    fn part<'m>(&self, memory: &'m [u8], from: u64, to: u64) -> &'m [u8] {
        let start = self.at + (from - self.file.start) as usize;
        &memory[start..start + (to - from) as usize]
    }
}

fn image_error(e: CommitError) -> ImageError {
    ImageError::Disk { path: ".weightfs/log".into(), source: std::io::Error::other(e) }
}

impl ShardBytes for Past<'_> {
    fn shards(&self) -> usize {
        self.snapshot.shards()
    }

    fn shard_bytes(&self, shard: usize) -> u64 {
        self.snapshot.shard_bytes(shard)
    }

    fn hold(&self) -> Result<StepHold, ImageError> {
        Ok(StepHold::new(()))
    }

    fn read(&self, shard: usize, offset: u64, dst: &mut [u8]) -> Result<(), ImageError> {
        Past::read(self, shard, offset, dst).map_err(image_error)
    }

    fn hash(&self, shard: usize, first: u64, out: &mut [Hash]) -> Result<(), ImageError> {
        let start = first * BLOCK as u64;
        let end = (start + (out.len() * BLOCK) as u64).min(self.shard_bytes(shard));
        if let Some(bytes) = self.bytes(shard, start..end) {
            hash_into(bytes, out);
            return Ok(());
        }
        let mut buffer = vec![0; (end - start) as usize];
        ShardBytes::read(self, shard, start, &mut buffer)?;
        hash_into(&buffer, out);
        Ok(())
    }

    fn write(&self, _: usize, _: u64, _: &[u8]) -> Result<(), ImageError> {
        Ok(()) // nothing commits into the past
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commit::{CommitRequest, Committer, Options};
    use crate::model::ModelDirectory;
    use parking_lot::Mutex;
    use safetensors::tensor::{Dtype, TensorView};
    use std::sync::Arc;

    /// One shard in memory.
    struct Live(Mutex<Vec<u8>>);

    impl ShardBytes for Live {
        fn shards(&self) -> usize {
            1
        }

        fn shard_bytes(&self, _: usize) -> u64 {
            self.0.lock().len() as u64
        }

        fn hold(&self) -> Result<StepHold, ImageError> {
            Ok(StepHold::new(()))
        }

        fn read(&self, _: usize, offset: u64, dst: &mut [u8]) -> Result<(), ImageError> {
            dst.copy_from_slice(&self.0.lock()[offset as usize..][..dst.len()]);
            Ok(())
        }

        fn hash(&self, _: usize, first: u64, out: &mut [Hash]) -> Result<(), ImageError> {
            let all = self.0.lock();
            let from = first as usize * BLOCK;
            hash_into(&all[from..(from + out.len() * BLOCK).min(all.len())], out);
            Ok(())
        }

        fn write(&self, _: usize, offset: u64, src: &[u8]) -> Result<(), ImageError> {
            self.0.lock()[offset as usize..][..src.len()].copy_from_slice(src);
            Ok(())
        }
    }

    #[test]
    fn an_earlier_commit_reads_the_same_with_room_to_decode_it_and_without() {
        let directory = tempfile::tempdir().unwrap();
        let values: Vec<u8> = (0..200_000u32).map(|i| (i * 7 % 251) as u8).collect();
        let view = |n: usize| TensorView::new(Dtype::BF16, vec![n / 2], &values[..n]).unwrap();
        let tensors = [("a", view(70_002)), ("b", view(30_000)), ("c", view(10)), ("d", view(99_990))];
        let file = safetensors::serialize(tensors, None).unwrap();
        std::fs::write(directory.path().join("model.safetensors"), &file).unwrap();
        std::fs::write(directory.path().join("config.json"), "{}").unwrap();
        let model = Arc::new(ModelDirectory::open(directory.path()).unwrap());
        let live = Live(Mutex::new(file.clone()));
        let (committer, _) = Committer::open(model.clone(), Options::default()).unwrap();
        let start = |name: &str| model.shards[0].header.tensors.iter().find(|t| t.name == name).unwrap().start as usize;
        let mut states = vec![file.clone()];
        // "b" stays as it is between the others.
        for (step, places) in [(1, vec![("a", 0), ("a", 70_000), ("d", 50_000)]), (2, vec![("c", 4), ("a", 69_000)])] {
            let mut all = live.0.lock();
            places.iter().for_each(|(name, at)| all[start(name) + at] ^= 0x55);
            states.push(all.clone());
            drop(all);
            assert!(committer.commit(&live, &CommitRequest::new("", step)).unwrap().commit.is_some());
        }
        for id in 0..2 {
            let snapshot = committer.snapshot(id).unwrap();
            let differences = snapshot.differences();
            for (limit, is_decoded) in [(0, false), (u64::MAX, true)] {
                let past = Past::new(&snapshot, &differences, Some(&live), limit, limit).unwrap();
                assert_eq!(past.is_decoded(), is_decoded);
                let wanted = &states[id as usize];
                let mut all = vec![0; file.len()];
                past.read(0, 0, &mut all).unwrap();
                assert!(all == *wanted, "commit {id}, at most {limit} bytes");
                for (at, n) in [(start("a") + 69_999, 3), (start("b") - 5, 30_010), (file.len() - 1, 1), (8, 0)] {
                    let mut part = vec![0; n];
                    past.read(0, at as u64, &mut part).unwrap();
                    assert_eq!(part, wanted[at..at + n]);
                }
                let blocks = file.len().div_ceil(BLOCK);
                let (mut hashes, mut expected) = (vec![0; blocks], vec![0; blocks]);
                for (first, out) in hashes.chunks_mut(3).enumerate() {
                    past.hash(0, 3 * first as u64, out).unwrap();
                }
                hash_into(wanted, &mut expected);
                assert_eq!(hashes, expected);
            }
        }
    }
}
