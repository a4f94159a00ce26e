//! Finds cuBLASLt and NVRTC, which training uses and mounting does not, where a machine has them: pip wheels put them
//! where no loader looks.
//!
//! Searched in this order: `WEIGHTFS_CUDA_LIBRARY_PATH`; what an engine that we serve has mapped; the Python environment
//! that is active; the toolkit; the loader's own path. The library is loaded by its full path, and found by its name from
//! then on.
//!
//! A library's initialisers run with our rights. Of an engine only what nobody else than we or root could have written
//! is loaded: the process must be ours or root's, and so must the file.

use crate::memory::{is_root_or_us, process_owner};
use parking_lot::Mutex;
use std::ffi::{CStr, CString, OsString};
use std::fmt;
use std::fs::{File, Metadata};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A library of the CUDA toolkit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Library {
    CublasLt,
    Nvrtc,
}

impl Library {
    fn stem(self) -> &'static str {
        match self {
            Library::CublasLt => "libcublasLt.so",
            Library::Nvrtc => "libnvrtc.so",
        }
    }
}

/// Where a library was found; empty when the loader knew it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found(pub PathBuf);

/// A file that may be the library.
struct Candidate {
    path: PathBuf,
    /// Another process named it, and not our own user or the machine's administrator.
    mapped: bool,
}

/// The versions whose interface we speak, newest first.
const MAJORS: [&str; 2] = ["13", "12"];
const VARIABLE: &str = "WEIGHTFS_CUDA_LIBRARY_PATH";

static PROCESSES: Mutex<Vec<u32>> = Mutex::new(Vec::new());
static LOADED: Mutex<Vec<(Library, Result<Found, String>)>> = Mutex::new(Vec::new());

/// The libraries that process `pid` has mapped may be used: an engine's, which fit the driver. Another user's are not.
pub fn add_search_process(pid: u32) {
    let mut processes = PROCESSES.lock();
    if !processes.contains(&pid) {
        processes.push(pid);
        // What was not found before may be found there.
        LOADED.lock().retain(|(_, found)| found.is_ok());
    }
}

/// Loads `library` for good, if it can be found. `Err` says where it was looked for. cudarc's functions of that library
/// may be called only after this succeeded: they panic otherwise.
pub fn load(library: Library) -> Result<Found, String> {
    let mut loaded = LOADED.lock();
    if let Some((_, found)) = loaded.iter().find(|(l, _)| *l == library) {
        return found.clone();
    }
    let found = search(library);
    loaded.push((library, found.clone()));
    found
}

fn search(library: Library) -> Result<Found, String> {
    let (candidates, mut failures) = candidates(library);
    for candidate in candidates {
        match open_with_builtins(library, &candidate) {
            Ok(()) if is_present(library) => return Ok(Found(candidate.path)),
            Ok(()) => failures.push(format!("{} was loaded under another name", candidate.path.display())),
            Err(why) => failures.push(why),
        }
    }
    if is_present(library) {
        return Ok(Found(PathBuf::new()));
    }
    let tried = match failures.is_empty() {
        true => String::new(),
        false => format!(" ({})", failures.join("; ")),
    };
    Err(format!(
        "{} was found neither in {VARIABLE}, an engine's process, the Python environment, /usr/local/cuda nor the \
         loader's path{tried}: pip install nvidia-cublas nvidia-cuda-nvrtc, and name their folder in {VARIABLE}",
        library.stem()
    ))
}

fn is_present(library: Library) -> bool {
    // SAFETY: these try to load the library by its names, as `search` does.
    unsafe {
        match library {
            Library::CublasLt => cudarc::cublaslt::sys::is_culib_present(),
            Library::Nvrtc => cudarc::nvrtc::sys::is_culib_present(),
        }
    }
}

/// Files that may be the library, best first, and why others are none.
fn candidates(library: Library) -> (Vec<Candidate>, Vec<String>) {
    let mut refused = Vec::new();
    let mut files = Vec::new();
    for folder in std::env::var_os(VARIABLE).iter().flat_map(std::env::split_paths) {
        files.extend(named(in_folder(&folder, library)));
    }
    for pid in PROCESSES.lock().iter() {
        match in_process(*pid, library) {
            Ok(mapped) => files.extend(mapped.into_iter().map(|path| Candidate { path, mapped: true })),
            Err(why) => refused.push(why),
        }
    }
    for environment in ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(std::env::var_os) {
        files.extend(named(in_environment(Path::new(&environment), library)));
    }
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(std::env::var_os).map(PathBuf::from);
    for toolkit in toolkits.chain(["/usr/local/cuda".into(), "/opt/cuda".into()]) {
        for folder in ["lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib"] {
            files.extend(named(in_folder(&toolkit.join(folder), library)));
        }
    }
    files.dedup_by(|a, b| a.path == b.path);
    (files, refused)
}

fn named(files: Vec<PathBuf>) -> impl Iterator<Item = Candidate> {
    files.into_iter().map(|path| Candidate { path, mapped: false })
}

