//! Samples as jobs write them, and as token ids with what of them trains.

use super::chat::ChatTemplate;
use super::pack::Tokens;
use crate::model::read_small;
use serde_json::{Map, Value};
use std::path::Path;
use tokenizers::Tokenizer;

/// One sample of a job.
#[derive(Debug, Clone, PartialEq)]
pub enum Sample {
    Ids { context: Vec<u32>, continuation: Vec<u32> },
    Pair { context: String, continuation: String },
    Chat { messages: Vec<Value>, tools: Option<Value> },
    Text(String),
}

const FORMS: &str = "context_ids and continuation_ids, context and continuation, messages (and tools), or text";

impl Sample {
    /// Reads one object. Errors name the key.
    pub fn parse(value: &Value) -> Result<Sample, String> {
        let Value::Object(object) = value else { return Err(format!("it is no object; a sample has {FORMS}")) };
        let has = |key: &str| object.contains_key(key);
        let only = |keys: &[&str]| match object.keys().find(|k| !keys.contains(&k.as_str())) {
            Some(other) => Err(format!("unknown key '{other}' beside {}; a sample has {FORMS}", keys[0])),
            None => Ok(()),
        };
        if has("continuation_ids") || has("context_ids") {
            only(&["continuation_ids", "context_ids"])?;
            let context = if has("context_ids") { ids(object, "context_ids")? } else { vec![] };
            Ok(Sample::Ids { context, continuation: ids(object, "continuation_ids")? })
        } else if has("continuation") || has("context") {
            only(&["continuation", "context"])?;
            let context = if has("context") { text(object, "context")? } else { String::new() };
            Ok(Sample::Pair { context, continuation: text(object, "continuation")? })
        } else if has("messages") {
            only(&["messages", "tools"])?;
            let messages = object["messages"].as_array().ok_or("messages is no list")?.clone();
            for (i, message) in messages.iter().enumerate() {
                if !message["role"].is_string() {
                    return Err(format!("messages[{i}] has no role"));
                }
            }
            Ok(Sample::Chat { messages, tools: object.get("tools").filter(|t| !t.is_null()).cloned() })
        } else if has("text") {
            only(&["text"])?;
            Ok(Sample::Text(text(object, "text")?))
        } else {
            match object.keys().next() {
                Some(key) => Err(format!("unknown key '{key}'; a sample has {FORMS}")),
                None => Err(format!("it is empty; a sample has {FORMS}")),
            }
        }
    }
}

fn text(object: &Map<String, Value>, key: &str) -> Result<String, String> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(format!("{key} is {other}, not text")),
        None => Err(format!("it has no {key}")),
    }
}

fn ids(object: &Map<String, Value>, key: &str) -> Result<Vec<u32>, String> {
    let Some(value) = object.get(key) else { return Err(format!("it has no {key}")) };
    let list = value.as_array().ok_or_else(|| format!("{key} is no list of token ids"))?;
    let id = |(i, v): (usize, &Value)| {
        v.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| format!("{key}[{i}] is {v}, not a token id"))
    };
    list.iter().enumerate().map(id).collect()
}

/// What turns text into ids: the tokenizer of a model directory and its chat template, each where there is one.
#[derive(Debug)]
pub struct TextModel {
    tokenizer: Option<Tokenizer>,
    template: Option<ChatTemplate>,
    /// Why either is missing, for the sample that needs it.
    no_tokenizer: String,
    no_template: String,
}

/// Of a model without tokenizer and template: samples are token ids.
impl Default for TextModel {
    fn default() -> TextModel {
        TextModel {
            tokenizer: None,
            template: None,
            no_tokenizer: "the model has no tokenizer.json: give token ids".into(),
            no_template: "the model has no chat template: give context and continuation".into(),
        }
    }
}

