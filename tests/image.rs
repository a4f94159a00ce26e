//! The image against its definition (`reference`): any read, hash, change and write of any model in any layout that a
//! manifest can describe gives what plain loops over single elements give.

mod reference;

use proptest::prelude::*;
use reference::{Random, Reference, recipes};
use weightfs::image::{Image, ShardBytes};
use weightfs::memory::{BLOCK, block_hash};

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
