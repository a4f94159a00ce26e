//! A real model, where there is one: WEIGHTFS_MODEL names a model directory, and WEIGHTFS_PYTHON (default python3) has torch
//! and transformers. Without them these tests say that they were skipped.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use weightfs::train::{Architecture, Batch, Config, InMemory, Model, Sample, TextModel};

const TEXT: &str = "The history of the steam engine begins in the first century, when Hero of Alexandria described a device \
                    powered by steam.";
const CHAT: &str = r#"[{"role": "user", "content": "Où est la gare ?"}, {"role": "assistant", "content": "Là-bas, à gauche ✨."},
                       {"role": "user", "content": "Thanks!"}, {"role": "assistant", "content": "You are welcome."}]"#;

const PEER: &str = r#"
import json, sys, torch, transformers
torch.set_num_threads(1)
model, text, chat = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokenizer = transformers.AutoTokenizer.from_pretrained(model)
ids = tokenizer(text)["input_ids"]
said = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
x = torch.tensor([ids])
with torch.no_grad():
    print(json.dumps({"ids": ids, "chat": said, "loss": model(input_ids=x, labels=x).loss.item()}))
"#;

#[test]
fn the_loss_and_the_tokens_of_a_real_model_are_those_of_transformers() {
    let Some(directory) = std::env::var_os("WEIGHTFS_MODEL").map(PathBuf::from) else {
        eprintln!("skipped: WEIGHTFS_MODEL names no model directory");
        return;
    };
    let python = std::env::var("WEIGHTFS_PYTHON").unwrap_or("python3".into());
    let peer = Command::new(python).args(["-c", PEER]).arg(&directory).args([TEXT, CHAT]).output();
    let Some(peer) = peer.ok().filter(|out| out.status.success()) else {
        eprintln!("skipped: WEIGHTFS_PYTHON has no torch and transformers");
        return;
    };
    let peer: serde_json::Value = serde_json::from_slice(&peer.stdout).unwrap();
    let text = TextModel::read(&directory);
    let sample = text.tokens(&Sample::Text(TEXT.into())).unwrap();
    assert_eq!(serde_json::json!(sample.continuation), peer["ids"]);
    let chat = Sample::Chat { messages: serde_json::from_str(CHAT).unwrap(), tools: None };
    let chat = text.tokens(&chat).unwrap();
    let ids: Vec<u32> = chat.context.iter().chain(&chat.continuation).copied().collect();
    assert_eq!(serde_json::json!(ids), peer["chat"]);
    assert!(chat.trained.contains(&false) && chat.trained[0], "the user's second turn lies between two that train");

    let architecture = Architecture::from_config(&Config::read(&directory).unwrap()).unwrap();
    let model = Model::new(architecture, Arc::new(InMemory::load(&directory).unwrap())).unwrap();
    let losses = model.losses(&Batch::pack([(1, &sample)])).unwrap();
    let loss = losses.iter().map(|&l| l as f64).sum::<f64>() / losses.len() as f64;
    let want = peer["loss"].as_f64().unwrap();
    println!("loss {loss}, transformers {want}");
    assert!((loss - want).abs() < 1e-3, "loss {loss}, transformers {want}");
}
