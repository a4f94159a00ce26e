//! `--engine-url`: what the engine is told over HTTP when its weights have changed.

use crate::source::{EngineHttpOptions, When};
use clap::{Args, ValueEnum};
use std::time::Duration;

#[derive(Args)]
pub struct EngineArguments {
    /// The engine's HTTP server: after its weights have changed it is made to forget what it cached, and told the step.
    /// WEIGHTFS_ENGINE_KEY is sent as its API key
    #[arg(long, value_name = "URL")]
    engine_url: Option<String>,
    /// When it is told: after every step, after a job (and a rollback), or never
    #[arg(long, value_enum, default_value = "job", requires = "engine_url")]
    engine_sync: Sync,
    /// Its requests stand still while a step is written, so that no token is computed from half a step
    #[arg(long, requires = "engine_url")]
    engine_pause: bool,
    /// Seconds that an answer may take. An engine that does not stand still in that time is not asked again before the
    /// job has ended
    #[arg(long, value_name = "SECONDS", default_value = "5", requires = "engine_url")]
    engine_timeout: f64,
}

#[derive(Clone, Copy, ValueEnum)]
enum Sync {
    Step,
    Job,
    None,
}

impl EngineArguments {
    pub fn options(&self) -> Option<EngineHttpOptions> {
        Some(EngineHttpOptions {
            url: self.engine_url.clone()?,
            when: match self.engine_sync {
                Sync::Step => When::Step,
                Sync::Job => When::Job,
                Sync::None => When::Never,
            },
            pause: self.engine_pause,
            patience: patience(self.engine_timeout),
            key: std::env::var("WEIGHTFS_ENGINE_KEY").ok().filter(|key| !key.is_empty()),
        })
    }
}

/// What is no time at all (negative, not a number) is the shortest; years are no different from days.
fn patience(seconds: f64) -> Duration {
    let seconds = if seconds.is_nan() { 0.0 } else { seconds };
    Duration::from_secs_f64(seconds.clamp(0.001, 86400.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_number_is_given_there_is_a_time() {
        let shortest = Duration::from_millis(1);
        for (seconds, time) in [
            (f64::NAN, shortest),
            (-f64::NAN, shortest),
            (f64::NEG_INFINITY, shortest),
            (0.0, shortest),
            (2.5, Duration::from_millis(2500)),
            (f64::INFINITY, Duration::from_secs(86400)),
        ] {
            assert_eq!(patience(seconds), time, "{seconds}");
        }
    }
}
