//! The whole of weightfs in one run, explained as it happens: a small model, another process that changes its weights in
//! shared memory, a mount that shows them, a commit that brings the files on disk up to date.
//!
//!     cargo run --release --example quickstart
//!
//! Three processes take part, all of this one program: `weightfs …` is the command line as users have it, `engine` plays
//! the inference server, and the first one tells the story.

use memmap2::MmapRaw;
use rustix::fs::{FlockOperation, flock};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const ROWS: usize = 512;
const COLUMNS: usize = 256;
const TENSORS: [&str; 2] = ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"];
const BYTES: usize = ROWS * COLUMNS * 4;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    let outcome = match arguments.get(1).and_then(|a| a.to_str()) {
        Some("weightfs") => return weightfs::cli::run(arguments[1..].to_vec()),
        Some("engine") => engine(Path::new(&arguments[2]), Path::new(&arguments[3])),
        _ => story(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("quickstart: {e}");
            ExitCode::FAILURE
        }
    }
}

// -- the story --

fn story() -> Outcome {
    let scratch = tempfile::tempdir()?;
    let (model, mount) = (scratch.path().join("model"), scratch.path().join("mount"));
    std::fs::create_dir(&mount)?;

    println!("1. A model directory, as Hugging Face lays it out: {}", model.display());
    make_model(&model)?;
    let disk = model.join("model.safetensors");
    println!("   config.json and model.safetensors ({} bytes, {} tensors).", disk.metadata()?.len(), TENSORS.len());

    println!("2. Another process, playing the inference engine, loads the weights into shared memory");
    let mut engine = Engine::start(&model, scratch.path())?;
    println!(
        "   (pid {}) and says in a manifest where each tensor is: {}",
        engine.child.id(),
        engine.manifest.display()
    );

    println!("3. weightfs mounts that process's live weights as a model directory:");
    println!("   $ weightfs mount {} {} --weights {}", model.display(), mount.display(), engine.manifest.display());
    let daemon = Daemon::start(&model, &mount, &engine.manifest)?;
    let live = mount.join("model.safetensors");
    for line in std::fs::read_to_string(mount.join("status"))?.lines() {
        if ["state ", "source ", "tensors ", "view "].iter().any(|k| line.starts_with(k)) {
            println!("   status: {line}");
        }
    }
    println!("   Its model.safetensors {} the file on disk, byte for byte.", same(&live, &disk)?);
    let before = first_value(&live)?;
    println!("   Any safetensors reader works on it; {}[0][0] is {before}.", TENSORS[0]);

    println!("4. The engine changes its weights in place, as training does:");
    engine.tell("change")?;
    let after = first_value(&live)?;
    println!("   through the mount {}[0][0] is now {after}, on disk it is still {}.", TENSORS[0], first_value(&disk)?);
    expect(before != after && first_value(&disk)? == before, "only the live value has changed")?;

    println!("5. A commit brings the directory on disk up to date, and writes only what changed:");
    println!("   $ echo 'commit my first one' > {}/ctl", mount.display());
    std::fs::write(mount.join("ctl"), "commit my first one")?;
    let status = std::fs::read_to_string(mount.join("status"))?;
    println!("   status: {}", status.lines().find(|l| l.starts_with("last_command")).unwrap_or("?"));
    println!(
        "   The file on disk {} the live one: {}[0][0] is {} there too.",
        same(&disk, &live)?,
        TENSORS[0],
        first_value(&disk)?
    );
    expect(first_value(&disk)? == after, "the disk has the live value")?;

    println!("6. Done: unmounting and removing everything.");
    println!("   $ weightfs umount {}", mount.display());
    daemon.stop(&mount)?;
    engine.tell("stop")?;
    engine.child.wait()?;
    println!("\nYour own model, without an engine:\n   weightfs mount MODEL_DIR EMPTY_DIR && cat EMPTY_DIR/status");
    Ok(())
}

/// Both files' bytes are compared; a difference ends the story.
fn same(a: &Path, b: &Path) -> Outcome<&'static str> {
    expect(std::fs::read(a)? == std::fs::read(b)?, "the two files are equal")?;
    Ok("equals")
}

fn expect(holds: bool, what: &str) -> Outcome {
    if holds { Ok(()) } else { Err(format!("this should hold and does not: {what}").into()) }
}

fn first_value(file: &Path) -> Outcome<f32> {
    let bytes = std::fs::read(file)?;
    let tensor = SafeTensors::deserialize(&bytes)?.tensor(TENSORS[0])?.data()[..4].try_into()?;
    Ok(f32::from_le_bytes(tensor))
}

