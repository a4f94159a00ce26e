//! Another engine behind the same mount: the one before has ended, or has published its weights anew.

use super::Mounted;
use crate::fs::{FsError, job_file};
use crate::image::ShardBytes;
use crate::source::{ManifestId, Place, Source, SourceError};
use rustix::io::Errno;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Mounted {
    /// The weights of the manifest that `writer` calls `path`, or of those that were mounted, from here on.
    pub(super) fn attach(&self, path: Option<&str>, writer: u32) -> Result<String, FsError> {
        let source = self.image.source();
        if source.is_own() {
            return Err(FsError::new(Errno::INVAL, "the weights are weightfs's own: there is no engine to attach to"));
        }
        let mounted: Vec<PathBuf> = source.engines.iter().map(|e| e.manifest.clone()).collect();
        let paths = match path {
            None => mounted,
            Some(_) if mounted.len() > 1 => {
                let why = format!(
                    "the model is on {} ranks: let them publish under the same paths as before, and write `attach` alone",
                    mounted.len()
                );
                return Err(FsError::new(Errno::INVAL, why));
            }
            Some(path) => vec![job_file::path_of(path, writer)?],
        };
        self.attach_to(&paths)
    }

    /// Called a few times a second while the engine is gone: attaches to the manifest that another one has put in the
    /// place of its own.
    pub(super) fn attach_successor(&self) {
        let source = self.image.source();
        let paths: Vec<PathBuf> = source.engines.iter().map(|e| e.manifest.clone()).collect();
        let now: Option<Vec<ManifestId>> = paths.iter().map(|p| ManifestId::of_path(p)).collect();
        let Some(now) = now.filter(|now| !now.is_empty() && *now != source.manifest_ids()) else { return };
        if self.facts.lock().refused == now {
            return;
        }
        // A command that runs meanwhile may hold the weights; the next look comes soon.
        let Some(_turn) = self.commanding.try_lock() else { return };
        match self.attach_to(&paths) {
            Ok(says) => log::info!("{says}"),
            // It may be written still, or its engine may have died as well.
            Err(e) if e.errno == Errno::BUSY => {}
            Err(e) => {
                log::error!("the new manifest is not used: {e}");
                let mut facts = self.facts.lock();
                facts.refused = now;
                facts.last_error = Some(e.message);
                drop(facts);
                self.changed();
            }
        }
    }

    /// `commanding` is held.
    fn attach_to(&self, paths: &[PathBuf]) -> Result<String, FsError> {
        self.no_jobs("attach")?;
        if self.frozen.lock().is_some() {
            return Err(FsError::new(Errno::BUSY, "the weights are frozen: `thaw` first"));
        }
        let before = self.image.source();
        let next = Source::from_manifests(&self.directory, paths, !self.read_only).map_err(refused)?;
        same_tensors(&before, &next, &paths[0])?;
        let processes = |source: &Source| source.engines.iter().map(|e| e.identity()).collect::<Vec<_>>();
        let known = next.engines.iter().all(|e| e.pid.is_some());
        let another = self.facts.lock().gone.is_some() || (known && processes(&before) != processes(&next));
        {
            let _turn = self.moving.lock();
            self.image.attach(Arc::new(next));
            let mut facts = self.facts.lock();
            facts.gone = None;
            facts.refused.clear();
        }
        self.image.check()?;
        if another {
            // It has loaded what was committed: moments of steps that went with the one before are not its own.
            let _ = self.noted(self.optimizer_as_committed());
        }
        self.facts.lock().dirty = "yes";
        // With a view readers see its weights as they see a step: with the next open.
        if self.view.is_none() {
            self.weights_moved(self.step.load(Ordering::Acquire));
        }
        self.changed();
        let engine = self.image.source();
        let pids: Vec<String> = engine.engines.iter().filter_map(|e| e.pid).map(|pid| pid.to_string()).collect();
        Ok(format!("attached to {} (pid {})", paths[0].display(), pids.join(", ")))
    }
}

/// Whatever was live has to be live still, in the same dtype: what was counted on would silently come from disk.
fn same_tensors(before: &Source, next: &Source, path: &Path) -> Result<(), FsError> {
    let live = |source: &Source, name: &str| match source.places.get(name) {
        Some(Place::Live(segments)) => segments.first().map(|s| s.dtype),
        _ => None,
    };
    for name in before.places.keys() {
        let (was, is) = (live(before, name), live(next, name));
        if was.is_some() && was != is {
            let why = format!(
                "{} is of another model, or holds it in another form: it has not got tensor '{name}' as the one before had it; \
                 unmount, and mount with it",
                path.display()
            );
            return Err(FsError::new(Errno::INVAL, why));
        }
    }
    Ok(())
}

fn refused(e: SourceError) -> FsError {
    let errno = match &e {
        SourceError::Io { source, .. } => crate::fs::error::errno_of(source),
        SourceError::EngineGone { .. } => Errno::STALE,
        SourceError::NoMemory { .. } => Errno::NOMEM,
        SourceError::Untrusted { .. } => Errno::PERM,
        _ => Errno::INVAL,
    };
    FsError::new(errno, e.to_string())
}
