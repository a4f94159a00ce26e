//! Python pickles, read as data: nothing is imported, called or built. Only what `torch.save` writes of a dictionary of
//! `reduce_tensor` tuples is understood; anything else ends in a sentence that names it. The opcodes are those of
//! CPython's `pickletools`.
//!
//! Objects live in one list and name each other by index, so that a pickle that contains itself costs nothing and deep
//! nesting needs no deep stack.

use std::collections::HashMap;

/// Index of an object.
pub type Id = usize;

/// What a pickle can hold here.
#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Bytes(Vec<u8>),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
}

/// A name of a Python module that may stand in a handle file. Each is a mark and no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Global {
    RebuildCudaTensor,
    /// A tensor class, or what torch calls a storage: which one it is makes no difference to bytes.
    Class,
    Dtype(&'static str),
    Size,
    Encode,
    Bytes,
    OrderedDict,
}

/// Objects and depth of stack that are far beyond any model's file.
const MAX_OBJECTS: usize = 8 << 20;
const MAX_STACK: usize = 1 << 20;
/// The longest text that becomes bytes: handles have 66.
const MAX_ENCODED: usize = 4096;

/// A pickle that was read to its end.
#[derive(Debug)]
pub struct Pickle {
    objects: Vec<Object>,
    root: Id,
}

impl Pickle {
    pub fn root(&self) -> &Object {
        &self.objects[self.root]
    }

    pub fn get(&self, id: Id) -> &Object {
        &self.objects[id]
    }

