//! Telling a process from another that took its pid.

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
