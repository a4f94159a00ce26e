//! `--weights`: own, manifests, the engine that serves the model, or a file of torch handles (told by its content, not
//! its name).

use super::device::DeviceChoice;
use crate::image::Image;
use crate::memory::Hash;
use crate::model::ModelDirectory;
use crate::source::{ENGINES, Source, discover, load_own, manifest_directories};
use anyhow::{Context, bail};
use clap::Args;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Args, Clone)]
pub struct WeightsArguments {
    /// Where the live weights are: `own` (weightfs loads the model itself), `vllm` or `torch` (the running engine of
    /// that kind that serves MODEL_DIR), an engine's manifest (give the option once for each rank), or a file in which an
    /// engine saved the handles of its CUDA memory with torch.save
    #[arg(long, value_name = "own|vllm|MANIFEST|HANDLES.pt", default_value = "own")]
    weights: Vec<PathBuf>,
    /// Where own weights are kept; auto: on the first GPU if there is one with room for them
    #[arg(long, value_name = "auto|cpu|cuda[:N]", default_value = "auto")]
    device: DeviceChoice,
}

/// An opened source, and the hashes of the files if they were read for it.
pub struct Opened {
    pub image: Arc<Image>,
    pub hashes: Option<Vec<Vec<Hash>>>,
}

impl WeightsArguments {
    /// The manifests, found or given; `None` for weights of our own.
    fn manifests(&self, directory: &ModelDirectory) -> anyhow::Result<Option<Vec<PathBuf>>> {
        let is_word = |w: &&PathBuf| w.as_os_str() == "own" || ENGINES.iter().any(|e| w.as_os_str() == *e);
        let Some(word) = self.weights.iter().find(is_word) else { return Ok(Some(self.weights.clone())) };
        if self.weights.len() > 1 {
            bail!("--weights {} cannot be mixed with manifests or given twice", word.display());
        }
        match ENGINES.iter().find(|e| word.as_os_str() == **e) {
            Some(engine) => Ok(Some(discover(engine, directory, &manifest_directories())?)),
            None => Ok(None),
        }
    }

    /// The manifests, for commands that make no sense on weights of our own.
    pub fn need_manifests(&self, directory: &ModelDirectory) -> anyhow::Result<Vec<PathBuf>> {
        self.manifests(directory)?
            .context("name the engine's manifest: --weights MANIFEST (own weights are the files themselves)")
    }

    /// Finds and maps the weights. `writable`: training or rollback may change them.
    pub fn open(&self, directory: &Arc<ModelDirectory>, writable: bool) -> anyhow::Result<Opened> {
        let (source, hashes) = match self.manifests(directory)? {
            Some(manifests) => (Source::from_manifests(directory, &manifests, writable)?, None),
            None => {
                let device = self.device.open(directory.bytes())?;
                let own = load_own(directory, device.as_ref())?;
                (own.source, Some(own.hashes))
            }
        };
        for tensor in source.only_live.iter().take(5) {
            log::warn!("tensor '{tensor}' is only live: there is no such tensor on disk, so it is not shown");
        }
        Ok(Opened { image: Arc::new(Image::new(directory.clone(), Arc::new(source))), hashes })
    }
}
