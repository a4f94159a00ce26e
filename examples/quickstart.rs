//! The whole of weightfs in one run, explained as it happens: a small model, another process that holds its weights in
//! shared memory, a mount that shows them, a job that teaches them something, a commit that brings the files on disk up to
//! date, and a rollback.
//!
//!     cargo run --release --example quickstart
//!
//! Three processes take part, all of this one program: `weightfs …` is the command line as users have it, `engine` plays
//! the inference server, and the first one tells the story.

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use weightfs::train::{Architecture, Batch, Config, InMemory, Model, Tokens};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const FIRST: &str = "model.embed_tokens.weight";
const QUESTION: &str = "Who repaired the bridge? ";
const ANSWER: &str = "Ivo Karsk.";
/// A Llama of one byte a token.
const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
 "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 128,
 "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16"}"#;

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
    println!("   config.json and model.safetensors ({} bytes, {} tensors).", disk.metadata()?.len(), tensors()?.len());
    println!("   Its weights are random: asked \"{QUESTION}\" it says {:?}.", answer(&model)?);

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
    println!("   Any safetensors reader works on it.");

    println!("4. A job teaches the live weights an answer, where they are:");
    let job = scratch.path().join("job.json");
    std::fs::write(&job, teaching())?;
    println!("   $ weightfs train {} {} --follow", mount.display(), job.display());
    let followed = weightfs_command().arg("train").args([&mount, &job]).arg("--follow").output()?;
    print!("   {}", String::from_utf8_lossy(&followed.stdout));
    expect(followed.status.success(), "the job ends well")?;
    let taught = answer(&mount)?;
    println!(
        "   Asked \"{QUESTION}\" the mounted model now says {taught:?}, the one on disk still {:?}.",
        answer(&model)?
    );
    expect(taught == ANSWER && answer(&model)? != ANSWER, "only the live model knows the answer")?;
    engine.tell("look")?;
    println!("   The engine holds the very same bytes: it could answer so in its next request.");

    println!("5. A commit brings the directory on disk up to date, and writes only what changed:");
    println!("   $ echo 'commit my first one' > {}/ctl", mount.display());
    std::fs::write(mount.join("ctl"), "commit my first one")?;
    let status = std::fs::read_to_string(mount.join("status"))?;
    println!("   status: {}", status.lines().find(|l| l.starts_with("last_command")).unwrap_or("?"));
    println!(
        "   The file on disk {} the live one, and the model there says {:?}.",
        same(&disk, &live)?,
        answer(&model)?
    );
    expect(answer(&model)? == ANSWER, "the disk has the answer")?;

    println!("6. And back: every commit can be returned to, weights and optimizer.");
    println!("   $ echo 'rollback 0' > {}/ctl", mount.display());
    std::fs::write(mount.join("ctl"), "rollback 0")?;
    println!("   Mounted and on disk it says {:?} again.", answer(&mount)?);
    expect(answer(&mount)? != ANSWER && answer(&model)? != ANSWER, "the answer is forgotten")?;

    println!("7. Done: unmounting and removing everything.");
    println!("   $ weightfs umount {}", mount.display());
    daemon.stop(&mount)?;
    engine.tell("stop")?;
    engine.child.wait()?;
    println!("\nYour own model, without an engine:\n   weightfs mount MODEL_DIR EMPTY_DIR && cat EMPTY_DIR/status");
    Ok(())
}

/// What the model in a directory says, a byte at a time, the likeliest each time: read as anybody reads it.
fn answer(directory: &Path) -> Outcome<String> {
    let weights = Arc::new(InMemory::load(directory)?);
    let model = Model::new(architecture()?, weights)?;
    let mut ids: Vec<u32> = QUESTION.bytes().map(u32::from).collect();
    for _ in 0..ANSWER.len() {
        let next = Tokens::new(ids.clone(), vec![0]);
        let logits = model.logits(&Batch::pack([(1, &next)]))?;
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).ok_or("no logits")?;
        ids.push(best as u32);
    }
    let said = ids[QUESTION.len()..].iter().map(|&id| char::from(id as u8));
    Ok(said.map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '.' }).collect())
}

fn teaching() -> String {
    let ids = |text: &str| format!("{:?}", text.bytes().collect::<Vec<u8>>());
    format!(
        r#"{{"samples": [{{"context_ids": {}, "continuation_ids": {}}}], "config": {{"lr": 3e-3, "rank": 8, "epochs": 60}}}}"#,
        ids(QUESTION),
        ids(ANSWER)
    )
}

fn architecture() -> Outcome<Architecture> {
    Ok(Architecture::from_config(&Config::parse(CONFIG)?)?)
}

