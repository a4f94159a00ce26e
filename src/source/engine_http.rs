//! What is asked of an engine over HTTP when its weights change: to forget what it computed with older ones, and to stand
//! still meanwhile. `--engine-url`.
//!
//! vLLM keeps the keys and values of prompts it has seen; with new weights they are wrong, and nothing but us knows it.
//! The plugin's own routes are tried first (`engines/vllm/weightfs_vllm/endpoint.py`), then those that vLLM has with
//! VLLM_SERVER_DEV_MODE=1 (`vllm/entrypoints/serve/dev`, `vllm/entrypoints/rl/online`).
//!
//! A thread of its own talks to the engine; nobody waits for it but a pause, and that for a stated time, once a job.

use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two tries while the engine says that blocks of its cache are still held.
const RETRY: Duration = Duration::from_millis(100);
/// The plugin's route takes no longer lease (`endpoint.py`).
const LONGEST_LEASE: Duration = Duration::from_secs(3600);

/// When the engine is told that its weights have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    Step,
    Job,
    Never,
}

#[derive(Debug, Clone)]
pub struct Options {
    /// As users know it: `http://127.0.0.1:8000`.
    pub url: String,
    pub when: When,
    /// Requests stand still while a step is written.
    pub pause: bool,
    /// How long an answer may take.
    pub patience: Duration,
    /// Sent as `Authorization: Bearer`.
    pub key: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum EngineHttpError {
    #[error("--engine-url {url}: {why}")]
    BadUrl { url: String, why: String },
    #[error("the engine at {url} does not answer ({why}): it may go on with what it cached from older weights")]
    NoAnswer { url: String, why: String },
    #[error(
        "the engine at {url} has no route to {what}: start vLLM with VLLM_PLUGINS=weightfs,weightfs_http, or with \
         VLLM_SERVER_DEV_MODE=1"
    )]
    NoRoute { url: String, what: &'static str },
    #[error("the engine at {url} would not {what}: {why}")]
    Refused { url: String, what: &'static str, why: String },
}

/// How the engine stands with the weights' steps, for `status`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Synced {
    pub url: String,
    /// The newest step that the engine was told of.
    pub step: Option<u64>,
    /// Nothing is under way.
    pub settled: bool,
    pub error: Option<String>,
}

/// Keeps one engine told. Cheap to clone.
#[derive(Clone)]
pub struct EngineSync {
    shared: Arc<Shared>,
}

struct Shared {
    options: Options,
    client: Client,
    state: Mutex<State>,
    changed: Condvar,
    /// Called, under no lock, when `synced` has something new.
    moved: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct State {
    /// To tell of, and not told yet.
    wanted: Option<u64>,
    told: Option<u64>,
    /// Being told of at this moment, and whether that was asked for once more.
    telling: Option<u64>,
    again: bool,
    /// Requests stand still, or may.
    paused: bool,
    /// When to ask for the pause again, before its lease ends.
    renew: Option<Instant>,
    resume: bool,
    working: bool,
    /// A pause failed: the rest of the job goes without.
    gave_up: bool,
    error: Option<String>,
}

/// The engine stands still while this lives, unless it would not.
pub struct Pause {
    sync: EngineSync,
}

impl EngineSync {
    /// Starts the thread. `moved` is told when [`EngineSync::synced`] has something new.
    pub fn start(options: Options, moved: impl Fn() + Send + Sync + 'static) -> Result<EngineSync, EngineHttpError> {
        let client = Client::new(&options)?;
        EngineSync::by(client, options, moved)
    }

    fn by(
        client: Client,
        options: Options,
        moved: impl Fn() + Send + Sync + 'static,
    ) -> Result<EngineSync, EngineHttpError> {
        let shared =
            Shared { options, client, state: Mutex::default(), changed: Condvar::new(), moved: Box::new(moved) };
        let sync = EngineSync { shared: Arc::new(shared) };
        let worker = sync.clone();
        let started = std::thread::Builder::new().name("engine".into()).spawn(move || worker.work());
        started.map_err(|e| EngineHttpError::BadUrl { url: sync.shared.options.url.clone(), why: e.to_string() })?;
        Ok(sync)
    }

    pub fn synced(&self) -> Synced {
        let state = self.shared.state.lock();
        Synced {
            url: self.shared.options.url.clone(),
            step: state.told,
            settled: state.wanted.is_none() && !state.working && !state.resume,
            error: state.error.clone(),
        }
    }

