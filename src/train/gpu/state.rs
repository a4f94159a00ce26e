//! The optimizer's moments on the device. They stay there from step to step: what the host knows of a tensor's state has no
//! moments meanwhile, and whoever wants them asks ([`OptimizerState::at_home`]).

use crate::compute::cuda::{Buffer, Downloads, Gpu, GpuError};
use crate::memory::cuda::PinnedBuffer;
use crate::train::apollo::{fits, form, moment_elements};
use crate::train::families::Architecture;
use crate::train::settings::Settings;
use crate::train::state::{Copies, OptimizerState, Remote};
use crate::train::step::{Model, StepError};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// Moments by tensor.
pub struct Moments {
    gpu: Arc<Gpu>,
    held: Mutex<HashMap<String, Arc<Pair>>>,
    /// What a commit copies them to. Kept from one to the next, as the memory that it stages weights in is.
    staging: Arc<Mutex<Option<PinnedBuffer>>>,
}

/// Each part begins at a multiple of this.
const GRAIN: usize = 64;

/// Moments on their way to the host.
struct Home {
    /// Dropped first: that waits for the copies.
    downloads: Downloads,
    /// Where m and v of each tensor lie.
    places: HashMap<String, [Range<usize>; 2]>,
    _pairs: Vec<Arc<Pair>>,
    staging: Arc<Mutex<Option<PinnedBuffer>>>,
}

/// m and v of one tensor, f32.
pub(super) struct Pair {
    pub m: Buffer,
    pub v: Buffer,
}

impl Moments {
    pub(super) fn new(gpu: Arc<Gpu>) -> Moments {
        Moments { gpu, held: Mutex::default(), staging: Arc::default() }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.held.lock().contains_key(name)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.held.lock().values().map(|p| p.m.bytes() + p.v.bytes()).sum()
    }

    /// Takes a state over: moments that the host has go to the device, and those of tensors whose state does not go on under
    /// these settings are dropped. Does nothing for the state that is here already.
    pub(super) fn adopt(
        self: &Arc<Self>,
        state: &mut OptimizerState,
        settings: &Settings,
        model: &Model,
    ) -> Result<(), StepError> {
        let remote: Arc<dyn Remote> = self.clone();
        if !state.remote.is(&remote) {
            state.come_home().map_err(|e| GpuError::Library(e.to_string()))?;
            self.held.lock().clear();
            // From here on, whatever the host has no moments of is here: also if an upload fails.
            state.remote.set(remote);
        }
        match self.upload_all(state, settings, model) {
            Ok(false) => Ok(()),
            // They may be asked for from here on, past the stream that they came by: also those before one that failed.
            uploaded => Ok(self.gpu.wait().and(uploaded.map(drop))?),
        }
    }

    /// Whether there were any to upload.
    fn upload_all(&self, state: &mut OptimizerState, settings: &Settings, model: &Model) -> Result<bool, GpuError> {
        let mut any = false;
        for (name, shape) in model.architecture.tensors() {
            let Some(tensor) = state.tensors.get_mut(name) else {
                self.held.lock().remove(name);
                continue;
            };
            if settings.trains(name) && !fits(tensor, form(settings, &shape), &shape) {
                state.tensors.remove(name);
                self.held.lock().remove(name);
            } else if !tensor.m.is_empty() {
                let upload = |x: &[f32]| {
                    let buffer = self.gpu.keep(size_of_val(x) as u64)?;
                    self.gpu.write(buffer.part(), x)?;
                    Ok::<_, GpuError>(buffer)
                };
                let pair = Pair { m: upload(&tensor.m)?, v: upload(&tensor.v)? };
                self.held.lock().insert(name.to_string(), Arc::new(pair));
                (tensor.m, tensor.v) = (Vec::new(), Vec::new());
                any = true;
            }
        }
        Ok(any)
    }

    /// A tensor's moments, zeros where it has none.
    pub(super) fn of(&self, name: &str, elements: usize) -> Result<Arc<Pair>, GpuError> {
        let mut held = self.held.lock();
        if let Some(pair) = held.get(name) {
            return Ok(pair.clone());
        }
        let zeros = || {
            let buffer = self.gpu.keep(4 * elements as u64)?;
            self.gpu.clear(buffer.part())?;
            Ok::<_, GpuError>(buffer)
        };
        let pair = Arc::new(Pair { m: zeros()?, v: zeros()? });
        held.insert(name.to_string(), pair.clone());
        Ok(pair)
    }

