//! The `weightfs` command.

fn main() -> std::process::ExitCode {
    weightfs::cli::run(std::env::args_os().collect())
}