    /// A step begins to write. Waits for the engine to stand still if that was asked for, and at most the stated time;
    /// what keeps it from standing still is logged, and not tried again before the job has ended.
    pub fn step_begins(&self) -> Option<Pause> {
        let options = &self.shared.options;
        if !options.pause || self.shared.state.lock().gave_up {
            return None;
        }
        let deadline = Instant::now() + options.patience;
        let mut state = self.shared.state.lock();
        // The end of the last pause comes before the next.
        while state.resume || state.working {
            if self.shared.changed.wait_until(&mut state, deadline).timed_out() {
                let error = EngineHttpError::NoAnswer { url: options.url.clone(), why: "it is still busy".into() };
                self.give_up(&mut state, &error);
                return None;
            }
        }
        // Even if the answer is lost, the engine may have obeyed: it is resumed either way.
        state.paused = true;
        drop(state);
        let paused = self.shared.client.pause(deadline.saturating_duration_since(Instant::now()));
        self.paused(&mut self.shared.state.lock(), paused);
        Some(Pause { sync: self.clone() })
    }

    /// `paused`: what came of asking for a pause, and when it has to be asked for again.
    fn paused(&self, state: &mut State, paused: Result<Option<Instant>, EngineHttpError>) {
        match paused {
            // It may have ended while it was renewed.
            Ok(renew) => state.renew = renew.filter(|_| state.paused),
            Err(e) => self.give_up(state, &e),
        }
        self.shared.changed.notify_all();
    }

    fn give_up(&self, state: &mut State, error: &EngineHttpError) {
        log::warn!("{error}; the rest of the job goes on without pauses");
        state.gave_up = true;
        state.error = Some(error.to_string());
    }

    /// The weights are those of `step` now. Returns at once.
    pub fn step_taken(&self, step: u64) {
        if self.shared.options.when == When::Step {
            self.tell(step);
        }
    }

    /// A job has ended, or the weights were changed otherwise. Returns at once.
    pub fn changed(&self, step: u64) {
        self.shared.state.lock().gave_up = false;
        if self.shared.options.when != When::Never {
            self.tell(step);
        }
    }

    fn tell(&self, step: u64) {
        let mut state = self.shared.state.lock();
        // Only the newest counts: an engine slower than our steps skips some.
        if state.telling == Some(step) {
            state.again = true;
        } else if state.told != Some(step) {
            state.wanted = Some(step);
            self.shared.changed.notify_all();
        }
    }

    fn work(&self) {
        let shared = &*self.shared;
        loop {
            let mut state = shared.state.lock();
            state.working = false;
            shared.changed.notify_all();
            let renew = loop {
                let renew = state.renew.take_if(|at| *at <= Instant::now()).is_some();
                if renew || state.wanted.is_some() || state.resume {
                    break renew;
                }
                match state.renew {
                    Some(at) => {
                        shared.changed.wait_until(&mut state, at);
                    }
                    None => shared.changed.wait(&mut state),
                }
            };
            state.working = true;
            let (wanted, resume) = (state.wanted.take(), std::mem::take(&mut state.resume));
            (state.telling, state.again) = (wanted, false);
            drop(state);
            let renewed = renew.then(|| shared.client.pause(shared.options.patience));
            // First the cache, then the requests: none may go on with keys and values of older weights.
            let told = wanted.map(|step| shared.client.updated(step));
            let resumed = if resume { Some(shared.client.resume()) } else { None };
            let mut state = shared.state.lock();
            if let Some(renewed) = renewed {
                self.paused(&mut state, renewed);
            }
            if let Some(told) = &told {
                state.error = told.as_ref().err().map(ToString::to_string);
                state.told = wanted.filter(|_| told.is_ok()).or(state.told);
                if told.is_err() && state.again {
                    state.wanted = state.wanted.or(wanted);
                }
            }
            state.telling = None;
            if let Some(Err(e)) = &resumed {
                state.error = Some(e.to_string());
            }
            let news = told.is_some() || state.error.is_some();
            for error in [told.and_then(Result::err), resumed.and_then(Result::err)].into_iter().flatten() {
                log::warn!("{error}");
            }
            // Settled before it is said.
            state.working = false;
            drop(state);
            if news {
                (shared.moved)();
            }
        }
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        let mut state = self.sync.shared.state.lock();
        if std::mem::take(&mut state.paused) {
            state.renew = None;
            state.resume = true;
            self.sync.shared.changed.notify_all();
        }
    }
}

/// The requests themselves.
struct Client {
    base: String,
    url: String,
    agent: ureq::Agent,
    patience: Duration,
    /// The plugin ends a pause by itself after this long: we might die in it.
    lease: Duration,
    key: Option<String>,
}

impl Client {
    fn new(options: &Options) -> Result<Client, EngineHttpError> {
        let bad = |why: &str| EngineHttpError::BadUrl { url: options.url.clone(), why: why.into() };
        let base = options.url.trim_end_matches('/').trim_end_matches("/v1").to_string();
        let uri: ureq::http::Uri = base.parse().map_err(|_| bad("it is no URL: give it as http://HOST:PORT"))?;
        if uri.scheme_str() != Some("http") || uri.host().is_none_or(str::is_empty) {
            return Err(bad("only http is spoken: the engine runs on this machine, give it as http://HOST:PORT"));
        }
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // The engine is here, whatever the environment says of proxies.
            .proxy(None)
            .build();
        Ok(Client {
            base,
            url: options.url.clone(),
            agent: config.into(),
            patience: options.patience,
            lease: (options.patience * 2 + Duration::from_secs(30)).min(LONGEST_LEASE),
            key: options.key.clone(),
        })
    }

