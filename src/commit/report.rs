//! What the commands tell: about a commit, a fold, a recovery, a check.

use super::record::{Facts, Record};
use serde::Serialize;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// One line of the history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CommitInfo {
    pub id: u64,
    /// Nanoseconds since the Unix epoch.
    pub time_ns: u64,
    pub step: u64,
    pub message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollback_to: Option<u64>,
    pub changed_elements: u64,
    pub changed_bytes: u64,
    pub changed_blocks: u64,
    pub changed_tensors: u64,
    /// Size of its record, its own optimizer state included.
    pub logged_bytes: u64,
    /// There is an optimizer state as of this commit.
    pub optimizer: bool,
    /// The weights files hold it (or a later one).
    pub folded: bool,
}

impl CommitInfo {
    pub(super) fn of(record: &Record, folded: u64) -> CommitInfo {
        let Facts { id, time_ns, step, message, rollback_to, changed_elements, changed_bytes, changed_blocks, .. } =
            record.facts().clone();
        CommitInfo {
            id,
            time_ns,
            step,
            message,
            rollback_to,
            changed_elements,
            changed_bytes,
            changed_blocks,
            changed_tensors: record.head.weight_map.len() as u64,
            logged_bytes: record.facts().logged_bytes(),
            optimizer: record.facts().optimizer.is_some(),
            folded: id <= folded,
        }
    }
}

/// What became of the weights files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FoldOutcome {
    /// They hold the newest commit; so many blocks and bytes were written for that now.
    Folded { blocks: u64, bytes: u64 },
    /// The policy says not yet.
    ByPolicy,
    /// They hold an earlier commit, and the log the rest, until a fold works: says why.
    Deferred { why: String },
}

#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct PhaseTimes {
    pub find: Duration,
    pub stage: Duration,
    pub log: Duration,
    pub fold: Duration,
    /// How long the step was held.
    pub held: Duration,
}

#[derive(Debug, Clone, Serialize)]
pub struct CommitReport {
    /// `None` when nothing had changed, and so nothing was written.
    pub commit: Option<CommitInfo>,
    pub fold: FoldOutcome,
    pub times: PhaseTimes,
}

impl fmt::Display for CommitReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match &self.commit {
            None => write!(f, "nothing changed since the last commit")?,
            Some(c) => write!(
                f,
                "commit {}: {} changed elements in {} blocks, {} bytes logged",
                c.id, c.changed_elements, c.changed_blocks, c.logged_bytes
            )?,
        }
        match &self.fold {
            FoldOutcome::Folded { bytes: 0, .. } => Ok(()),
            FoldOutcome::Folded { bytes, .. } => write!(f, ", {bytes} bytes written to the weights files"),
            FoldOutcome::ByPolicy if self.commit.is_none() => Ok(()),
            FoldOutcome::ByPolicy => write!(f, ", not folded yet"),
            FoldOutcome::Deferred { why } => write!(f, ", the weights files follow later: {why}"),
        }?;
        if self.commit.is_none() {
            return Ok(());
        }
        let PhaseTimes { find, stage, log, fold, held } = self.times;
        f.write_str("; ")?;
        // Nobody's, when a rollback without live weights.
        if !held.is_zero() {
            write!(f, "weights held for {}, ", Seconds(held))?;
        }
        write!(f, "durable after {}", Seconds(find + stage + log))?;
        match &self.fold {
            FoldOutcome::Folded { bytes: 1.., .. } => {
                write!(f, ", folded after {}", Seconds(find + stage + log + fold))
            }
            _ => Ok(()),
        }
    }
}

/// A time for a person: three figures at most.
struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.0.as_secs_f64() {
            s if s < 0.1 => write!(f, "{:.1} ms", s * 1e3),
            s if s < 10.0 => write!(f, "{s:.2} s"),
            s => write!(f, "{s:.0} s"),
        }
    }
}

/// What opening the directory found and did. Displays as one line, or as nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Recovery {
    /// Leftovers of a commit that had not reached the log.
    pub removed_unfinished: bool,
    /// Commits in the log that the weights files did not hold yet, and what became of that.
    pub pending: u64,
    pub newest: u64,
    pub fold: Option<FoldOutcome>,
}

impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let newest = self.newest;
        match &self.fold {
            Some(FoldOutcome::Folded { blocks, .. }) => {
                write!(f, "recovered commit {newest} from the log: {blocks} blocks written to the weights files")
            }
            Some(FoldOutcome::Deferred { why }) => {
                write!(f, "commit {newest} is safe in the log, and the weights files follow later: {why}")
            }
            _ if self.removed_unfinished && newest == 0 => {
                write!(f, "removed an unfinished commit; there is none before it")
            }
            _ if self.removed_unfinished => write!(f, "removed an unfinished commit; commit {newest} stands"),
            _ => Ok(()),
        }
    }
}

/// What a check compared, and what did not fit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    pub blocks: u64,
    pub tensors: u64,
    /// One sentence each.
    pub wrong: Vec<String>,
}

/// Where a commit is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    Finding,
    Staging,
    Logging,
    Folding,
}

/// A phase, and how many of how many bytes of it are done.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    pub phase: Phase,
    pub done: u64,
    pub total: u64,
}

impl CommitInfo {
    pub fn time(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_nanos(self.time_ns)
    }

    /// RFC 3339 in UTC, to the second.
    pub fn time_text(&self) -> String {
        let seconds = (self.time_ns / 1_000_000_000).try_into().unwrap_or(i64::MAX);
        // Fails beyond the year 9999, where no clock is.
        jiff::Timestamp::from_second(seconds).map_or_else(|_| "?".into(), |t| t.to_string())
    }
}
