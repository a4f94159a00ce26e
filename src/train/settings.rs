//! How a job trains: the keys of `config` in a job, their defaults and their limits.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Optimizer {
    /// A factor for each channel, from a projection to `rank`.
    Apollo,
    /// One factor for each tensor, from a projection to rank 1.
    ApolloMini,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rounding {
    Stochastic,
    Nearest,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    pub optimizer: Optimizer,
    pub lr: f64,
    /// 64 for apollo, 1 for apollo-mini. A tensor with a dimension below it gets plain Adam.
    pub rank: Option<usize>,
    /// Factor on the update (the square root of what apollo-torch calls scale). By default `sqrt(smaller
    /// dimension / rank)` for apollo, which makes up for the projection, and `sqrt(128)` for apollo-mini.
    pub scale: Option<f64>,
    pub betas: [f64; 2],
    pub eps: f64,
    pub weight_decay: f64,
    /// Steps over which lr rises from near zero, linearly.
    pub warmup_steps: u64,
    /// Steps between new projections.
    pub proj_refresh: u64,
    /// By how much an update's norm may grow from step to step; null or 0 for no limit.
    pub norm_growth_limit: Option<f64>,
    pub rounding: Rounding,
    /// Times that the samples are gone through.
    pub epochs: u64,
    /// Longest sample in tokens; the model's own limit by default. A longer one is an error, not cut.
    pub max_length: Option<usize>,
    /// Samples are packed into one step until it has this many tokens; 1 makes every sample a step.
    pub step_tokens: usize,
    /// Names of tensors that train, `*` for any run of characters; all by default.
    pub trainable: Option<Vec<String>>,
    /// A step whose loss is below this is not taken: an update has the same length however small its gradient.
    pub min_loss: f64,
    /// Of projections and rounding.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            optimizer: Optimizer::Apollo,
            lr: 1e-5,
            rank: None,
            scale: None,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.01,
            warmup_steps: 0,
            proj_refresh: 200,
            norm_growth_limit: Some(1.01),
            rounding: Rounding::Stochastic,
            epochs: 1,
            max_length: None,
            step_tokens: 1024,
            trainable: None,
            min_loss: 0.0,
            seed: 0,
        }
    }
}

impl Settings {
    /// Says what is wrong with a value, by its key.
    pub fn check(&self) -> Result<(), String> {
        // The update is computed in f32: what is nothing or infinite there makes weights that are no numbers.
        let positive = |key: &str, x: f64| match x > 0.0 && (x as f32).is_normal() {
            true => Ok(()),
            false => Err(format!("config.{key} is {x}: it must be above 0, and a number in f32")),
        };
        positive("lr", self.lr)?;
        positive("eps", self.eps)?;
        if let Some(scale) = self.scale {
            positive("scale", scale)?;
            positive("lr times scale", self.lr * scale)?;
        }
        for beta in self.betas {
            if !(0.0..1.0).contains(&beta) {
                return Err(format!("config.betas has {beta}: each must be from 0 to below 1"));
            }
        }
        let not_negative = |key: &str, x: f64| match x >= 0.0 && (x as f32).is_finite() {
            true => Ok(()),
            false => Err(format!("config.{key} is {x}: it must be 0 or more")),
        };
        not_negative("weight_decay", self.weight_decay)?;
        not_negative("min_loss", self.min_loss)?;
        if self.lr * self.weight_decay >= 1.0 {
            return Err(format!(
                "config.lr {} times weight_decay {} wipes the weights out",
                self.lr, self.weight_decay
            ));
        }
        if let Some(limit) = self.norm_growth_limit.filter(|&l| l != 0.0)
            && !(limit >= 1.0 && (limit as f32).is_finite())
        {
            return Err(format!(
                "config.norm_growth_limit is {limit}: it must be 1 or more and a number in f32, or 0 for none"
            ));
        }
        let counts = [("proj_refresh", self.proj_refresh), ("epochs", self.epochs)];
        let counts = counts.into_iter().chain([
            ("step_tokens", self.step_tokens as u64),
            ("rank", self.rank.unwrap_or(1) as u64),
            ("max_length", self.max_length.unwrap_or(1) as u64),
        ]);
        for (key, n) in counts {
            if n == 0 {
                return Err(format!("config.{key} is 0: it must be 1 or more"));
            }
        }
        if self.optimizer == Optimizer::ApolloMini && self.rank.is_some_and(|r| r != 1) {
            return Err("config.rank: apollo-mini projects to rank 1; take optimizer apollo for more".into());
        }
        Ok(())
    }

