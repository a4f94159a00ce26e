//! Finds the manifests of a running engine by the model it serves: `--weights vllm`.

use super::manifest::{self, trust};
use super::{ModelDirectory, SourceError};
use crate::memory::process_start;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// Engines whose plugins write manifests where [`directories`] says.
pub const ENGINES: [&str; 2] = ["vllm", "torch"];

/// The parts of a manifest that tell whose it is. The rest is skipped.
#[derive(Deserialize)]
struct Head {
    engine: EngineHead,
    model: PathBuf,
    /// Why the engine does not share its weights, and what to do.
    refused: Option<String>,
}

#[derive(Deserialize)]
struct EngineHead {
    name: String,
    pid: u32,
    start_time: Option<u64>,
    #[serde(default)]
    rank: u32,
    world_size: Option<u32>,
    /// What the ranks of one engine have in common.
    instance: Option<String>,
}

struct Candidate {
    path: PathBuf,
    head: Head,
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let EngineHead { pid, rank, world_size, .. } = &self.head.engine;
        let rank = world_size.filter(|&n| n > 1).map_or(String::new(), |n| format!(" rank {rank} of {n}"));
        write!(f, "pid {pid}{rank} ({})", self.path.display())
    }
}

/// Where engines leave their manifests: `WEIGHTFS_MANIFEST_DIR` if it is set; else the user's own place and the
/// system's, and for root those of all users.
pub fn directories() -> Vec<PathBuf> {
    if let Some(named) = std::env::var_os("WEIGHTFS_MANIFEST_DIR").filter(|d| !d.is_empty()) {
        return vec![named.into()];
    }
    let mut directories = Vec::new();
    if let Some(own) = std::env::var_os("XDG_RUNTIME_DIR").filter(|d| !d.is_empty()) {
        directories.push(Path::new(&own).join("weightfs"));
    }
    directories.push("/run/weightfs".into());
    if rustix::process::geteuid().is_root()
        && let Ok(users) = std::fs::read_dir("/run/user")
    {
        directories.extend(users.flatten().map(|user| user.path().join("weightfs")));
    }
    directories.sort();
    directories.dedup();
    directories
}

/// The manifests, one a rank, of the only `engine` that serves `model` and is alive.
pub fn discover(engine: &str, model: &ModelDirectory, places: &[PathBuf]) -> Result<Vec<PathBuf>, SourceError> {
    let served = real(&model.path);
    let mut engines: BTreeMap<String, Vec<Candidate>> = BTreeMap::new();
    let mut others = Vec::new();
    for candidate in places.iter().flat_map(|place| candidates(place)) {
        let about = &candidate.head.engine;
        if about.name != engine {
            continue;
        }
        if real(&candidate.head.model) != served {
            others.push(candidate.head.model.display().to_string());
            continue;
        }
        let key = about.instance.clone().unwrap_or_else(|| format!("pid {}", about.pid));
        engines.entry(key).or_default().push(candidate);
    }
    let mut found = match engines.len() {
        0 => {
            let looked = places.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ");
            others.sort();
            others.dedup();
            let serving = if others.is_empty() { String::new() } else { format!("; running: {}", others.join(", ")) };
            return Err(SourceError::NoEngine { engine: engine.into(), model: model.path.clone(), looked, serving });
        }
        1 => engines.into_values().next().unwrap_or_default(),
        _ => {
            let mut all: Vec<Candidate> = engines.into_values().flatten().collect();
            // Ranks that nothing joins into one engine are named as ranks: each alone would be refused for the others.
            all.sort_by_key(|c| (c.head.engine.instance.clone(), c.head.engine.rank));
            let list = all.iter().map(Candidate::to_string).collect::<Vec<_>>().join(", ");
            return Err(SourceError::SeveralEngines { engine: engine.into(), model: model.path.clone(), list });
        }
    };
    if let Some((path, why)) = found.iter().find_map(|c| Some((&c.path, c.head.refused.as_ref()?))) {
        return Err(SourceError::Refused { path: path.clone(), why: why.clone() });
    }
    found.sort_by_key(|c| c.head.engine.rank);
    Ok(found.into_iter().map(|c| c.path).collect())
}

/// Manifests in `place` of processes that live. What is no manifest, or not to be trusted, is not there for us.
fn candidates(place: &Path) -> Vec<Candidate> {
    let Ok(entries) = std::fs::read_dir(place) else { return Vec::new() };
    let mut found = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_none_or(|e| e != "json") {
            continue;
        }
        let read = || -> Option<Head> {
            let (file, metadata) = manifest::open(&path).ok()?;
            if let Err(e) = trust(&path, &metadata) {
                log::warn!("{e}");
                return None;
            }
            serde_json::from_reader(std::io::BufReader::new(file)).ok()
        };
        let Some(head) = read() else { continue };
        // A killed engine leaves its manifest behind, and its pid may be another's by now.
        let started = process_start(head.engine.pid);
        if started.is_none() || head.engine.start_time.is_some_and(|s| Some(s) != started) {
            continue;
        }
        found.push(Candidate { path, head });
    }
    found
}

