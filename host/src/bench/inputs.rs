//! Sets of inputs in device memory, one after the other of which every launch takes.

use half::bf16;

use crate::bench::draw;
use crate::bench::draw::Choice;
use crate::config::MoeConfig;
use crate::error::Result;
use crate::fused::RankInputs;
use crate::group::DeviceGroup;
use crate::memory::DeviceBuffer;
use crate::router::Routing;

/// Hidden states of all sets: each rank of each set has its tokens a row further, so that no two are alike.
pub struct States {
    values: Vec<bf16>,
    hidden: usize,
}

impl States {
    /// For up to `tokens` tokens a rank, and `shares` (sets x ranks) shares of them.
    pub fn new(tokens: usize, hidden: usize, shares: usize) -> Self {
        Self { values: draw::values(tokens + shares, hidden, 1.0, 17), hidden }
    }

    /// [tokens, H] of a share.
    pub fn of(&self, share: usize, tokens: usize) -> &[bf16] {
        &self.values[share * self.hidden..(share + tokens) * self.hidden]
    }
}

/// The inputs of one forward pass on all ranks, and room for its outputs.
pub struct InputSet {
    /// Each rank's routing.
    pub routings: Vec<Routing>,
    ranks: Vec<RankBuffers>,
}

struct RankBuffers {
    hidden_states: DeviceBuffer,
    topk_idx: DeviceBuffer,
    topk_weights: DeviceBuffer,
    tokens: DeviceBuffer,
    output: DeviceBuffer,
}

impl InputSet {
    /// Draws and uploads set number `set`. Its outputs are NaN until a launch writes them.
    pub fn new(
        group: &DeviceGroup,
        config: &MoeConfig,
        states: &States,
        tokens: usize,
        choice: Choice,
        set: usize,
    ) -> Result<Self> {
        let shares = || (0..group.ranks()).map(|rank| set * group.ranks() + rank);
        let routings =
            shares().map(|share| draw::routing(config, tokens, choice, share as u64)).collect::<Result<Vec<_>>>()?;
        let ranks = shares()
            .zip(&routings)
            .enumerate()
            .map(|(rank, (share, routing))| RankBuffers::new(group, rank, states.of(share, tokens), routing))
            .collect::<Result<_>>()?;
        let set = Self { routings, ranks };
        set.poison(group)?;
        Ok(set)
    }

    /// Makes the outputs NaN.
    pub fn poison(&self, group: &DeviceGroup) -> Result<()> {
        let fill = |(rank, buffers): (usize, &RankBuffers)| {
            group.backend.fill(rank, buffers.output.address(), buffers.output.bytes(), 0xff)
        };
        self.ranks.iter().enumerate().try_for_each(fill)
    }

    /// The arguments of one rank's launch.
    pub fn inputs(&self, rank: usize) -> RankInputs {
        let buffers = &self.ranks[rank];
        RankInputs {
            hidden_states: buffers.hidden_states.address(),
            hidden_scales: 0,
            topk_idx: buffers.topk_idx.address(),
            topk_weights: buffers.topk_weights.address(),
            tokens: buffers.tokens.address(),
            output: buffers.output.address(),
            most_tokens: self.routings.iter().map(Routing::tokens).max().unwrap_or(0) as u32,
        }
    }

    /// Every rank's output.
    pub fn outputs(&self, group: &DeviceGroup) -> Result<Vec<Vec<bf16>>> {
        let output = |(rank, buffers): (usize, &RankBuffers)| {
            let mut output = vec![bf16::ZERO; buffers.output.bytes() as usize / size_of::<bf16>()];
            group.backend.read(rank, buffers.output.address(), bytemuck::cast_slice_mut(&mut output))?;
            Ok(output)
        };
        self.ranks.iter().enumerate().map(output).collect()
    }
}

impl RankBuffers {
    fn new(group: &DeviceGroup, rank: usize, states: &[bf16], routing: &Routing) -> Result<Self> {
        let backend = &group.backend;
        let with = |contents: &[u8], name| DeviceBuffer::with(backend, rank, contents, name);
        let output = DeviceBuffer::new(backend, rank, size_of_val(states).max(1) as u64, "output")?;
        Ok(Self {
            hidden_states: with(bytemuck::cast_slice(states), "hidden states")?,
            topk_idx: with(bytemuck::cast_slice(routing.topk_idx()), "expert ids")?,
            topk_weights: with(bytemuck::cast_slice(routing.topk_weights()), "routing weights")?,
            tokens: with(bytemuck::bytes_of(&(routing.tokens() as u32)), "token count")?,
            output,
        })
    }
}
