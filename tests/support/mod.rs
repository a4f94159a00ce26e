//! What the tests on real mounts share: small model directories, an engine that holds their weights in shared memory and
//! knows what their files should look like, and mounts that go away with the test.
#![allow(dead_code, unused_imports)] // each test file uses a part of it

pub mod engine;
pub mod model;
pub mod mount;
pub mod readers;
pub mod refusal;
pub mod trace;
pub mod user;

pub use engine::Engine;
pub use model::{Model, Scratch};
pub use mount::{Failure, Mount, Mounting, Way, weightfs};

use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// No test waits for time: it waits for a state, and has failed when that has not come after this long.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `holds`.
#[track_caller]
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "this should have come to hold and has not: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether a tool is here; says that a test skips without it if not.
pub fn have(tool: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).chain(["/usr/sbin".into()]).any(|d| d.join(tool).is_file()));
    if !found {
        eprintln!("skipped: there is no {tool} here");
    }
    found
}

/// A Python that can import `modules` (`WEIGHTFS_PYTHON`, or python3); says that a test skips without it if there is none.
pub fn python(modules: &str) -> Option<Command> {
    let program = std::env::var_os("WEIGHTFS_PYTHON").unwrap_or_else(|| "python3".into());
    let try_it = Command::new(&program).args(["-c", &format!("import {modules}")]).output();
    if try_it.is_ok_and(|o| o.status.success()) {
        return Some(Command::new(program));
    }
    eprintln!("skipped: no Python with {modules} here (WEIGHTFS_PYTHON)");
    None
}

/// Runs a command that has to succeed; what it said.
#[track_caller]
pub fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?} failed: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().map(|e| e.raw_os_error().unwrap_or_else(|| panic!("an error without errno: {e}")))
}

/// Numbers that look random and are the same every time.
pub fn mixed(seed: u64, i: u64) -> u64 {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ i.wrapping_mul(0xd1b5_4a32_d192_ed03);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