fn make_model(dir: &Path) -> Outcome {
    std::fs::create_dir(dir)?;
    let values: Vec<u8> = (0..ROWS * COLUMNS).flat_map(|i| (i as f32 / 1000.0).to_le_bytes()).collect();
    let tensor = TensorView::new(Dtype::F32, vec![ROWS, COLUMNS], &values)?;
    let metadata = Some([("format".to_string(), "pt".to_string())].into());
    safetensors::serialize_to_file(TENSORS.map(|n| (n, &tensor)), metadata, &dir.join("model.safetensors"))?;
    std::fs::write(dir.join("config.json"), r#"{"architectures": ["ToyForCausalLM"], "hidden_size": 256}"#)?;
    Ok(())
}

/// `weightfs mount -f` in a process of its own; ended with the story, however that ends.
struct Daemon(Child);

impl Daemon {
    fn start(model: &Path, mount: &Path, manifest: &Path) -> Outcome<Daemon> {
        let program = std::env::current_exe()?;
        let mut command = Command::new(program);
        command
            .args(["weightfs", "mount", "-f", "--log-level", "warn", "--weights"])
            .arg(manifest)
            .arg(model)
            .arg(mount);
        let mut child = command.spawn()?;
        while !mount.join("status").exists() {
            if let Some(status) = child.try_wait()? {
                return Err(format!("the mount ended before it was ready ({status}); its reason is above").into());
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Ok(Daemon(child))
    }

    fn stop(mut self, mount: &Path) -> Outcome {
        let status = Command::new(std::env::current_exe()?)
            .args(["weightfs", "umount"])
            .arg(mount)
            .stdout(Stdio::null())
            .status()?;
        expect(status.success() && self.0.wait()?.success(), "the mount ends cleanly")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Does nothing after `stop`; on the way out of an error the kernel cleans up what is left of the mount.
        if let (Ok(None), Some(pid)) = (self.0.try_wait(), rustix::process::Pid::from_raw(self.0.id() as i32)) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            let _ = self.0.wait();
        }
    }
}

// -- the engine --

struct Engine {
    child: Child,
    manifest: PathBuf,
    answers: BufReader<std::process::ChildStdout>,
}

impl Engine {
    fn start(model: &Path, scratch: &Path) -> Outcome<Engine> {
        let manifest = scratch.join("engine.json");
        let program = std::env::current_exe()?;
        let mut command = Command::new(program);
        command.arg("engine").arg(model).arg(&manifest).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let answers = BufReader::new(child.stdout.take().ok_or("the engine has no stdout")?);
        let mut engine = Engine { child, manifest, answers };
        engine.answer()?;
        Ok(engine)
    }

    fn tell(&mut self, word: &str) -> Outcome {
        writeln!(self.child.stdin.as_mut().ok_or("the engine has no stdin")?, "{word}")?;
        self.answer()
    }

    fn answer(&mut self) -> Outcome {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        expect(line == "done\n", "the engine answers")
    }
}

/// Owns the weights: a file in /dev/shm, mapped, with both tensors merged into one block as engines like to do, and a
/// manifest that says so. Ends when its stdin closes.
fn engine(model: &Path, manifest: &Path) -> Outcome {
    let bytes = std::fs::read(model.join("model.safetensors"))?;
    let tensors = SafeTensors::deserialize(&bytes)?;
    let shared = tempfile::NamedTempFile::new_in("/dev/shm")?;
    shared.as_file().set_len((TENSORS.len() * BYTES) as u64)?;
    let memory = MmapRaw::map_raw(shared.as_file())?;
    let mut entries = Vec::new();
    for (i, name) in TENSORS.iter().enumerate() {
        let data = tensors.tensor(name)?;
        // SAFETY: the mapping has TENSORS.len() * BYTES bytes, and no reference into it exists.
        unsafe { std::ptr::copy_nonoverlapping(data.data().as_ptr(), memory.as_mut_ptr().add(i * BYTES), BYTES) };
        entries.push(format!(
            r#""{name}": {{"dtype": "F32", "shape": [{ROWS}, {COLUMNS}], "segments": [{{"memory": 0, "offset": {},
               "at": [0, 0], "shape": [{ROWS}, {COLUMNS}], "strides": [{COLUMNS}, 1], "dtype": "F32"}}]}}"#,
            i * BYTES
        ));
    }
    let json = format!(
        r#"{{"weightfs": 1, "engine": {{"name": "quickstart", "version": "1", "pid": {}}}, "model": "{}",
            "memories": [{{"kind": "file", "path": "{}", "bytes": {}}}], "tensors": {{{}}}}}"#,
        std::process::id(),
        model.display(),
        shared.path().display(),
        TENSORS.len() * BYTES,
        entries.join(",")
    );
    // Written whole under another name first: whoever sees the manifest sees all of it.
    let draft = manifest.with_extension("draft");
    File::options().write(true).create_new(true).mode(0o600).open(&draft)?.write_all(json.as_bytes())?;
    std::fs::rename(&draft, manifest)?;
    let lock = File::open(manifest)?;
    println!("done");
    for line in std::io::stdin().lock().lines() {
        if line? == "change" {
            // While a step is half written the manifest is locked, so that no reader is shown half of it.
            flock(&lock, FlockOperation::LockExclusive)?;
            for element in (0..TENSORS.len() * ROWS * COLUMNS).step_by(COLUMNS) {
                let value = -1.0 - element as f32;
                // SAFETY: element * 4 + 4 is within the mapping; an f32 may stand at any multiple of 4.
                unsafe { memory.as_mut_ptr().cast::<f32>().add(element).write_volatile(value) };
            }
            flock(&lock, FlockOperation::Unlock)?;
        }
        println!("done");
    }
    Ok(())
}
