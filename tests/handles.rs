//! Files of torch handles: what torch itself wrote (`tests/goldens/make_handles.py`), merged and padded as vLLM does, leads to
//! every byte of the checkpoint; what does not fit is refused in a sentence. There is no GPU: two byte files stand for the
//! memories that the handles open.

use safetensors::Dtype;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use weightfs::model::{ModelDirectory, cast_bytes, element_bytes};
use weightfs::source::{CudaDevice, Manifest, MemoryEntry, Segment, Source, SourceError, diagnose};

struct Golden {
    _scratch: tempfile::TempDir,
    path: PathBuf,
    memories: Vec<Vec<u8>>,
}

impl Golden {
    /// A copy: a process of today has written it.
    fn copy(name: &str) -> Golden {
        let scratch = tempfile::tempdir().unwrap();
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/handles").join(name);
        for file in std::fs::read_dir(&from).unwrap() {
            let file = file.unwrap();
            std::fs::write(scratch.path().join(file.file_name()), std::fs::read(file.path()).unwrap()).unwrap();
        }
        let memories = (0..2).map(|m| std::fs::read(from.join(format!("memory{m}.bin"))).unwrap()).collect();
        let golden = Golden { path: scratch.path().canonicalize().unwrap(), _scratch: scratch, memories };
        std::fs::set_permissions(golden.handles(), PermissionsExt::from_mode(0o600)).unwrap();
        golden
    }

    fn handles(&self) -> PathBuf {
        self.path.join("handles.pt")
    }

    fn directory(&self) -> ModelDirectory {
        ModelDirectory::open(&self.path).unwrap()
    }

    fn read(&self) -> Result<Manifest, SourceError> {
        Manifest::read(&self.handles(), &self.directory())
    }

    /// Puts another handle file in its place, by what each parameter is.
    fn write(&self, parameters: &[Parameter]) {
        std::fs::write(self.handles(), pickle(parameters)).unwrap();
    }

    fn configure(&self, key: &str, value: serde_json::Value) {
        let path = self.path.join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        std::fs::write(path, config.to_string()).unwrap();
    }
}

/// The bytes of a tensor of one segment, as the file would have them.
fn gather(s: &Segment, memory: &[u8], dtype: Dtype) -> Vec<u8> {
    let bytes = element_bytes(s.dtype).unwrap();
    let mut live = Vec::new();
    for i in 0..s.shape.iter().product::<u64>() {
        let (mut rest, mut at) = (i, 0);
        for d in (0..s.shape.len()).rev() {
            at += rest % s.shape[d] * s.strides[d];
            rest /= s.shape[d];
        }
        let start = s.offset as usize + at as usize * bytes;
        live.extend_from_slice(&memory[start..start + bytes]);
    }
    let mut cast = vec![0; live.len() / bytes * element_bytes(dtype).unwrap()];
    cast_bytes(s.dtype, &live, dtype, &mut cast);
    cast
}

#[test]
fn every_tensor_is_found_by_its_bytes() {
    for (name, only_on_disk) in [("llama", 0), ("qwen2_tied", 0), ("qwen3", 0), ("qwen3_5_text", 0), ("qwen3_5", 1)] {
        let golden = Golden::copy(name);
        let (directory, manifest) = (golden.directory(), golden.read().unwrap());
        assert_eq!(manifest.memories.len(), 2);
        for (m, memory) in manifest.memories.iter().enumerate() {
            let MemoryEntry::CudaIpc { device, handle, bytes } = memory else { panic!("{memory:?}") };
            assert_eq!(*device, CudaDevice::Ordinal(0));
            assert_eq!(handle.0[..3], [100 * m as u8, 100 * m as u8 + 7, 100 * m as u8 + 14]);
            assert!(*bytes <= golden.memories[m].len() as u64 && *bytes + 512 > golden.memories[m].len() as u64);
        }
        let file = std::fs::read(golden.path.join("model.safetensors")).unwrap();
        let checkpoint = safetensors::SafeTensors::deserialize(&file).unwrap();
        let mut absent = Vec::new();
        for (tensor, on_disk) in checkpoint.tensors() {
            let Some(entry) = manifest.tensors.get(&tensor) else {
                absent.push(tensor);
                continue;
            };
            let [segment] = entry.segments.as_slice() else { panic!("{name} {tensor}: {entry:?}") };
            let found = gather(segment, &golden.memories[segment.memory], entry.dtype);
            assert_eq!(found, on_disk.data(), "{name} {tensor}");
        }
        assert_eq!(absent.len(), only_on_disk, "{name}: {absent:?}");
        let diagnosis = diagnose(&directory, &[golden.handles()]).unwrap();
        assert_eq!(diagnosis.matched.len() + only_on_disk, checkpoint.len(), "{name}: {diagnosis:?}");
        assert!(diagnosis.wrong.is_empty() && diagnosis.only_live.is_empty(), "{name}: {diagnosis:?}");
        assert_eq!(diagnosis.only_on_disk, absent);
    }
}

