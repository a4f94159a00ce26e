//! Chat messages as text, by the model's own template, with the parts that an assistant said.
//!
//! The environment is that of transformers' `chat_template_utils.py`: trimmed blocks, loop controls, `tojson` as Python's
//! `json.dumps`, `raise_exception`, `strftime_now`, Python's methods on strings and dicts. `{% generation %}` marks what the
//! assistant says; a template without it is rendered up to each of the assistant's turns, and the difference is the turn.

use crate::model::read_small_text;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, State};
use serde_json::Value as Json;
use std::ops::Range;
use std::path::Path;

/// Brackets around what `{% generation %}` encloses: private-use characters, which no template writes, and no message may.
const OPEN: char = '\u{E000}';
const CLOSE: char = '\u{E001}';

const CONFIG: &str = "tokenizer_config.json";

/// Instructions that one rendering may take; a template that loops for longer would keep the daemon. Qwen3's takes a hundred a
/// message, tool calls included, so this is a conversation of a million messages; one that looks at every later message for each (as
/// gpt-oss's does), some thousands. They take ten seconds.
const INSTRUCTIONS: u64 = 100_000_000;

/// A model's chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token` and its like, as the tokenizer's config names them.
    tokens: Vec<(String, String)>,
    marks_turns: bool,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    /// Byte ranges that the assistant said, in order.
    pub said: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// The template of a model directory: `chat_template.jinja`, or the key of tokenizer_config.json. `None` without one.
    pub fn read(directory: &Path) -> Result<Option<ChatTemplate>, String> {
        let text = |name: &str| {
            let path = directory.join(name);
            match read_small_text(&path) {
                Ok(text) => Ok(Some(text)),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(format!("{}: {e}", path.display())),
            }
        };
        let config: Json = match text(CONFIG)? {
            Some(text) => {
                serde_json::from_str(&text).map_err(|e| format!("{}: {e}", directory.join(CONFIG).display()))?
            }
            None => Json::Null,
        };
        let source = match text("chat_template.jinja")? {
            Some(text) => Some(text),
            None => match &config["chat_template"] {
                Json::String(text) => Some(text.clone()),
                // Several by name: the one called default.
                Json::Array(all) => {
                    let named = all.iter().find(|t| t["name"] == "default");
                    named.and_then(|t| t["template"].as_str()).map(String::from)
                }
                _ => None,
            },
        };
        let Some(source) = source else { return Ok(None) };
        let token = |key: &str| match &config[key] {
            Json::String(text) => Some(text.clone()),
            Json::Object(token) => token.get("content")?.as_str().map(String::from),
            _ => None,
        };
        let names = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];
        let tokens = names.iter().filter_map(|&n| Some((n.to_string(), token(n)?))).collect();
        ChatTemplate::new(&source, tokens).map(Some)
    }

    pub fn new(source: &str, tokens: Vec<(String, String)>) -> Result<ChatTemplate, String> {
        // Jinja reads any line end as \n; minijinja does not.
        let (source, marks_turns) = mark_turns(&source.replace("\r\n", "\n"));
        let mut environment = Environment::new();
        let syntax = minijinja::syntax::SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the default delimiters are distinct"));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(INSTRUCTIONS));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", strftime_now);
        environment.add_function("__turn", |state: &mut State, kwargs: Kwargs| -> Result<Value, Error> {
            let caller: Value = kwargs.get("caller")?;
            let said = caller.call(state, &[])?;
            Ok(Value::from(format!("{OPEN}{said}{CLOSE}")))
        });
        environment.add_template_owned("chat", source).map_err(|e| format!("the chat template: {}", sentence(&e)))?;
        Ok(ChatTemplate { environment, tokens, marks_turns })
    }

    fn text(&self, messages: &[Json], tools: Option<&Json>, prompt: bool) -> Result<String, String> {
        let mut context = serde_json::Map::new();
        context.extend(self.tokens.iter().map(|(name, text)| (name.clone(), Json::String(text.clone()))));
        context.insert("messages".into(), Json::Array(messages.to_vec()));
        context.insert("add_generation_prompt".into(), Json::Bool(prompt));
        if let Some(tools) = tools {
            context.insert("tools".into(), tools.clone());
        }
        let template = self.environment.get_template("chat").map_err(|e| sentence(&e))?;
        template.render(Value::from(Serde(context))).map_err(|e| format!("the chat template: {}", sentence(&e)))
    }

    /// Renders a conversation and finds what the assistant said in it.
    pub fn render(&self, messages: &[Json], tools: Option<&Json>) -> Result<Rendered, String> {
        if self.marks_turns {
            let all = messages.iter().enumerate().map(|(i, m)| (format!("messages[{i}]"), m));
            for (name, value) in all.chain(tools.map(|tools| ("tools".to_string(), tools))) {
                if let Some(mark) = value.to_string().chars().find(|c| [OPEN, CLOSE].contains(c)) {
                    let code = mark as u32;
                    return Err(format!(
                        "{name} has the character U+{code:04X}, with which the assistant's turns are marked"
                    ));
                }
            }
        }
        let text = self.text(messages, tools, false)?;
        if self.marks_turns {
            return Ok(unmark(&text));
        }
        let mut said = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            if message["role"] != "assistant" {
                continue;
            }
            // What stands before the turn: as the model is asked for it, or, in a template that asks otherwise than it
            // writes, just as the conversation until then.
            let before = |prompt| self.text(&messages[..i], tools, prompt).ok();
            let starts = |t: &String| text.starts_with(t.as_str());
            let start = before(true).filter(starts).or_else(|| before(false).filter(starts));
            let end = match i + 1 == messages.len() {
                true => Some(text.clone()),
                false => self.text(&messages[..=i], tools, false).ok().filter(starts),
            };
            match (start, end) {
                (Some(start), Some(end)) if start.len() < end.len() => said.push(start.len()..end.len()),
                _ => {
                    return Err(format!(
                        "the chat template writes message {} differently once others follow, so that it cannot be told \
                         apart: end the sample with it, or give context and continuation",
                        i + 1
                    ));
                }
            }
        }
        Ok(Rendered { text, said })
    }
}

