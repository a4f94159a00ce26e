//! The weights of a mounted model as training sees them, against the definition of the image (`reference`): values in the
//! engine's own dtype, on every rank that holds them, and steps that others see whole or not at all.

mod reference;

use proptest::prelude::*;
use reference::{Random, Reference, Tensor, recipes};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use weightfs::image::{ImageError, ShardBytes};
use weightfs::train::{LiveWeights, StepEnd, Weights};

/// The engine's values of elements `from..to`, in the dtype of the place that is read.
fn live(reference: &Reference, t: &Tensor, from: usize, to: usize) -> Vec<u8> {
    let home = |n: usize| t.homes[n][0];
    (from..to).flat_map(|n| reference.memories[home(n).memory].bytes[home(n).at..][..home(n).width].to_vec()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, max_shrink_iters: 400, ..ProptestConfig::default() })]

    #[test]
    fn rows_are_read_and_written_as_the_engine_keeps_them(recipe in recipes()) {
        let mut reference = Reference::new(&recipe);
        let image = Arc::new(reference.open().unwrap());
        let weights = LiveWeights::new(image.clone(), |_| ());
        let mut random = Random(recipe.seed ^ 7);
        for i in 0..reference.tensors.len() {
            let t = &reference.tensors[i];
            // Ranks may keep a tensor in different types, and then nothing is said of the bits that are read.
            let one = t.is_live() && !t.is_packed() && t.homes.iter().all(|h| h[0].dtype == t.homes[0][0].dtype);
            let Some(spec) = weights.tensor(&t.name) else {
                prop_assert!(!t.is_live() || t.is_packed(), "{} is live", t.name);
                continue;
            };
            prop_assert_eq!(&spec.shape, &t.shape.iter().map(|&n| n as u64).collect::<Vec<_>>());
            if !one {
                continue;
            }
            prop_assert_eq!(spec.dtype, t.homes[0][0].dtype);
            let width = t.homes[0][0].width;
            let rows = t.shape.first().copied().unwrap_or(1);
            let row = t.disk.len() / rows;
            // What is said of where it lies in one piece holds for every element, and no other place has one.
            if let Ok(even) = image.tensor(&t.name).unwrap().even_rows() {
                let columns = even.columns as usize;
                prop_assert_eq!(columns, if t.shape.len() > 1 { row } else { t.disk.len() });
                let source = image.source();
                for (n, homes) in t.homes.iter().enumerate() {
                    let at = even.offset + ((n / columns) as u64 * even.stride + (n % columns) as u64) * even.element;
                    prop_assert_eq!((homes.len(), homes[0].at as u64), (1, at), "element {} of {}", n, t.name);
                    prop_assert!(Arc::ptr_eq(&even.memory, &source.memories[homes[0].memory]));
                }
            }
            let from = random.below(rows);
            let to = from + 1 + random.below(rows - from);
            let mut seen = vec![0; (to - from) * row * width];
            weights.read_rows(&t.name, from as u64..to as u64, &mut seen).unwrap();
            prop_assert!(seen == live(&reference, t, from * row, to * row), "{} is read", t.name);

            let new: Vec<u8> = (0..(to - from) * row).flat_map(|_| random.element(spec.dtype, width)).collect();
            weights.write_rows(&t.name, from as u64..to as u64, &new).unwrap();
            let homes = t.homes[from * row..to * row].to_vec();
            for (homes, element) in homes.iter().zip(new.chunks(width)) {
                for h in homes {
                    let bytes = if h.dtype == spec.dtype { element.to_vec() } else { reference::cast(spec.dtype, element, h.dtype) };
                    reference.memories[h.memory].bytes[h.at..h.at + h.width].copy_from_slice(&bytes);
                }
            }
        }
        for memory in &reference.memories {
            prop_assert!(std::fs::read(&memory.path).unwrap() == memory.bytes, "only those elements were written");
        }
    }
}

#[test]
fn a_step_is_told_while_others_are_out_and_torn_when_it_is_not_finished() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let recipe = proptest::strategy::ValueTree::current(&recipes().new_tree(&mut runner).unwrap());
    let reference = Reference::new(&recipe);
    std::fs::create_dir(reference.model().join(".weightfs")).unwrap();
    let image = Arc::new(reference.open().unwrap());
    let (told, steps) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicU64::new(0)));
    let weights = LiveWeights::new(image.clone(), {
        let (told, steps) = (told.clone(), steps.clone());
        move |end| {
            steps.fetch_add(1, Ordering::SeqCst);
            told.lock().unwrap().push(end);
        }
    });
    // Given up before its first write, a step was never there.
    drop(weights.begin_step().unwrap());
    assert_eq!(*told.lock().unwrap(), []);

    let mut step = weights.begin_step().unwrap();
    drop(image.hold().unwrap());
    step.begin_update().unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let _hold = image.hold().unwrap();
            steps.load(Ordering::SeqCst)
        });
        // However long it waits: whoever gets in after the step knows of it.
        for _ in 0..100 {
            std::thread::yield_now();
        }
        step.finish(1).unwrap();
        assert_eq!(reader.join().unwrap(), 1);
    });
    assert_eq!(*told.lock().unwrap(), [StepEnd::Taken]);

    let mut step = weights.begin_step().unwrap();
    step.begin_update().unwrap();
    drop(step);
    assert_eq!(*told.lock().unwrap(), [StepEnd::Taken, StepEnd::Torn]);
    // Nobody is given weights of no step: no view, no commit, no job, also not of a weightfs that comes later.
    let later = reference.open().unwrap();
    for image in [&*image, &later] {
        assert!(matches!(image.hold(), Err(ImageError::Torn)));
    }
    assert!(matches!(weights.begin_step().map(drop), Err(ImageError::Torn)));
    // A rollback does this, and it is over, for all.
    let alone = image.exclude().unwrap();
    image.update_begins();
    image.update_ended(true);
    drop(alone);
    drop(image.hold().unwrap());
    drop(reference.open().unwrap().hold().unwrap());

    // Taken back before anything was written, nothing happened and nobody is kept out.
    let mut step = weights.begin_step().unwrap();
    step.begin_update().unwrap();
    step.withdraw();
    assert_eq!(*told.lock().unwrap(), [StepEnd::Taken, StepEnd::Torn]);
    drop(image.hold().unwrap());
}
