//! What may be written to `ctl`: one write, one command. Parsing is whole and has no effects.

use super::FsError;
use rustix::io::Errno;

/// The kernel cuts longer writes into pieces of up to 1 MiB (256 pages), the first of which may be a page short when
/// the writer's buffer is not aligned: a piece this long may be the start of something longer.
pub const MAX_COMMAND: usize = (1 << 20) - 4096;
/// A message is one line of a history.
const MAX_MESSAGE: usize = 4096;

/// A checked command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Commit {
        message: Option<String>,
    },
    Refresh,
    /// The weights of an engine's new manifest; without a path, of those it was mounted with.
    Attach {
        path: Option<String>,
    },
    Freeze,
    Thaw,
    /// A path, or a job as JSON.
    Train {
        job: String,
    },
    Cancel {
        id: u64,
    },
    Pause,
    Resume,
    Rollback {
        id: u64,
    },
}

impl Command {
    /// The word it is written with.
    pub fn name(&self) -> &'static str {
        match self {
            Command::Commit { .. } => "commit",
            Command::Refresh => "refresh",
            Command::Attach { .. } => "attach",
            Command::Freeze => "freeze",
            Command::Thaw => "thaw",
            Command::Train { .. } => "train",
            Command::Cancel { .. } => "cancel",
            Command::Pause => "pause",
            Command::Resume => "resume",
            Command::Rollback { .. } => "rollback",
        }
    }
}

/// Parses one write. Nothing has happened when it fails.
pub fn parse(bytes: &[u8]) -> Result<Command, FsError> {
    let bad = |why: String| FsError::new(Errno::INVAL, why);
    if bytes.len() > MAX_COMMAND {
        let why = format!("a command has at most {MAX_COMMAND} bytes: write `train PATH` for a long job");
        return Err(FsError::new(Errno::TOOBIG, why));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| bad("the command is not UTF-8 text".into()))?;
    let text = text.strip_suffix('\n').unwrap_or(text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    let (word, rest) = match text.split_once([' ', '\t']) {
        Some((word, rest)) => (word, rest.trim()),
        None => (text, ""),
    };
    // A job given in the command itself may be laid out over lines; anything else after a newline is a second command.
    let job_text = word == "train" && rest.starts_with('{');
    if text.contains('\n') && !job_text {
        return Err(bad("one write is one command: write them one after the other".into()));
    }
    if let Some(control) = text.chars().find(|c| c.is_control() && !(job_text && c.is_whitespace()) && *c != '\t') {
        return Err(bad(format!("the command holds the control character {control:?}")));
    }
    let alone = |command: Command| match rest {
        "" => Ok(command),
        extra => Err(bad(format!("'{word}' takes nothing after it, but '{}' follows", short(extra)))),
    };
    let id = || rest.parse().map_err(|_| bad(format!("'{word}' takes a number, not '{}'", short(rest))));
    match word {
        "commit" if rest.len() > MAX_MESSAGE => Err(bad(format!("a message has at most {MAX_MESSAGE} bytes"))),
        "commit" => Ok(Command::Commit { message: (!rest.is_empty()).then(|| rest.to_string()) }),
        "refresh" => alone(Command::Refresh),
        "attach" => Ok(Command::Attach { path: (!rest.is_empty()).then(|| rest.to_string()) }),
        "freeze" => alone(Command::Freeze),
        "thaw" => alone(Command::Thaw),
        "pause" => alone(Command::Pause),
        "resume" => alone(Command::Resume),
        "train" if rest.is_empty() => Err(bad("'train' takes a path or a job in JSON".into())),
        "train" => Ok(Command::Train { job: rest.to_string() }),
        "cancel" => Ok(Command::Cancel { id: id()? }),
        "rollback" => Ok(Command::Rollback { id: id()? }),
        "" => Err(bad(format!("the command is empty: {WORDS}"))),
        other => Err(bad(format!("'{}' is no command: {WORDS}", short(other)))),
    }
}

const WORDS: &str = "known are commit, refresh, attach, freeze, thaw, train, cancel, pause, resume, rollback";

/// Enough of what somebody wrote to recognise it in a message.
fn short(text: &str) -> String {
    match text.char_indices().nth(40) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn commands_are_parsed_whole() {
        assert_eq!(parse(b"commit\n"), Ok(Command::Commit { message: None }));
        assert_eq!(parse(b"commit after lunch"), Ok(Command::Commit { message: Some("after lunch".into()) }));
        assert_eq!(parse(b"rollback 12\n"), Ok(Command::Rollback { id: 12 }));
        assert_eq!(parse(b"train /jobs/a b.jsonl\n"), Ok(Command::Train { job: "/jobs/a b.jsonl".into() }));
        assert_eq!(
            parse(b"train {\n \"samples\": []\n}\n"),
            Ok(Command::Train { job: "{\n \"samples\": []\n}".into() })
        );
        assert_eq!(parse(b"thaw\r\n"), Ok(Command::Thaw));
        assert_eq!(parse(b"attach\n"), Ok(Command::Attach { path: None }));
        assert_eq!(parse(b"attach run/a b.json\n"), Ok(Command::Attach { path: Some("run/a b.json".into()) }));
    }

    #[test]
    fn what_is_no_command_is_refused_with_the_errno_that_fits() {
        let errno = |bytes: &[u8]| parse(bytes).unwrap_err().errno;
        for bad in [
            &b""[..],
            b"\n",
            b" commit",
            b"Commit",
            b"commit\ncommit\n",
            b"refresh now",
            b"cancel",
            b"cancel -1",
            b"train",
            b"commit \x00",
            b"\xff\xfe",
            b"refresh\n\n",
            b"rollback 99999999999999999999999",
        ] {
            assert_eq!(errno(bad), Errno::INVAL, "{bad:?}");
        }
        assert_eq!(errno(&vec![b'a'; MAX_COMMAND + 1]), Errno::TOOBIG);
        let long = [b"commit ".to_vec(), vec![b'm'; MAX_MESSAGE + 1]].concat();
        assert_eq!(errno(&long), Errno::INVAL);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