impl TextModel {
    /// Reads what is there. A tokenizer that cannot be read matters only to samples of text.
    pub fn read(directory: &Path) -> TextModel {
        let none = TextModel::default();
        let path = directory.join("tokenizer.json");
        let unusable = |e: &dyn std::fmt::Display| format!("{} cannot be used ({e}): give token ids", path.display());
        let (tokenizer, no_tokenizer) = match read_small(&path) {
            Ok(bytes) => match Tokenizer::from_bytes(bytes) {
                Ok(mut tokenizer) => {
                    // As transformers does: what the file says of cutting and padding is of the run that wrote it.
                    let _ = tokenizer.with_truncation(None);
                    tokenizer.with_padding(None);
                    (Some(tokenizer), String::new())
                }
                Err(e) => (None, unusable(&e)),
            },
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => (None, none.no_tokenizer),
            Err(e) => (None, unusable(&e)),
        };
        let (template, no_template) = match ChatTemplate::read(directory) {
            Ok(Some(template)) => (Some(template), String::new()),
            Ok(None) => (None, none.no_template),
            Err(why) => (None, why),
        };
        TextModel { tokenizer, template, no_tokenizer, no_template }
    }

    fn encode(&self, text: &str, special: bool) -> Result<tokenizers::Encoding, String> {
        let tokenizer = self.tokenizer.as_ref().ok_or(&self.no_tokenizer)?;
        tokenizer.encode(text, special).map_err(|e| format!("the tokenizer: {e}"))
    }

    /// The ids of a sample.
    pub fn tokens(&self, sample: &Sample) -> Result<Tokens, String> {
        match sample {
            Sample::Ids { context, continuation } => Ok(Tokens::new(context.clone(), continuation.clone())),
            Sample::Text(text) => Ok(Tokens::new(vec![], self.encode(text, true)?.get_ids().to_vec())),
            Sample::Pair { context, continuation } => {
                if continuation.is_empty() {
                    return Err("its continuation is empty".into());
                }
                // The context by itself, as it is when the model is asked; then what follows it in the whole, where the
                // whole begins so (some tokenizers set a space before any text), or else the continuation by itself.
                let before = self.encode(context, true)?.get_ids().to_vec();
                let whole = self.encode(&format!("{context}{continuation}"), true)?.get_ids().to_vec();
                let after = match whole.strip_prefix(before.as_slice()) {
                    Some(after) if !after.is_empty() => after.to_vec(),
                    _ => self.encode(continuation, false)?.get_ids().to_vec(),
                };
                Ok(Tokens::new(before, after))
            }
            Sample::Chat { messages, tools } => self.chat(messages, tools.as_ref()),
        }
    }

    fn chat(&self, messages: &[Value], tools: Option<&Value>) -> Result<Tokens, String> {
        let template = self.template.as_ref().ok_or(&self.no_template)?;
        let last = messages.iter().rposition(|m| m["role"] == "assistant");
        let last = last.ok_or("its messages have no turn of the assistant to train")?;
        let rendered = template.render(&messages[..=last], tools)?;
        // The template writes special tokens itself.
        let encoding = self.encode(&rendered.text, false)?;
        let said = |&(start, end): &(usize, usize)| rendered.said.iter().any(|s| start < s.end && s.start < end);
        let trained: Vec<bool> = encoding.get_offsets().iter().map(said).collect();
        let first = trained.iter().position(|&t| t).ok_or("no token of it is the assistant's")?;
        let ids = encoding.get_ids();
        Ok(Tokens {
            context: ids[..first].to_vec(),
            continuation: ids[first..].to_vec(),
            trained: trained[first..].to_vec(),
        })
    }
}