    /// Makes what is missing of every tensor that trains, zeros.
    pub(super) fn prepare(&self, a: &Architecture, settings: &Settings) -> Result<(), GpuError> {
        let trained = || a.tensors().into_iter().filter(|(name, _)| settings.trains(name));
        let elements = |shape: &[u64]| moment_elements(form(settings, shape), shape);
        let missing = trained().filter(|(name, _)| !self.has(name));
        self.gpu.reserve_lasting(missing.flat_map(|(_, shape)| [4 * elements(&shape); 2]))?;
        for (name, shape) in trained() {
            self.of(name, elements(&shape) as usize)?;
        }
        Ok(())
    }

    /// All of them as they are now; a job that begins meanwhile may make more.
    fn pairs(&self) -> Vec<(String, Arc<Pair>)> {
        self.held.lock().iter().map(|(name, pair)| (name.clone(), pair.clone())).collect()
    }

    /// Pinned memory for these, the one kept if it is large enough.
    fn take_staging(&self, pairs: &[(String, Arc<Pair>)]) -> Result<PinnedBuffer, String> {
        let parts = pairs.iter().flat_map(|(_, p)| [p.m.bytes(), p.v.bytes()]);
        let bytes: usize = parts.map(|b| (b as usize).next_multiple_of(GRAIN)).sum();
        let kept = self.staging.lock().take();
        match kept.filter(|kept| kept.len() >= bytes) {
            Some(kept) => Ok(kept),
            None => PinnedBuffer::new(&self.gpu.device, bytes.next_multiple_of(64 << 20)).map_err(|e| e.to_string()),
        }
    }

    pub(super) fn forget(&self, name: &str) {
        self.held.lock().remove(name);
    }
}

impl Remote for Moments {
    fn moments(&self, name: &str) -> Result<Option<crate::train::state::Moments>, String> {
        let Some(pair) = self.held.lock().get(name).cloned() else { return Ok(None) };
        // Whoever asks holds the weights still, and so the moments: of a step that has begun only what reads runs.
        let values = |b: &Buffer| self.gpu.download_beside(b.part(), b.bytes() as usize / 4).map_err(|e| e.to_string());
        Ok(Some((values(&pair.m)?, values(&pair.v)?)))
    }

    fn bytes(&self) -> u64 {
        Moments::bytes(self)
    }

    fn prepare(&self) -> Result<(), String> {
        let staging = self.take_staging(&self.pairs())?;
        *self.staging.lock() = Some(staging);
        Ok(())
    }

    fn copy(&self) -> Result<Box<dyn Copies>, String> {
        let pairs = self.pairs();
        let staging = self.take_staging(&pairs)?;
        let (mut places, mut parts, mut at) = (HashMap::new(), Vec::new(), 0);
        for (name, pair) in &pairs {
            let place = [&pair.m, &pair.v].map(|buffer| {
                let range = at..at + buffer.bytes() as usize;
                at = range.end.next_multiple_of(GRAIN);
                parts.push((buffer.part(), range.start));
                range
            });
            places.insert(name.clone(), place);
        }
        // Whoever asks holds the weights still, as for `moments`.
        let downloads = self.gpu.start_downloads(staging, &parts).map_err(|e| e.to_string())?;
        let _pairs = pairs.into_iter().map(|(_, pair)| pair).collect();
        Ok(Box::new(Home { downloads, places, _pairs, staging: self.staging.clone() }))
    }
}

impl Copies for Home {
    fn wait(&mut self) -> Result<(), String> {
        self.downloads.wait().map_err(|e| e.to_string())
    }

    fn moments(&self, name: &str) -> Option<(&[u8], &[u8])> {
        let [m, v] = self.places.get(name)?;
        let bytes = self.downloads.bytes()?;
        Some((&bytes[m.clone()], &bytes[v.clone()]))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        *self.staging.lock() = self.downloads.take_back();
    }
}