    pub fn read(bytes: &[u8]) -> Result<Pickle, String> {
        let mut machine =
            Machine { bytes, at: 0, objects: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
        let root = machine.run().map_err(|why| format!("its pickle, near byte {}: {why}", machine.at))?;
        Ok(Pickle { objects: machine.objects, root })
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    objects: Vec<Object>,
    stack: Vec<Id>,
    /// Depths of the stack at each MARK.
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Id, String> {
        loop {
            match self.byte()? {
                0x80 => match self.byte()? {
                    0..=5 => {}
                    other => return Err(format!("protocol {other} is unknown")),
                },
                0x95 => drop(self.take(8)?), // FRAME: a hint for readers of streams
                b'.' => {
                    let root = self.pop()?;
                    return match self.stack.is_empty() && self.marks.is_empty() {
                        true => Ok(root),
                        false => Err("it ends in the middle of an object".into()),
                    };
                }
                b'(' => self.marks.push(self.stack.len()),
                b'N' => self.push(Object::None)?,
                0x88 => self.push(Object::Bool(true))?,
                0x89 => self.push(Object::Bool(false))?,
                b'K' => self.unsigned::<1>()?,
                b'M' => self.unsigned::<2>()?,
                b'J' => {
                    let bytes = self.array::<4>()?;
                    self.push(Object::Int(i32::from_le_bytes(bytes) as i64))?
                }
                0x8a => self.long()?,
                b'G' => {
                    let bytes = self.array::<8>()?;
                    self.push(Object::Float(f64::from_be_bytes(bytes)))?
                }
                0x8c => self.text::<1>()?,
                b'X' => self.text::<4>()?,
                0x8d => self.text::<8>()?,
                b'C' => self.binary::<1>()?,
                b'B' => self.binary::<4>()?,
                0x8e => self.binary::<8>()?,
                b')' => self.push(Object::Tuple(Vec::new()))?,
                b']' => self.push(Object::List(Vec::new()))?,
                b'}' => self.push(Object::Dict(Vec::new()))?,
                0x85 => self.tuple(1)?,
                0x86 => self.tuple(2)?,
                0x87 => self.tuple(3)?,
                b't' => {
                    let items = self.since_mark()?;
                    self.push(Object::Tuple(items))?
                }
                b'a' => {
                    let item = self.pop()?;
                    self.list()?.push(item)
                }
                b'e' => {
                    let items = self.since_mark()?;
                    self.list()?.extend(items)
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.dict()?.push((key, value))
                }
                b'u' => {
                    let items = self.since_mark()?;
                    if items.len() % 2 != 0 {
                        return Err("a dictionary has a key without a value".into());
                    }
                    self.dict()?.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])))
                }
                b'q' => {
                    let index = self.byte()? as u64;
                    self.memoize(index)?
                }
                b'r' => {
                    let index = u32::from_le_bytes(self.array()?) as u64;
                    self.memoize(index)?
                }
                0x94 => self.memoize(self.memo.len() as u64)?,
                b'h' => {
                    let index = self.byte()? as u64;
                    self.recall(index)?
                }
                b'j' => {
                    let index = u32::from_le_bytes(self.array()?) as u64;
                    self.recall(index)?
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.push(Object::Global(global(module, name)?))?
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let found = match (&self.objects[module], &self.objects[name]) {
                        (Object::Text(module), Object::Text(name)) => global(module, name)?,
                        _ => return Err("a name that is not text is imported".into()),
                    };
                    self.push(Object::Global(found))?
                }
                b'R' => self.reduce()?,
                other => return Err(format!("operation {} has no place in a handle file", name_of(other))),
            }
        }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| format!("{count} bytes should follow, and the file ends"))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        Ok(self.take(N)?.try_into().expect("as many were taken"))
    }

    fn length<const N: usize>(&mut self) -> Result<usize, String> {
        let mut wide = [0; 8];
        wide[..N].copy_from_slice(self.take(N)?);
        usize::try_from(u64::from_le_bytes(wide)).map_err(|e| e.to_string())
    }

    /// Up to a newline, without it.
    fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|&b| b == b'\n').ok_or("a name without an end")?;
        self.at += length + 1;
        std::str::from_utf8(&rest[..length]).map_err(|_| "a name that is not text".into())
    }

    fn push(&mut self, object: Object) -> Result<(), String> {
        if self.objects.len() >= MAX_OBJECTS {
            return Err(format!("it holds more than {MAX_OBJECTS} objects"));
        }
        self.objects.push(object);
        self.push_id(self.objects.len() - 1)
    }

    fn push_id(&mut self, id: Id) -> Result<(), String> {
        if self.stack.len() >= MAX_STACK {
            return Err(format!("it nests more than {MAX_STACK} objects"));
        }
        self.stack.push(id);
        Ok(())
    }

    /// Takes the top of the stack, which a MARK must not have cut off.
    fn pop(&mut self) -> Result<Id, String> {
        match self.stack.len() > self.marks.last().copied().unwrap_or(0) {
            true => Ok(self.stack.pop().expect("it is not empty")),
            false => Err("an operation finds nothing to work on".into()),
        }
    }

    fn since_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or("a group ends that never began")?;
        Ok(self.stack.split_off(mark))
    }

    fn tuple(&mut self, count: usize) -> Result<(), String> {
        let mut items = (0..count).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
        items.reverse();
        self.push(Object::Tuple(items))
    }

    fn top(&mut self) -> Result<Id, String> {
        let id = self.pop()?;
        self.stack.push(id);
        Ok(id)
    }

    fn list(&mut self) -> Result<&mut Vec<Id>, String> {
        let id = self.top()?;
        match &mut self.objects[id] {
            Object::List(items) => Ok(items),
            _ => Err("items are added to what is no list".into()),
        }
    }

    fn dict(&mut self) -> Result<&mut Vec<(Id, Id)>, String> {
        let id = self.top()?;
        match &mut self.objects[id] {
            Object::Dict(items) => Ok(items),
            _ => Err("items are set in what is no dictionary".into()),
        }
    }

    fn memoize(&mut self, index: u64) -> Result<(), String> {
        let id = self.top()?;
        self.memo.insert(index, id);
        Ok(())
    }

    fn recall(&mut self, index: u64) -> Result<(), String> {
        let id = *self.memo.get(&index).ok_or_else(|| format!("object {index} is recalled and was never kept"))?;
        self.push_id(id)
    }

    fn unsigned<const N: usize>(&mut self) -> Result<(), String> {
        let value = self.length::<N>()?;
        self.push(Object::Int(value as i64))
    }

    /// LONG1: a two's complement number of some bytes.
    fn long(&mut self) -> Result<(), String> {
        let count = self.byte()? as usize;
        let bytes = self.take(count)?;
        if count > 8 {
            return Err(format!("a number of {count} bytes"));
        }
        let mut wide = [if bytes.last().is_some_and(|&b| b >= 0x80) { 0xff } else { 0 }; 8];
        wide[..count].copy_from_slice(bytes);
        self.push(Object::Int(i64::from_le_bytes(wide)))
    }

    fn text<const N: usize>(&mut self) -> Result<(), String> {
        let length = self.length::<N>()?;
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| "text that is not UTF-8")?;
        self.push(Object::Text(text.to_string()))
    }

    fn binary<const N: usize>(&mut self) -> Result<(), String> {
        let length = self.length::<N>()?;
        let bytes = self.take(length)?.to_vec();
        self.push(Object::Bytes(bytes))
    }

    /// The few calls that only say what a value is: a size is its tuple, and bytes are text in Latin-1 (protocol 2 has no
    /// bytes of its own).
    fn reduce(&mut self) -> Result<(), String> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let Object::Tuple(arguments) = &self.objects[arguments] else {
            return Err("a call's arguments are no tuple".into());
        };
        let Object::Global(callable) = self.objects[callable] else {
            return Err("something is called that is no function".into());
        };
        match (callable, arguments.as_slice()) {
            (Global::Size, &[size]) if matches!(self.objects[size], Object::Tuple(_) | Object::List(_)) => {
                self.push_id(size)
            }
            (Global::Encode, &[text, encoding]) => {
                let bytes = match (&self.objects[text], &self.objects[encoding]) {
                    (Object::Text(text), Object::Text(encoding)) if encoding == "latin1" => latin1(text)?,
                    _ => return Err("bytes that are not text in Latin-1".into()),
                };
                self.push(Object::Bytes(bytes))
            }
            (Global::Bytes, &[]) => self.push(Object::Bytes(Vec::new())),
            (Global::OrderedDict, &[]) => self.push(Object::Dict(Vec::new())),
            (other, _) => Err(format!("it would call {other:?}, and weightfs calls nothing")),
        }
    }
}

