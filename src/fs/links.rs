//! Where symbolic links lead, found out step by step and without looking at the end: what lies in our own mount would be
//! a request to ourselves, and as many of them as we have threads wait for each other for ever.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// As many as the kernel follows (path_resolution(7)).
const MOST_LINKS: usize = 40;

/// Whether `path`, below `root`, is at `point` or goes through it. `root` and `point` are absolute and free of links.
pub(super) fn lead_into(root: &Path, path: &Path, point: &Path) -> bool {
    let parts = |p: &Path| p.components().rev().map(|c| c.as_os_str().to_os_string()).collect::<Vec<OsString>>();
    let (mut at, mut rest, mut links) = (PathBuf::from(root), parts(path), 0);
    while let Some(part) = rest.pop() {
        match part.to_str() {
            Some(".") => continue,
            Some("..") => {
                at.pop();
                continue;
            }
            // The root itself, where an absolute target begins anew.
            _ => at.push(part),
        }
        if at == point {
            return true;
        }
        if let Ok(target) = std::fs::read_link(&at) {
            links += 1;
            if links > MOST_LINKS {
                return false;
            }
            at.pop();
            rest.extend(parts(&target));
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_into_the_mount_are_found_by_any_way_they_take() {
        let scratch = tempfile::tempdir().unwrap();
        let base = scratch.path().canonicalize().unwrap();
        let (root, point) = (base.join("model"), base.join("mnt"));
        for dir in ["model/sub", "mnt", "other"] {
            std::fs::create_dir_all(base.join(dir)).unwrap();
        }
        let link = |target: &Path, name: &str| symlink(target, base.join(name)).unwrap();
        link(&point, "model/absolute");
        link("../../mnt".as_ref(), "model/sub/relative");
        link("absolute/below".as_ref(), "model/below");
        link("../other".as_ref(), "model/out");
        link("../mnt".as_ref(), "other/in");
        link("..".as_ref(), "model/up");
        link("self".as_ref(), "model/self");
        link("../other".as_ref(), "model/sub/nowhere");
        for path in ["absolute", "absolute/x", "sub/relative", "below", "out/in", "out/in/x", "up/mnt", "up/mnt/model"]
        {
            assert!(lead_into(&root, path.as_ref(), &point), "{path}");
        }
        for path in ["sub", "absent", "out", "up", "up/other", "self", "sub/nowhere", "up/mnt2"] {
            assert!(!lead_into(&root, path.as_ref(), &point), "{path}");
        }
    }
}