    /// When to ask again: halfway through the lease, where the engine has such a thing.
    fn pause(&self, patience: Duration) -> Result<Option<Instant>, EngineHttpError> {
        let renew = Instant::now() + self.lease / 2;
        let lease = format!("{{\"seconds\": {}}}", self.lease.as_secs_f64());
        let tries = [("/weightfs/pause", lease.as_str()), ("/pause?mode=keep", "")];
        let (route, _) = self.first_route("pause its requests", &tries, patience)?;
        Ok((route == 0).then_some(renew))
    }

    fn resume(&self) -> Result<(), EngineHttpError> {
        self.first_route("resume its requests", &[("/weightfs/resume", ""), ("/resume", "")], self.patience).map(drop)
    }

    /// Forgets what was computed with older weights, and reports `step` as the version of the weights.
    fn updated(&self, step: u64) -> Result<(), EngineHttpError> {
        const WHAT: &str = "reset its prefix cache";
        let deadline = Instant::now() + self.patience;
        let body = format!("{{\"step\": {step}}}");
        let tries = [("/weightfs/updated", body.as_str()), ("/reset_prefix_cache?reset_running_requests=true", "")];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let (route, answer) = self.first_route(WHAT, &tries, left)?;
            // {"success": false} while blocks are in use: it is meant to be asked again.
            let done = serde_json::from_str::<serde_json::Value>(&answer).ok();
            if done.as_ref().and_then(|v| v["success"].as_bool()) != Some(false) {
                if route == 1 {
                    let version = format!("{{\"new_version\": \"{step}\"}}");
                    // Older engines have no such route: the reset is what matters.
                    let _ = self.post("/update_weight_version", &version, self.patience);
                }
                return Ok(());
            }
            if Instant::now() + RETRY >= deadline {
                let why = "requests in flight hold on to it".into();
                return Err(EngineHttpError::Refused { url: self.url.clone(), what: WHAT, why });
            }
            std::thread::sleep(RETRY);
        }
    }

    /// Posts to the first of the routes that the engine has: which one it was, and the answer's body.
    fn first_route(
        &self,
        what: &'static str,
        routes: &[(&str, &str)],
        patience: Duration,
    ) -> Result<(usize, String), EngineHttpError> {
        let deadline = Instant::now() + patience;
        for (i, (route, body)) in routes.iter().enumerate() {
            let (status, answer) = self.post(route, body, deadline.saturating_duration_since(Instant::now()))?;
            match status {
                200..300 => return Ok((i, answer)),
                404 | 405 => continue,
                _ => {
                    let why = format!("status {status}, {}", answer.trim().chars().take(200).collect::<String>());
                    return Err(EngineHttpError::Refused { url: self.url.clone(), what, why });
                }
            }
        }
        Err(EngineHttpError::NoRoute { url: self.url.clone(), what })
    }