/// What process `pid` has mapped of `library`. Another user's process may say that it has mapped anything.
fn in_process(pid: u32, library: Library) -> Result<Vec<PathBuf>, String> {
    let Some(owner) = process_owner(pid) else { return Ok(Vec::new()) };
    if let Some(other) = owner.uids.into_iter().find(|&uid| !is_root_or_us(uid)) {
        return Err(format!("what process {pid} has loaded is not used: it is user {other}'s"));
    }
    let maps = std::fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
    // The path is the process's own: it may live in a container.
    let root = || OsString::from(format!("/proc/{pid}/root"));
    Ok(mapped_in(&maps, library).map(|path| PathBuf::from([root(), path.into()].concat_os())).collect())
}

trait ConcatOs {
    fn concat_os(self) -> OsString;
}

impl ConcatOs for [OsString; 2] {
    fn concat_os(self) -> OsString {
        let [mut first, second] = self;
        first.push(second);
        first
    }
}

fn in_folder(folder: &Path, library: Library) -> Vec<PathBuf> {
    let versions = MAJORS.iter().map(|major| folder.join(format!("{}.{major}", library.stem())));
    versions.filter(|f| f.is_file()).collect()
}

/// pip's wheels: one folder for CUDA 13, one a library for CUDA 12.
fn in_environment(environment: &Path, library: Library) -> Vec<PathBuf> {
    let old = match library {
        Library::CublasLt => "cublas",
        Library::Nvrtc => "cuda_nvrtc",
    };
    let mut files = Vec::new();
    let versions = std::fs::read_dir(environment.join("lib")).into_iter().flatten().flatten();
    for python in versions.filter(|e| e.file_name().as_bytes().starts_with(b"python")) {
        for folder in ["cu13", old] {
            files.extend(in_folder(&python.path().join("site-packages/nvidia").join(folder).join("lib"), library));
        }
    }
    // A conda environment may have them among its own libraries.
    files.extend(in_folder(&environment.join("lib"), library));
    files
}

/// Paths of `library` in the text of a /proc/PID/maps (proc(5): the path is the sixth field and may hold spaces).
fn mapped_in(maps: &[u8], library: Library) -> impl Iterator<Item = PathBuf> {
    let mut paths: Vec<PathBuf> = Vec::new();
    for line in maps.split(|b| *b == b'\n') {
        let Some(slash) = line.iter().position(|b| *b == b'/') else { continue };
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(&line[slash..]));
        let name = path.file_name().map(|n| n.as_bytes().to_vec()).unwrap_or_default();
        if name.starts_with(library.stem().as_bytes()) && !paths.contains(&path) {
            paths.push(path);
        }
    }
    paths.into_iter()
}

/// NVRTC looks for its builtins by name alone: they are loaded first, from beside it.
fn open_with_builtins(library: Library, candidate: &Candidate) -> Result<(), String> {
    let open = if candidate.mapped { open_checked } else { open };
    let folder = candidate.path.parent().unwrap_or(Path::new("/"));
    if library == Library::Nvrtc {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if name.as_bytes().starts_with(b"libnvrtc-builtins.so.") {
                open(&entry.path())?;
            }
        }
    }
    open(&candidate.path)
}

/// Loads the file that `path` leads to now, if nobody but root and us may have written it.
fn open_checked(path: &Path) -> Result<(), String> {
    let fail = |why: &dyn fmt::Display| format!("{}: {why}", path.display());
    // A pipe must not hold us up before we see what it is.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(|e| fail(&e))?;
    may_be_loaded(&file.metadata().map_err(|e| fail(&e))?).map_err(|why| fail(&why))?;
    // By its descriptor: its name may lead to another file by now.
    open(&PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))).map_err(|why| fail(&why))?;
    // Open for good: the loader remembers the library under this number, which no other file must get.
    std::mem::forget(file);
    Ok(())
}

fn may_be_loaded(file: &Metadata) -> Result<(), String> {
    if !file.is_file() {
        return Err("it is no regular file".into());
    }
    if !is_root_or_us(file.uid()) {
        return Err(format!("it is user {}'s, and is not loaded for another user", file.uid()));
    }
    // pip makes files that the group may write where every user has a group of their own (umask 002).
    let own_group = file.gid() == rustix::process::getegid().as_raw();
    if file.mode() & 0o002 != 0 || (file.mode() & 0o020 != 0 && !own_group) {
        return Err(format!("others may write it (mode {:o}): chmod go-w it", file.mode() & 0o777));
    }
    Ok(())
}

