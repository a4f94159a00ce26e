//! What a user chooses about commits: when to fold, how many to keep, how much memory to stage in.

use std::path::PathBuf;
use std::str::FromStr;

/// When the weights files are brought up to the log: `always`, `never` (until `fold`), or `every:N` commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FoldPolicy {
    #[default]
    Always,
    Never,
    Every(u64),
}

/// How many of the newest commits can be read and rolled back to: `all` or a number from 1 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Keep {
    #[default]
    All,
    Newest(u64),
}

#[derive(Debug, Clone)]
pub struct Options {
    pub fold: FoldPolicy,
    pub keep: Keep,
    /// Bytes of changed blocks held in memory; with more, the weights are held at their step until the log is written.
    pub staging_memory: u64,
    /// Told to whoever finds the directory taken.
    pub mount_point: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Options {
        Options { fold: FoldPolicy::Always, keep: Keep::All, staging_memory: 4 << 30, mount_point: None }
    }
}

impl FromStr for FoldPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<FoldPolicy, String> {
        match text {
            "always" => Ok(FoldPolicy::Always),
            "never" => Ok(FoldPolicy::Never),
            _ => match text.strip_prefix("every:").and_then(|n| n.parse().ok()) {
                Some(n) if n > 0 => Ok(FoldPolicy::Every(n)),
                _ => Err(format!("'{text}' is not a fold policy: write always, never or every:N")),
            },
        }
    }
}

impl FromStr for Keep {
    type Err = String;

    fn from_str(text: &str) -> Result<Keep, String> {
        match (text, text.parse()) {
            ("all", _) => Ok(Keep::All),
            (_, Ok(n)) if n > 0 => Ok(Keep::Newest(n)),
            _ => Err(format!("'{text}' is not a number of commits to keep: write all, or a number from 1 on")),
        }
    }
}
