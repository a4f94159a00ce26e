//! The optimizer's memory between steps, and its file: a safetensors file with `NAME.m` and `NAME.v` for each HF tensor
//! name, and the counters as JSON in its metadata. It goes with the weights: committed and rolled back with them.

use crate::model::Dtype;
use rayon::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;

/// Which tensors' moments these are: of the gradient itself, or of its projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    Adam,
    /// Projected to `rank`, scaled by channel.
    Channel {
        rank: usize,
    },
    /// Projected to `rank`, scaled as a whole.
    Tensor {
        rank: usize,
    },
}

#[derive(Debug, Clone, PartialEq)]
pub struct TensorState {
    pub form: Form,
    /// Updates of this tensor so far.
    pub steps: u64,
    /// The limiter's norm of the last update; `None` before the first.
    pub last_norm: Option<f32>,
    pub m: Vec<f32>,
    pub v: Vec<f32>,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct OptimizerState {
    /// Optimizer steps over the life of the model directory.
    pub step: u64,
    pub tensors: BTreeMap<String, TensorState>,
    /// Where moments are that are not here.
    pub remote: Elsewhere,
}

/// m and v of one tensor.
pub type Moments = (Vec<f32>, Vec<f32>);

/// Whoever has moments on a device. A tensor whose `m` and `v` are empty has them there.
pub trait Remote: Send + Sync {
    /// m and v of a tensor, or `None` if it has none there; the error is a sentence.
    fn moments(&self, name: &str) -> Result<Option<Moments>, String>;

    fn bytes(&self) -> u64;

    /// Takes the host memory that [`Remote::copy`] copies to, which may take a second, so that it is there by then.
    fn prepare(&self) -> Result<(), String>;

    /// Begins to copy all moments. Until the copies have arrived no step may be written.
    fn copy(&self) -> Result<Box<dyn Copies>, String>;
}

/// Moments on their way to host memory. Dropping them waits, too.
pub trait Copies: Send + Sync {
    fn wait(&mut self) -> Result<(), String>;

    /// m and v of a tensor as little-endian f32, once they have arrived.
    fn moments(&self, name: &str) -> Option<(&[u8], &[u8])>;
}

/// A state for a commit, whose moments may be on their way from a device.
pub enum Taken {
    /// [`OptimizerState::to_parts`].
    Parts(Parts),
    Copies(OptimizerState, Box<dyn Copies>),
}

/// The counters as JSON, and the moments by name, as little-endian f32.
pub type Parts = (String, Vec<(String, Vec<u8>)>);

/// A [`Remote`], or none.
#[derive(Clone, Default)]
pub struct Elsewhere(Option<Arc<dyn Remote>>);

impl Elsewhere {
    pub fn set(&mut self, remote: Arc<dyn Remote>) {
        self.0 = Some(remote);
    }

    /// Takes what [`OptimizerState::taken`] needs and what takes long to get.
    pub fn prepare(&self) -> Result<(), BadState> {
        self.0.as_ref().map_or(Ok(()), |remote| remote.prepare()).map_err(BadState)
    }

    pub fn is(&self, remote: &Arc<dyn Remote>) -> bool {
        self.0.as_ref().is_some_and(|r| std::ptr::addr_eq(Arc::as_ptr(r), Arc::as_ptr(remote)))
    }
}

impl fmt::Debug for Elsewhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "on a device" } else { "here" })
    }
}

impl PartialEq for Elsewhere {
    fn eq(&self, other: &Elsewhere) -> bool {
        match (&self.0, &other.0) {
            (None, None) => true,
            (Some(_), Some(remote)) => self.is(remote),
            _ => false,
        }
    }
}

/// Why an optimizer file cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("not an optimizer state of weightfs: {0}")]
pub struct BadState(String);

const KEY: &str = "weightfs.optimizer";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    step: u64,
    tensors: BTreeMap<String, TensorHeader>,
}

#[derive(Serialize, Deserialize)]
struct TensorHeader {
    form: Form,
    steps: u64,
    /// The bits of the f32, so that a restart changes nothing.
    last_norm: Option<u32>,
}

impl OptimizerState {
    /// Bytes in memory, and nearly in the file.
    pub fn bytes(&self) -> u64 {
        let here: u64 = self.tensors.values().map(|t| 4 * (t.m.len() + t.v.len()) as u64).sum();
        here + self.remote.0.as_ref().map_or(0, |r| r.bytes())
    }

