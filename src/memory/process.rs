//! Telling a process from another that took its pid, and whose it is.

/// When process `pid` started, in clock ticks since boot (field 22 of `/proc/PID/stat`, proc(5)); `None` when there is
/// no such process or it is only waiting to be reaped, its memory gone.
pub fn process_start(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command in parentheses and may hold anything, so fields are counted after the last ')'.
    let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_whitespace().collect();
    match fields.first() {
        Some(&"Z" | &"X") | None => None,
        Some(_) => fields.get(19)?.parse().ok(),
    }
}

/// Whether `uid` is root's or our own: whose files and processes we believe as we do ourselves.
pub fn is_root_or_us(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

/// The rights of a process or thread, as ids (credentials(7)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessOwner {
    /// Real, effective, saved, and of file access.
    pub uids: [u32; 4],
    /// That of file access first, then the supplementary ones.
    pub groups: Vec<u32>,
}

/// Whose process or thread `pid` is; `None` when it is gone or may not be looked at. Not asked of the owner of
/// `/proc/PID`, which is root for every process that has made itself undumpable.
pub fn process_owner(pid: u32) -> Option<ProcessOwner> {
    let status = std::fs::read(format!("/proc/{pid}/status")).ok()?;
    // The name, first in the file, may be any bytes but a newline.
    let status = String::from_utf8_lossy(&status);
    let ids = |key: &str| -> Option<Vec<u32>> {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().map(|id| id.parse().ok()).collect()
    };
    let uids = ids("Uid:")?.try_into().ok()?;
    let mut groups = vec![*ids("Gid:")?.get(3)?];
    groups.extend(ids("Groups:")?);
    Some(ProcessOwner { uids, groups })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_process_is_ours() {
        let owner = process_owner(std::process::id()).unwrap();
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        assert_eq!(owner.uids[0], uid);
        assert_eq!(owner.groups[0], gid);
        assert_eq!(process_owner(u32::MAX), None);
    }
}
