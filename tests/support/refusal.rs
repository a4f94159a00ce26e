//! What must not be used: refused in one line, with nothing mounted and nothing changed.

use super::Mounting;
use super::mount::{assert_one_line, is_mounted};
use std::path::{Path, PathBuf};

/// Files of a directory and their bytes, without weightfs's own.
fn contents(dir: &Path) -> Vec<(PathBuf, Option<Vec<u8>>)> {
    let mut found: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| !p.ends_with(".weightfs"))
        .map(|p| (p.clone(), std::fs::read(&p).ok()))
        .collect();
    found.sort();
    found
}

/// Mounting this model fails in one line with these words, and leaves no trace.
#[track_caller]
pub fn refuses(what: &str, mounting: Mounting, model: &Path, point: &Path, words: &[&str]) {
    println!("{what}");
    let before = contents(model);
    let failure = mounting.fails();
    println!("    {}", failure.stderr.trim_end());
    assert_one_line(&failure, words);
    let reason = failure.stderr.trim_end().rsplit(": ").next().unwrap();
    assert_eq!(failure.stderr.matches(reason).count(), 1, "{what}: said twice: {}", failure.stderr);
    assert!(!is_mounted(point), "{what}: something is mounted");
    assert_eq!(contents(model), before, "{what}: the model directory changed");
}