/// Python writes byte b as the character U+00b.
fn latin1(text: &str) -> Result<Vec<u8>, String> {
    if text.len() > MAX_ENCODED {
        return Err(format!("{} bytes written as text", text.len()));
    }
    text.chars().map(|c| u8::try_from(c).map_err(|_| format!("'{c}' is not in Latin-1"))).collect()
}

/// Names of torch's element types and of safetensors'.
const DTYPES: [(&str, &str); 14] = [
    ("bfloat16", "BF16"),
    ("float16", "F16"),
    ("float32", "F32"),
    ("float64", "F64"),
    ("float8_e4m3fn", "F8_E4M3"),
    ("float8_e5m2", "F8_E5M2"),
    ("float8_e8m0fnu", "F8_E8M0"),
    ("int8", "I8"),
    ("uint8", "U8"),
    ("int16", "I16"),
    ("int32", "I32"),
    ("int64", "I64"),
    ("uint32", "U32"),
    ("bool", "BOOL"),
];

/// The allow-list. A name that is not on it could be any program.
fn global(module: &str, name: &str) -> Result<Global, String> {
    Ok(match (module, name) {
        ("torch.multiprocessing.reductions", "rebuild_cuda_tensor") => Global::RebuildCudaTensor,
        ("torch", "Size") => Global::Size,
        ("torch", "Tensor") | ("torch.nn.parameter", "Parameter" | "Buffer") => Global::Class,
        ("torch.storage", "TypedStorage" | "UntypedStorage") => Global::Class,
        // vLLM's classes of parameters: their names stand where a tensor's class does.
        ("vllm.model_executor.parameter", _) => Global::Class,
        ("_codecs", "encode") => Global::Encode,
        ("__builtin__" | "builtins", "bytes") => Global::Bytes,
        ("collections", "OrderedDict") => Global::OrderedDict,
        ("torch", dtype) => match DTYPES.iter().find(|(torch, _)| *torch == dtype) {
            Some((_, ours)) => Global::Dtype(ours),
            None => return Err(refused(module, name)),
        },
        ("torch.multiprocessing.reductions", other) => {
            return Err(format!("a tensor is shared by {other}, which is not CUDA IPC: publish a manifest instead"));
        }
        _ => return Err(refused(module, name)),
    })
}

fn refused(module: &str, name: &str) -> String {
    let short = |s: &str| s.chars().take(80).filter(|c| !c.is_control()).collect::<String>();
    format!("it names {}.{}, which has no place in a handle file", short(module), short(name))
}

