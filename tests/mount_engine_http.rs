//! The engine's side of a change of weights: found by the model it serves, and told over HTTP, in this order, what happens to its
//! weights. The engine here is a few lines of HTTP that keep what they are asked.

mod support;
mod train_support;

use serde_json::json;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use support::engine::publish;
use support::model::assert_same;
use support::mount::{assert_one_line, is_mounted};
use support::{Engine, Model, Mount, Mounting, Scratch, until, weightfs};
use train_support::{golden_weights, to_bytes};
use weightfs::model::Dtype;
use weightfs::train::{Architecture, Config};

const CONFIG: &str = include_str!("goldens/qwen3_tied.json");

/// A model directory that trains.
fn model(path: &Path) -> Model {
    std::fs::create_dir_all(path).unwrap();
    let architecture = Architecture::from_config(&Config::parse(CONFIG).unwrap()).unwrap();
    let tensors: Vec<_> = architecture
        .tensors()
        .into_iter()
        .map(|(name, shape)| {
            let bytes = to_bytes(Dtype::BF16, &golden_weights(name, shape.iter().product::<u64>() as usize, 0.0));
            (name.to_string(), shape.iter().map(|&n| n as usize).collect::<Vec<_>>(), bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.as_str(), safetensors::tensor::TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap())
    });
    std::fs::write(path.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    std::fs::write(path.join("config.json"), CONFIG).unwrap();
    Model { path: path.to_owned(), shards: vec!["model.safetensors".into()], specs: Vec::new() }
}

fn job(epochs: u64) -> String {
    let samples = json!([{"context_ids": [1, 2, 3], "continuation_ids": [4, 5, 6, 7, 8]}]);
    json!({"samples": samples, "config": {"lr": 1e-3, "rank": 4, "epochs": epochs}}).to_string()
}

/// Answers everything with success, and tells the path and body of each request before it answers.
fn http_engine() -> (String, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (tell, told) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut reader = BufReader::new(stream.unwrap());
            let mut head = Vec::new();
            while !head.ends_with(&[String::new()]) {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                head.push(line.trim().to_string());
            }
            let length =
                head.iter().find_map(|line| line.to_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
            let mut body = vec![0; length.unwrap_or(0)];
            reader.read_exact(&mut body).unwrap();
            let path = head[0].split(' ').nth(1).unwrap();
            if tell.send(format!("{path} {}", String::from_utf8(body).unwrap()).trim().to_string()).is_err() {
                return;
            }
            let answer = r#"{"success": true}"#;
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", answer.len());
            reader.into_inner().write_all(format!("{head}{answer}").as_bytes()).unwrap();
        }
    });
    (url, told)
}

fn ended(mount: &Mount) {
    until("the job ends", || mount.status()["job"].is_null() && mount.status()["jobs_queued"] == 0);
    until("the engine was told, or could not be", || {
        let status = mount.status();
        let engine = &status["engine"];
        engine["settled"] == true && (engine["step"] == status["step"] || !engine["error"].is_null())
    });
}

