//! The copy of the shards that readers see: after each refresh it equals the reference of the image, just the blocks
//! that differed were copied, and it never calls itself whole while its bytes are of two steps.

mod reference;

use proptest::prelude::*;
use reference::{Random, Reference, recipes};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use weightfs::image::{Image, ImageError, ShardBytes, StepHold};
use weightfs::memory::{BLOCK, Hash};
use weightfs::view::CopiedShards;

/// An image that can break: after so many reads and hashes, each of them fails, and at the end of it all the check does.
struct Breaking {
    image: Image,
    left: AtomicI64,
    /// Whether the engine was looked after since the last read: it may have died during it.
    checked: AtomicBool,
}

impl Breaking {
    fn new(image: Image) -> Breaking {
        Breaking { image, left: AtomicI64::new(i64::MAX / 2), checked: AtomicBool::new(false) }
    }

    fn count(&self) -> Result<(), ImageError> {
        match self.left.fetch_sub(1, Ordering::SeqCst) {
            n if n > 0 => Ok(()),
            _ => Err(ImageError::EngineGone("it broke".into())),
        }
    }
}

impl ShardBytes for Breaking {
    fn shards(&self) -> usize {
        self.image.shards()
    }

    fn shard_bytes(&self, shard: usize) -> u64 {
        self.image.shard_bytes(shard)
    }

    fn live_blocks(&self, shard: usize) -> Vec<Range<u64>> {
        self.image.live_blocks(shard)
    }

    fn check(&self) -> Result<(), ImageError> {
        self.checked.store(true, Ordering::SeqCst);
        self.count()
    }

    fn hold(&self) -> Result<StepHold, ImageError> {
        self.image.hold()
    }

    fn read(&self, shard: usize, offset: u64, dst: &mut [u8]) -> Result<(), ImageError> {
        self.checked.store(false, Ordering::SeqCst);
        self.count()?;
        self.image.read(shard, offset, dst)
    }

    fn hash(&self, shard: usize, first: u64, out: &mut [Hash]) -> Result<(), ImageError> {
        self.checked.store(false, Ordering::SeqCst);
        self.count()?;
        self.image.hash(shard, first, out)
    }

    fn write(&self, _: usize, _: u64, _: &[u8]) -> Result<(), ImageError> {
        panic!("a view writes nothing")
    }
}

