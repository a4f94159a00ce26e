//! The mounted directory: a file tree that knows nothing of FUSE, and one thin adapter that does.
//!
//! [`Mounted`] is everything one mount knows (weights, view, commits, facts for `status`); [`Tree`] shows it as files;
//! [`ctl`] parses what is written to `ctl`; [`fuse`] serves a tree through the kernel.

pub mod ctl;
mod error;
pub mod fuse;
mod job_file;
mod links;
mod mounted;
pub mod mounts;
mod permission;
mod status;
mod tree;

pub use error::FsError;
pub use mounted::{Mounted, Served, ViewMode, ViewOptions};
pub use status::{JobFacts, Status};
pub use tree::{Attributes, Content, Entry, Kind, Node, Opening, Tree};
