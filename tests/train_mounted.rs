//! Jobs through `ctl` on real mounts. What the weights must be after every step is known: the same job, run on weights in
//! memory, is the same to the bit (`train_goldens` and `train_apollo` hold that against transformers and the equations).

mod support;
mod train_support;

use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use support::{Model, Mount, Mounting, Scratch, errno, until, user, weightfs};
use train_support::{golden_weights, to_bytes};
use weightfs::model::Dtype;
use weightfs::train::queue::Options;
use weightfs::train::{self, Architecture, Config, InMemory, Queue, TensorSpec, TextModel};

const CONFIG: &str = include_str!("goldens/qwen3_tied.json");

/// Two steps an epoch, the first with a context. Long enough that a step takes about as long as a look at `status`.
fn samples() -> Value {
    let ids = |from: u32| (0..50).map(|i| (from + 7 * i) % 32).collect::<Vec<_>>();
    json!([{"context_ids": [1, 2, 3], "continuation_ids": ids(4)}, {"continuation_ids": ids(9)}])
}

fn job(epochs: u64) -> String {
    let config = json!({"lr": 1e-3, "rank": 4, "epochs": epochs, "step_tokens": 1});
    json!({"samples": samples(), "config": config}).to_string()
}

type Tensors = BTreeMap<String, Vec<u8>>;

fn specs() -> Vec<(String, Vec<u64>)> {
    let architecture = Architecture::from_config(&Config::parse(CONFIG).unwrap()).unwrap();
    architecture.tensors().into_iter().map(|(n, s)| (n.to_string(), s)).collect()
}