/// Paths may differ and mean one directory.
fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_path_buf())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::PermissionsExt;

    /// An empty model directory that can be opened, and a place for manifests.
    struct World {
        scratch: tempfile::TempDir,
    }

    impl World {
        fn new() -> World {
            let scratch = tempfile::tempdir().unwrap();
            for name in ["model", "other", "place"] {
                std::fs::create_dir(scratch.path().join(name)).unwrap();
            }
            let header = br#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
            let mut shard = (header.len() as u64).to_le_bytes().to_vec();
            shard.extend_from_slice(header);
            shard.extend_from_slice(&[0; 4]);
            for name in ["model", "other"] {
                std::fs::write(scratch.path().join(name).join("model.safetensors"), &shard).unwrap();
                std::fs::write(scratch.path().join(name).join("config.json"), "{}").unwrap();
            }
            World { scratch }
        }

        fn manifest(&self, name: &str, model: &str, change: impl FnOnce(&mut serde_json::Value)) -> PathBuf {
            let pid = std::process::id();
            let mut manifest = json!({
                "weightfs": 1, "model": self.scratch.path().join(model), "memories": [], "tensors": {},
                "engine": {"name": "vllm", "pid": pid, "start_time": process_start(pid), "rank": 0, "instance": "a"},
            });
            change(&mut manifest);
            let path = self.scratch.path().join("place").join(name);
            std::fs::write(&path, manifest.to_string()).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            path
        }

        fn discover(&self) -> Result<Vec<PathBuf>, SourceError> {
            let model = ModelDirectory::open(&self.scratch.path().join("model")).unwrap();
            discover("vllm", &model, &[self.scratch.path().join("missing"), self.scratch.path().join("place")])
        }
    }

    #[test]
    fn all_ranks_of_the_one_engine_that_serves_the_model_are_found_in_order() {
        let world = World::new();
        let second = world.manifest("a.json", "model", |m| m["engine"]["rank"] = 1.into());
        // The same directory by another name.
        std::os::unix::fs::symlink("model", world.scratch.path().join("link")).unwrap();
        let first = world.manifest("b.json", "link", |_| {});
        world.manifest("c.json", "other", |m| m["engine"]["instance"] = "b".into());
        world.manifest("d.json", "model", |m| m["engine"]["name"] = "torch".into());
        world.manifest("notes.txt", "model", |m| m["engine"]["instance"] = "c".into());
        assert_eq!(world.discover().unwrap(), [first, second]);
    }

    #[test]
    fn engines_that_ended_or_cannot_be_trusted_are_not_found() {
        let world = World::new();
        let start = process_start(std::process::id()).unwrap();
        world.manifest("reused.json", "model", |m| m["engine"]["start_time"] = (start + 1).into());
        world.manifest("ended.json", "model", |m| m["engine"]["pid"] = u32::MAX.into());
        std::fs::write(world.scratch.path().join("place/torn.json"), "{").unwrap();
        // Nobody will ever write it.
        let pipe = world.scratch.path().join("place/pipe.json");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let open = world.manifest("open.json", "model", |_| {});
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o666)).unwrap();
        world.manifest("elsewhere.json", "other", |_| {});
        let error = world.discover().unwrap_err();
        assert!(matches!(error, SourceError::NoEngine { .. }), "{error}");
        let said = error.to_string();
        assert!(said.contains("place") && said.contains("other"), "{said}");
    }

    #[test]
    fn two_engines_of_one_model_are_named_and_a_refusal_is_passed_on() {
        let world = World::new();
        world.manifest("a.json", "model", |_| {});
        let second = world.manifest("b.json", "model", |m| m["engine"]["instance"] = "b".into());
        let error = world.discover().unwrap_err();
        assert!(matches!(error, SourceError::SeveralEngines { .. }));
        assert!(error.to_string().contains("a.json") && error.to_string().contains("b.json"), "{error}");
        // Two ranks, which nothing but the user joins.
        for (name, rank, pid) in [("b.json", 0, std::process::id()), ("a.json", 1, std::os::unix::process::parent_id())]
        {
            world.manifest(name, "model", |m| {
                m["engine"] = json!({"name": "vllm", "pid": pid, "rank": rank, "world_size": 2});
            });
        }
        let error = world.discover().unwrap_err().to_string();
        let (first, last) = (error.find("rank 0 of 2").unwrap(), error.find("rank 1 of 2").unwrap());
        assert!(first < last && error.contains("--weights MANIFEST for each of its ranks"), "{error}");
        std::fs::remove_file(second).unwrap();
        world.manifest("a.json", "model", |m| m["refused"] = "sleep mode: start it without".into());
        let error = world.discover().unwrap_err();
        assert!(matches!(&error, SourceError::Refused { why, .. } if why.contains("sleep mode")), "{error}");
    }
}