    /// The state with all moments in host memory: itself, or a copy with those of the device. To commit it, say; no step may
    /// run meanwhile.
    pub fn at_home(&self) -> Result<Cow<'_, OptimizerState>, BadState> {
        if self.remote.0.is_none() {
            return Ok(Cow::Borrowed(self));
        }
        let mut copy = self.clone();
        copy.come_home()?;
        Ok(Cow::Owned(copy))
    }

    /// Brings all moments to host memory; what is on the device means nothing from then on.
    pub fn come_home(&mut self) -> Result<(), BadState> {
        let Some(remote) = &self.remote.0 else { return Ok(()) };
        for (name, t) in self.tensors.iter_mut().filter(|(_, t)| t.m.is_empty()) {
            let found = remote.moments(name).map_err(|why| BadState(format!("moments of {name}: {why}")))?;
            (t.m, t.v) = found.ok_or_else(|| BadState(format!("the moments of {name} are lost")))?;
        }
        self.remote.0 = None;
        Ok(())
    }

    /// The state of this moment, to commit it. No step may be written until [`Taken::arrive`].
    pub fn taken(&self) -> Result<Taken, BadState> {
        match &self.remote.0 {
            None => Ok(Taken::Parts(self.to_parts())),
            Some(remote) => {
                let copies = remote.copy().map_err(BadState)?;
                Ok(Taken::Copies(OptimizerState { remote: Elsewhere::default(), ..self.clone() }, copies))
            }
        }
    }

    /// Of a state that is [at home](Self::at_home).
    pub fn to_parts(&self) -> Parts {
        self.parts(|_, t| (Cow::Owned(little_endian(&t.m)), Cow::Owned(little_endian(&t.v))))
    }

    /// `moments` gives m and v of a tensor.
    fn parts<'a>(&'a self, moments: impl Fn(&str, &'a TensorState) -> (Cow<'a, [u8]>, Cow<'a, [u8]>) + Sync) -> Parts {
        let header = Header {
            version: VERSION,
            step: self.step,
            tensors: (self.tensors.iter())
                .map(|(name, t)| {
                    let last_norm = t.last_norm.map(f32::to_bits);
                    (name.clone(), TensorHeader { form: t.form, steps: t.steps, last_norm })
                })
                .collect(),
        };
        let json = serde_json::to_string(&header).expect("maps with text keys, numbers and enums serialise");
        // Gigabytes of a large model.
        let moments: Vec<(String, Vec<u8>)> = (self.tensors.par_iter())
            .flat_map_iter(|(name, t)| {
                let (m, v) = moments(name, t);
                [(format!("{name}.m"), m.into_owned()), (format!("{name}.v"), v.into_owned())]
            })
            .collect();
        (json, moments)
    }

    /// The reverse of [`OptimizerState::to_parts`]. `moment` finds one by its name.
    pub fn from_parts<'a>(json: &str, moment: impl Fn(&str) -> Option<&'a [u8]>) -> Result<OptimizerState, BadState> {
        let header: Header = serde_json::from_str(json).map_err(|e| BadState(e.to_string()))?;
        if header.version != VERSION {
            return Err(BadState(format!("its version is {}, this program reads {VERSION}", header.version)));
        }
        let values = |name: String| -> Result<Vec<f32>, BadState> {
            let bytes = moment(&name).ok_or_else(|| BadState(format!("{name} is missing")))?;
            if bytes.len() % 4 != 0 {
                return Err(BadState(format!("{name} is no list of F32")));
            }
            Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        };
        let mut tensors = BTreeMap::new();
        for (name, t) in header.tensors {
            let (m, v) = (values(format!("{name}.m"))?, values(format!("{name}.v"))?);
            if m.len() != v.len() {
                return Err(BadState(format!("{name}.m and {name}.v differ in size")));
            }
            let last_norm = t.last_norm.map(f32::from_bits);
            tensors.insert(name, TensorState { form: t.form, steps: t.steps, last_norm, m, v });
        }
        Ok(OptimizerState { step: header.step, tensors, remote: Elsewhere::default() })
    }

    pub fn to_safetensors(&self) -> Vec<u8> {
        let (json, moments) = self.to_parts();
        let views = moments.iter().map(|(name, bytes)| {
            let view = TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes);
            (name.as_str(), view.expect("the shape is made from the bytes"))
        });
        safetensors::serialize(views, Some(HashMap::from([(KEY.to_string(), json)])))
            .expect("f32 tensors with distinct names serialise")
    }

    pub fn from_safetensors(bytes: &[u8]) -> Result<OptimizerState, BadState> {
        let bad = |e: &dyn std::fmt::Display| BadState(e.to_string());
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| bad(&e))?;
        let json = metadata.metadata().as_ref().and_then(|m| m.get(KEY));
        let json = json.ok_or_else(|| BadState(format!("its metadata has no {KEY}")))?;
        let file = SafeTensors::deserialize(bytes).map_err(|e| bad(&e))?;
        let moment = |name: &str| file.tensor(name).ok().filter(|v| v.dtype() == Dtype::F32).map(|v| v.data());
        OptimizerState::from_parts(json, moment)
    }
}

impl Taken {
    /// Waits for copies under way.
    pub fn arrive(&mut self) -> Result<(), BadState> {
        match self {
            Taken::Parts(_) => Ok(()),
            Taken::Copies(_, copies) => copies.wait().map_err(BadState),
        }
    }

