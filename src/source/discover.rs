//! Finds the manifests of a running engine by the model it serves: `--weights vllm`.

use super::manifest::{self, trust};
use super::{ModelDirectory, SourceError};
use crate::memory::process_start;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
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
    /// The user whose word it is, if that is nobody who has a say in the model.
    stranger: Option<u32>,
}

/// A folder in which engines leave their manifests.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    path: PathBuf,
    /// Our own environment names it: then whoever it belongs to is meant.
    named: bool,
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
pub fn directories() -> Vec<Place> {
    if let Some(named) = std::env::var_os("WEIGHTFS_MANIFEST_DIR").filter(|d| !d.is_empty()) {
        return vec![Place { path: named.into(), named: true }];
    }
    let mut places = Vec::new();
    if let Some(own) = std::env::var_os("XDG_RUNTIME_DIR").filter(|d| !d.is_empty()) {
        places.push(Place { path: Path::new(&own).join("weightfs"), named: true });
    }
    let mut known = vec![PathBuf::from("/run/weightfs")];
    if rustix::process::geteuid().is_root()
        && let Ok(users) = std::fs::read_dir("/run/user")
    {
        known.extend(users.flatten().map(|user| user.path().join("weightfs")));
    }
    known.retain(|path| places.iter().all(|place| place.path != *path));
    places.extend(known.into_iter().map(|path| Place { path, named: false }));
    places.sort();
    places
}