fn open(path: &Path) -> Result<(), String> {
    let Ok(name) = CString::new(path.as_os_str().as_bytes()) else {
        return Err(format!("{} holds a zero byte", path.display()));
    };
    // SAFETY: loads a library and keeps it for good. It was named by the user, lies where CUDA is installed, or was mapped
    // by an engine of this user or root and written by nobody else; its initialisers are the vendor's.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if !handle.is_null() {
        return Ok(());
    }
    // SAFETY: dlerror's text belongs to this thread and is copied at once.
    let why = unsafe {
        let text = libc::dlerror();
        if text.is_null() { "unknown error".into() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    };
    Err(why)
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_os_str().is_empty() {
            true => write!(f, "found by the loader"),
            false => write!(f, "{}", self.0.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_among_the_mappings_of_a_process() {
        let maps = b"7f00-7f01 r--p 00000000 08:01 12  /opt/my env/nvidia/cu13/lib/libcublasLt.so.13\n\
            7f01-7f02 r-xp 00001000 08:01 12  /opt/my env/nvidia/cu13/lib/libcublasLt.so.13\n\
            7f02-7f03 r-xp 00000000 08:01 13  /usr/lib/libcublas.so.13\n\
            7f03-7f04 rw-p 00000000 00:00 0\n";
        let found: Vec<PathBuf> = mapped_in(maps, Library::CublasLt).collect();
        assert_eq!(found, [PathBuf::from("/opt/my env/nvidia/cu13/lib/libcublasLt.so.13")]);
        assert_eq!(mapped_in(maps, Library::Nvrtc).count(), 0);
    }

    #[test]
    fn wheels_are_found_in_an_environment() {
        let environment = tempfile::tempdir().unwrap();
        let lib = environment.path().join("lib/python3.12/site-packages/nvidia/cu13/lib");
        std::fs::create_dir_all(&lib).unwrap();
        std::fs::write(lib.join("libnvrtc.so.13"), "").unwrap();
        let found = in_environment(environment.path(), Library::Nvrtc);
        assert_eq!(found, [lib.join("libnvrtc.so.13")]);
        assert!(in_environment(environment.path(), Library::CublasLt).is_empty());
    }

    #[test]
    fn a_file_that_is_no_library_says_so() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let why = open(file.path()).unwrap_err();
        assert!(why.contains(&*file.path().to_string_lossy()), "{why}");
    }

    /// A file that others can write and one that they cannot, both no libraries.
    #[test]
    fn of_an_engine_only_files_are_loaded_that_nobody_else_could_write() {
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join("libcublasLt.so.13");
        std::fs::write(&library, "no library").unwrap();
        let said = |mode| {
            std::fs::set_permissions(&library, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
            open_checked(&library).unwrap_err()
        };
        assert!(said(0o646).contains("others may write it"), "{}", said(0o646));
        // Looked at and found to be no library.
        for mode in [0o644, 0o664] {
            assert!(!said(mode).contains("others") && said(mode).contains("libcublasLt.so.13"), "{}", said(mode));
        }
        if !rustix::process::geteuid().is_root() {
            return eprintln!("skipped: only root can give a file away");
        }
        std::os::unix::fs::chown(&library, Some(0), Some(12345)).unwrap();
        assert!(said(0o664).contains("others may write it"));
        std::os::unix::fs::chown(&library, Some(12345), None).unwrap();
        assert!(said(0o644).contains("user 12345's"));
        std::fs::remove_file(&library).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &library, rustix::fs::FileType::Fifo, 0o644.into(), 0).unwrap();
        assert!(open_checked(&library).unwrap_err().contains("no regular file"));
    }

    #[test]
    fn what_our_own_process_has_mapped_is_loaded_by_the_file_and_not_by_its_name() {
        // A small library of glibc, under another name.
        let folders = ["/lib/x86_64-linux-gnu", "/lib64", "/lib/aarch64-linux-gnu", "/lib"];
        let Some(original) = folders.iter().map(|f| Path::new(f).join("libutil.so.1")).find(|f| f.exists()) else {
            return eprintln!("skipped: there is no libutil.so.1 here");
        };
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().canonicalize().unwrap().join("libnvrtc.so.13");
        std::fs::write(&library, std::fs::read(original).unwrap()).unwrap();
        let file = File::open(&library).unwrap();
        // SAFETY: nobody writes the file, and nothing is read of it.
        let mapping = unsafe { memmap2::Mmap::map(&file) }.unwrap();
        let found = in_process(std::process::id(), Library::Nvrtc).unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].ends_with(library.strip_prefix("/").unwrap()));
        drop(mapping);
        let candidate = Candidate { path: found[0].clone(), mapped: true };
        open_with_builtins(Library::Nvrtc, &candidate).unwrap();
        // What lies beside it is looked at as well.
        let builtins = folder.path().join("libnvrtc-builtins.so.13.0");
        std::fs::write(&builtins, "").unwrap();
        std::fs::set_permissions(&builtins, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        assert!(open_with_builtins(Library::Nvrtc, &candidate).unwrap_err().contains("others may write it"));
    }

    #[test]
    fn a_process_of_another_user_is_not_believed() {
        use std::os::unix::process::CommandExt;
        if !rustix::process::geteuid().is_root() {
            return eprintln!("skipped: needs root, to be another user");
        }
        let waits = || std::process::Stdio::piped();
        let mut other = std::process::Command::new("cat").uid(12345).stdin(waits()).spawn().unwrap();
        let refused = in_process(other.id(), Library::Nvrtc).unwrap_err();
        drop(other.stdin.take());
        other.wait().unwrap();
        assert!(refused.contains("user 12345's"), "{refused}");
        assert!(in_process(other.id(), Library::Nvrtc).unwrap().is_empty(), "it has ended");
    }
}