    /// After [`Taken::arrive`].
    pub fn into_parts(self) -> Result<Parts, BadState> {
        let (state, copies) = match self {
            Taken::Parts(parts) => return Ok(parts),
            Taken::Copies(state, copies) => (state, copies),
        };
        if let Some((name, _)) = state.tensors.iter().find(|(name, t)| t.m.is_empty() && copies.moments(name).is_none())
        {
            return Err(BadState(format!("the moments of {name} are lost")));
        }
        Ok(state.parts(|name, t| match copies.moments(name).filter(|_| t.m.is_empty()) {
            Some((m, v)) => (Cow::Borrowed(m), Cow::Borrowed(v)),
            None => (Cow::Owned(little_endian(&t.m)), Cow::Owned(little_endian(&t.v))),
        }))
    }
}

fn little_endian(values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; 4 * values.len()];
    for (bytes, x) in bytes.chunks_exact_mut(4).zip(values) {
        bytes.copy_from_slice(&x.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> OptimizerState {
        let tensor =
            |form, last_norm| TensorState { form, steps: 7, last_norm, m: vec![0.1, -3.0], v: vec![1e-30, 2.0] };
        let tensors = BTreeMap::from([
            ("model.norm.weight".to_string(), tensor(Form::Adam, None)),
            ("lm_head.weight".to_string(), tensor(Form::Channel { rank: 4 }, Some(0.1))),
            ("model.embed_tokens.weight".to_string(), tensor(Form::Tensor { rank: 1 }, Some(1.0 / 3.0))),
        ]);
        OptimizerState { step: 12, tensors, remote: Elsewhere::default() }
    }

    #[test]
    fn a_state_survives_its_file_to_the_bit_and_the_file_is_always_the_same() {
        let bytes = state().to_safetensors();
        assert_eq!(OptimizerState::from_safetensors(&bytes).unwrap(), state());
        assert_eq!(bytes, state().to_safetensors());
        let empty = OptimizerState::default();
        assert_eq!(OptimizerState::from_safetensors(&empty.to_safetensors()).unwrap(), empty);
    }

    /// Moments of two tensors elsewhere.
    struct Far(OptimizerState);

    struct Arriving(BTreeMap<String, (Vec<u8>, Vec<u8>)>, bool);

    impl Remote for Far {
        fn moments(&self, name: &str) -> Result<Option<Moments>, String> {
            Ok(self.0.tensors.get(name).map(|t| (t.m.clone(), t.v.clone())))
        }

        fn bytes(&self) -> u64 {
            0
        }

        fn prepare(&self) -> Result<(), String> {
            Ok(())
        }

        fn copy(&self) -> Result<Box<dyn Copies>, String> {
            let pair = |t: &TensorState| (little_endian(&t.m), little_endian(&t.v));
            let copies = self.0.tensors.iter().map(|(name, t)| (name.clone(), pair(t))).collect();
            Ok(Box::new(Arriving(copies, false)))
        }
    }

    impl Copies for Arriving {
        fn wait(&mut self) -> Result<(), String> {
            self.1 = true;
            Ok(())
        }

        fn moments(&self, name: &str) -> Option<(&[u8], &[u8])> {
            assert!(self.1, "asked for before they arrived");
            self.0.get(name).map(|(m, v)| (&m[..], &v[..]))
        }
    }

    #[test]
    fn a_state_is_taken_with_the_moments_that_are_elsewhere() {
        let whole = state();
        let mut near = whole.clone();
        let mut far = OptimizerState::default();
        for name in ["model.norm.weight", "lm_head.weight"] {
            let tensor = near.tensors.get_mut(name).unwrap();
            far.tensors.insert(name.into(), tensor.clone());
            (tensor.m, tensor.v) = (Vec::new(), Vec::new());
        }
        near.remote.set(Arc::new(Far(far.clone())));
        let parts = |state: &OptimizerState| {
            let mut taken = state.taken().unwrap();
            taken.arrive().unwrap();
            taken.into_parts()
        };
        assert_eq!(parts(&near).unwrap(), whole.to_parts());
        assert_eq!(parts(&whole).unwrap(), whole.to_parts());
        assert_eq!(near.at_home().unwrap().to_parts(), whole.to_parts());
        far.tensors.remove("lm_head.weight");
        near.remote.set(Arc::new(Far(far)));
        assert!(parts(&near).unwrap_err().to_string().contains("lm_head.weight"));
    }

    #[test]
    fn damaged_files_are_errors() {
        let bytes = state().to_safetensors();
        assert!(OptimizerState::from_safetensors(&bytes[..bytes.len() - 3]).is_err());
        assert!(OptimizerState::from_safetensors(b"").is_err());
        let no_header = safetensors::serialize(Vec::<(String, TensorView)>::new(), None).unwrap();
        assert!(OptimizerState::from_safetensors(&no_header).is_err());
    }
}
