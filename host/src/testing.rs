//! What the unit tests share: the fixtures, and a small layer.

use std::path::PathBuf;

use crate::config::MoeConfig;

/// The four recorded checkpoints.
pub const FIXTURES: [&str; 4] = ["mixtral", "qwen3-moe", "deepseek-v3", "deepseek-v4"];

/// The folder of one of them.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// Four experts of 64 x 64, top-2, one shared expert.
pub fn small_config() -> MoeConfig {
    MoeConfig {
        hidden: 64,
        intermediate: 64,
        experts: 4,
        top_k: 2,
        max_tokens_per_rank: 16,
        swiglu_limit: None,
        shared_experts: 1,
    }
}
