//! The image against its definition (`reference`): any read, hash, change and write of any model in any layout that a
//! manifest can describe gives what plain loops over single elements give.

mod reference;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use reference::{MEMORIES, Random, Reference, recipes, write_manifest};
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use weightfs::image::ImageError;
use weightfs::image::{Image, ShardBytes};
use weightfs::memory::{BLOCK, block_hash};
use weightfs::model::ModelDirectory;
use weightfs::source::diagnose;

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 400, ..ProptestConfig::default() }
}

fn read(image: &Image, shard: usize, from: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xAA; len];
    image.read(shard, from as u64, &mut bytes).unwrap();
    bytes
}

/// Some ranges of a file of `size` bytes, small and large, at its ends and across blocks.
fn ranges(random: &mut Random, size: usize) -> Vec<(usize, usize)> {
    let mut ranges = vec![(0, size), (size, 0), (size - 1, 1)];
    for _ in 0..12 {
        let from = random.below(size);
        let longest = [9, 5000, size][random.below(3)].min(size - from);
        ranges.push((from, random.below(longest + 1)));
    }
    ranges
}

fn same(image: &Image, reference: &Reference, random: &mut Random) -> Result<(), TestCaseError> {
    for (s, expected) in reference.all().iter().enumerate() {
        for (from, len) in ranges(random, expected.len()) {
            let seen = read(image, s, from, len);
            if seen != expected[from..from + len] {
                let at = from + (0..len).find(|&i| seen[i] != expected[from + i]).unwrap();
                let t = reference.tensors.iter().find(|t| t.shard == s && (t.start..t.end()).contains(&at));
                let what = t.map(|t| (&t.name, t.dtype, &t.shape, at - t.start, &t.homes[(at - t.start) / t.width]));
                return Err(TestCaseError::fail(format!("shard {s} byte {at} of read {from}+{len}: {what:?}")));
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(config(96))]

    #[test]
    fn weights_that_nobody_touched_read_as_their_files_whatever_the_layout(recipe in recipes()) {
        let reference = Reference::new(&recipe);
        let image = reference.open().unwrap();
        prop_assert_eq!(image.shards(), reference.shards.len());
        for (s, shard) in reference.shards.iter().enumerate() {
            prop_assert_eq!(image.shard_bytes(s), shard.disk.len() as u64);
            prop_assert!(read(&image, s, 0, shard.disk.len()) == shard.disk);
        }
        same(&image, &reference, &mut Random(recipe.seed))?;
    }

    #[test]
    fn every_change_of_an_engine_is_read_and_nothing_else_changes(recipe in recipes(), counts in proptest::collection::vec(1usize..60, 1..4)) {
        let mut reference = Reference::new(&recipe);
        let image = reference.open().unwrap();
        let mut random = Random(recipe.seed ^ 1);
        for count in counts {
            reference.change(&mut random, count);
            reference.change_gaps(&mut random);
            same(&image, &reference, &mut random)?;
        }
    }

    #[test]
    fn hashes_are_those_of_the_blocks_that_a_read_gives(recipe in recipes(), changes in 0usize..60) {
        let mut reference = Reference::new(&recipe);
        let image = reference.open().unwrap();
        let mut random = Random(recipe.seed ^ 2);
        reference.change(&mut random, changes);
        for (s, bytes) in reference.all().iter().enumerate() {
            let expected: Vec<u128> = bytes.chunks(BLOCK).map(block_hash).collect();
            for (first, count) in ranges(&mut random, expected.len()) {
                let mut hashes = vec![0; count];
                image.hash(s, first as u64, &mut hashes).unwrap();
                prop_assert_eq!(&hashes[..], &expected[first..first + count]);
            }
        }
    }

    #[test]
    fn what_is_written_reaches_every_place_and_nothing_else(recipe in recipes(), changes in 0usize..20) {
        let mut reference = Reference::new(&recipe);
        let image = reference.open().unwrap();
        let mut random = Random(recipe.seed ^ 3);
        reference.change(&mut random, changes);
        for _ in 0..4 {
            let s = random.below(reference.shards.len());
            let size = reference.shards[s].disk.len();
            let from = reference.between_elements(s, random.below(size));
            let to = reference.between_elements(s, from + random.below(size - from) + 1).max(from);
            // Values of all kinds: those of the files at other places, then changed.
            let mut bytes = reference.shards[s].disk.clone();
            for t in reference.tensors.iter().filter(|t| t.shard == s) {
                for n in 0..t.disk.len() {
                    bytes[t.start + n * t.width..][..t.width].copy_from_slice(&random.element(t.dtype, t.width));
                }
            }
            image.write(s, from as u64, &bytes[from..to]).unwrap();
            reference.write(s, from, &bytes[from..to]);
            for memory in &reference.memories {
                prop_assert!(std::fs::read(&memory.path).unwrap() == memory.bytes, "{:?}", memory.path);
            }
            same(&image, &reference, &mut random)?;
        }
        for shard in &reference.shards {
            prop_assert!(std::fs::read(reference.model().join(&shard.name)).unwrap() == shard.disk);
        }
    }

    #[test]
    fn live_blocks_are_just_the_blocks_with_live_bytes(recipe in recipes()) {
        let reference = Reference::new(&recipe);
        let image = reference.open().unwrap();
        for (s, shard) in reference.shards.iter().enumerate() {
            let mut expected = vec![false; shard.disk.len().div_ceil(BLOCK)];
            for t in reference.tensors.iter().filter(|t| t.shard == s) {
                for n in (0..t.disk.len()).filter(|&n| !t.homes[n].is_empty()) {
                    let at = t.start + n * t.width;
                    expected[at / BLOCK..=(at + t.width - 1) / BLOCK].fill(true);
                }
            }
            let ranges = image.live_blocks(s);
            prop_assert!(ranges.windows(2).all(|w| w[0].end < w[1].start), "{:?}", ranges);
            let mut seen = vec![false; expected.len()];
            for range in ranges {
                seen[range.start as usize..range.end as usize].fill(true);
            }
            prop_assert_eq!(seen, expected);
        }
    }
}

/// What a manifest says of one segment: rank, tensor, position.
type Named = (usize, String, usize);

fn segments(reference: &Reference) -> Vec<Named> {
    let tensors = reference.json.iter().enumerate().flat_map(|(rank, json)| {
        let tensors = json["tensors"].as_object().unwrap().iter().filter(|(name, _)| *name != "only.live");
        tensors.map(move |(name, t)| (rank, name.clone(), t["segments"].as_array().unwrap().len()))
    });
    tensors.flat_map(|(rank, name, n)| (0..n).map(move |i| (rank, name.clone(), i))).collect()
}

const FAULTS: usize = 22;

/// Makes one thing wrong in the manifests, by one where it is a number, so that they describe no layout any more.
/// False if there is no place for this fault.
fn break_one(reference: &mut Reference, fault: usize, random: &mut Random) -> bool {
    let all = segments(reference);
    let (rank, name, n) = all[random.below(all.len())].clone();
    let tensor = reference.tensors.iter().find(|t| t.name == name).unwrap();
    let json = &mut reference.json[rank];
    let segment = json["tensors"][&name]["segments"][n].clone();
    let numbers = |key: &str| Vec::from_iter(segment[key].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()));
    let (at, shape, strides) = (numbers("at"), numbers("shape"), numbers("strides"));
    let memory = segment["memory"].as_u64().unwrap() as usize;
    let bytes = json["memories"][memory]["bytes"].as_u64().unwrap();
    let elements: u64 = 1 + shape.iter().zip(&strides).map(|(d, s)| (d - 1) * s).sum::<u64>();
    let extent = match tensor.is_packed() {
        true => tensor.disk.len() as u64,
        false => {
            elements
                * tensor.homes.iter().flatten().next().map_or(0, |_| {
                    serde_json::from_value::<weightfs::model::Dtype>(segment["dtype"].clone()).unwrap().bitsize() as u64
                        / 8
                })
        }
    };
    let once = tensor.homes.iter().all(|homes| homes.len() == 1);
    let d = random.below(shape.len().max(1));
    let in_dimensions = !shape.is_empty();
    let entry = &mut json["tensors"][&name];
    let change = &mut entry["segments"][n];
    match fault {
        0 => change["offset"] = (bytes - extent + 1).into(),
        1 => json["memories"][memory]["bytes"] = (bytes - 1).into(),
        2 => json["memories"][memory]["bytes"] = (bytes + 1).into(),
        3 if in_dimensions => change["shape"][d] = (shape[d] + 1).into(),
        4 if in_dimensions => change["shape"][d] = (shape[d] - 1).into(),
        5 if in_dimensions && once => change["at"][d] = (at[d] + 1).into(),
        6 if in_dimensions && shape[d] > 1 => change["strides"][d] = 0.into(),
        7 if in_dimensions && shape[d] > 1 => change["strides"][d] = (u64::MAX / 2).into(),
        8 if once => drop(entry["segments"].as_array_mut().unwrap().remove(n)),
        9 => entry["segments"].as_array_mut().unwrap().push(segment),
        10 => change["dtype"] = if segment["dtype"] == "I64" { "U64".into() } else { "I64".into() },
        11 => change["memory"] = MEMORIES.into(),
        12 => entry["dtype"] = if entry["dtype"] == "I64" { "U64".into() } else { "I64".into() },
        13 if in_dimensions => entry["shape"][d] = (tensor.shape[d] + 1).into(),
        14 => json["engine"]["world_size"] = (json["engine"]["world_size"].as_u64().unwrap() + 1).into(),
        15 => json["weightfs"] = 2.into(),
        16 => change["dtype"] = "F7".into(),
        17 => change["at"].as_array_mut().unwrap().push(0.into()),
        18 => json["memories"][memory]["path"] = "/nowhere/at all".into(),
        19 => change["offset"] = (-1).into(),
        20 => change["offset"] = u64::MAX.into(),
        21 => entry["shape"].as_array_mut().unwrap().push(1.into()),
        _ => return false,
    }
    true
}

/// Any one value of a JSON text made another: a little off, or of another kind, or gone.
fn mutate(value: &mut Value, random: &mut Random) {
    match value {
        Value::Object(map) if !map.is_empty() && random.below(8) > 0 => {
            let key = map.keys().nth(random.below(map.len())).unwrap().clone();
            match random.below(12) {
                0 => drop(map.remove(&key)),
                _ => mutate(&mut map[&key], random),
            }
        }
        Value::Array(list) if !list.is_empty() && random.below(8) > 0 => {
            let n = random.below(list.len());
            mutate(&mut list[n], random)
        }
        Value::Number(n) if random.below(2) > 0 => {
            let n = n.as_u64().unwrap_or(0);
            *value = [n.saturating_add(1), n.saturating_sub(1), u64::MAX, u64::MAX - 7, 1 << 63, 1 << 32]
                [random.below(6)]
            .into();
        }
        _ => *value = [json!(null), json!([]), json!({}), json!("F4"), json!(0), json!(-1)][random.below(6)].clone(),
    }
}

/// Opens what is there and reads all of it, if it opens.
fn opens(reference: &Reference) -> bool {
    let Ok(directory) = ModelDirectory::open(&reference.model()) else { return false };
    let _ = diagnose(&directory, &reference.manifests);
    let Ok(image) = reference.open() else { return false };
    for s in 0..image.shards() {
        let mut bytes = vec![0; image.shard_bytes(s) as usize];
        let read: Result<(), ImageError> = image.read(s, 0, &mut bytes);
        let mut hashes = vec![0; bytes.len().div_ceil(BLOCK)];
        assert_eq!(read.is_ok(), image.hash(s, 0, &mut hashes).is_ok());
    }
    true
}

proptest! {
    #![proptest_config(config(192))]

    #[test]
    fn a_manifest_with_one_thing_wrong_is_refused(recipe in recipes(), fault in 0..FAULTS) {
        let mut reference = Reference::new(&recipe);
        prop_assume!(break_one(&mut reference, fault, &mut Random(recipe.seed ^ 4)));
        reference.write_manifests();
        prop_assert!(!opens(&reference), "fault {fault} was not noticed: {:?}", reference.json);
    }

    #[test]
    fn no_manifest_makes_anything_panic(recipe in recipes(), times in 1usize..4, bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        let mut reference = Reference::new(&recipe);
        let mut random = Random(recipe.seed ^ 5);
        for _ in 0..times {
            let rank = random.below(reference.json.len());
            mutate(&mut reference.json[rank], &mut random);
        }
        reference.write_manifests();
        opens(&reference);
        write_manifest(&reference.manifests[0], &bytes);
        prop_assert!(!opens(&reference));
    }

    #[test]
    fn no_header_and_no_index_make_anything_panic(recipe in recipes(), what in 0usize..5, bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        let reference = Reference::new(&recipe);
        let mut random = Random(recipe.seed ^ 6);
        let shard = &reference.shards[random.below(reference.shards.len())];
        let path = reference.model().join(&shard.name);
        let index = reference.model().join("model.safetensors.index.json");
        let data = 8 + u64::from_le_bytes(shard.disk[..8].try_into().unwrap()) as usize;
        let mut disk = shard.disk.clone();
        match what {
            0 => {
                let mut header: Value = serde_json::from_slice(&disk[8..data]).unwrap();
                mutate(&mut header, &mut random);
                let text = header.to_string();
                let length = (text.len() as u64).to_le_bytes();
                std::fs::write(path, [&length[..], text.as_bytes(), &disk[data..]].concat()).unwrap();
            }
            1 => {
                let at = random.below(data);
                disk[at] ^= 1 << random.below(8);
                std::fs::write(path, disk).unwrap();
            }
            2 => {
                std::fs::write(path, &disk[..random.below(disk.len())]).unwrap();
                prop_assert!(!opens(&reference));
            }
            3 => {
                let length = (bytes.len() as u64).to_le_bytes();
                std::fs::write(path, [&length[..], &bytes[..], &disk[data..]].concat()).unwrap();
            }
            _ if recipe.index => {
                let mut json: Value = serde_json::from_slice(&std::fs::read(&index).unwrap()).unwrap();
                mutate(&mut json, &mut random);
                std::fs::write(&index, json.to_string()).unwrap();
                opens(&reference);
                std::fs::write(&index, bytes).unwrap();
                prop_assert!(!opens(&reference));
            }
            _ => {}
        }
        opens(&reference);
    }
}

#[test]
fn a_manifest_that_others_may_write_is_not_obeyed() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let recipe = recipes().new_tree(&mut runner).unwrap().current();
    let reference = Reference::new(&recipe);
    assert!(opens(&reference));
    for mode in [0o620, 0o602, 0o666] {
        std::fs::set_permissions(&reference.manifests[0], PermissionsExt::from_mode(mode)).unwrap();
        assert!(!opens(&reference), "{mode:o}");
    }
}
