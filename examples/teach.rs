//! Trains a model directory's weights in memory with a job, and writes them out as another model directory.
//!
//! usage: cargo run --release --example teach -- MODEL_DIR JOB_FILE OUT_DIR
//!
//! It is the trainer alone, without mount and without commits: `weightfs mount` and its `ctl` are the usual way.

use safetensors::tensor::TensorView;
use std::path::PathBuf;
use std::sync::Arc;
use weightfs::train::queue::Options;
use weightfs::train::{Architecture, Config, InMemory, Model, Queue, TextModel, Weights};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [model_dir, job, out] = args.as_slice() else { return Err("usage: teach MODEL_DIR JOB_FILE OUT_DIR".into()) };
    let architecture = Architecture::from_config(&Config::read(model_dir)?)?;
    let weights = Arc::new(InMemory::load(model_dir)?);
    let model = Model::new(architecture, weights.clone())?;
    let listener: weightfs::train::queue::Listener = Box::new(|job| {
        if let Some(loss) = job.losses.last() {
            let (done, all) = (job.steps_done, job.steps);
            println!("step {done}/{all}  loss {loss:.4}  {:.0} tokens/s", job.tokens_per_second());
        }
    });
    let options = Options { listener: Some(listener), ..Options::default() };
    let queue = Queue::start(model, TextModel::read(model_dir), Default::default(), options)?;
    let id = queue.submit(&std::fs::read_to_string(job)?, &job.display().to_string())?;
    let done = loop {
        let job = queue.job(id).ok_or("the job is gone")?;
        if job.has_ended() {
            break job;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    if let Some(error) = done.error {
        return Err(error.into());
    }
    println!("predicted memory {} MB, optimizer state {} MB", done.memory >> 20, queue.state().lock().bytes() >> 20);

    std::fs::create_dir_all(out)?;
    for entry in std::fs::read_dir(model_dir)? {
        let entry = entry?;
        if entry.file_type()?.is_file() && !entry.file_name().to_string_lossy().contains("safetensors") {
            std::fs::copy(entry.path(), out.join(entry.file_name()))?;
        }
    }
    let tensors: Vec<_> = (weights.names())
        .filter_map(|name| Some((name.to_string(), weights.tensor(name)?, weights.bytes(name)?)))
        .collect();
    let views = tensors.iter().map(|(name, spec, bytes)| {
        let shape = spec.shape.iter().map(|&n| n as usize).collect();
        TensorView::new(spec.dtype, shape, bytes).map(|view| (name.as_str(), view))
    });
    let metadata = Some(std::collections::HashMap::from([("format".to_string(), "pt".to_string())]));
    safetensors::serialize_to_file(views.collect::<Result<Vec<_>, _>>()?, metadata, &out.join("model.safetensors"))?;
    Ok(())
}
