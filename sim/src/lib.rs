//! Runs PTX on the CPU: several GPUs in one address space, and Hopper's asynchronous instructions.
//!
//! [`Module::parse`] reads and decodes PTX once; a [`Machine`] holds the devices' memories and runs [`Launch`]es
//! together, interleaved by a seed. See the README for what is simulated, and how.

mod ast;
mod asynchronous;
mod check;
pub mod convert;
mod cost;
mod cta;
mod decode;
mod error;
mod execute;
mod land;
mod lexer;
mod machine;
pub mod matrix;
pub mod mbarrier;
mod mbarrier_op;
mod memory;
mod parse;
mod profile;
mod program;
mod quanta;
mod random;
mod registers;
mod schedule;
mod skew;
mod store_buffer;
pub mod tensor_map;

mod waiver;
pub mod wgmma;
mod workers;

pub use cost::{Cost, Traffic, WarpWaits};
pub use error::{Fault, ParseError, Position, SimError, Stuck};
pub use machine::{Arg, Launch, Machine, RunOptions};
pub use profile::{Kind, KindCost, Profile};
pub use program::Module;
pub use tensor_map::{TensorMap, TensorMapSpec};
pub use waiver::{Check, Checks, UnknownCheck};