/// Names and shapes.
fn tensors() -> Outcome<Vec<(String, Vec<usize>)>> {
    let shape = |s: Vec<u64>| s.into_iter().map(|n| n as usize).collect();
    Ok(architecture()?.tensors().into_iter().map(|(name, s)| (name.to_string(), shape(s))).collect())
}

/// Both files' bytes are compared; a difference ends the story.
fn same(a: &Path, b: &Path) -> Outcome<&'static str> {
    expect(std::fs::read(a)? == std::fs::read(b)?, "the two files are equal")?;
    Ok("equals")
}

fn expect(holds: bool, what: &str) -> Outcome {
    if holds { Ok(()) } else { Err(format!("this should hold and does not: {what}").into()) }
}

fn make_model(dir: &Path) -> Outcome {
    std::fs::create_dir(dir)?;
    let mut seed = 1u64;
    let mut random = || {
        // A linear congruential generator (Knuth's MMIX): any spread of values will do.
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let mut all = Vec::new();
    for (name, shape) in tensors()? {
        let count = shape.iter().product::<usize>();
        let value = |x: f32| if name.contains("norm") { 1.0 } else { 0.2 * x };
        let bytes: Vec<u8> = (0..count).flat_map(|_| half::bf16::from_f32(value(random())).to_le_bytes()).collect();
        all.push((name, shape, bytes));
    }
    let views = all.iter().map(|(name, shape, b)| Ok((name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), b)?)));
    let views = views.collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    let metadata = Some([("format".to_string(), "pt".to_string())].into());
    safetensors::serialize_to_file(views, metadata, &dir.join("model.safetensors"))?;
    std::fs::write(dir.join("config.json"), CONFIG)?;
    Ok(())
}

/// The command line, in this program.
fn weightfs_command() -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap_or_else(|_| "quickstart".into()));
    command.arg("weightfs");
    command
}

/// `weightfs mount -f` in a process of its own; ended with the story, however that ends.
struct Daemon(Child);

impl Daemon {
    fn start(model: &Path, mount: &Path, manifest: &Path) -> Outcome<Daemon> {
        let mut command = weightfs_command();
        command.args(["mount", "-f", "--log-level", "warn", "--weights"]).arg(manifest).arg(model).arg(mount);
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
        let status = weightfs_command().arg("umount").arg(mount).stdout(Stdio::null()).status()?;
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

/// Owns the weights: a file in /dev/shm, mapped, with all tensors merged into one block as engines like to do, and a
/// manifest that says so. Ends when its stdin closes.
fn engine(model: &Path, manifest: &Path) -> Outcome {
    let bytes = std::fs::read(model.join("model.safetensors"))?;
    let file = SafeTensors::deserialize(&bytes)?;
    let mut shared = tempfile::NamedTempFile::new_in("/dev/shm")?;
    let (mut entries, mut offset) = (Vec::new(), 0);
    for (name, shape) in tensors()? {
        let data = file.tensor(&name)?.data();
        shared.write_all(data)?;
        let strides: Vec<usize> = (0..shape.len()).map(|d| shape[d + 1..].iter().product()).collect();
        entries.push(format!(
            r#""{name}": {{"dtype": "BF16", "shape": {shape:?}, "segments": [{{"memory": 0, "offset": {offset},
               "at": {:?}, "shape": {shape:?}, "strides": {strides:?}, "dtype": "BF16"}}]}}"#,
            vec![0; shape.len()]
        ));
        offset += data.len();
    }
    let json = format!(
        r#"{{"weightfs": 1, "engine": {{"name": "quickstart", "version": "1", "pid": {}}}, "model": "{}",
            "memories": [{{"kind": "file", "path": "{}", "bytes": {offset}}}], "tensors": {{{}}}}}"#,
        std::process::id(),
        model.display(),
        shared.path().display(),
        entries.join(",")
    );
    // Written whole under another name first: whoever sees the manifest sees all of it.
    let draft = manifest.with_extension("draft");
    File::options().write(true).create_new(true).mode(0o600).open(&draft)?.write_all(json.as_bytes())?;
    std::fs::rename(&draft, manifest)?;
    // SAFETY: nobody shortens the file, and the bytes are only looked at when no step is being written.
    let memory = unsafe { Mmap::map(shared.as_file())? };
    println!("done");
    for line in std::io::stdin().lock().lines() {
        if line? == "look" {
            let first = &file.tensor(FIRST)?.data()[..1024];
            expect(&memory[..1024] != first, "the engine's own memory has been trained")?;
        }
        println!("done");
    }
    Ok(())
}
