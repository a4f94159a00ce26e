//! Models and layouts made at random, of every dtype and on one rank or several, through real mounts: what the mount shows
//! and what a commit leaves on disk are the image by its definition (`reference`), byte for byte.

mod reference;
mod support;

use proptest::prelude::*;
use reference::{Random, Recipe, Reference, recipes};
use support::model::changed_blocks;
use support::*;

const WAYS: [Way; 3] = [Way::Passthrough, Way::Copied, Way::Direct];

fn check(what: &str, got: &[Vec<u8>], want: &[Vec<u8>]) -> Result<(), TestCaseError> {
    for (s, (got, want)) in got.iter().zip(want).enumerate() {
        prop_assert_eq!(got.len(), want.len(), "{}: size of shard {}", what, s);
        let first = got.iter().zip(want).position(|(a, b)| a != b);
        prop_assert_eq!(first, None, "{}: the first wrong byte of shard {}", what, s);
    }
    Ok(())
}

/// The files are the base of the next change: a value that is what its file's rounds to stays as the file has it.
fn committed(reference: &mut Reference, disk: &[Vec<u8>]) {
    for t in &mut reference.tensors {
        for (n, element) in t.disk.iter_mut().enumerate() {
            let at = t.start + n * t.width;
            *element = disk[t.shard][at..at + t.width].to_vec();
        }
    }
    for (shard, disk) in reference.shards.iter_mut().zip(disk) {
        shard.disk = disk.clone();
    }
}

fn mounted_and_committed(recipe: &Recipe) -> Result<(), TestCaseError> {
    let mut reference = Reference::new(recipe);
    let mut random = Random(recipe.seed);
    let names = reference.shards.iter().map(|s| s.name.clone()).collect();
    let model = Model { path: reference.model(), shards: names, specs: vec![] };
    let way = WAYS[random.below(3)];
    let mut mounting = Mounting::of(&model, reference.beside("mnt")).way(way);
    if way == Way::Copied {
        mounting = mounting.arg("--no-passthrough");
    }
    for manifest in &reference.manifests {
        mounting = mounting.arg("--weights").arg(manifest);
    }
    let mount = mounting.mount();
    let before = model.disk();
    check("before any change", &mount.weights(), &before)?;
    prop_assert!(mount.does("commit").contains("nothing changed"));
    for round in 0..3 {
        let count = 1 + random.below(40);
        reference.change(&mut random, count);
        let (old, live) = (model.disk(), reference.all());
        check(&format!("{way:?}, change {round}"), &mount.weights(), &live)?;
        check(
            "the disk before its commit",
            &old,
            &reference.shards.iter().map(|s| s.disk.clone()).collect::<Vec<_>>(),
        )?;
        let says = mount.does("commit");
        check(&format!("the disk after commit {round}"), &model.disk(), &live)?;
        let blocks = format!(" elements in {} blocks", changed_blocks(&old, &live));
        prop_assert!(says.contains(&blocks) || old == live, "{} and not:{}", says, blocks);
        committed(&mut reference, &live);
        check(&format!("{way:?}, after commit {round}"), &mount.weights(), &live)?;
    }
    // What no tensor has is nobody's business.
    reference.change_gaps(&mut random);
    prop_assert!(mount.does("commit").contains("nothing changed"));
    if mount.status()["committed"]["id"].as_u64().unwrap_or(0) > 0 {
        let first = std::fs::read_dir(mount.path("commits")).unwrap().count();
        prop_assert_eq!(first as u64, mount.status()["committed"]["id"].as_u64().unwrap());
        mount.does("rollback 0");
        check("the disk after going back to the start", &model.disk(), &before)?;
        check("the mount after going back to the start", &mount.weights(), &before)?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24, failure_persistence: None, max_shrink_iters: 60, ..ProptestConfig::default()
    })]

    #[test]
    fn any_layout_is_shown_and_committed_as_its_definition_says(recipe in recipes()) {
        mounted_and_committed(&recipe)?;
    }
}