#[test]
fn around_each_step_requests_stand_still_and_what_was_cached_is_forgotten_before_they_go_on() {
    let scratch = Scratch::new();
    let model = model(&scratch.join("model"));
    let (url, requests) = http_engine();
    let words = ["--engine-url", &url, "--engine-sync", "step", "--engine-pause", "--engine-timeout", "60"];
    let mount = Mounting::of(&model, scratch.join("mnt")).args(&words).mount();
    assert!(mount.status()["engine"]["step"].is_null());
    mount.does(&format!("train {}", job(3)));
    ended(&mount);
    assert_eq!(mount.status()["engine"]["step"], 3);
    assert!(mount.fact("engine_told").unwrap().starts_with("step 3 at"));
    let seen: Vec<String> = requests.try_iter().collect();
    let routes: Vec<&str> = seen.iter().map(|r| r.split(' ').next().unwrap()).collect();
    assert_eq!(routes, ["/weightfs/pause", "/weightfs/updated", "/weightfs/resume"].repeat(3));
    let updates: Vec<&String> = seen.iter().filter(|r| r.starts_with("/weightfs/updated")).collect();
    assert_eq!(
        updates,
        ["1", "2", "3"].map(|n| format!(r#"/weightfs/updated {{"step": {n}}}"#)).iter().collect::<Vec<_>>()
    );
    // A rollback changes weights as a step does.
    mount.does("commit");
    assert_eq!(requests.try_iter().count(), 0, "a commit changes nothing");
    mount.does("rollback 0");
    ended(&mount);
    let seen: Vec<String> = requests.try_iter().collect();
    assert!(seen[0].starts_with("/weightfs/pause ") && seen.len() == 3, "{seen:?}");
    assert_eq!(seen[1..], [r#"/weightfs/updated {"step": 4}"#, "/weightfs/resume"]);
}

#[test]
fn by_default_the_engine_is_told_once_a_job_and_one_that_is_silent_holds_nothing_up() {
    let scratch = Scratch::new();
    let model = model(&scratch.join("model"));
    let (url, requests) = http_engine();
    let mount = Mounting::of(&model, scratch.join("mnt")).args(&["--engine-url", &url]).mount();
    mount.does(&format!("train {}", job(3)));
    ended(&mount);
    assert_eq!(requests.try_iter().collect::<Vec<_>>(), [r#"/weightfs/updated {"step": 3}"#]);
    drop(mount);

    // Accepted by the kernel, never answered.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let words = ["--engine-url", &url, "--engine-pause", "--engine-sync", "step", "--engine-timeout", "0.05"];
    let mount = Mounting::of(&model, scratch.join("mnt")).args(&words).mount();
    mount.does(&format!("train {}", job(20)));
    ended(&mount);
    let status = mount.status();
    assert_eq!(status["jobs"].as_array().unwrap().last().unwrap()["steps_done"], 20);
    assert!(status["engine"]["error"].as_str().unwrap().contains("does not answer"), "{}", status["engine"]);
}

#[test]
fn a_url_that_cannot_be_the_engines_is_refused_before_anything_is_mounted() {
    let scratch = Scratch::new();
    let model = Model::single(scratch.join("model"));
    let mounting = || Mounting::of(&model, scratch.join("mnt"));
    assert_one_line(
        &mounting().args(&["--engine-url", "localhost:8000"]).fails(),
        &["--engine-url", "http://HOST:PORT"],
    );
    assert_one_line(&mounting().args(&["--engine-sync", "step"]).fails(), &["--engine-url"]);
    assert!(!is_mounted(&scratch.join("mnt")));
}

#[test]
fn the_engine_that_serves_the_model_is_found_and_one_that_shares_nothing_says_why() {
    let scratch = Scratch::new();
    let model = Model::sharded(scratch.join("model"));
    let place = scratch.dir("place");
    let manifest = place.join("vllm-1-rank0.json");
    let engine = Engine::new(&model, &manifest);
    let mounting = || {
        let mut command = weightfs();
        command.env("WEIGHTFS_MANIFEST_DIR", &place);
        Mounting::by(command, &model, scratch.join("mnt")).args(&["--weights", "vllm"])
    };
    let failure = mounting().fails();
    assert_one_line(&failure, &["no vllm", place.to_str().unwrap()]);
    let mut description = engine.description(&model, Some(std::process::id()));
    description["engine"]["name"] = "vllm".into();
    publish(&manifest, &description);
    let mount = mounting().mount();
    assert_eq!(mount.status()["source"]["engine"], "vllm 7");
    assert_same("the mount", &mount.weights(), &engine.expected(&model));
    drop(mount);
    description["refused"] = "sleep mode: start vLLM without --enable-sleep-mode".into();
    publish(&manifest, &description);
    assert_one_line(&mounting().fails(), &["does not share", "--enable-sleep-mode"]);
}
