//! `tests/read_commit.py`, which knows nothing but `docs/format.md`, rebuilds every commit. Skipped, loudly, where Python
//! lacks its packages (`WEIGHTFS_PYTHON` names another interpreter).

mod commit_support;

use commit_support::world::optimizer;
use commit_support::*;
use std::process::Command;
use weightfs::commit::*;

#[test]
fn an_independent_reader_rebuilds_every_commit_from_the_documentation() {
    let python = std::env::var("WEIGHTFS_PYTHON").unwrap_or("python3".into());
    for fold in [FoldPolicy::Always, FoldPolicy::Never] {
        let directory = tempfile::tempdir().unwrap();
        let shards = two_shards();
        let model = write_model(directory.path(), &shards);
        let live = Live::of(&shards);
        let committer = Committer::open(model, Options { fold, ..Options::default() }).unwrap().0;
        let mut random = Random(8);
        let mut states = vec![live.bytes()];
        for n in 1..=4u64 {
            live.scribble(&mut random, 40 << (2 * n));
            let state = (n > 1).then(|| optimizer(n as u8));
            let message = "a \"message\" with \"weightfs_checksum\":\"00\" and ü in it";
            let request = CommitRequest { optimizer: state.as_ref(), ..CommitRequest::new(message, n) };
            committer.commit(&live, &request).unwrap();
            states.push(live.bytes());
        }
        committer.rollback(2, None).unwrap();
        states.push(states[2].clone());
        for (id, state) in states.iter().enumerate() {
            let out = tempfile::tempdir().unwrap();
            let run = Command::new(&python)
                .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/read_commit.py"))
                .args([directory.path().as_os_str(), id.to_string().as_ref(), out.path().as_os_str()])
                .output();
            match run {
                Ok(output) if output.status.success() => {
                    assert_same!(&disk(out.path(), &shards), state, "commit {id}");
                }
                Ok(output) if output.status.code() == Some(77) => {
                    eprintln!("SKIPPED: {}", String::from_utf8_lossy(&output.stdout).trim());
                    return;
                }
                Err(e) => {
                    eprintln!("SKIPPED: {python}: {e}");
                    return;
                }
                Ok(output) => panic!("commit {id}: {}", String::from_utf8_lossy(&output.stderr)),
            }
        }
    }
}
