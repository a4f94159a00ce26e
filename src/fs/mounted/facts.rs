//! The facts that `status` shows, gathered when it is opened.

use super::Mounted;
use crate::commit::CommitInfo;
use crate::fs::status::{
    CommitFacts, GpuMemoryFacts, HostMemoryFacts, JobFacts, MemoryFacts, ReaderFacts, SourceFacts, Status, ViewFacts,
};
use crate::memory::{BLOCK, Hash, WorkingMemory};
use crate::source::{Place, Source};
use crate::view::CopiedShards;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Jobs that `status.json` lists.
const JOBS: usize = 100;

impl Mounted {
    pub fn status(&self) -> Status {
        let source = self.image.source();
        let count = |f: fn(&Place) -> bool| source.places.values().filter(|p| f(p)).count() as u64;
        let readers = self.readers.lock();
        let (open, pids) = (readers.len() as u64, readers.pids());
        let held = self.view.as_ref().and_then(|_| readers.remaining(Instant::now(), || self.is_mapped()));
        drop(readers);
        // Whoever is about to freeze them has it locked, and may be waiting for an engine: `status` waits for nobody.
        let frozen = self.frozen.try_lock().is_some_and(|frozen| frozen.is_some());
        let newest = self.committer.as_ref().and_then(|c| c.newest());
        let facts = self.facts.lock();
        let (paused, running, jobs_queued, jobs) = self.training.jobs();
        let older = jobs.len().saturating_sub(JOBS);
        let state = match (&facts.gone, facts.doing) {
            (Some(_), _) => "failed",
            (None, Some(doing)) => doing,
            (None, None) if frozen => "frozen",
            (None, None) if paused => "paused",
            (None, None) if running.is_some() => "training",
            (None, None) => "idle",
        };
        let (served, why) = match (&self.view, self.passthrough.get()) {
            (None, _) => ("direct", self.why_direct.clone()),
            (Some(_), Some(Ok(()))) => ("passthrough", None),
            (Some(_), Some(Err(why))) => ("copied", Some(why.clone())),
            (Some(_), None) => ("copied", None),
        };
        Status {
            state,
            model: self.directory.path.display().to_string(),
            mount_point: self.mount_point.display().to_string(),
            pid: std::process::id(),
            source: SourceFacts {
                engine: source.engines.first().map_or("own".into(), |e| match e.name.as_str() {
                    "" => "engine".into(),
                    name => name.to_string(),
                }),
                pids: source.engines.iter().filter_map(|e| e.pid).collect(),
                device: source.devices().join(", "),
                bytes: self.directory.bytes(),
                tensors: source.places.len() as u64,
                live: count(|p| matches!(p, Place::Live(_))),
                opaque: count(|p| matches!(p, Place::Opaque(_))),
                only_on_disk: count(|p| matches!(p, Place::OnlyOnDisk)),
                only_live: source.only_live.len() as u64,
                gone: facts.gone.clone(),
            },
            step: self.step.load(Ordering::Acquire),
            view: ViewFacts {
                step: match self.view {
                    Some(_) => self.view_step.load(Ordering::Acquire),
                    None => self.step.load(Ordering::Acquire),
                },
                served,
                why,
                bytes: self.view.as_ref().map_or(0, CopiedShards::bytes),
                ready: self.view.is_none() || self.view_ready.load(Ordering::Acquire),
            },
            memory: self.memory(&source),
            readers: ReaderFacts { open, pids, hold_seconds_left: held.map(|d| d.as_secs()) },
            committed: newest.as_ref().map(commit_facts),
            dirty: facts.dirty,
            engine: self.engine.get().map(|engine| engine.synced().into()),
            job: running.map(JobFacts::of),
            jobs_queued,
            jobs: jobs.into_iter().skip(older).map(JobFacts::of).collect(),
            last_command: facts.last_command.clone(),
            last_error: facts.last_error.clone(),
        }
    }
}

impl Mounted {
    fn memory(&self, source: &Source) -> MemoryFacts {
        let own = |on_gpu: bool| match source.is_own() {
            true => source.memories.iter().filter(|m| m.device().is_some() == on_gpu).map(|m| m.bytes()).sum(),
            false => 0,
        };
        let working: Vec<WorkingMemory> = source.accelerators().iter().map(|a| a.working_memory()).collect();
        let view = self.view.as_ref().map_or(0, CopiedShards::bytes);
        let blocks: u64 = self.directory.shards.iter().map(|s| s.bytes().div_ceil(BLOCK as u64)).sum();
        let tables = self.view.is_some() as u64 + self.committer.is_some() as u64;
        MemoryFacts {
            host: HostMemoryFacts {
                weights: own(false),
                view,
                staging: self.committer.as_ref().map_or(0, |c| c.staging_bytes()),
                encoding: self.committer.as_ref().map_or(0, |c| c.encoding_bytes()),
                hashes: tables * blocks * size_of::<Hash>() as u64,
                buffers: working.iter().map(|w| w.host).sum(),
            },
            gpu: GpuMemoryFacts { weights: own(true), buffers: working.iter().map(|w| w.device).sum() },
        }
    }
}

fn commit_facts(info: &CommitInfo) -> CommitFacts {
    CommitFacts { id: info.id, step: info.step, time: info.time_text() }
}
