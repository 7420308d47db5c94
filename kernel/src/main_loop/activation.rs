//! What lies between linear 1 and linear 2.

use crate::device::convert::{ex2, max_nan, min_nan, rcp};

/// `silu(gate) * up`, with the optional clamp of both.
#[inline(always)]
pub fn swiglu(gate: f32, up: f32, limit: f32) -> f32 {
    // NaN stays NaN.
    let gate = min_nan(gate, limit);
    let up = max_nan(min_nan(up, limit), -limit);
    gate * rcp(1.0 + ex2(-gate * core::f32::consts::LOG2_E)) * up
}
