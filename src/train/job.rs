//! A job: samples and settings, read from JSON or JSON Lines and checked whole before anything is touched.

use super::apollo::{fits, form, moment_elements};
use super::families::Architecture;
use super::json;
use super::pack::{Batch, Tokens};
use super::sample::{Sample, TextModel, check};
use super::settings::{Optimizer, Settings};
use super::state::{OptimizerState, TensorState};
use super::weights::{Weights, device_of};
use parking_lot::Mutex;
use serde_json::{Map, Value};
use std::collections::HashSet;

/// Why a job was refused, in a sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadJob(pub String);

/// A job as it was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub samples: Vec<Sample>,
    pub settings: Settings,
}

impl Job {
    /// Reads `{"samples": […], "config": {…}}`; or JSON Lines: a sample a line, the first line may be `{"config": {…}}`.
    pub fn parse(text: &str) -> Result<Job, BadJob> {
        let mut lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let Some((_, first)) = lines.next() else { return Err(BadJob("the job is empty".into())) };
        // One value a line, if the first line is one by itself and is not a whole job.
        let whole = match serde_json::from_str::<Value>(first) {
            Ok(value) => value.get("samples").is_some(),
            Err(_) => true,
        };
        let values = if whole {
            return Job::whole(json::parse(text).map_err(|e| bad_json(&e, 0))?);
        } else {
            let numbered = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
            let parse = |(i, line): (usize, &str)| Ok((i + 1, json::parse(line).map_err(|e| bad_json(&e, i))?));
            numbered.map(parse).collect::<Result<Vec<_>, BadJob>>()?
        };
        let mut settings = Settings::default();
        let mut samples = Vec::new();
        for (line, value) in values {
            let at = |why: String| BadJob(format!("line {line}: {why}"));
            match value.get("config") {
                Some(config) if samples.is_empty() && value.as_object().is_some_and(|o| o.len() == 1) => {
                    settings = read_settings(config.clone()).map_err(at)?;
                }
                Some(_) => return Err(at("config stands alone, in the first line".into())),
                None => samples.push(Sample::parse(&value).map_err(at)?),
            }
        }
        Job { samples, settings }.checked()
    }

    fn whole(value: Value) -> Result<Job, BadJob> {
        let Value::Object(mut object) = value else { return Err(BadJob("a job is an object with samples".into())) };
        let settings = match object.remove("config") {
            Some(config) => read_settings(config).map_err(BadJob)?,
            None => Settings::default(),
        };
        let samples = match object.remove("samples") {
            Some(Value::Array(samples)) => samples,
            Some(other) => return Err(BadJob(format!("samples is {}, not a list", kind(&other)))),
            None => return Err(BadJob(unknown(&object, "the job has no samples"))),
        };
        if !object.is_empty() {
            return Err(BadJob(unknown(&object, "")));
        }
        let parse = |(i, s): (usize, &Value)| Sample::parse(s).map_err(|e| BadJob(format!("sample {}: {e}", i + 1)));
        Job { samples: samples.iter().enumerate().map(parse).collect::<Result<_, _>>()?, settings }.checked()
    }

    fn checked(self) -> Result<Job, BadJob> {
        if self.samples.is_empty() {
            return Err(BadJob("the job has no samples".into()));
        }
        self.settings.check().map_err(BadJob)?;
        Ok(self)
    }

