//! The operations that training is made of, forward and backward side by side, one file an operation.
//!
//! Nothing here knows a model, a job or a file: an operation takes slices and sizes. Letters mean the same everywhere:
//! `T` rows (tokens), `H` features, `D` head dimension, `V` vocabulary. Matrices are row-major. Which outputs are
//! written (`=`) and which are added to (`+=`) is said at each operation, since the residual stream lives by it.
//!
//! [`cpu`] is the reference, in f32; [`cuda`] its twin in bf16. What both must agree on to the bit is apart from them: the
//! random numbers ([`rng`]) and how they round a weight ([`rounding`]).

pub mod cpu;
pub mod cuda;
pub mod rng;
pub mod rounding;
