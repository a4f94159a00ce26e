//! Finds cuBLASLt and NVRTC, which training uses and mounting does not, where a machine has them: pip wheels put them
//! where no loader looks.
//!
//! Searched in this order: `WEIGHTFS_CUDA_LIBRARY_PATH`; what an engine that we serve has mapped; the Python environment
//! that is active; the toolkit; the loader's own path. The library is loaded by its full path, and found by its name from
//! then on.

use parking_lot::Mutex;
use std::ffi::{CStr, CString, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
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

/// The versions whose interface we speak, newest first.
const MAJORS: [&str; 2] = ["13", "12"];
const VARIABLE: &str = "WEIGHTFS_CUDA_LIBRARY_PATH";

static PROCESSES: Mutex<Vec<u32>> = Mutex::new(Vec::new());
static LOADED: Mutex<Vec<(Library, Result<Found, String>)>> = Mutex::new(Vec::new());

/// The libraries that process `pid` has mapped may be used: an engine's, which fit the driver.
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
    let mut failures = Vec::new();
    for candidate in candidates(library) {
        match open_with_builtins(library, &candidate) {
            Ok(()) if is_present(library) => return Ok(Found(candidate)),
            Ok(()) => failures.push(format!("{} was loaded under another name", candidate.display())),
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

/// Files that may be the library, best first.
fn candidates(library: Library) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for folder in std::env::var_os(VARIABLE).iter().flat_map(std::env::split_paths) {
        files.extend(in_folder(&folder, library));
    }
    for pid in PROCESSES.lock().iter() {
        let maps = std::fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
        let mapped = mapped_in(&maps, library);
        // The path is the process's own: it may live in a container.
        files
            .extend(mapped.map(|p| PathBuf::from([OsString::from(format!("/proc/{pid}/root")), p.into()].concat_os())));
    }
    for environment in ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(std::env::var_os) {
        files.extend(in_environment(Path::new(&environment), library));
    }
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(std::env::var_os).map(PathBuf::from);
    for toolkit in toolkits.chain(["/usr/local/cuda".into(), "/opt/cuda".into()]) {
        for folder in ["lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib"] {
            files.extend(in_folder(&toolkit.join(folder), library));
        }
    }
    files.dedup();
    files
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
fn open_with_builtins(library: Library, path: &Path) -> Result<(), String> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    if library == Library::Nvrtc {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if name.as_bytes().starts_with(b"libnvrtc-builtins.so.") {
                open(&entry.path())?;
            }
        }
    }
    open(path)
}

fn open(path: &Path) -> Result<(), String> {
    let Ok(name) = CString::new(path.as_os_str().as_bytes()) else {
        return Err(format!("{} holds a zero byte", path.display()));
    };
    // SAFETY: loads a library and keeps it for good. It was named by the user, mapped by an engine that the user serves,
    // or lies where CUDA is installed; its initialisers are the vendor's.
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
}
