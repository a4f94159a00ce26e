//! What readers see: a copy of every shard, all of one step, that moves only when nobody is looking.
//!
//! [`copy`](CopiedShards) holds the bytes, one memfd a shard, refreshed by changed blocks; [`readers`](Readers) knows who
//! has weights open and until when that holds the copy still.

mod copy;
mod readers;

pub use copy::{CopiedShards, Refreshed, ViewError};
pub use readers::{Opened, Reader, Readers};
