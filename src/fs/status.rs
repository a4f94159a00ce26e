//! `status` and `status.json`: the same facts, as `key value` lines and as JSON with numbers. Keys are stable: they are
//! listed in `docs/semantics.md`, new ones are added, none changes its meaning.

use crate::source::Synced;
use crate::train::JobRecord;
use serde::Serialize;
use std::fmt::Write;

/// All that a mount tells about itself at one moment.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// idle, training, committing, paused, frozen or failed.
    pub state: &'static str,
    pub model: String,
    pub mount_point: String,
    /// The daemon's process.
    pub pid: u32,
    pub source: SourceFacts,
    pub step: u64,
    pub view: ViewFacts,
    pub memory: MemoryFacts,
    pub readers: ReaderFacts,
    pub committed: Option<CommitFacts>,
    /// Whether live weights differ from the newest commit, as far as was looked: yes, no or unknown.
    pub dirty: &'static str,
    /// With `--engine-url`.
    pub engine: Option<EngineFacts>,
    pub job: Option<JobFacts>,
    pub jobs_queued: u64,
    /// The newest, oldest first: ended ones of former lives too.
    pub jobs: Vec<JobFacts>,
    pub last_command: Option<CommandFacts>,
    pub last_error: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
pub struct SourceFacts {
    /// own, or the engine's name and version.
    pub engine: String,
    pub pids: Vec<u32>,
    pub device: String,
    /// Of all shards.
    pub bytes: u64,
    pub tensors: u64,
    pub live: u64,
    pub opaque: u64,
    pub only_on_disk: u64,
    pub only_live: u64,
    /// Why the engine counts as gone.
    pub gone: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
pub struct ViewFacts {
    pub step: u64,
    /// passthrough, copied or direct.
    pub served: &'static str,
    /// Why not passthrough, if it is not.
    pub why: Option<String>,
    /// Host memory the copies take.
    pub bytes: u64,
    pub ready: bool,
}

/// Bytes that the mount takes at most, training aside (each job says what it needs).
#[derive(Debug, Clone, Serialize)]
pub struct MemoryFacts {
    pub host: HostMemoryFacts,
    pub gpu: GpuMemoryFacts,
}

#[derive(Debug, Clone, Serialize)]
pub struct HostMemoryFacts {
    /// Of our own; an engine's are its own.
    pub weights: u64,
    pub view: u64,
    /// Changed blocks on their way to the log.
    pub staging: u64,
    /// What a commit makes of them before it is written.
    pub encoding: u64,
    /// Hashes of blocks: as the view has them, and as the newest commit has.
    pub hashes: u64,
    /// Buffers of copies from a GPU.
    pub buffers: u64,
}

/// Over all GPUs; the driver's own share of a process comes on top.
#[derive(Debug, Clone, Serialize)]
pub struct GpuMemoryFacts {
    pub weights: u64,
    pub buffers: u64,
}

impl MemoryFacts {
    fn host_line(&self) -> String {
        let h = &self.host;
        let total = h.weights + h.view + h.staging + h.encoding + h.hashes + h.buffers;
        format!(
            "{total} at most (weights {}, view {}, staging {}, encoding {}, hashes {}, buffers {})",
            h.weights, h.view, h.staging, h.encoding, h.hashes, h.buffers
        )
    }

    fn gpu_line(&self) -> String {
        let g = &self.gpu;
        format!("{} at most (weights {}, buffers {})", g.weights + g.buffers, g.weights, g.buffers)
    }
}

#[derive(Debug, Clone, Serialize)]
pub struct ReaderFacts {
    pub open: u64,
    pub pids: Vec<u32>,
    /// Seconds until the view moves even if nobody closes.
    pub hold_seconds_left: Option<u64>,
}

#[derive(Debug, Clone, Serialize)]
pub struct CommitFacts {
    pub id: u64,
    pub step: u64,
    /// RFC 3339, UTC.
    pub time: String,
}

/// What the engine was told over HTTP.
#[derive(Debug, Clone, Serialize)]
pub struct EngineFacts {
    pub url: String,
    /// The newest step it was told of, after which it computed everything anew.
    pub step: Option<u64>,
    /// Whether nothing is under way.
    pub settled: bool,
    pub error: Option<String>,
}

impl EngineFacts {
    fn line(&self) -> String {
        let step = self.step.map_or("nothing yet".into(), |step| format!("step {step}"));
        let more = if self.settled { "" } else { ", more under way" };
        let error = self.error.as_ref().map_or(String::new(), |e| format!(": {e}"));
        format!("{step}{more} at {}{error}", self.url)
    }
}

impl From<Synced> for EngineFacts {
    fn from(s: Synced) -> EngineFacts {
        EngineFacts { url: s.url, step: s.step, settled: s.settled, error: s.error }
    }
}

/// Losses that `status.json` has of a job, the newest; its record in `.weightfs/jobs/` has all.
const LOSSES: usize = 10_000;

/// A job as its record has it, and what follows from that.
#[derive(Debug, Clone, Serialize)]
pub struct JobFacts {
    #[serde(flatten)]
    pub record: JobRecord,
    /// Of the first step, and of the last.
    pub first_loss: Option<f32>,
    pub loss: Option<f32>,
    pub tokens_per_second: f64,
    pub eta_seconds: Option<f64>,
}

impl JobFacts {
    pub fn of(mut record: JobRecord) -> JobFacts {
        let first_loss = record.losses.first().copied();
        let older = record.losses.len().saturating_sub(LOSSES);
        record.losses.drain(..older);
        let eta = if record.has_ended() { None } else { record.eta() };
        JobFacts {
            first_loss,
            loss: record.losses.last().copied(),
            tokens_per_second: record.tokens_per_second(),
            eta_seconds: eta,
            record,
        }
    }

