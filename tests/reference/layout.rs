//! Puts tensors into memories: cuts them into boxes, chooses ranks, memories, orders and gaps, and writes down in the
//! manifests' JSON what it did. Where each element went is kept in a plain list.

use super::cast::cast;
use super::recipe::Keep;
use super::{Home, Random, Reference, Tensor};
use serde_json::{Value, json};
use weightfs::model::Dtype;

/// Memories a rank has.
pub const MEMORIES: usize = 2;

#[derive(Debug, Clone)]
struct Box {
    at: Vec<usize>,
    shape: Vec<usize>,
}

pub fn name(dtype: Dtype) -> Value {
    serde_json::to_value(dtype).unwrap()
}

fn row_major(shape: &[usize]) -> Vec<usize> {
    (0..shape.len()).map(|d| shape[d + 1..].iter().product()).collect()
}

/// Every index of a box, one by one.
fn indices(shape: &[usize]) -> Vec<Vec<usize>> {
    let mut all = vec![vec![]];
    for &size in shape {
        all = all.iter().flat_map(|i| (0..size).map(move |n| [&i[..], &[n]].concat())).collect();
    }
    all
}

fn cut(shape: &[usize], cuts: &[(usize, usize)], random: &mut Random) -> Vec<Box> {
    let mut boxes = vec![Box { at: vec![0; shape.len()], shape: shape.to_vec() }];
    for &(d, position) in cuts {
        let n = random.below(boxes.len());
        let d = d % shape.len().max(1);
        if shape.is_empty() || boxes[n].shape[d] < 2 {
            continue;
        }
        let position = 1 + position % (boxes[n].shape[d] - 1);
        let mut rest = boxes[n].clone();
        boxes[n].shape[d] = position;
        rest.at[d] += position;
        rest.shape[d] -= position;
        boxes.push(rest);
    }
    boxes
}

impl Reference {
    /// Puts `tensor` where `keep` says and lists it in the manifests.
    pub(super) fn place(&mut self, tensor: &mut Tensor, keep: &Keep, random: &mut Random) {
        match keep {
            Keep::Absent => {}
            Keep::Opaque => {
                let rank = random.below(self.manifests.len());
                self.json[rank]["opaque"][&tensor.name] = "repacked".into();
            }
            Keep::Tied => {
                let Some(first) = self.tensors.iter().rfind(|t| t.is_live()) else { return };
                tensor.homes = first.homes.clone();
                let first = first.name.clone();
                for manifest in &mut self.json {
                    if let Some(entry) = manifest["tensors"].get(&first).cloned() {
                        manifest["tensors"][&tensor.name] = entry;
                    }
                }
            }
            Keep::Live { cuts, dtype, strided, replicas } => {
                let whole = tensor.is_packed();
                let boxes = cut(&tensor.shape, if whole { &[] } else { cuts }, random);
                for part in boxes {
                    let first = random.below(self.manifests.len());
                    let last = if *replicas { self.manifests.len() } else { first + 1 };
                    for rank in first..last {
                        // Some boxes, and some replicas of a box, keep the file's dtype.
                        let dtype = dtype.filter(|_| tensor.castable() && random.below(4) > 0).unwrap_or(tensor.dtype);
                        self.hold(tensor, &part, rank, dtype, *strided && !whole, random);
                    }
                }
            }
        }
    }

    fn hold(&mut self, t: &mut Tensor, part: &Box, rank: usize, dtype: Dtype, strided: bool, random: &mut Random) {
        let entry = &mut self.json[rank]["tensors"][&t.name];
        if entry.is_null() {
            *entry = json!({"dtype": name(t.dtype), "shape": t.shape, "segments": []});
        }
        if part.shape.contains(&0) {
            return; // an empty tensor is named without segments
        }
        let rank_of = t.shape.len();
        let mut order: Vec<usize> = (0..rank_of).rev().collect();
        let mut strides = row_major(&part.shape);
        if strided {
            random.shuffle(&mut order);
            let mut next = 1 + random.below(3);
            for &d in &order {
                strides[d] = next;
                next = next * part.shape[d] + random.below(3);
            }
        }
        let memory = rank * MEMORIES + random.below(MEMORIES);
        let bytes = &mut self.memories[memory].bytes;
        let offset = bytes.len() + random.below(70);
        let segment = json!({"memory": memory % MEMORIES, "offset": offset, "at": part.at, "shape": part.shape,
            "strides": strides, "dtype": name(dtype)});
        self.json[rank]["tensors"][&t.name]["segments"].as_array_mut().unwrap().push(segment);
        let tensor_strides = row_major(&t.shape);
        let dot = |a: &[usize], b: &[usize]| a.iter().zip(b).map(|(a, b)| a * b).sum::<usize>();
        let width = if dtype == t.dtype { t.width } else { dtype.bitsize() / 8 };
        let packed = t.is_packed();
        let mut put = |element: usize, at: usize| {
            bytes.resize_with(bytes.len().max(at + width), || random.next() as u8);
            let live = if dtype == t.dtype { t.disk[element].clone() } else { cast(t.dtype, &t.disk[element], dtype) };
            bytes[at..at + width].copy_from_slice(&live);
            t.homes[element].push(Home { memory, at, dtype, width });
        };
        if packed {
            (0..t.disk.len()).for_each(|byte| put(byte, offset + byte));
            return;
        }
        for index in indices(&part.shape) {
            let element = dot(&part.at, &tensor_strides) + dot(&index, &tensor_strides);
            put(element, offset + dot(&index, &strides) * width);
        }
    }
}