/// A model directory that trains, of random weights.
fn model(path: &Path) -> Model {
    std::fs::create_dir_all(path).unwrap();
    let tensors: Vec<_> = specs()
        .into_iter()
        .map(|(name, shape)| {
            let bytes = to_bytes(Dtype::BF16, &golden_weights(&name, shape.iter().product::<u64>() as usize, 0.0));
            (name, shape, bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let shape = shape.iter().map(|&n| n as usize).collect();
        (name.as_str(), safetensors::tensor::TensorView::new(Dtype::BF16, shape, bytes).unwrap())
    });
    std::fs::write(path.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    std::fs::write(path.join("config.json"), CONFIG).unwrap();
    Model { path: path.to_owned(), shards: vec!["model.safetensors".into()], specs: Vec::new() }
}

fn tensors(file: &[u8]) -> Tensors {
    let file = SafeTensors::deserialize(file).unwrap();
    file.tensors().into_iter().map(|(name, view)| (name, view.data().to_vec())).collect()
}

fn shown(mount: &Mount) -> Tensors {
    tensors(&mount.weights()[0])
}

fn on_disk(model: &Model) -> Tensors {
    tensors(&model.disk()[0])
}

/// The weights before the jobs and after each of their steps, computed in memory as far as they are asked for.
struct Trail {
    steps: RefCell<Vec<Tensors>>,
    more: Receiver<Tensors>,
}

impl Trail {
    fn of(jobs: &[String]) -> Trail {
        let tensors = specs().into_iter().map(|(name, shape)| {
            let values = golden_weights(&name, shape.iter().product::<u64>() as usize, 0.0);
            (name, TensorSpec { dtype: Dtype::BF16, shape }, to_bytes(Dtype::BF16, &values))
        });
        let weights = Arc::new(InMemory::new(tensors));
        let all = |weights: &InMemory| {
            weights.names().map(|n| (n.to_string(), weights.bytes(n).unwrap())).collect::<Tensors>()
        };
        let first = all(&weights);
        let (send, more) = sync_channel(0);
        let listener = Box::new({
            let weights = weights.clone();
            move |job: &train::JobRecord| {
                if job.state == train::JobState::Running && job.steps_done > 0 && send.send(all(&weights)).is_err() {
                    // Nobody asks any more, and the test may go on for a while.
                    loop {
                        std::thread::park();
                    }
                }
            }
        });
        let architecture = Architecture::from_config(&Config::parse(CONFIG).unwrap()).unwrap();
        let model = train::Model::new(architecture, weights).unwrap();
        let options = Options { listener: Some(listener), threads: 1, ..Options::default() };
        let queue = Queue::start(model, TextModel::default(), Default::default(), options).unwrap();
        jobs.iter().for_each(|job| assert!(queue.submit(job, "reference").is_ok()));
        std::mem::forget(queue);
        Trail { steps: RefCell::new(vec![first]), more }
    }

    fn reach(&self, n: usize) {
        while self.steps.borrow().len() <= n {
            let next = self.more.recv().unwrap();
            assert_ne!(Some(&next), self.steps.borrow().last(), "every step changes something");
            self.steps.borrow_mut().push(next);
        }
    }

    fn after(&self, n: usize) -> Tensors {
        self.reach(n);
        self.steps.borrow()[n].clone()
    }

    /// Which step these weights are of.
    #[track_caller]
    fn step(&self, weights: &Tensors) -> usize {
        // More than a daemon takes within the patience of these tests.
        for n in 0..100_000 {
            self.reach(n);
            if &self.steps.borrow()[n] == weights {
                return n;
            }
        }
        panic!("these weights are of no whole step");
    }
}

fn job_facts(mount: &Mount, id: u64) -> Value {
    let jobs = mount.status()["jobs"].as_array().unwrap().clone();
    jobs.into_iter().find(|j| j["id"] == id).unwrap_or(Value::Null)
}

#[track_caller]
fn ended(mount: &Mount, id: u64, state: &str) -> Value {
    let of = |j: &Value| j["state"].as_str().unwrap_or_default().to_string();
    until("the job has ended", || !["queued", "running"].contains(&of(&job_facts(mount, id)).as_str()));
    let facts = job_facts(mount, id);
    assert_eq!(of(&facts), state, "{facts}");
    facts
}

fn at_step(mount: &Mount, id: u64, step: u64) {
    until("the job has come that far", || job_facts(mount, id)["steps_done"].as_u64().is_some_and(|n| n >= step));
}

#[test]
fn a_job_trains_what_is_mounted_and_a_commit_keeps_it() {
    let scratch = Scratch::new();
    let model = model(&scratch.join("model"));
    let mount = Mounting::of(&model, scratch.join("mnt")).mount();
    mount.settled();
    let before = on_disk(&model);
    let held = mount.open(0);
    std::fs::write(scratch.join("job.json"), job(10)).unwrap();
    let trail = Trail::of(&[job(10)]);

    let says = mount.does(&format!("train {}", scratch.join("job.json").display()));
    assert!(says.contains("job 1 is queued: 20 steps"), "{says}");
    let facts = ended(&mount, 1, "finished");
    assert_eq!((&facts["steps_done"], &facts["samples_done"]), (&json!(20), &json!(20)));
    assert_eq!(facts["source"], scratch.join("job.json").to_str().unwrap());
    let losses = facts["losses"].as_array().unwrap();
    assert!(losses.len() == 20 && losses[18].as_f64() < losses[0].as_f64(), "{losses:?}");
    assert!(facts["memory"].as_u64().unwrap() > 0);
    let line = mount.fact("last_job").unwrap();
    assert!(line.starts_with("1 finished sample 20/20 step 20/20 loss "), "{line}");
    assert_eq!((mount.fact("job").unwrap(), mount.fact("step").unwrap()), ("none".into(), "20".into()));
    assert_eq!(mount.fact("dirty").unwrap(), "yes");

    // Whoever opened before sees what was; whoever opens after, what is; the disk waits for the commit.
    let mut old = Vec::new();
    (&held).read_to_end(&mut old).unwrap();
    assert_eq!(tensors(&old), before);
    assert_eq!(mount.fact("view_step").unwrap(), "0");
    drop(held);
    assert_eq!(shown(&mount), trail.after(20));
    assert_eq!(mount.fact("view_step").unwrap(), "20");
    assert_eq!(on_disk(&model), before);
    mount.does("commit taught");
    assert_eq!(on_disk(&model), trail.after(20));
    assert_eq!(mount.status()["committed"]["step"], 20);
    assert_eq!(mount.fact("dirty").unwrap(), "no");
    assert!(mount.does("commit").contains("nothing changed"));

    // The past, weights and optimizer: the same job again gives the same weights as the first time.
    mount.does("rollback 0");
    assert_eq!((on_disk(&model), shown(&mount)), (before.clone(), before));
    mount.does(&format!("train {}", job(10)));
    assert_eq!(ended(&mount, 2, "finished")["source"], "ctl");
    assert_eq!(shown(&mount), trail.after(20));
}

#[test]
fn a_restart_between_two_jobs_changes_no_bit() {
    let scratch = Scratch::new();
    let model = model(&scratch.join("model"));
    let trail = Trail::of(&[job(25), job(25)]);
    for (restart, id) in [(false, 1), (true, 2)] {
        let mount = Mounting::of(&model, scratch.join("mnt")).mount();
        if restart {
            assert_eq!(job_facts(&mount, 1)["state"], "finished", "jobs are remembered");
        }
        mount.does(&format!("train {}", job(25)));
        ended(&mount, id, "finished");
        mount.does("commit");
        mount.umount();
        mount.ends();
    }
    assert_eq!(on_disk(&model), trail.after(100));
}

#[test]
fn commits_and_readers_in_the_middle_of_a_job_get_whole_steps() {
    let scratch = Scratch::new();
    let trail = Trail::of(&[job(1_000_000)]);
    for view in ["held", "live"] {
        let model = model(&scratch.join(format!("model-{view}")));
        let mount = Mounting::of(&model, scratch.join("mnt")).args(&["--view", view]).mount();
        mount.settled();
        mount.does(&format!("train {}", job(1_000_000)));
        let mut committed = 0;
        for _ in 0..4 {
            // Running only around the commit, and not while the reference catches up: it would never.
            mount.does("resume");
            // Past the last commit: a commit without a change is none.
            at_step(&mount, 1, committed + 2);
            let seen = if view == "held" {
                let first = mount.open(0);
                let mut bytes = Vec::new();
                (&first).read_to_end(&mut bytes).unwrap();
                let done = job_facts(&mount, 1)["steps_done"].as_u64().unwrap();
                at_step(&mount, 1, done + 2);
                let mut again = vec![0; bytes.len()];
                first.read_exact_at(&mut again, 0).unwrap();
                assert!(again == bytes, "the view moved under an open file");
                tensors(&bytes)
            } else {
                mount.does("freeze");
                let seen = shown(&mount);
                mount.does("thaw");
                let done = job_facts(&mount, 1)["steps_done"].as_u64().unwrap();
                at_step(&mount, 1, done + 2);
                seen
            };
            mount.does("commit while it trains");
            mount.does("pause");
            committed = mount.status()["committed"]["step"].as_u64().unwrap();
            let seen = trail.step(&seen) as u64;
            assert!(seen < committed, "a reader saw step {seen} before the commit of step {committed}");
        }
        mount.does("cancel 1");
        ended(&mount, 1, "cancelled");
        mount.does("resume");
        let commits = mount.status()["committed"]["id"].as_u64().unwrap();
        assert_eq!(commits, 4);
        let step = |id: u64| {
            let file = std::fs::read(mount.path(format!("commits/{id}/model.safetensors"))).unwrap();
            trail.step(&tensors(&file))
        };
        let steps: Vec<usize> = (1..=commits).map(step).collect();
        assert!(steps.windows(2).all(|w| w[0] < w[1]), "{steps:?}");
        let log = weightfs().args(["log", "--json"]).arg(&model.path).output().unwrap();
        let log: Value = serde_json::from_slice(&log.stdout).unwrap();
        for commit in log["commits"].as_array().or(log.as_array()).unwrap() {
            let id = commit["id"].as_u64().unwrap();
            assert_eq!(commit["step"], step(id), "the step that commit {id} says");
        }
        // The optimizer's state in a commit is that of its weights: training on from there meets the trail again.
        let middle = steps[steps.len() / 2];
        mount.does(&format!("rollback {}", steps.len() / 2 + 1));
        assert_eq!(trail.step(&shown(&mount)), middle);
        let mut samples = samples();
        samples.as_array_mut().unwrap().rotate_left(middle % 2);
        let config = json!({"lr": 1e-3, "rank": 4, "epochs": 1, "step_tokens": 1});
        let rest = json!({"samples": samples, "config": config});
        mount.does(&format!("train {rest}"));
        ended(&mount, 2, "finished");
        assert_eq!(trail.step(&shown(&mount)), middle + 2);
        mount.umount();
        mount.ends();
    }
}

#[test]
fn a_daemon_killed_in_the_middle_begins_again_from_the_last_commit() {
    let scratch = Scratch::new();
    let model = model(&scratch.join("model"));
    let mount = Mounting::of(&model, scratch.join("mnt")).mount();
    mount.does(&format!("train {}", job(5)));
    ended(&mount, 1, "finished");
    mount.does("commit");
    let committed = on_disk(&model);
    mount.does(&format!("train {}", job(1_000_000)));
    mount.does(&format!("train {}", job(1)));
    at_step(&mount, 2, 5);
    mount.signal(Signal::KILL);
    mount.ends();
    drop(mount);

    let output = weightfs().arg("mount").arg(&model.path).arg(scratch.join("mnt")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let cut = said.lines().find(|line| line.contains("job 2 was cut: ")).unwrap_or_else(|| panic!("{said}"));
    assert!(cut.contains("or a later one: the weights are those of commit 1 again"), "{said}");
    assert!(said.contains("job 3 was cut: the daemon ended before it began"), "{said}");
    assert!(weightfs().arg("umount").arg(scratch.join("mnt")).output().unwrap().status.success());
    let mount = Mounting::of(&model, scratch.join("mnt")).mount();
    assert_eq!(shown(&mount), committed);
    assert_eq!(
        ["1", "2", "3"].map(|id| job_facts(&mount, id.parse().unwrap())["state"].clone()),
        ["finished", "cut", "cut"]
    );
    mount.does(&format!("train {}", job(1)));
    ended(&mount, 4, "finished");
}

#[test]
fn jobs_wait_and_end_as_they_are_told() {
    let scratch = Scratch::new();
    let model = model(&scratch.join("model"));
    let mount = Mounting::of(&model, scratch.join("mnt")).mount();
    mount.does("pause");
    assert_eq!(mount.state(), "paused");
    mount.does(&format!("train {}", job(1_000_000)));
    mount.does(&format!("train {}", job(1)));
    assert_eq!((mount.status()["jobs_queued"].clone(), mount.fact("job").unwrap()), (json!(2), "none".into()));
    mount.does("resume");
    at_step(&mount, 1, 3);
    assert_eq!(mount.state(), "training");
    assert!(mount.fact("job").unwrap().starts_with("1 running sample "));
    assert_eq!(errno(mount.ctl("rollback 0")), Some(libc::EBUSY));
    assert!(mount.says().contains("cancel 1"), "{}", mount.says());
    mount.does("cancel 1");
    ended(&mount, 1, "cancelled");
    ended(&mount, 2, "finished");
    assert_eq!(errno(mount.ctl("cancel 2")), Some(libc::EINVAL));
    assert_eq!(mount.state(), "idle");
    mount.does("rollback 0");
    assert_eq!(shown(&mount), on_disk(&model));
}

#[test]
fn jobs_that_cannot_be_are_refused_and_nothing_changes() {
    let scratch = Scratch::new();
    let model = model(&scratch.join("model"));
    let before = on_disk(&model);
    let mount = Mounting::of(&model, scratch.join("mnt")).mount();
    let write = |name: &str, bytes: &[u8]| {
        std::fs::write(scratch.join(name), bytes).unwrap();
        format!("train {}", scratch.join(name).display())
    };
    rustix::fs::mknodat(rustix::fs::CWD, scratch.join("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let cases = [
        (format!("train {}", scratch.join("none.json").display()), libc::ENOENT, "there is no such file"),
        (format!("train {}", scratch.join("pipe").display()), libc::EINVAL, "no regular file"),
        (format!("train {}", scratch.path().display()), libc::EINVAL, "no regular file"),
        (write("bytes", b"{\"text\": \"a\"}\n\xff"), libc::EINVAL, "line 2 is not UTF-8"),
        (
            write("broken", b"{\"continuation_ids\": [1, 2]}\n{\"continuation_ids\": [1, }\n"),
            libc::EINVAL,
            "line 2 column 26",
        ),
        (write("key", b"{\"continuation_idz\": [1, 2]}"), libc::EINVAL, "unknown key 'continuation_idz'"),
        (write("empty", b""), libc::EINVAL, "empty"),
        (write("id", b"{\"continuation_ids\": [1, 999]}"), libc::EINVAL, "999"),
        ("train {\"samples\": []}".into(), libc::EINVAL, "no samples"),
        (
            "train {\"samples\": [{\"continuation_ids\": [1, 2]}], \"config\": {\"rank\": 4, \"lr\": 0}}".into(),
            libc::EINVAL,
            "config.lr",
        ),
        ("cancel 7".into(), libc::EINVAL, "no job 7"),
    ];
    for (command, code, words) in cases {
        assert_eq!(errno(mount.ctl(&command)), Some(code), "{command}: {}", mount.says());
        assert!(mount.says().contains(words), "{command}: {}", mount.says());
    }
    assert_eq!(mount.status()["jobs"], json!([]));
    // Relative to the directory of whoever writes.
    let mut shell = std::process::Command::new("sh");
    shell.current_dir(scratch.path()).args(["-c", "echo train job.json > mnt/ctl"]);
    std::fs::write(scratch.join("job.json"), job(1)).unwrap();
    assert!(shell.status().unwrap().success(), "{}", mount.says());
    ended(&mount, 1, "finished");
    drop(mount);
    assert_eq!(on_disk(&model), before);

    let mount = Mounting::of(&model, scratch.join("mnt")).arg("--read-only").mount();
    assert!(mount.ctl("train x").is_err());
    drop(mount);
    std::fs::write(model.path.join("config.json"), "{\"model_type\": \"gpt2\", \"vocab_size\": 3}").unwrap();
    let mount = Mounting::of(&model, scratch.join("mnt")).mount();
    assert_eq!(errno(mount.ctl(&format!("train {}", job(1)))), Some(libc::EOPNOTSUPP));
    assert!(mount.says().contains("'gpt2'") && mount.says().contains("qwen3"), "{}", mount.says());
}

#[test]
fn a_job_file_that_the_daemon_may_not_read_is_refused() {
    let scratch = Scratch::new();
    let model = model(&scratch.join("model"));
    let secret = scratch.join("secret.json");
    let mut options = File::options();
    std::io::Write::write_all(
        &mut options.write(true).create(true).mode(0o600).open(&secret).unwrap(),
        job(1).as_bytes(),
    )
    .unwrap();
    let ran = user::as_nobody(|| {
        let mount = Mounting::of(&model, scratch.join("mnt")).mount();
        assert_eq!(errno(mount.ctl(&format!("train {}", secret.display()))), Some(libc::EACCES));
        assert!(mount.says().contains("may not read it"), "{}", mount.says());
        assert!(mount.does(&format!("train {}", job(1))).contains("job 1"));
        ended(&mount, 1, "finished");
    });
    if !ran {
        eprintln!("skipped: needs root, to be another user");
    }
}

/// Weights in shared memory of an engine: one file, the tensors one after the other.
struct Shared {
    file: tempfile::NamedTempFile,
    manifest: PathBuf,
    places: Vec<(String, usize, usize)>,
}

impl Shared {
    fn new(model: &Model, scratch: &Scratch) -> Shared {
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        let (mut places, mut offset, mut entries) = (Vec::new(), 0, serde_json::Map::new());
        let disk = on_disk(model);
        for (name, shape) in specs() {
            file.as_file().write_all_at(&disk[&name], offset as u64).unwrap();
            let strides: Vec<u64> = (0..shape.len()).map(|d| shape[d + 1..].iter().product()).collect();
            entries.insert(
                name.clone(),
                json!({"dtype": "BF16", "shape": shape, "segments": [{"memory": 0, "offset": offset,
                "at": vec![0; shape.len()], "shape": shape, "strides": strides, "dtype": "BF16"}]}),
            );
            places.push((name.clone(), offset, disk[&name].len()));
            offset += disk[&name].len();
        }
        let manifest = scratch.join("engine.json");
        support::engine::publish(
            &manifest,
            &json!({"weightfs": 1, "engine": {"name": "toy", "version": "1", "rank": 0, "world_size": 1},
                "model": model.path, "memories": [{"kind": "file", "path": file.path(), "bytes": offset}],
                "tensors": entries, "opaque": {}}),
        );
        Shared { file, manifest, places }
    }

    fn tensors(&self) -> Tensors {
        let read = |(name, offset, len): &(String, usize, usize)| {
            let mut bytes = vec![0; *len];
            self.file.as_file().read_exact_at(&mut bytes, *offset as u64).unwrap();
            (name.clone(), bytes)
        };
        self.places.iter().map(read).collect()
    }
}

#[test]
fn an_engines_weights_are_trained_where_they_are_and_left_whole() {
    let scratch = Scratch::new();
    let model = model(&scratch.join("model"));
    let engine = Shared::new(&model, &scratch);
    let trail = Trail::of(&[job(1_000_000)]);
    let mount = Mounting::of(&model, scratch.join("mnt")).arg("--weights").arg(&engine.manifest).mount();
    mount.settled();
    mount.does(&format!("train {}", job(1_000_000)));
    at_step(&mount, 1, 4);
    mount.does("commit");
    // While somebody else takes a step, ours wait; and the other way round.
    let lock = File::open(&engine.manifest).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let held = engine.tensors();
    trail.step(&held);
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert_eq!(engine.tensors(), held);
    drop(lock);
    at_step(&mount, 1, 20);
    // However the mount ends, no step is left half written, and the job says after which one.
    mount.umount();
    mount.ends();
    drop(mount);
    let mut left = engine.tensors();
    let at = trail.step(&left);
    assert!(at >= 20, "{at}");
    let mount = Mounting::of(&model, scratch.join("mnt")).arg("--weights").arg(&engine.manifest).mount();
    mount.settled();
    assert_eq!(mount.fact("dirty").unwrap(), "yes");
    let facts = job_facts(&mount, 1);
    assert_eq!((&facts["state"], &facts["steps_done"]), (&json!("cut"), &json!(at)));
    let why = facts["error"].as_str().unwrap();
    assert!(why.starts_with(&format!("the daemon ended after step {at} of 2000000: the engine's weights")), "{why}");
    assert_eq!(shown(&mount), left);
    mount.does("rollback 1");
    left = engine.tensors();
    assert_eq!(left, on_disk(&model));
    assert!(trail.step(&left) >= 4);
}

#[test]
fn the_command_follows_a_job_to_its_end() {
    let scratch = Scratch::new();
    let model = model(&scratch.join("model"));
    let mount = Mounting::of(&model, scratch.join("mnt")).mount();
    std::fs::write(scratch.join("job.json"), job(10)).unwrap();
    let train = |arguments: &[&str]| {
        let mut command = weightfs();
        command.current_dir(scratch.path()).arg("train").arg("mnt").args(arguments);
        command.output().unwrap()
    };
    let followed = train(&["job.json", "--follow"]);
    let said = String::from_utf8_lossy(&followed.stdout).into_owned();
    assert!(followed.status.success(), "{}", String::from_utf8_lossy(&followed.stderr));
    assert!(said.contains("job 1 finished: 20 steps, loss "), "{said}");
    let queued = train(&["job.json", "--json"]);
    let json: Value = serde_json::from_slice(&queued.stdout).unwrap();
    assert_eq!((&json["id"], &json["steps"]), (&json!(2), &json!(20)));
    ended(&mount, 2, "finished");
    let json: Value = serde_json::from_slice(&train(&["job.json", "--json", "--follow"]).stdout).unwrap();
    assert_eq!((&json["state"], &json["steps_done"]), (&json!("finished"), &json!(20)));
    let refused = train(&["none.json"]);
    assert!(!refused.status.success());
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("none.json") && said.trim_end().lines().count() == 1, "{said}");
    std::fs::write(scratch.join("bad.json"), "{\"text\": 3}").unwrap();
    let said = String::from_utf8_lossy(&train(&["bad.json"]).stderr).into_owned();
    assert!(said.contains("bad.json") && said.contains("text"), "{said}");
}

/// What is open on a mount that was taken away keeps its daemon, but not its jobs.
#[test]
fn when_the_mount_is_taken_away_its_jobs_end_though_somebody_looks_at_them() {
    let scratch = Scratch::new();
    let model = model(&scratch.join("model"));
    let mount = Mounting::of(&model, scratch.join("mnt")).mount();
    std::fs::write(scratch.join("job.json"), job(1_000_000)).unwrap();
    let mut open = File::open(mount.path("status.json")).unwrap();
    let mut command = weightfs();
    let followed = command.args(["train", "mnt", "job.json", "--follow"]).current_dir(scratch.path());
    let followed = followed.stderr(Stdio::piped()).spawn().unwrap();
    until("the job runs", || mount.status()["job"]["steps_done"].as_u64() > Some(2));
    rustix::mount::unmount(scratch.join("mnt"), rustix::mount::UnmountFlags::DETACH).unwrap();
    let said = followed.wait_with_output().unwrap();
    let why = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(!said.status.success() && why.contains("taken away"), "{why}");
    until("the job stands still", || {
        let mut text = String::new();
        open.rewind().unwrap();
        open.read_to_string(&mut text).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["state"] == "paused"
    });
    drop(open);
    mount.ends();
    let mount = Mounting::of(&model, scratch.join("mnt")).mount();
    assert_eq!(mount.status()["jobs"][0]["state"], "cut");
}