/// The first line of an error, with what caused it.
fn sentence(e: &Error) -> String {
    if e.kind() == ErrorKind::OutOfFuel {
        return format!(
            "it takes more than {INSTRUCTIONS} instructions for this conversation: does it come to an end?"
        );
    }
    let mut text = e.detail().map_or_else(|| e.kind().to_string(), String::from);
    if let Some(line) = e.line() {
        text += &format!(" (line {line})");
    }
    text
}

/// Rewrites `{% generation %}…{% endgeneration %}`, which minijinja does not know, into a call block, which it does.
fn mark_turns(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some(at) = rest.find("{%") {
        let Some(length) = rest[at..].find("%}") else { break };
        let tag = &rest[at + 2..at + length];
        let word = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        out.push_str(&rest[..at]);
        match word {
            "generation" => {
                found = true;
                out.push_str(&format!("{{%{}%}}", tag.replacen("generation", "call __turn()", 1)));
            }
            "endgeneration" => out.push_str(&format!("{{%{}%}}", tag.replacen("endgeneration", "endcall", 1))),
            _ => out.push_str(&rest[at..at + length + 2]),
        }
        rest = &rest[at + length + 2..];
    }
    out.push_str(rest);
    (out, found)
}

fn unmark(marked: &str) -> Rendered {
    let (mut text, mut said, mut open) = (String::with_capacity(marked.len()), Vec::new(), None);
    for c in marked.chars() {
        match c {
            OPEN => open = Some(text.len()),
            CLOSE => said.extend(open.take().map(|start| start..text.len())),
            c => text.push(c),
        }
    }
    Rendered { text, said }
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=…)`, which templates are written for.
fn to_json(value: Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    // Accepted, as transformers does: its own defaults for the rest, and what they are is not asked here.
    let _: (Option<bool>, Option<bool>, Option<Value>) =
        (kwargs.get("ensure_ascii")?, kwargs.get("sort_keys")?, kwargs.get("separators")?);
    kwargs.assert_all_used()?;
    let failed = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut out = Vec::new();
    match indent {
        Some(n) => {
            let spaces = vec![b' '; n];
            let pretty = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            serde::Serialize::serialize(&value, &mut serde_json::Serializer::with_formatter(&mut out, pretty))
        }
        None => serde::Serialize::serialize(&value, &mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
    }
    .map_err(failed)?;
    Ok(Value::from(String::from_utf8(out).expect("serde_json writes UTF-8")))
}

/// Separators as Python writes them: `, ` and `: `.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

/// The date, for templates that tell it: UTC, and the formats that templates use (%d %m %Y %b %B %A %H %M %S %y).
fn strftime_now(format: String) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let days = seconds / 86400;
    // Civil from days (H. Hinnant, "chrono-compatible low-level date algorithms").
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + (month <= 2) as u64;
    let name = MONTHS[month as usize - 1];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('d') => out += &format!("{day:02}"),
            Some('m') => out += &format!("{month:02}"),
            Some('Y') => out += &format!("{year}"),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('B') => out += name,
            Some('b') => out += &name[..3],
            Some('A') => out += DAYS[(days % 7) as usize],
            Some('a') => out += &DAYS[(days % 7) as usize][..3],
            Some('H') => out += &format!("{:02}", seconds / 3600 % 24),
            Some('M') => out += &format!("{:02}", seconds / 60 % 60),
            Some('S') => out += &format!("{:02}", seconds % 60),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const CHATML: &str = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</>\\n' }}{% endfor %}\
                          {% if add_generation_prompt %}<assistant>{% endif %}";

    fn said(r: &Rendered) -> Vec<&str> {
        r.said.iter().map(|s| &r.text[s.clone()]).collect()
    }

    fn talk() -> Vec<Json> {
        vec![
            json!({"role": "system", "content": "be short"}),
            json!({"role": "user", "content": "héllo"}),
            json!({"role": "assistant", "content": "hi ✨"}),
            json!({"role": "user", "content": "and?"}),
            json!({"role": "assistant", "content": "so"}),
        ]
    }

    #[test]
    fn without_marks_each_turn_is_a_difference_of_prefixes() {
        let template = ChatTemplate::new(CHATML, vec![]).unwrap();
        let r = template.render(&talk(), None).unwrap();
        assert_eq!(said(&r), ["hi ✨</>\n", "so</>\n"]);
    }

    #[test]
    fn marks_give_the_turns_and_leave_no_trace() {
        let source = "{%- for m in messages %}\n{{ '<' + m.role + '>' }}\n  {%- if m.role == 'assistant' %}\n    \
                      {%- generation -%}\n    {{ m.content }}!{%- endgeneration %}\n  {%- else %}{{ m.content }}{% endif %}{% endfor %}";
        let r = ChatTemplate::new(source, vec![]).unwrap().render(&talk(), None).unwrap();
        assert_eq!(said(&r), ["hi ✨!", "so!"]);
        assert!(!r.text.contains([OPEN, CLOSE]));
    }

    #[test]
    fn what_a_user_writes_cannot_mark_itself_as_the_assistants() {
        let marked = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\
                      {% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}";
        let template = ChatTemplate::new(marked, vec![]).unwrap();
        for mark in ['\u{E000}', '\u{E001}'] {
            let code = format!("U+{:04X}", mark as u32);
            let with = format!("a {mark} b");
            let mut messages = talk();
            let error = template.render(&messages, Some(&json!([{"name": with}]))).unwrap_err();
            assert!(error.contains("tools") && error.contains(&code), "{error}");
            messages[1] = json!({"role": "user", "content": [{"type": "text", "text": with}]});
            let error = template.render(&messages, None).unwrap_err();
            assert!(error.contains("messages[1]") && error.contains(&code), "{error}");
            messages[1] = json!({"role": "user", with: "x"});
            assert!(template.render(&messages, None).unwrap_err().contains("messages[1]"));
            // A template without marks has nothing to mix it up with.
            let mut messages = talk();
            messages[1]["content"] = json!("a \u{E000} b \u{E001}");
            let r = ChatTemplate::new(CHATML, vec![]).unwrap().render(&messages, None).unwrap();
            assert_eq!(said(&r), ["hi ✨</>\n", "so</>\n"]);
        }
    }

    #[test]
    fn a_template_that_rewrites_earlier_turns_is_an_error_that_says_what_to_do() {
        // As Qwen3's does with thoughts: shown in the last turn only.
        let source =
            "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else m.content|upper }}{% endfor %}";
        let template = ChatTemplate::new(source, vec![]).unwrap();
        let error = template.render(&talk(), None).unwrap_err();
        assert!(error.contains("message 3") && error.contains("end the sample"), "{error}");
    }

    #[test]
    fn what_a_template_raises_is_the_error() {
        let source = "{{ raise_exception('roles must alternate') }}";
        let error = ChatTemplate::new(source, vec![]).unwrap().render(&talk(), None).unwrap_err();
        assert!(error.contains("roles must alternate"), "{error}");
        assert!(ChatTemplate::new("{% if %}", vec![]).is_err());
    }

    #[test]
    fn a_template_without_an_end_is_an_error() {
        let looping = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        for source in [looping.to_string(), format!("{{% macro m() %}}{looping}{{% endmacro %}}{{{{ m() }}}}")] {
            let mut template = ChatTemplate::new(&source, vec![]).unwrap();
            assert_eq!(template.environment.fuel(), Some(INSTRUCTIONS));
            template.environment.set_fuel(Some(10_000));
            let error = template.render(&talk(), None).unwrap_err();
            assert!(error.contains("the chat template") && error.contains("come to an end"), "{error}");
        }
    }

    #[test]
    fn ten_thousand_messages_are_rendered() {
        let source = "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}\
                      {% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}";
        let r = ChatTemplate::new(source, vec![]).unwrap().render(&vec![talk(); 2000].concat(), None).unwrap();
        assert_eq!(r.said.len(), 4000);
    }

    #[test]
    fn json_and_tokens_and_methods_are_as_in_python() {
        let source = "{{ bos_token }}{{ messages[0] | tojson }}{{ tools | tojson(indent=2) }}{{ ' x '.strip() }}\
                      {% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ loop.index }}{% endfor %}";
        let template = ChatTemplate::new(source, vec![("bos_token".into(), "<s>".into())]).unwrap();
        let r = template.text(&[json!({"role": "user", "content": "<é>"})], Some(&json!([1])), false).unwrap();
        assert_eq!(r, "<s>{\"role\": \"user\", \"content\": \"<é>\"}[\n  1\n]x1");
    }

    #[test]
    fn the_date_has_the_form_asked_for() {
        let now = strftime_now("%d %b %Y|%Y-%m-%d|%%".into());
        assert!(now.len() == 11 + 1 + 10 + 1 + 2, "{now}");
    }
}