    /// Makes ids of every sample and checks them, the settings and the memory it takes against the model. What comes
    /// back will run unless numbers or memory fail.
    pub fn prepare(
        self,
        text: &TextModel,
        model: &Architecture,
        weights: &dyn Weights,
        state: &Mutex<OptimizerState>,
    ) -> Result<Plan, BadJob> {
        let settings = self.settings;
        let trained: Vec<(&str, Vec<u64>)> = model.tensors().into_iter().filter(|(n, _)| settings.trains(n)).collect();
        if let Some(patterns) = &settings.trainable {
            for pattern in patterns {
                if !model.tensors().iter().any(|(name, _)| super::settings::matches(pattern, name)) {
                    return Err(BadJob(format!("config.trainable: no tensor of the model matches '{pattern}'")));
                }
            }
        }
        if trained.is_empty() {
            return Err(BadJob("config.trainable leaves nothing to train".into()));
        }
        let rank = settings.rank();
        let widest = model.tensors().iter().filter(|(_, s)| s.len() == 2).map(|(_, s)| s[0].min(s[1])).max();
        let widest = widest.unwrap_or(0) as usize;
        if settings.optimizer == Optimizer::Apollo && settings.rank.is_some() && rank > widest {
            return Err(BadJob(format!(
                "config.rank is {rank}, above the smaller dimension of every matrix of this model: it can be {widest} at most"
            )));
        }
        let longest = settings.max_length.unwrap_or(model.max_positions).min(model.max_positions);
        let tokens = |(i, sample): (usize, &Sample)| {
            let tokens = text.tokens(sample).and_then(|t| check(&t, model.vocabulary, longest).map(|()| t));
            tokens.map_err(|e| BadJob(format!("sample {}: {e}", i + 1)))
        };
        let samples: Vec<Tokens> = self.samples.iter().enumerate().map(tokens).collect::<Result<_, _>>()?;
        let steps = pack(&samples, settings.step_tokens);

        // What the optimizer will remember, and what of it must be given up.
        let mut notes: Vec<String> = model.left_alone.iter().map(|what| format!("{what} stay as they are")).collect();
        let (mut growth, mut reset, mut at_home) = (0u64, 0u64, 0u64);
        // Locked no longer than this: a running step needs it while readers wait.
        let state = state.lock();
        for (name, shape) in &trained {
            let form = form(&settings, shape);
            match state.tensors.get(*name) {
                Some(tensor) if fits(tensor, form, shape) => {}
                known => {
                    reset += known.is_some() as u64;
                    growth += 8 * moment_elements(form, shape);
                }
            }
        }
        // Moments on the host, which a step on a GPU takes there first, those of tensors that do not train included.
        for (name, shape) in model.tensors() {
            let known = state.tensors.get(name);
            let goes_on = |t: &&TensorState| !settings.trains(name) || fits(t, form(&settings, &shape), &shape);
            at_home += known.filter(goes_on).map_or(0, |t| 4 * (t.m.len() + t.v.len()) as u64);
        }
        drop(state);
        if reset > 0 {
            notes.push(format!(
                "the optimizer starts anew for {reset} tensors: their state has another rank or optimizer"
            ));
        }
        if let Some((name, spec)) = trained.iter().find_map(|(n, _)| {
            let spec = weights.tensor(n)?;
            spec.kind().is_none().then_some((n, spec))
        }) {
            return Err(BadJob(format!("tensor '{name}' is {:?}, which does not train", spec.dtype)));
        }
        let on_device = device_of(weights, model.tensors().into_iter().map(|(n, _)| n)).map_err(BadJob)?.is_some();
        if let Some(why) = super::gpu::refusal(model).filter(|_| on_device) {
            return Err(BadJob(why));
        }
        if on_device {
            super::gpu::libraries().map_err(BadJob)?;
            growth += at_home;
        }
        if settings.epochs.checked_mul(samples.len() as u64).is_none() {
            // No step has more samples than there are.
            return Err(BadJob(format!(
                "config.epochs is {}: that is more steps than can be counted",
                settings.epochs
            )));
        }
        let narrowed = super::gpu::plan::narrowed(model, weights);
        let needs = |step: &Vec<usize>| match on_device {
            true => super::gpu::plan::least(model, &batch(&samples, step), &settings) + narrowed,
            false => batch(&samples, step).memory(model, settings.rank()),
        };
        let working = steps.iter().map(needs).max().unwrap_or(0);
        Ok(Plan { settings, samples, steps, notes, memory: working + growth })
    }
}

fn batch(samples: &[Tokens], step: &[usize]) -> Batch {
    Batch::pack(step.iter().map(|&i| (i + 1, &samples[i])))
}

/// A job that was checked: ids, and which samples make each step of an epoch.
#[derive(Debug, Clone)]
pub struct Plan {
    pub settings: Settings,
    pub samples: Vec<Tokens>,
    steps: Vec<Vec<usize>>,
    /// What the user should know of it.
    pub notes: Vec<String>,
    /// Bytes it takes at its peak, beyond the weights and the optimizer's state as it is now.
    pub memory: u64,
}

impl Plan {
    pub fn steps(&self) -> u64 {
        self.settings.epochs * self.steps.len() as u64
    }

    /// How many samples step number `step` of the job runs.
    pub fn samples_in(&self, step: u64) -> usize {
        self.steps[(step % self.steps.len() as u64) as usize].len()
    }

    /// The rows of step number `step` of the job. Samples are numbered from 1, as in messages.
    pub fn batch(&self, step: u64) -> Batch {
        batch(&self.samples, &self.steps[(step % self.steps.len() as u64) as usize])
    }
}

/// Samples of each step, in the order of the job: as many as have `limit` tokens together, a shared context once.
fn pack(samples: &[Tokens], limit: usize) -> Vec<Vec<usize>> {
    let mut steps: Vec<Vec<usize>> = Vec::new();
    let (mut used, mut contexts) = (0, HashSet::new());
    for (i, sample) in samples.iter().enumerate() {
        let context = if contexts.contains(&sample.context) { 0 } else { sample.context.len() };
        let size = context + sample.continuation.len();
        match steps.last_mut() {
            Some(step) if used + size <= limit => {
                step.push(i);
                used += size;
            }
            _ => {
                contexts.clear();
                steps.push(vec![i]);
                used = sample.len();
            }
        }
        contexts.insert(&sample.context);
    }
    steps
}

