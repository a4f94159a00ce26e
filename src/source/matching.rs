//! Manifests against a model directory: which tensors are live, and whether every segment is what it claims to be.
//! Nothing is mapped here; a manifest that passes can be.

use super::{Manifest, Place, Segment, SourceError, cover, row_major};
use crate::model::{ModelDirectory, TensorEntry, bytes_of, element_bytes, is_castable};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

/// What `weightfs diagnose` shows: every tensor in one of five classes.
#[derive(Debug, Default, serde::Serialize)]
pub struct Diagnosis {
    pub matched: Vec<String>,
    pub only_live: Vec<String>,
    pub only_on_disk: Vec<String>,
    /// Name and what is wrong: shape, dtype, a segment outside its memory, a box missing or twice.
    pub wrong: Vec<(String, String)>,
    /// Name and the engine's reason.
    pub opaque: Vec<(String, String)>,
}

/// Compares manifests with a directory without mapping anything.
pub fn diagnose(directory: &ModelDirectory, paths: &[PathBuf]) -> Result<Diagnosis, SourceError> {
    let manifests = read_all(directory, paths)?;
    let matched = matching(directory, &manifests);
    let mut diagnosis = Diagnosis { only_live: matched.only_live, wrong: matched.wrong, ..Diagnosis::default() };
    for (name, place) in matched.places {
        match place {
            Place::Live(_) => diagnosis.matched.push(name),
            Place::Opaque(reason) => diagnosis.opaque.push((name, reason)),
            Place::OnlyOnDisk => diagnosis.only_on_disk.push(name),
        }
    }
    diagnosis.matched.sort();
    diagnosis.only_on_disk.sort();
    diagnosis.opaque.sort();
    Ok(diagnosis)
}

/// Opens every manifest and checks them against each other: one manifest for each rank, no more.
pub(super) fn read_all(directory: &ModelDirectory, paths: &[PathBuf]) -> Result<Vec<Manifest>, SourceError> {
    let manifests = paths.iter().map(|p| Manifest::read(p, directory)).collect::<Result<Vec<_>, _>>()?;
    let world = manifests[0].world_size;
    let mut seen = BTreeMap::new();
    for manifest in &manifests {
        let bad = |why: String| SourceError::BadManifest { path: manifest.path.clone(), why };
        if manifest.world_size != world {
            return Err(bad(format!("it is one of {} ranks, the first manifest one of {world}", manifest.world_size)));
        }
        if let Some(first) = seen.insert(manifest.rank, &manifest.path) {
            return Err(bad(format!(
                "it is rank {} as {} is: one manifest a rank",
                manifest.rank,
                Path::display(first)
            )));
        }
    }
    // A rank left out would keep old values of every tensor that is replicated on all ranks.
    if let Some(missing) = (0..world).find(|rank| !seen.contains_key(rank)) {
        let why = format!(
            "rank {missing} of {world} is missing: pass the manifests of all ranks, --weights MANIFEST for each"
        );
        return Err(SourceError::BadManifest { path: paths[0].clone(), why });
    }
    Ok(manifests)
}

pub(super) struct Matched {
    pub places: HashMap<String, Place>,
    pub only_live: Vec<String>,
    pub wrong: Vec<(String, String)>,
}

pub(super) fn matching(directory: &ModelDirectory, manifests: &[Manifest]) -> Matched {
    let mut matched = Matched { places: HashMap::new(), only_live: Vec::new(), wrong: Vec::new() };
    for (_, tensor) in directory.tensors() {
        // Opaque on one rank is opaque: written on the others only, the ranks would compute with different weights.
        if let Some(reason) = manifests.iter().find_map(|m| m.opaque.get(&tensor.name)) {
            matched.places.insert(tensor.name.clone(), Place::Opaque(reason.clone()));
            continue;
        }
        let place = match live_segments(tensor, manifests) {
            Ok(segments) if segments.is_empty() => Place::OnlyOnDisk,
            Ok(segments) => Place::Live(segments),
            Err(why) => {
                matched.wrong.push((tensor.name.clone(), why));
                continue;
            }
        };
        matched.places.insert(tensor.name.clone(), place);
    }
    let on_disk: HashSet<&str> = directory.tensors().map(|(_, t)| t.name.as_str()).collect();
    let live = manifests.iter().flat_map(|m| m.tensors.keys());
    matched.only_live = live.filter(|n| !on_disk.contains(n.as_str())).cloned().collect();
    matched.only_live.sort();
    matched.only_live.dedup();
    matched.wrong.sort();
    matched
}

