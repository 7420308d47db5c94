//! The warp roles, one file each, in the order of a token's way through the layer.

pub mod choice;
pub mod combine;
pub mod consume;
pub mod produce;
pub mod publish;
pub mod pull;
pub mod route;
pub mod schedule;
