//! What a user chooses about commits, on every command that makes them.

use crate::commit::{FoldPolicy, Keep, Options};
use clap::Args;

#[derive(Args, Clone)]
pub struct PolicyArguments {
    /// When the weights files follow the log
    #[arg(long, value_name = "always|never|every:N", default_value = "always")]
    fold: FoldPolicy,
    /// How many commits can be read and rolled back to
    #[arg(long, value_name = "all|N", default_value = "all")]
    keep: Keep,
    /// Changed blocks held in memory at most; with more, weights are held still until the log is written
    #[arg(long, value_name = "BYTES", default_value = "4GiB", value_parser = bytes)]
    staging_memory: u64,
}

impl PolicyArguments {
    pub fn options(&self) -> Options {
        Options { fold: self.fold, keep: self.keep, staging_memory: self.staging_memory, mount_point: None }
    }
}

/// A number of bytes: 500000, 512MiB, 4GiB.
pub fn bytes(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit = match &text[split..] {
        "" => 1,
        "KiB" | "K" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        other => return Err(format!("'{other}' is no unit: use KiB, MiB or GiB")),
    };
    let number: Option<u64> = text[..split].parse().ok();
    number.and_then(|n| n.checked_mul(unit)).ok_or_else(|| format!("'{text}' is not a number of bytes"))
}