/// The checked segments of one tensor over all ranks, or what is wrong with them. Empty: no manifest has it.
fn live_segments(tensor: &TensorEntry, manifests: &[Manifest]) -> Result<Vec<Segment>, String> {
    let mut segments = Vec::new();
    let (mut first_memory, mut named) = (0, false);
    for (rank, manifest) in manifests.iter().enumerate() {
        if let Some(why) = manifest.wrong.get(&tensor.name) {
            return Err(why.clone());
        }
        if let Some(entry) = manifest.tensors.get(&tensor.name) {
            named = true;
            if entry.shape != tensor.shape {
                return Err(format!("its shape is {:?} live and {:?} on disk", entry.shape, tensor.shape));
            }
            if entry.dtype != tensor.dtype {
                return Err(format!("its dtype is {:?} in the manifest and {:?} on disk", entry.dtype, tensor.dtype));
            }
            for segment in &entry.segments {
                let mut segment = segment.clone();
                check_segment(&segment, tensor, manifest)?;
                segment.memory += first_memory;
                segments.push((rank, segment));
            }
        }
        first_memory += manifest.memories.len();
    }
    if !named {
        return Ok(Vec::new());
    }
    cover::check(&tensor.shape, segments)
}

fn check_segment(s: &Segment, tensor: &TensorEntry, manifest: &Manifest) -> Result<(), String> {
    let rank = tensor.shape.len();
    if s.at.len() != rank || s.shape.len() != rank || s.strides.len() != rank {
        return Err(format!(
            "a segment has {}, {} and {} values in at, shape and strides; the tensor has {rank} dimensions",
            s.at.len(),
            s.shape.len(),
            s.strides.len()
        ));
    }
    for d in 0..rank {
        if s.at[d].checked_add(s.shape[d]).is_none_or(|end| end > tensor.shape[d]) {
            return Err(format!(
                "a segment at {:?} of shape {:?} lies outside the tensor's shape {:?}",
                s.at, s.shape, tensor.shape
            ));
        }
    }
    if s.shape.contains(&0) {
        return Err(format!("a segment of shape {:?} holds nothing", s.shape));
    }
    if s.dtype != tensor.dtype && !(is_castable(s.dtype) && is_castable(tensor.dtype)) {
        return Err(format!("a segment holds {:?}, which is not cast to the file's {:?}", s.dtype, tensor.dtype));
    }
    let Some(memory) = manifest.memories.get(s.memory) else {
        return Err(format!("a segment names memory {}, but the manifest has {}", s.memory, manifest.memories.len()));
    };
    let outside =
        || format!("a segment at byte {} of memory {} lies outside its {} bytes", s.offset, s.memory, memory.bytes());
    let Some(element) = element_bytes(s.dtype) else {
        // Types smaller than a byte: only as a whole tensor in one piece, which is copied as bytes.
        let whole = s.shape == tensor.shape && s.strides == row_major(&s.shape);
        let bytes = bytes_of(s.dtype, tensor.elements()).ok_or_else(outside)?;
        return match whole {
            false => Err(format!("a segment of {:?} must hold the whole tensor, packed", s.dtype)),
            true if s.offset.checked_add(bytes).is_none_or(|e| e > memory.bytes()) => Err(outside()),
            true => Ok(()),
        };
    };
    let last =
        s.shape.iter().zip(&s.strides).try_fold(0u64, |n, (&d, &stride)| n.checked_add((d - 1).checked_mul(stride)?));
    let end = last.and_then(|n| n.checked_add(1)?.checked_mul(element as u64)?.checked_add(s.offset));
    if end.is_none_or(|e| e > memory.bytes()) {
        return Err(outside());
    }
    // Sorted by stride, each dimension must step over the whole extent of the smaller ones: then no two elements share
    // a place, and writing one never changes another.
    let mut dims: Vec<(u64, u64)> =
        s.shape.iter().zip(&s.strides).filter(|&(&d, _)| d > 1).map(|(&d, &st)| (st, d)).collect();
    dims.sort_unstable();
    let mut extent = 0u64;
    for (stride, size) in dims {
        if stride <= extent {
            return Err(format!(
                "a segment of shape {:?} with strides {:?} puts several elements in one place",
                s.shape, s.strides
            ));
        }
        extent += (size - 1) * stride;
    }
    Ok(())
}
