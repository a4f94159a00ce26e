//! Whether the weights are of one step. An update that was cut between its first write and its last leaves weights of no
//! step, until a rollback. An engine's weights outlive us: a file beside the commits tells the next weightfs.

use super::engine::Engine;
use crate::model::{STATE_DIR, StateFolder, open_regular, read_small_text};
use rustix::fs::OFlags;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};

/// In `.weightfs/`, while weights are written and from then on if that was cut.
const MARKER: &str = "updating";

const WHOLE: u8 = 0;
const CHANGING: u8 = 1;
const TORN: u8 = 2;

#[derive(Debug, Default)]
pub struct Updates {
    state: AtomicU8,
    marker: Option<Marker>,
}

#[derive(Debug)]
struct Marker {
    /// The model directory.
    model: PathBuf,
    /// Whose weights: those of another process are loaded from files, and whole.
    engines: String,
}

impl Updates {
    /// Of an engine's weights. Weights of our own need no marker: they are loaded from files each time.
    pub(super) fn of(model: &Path, engines: &[Engine]) -> Updates {
        let engines = engines.iter().map(Engine::identity).collect::<Vec<_>>().join("\n");
        let marker = Marker { model: model.to_owned(), engines };
        Updates { state: AtomicU8::new(WHOLE), marker: Some(marker) }
    }

    /// Whether some weightfs began to write these weights and has not come to the end, yet or ever.
    pub(super) fn is_marked(&self) -> bool {
        self.marker.as_ref().is_some_and(|m| m.read().is_ok_and(|text| text == m.engines))
    }

    /// Weights are about to be written. Nobody else reads or writes them.
    pub fn begin(&self) {
        self.state.store(CHANGING, Ordering::Release);
        if let Some(marker) = &self.marker
            && let Err(e) = marker.put()
        {
            let model = marker.model.display();
            log::warn!("{model}/{STATE_DIR}/{MARKER}: {e}: should this process be killed in a step, nobody will know");
        }
    }

    /// They are written, or as they were before (`whole`), or neither. Still nobody else reads or writes them.
    pub fn end(&self, whole: bool) {
        self.state.store(if whole { WHOLE } else { TORN }, Ordering::Release);
        if whole && let Some(marker) = &self.marker {
            // Without it, or on a disk that cannot be written any more: nothing to take away, or `put` has said it.
            let _ = marker.remove();
        }
    }

    /// Whether an update was cut. Known to anybody, at any time.
    pub fn are_torn(&self) -> bool {
        self.state.load(Ordering::Acquire) == TORN
    }

    /// Whether the weights are of one step. Asked by who holds them still: nothing is under way.
    pub fn are_whole(&self) -> bool {
        self.state.load(Ordering::Acquire) == WHOLE
    }
}

impl Marker {
    fn folder(&self) -> io::Result<StateFolder> {
        StateFolder::open(&self.model, STATE_DIR)
    }

    fn read(&self) -> io::Result<String> {
        read_small_text(&self.folder()?.path().join(MARKER))
    }

    /// Not synced: a machine that goes down takes the engine with it.
    fn put(&self) -> io::Result<()> {
        let (folder, mut options) = (self.folder()?, OpenOptions::new());
        options.create(true).write(true).truncate(true).mode(0o600);
        open_regular(&mut options, OFlags::NOFOLLOW, &folder.path().join(MARKER))?.write_all(self.engines.as_bytes())
    }

    fn remove(&self) -> io::Result<()> {
        std::fs::remove_file(self.folder()?.path().join(MARKER))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, mknodat};
    use std::sync::mpsc::channel;
    use std::time::Duration;

    #[test]
    fn a_pipe_in_the_place_of_the_marker_is_not_waited_for() {
        let model = tempfile::tempdir().unwrap();
        let state = model.path().join(STATE_DIR);
        std::fs::create_dir(&state).unwrap();
        let marker = Marker { model: model.path().into(), engines: "one".into() };
        marker.put().unwrap();
        assert_eq!(marker.read().unwrap(), "one");
        marker.remove().unwrap();
        mknodat(CWD, state.join(MARKER), FileType::Fifo, 0o600.into(), 0).unwrap();
        let (told, tells) = channel();
        std::thread::spawn(move || told.send((marker.read().is_err(), marker.put().is_err())));
        assert_eq!(tells.recv_timeout(Duration::from_secs(30)), Ok((true, true)));
    }
}
