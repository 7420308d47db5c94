//! A CUDA driver without GPUs, as a shared library with the exports of `libcuda.so.1` that ferromoe uses. It checks what
//! a real driver checks (handles, contexts, ranges, capture rules), writes down every call, counts what is alive, and
//! fails the call it is told to fail. Memory and kernels are those of `ptx-sim`: launches run, together, when the first
//! call comes that would wait for one.
//!
//! Tests steer it through the `fake_*` exports of [`control`]. Rules and signatures: CUDA Driver API 12.x.
#![allow(non_snake_case, clippy::missing_safety_doc, clippy::too_many_arguments)]

mod calls;
pub mod control;
mod state;