/// What is wrong with JSON that begins after so many lines of the job.
fn bad_json(e: &serde_json::Error, lines: usize) -> BadJob {
    let what = e.to_string();
    let what = what.rsplit_once(" at line ").map_or(&*what, |(what, _)| what);
    let not = if e.is_data() { "" } else { "not JSON: " };
    BadJob(format!("{not}{what} at line {} column {}", lines + e.line(), e.column()))
}

fn read_settings(config: Value) -> Result<Settings, String> {
    serde_json::from_value(config).map_err(|e| format!("config: {e}"))
}

fn unknown(object: &Map<String, Value>, otherwise: &str) -> String {
    match object.keys().next() {
        Some(key) => format!("unknown key '{key}' in the job: it has samples and config"),
        None => otherwise.to_string(),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_one_object_or_lines_of_samples() {
        let one =
            Job::parse("{\"samples\": [{\"text\": \"a\"}, {\"text\": \"b\"}],\n \"config\": {\"lr\": 0.5}}").unwrap();
        assert_eq!((one.samples.len(), one.settings.lr), (2, 0.5));
        let lines = Job::parse("{\"config\": {\"lr\": 0.5}}\n\n{\"text\": \"a\"}\n{\"text\": \"b\"}\n").unwrap();
        assert_eq!(lines, one);
        assert_eq!(Job::parse("{\"text\": \"a\"}").unwrap().samples.len(), 1);
        let nested = Job::parse("{\n \"samples\": [\n {\"text\": \"a\"}]}").unwrap();
        assert_eq!(nested.samples.len(), 1);
    }

    #[test]
    fn mistakes_are_found_by_place_and_name() {
        for (text, want) in [
            ("", "empty"),
            ("{\"samples\": [}", "line 1 column 14"),
            ("{\"text\": \"a\"}\n{\"text\": }\n", "line 2 column 10"),
            ("{\"text\": \"a\"}\n{\"txt\": \"b\"}\n", "line 2: unknown key 'txt'"),
            ("{\"samples\": [{\"text\": \"a\"}, {\"txt\": \"a\"}]}", "sample 2: unknown key 'txt'"),
            ("{\"samples\": [], \"config\": {}}", "no samples"),
            ("{\"samples\": 3}", "a number"),
            ("{\"samples\": [{\"text\": \"a\"}], \"confg\": {}}", "'confg'"),
            ("{\"samples\": [{\"text\": \"a\"}], \"config\": {\"learning_rate\": 1}}", "learning_rate"),
            ("{\"samples\": [{\"text\": \"a\"}], \"config\": {\"lr\": 0}}", "config.lr"),
            ("{\"samples\": [{\"text\": \"a\"}], \"config\": {\"lr\": NaN}}", "column"),
            ("{\"text\": \"a\"}\n{\"config\": {}}", "line 2: config stands alone"),
            ("[1, 2]", "it is no object"),
            (
                "{\"samples\": [{\"text\": \"a\"}],\n \"samples\": [{\"text\": \"b\"}]}",
                "key 'samples' is there twice at line 2 column 10",
            ),
            ("{\"samples\": [{\"text\": \"a\"}], \"config\": {\"lr\": 1, \"lr\": 2}}", "key 'lr' is there twice"),
            ("{\"samples\": [{\"text\": \"a\", \"text\": \"b\"}]}", "key 'text' is there twice"),
            ("{\"config\": {\"lr\": 1, \"lr\": 2}}\n{\"text\": \"a\"}", "key 'lr' is there twice at line 1"),
            ("{\"text\": \"a\"}\n\n{\"text\": \"a\", \"text\": \"b\"}", "key 'text' is there twice at line 3 column"),
        ] {
            let error = Job::parse(text).expect_err(text).to_string();
            assert!(error.contains(want), "{text}: {error}");
        }
    }

    #[test]
    fn samples_fill_steps_in_order_and_share_their_context() {
        let sample = |context: &[u32], n: usize| Tokens::new(context.to_vec(), vec![1; n]);
        let c: &[u32] = &[5; 6];
        let samples = [sample(c, 2), sample(c, 2), sample(&[], 3), sample(&[], 20), sample(c, 4)];
        assert_eq!(pack(&samples, 10), vec![vec![0, 1], vec![2], vec![3], vec![4]]);
        assert_eq!(pack(&samples, 13), vec![vec![0, 1, 2], vec![3], vec![4]]);
        assert_eq!(pack(&samples, 1).len(), 5);
    }
}