    pub fn rank(&self) -> usize {
        match self.optimizer {
            Optimizer::Apollo => self.rank.unwrap_or(64),
            Optimizer::ApolloMini => 1,
        }
    }

    /// The factor on updates of an m x n matrix.
    pub fn scale(&self, m: usize, n: usize) -> f64 {
        self.scale.unwrap_or(match self.optimizer {
            Optimizer::Apollo => (m.min(n) as f64 / self.rank() as f64).sqrt(),
            Optimizer::ApolloMini => 128f64.sqrt(),
        })
    }

    /// The rate of a job's step number `step`, counted from 0.
    pub fn rate(&self, step: u64) -> f64 {
        match step < self.warmup_steps {
            true => self.lr * (step + 1) as f64 / self.warmup_steps as f64,
            false => self.lr,
        }
    }

    pub fn trains(&self, name: &str) -> bool {
        self.trainable.as_ref().is_none_or(|patterns| patterns.iter().any(|p| matches(p, name)))
    }
}

/// Does `pattern` match all of `name`, with `*` for any run of characters?
pub fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or("");
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let mut last = None;
    for part in parts {
        if let Some(between) = last.replace(part) {
            let Some(at) = rest.find(between) else { return false };
            rest = &rest[at + between.len()..];
        }
    }
    match last {
        Some(end) => rest.ends_with(end),
        None => rest.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, want) in [
            ("*", "anything", true),
            ("model.norm.weight", "model.norm.weight", true),
            ("model.norm", "model.norm.weight", false),
            ("*.mlp.*", "model.layers.0.mlp.up_proj.weight", true),
            ("*.mlp.*.weight", "model.layers.0.mlp.up_proj.bias", false),
            ("model.layers.1.*", "model.layers.10.x", false),
            ("*ab*ab", "ab", false),
            ("*ab*ab", "xabyab", true),
            ("a**b", "ab", true),
        ] {
            assert_eq!(matches(pattern, name), want, "{pattern} {name}");
        }
    }

    #[test]
    fn values_that_cannot_train_are_named() {
        let with =
            |json: &str| serde_json::from_str::<Settings>(json).map_err(|e| e.to_string()).and_then(|s| s.check());
        assert_eq!(with("{}"), Ok(()));
        for (json, word) in [
            (r#"{"lr": 0}"#, "lr"),
            (r#"{"lr": -1e-5}"#, "lr"),
            (r#"{"rank": 0}"#, "rank"),
            (r#"{"betas": [0.9, 1.0]}"#, "betas"),
            (r#"{"norm_growth_limit": 0.5}"#, "norm_growth_limit"),
            (r#"{"epochs": 0}"#, "epochs"),
            (r#"{"learning_rate": 1}"#, "learning_rate"),
            (r#"{"optimizer": "adamw"}"#, "adamw"),
            (r#"{"optimizer": "apollo-mini", "rank": 4}"#, "rank"),
            (r#"{"lr": 10, "weight_decay": 0.5}"#, "weight_decay"),
            // Numbers in f64 only.
            (r#"{"norm_growth_limit": 1e39}"#, "norm_growth_limit"),
            (r#"{"eps": 1e-46}"#, "eps"),
            (r#"{"lr": 1e30, "scale": 1e30, "weight_decay": 0}"#, "lr times scale"),
        ] {
            let error = with(json).expect_err(json);
            assert!(error.contains(word), "{json}: {error}");
        }
        let nan = Settings { lr: f64::NAN, ..Settings::default() };
        assert!(nan.check().is_err());
    }

    #[test]
    fn the_rate_warms_up_linearly() {
        let s = Settings { lr: 1.0, warmup_steps: 4, ..Settings::default() };
        assert_eq!((0..6).map(|i| s.rate(i)).collect::<Vec<_>>(), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]);
    }
}
