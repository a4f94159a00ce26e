//! Who has weights open, and whether that holds the view still.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// One open weights file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reader {
    pub shard: usize,
    pub pid: u32,
    pub since: Instant,
}

/// All open weights files, by handle.
#[derive(Debug)]
pub struct Readers {
    open: BTreeMap<u64, Reader>,
    /// Those that somebody has closed a descriptor of, and that nobody has waited for yet.
    closing: BTreeSet<u64>,
    newest: Option<Instant>,
    hold: Duration,
}

/// What an open means for the view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// Nobody holds the view: bring it to the newest step first.
    MoveFirst,
    /// Others are reading: join them at the step they see.
    Join,
}

impl Readers {
    /// `hold`: how long after the newest open the view stays still for those who have it open.
    pub fn new(hold: Duration) -> Readers {
        Readers { open: BTreeMap::new(), closing: BTreeSet::new(), newest: None, hold }
    }

    /// Whether somebody holds the view at `now`. `mapped` is asked when no file is open: mappings may outlive files.
    pub fn holding(&self, now: Instant, mapped: impl FnOnce() -> bool) -> bool {
        self.newest.is_some_and(|n| now.duration_since(n) < self.hold) && (!self.open.is_empty() || mapped())
    }

    /// What an open at `now` must do before it counts.
    pub fn before_open(&self, now: Instant, mapped: impl FnOnce() -> bool) -> Opened {
        if self.holding(now, mapped) { Opened::Join } else { Opened::MoveFirst }
    }

    pub fn add(&mut self, handle: u64, reader: Reader) {
        self.newest = Some(reader.since);
        self.open.insert(handle, reader);
    }

    /// A descriptor of `handle` is being closed; unless there are more of them, it is removed soon.
    pub fn closing(&mut self, handle: u64) {
        if self.open.contains_key(&handle) {
            self.closing.insert(handle);
        }
    }

    /// Whether nothing but handles that may be removed at any moment is left.
    pub fn all_closing(&self) -> bool {
        !self.closing.is_empty() && self.closing.len() == self.open.len()
    }

    /// Those that are still here have other descriptors (of a child, a duplicate): they are as open as the rest.
    pub fn none_closing(&mut self) {
        self.closing.clear();
    }

    /// Forgets `handle`; true when it was the last one.
    pub fn remove(&mut self, handle: u64) -> bool {
        self.closing.remove(&handle);
        self.open.remove(&handle).is_some() && self.open.is_empty()
    }

    pub fn len(&self) -> usize {
        self.open.len()
    }

    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Processes that have weights open, each once.
    pub fn pids(&self) -> Vec<u32> {
        let mut pids: Vec<u32> = self.open.values().map(|r| r.pid).collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// How much longer the view stays still if nobody else opens it.
    pub fn remaining(&self, now: Instant, mapped: impl FnOnce() -> bool) -> Option<Duration> {
        let newest = self.newest.filter(|_| self.holding(now, mapped))?;
        Some(self.hold.saturating_sub(now.duration_since(newest)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_view_is_held_from_the_first_open_to_the_last_close_or_the_end_of_the_hold() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let reader = |s| Reader { shard: 0, pid: 7, since: at(s) };
        let mut readers = Readers::new(Duration::from_secs(600));
        assert_eq!(readers.before_open(at(0), || false), Opened::MoveFirst);
        readers.add(1, reader(0));
        assert_eq!(readers.before_open(at(10), || false), Opened::Join);
        readers.add(2, reader(10));
        assert!(!readers.remove(1));
        assert!(readers.holding(at(609), || false));
        assert_eq!(readers.remaining(at(600), || false), Some(Duration::from_secs(10)));
        // The reader that maps the file for days no longer keeps everybody in the past.
        assert_eq!(readers.before_open(at(610), || false), Opened::MoveFirst);
        assert!(readers.remove(2));
        assert!(!readers.remove(2));
        assert!(!readers.holding(at(11), || false));
        // A mapping that is left holds it as an open file does.
        assert!(readers.holding(at(609), || true));
        assert!(!readers.holding(at(610), || true));
    }

    #[test]
    fn a_handle_is_waited_for_once_after_each_close() {
        let mut readers = Readers::new(Duration::from_secs(600));
        let reader = Reader { shard: 0, pid: 7, since: Instant::now() };
        readers.closing(1);
        assert!(!readers.all_closing(), "it was never open");
        readers.add(1, reader.clone());
        readers.add(2, reader);
        readers.closing(1);
        assert!(!readers.all_closing(), "the other holds the view");
        readers.closing(2);
        assert!(readers.all_closing());
        readers.none_closing();
        assert!(!readers.all_closing() && !readers.is_empty());
        readers.closing(1);
        assert!(!readers.remove(1) && !readers.all_closing());
        readers.closing(2);
        assert!(readers.all_closing() && readers.remove(2) && !readers.all_closing());
    }
}
