//! Files of a model directory that are read whole: index, settings, tokenizer, template. The directory may be another user's, so that a
//! name may lead to a pipe that nobody writes to, or to a file without end.

use super::regular::open_regular;
use rustix::fs::OFlags;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Above this a file is none of these: a tokenizer of 256,000 tokens has some 30 MB.
const LARGEST: u64 = 256 << 20;

/// Reads a regular file. Links are followed, since a hub cache holds links only.
pub fn read_small(path: &Path) -> io::Result<Vec<u8>> {
    read(path, OFlags::empty())
}

/// [`read_small`], of a file that we wrote: a link is refused.
pub fn read_small_no_link(path: &Path) -> io::Result<Vec<u8>> {
    read(path, OFlags::NOFOLLOW)
}

fn read(path: &Path, more: OFlags) -> io::Result<Vec<u8>> {
    let file = open_regular(File::options().read(true), more, path)?;
    let mut bytes = Vec::new();
    // It may grow while it is read.
    if file.metadata()?.len() > LARGEST || file.take(LARGEST + 1).read_to_end(&mut bytes)? as u64 > LARGEST {
        return Err(io::Error::from(io::ErrorKind::FileTooLarge));
    }
    Ok(bytes)
}

/// [`read_small`], of text.
pub fn read_small_text(path: &Path) -> io::Result<String> {
    String::from_utf8(read_small(path)?).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8 text"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, mknodat};
    use std::os::unix::fs::symlink;

    #[test]
    fn regular_files_are_read_and_nothing_is_waited_for() {
        let scratch = tempfile::tempdir().unwrap();
        let at = |name: &str| scratch.path().join(name);
        std::fs::write(at("file"), "text").unwrap();
        symlink("file", at("link")).unwrap();
        std::fs::write(at("bytes"), b"\xff").unwrap();
        assert_eq!(read_small_text(&at("file")).unwrap(), "text");
        assert_eq!(read_small(&at("link")).unwrap(), b"text");
        assert_eq!(read_small_no_link(&at("file")).unwrap(), b"text");
        assert_eq!(read_small_no_link(&at("link")).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        assert!(read_small_text(&at("bytes")).unwrap_err().to_string().contains("UTF-8"));
        assert_eq!(read_small(&at("none")).unwrap_err().kind(), io::ErrorKind::NotFound);

        mknodat(CWD, at("pipe"), FileType::Fifo, 0o600.into(), 0).unwrap();
        for other in [at("pipe"), scratch.path().to_owned(), "/dev/zero".into()] {
            assert!(read_small(&other).unwrap_err().to_string().contains("not a regular file"), "{}", other.display());
        }
        File::create(at("huge")).unwrap().set_len(LARGEST + 1).unwrap();
        assert_eq!(read_small(&at("huge")).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    }
}