    fn line(&self) -> String {
        let r = &self.record;
        let state = format!("{:?}", r.state).to_lowercase();
        let mut line = format!(
            "{} {state} sample {}/{} step {}/{}",
            r.id,
            r.samples_done,
            r.samples.saturating_mul(r.config.epochs),
            r.steps_done,
            r.steps
        );
        if let (Some(first), Some(last)) = (self.first_loss, self.loss) {
            let _ = match r.has_ended() {
                true => write!(line, " loss {first:.4} to {last:.4}"),
                false => write!(line, " loss {last:.4}"),
            };
            let _ = write!(line, " {:.0} tokens/s", self.tokens_per_second);
        }
        if let Some(eta) = self.eta_seconds {
            let _ = write!(line, " eta {eta:.0} s");
        }
        let _ = write!(line, " memory {}", r.memory);
        if let Some(error) = &r.error {
            let _ = write!(line, ": {error}");
        }
        line
    }
}

#[derive(Debug, Clone, Serialize)]
pub struct CommandFacts {
    pub command: String,
    /// ok, or the name of the errno it failed with.
    pub result: String,
    /// What it did, or why it failed.
    pub says: String,
}

impl Status {
    /// The text of `status`.
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Values are kept to one line each: a reader splits at the first space and at newlines.
        let mut line = |key: &str, value: String| {
            let _ = writeln!(out, "{key} {}", value.replace(['\n', '\r'], " "));
        };
        let s = &self.source;
        line("state", self.state.into());
        line("model", self.model.clone());
        line("mount", self.mount_point.clone());
        line("pid", self.pid.to_string());
        line(
            "source",
            match s.pids.is_empty() {
                true => s.engine.clone(),
                false => format!("{} pid {}", s.engine, numbers(&s.pids)),
            },
        );
        if let Some(gone) = &s.gone {
            line("source_gone", gone.clone());
        }
        line("device", s.device.clone());
        line("bytes", s.bytes.to_string());
        line(
            "tensors",
            format!(
                "{} ({} live, {} opaque, {} only on disk, {} only live)",
                s.tensors, s.live, s.opaque, s.only_on_disk, s.only_live
            ),
        );
        line("step", self.step.to_string());
        line("view_step", self.view.step.to_string());
        line(
            "view",
            match &self.view.why {
                Some(why) => format!("{} ({why})", self.view.served),
                None => self.view.served.into(),
            },
        );
        line("view_bytes", self.view.bytes.to_string());
        line("view_ready", yes(self.view.ready).into());
        line("host_memory", self.memory.host_line());
        line("gpu_memory", self.memory.gpu_line());
        line(
            "readers",
            match self.readers.pids.is_empty() {
                true => self.readers.open.to_string(),
                false => format!("{} pid {}", self.readers.open, numbers(&self.readers.pids)),
            },
        );
        if let Some(left) = self.readers.hold_seconds_left {
            line("view_held", format!("{left} s more at most"));
        }
        line(
            "committed",
            match &self.committed {
                Some(c) => format!("{} step {} at {}", c.id, c.step, c.time),
                None => "none".into(),
            },
        );
        line("dirty", self.dirty.into());
        if let Some(engine) = &self.engine {
            line("engine_told", engine.line());
        }
        line("job", self.job.as_ref().map_or("none".into(), JobFacts::line));
        let ended = self.jobs.iter().filter(|j| j.record.has_ended()).max_by_key(|j| (j.record.ended_at, j.record.id));
        line("last_job", ended.map_or("none".into(), JobFacts::line));
        line("jobs_queued", self.jobs_queued.to_string());
        line(
            "last_command",
            match &self.last_command {
                Some(c) => format!("{}: {}: {}", c.command, c.result, c.says),
                None => "none".into(),
            },
        );
        line("last_error", self.last_error.clone().unwrap_or_else(|| "none".into()));
        out
    }

    /// The text of `status.json`.
    pub fn json(&self) -> String {
        // Plain structs of strings and numbers: serialising them cannot fail.
        serde_json::to_string_pretty(self).unwrap_or_else(|e| format!("{{\"error\": \"{e}\"}}")) + "\n"
    }
}

fn numbers(values: &[u32]) -> String {
    values.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

fn yes(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}
