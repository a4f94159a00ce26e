//! weightfs mounts the live weights of a running language model as a Hugging Face model directory, and commits what
//! changed to the directory on disk. `docs/` says what users meet; the folders of `src/` follow the path of a byte:
//! `source` (where an engine keeps its weights) to `image` (shard files made of them) to `view` (copies of one step)
//! to `fs` (files), and from `image` to `commit` (the directory on disk).

pub mod cli;
pub mod commit;
pub mod compute;
pub mod fs;
pub mod image;
pub mod memory;
pub mod model;
pub mod source;
pub mod train;
pub mod view;
