//! config.json, read by key with errors that name the key.

use crate::model::read_small_text;
use serde_json::{Map, Value};
use std::path::Path;

/// Why a model cannot be trained; said before anything is touched.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refusal {
    #[error("{path}: {why}")]
    File { path: String, why: String },
    #[error("config.json: {0}")]
    Config(String),
    #[error("training does not know the family '{family}' (config.json, model_type): it knows {supported}")]
    Family { family: String, supported: String },
    #[error("family {0} does not train yet, since it has experts; it is mounted, read and committed like any other")]
    Experts(String),
    #[error("family {family} with {what} does not train yet: {supported}")]
    Option { family: &'static str, what: String, supported: &'static str },
    #[error("tensor '{name}': {why}")]
    Tensor { name: String, why: String },
}

/// The keys of config.json.
#[derive(Debug, Clone)]
pub struct Config(Map<String, Value>);

impl Config {
    pub fn read(directory: &Path) -> Result<Config, Refusal> {
        let path = directory.join("config.json");
        let file = |why: String| Refusal::File { path: path.display().to_string(), why };
        let text = read_small_text(&path).map_err(|e| file(e.to_string()))?;
        Config::parse(&text).map_err(|e| file(e.to_string()))
    }

    pub fn parse(text: &str) -> Result<Config, serde_json::Error> {
        Ok(Config(serde_json::from_str(text)?))
    }

    /// `None` when the key is absent or null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    pub fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    pub fn object(&self, key: &str) -> Option<Config> {
        Some(Config(self.get(key)?.as_object()?.clone()))
    }

    /// A count above zero, and not so large that a product of two of them and a sum of those would overflow.
    pub fn count(&self, key: &str) -> Result<Option<usize>, Refusal> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().filter(|&n| n > 0 && n <= i32::MAX as u64) {
            Some(n) => Ok(Some(n as usize)),
            None => Err(Refusal::Config(format!("{key} is {value}, which is not a count"))),
        }
    }

    pub fn required(&self, key: &str) -> Result<usize, Refusal> {
        self.count(key)?.ok_or_else(|| Refusal::Config(format!("it has no {key}")))
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>, Refusal> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64().filter(|x| x.is_finite()) {
            Some(x) => Ok(Some(x)),
            None => Err(Refusal::Config(format!("{key} is {value}, which is not a number"))),
        }
    }

    pub fn flag(&self, key: &str, default: bool) -> Result<bool, Refusal> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(Refusal::Config(format!("{key} is {other}, which is not true or false"))),
        }
    }
}