/// The manifests, one a rank, of the only `engine` that serves `model` and is alive. Those of users who have no say in the
/// model are passed over: nobody has named them.
pub fn discover(engine: &str, model: &ModelDirectory, places: &[Place]) -> Result<Vec<PathBuf>, SourceError> {
    let served = real(&model.path);
    let mut engines: BTreeMap<String, Vec<Candidate>> = BTreeMap::new();
    let (mut others, mut passed_over) = (Vec::new(), Vec::new());
    for candidate in places.iter().flat_map(|place| candidates(place, model)) {
        let about = &candidate.head.engine;
        if about.name != engine {
            continue;
        }
        if real(&candidate.head.model) != served {
            others.push(candidate.head.model.display().to_string());
            continue;
        }
        if let Some(user) = candidate.stranger {
            let path = candidate.path.display();
            passed_over.push(format!(
                "{path} is passed over: user {user} has put it there and owns neither the model directory nor its weights files \
                 (--weights {path} if it is the engine's)"
            ));
            continue;
        }
        let key = about.instance.clone().unwrap_or_else(|| format!("pid {}", about.pid));
        engines.entry(key).or_default().push(candidate);
    }
    let mut found = match engines.len() {
        0 => {
            let looked = places.iter().map(|p| p.path.display().to_string()).collect::<Vec<_>>().join(", ");
            others.sort();
            others.dedup();
            let mut serving =
                if others.is_empty() { String::new() } else { format!("; running: {}", others.join(", ")) };
            passed_over.iter().for_each(|one| serving += &format!("; {one}"));
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
    passed_over.iter().for_each(|one| log::warn!("{one}"));
    if let Some((path, why)) = found.iter().find_map(|c| Some((&c.path, c.head.refused.as_ref()?))) {
        return Err(SourceError::Refused { path: path.clone(), why: why.clone() });
    }
    found.sort_by_key(|c| c.head.engine.rank);
    Ok(found.into_iter().map(|c| c.path).collect())
}

/// Manifests in `place` of processes that live. What is no manifest, or not to be trusted, is not there for us.
fn candidates(place: &Place, model: &ModelDirectory) -> Vec<Candidate> {
    let Ok(entries) = std::fs::read_dir(&place.path) else { return Vec::new() };
    let mut found = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_none_or(|e| e != "json") {
            continue;
        }
        let read = || -> Option<(Head, Option<u32>)> {
            let (file, metadata) = manifest::open(&path).ok()?;
            if let Err(e) = trust(&path, &metadata) {
                log::warn!("{e}");
                return None;
            }
            let stranger = stranger(place, &path, &metadata, model);
            Some((serde_json::from_reader(std::io::BufReader::new(file)).ok()?, stranger))
        };
        let Some((head, stranger)) = read() else { continue };
        // A killed engine leaves its manifest behind, and its pid may be another's by now.
        let started = process_start(head.engine.pid);
        if started.is_none() || head.engine.start_time.is_some_and(|s| Some(s) != started) {
            continue;
        }
        found.push(Candidate { path, head, stranger });
    }
    found
}

/// A user without a say in `model` who wrote the manifest at `path`, or could put another there before it is obeyed: whoever
/// made the link if it is one, and the owners of the folders above it.
fn stranger(place: &Place, path: &Path, manifest: &Metadata, model: &ModelDirectory) -> Option<u32> {
    let owner = |path: &Path| path.symlink_metadata().ok().map(|m| m.uid());
    let mut users = vec![manifest.uid()];
    users.extend(owner(path));
    let mut host = None;
    if place.named {
        host = place.path.metadata().ok().map(|m| m.uid());
    } else {
        users.extend(place.path.ancestors().filter_map(owner));
    }
    users.into_iter().find(|&user| Some(user) != host && !has_a_say(user, model))
}

/// May `user` tell us, unasked, where the weights of `model` are? A commit writes them to its files, so only who could do that
/// anyway. Others than root need no such rule: they obey nobody but root and themselves.
fn has_a_say(user: u32, model: &ModelDirectory) -> bool {
    let owns = |metadata: std::io::Result<Metadata>| metadata.is_ok_and(|m| m.uid() == user);
    !rustix::process::geteuid().is_root()
        || user == 0
        || owns(model.path.metadata())
        || model.shards.iter().all(|shard| owns(shard.file().metadata()))
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
            let place = |name: &str| Place { path: self.scratch.path().join(name), named: true };
            discover("vllm", &model, &[place("missing"), place("place")])
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
    fn users_without_a_say_in_the_model_are_passed_over() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let other = 65534;
        let world = World::new();
        let at = |name: &str| world.scratch.path().join(name);
        let give = |name: &str, user: u32| std::os::unix::fs::lchown(at(name), Some(user), None).unwrap();
        let discover = |named| {
            let model = ModelDirectory::open(&at("model")).unwrap();
            discover("vllm", &model, &[Place { path: at("place"), named }])
        };
        let passed_over = |named| {
            let error = discover(named).unwrap_err();
            assert!(matches!(error, SourceError::NoEngine { .. }), "{error}");
            assert!(error.to_string().contains("user 65534") && error.to_string().contains("--weights"), "{error}");
        };
        let theirs = world.manifest("a.json", "model", |_| {});
        give("place/a.json", other);
        passed_over(false);
        passed_over(true);
        // They can write the weights anyway.
        for name in ["model", "model/model.safetensors"] {
            give(name, other);
            assert_eq!(discover(false).unwrap(), std::slice::from_ref(&theirs), "{name}");
            give(name, 0);
        }
        // Neither does it count as a second engine beside root's own, nor as a rank of that.
        let own = world.manifest("b.json", "model", |_| {});
        assert_eq!(discover(false).unwrap(), [own]);
        // What is root's today may be another's when it is read, in a folder that is theirs or behind a link that is.
        std::fs::remove_file(theirs).unwrap();
        give("place", other);
        passed_over(false);
        assert!(discover(true).is_ok());
        give("place", 0);
        std::fs::rename(at("place/b.json"), at("b.json")).unwrap();
        std::os::unix::fs::symlink(at("b.json"), at("place/b.json")).unwrap();
        assert!(discover(false).is_ok());
        give("place/b.json", other);
        passed_over(false);
        passed_over(true);
    }

    #[test]
    fn a_place_that_the_environment_names_may_belong_to_the_engines_user() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let world = World::new();
        let manifest = world.manifest("a.json", "model", |_| {});
        for path in [&manifest, &world.scratch.path().join("place")] {
            std::os::unix::fs::chown(path, Some(65534), None).unwrap();
        }
        assert_eq!(world.discover().unwrap(), [manifest]);
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