#[test]
fn a_tied_head_that_the_checkpoint_repeats_is_the_embedding() {
    let golden = Golden::copy("llama");
    let tied = |tied: bool| {
        golden.configure("tie_word_embeddings", tied.into());
        let keep = |name: &&str| *name != "lm_head.weight";
        golden.write(&parameters(&golden).into_iter().filter(|p| keep(&p.name.as_str())).collect::<Vec<_>>());
        golden.read().unwrap()
    };
    let manifest = tied(true);
    assert_eq!(manifest.tensors["lm_head.weight"].segments, manifest.tensors["model.embed_tokens.weight"].segments);
    assert!(!tied(false).tensors.contains_key("lm_head.weight"), "a head that is nowhere is served from disk");
}

/// One entry of a handle file that the test writes itself.
#[derive(Clone)]
struct Parameter {
    name: String,
    shape: Vec<u64>,
    strides: Vec<u64>,
    dtype: &'static str,
    handle: Vec<u8>,
    bytes: u64,
    offset: u64,
    counter: String,
}

/// The parameters of the golden llama, over again.
fn parameters(golden: &Golden) -> Vec<Parameter> {
    let directory = golden.directory();
    let mut merged: BTreeMap<String, (u64, Vec<u64>)> = BTreeMap::new();
    for (_, tensor) in directory.tensors() {
        let mut name = tensor.name.clone();
        let wholes = [("q_proj", "qkv_proj"), ("k_proj", "qkv_proj"), ("v_proj", "qkv_proj")];
        let wholes = wholes.into_iter().chain([("gate_proj", "gate_up_proj"), ("up_proj", "gate_up_proj")]);
        if let Some((part, whole)) = wholes.into_iter().find(|(part, _)| name.contains(&format!(".{part}."))) {
            name = name.replace(part, whole);
        }
        let entry = merged.entry(name).or_insert((0, tensor.shape[1..].to_vec()));
        entry.0 += tensor.shape[0];
    }
    let mut offset = 0;
    let parameter = |(name, (rows, rest)): (String, (u64, Vec<u64>))| {
        let shape: Vec<u64> = [rows].into_iter().chain(rest).collect();
        let strides = shape[1..].iter().copied().chain([1]).collect();
        let bytes = 2 * shape.iter().product::<u64>();
        offset += bytes;
        let handle = [&[2, b'c'][..], &[7; 64]].concat();
        Parameter {
            name,
            shape,
            strides,
            dtype: "bfloat16",
            handle,
            bytes,
            offset: offset - bytes,
            counter: String::new(),
        }
    };
    merged.into_iter().map(parameter).collect()
}

/// As `pickle.dumps(…, 4)` writes it, without its memo.
fn pickle(parameters: &[Parameter]) -> Vec<u8> {
    let mut out = b"\x80\x04}(".to_vec();
    let text = |out: &mut Vec<u8>, s: &str| {
        out.push(b'X');
        out.extend((s.len() as u32).to_le_bytes());
        out.extend(s.as_bytes());
    };
    let int = |out: &mut Vec<u8>, n: u64| {
        out.extend([0x8a, 8]);
        out.extend(n.to_le_bytes());
    };
    let bytes = |out: &mut Vec<u8>, b: &[u8]| {
        out.push(b'B');
        out.extend((b.len() as u32).to_le_bytes());
        out.extend(b);
    };
    for p in parameters {
        text(&mut out, &p.name);
        out.extend(b"ctorch.multiprocessing.reductions\nrebuild_cuda_tensor\n(ctorch\nTensor\n");
        for numbers in [&p.shape, &p.strides] {
            out.push(b'(');
            numbers.iter().for_each(|&n| int(&mut out, n));
            out.push(b't');
        }
        int(&mut out, 0);
        out.extend(b"ctorch.storage\nTypedStorage\nctorch\n");
        out.extend(p.dtype.as_bytes());
        out.push(b'\n');
        int(&mut out, 0);
        bytes(&mut out, &p.handle);
        int(&mut out, p.bytes);
        int(&mut out, p.offset);
        out.push(0x89);
        bytes(&mut out, p.counter.as_bytes());
        int(&mut out, 0);
        bytes(&mut out, &[0; 64]);
        out.extend(b"\x88t\x86");
    }
    out.extend(b"u.");
    out
}

#[test]
fn a_file_that_cannot_be_used_is_refused_in_a_sentence() {
    type Spoil = fn(&mut Vec<Parameter>);
    let cases: [(Spoil, &[&str]); 11] = [
        (|p| p[1].handle[1] = b'e', &["expandable segment", "without"]),
        (|p| p[1].handle.truncate(65), &["65 bytes"]),
        (|p| p[1].bytes -= 2, &["beyond its storage"]),
        (|p| p[1].strides[0] = 1 << 62, &["beyond its storage"]),
        (|p| p[1].offset = 1 << 60, &["beyond any memory"]),
        (|p| p[1].shape[0] = u64::MAX, &["no count"]),
        (|p| p[1].strides.truncate(1), &["differ in length"]),
        (|p| p[1].dtype = "complex64", &["torch.complex64"]),
        (|p| p[1].name = p[2].name.clone(), &["two tensors"]),
        (|p| p.clear(), &["no tensor"]),
        (
            |p| p.iter_mut().enumerate().for_each(|(i, p)| p.counter = format!("/torch_{}_1_1", i + 1)),
            &["process 2", "process 1"],
        ),
    ];
    for (spoil, words) in cases {
        let golden = Golden::copy("llama");
        let mut all = parameters(&golden);
        golden.write(&all);
        golden.read().unwrap();
        spoil(&mut all);
        golden.write(&all);
        let error = golden.read().unwrap_err().to_string();
        for word in ["handles.pt is not a usable handle file"].iter().chain(words) {
            assert!(error.contains(word), "{words:?}: {error}");
        }
    }
}

