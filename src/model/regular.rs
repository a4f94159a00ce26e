//! Opening files that anybody may have put there.

use rustix::fs::OFlags;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a regular file with `options` and `flags`. Whatever else has its name is an error: the open of a FIFO would wait
/// for somebody at its other end.
pub fn open_regular(options: &mut OpenOptions, flags: OFlags, path: &Path) -> io::Result<File> {
    let file = options.custom_flags((flags | OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")),
    }
}

/// Makes a file of its own at `path`, mode 0600, to read and write. What has the name already (a link, a pipe, a file that others
/// know by another name) loses it and is not written to.
pub fn create_anew(path: &Path) -> io::Result<File> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    File::options().read(true).write(true).create_new(true).mode(0o600).open(path)
}