/// Operations that a pickle may hold and a handle file may not.
fn name_of(opcode: u8) -> String {
    let name = match opcode {
        b'b' => "BUILD",
        b'i' => "INST",
        b'o' => "OBJ",
        0x81 => "NEWOBJ",
        0x92 => "NEWOBJ_EX",
        b'P' | b'Q' => "PERSID (a tensor saved by value)",
        0x82..=0x84 => "EXT",
        0x8b => "LONG4",
        0x8f => "EMPTY_SET",
        0x96..=0x98 => "BUFFER",
        _ => return format!("0x{opcode:02x}"),
    };
    name.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn error(bytes: &[u8]) -> String {
        Pickle::read(bytes).unwrap_err()
    }

    #[test]
    fn what_would_run_code_is_refused_by_name() {
        // python -c 'import pickle,os; class X: __reduce__ = lambda s: (os.system, ("true",)) …', protocols 0 to 4.
        for (pickle, word) in [
            (&b"\x80\x02cposix\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85q\x02Rq\x03."[..], "posix.system"),
            (b"cposix\nsystem\np0\n(Vtrue\np1\ntp2\nRp3\n.", "posix.system"),
            (
                b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
                "posix.system",
            ),
            (b"\x80\x02c__builtin__\neval\n.", "__builtin__.eval"),
            (b"\x80\x02ctorch\nload\n.", "torch.load"),
            (b"(S'true'\nios\nsystem\n.", "0x53"),
            (b"\x80\x02(iposix\nsystem\n.", "INST"),
            (b"\x80\x02}}b.", "BUILD"),
            (b"\x80\x02ctorch\nTensor\n)\x81.", "NEWOBJ"),
            (b"\x80\x02K\x01Q.", "PERSID"),
            (b"\x80\x02\x82\x01.", "EXT"),
            (b"\x80\x02ctorch.multiprocessing.reductions\nrebuild_cuda_tensor\n)R.", "calls nothing"),
            (b"\x80\x02ctorch\nTensor\n)R.", "calls nothing"),
            (b"\x80\x02c_codecs\nencode\nX\x02\x00\x00\x00abX\x06\x00\x00\x00rot_13\x86R.", "Latin-1"),
            (b"\x80\x02ctorch.multiprocessing.reductions\nrebuild_storage_fd\n.", "rebuild_storage_fd"),
        ] {
            let said = error(pickle);
            assert!(said.contains(word), "{word}: {said}");
        }
    }

    #[test]
    fn pickles_that_do_not_hold_together_are_refused() {
        for (pickle, word) in [
            (&b""[..], "file ends"),
            (b"\x80\x09.", "protocol 9"),
            (b"\x80\x02.", "nothing to work on"),
            (b"\x80\x02K\x01K\x02.", "middle"),
            (b"\x80\x02(K\x01.", "middle"),
            (b"\x80\x02K\x01(\x85.", "nothing to work on"),
            (b"\x80\x02h\x07.", "object 7"),
            (b"\x80\x02t.", "never began"),
            (b"\x80\x02}(K\x01u.", "without a value"),
            (b"\x80\x02K\x01K\x02a.", "no list"),
            (b"\x80\x02X\xff\xff\xff\xff", "4294967295 bytes"),
            (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xff", "file ends"),
            (b"\x80\x02\x8a\x09123456789.", "9 bytes"),
            (b"\x80\x02ctorch", "without an end"),
        ] {
            let said = error(pickle);
            assert!(said.contains(word), "{word}: {said}");
        }
        let deep = [&b"\x80\x02"[..], &vec![b']'; MAX_STACK + 1]].concat();
        assert!(error(&deep).contains("nests"));
        // A list that contains itself is no trouble; nobody walks it.
        Pickle::read(b"\x80\x02]q\x00h\x00a.").unwrap();
    }

    #[test]
    fn numbers_are_those_of_python() {
        // pickle.dumps(n, 2) of CPython 3.11.
        for (pickle, n) in [
            (&b"\x80\x02K\xff."[..], 255),
            (b"\x80\x02M\xff\xff.", 65535),
            (b"\x80\x02J\xff\xff\xff\xff.", -1),
            (b"\x80\x02J\x00\x00\x01\x00.", 65536),
            (b"\x80\x02\x8a\x05\x00\x00\x00\x00\x01.", 1 << 32),
            (b"\x80\x02\x8a\x05\x00\x00\x00\x00\xff.", -(1i64 << 32)),
            (b"\x80\x02\x8a\x00.", 0),
        ] {
            assert_eq!(*Pickle::read(pickle).unwrap().root(), Object::Int(n));
        }
        assert_eq!(*Pickle::read(b"\x80\x02G?\xf8\x00\x00\x00\x00\x00\x00.").unwrap().root(), Object::Float(1.5));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Pickle::read(&bytes);
        }

        /// Bytes that are all operations go deeper than random ones.
        #[test]
        fn no_operations_make_it_panic(picks in proptest::collection::vec((0usize..29, any::<[u8; 2]>()), 0..200)) {
            const OPERATIONS: &[u8; 29] = b"(.NKMJGXCB)]}teasuqrhjcR\x85\x86\x87\x93\x94";
            let bytes: Vec<u8> = picks.iter().flat_map(|(i, b)| [OPERATIONS[*i], b[0] % 4, b[1] % 2]).collect();
            let _ = Pickle::read(&bytes);
        }
    }
}