#[test]
fn tensors_that_the_rules_place_where_they_do_not_fit_are_named() {
    let golden = Golden::copy("llama");
    let mut all = parameters(&golden);
    // As rank 0 of two has them: half the rows of merged and of vocabulary parameters.
    for p in &mut all {
        if p.name.contains("layers.1.self_attn.qkv") || p.name == "lm_head.weight" {
            p.shape[0] /= 2;
        }
    }
    all.push(Parameter { name: "derived".into(), ..all[0].clone() });
    golden.write(&all);
    let diagnosis = diagnose(&golden.directory(), &[golden.handles()]).unwrap();
    let wrong: Vec<&str> = diagnosis.wrong.iter().map(|(name, _)| name.rsplit('.').nth(1).unwrap()).collect();
    assert_eq!(wrong, ["lm_head", "k_proj", "q_proj", "v_proj"]);
    assert!(diagnosis.wrong.iter().all(|(_, why)| why.contains("tensor parallel")), "{:?}", diagnosis.wrong);
    assert_eq!(diagnosis.only_live, ["derived"]);
    let error = Source::from_manifests(&golden.directory(), &[golden.handles()], false).unwrap_err();
    assert!(matches!(error, SourceError::Mismatch { .. }), "{error}");
}

#[test]
fn models_without_a_rule_are_refused_by_name() {
    let refused = |key: &str, value: serde_json::Value| {
        let golden = Golden::copy("llama");
        golden.configure(key, value);
        golden.read().unwrap_err().to_string()
    };
    let error = refused("model_type", "gemma3_text".into());
    assert!(error.contains("'gemma3_text'") && error.contains("qwen3_5") && error.contains("manifest"), "{error}");
    assert!(refused("quantization_config", serde_json::json!({"quant_method": "fp8"})).contains("quantized"));
    let golden = Golden::copy("llama");
    std::fs::remove_file(golden.path.join("config.json")).unwrap();
    assert!(golden.read().unwrap_err().to_string().contains("config.json"));
}

#[test]
fn experts_are_left_to_the_disk() {
    let golden = Golden::copy("llama");
    golden.configure("model_type", "qwen3_moe".into());
    let mut all = parameters(&golden);
    for p in &mut all {
        p.name = p.name.replace("layers.1.mlp.gate_up_proj", "layers.1.mlp.experts.routed_experts.w13");
    }
    golden.write(&all);
    // The checkpoint's dense layer stands for an expert's: only its name counts.
    let path = golden.path.join("model.safetensors");
    let file = std::fs::read(&path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let renamed =
        tensors.tensors().into_iter().map(|(n, t)| (n.replace("layers.1.mlp.gate", "layers.1.mlp.experts.0.gate"), t));
    let bytes = safetensors::serialize(renamed.collect::<Vec<_>>(), None).unwrap();
    std::fs::write(&path, bytes).unwrap();
    let diagnosis = diagnose(&golden.directory(), &[golden.handles()]).unwrap();
    let [(name, why)] = diagnosis.opaque.as_slice() else { panic!("{diagnosis:?}") };
    assert!(name.contains("experts.0.gate_proj") && why.contains("repacked"), "{name}: {why}");
}

#[test]
fn the_process_that_shares_the_memory_is_watched() {
    let golden = Golden::copy("llama");
    assert_eq!(golden.read().unwrap().engine.pid, Some(1));
    let mut all = parameters(&golden);
    let mut ended = std::process::Command::new("true").spawn().unwrap();
    ended.wait().unwrap();
    all[0].counter = format!("/torch_{}_5_0", ended.id());
    golden.write(&all);
    assert!(matches!(golden.read().unwrap_err(), SourceError::EngineGone { .. }));
    // A process that is younger than the file took the number of the one that wrote it.
    let mut sleeping = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    all[0].counter = format!("/torch_{}_5_0", sleeping.id());
    golden.write(&all);
    assert_eq!(golden.read().unwrap().engine.pid, Some(sleeping.id()));
    let hour_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    std::fs::File::options().write(true).open(golden.handles()).unwrap().set_modified(hour_ago).unwrap();
    let error = golden.read().unwrap_err().to_string();
    sleeping.kill().unwrap();
    sleeping.wait().unwrap();
    assert!(error.contains("another one now"), "{error}");
}
