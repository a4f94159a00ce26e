//! Training of live weights, in place: jobs in, changed weights out. `docs/training.md` tells users what it does.
//!
//! The path of a sample: `job` reads it, `sample` (with `chat`) makes ids of it, `pack` lays several side by side,
//! `step` runs a model of `families` forward and back, `gradients` makes one tensor's gradient at a time, and `apollo`
//! turns that into an update. Underneath are the operations of [`crate::compute`]; live weights come in through
//! [`Weights`].

pub mod apollo;
pub mod chat;
pub mod config;
mod delta_net;
pub mod families;
pub mod gpu;
pub mod gradients;
mod head;
pub mod job;
mod json;
pub mod live;
pub mod pack;
pub mod queue;
pub mod records;
pub mod sample;
pub mod settings;
pub mod state;
pub mod step;
pub mod trainer;
pub mod weights;

pub use config::{Config, Refusal};
pub use families::Architecture;
pub use job::{BadJob, Job, Plan};
pub use live::{LiveWeights, StepEnd};
pub use pack::{Batch, Tokens};
pub use queue::{JobRecord, JobState, Queue, QueueError, QueueStatus};
pub use records::JobRecords;
pub use sample::{Sample, TextModel};
pub use settings::{Optimizer, Rounding, Settings};
pub use state::OptimizerState;
pub use step::{Model, StepError};
pub use trainer::{StepReport, Trainer};
pub use weights::{DeviceTensor, InMemory, Location, Step, TensorSpec, Weights};