#[derive(Debug, Clone)]
enum Step {
    Change(usize),
    Refresh,
    /// Breaks after so many reads, hashes and checks.
    Break(i64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![(1usize..40).prop_map(Step::Change), Just(Step::Refresh), (0i64..12).prop_map(Step::Break)];
    proptest::collection::vec(step, 1..12)
}

/// What the copy's files hold, which the kernel may serve without asking. Whoever does ask is given bytes of one step only.
fn copied(view: &CopiedShards, reference: &Reference) -> Vec<Vec<u8>> {
    let shards = reference.shards.iter().enumerate().map(|(s, shard)| {
        let mut bytes = vec![0; shard.disk.len() + 9];
        let n = view.file(s).read_at(&mut bytes, 0).unwrap();
        bytes.truncate(n);
        let mut given = vec![0; n + 9];
        match view.read(s, 0, &mut given) {
            Ok(read) => assert!(view.is_whole() && given[..read] == bytes),
            Err(_) => assert!(!view.is_whole()),
        }
        bytes
    });
    shards.collect()
}

/// Blocks and bytes in them that differ.
fn difference(a: &[Vec<u8>], b: &[Vec<u8>]) -> (u64, u64) {
    let blocks = a.iter().zip(b).flat_map(|(a, b)| a.chunks(BLOCK).zip(b.chunks(BLOCK)));
    blocks.filter(|(a, b)| a != b).fold((0, 0), |(n, bytes), (a, _)| (n + 1, bytes + a.len() as u64))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, max_shrink_iters: 300, ..ProptestConfig::default() })]

    #[test]
    fn a_refreshed_copy_is_the_newest_step_and_took_just_the_changed_blocks(recipe in recipes(), steps in steps()) {
        let mut reference = Reference::new(&recipe);
        let mut random = Random(recipe.seed ^ 7);
        let image = Breaking::new(reference.open().unwrap());
        let view = CopiedShards::new(&image, "test\0with a name").unwrap();
        let total: usize = reference.shards.iter().map(|s| s.disk.len()).sum();
        prop_assert_eq!(view.bytes(), total as u64);
        prop_assert!(!view.is_whole());
        // The step that the copy was last whole at.
        let mut shown: Option<Vec<Vec<u8>>> = None;
        for step in steps {
            image.left.store(match step { Step::Break(n) => n, _ => i64::MAX / 2 }, Ordering::SeqCst);
            let (before, newest) = (copied(&view, &reference), reference.all());
            match step {
                Step::Change(count) => {
                    reference.change(&mut random, count);
                    reference.change_gaps(&mut random);
                    prop_assert!(copied(&view, &reference) == before, "the copy moved by itself");
                    continue;
                }
                Step::Refresh | Step::Break(_) => match view.refresh(&image) {
                    Ok(done) => {
                        prop_assert!(copied(&view, &reference) == newest);
                        prop_assert!(view.is_whole());
                        prop_assert!(image.checked.load(Ordering::SeqCst), "the engine may have died meanwhile");
                        prop_assert_eq!(done.filled, shown.is_none());
                        let all = reference.shards.iter().map(|s| s.disk.len().div_ceil(BLOCK) as u64).sum();
                        let expected = if done.filled { (all, total as u64) } else { difference(&before, &newest) };
                        prop_assert_eq!((done.blocks, done.bytes), expected);
                        shown = Some(newest);
                    }
                    Err(e) => {
                        prop_assert!(matches!(step, Step::Break(_)), "{}", e);
                        let now = copied(&view, &reference);
                        prop_assert!(!view.is_whole() || shown.as_ref() == Some(&now), "half a step counts as whole");
                        // Each block is of the step before or of the newest, and a copy that did not move counts on.
                        for (s, now) in now.iter().enumerate() {
                            for (i, block) in now.chunks(BLOCK).enumerate() {
                                let same = |of: &[Vec<u8>]| of[s][i * BLOCK..][..block.len()] == *block;
                                prop_assert!(same(&before) || same(&newest));
                            }
                        }
                    }
                },
            }
        }
        image.left.store(i64::MAX / 2, Ordering::SeqCst);
        view.refresh(&image).unwrap();
        prop_assert!(view.is_whole() && copied(&view, &reference) == reference.all());
        prop_assert_eq!(view.refresh(&image).unwrap().blocks, 0);
    }

    #[test]
    fn a_copy_cut_off_in_the_middle_is_whole_again_only_after_a_good_refresh(
        recipe in recipes(),
        after in 0i64..6,
        undone in any::<bool>(),
    ) {
        let mut reference = Reference::new(&recipe);
        let mut random = Random(recipe.seed ^ 8);
        let image = Breaking::new(reference.open().unwrap());
        let view = CopiedShards::new(&image, "test").unwrap();
        view.refresh(&image).unwrap();
        let shown = reference.all();
        let memories: Vec<Vec<u8>> = reference.memories.iter().map(|m| m.bytes.clone()).collect();
        reference.change(&mut random, 50);
        image.left.store(after, Ordering::SeqCst);
        prop_assume!(view.refresh(&image).is_err());
        let torn = copied(&view, &reference) != shown;
        prop_assert!(!torn || !view.is_whole());
        // The engine came back to what it was: the copy has to find its way back from the half step too.
        for _ in 0..2 {
            image.left.store(0, Ordering::SeqCst);
            prop_assert!(view.refresh(&image).is_err());
            prop_assert!(!torn || !view.is_whole());
        }
        image.left.store(i64::MAX / 2, Ordering::SeqCst);
        if undone {
            reference.memories.iter_mut().zip(&memories).for_each(|(m, bytes)| m.set(0, bytes));
        }
        // What the cut refresh was about to copy is not copied for that.
        let differing = difference(&copied(&view, &reference), &reference.all());
        let done = view.refresh(&image).unwrap();
        prop_assert_eq!((done.blocks, done.bytes), differing);
        prop_assert!(view.is_whole() && copied(&view, &reference) == reference.all());
    }
}
