//! The speed and the memory of one training step, with PyTorch beside it in the same run where there is one.
//!
//! usage: cargo bench --bench train -- MODEL_DIR [--context N] [--trained N] [--steps N] [--threads N] [--optimizer NAME]
//!
//! WEIGHTFS_PYTHON (default python3) with torch, transformers and numpy runs `benches/train_peer.py` on the same ids;
//! without them only our side is measured.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;
use weightfs::train::{Architecture, Batch, Config, InMemory, Model, Settings, Tokens, Trainer};

/// Resident bytes now (VmRSS) or at their peak (VmHWM).
fn resident(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(key)).unwrap_or(": 0 kB");
    line.trim_matches(|c: char| !c.is_ascii_digit()).parse::<u64>().unwrap_or(0) * 1024
}

/// Processor seconds so far (user and system; clock ticks are 10 ms): what a busy machine does not stretch.
fn processor_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = text.rsplit(") ").next().unwrap_or("").split(' ').collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

fn main() {
    let mut values = std::collections::HashMap::from([
        ("context", "128".to_string()),
        ("trained", "128".into()),
        ("steps", "7".into()),
        ("threads", "2".into()),
        ("optimizer", "apollo".into()),
    ]);
    let (mut model, mut args) = (None, std::env::args().skip(1).filter(|a| a != "--bench"));
    while let Some(arg) = args.next() {
        match arg.strip_prefix("--") {
            Some(key) => {
                let slot = values.get_mut(key).unwrap_or_else(|| panic!("unknown option --{key}"));
                *slot = args.next().expect("a value after the option");
            }
            None => model = Some(PathBuf::from(arg)),
        }
    }
    let Some(model) = model else {
        println!("train: no MODEL_DIR given, nothing measured");
        return;
    };
    let number = |key: &str| values[key].parse::<usize>().expect("a number");
    let (context, trained, steps, threads) = (number("context"), number("trained"), number("steps"), number("threads"));

    let architecture = Architecture::from_config(&Config::read(&model).unwrap()).unwrap();
    let id = |i: usize| (i * 7919 % (architecture.vocabulary - 100) + 50) as u32;
    let ids: Vec<u32> = (0..context + trained).map(id).collect();
    let sample = Tokens::new(ids[..context].to_vec(), ids[context..].to_vec());
    let batch = Batch::pack([(1, &sample)]);
    let weights = Arc::new(InMemory::load(&model).unwrap());
    let mut trainer = Trainer::new(Model::new(architecture, weights).unwrap(), Default::default());
    let settings: Settings = serde_json::from_str(&format!("{{\"optimizer\": \"{}\"}}", values["optimizer"])).unwrap();
    let predicted = batch.memory(&trainer.model.architecture, settings.rank());
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let before = resident("VmRSS");
    let _ = std::fs::write("/proc/self/clear_refs", "5"); // the peak begins anew
    let (mut times, mut losses) = (Vec::new(), Vec::new());
    let mut processor = 0.0;
    for step in 0..steps {
        if step == 1 {
            processor = processor_seconds();
        }
        let start = Instant::now();
        let report = pool.install(|| trainer.step(&batch, &settings, 1e-5)).unwrap();
        times.push(start.elapsed().as_secs_f64());
        losses.push(report.loss);
    }
    let processor = (processor_seconds() - processor) / (steps - 1) as f64;
    let mb = |bytes: u64| bytes / 1_000_000;
    times.remove(0);
    times.sort_by(f64::total_cmp);
    let (middle, best) = (times[times.len() / 2], times[0]);
    let state = trainer.state.lock().bytes();
    println!(
        "weightfs: {:.0} ms a step (best {:.0}, processor {:.0}), {} MB beyond the weights, {} of them state ({} predicted without it); losses {:.4} {:.4}",
        middle * 1e3,
        best * 1e3,
        processor * 1e3,
        mb(resident("VmHWM").saturating_sub(before)),
        mb(state),
        mb(predicted),
        losses[0],
        losses[1],
    );
    drop(trainer);
    let python = std::env::var("WEIGHTFS_PYTHON").unwrap_or("python3".into());
    for dtype in ["bfloat16", "float32"] {
        let peer = Command::new(&python)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/train_peer.py"))
            .arg(&model)
            .args([dtype, &context.to_string(), &steps.to_string(), &threads.to_string(), &values["optimizer"]])
            .arg(format!("{ids:?}"))
            .status();
        if !peer.is_ok_and(|status| status.success()) {
            println!("PyTorch {dtype}: not measured (WEIGHTFS_PYTHON needs torch, transformers and numpy)");
        }
    }
}