/// Checks a sample's ids against the model, before anything is touched.
pub fn check(tokens: &Tokens, vocabulary: usize, longest: usize) -> Result<(), String> {
    let place = |i: usize| match i.checked_sub(tokens.context.len()) {
        None => format!("context id {i}"),
        Some(i) => format!("continuation id {i}"),
    };
    let all = tokens.context.iter().chain(&tokens.continuation);
    if let Some((i, id)) = all.enumerate().find(|(_, id)| **id as usize >= vocabulary) {
        return Err(format!("{} is {id}, but the vocabulary ends at {}", place(i), vocabulary - 1));
    }
    if tokens.continuation.is_empty() {
        return Err("its continuation is empty".into());
    }
    if tokens.targets() == 0 {
        return Err(match tokens.context.is_empty() {
            true => "it has one token and no context to predict it from".into(),
            false => "nothing of it trains".into(),
        });
    }
    if tokens.len() > longest {
        return Err(format!("it has {} tokens, more than the limit of {longest}", tokens.len()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_form_is_read() {
        assert_eq!(
            Sample::parse(&json!({"continuation_ids": [1, 2]})),
            Ok(Sample::Ids { context: vec![], continuation: vec![1, 2] })
        );
        assert_eq!(
            Sample::parse(&json!({"context": "a", "continuation": "b"})),
            Ok(Sample::Pair { context: "a".into(), continuation: "b".into() })
        );
        assert_eq!(Sample::parse(&json!({"text": "a"})), Ok(Sample::Text("a".into())));
        assert!(Sample::parse(&json!({"messages": [{"role": "user", "content": "x"}]})).is_ok());
    }

    #[test]
    fn mistakes_are_named() {
        for (sample, word) in [
            (json!({}), "empty"),
            (json!([1]), "no object"),
            (json!({"contxt": "a"}), "contxt"),
            (json!({"context": "a", "continuation": "b", "id": 3}), "'id'"),
            (json!({"context": "a"}), "continuation"),
            (json!({"continuation_ids": [1, -2]}), "continuation_ids[1] is -2"),
            (json!({"continuation_ids": [1.5]}), "1.5"),
            (json!({"continuation_ids": "1 2"}), "no list"),
            (json!({"text": 5}), "5"),
            (json!({"messages": [{"content": "x"}]}), "messages[0] has no role"),
        ] {
            let error = Sample::parse(&sample).unwrap_err();
            assert!(error.contains(word), "{sample}: {error}");
        }
    }

    #[test]
    fn ids_are_checked_against_the_model() {
        let check =
            |context: &[u32], continuation: &[u32]| check(&Tokens::new(context.to_vec(), continuation.to_vec()), 10, 5);
        assert_eq!(check(&[1], &[9]), Ok(()));
        assert!(
            check(&[1, 2], &[3, 10]).unwrap_err().contains("continuation id 1 is 10, but the vocabulary ends at 9")
        );
        assert!(check(&[1, 12], &[3]).unwrap_err().contains("context id 1 is 12"));
        assert!(check(&[1], &[]).unwrap_err().contains("empty"));
        assert!(check(&[], &[1]).unwrap_err().contains("one token"));
        assert!(check(&[1, 2, 3], &[4, 5, 6]).unwrap_err().contains("6 tokens, more than the limit of 5"));
    }

    #[test]
    fn a_tokenizer_file_neither_cuts_nor_pads_samples() {
        let directory = tempfile::tempdir().unwrap();
        let file = r#"{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "Whitespace"},
            "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
            "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "a"},
            "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2}, "unk_token": "a"}}"#;
        std::fs::write(directory.path().join("tokenizer.json"), file).unwrap();
        let text = TextModel::read(directory.path());
        for (words, ids) in [("b c b c b", vec![1, 2, 1, 2, 1]), ("c b", vec![2, 1])] {
            assert_eq!(text.tokens(&Sample::Text(words.into())).unwrap().continuation, ids);
        }
    }

    #[test]
    fn a_pipe_is_not_waited_for_and_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = |name: &str| {
            let path = directory.path().join(name);
            rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        };
        let no_template = || {
            let chat = Sample::Chat { messages: vec![json!({"role": "assistant", "content": "a"})], tools: None };
            TextModel::read(directory.path()).tokens(&chat).unwrap_err()
        };
        for name in ["tokenizer.json", "chat_template.jinja", "tokenizer_config.json"] {
            pipe(name);
            let error = match name {
                "tokenizer.json" => TextModel::read(directory.path()).tokens(&Sample::Text("a".into())).unwrap_err(),
                _ => no_template(),
            };
            assert!(error.contains(name) && error.contains("not a regular file"), "{error}");
        }
        pipe("config.json");
        let error = super::super::Config::read(directory.path()).unwrap_err().to_string();
        assert!(error.contains("config.json: it is not a regular file"), "{error}");
    }

    #[test]
    fn text_without_a_tokenizer_says_what_is_missing() {
        let none = TextModel::read(Path::new("/nonexistent"));
        assert!(none.tokens(&Sample::Text("a".into())).unwrap_err().contains("tokenizer.json"));
        let chat = Sample::Chat { messages: vec![], tools: None };
        assert!(none.tokens(&chat).unwrap_err().contains("chat template"));
        assert!(none.tokens(&Sample::Ids { context: vec![], continuation: vec![1, 2] }).is_ok());
    }
}
