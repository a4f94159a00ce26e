//! Weights of our own: the model directory, loaded into memory of the host or of a GPU, so that no engine is needed.

use super::{Boundary, Place, Segment, Source, SourceError, row_major};
use crate::memory::cuda::{CudaMemory, Device};
use crate::memory::{BLOCK, Hash, HostMemory, Memory, block_hash};
use crate::model::{ModelDirectory, Shard};
use rayon::prelude::*;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Tensors start at multiples of this, so that vector loads of a trainer are aligned whatever the header's length.
const ALIGN: u64 = 256;
/// Read, hashed and copied as one piece: fits a core's cache.
const CHUNK: u64 = 1 << 20;

/// A loaded model, with the hashes of its shards' blocks as they were read.
pub struct OwnWeights {
    pub source: Source,
    pub hashes: Vec<Vec<Hash>>,
}

/// Reads every shard once: into memory of the host or of `device`, hashing its blocks on the way.
pub fn load_own(directory: &ModelDirectory, device: Option<&Arc<Device>>) -> Result<OwnWeights, SourceError> {
    let mut source = Source {
        updates: Default::default(),
        memories: Vec::new(),
        places: Default::default(),
        only_live: Vec::new(),
        engines: Vec::new(),
        boundary: Arc::new(Boundary::new(Vec::new())),
    };
    let mut hashes = Vec::new();
    for (index, shard) in directory.shards.iter().enumerate() {
        let mut bytes = 0;
        let mut offsets = Vec::with_capacity(shard.header.tensors.len());
        for tensor in &shard.header.tensors {
            offsets.push(bytes);
            bytes += tensor.bytes().next_multiple_of(ALIGN);
        }
        let what = format!("weightfs's own copy of {}", shard.name);
        let memory: Arc<dyn Memory> = match device {
            Some(device) => Arc::new(CudaMemory::own(device, bytes, what)?),
            None => {
                let memory = HostMemory::anonymous(bytes, &what);
                Arc::new(memory.map_err(|source| SourceError::NoMemory { bytes, source })?)
            }
        };
        hashes.push(load_shard(shard, &*memory, &offsets)?);
        for (tensor, offset) in shard.header.tensors.iter().zip(offsets) {
            let whole = Segment {
                memory: index,
                offset,
                at: vec![0; tensor.shape.len()],
                strides: row_major(&tensor.shape),
                shape: tensor.shape.clone(),
                dtype: tensor.dtype,
                replica: false,
            };
            let place = if tensor.bytes() == 0 { Place::OnlyOnDisk } else { Place::Live(vec![whole]) };
            source.places.insert(tensor.name.clone(), place);
        }
        source.memories.push(memory);
    }
    Ok(OwnWeights { source, hashes })
}

fn load_shard(shard: &Shard, memory: &dyn Memory, offsets: &[u64]) -> Result<Vec<Hash>, SourceError> {
    let tensors = &shard.header.tensors;
    let chunks = (0..shard.bytes()).step_by(CHUNK as usize).collect::<Vec<_>>();
    let hashed = chunks.into_par_iter().map(|start| {
        let mut buffer = vec![0; CHUNK.min(shard.bytes() - start) as usize];
        let io = |source| SourceError::Io { path: shard.path.clone(), source };
        shard.file().read_exact_at(&mut buffer, start).map_err(io)?;
        let end = start + buffer.len() as u64;
        let first = tensors.partition_point(|t| t.end <= start);
        for (tensor, offset) in tensors[first..].iter().zip(&offsets[first..]).take_while(|(t, _)| t.start < end) {
            let (a, b) = (tensor.start.max(start), tensor.end.min(end));
            memory.write(offset + (a - tensor.start), &buffer[(a - start) as usize..(b - start) as usize])?;
        }
        Ok(buffer.chunks(BLOCK).map(block_hash).collect::<Vec<Hash>>())
    });
    Ok(hashed.collect::<Result<Vec<_>, SourceError>>()?.concat())
}
