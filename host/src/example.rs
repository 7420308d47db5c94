//! The example that comes inside the library: a tiny DeepSeek-V3 layer with a recorded forward pass.

use std::sync::Arc;

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::input::MoeInput;

/// What stands for the example's folder in messages.
pub const NAME: &str = "bundled deepseek-v3 example";

macro_rules! file {
    ($name:literal) => {
        include_bytes!(concat!("../../tests/fixtures/deepseek-v3/", $name))
    };
}

/// The checkpoint.
pub fn checkpoint() -> Result<Checkpoint> {
    Checkpoint::embedded(NAME, file!("config.json"), Arc::new(file!("model.safetensors")))
}

/// A recorded forward pass of its only MoE layer.
pub fn input() -> Result<MoeInput> {
    MoeInput::embedded(NAME, Arc::new(file!("moe_io.safetensors")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_is_whole() {
        let (checkpoint, input) = (checkpoint().unwrap(), input().unwrap());
        let layer = checkpoint.layer(input.layer.unwrap()).unwrap();
        assert_eq!(checkpoint.first_moe_layer(), input.layer);
        layer.config(input.tokens).validate(8).unwrap();
        assert_eq!(layer.config(1).hidden, input.hidden);
    }
}