    fn post(&self, route: &str, body: &str, patience: Duration) -> Result<(u16, String), EngineHttpError> {
        let silent = |e: ureq::Error| EngineHttpError::NoAnswer { url: self.url.clone(), why: e.to_string() };
        let mut request = self
            .agent
            .post(format!("{}{route}", self.base))
            .config()
            .timeout_global(Some(patience.max(Duration::from_millis(1))))
            .build();
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let sent = match body {
            "" => request.send_empty(),
            json => request.content_type("application/json").send(json),
        };
        let mut answer = sent.map_err(silent)?;
        let status = answer.status().as_u16();
        let text = answer.body_mut().with_config().limit(1 << 20).read_to_string().map_err(silent)?;
        Ok((status, text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpListener;
    use std::sync::mpsc::{Receiver, channel};

    /// Longer than anything takes, and no hang.
    const LONG: Duration = Duration::from_secs(20);

    /// An HTTP server that answers with what `answer` makes of a request's path and body, and tells of each.
    fn serve(answer: impl Fn(&str, &str) -> (u16, &'static str) + Send + 'static) -> (String, Receiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (tell, told) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut reader = BufReader::new(stream.unwrap());
                let (mut first, mut length) = (String::new(), 0);
                reader.read_line(&mut first).unwrap();
                loop {
                    let mut line = String::new();
                    reader.read_line(&mut line).unwrap();
                    let line = line.trim().to_lowercase();
                    if line.is_empty() {
                        break;
                    }
                    if let Some(n) = line.strip_prefix("content-length:") {
                        length = n.trim().parse().unwrap();
                    }
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                let (path, body) = (first.split(' ').nth(1).unwrap(), String::from_utf8(body).unwrap());
                let (status, text) = answer(path, &body);
                let head =
                    format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", text.len());
                reader.into_inner().write_all(format!("{head}{text}").as_bytes()).unwrap();
                if tell.send(format!("{path} {body}").trim().to_string()).is_err() {
                    return;
                }
            }
        });
        (url, told)
    }

    fn options(url: &str, when: When, pause: bool) -> Options {
        Options { url: url.into(), when, pause, patience: Duration::from_secs(30), key: None }
    }

    /// Starts it, and a receiver that has a message whenever `synced` has something new.
    fn start(options: Options) -> (EngineSync, Receiver<()>) {
        let (tell, told) = channel();
        let sync = EngineSync::start(options, move || {
            let _ = tell.send(());
        })
        .unwrap();
        (sync, told)
    }

    #[test]
    fn after_a_job_the_engine_forgets_and_learns_the_step() {
        let (url, requests) = serve(|_, _| (200, r#"{"success": true}"#));
        let (sync, moved) = start(options(&url, When::Job, false));
        assert!(sync.step_begins().is_none());
        sync.step_taken(1);
        sync.step_taken(2);
        sync.changed(2);
        moved.recv().unwrap();
        assert_eq!(requests.recv().unwrap(), r#"/weightfs/updated {"step": 2}"#);
        let synced = sync.synced();
        assert_eq!((synced.step, synced.settled, synced.error), (Some(2), true, None));
        assert!(requests.try_recv().is_err());
    }

    #[test]
    fn without_the_plugins_routes_vllms_own_are_used_until_the_reset_succeeds() {
        let tries = Mutex::new(0);
        let (url, requests) = serve(move |path, _| match path {
            p if p.starts_with("/weightfs/") => (404, "{}"),
            p if p.starts_with("/reset_prefix_cache") => {
                let mut tries = tries.lock();
                *tries += 1;
                (200, if *tries < 3 { r#"{"success":false}"# } else { r#"{"success":true}"# })
            }
            _ => (200, "{}"),
        });
        let (sync, moved) = start(options(&format!("{url}/v1/"), When::Step, false));
        sync.step_taken(7);
        moved.recv().unwrap();
        let seen: Vec<String> = requests.try_iter().filter(|r| !r.starts_with("/weightfs/")).collect();
        let reset = "/reset_prefix_cache?reset_running_requests=true";
        assert_eq!(seen[..3], [reset; 3]);
        assert_eq!(sync.synced().step, Some(7));
    }

    #[test]
    fn requests_stand_still_while_a_step_is_written_and_go_on_after_the_cache_is_empty() {
        let (url, requests) = serve(|_, _| (200, r#"{"success": true}"#));
        let (sync, moved) = start(options(&url, When::Step, true));
        for step in 1..3 {
            let pause = sync.step_begins();
            assert!(requests.recv().unwrap().starts_with("/weightfs/pause"), "before the step writes");
            sync.step_taken(step);
            moved.recv().unwrap();
            assert_eq!(requests.recv().unwrap(), format!(r#"/weightfs/updated {{"step": {step}}}"#));
            drop(pause);
            assert_eq!(requests.recv().unwrap(), "/weightfs/resume");
        }
    }

    #[test]
    fn a_pause_is_asked_for_again_for_as_long_as_it_lasts() {
        let (url, requests) = serve(|_, _| (200, r#"{"success": true}"#));
        let options = options(&url, When::Step, true);
        let client = Client { lease: Duration::from_millis(250), ..Client::new(&options).unwrap() };
        let sync = EngineSync::by(client, options, || {}).unwrap();
        // It ends while it is renewed, or while it waits for that.
        for times in [3, 1] {
            let pause = sync.step_begins();
            for _ in 0..times {
                assert_eq!(requests.recv_timeout(LONG).unwrap(), r#"/weightfs/pause {"seconds": 0.25}"#);
            }
            drop(pause);
            // One more may have been under way.
            while requests.recv_timeout(LONG).unwrap() != "/weightfs/resume" {}
            assert!(requests.recv_timeout(Duration::from_millis(500)).is_err(), "after its end it is not");
        }
        assert_eq!(sync.synced().error, None);
    }

    #[test]
    fn vllms_own_pause_does_not_end_by_itself_and_is_asked_for_once() {
        let (url, requests) = serve(|path, _| (if path.starts_with("/weightfs/") { 404 } else { 200 }, "{}"));
        let options = options(&url, When::Step, true);
        let client = Client { lease: Duration::from_millis(20), ..Client::new(&options).unwrap() };
        let sync = EngineSync::by(client, options, || {}).unwrap();
        let pause = sync.step_begins();
        assert!(requests.recv().unwrap().starts_with("/weightfs/pause"));
        assert_eq!(requests.recv().unwrap(), "/pause?mode=keep");
        assert!(requests.recv_timeout(Duration::from_millis(300)).is_err());
        drop(pause);
    }

    #[test]
    fn a_pause_that_cannot_be_renewed_is_reported() {
        let asked = Mutex::new(0);
        let (url, requests) = serve(move |_, _| {
            let mut asked = asked.lock();
            *asked += 1;
            (if *asked == 2 { 500 } else { 200 }, "{}")
        });
        let (tell, moved) = channel();
        let options = options(&url, When::Step, true);
        let client = Client { lease: Duration::from_millis(20), ..Client::new(&options).unwrap() };
        let sync = EngineSync::by(client, options, move || {
            let _ = tell.send(());
        })
        .unwrap();
        let pause = sync.step_begins();
        moved.recv_timeout(LONG).unwrap();
        assert!(sync.synced().error.unwrap().contains("pause its requests: status 500"));
        drop(pause);
        for wanted in ["/weightfs/pause", "/weightfs/pause", "/weightfs/resume"] {
            assert!(requests.recv_timeout(LONG).unwrap().starts_with(wanted), "{wanted}");
        }
        assert!(sync.step_begins().is_none(), "the rest of the job goes on without");
    }

    #[test]
    fn however_long_an_answer_may_take_the_plugin_accepts_the_lease() {
        for (patience, lease) in [(5, 40), (1785, 3600), (1786, 3600), (86400, 3600)] {
            let patience = Duration::from_secs(patience);
            let client = Client::new(&Options { patience, ..options("http://127.0.0.1:1", When::Job, true) }).unwrap();
            assert_eq!(client.lease.as_secs(), lease, "{patience:?}");
        }
    }

    #[test]
    fn an_engine_that_does_not_answer_holds_a_job_up_once() {
        // Connections are accepted by the kernel and never answered.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let patience = Duration::from_millis(20);
        let (sync, moved) = start(Options { patience, ..options(&url, When::Job, true) });
        drop(sync.step_begins());
        assert!(sync.step_begins().is_none(), "it is not asked again in the same job");
        sync.changed(1);
        moved.recv().unwrap();
        while !sync.synced().settled {
            moved.recv().unwrap();
        }
        let synced = sync.synced();
        assert_eq!(synced.step, None);
        assert!(synced.error.unwrap().contains("does not answer"));
        assert!(sync.step_begins().is_some(), "the next job asks again");
    }

    #[test]
    fn an_engine_without_the_routes_is_told_how_to_get_them() {
        let (url, _requests) = serve(|_, _| (404, "{}"));
        let (sync, moved) = start(options(&url, When::Job, false));
        sync.changed(1);
        moved.recv().unwrap();
        assert!(sync.synced().error.unwrap().contains("VLLM_PLUGINS"));
    }

    #[test]
    fn urls_that_cannot_be_the_engines_are_refused_at_the_start() {
        for url in ["127.0.0.1:8000", "https://example.org", "http://", "file:///x", ""] {
            let refused = EngineSync::start(options(url, When::Job, false), || {});
            assert!(matches!(refused, Err(EngineHttpError::BadUrl { .. })), "{url}");
        }
    }
}
