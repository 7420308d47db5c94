//! Which phase uses which memory of a rank: so the simulator's counters, which it keeps by place, become those of phases.

use std::ops::Range;

use ferromoe_kernel::layout::BF16_BYTES;
use ferromoe_kernel::quantise::groups;
use ptx_sim::Traffic;

use super::{FusedMoe, RankInputs};
use crate::error::Result;

/// The phases of a launch, and what none of them needs for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Routing, and pulling rows into the token pool.
    Dispatch,
    /// The first product, SwiGLU, and the intermediate pool.
    Linear1,
    /// The second product, and the results in the combine buffers.
    Linear2,
    /// The sums of results.
    Combine,
    /// Tickets, counts of rows and tasks, status; parameters.
    Control,
}

/// Their names, in order.
pub(crate) const PARTS: [&str; 5] = ["dispatch", "linear 1", "linear 2", "combine", "control"];

impl FusedMoe {
    /// What the last launch did with a rank's memory, by the part whose doing it was; `None` on a GPU. `tokens` is how many `inputs` has. What a line
    /// is read for again does not count, so it is the first reader's.
    ///
    /// # Errors
    /// A rank of another process, or inputs that are not in the rank's memory.
    pub(crate) fn traffic(
        &self,
        rank: usize,
        inputs: &RankInputs,
        tokens: usize,
    ) -> Result<Option<[Traffic; PARTS.len()]>> {
        let mut parts = [Traffic::default(); PARTS.len()];
        for (range, reader, writer) in self.places(rank, inputs, tokens as u64)? {
            let Some(traffic) = self.workspace.group().backend.traffic(range)? else { return Ok(None) };
            let written =
                Traffic { hbm_write: traffic.hbm_write, nvlink_write: traffic.nvlink_write, ..Traffic::default() };
            parts[reader as usize] += Traffic { hbm_write: 0, nvlink_write: 0, ..traffic };
            parts[writer as usize] += written;
        }
        Ok(Some(parts))
    }

    /// Ranges of a rank's memory with the part that reads each and the one that writes it, on whatever rank it runs.
    fn places(&self, rank: usize, inputs: &RankInputs, tokens: u64) -> Result<Vec<(Range<u64>, Part, Part)>> {
        use Part::{Combine, Control, Dispatch, Linear1, Linear2};
        let state = self.rank(rank)?;
        let params = &state.params[0];
        let (symmetric, workspace) = (&params.symmetric, &params.workspace);
        let row = u64::from(self.shape.hidden) * BF16_BYTES;
        // FP8 tokens have a byte for each element, and scales.
        let (in_row, scales) = match inputs.hidden_scales {
            0 => (row, 0),
            _ => (row / BF16_BYTES, tokens * u64::from(groups(self.shape.hidden)) * 4),
        };
        let choices = tokens * u64::from(self.shape.top_k) * 4;
        let at = |base: u64, from: u64, to: u64| base + from..base + to;
        let shared = |from, to| at(params.symmetric_bases[rank], from, to);
        let own = |from, to| at(params.workspace_base, from, to);
        let weights = [&state.linear1, &state.linear2].map(|buffer| at(buffer.address(), 0, buffer.bytes()));
        let [linear1, linear2] = weights;
        let mut places = vec![
            (at(inputs.hidden_states, 0, tokens * in_row), Dispatch, Control),
            (at(inputs.topk_idx, 0, choices), Dispatch, Control),
            (at(inputs.topk_weights, 0, choices), Dispatch, Control),
            (at(inputs.tokens, 0, 4), Dispatch, Control),
            (at(inputs.output, 0, tokens * row), Control, Combine),
            (shared(symmetric.counts, symmetric.flags), Dispatch, Dispatch),
            (shared(symmetric.flags, symmetric.lists), Combine, Linear2),
            (shared(symmetric.lists, symmetric.combine), Dispatch, Dispatch),
            (shared(symmetric.combine, symmetric.quantised), Combine, Linear2),
            (
                shared(symmetric.quantised, symmetric.bytes(self.workspace.shape(), self.workspace.formats())),
                Dispatch,
                Dispatch,
            ),
            (own(workspace.row_result, workspace.row_weight), Linear2, Dispatch),
            (own(workspace.row_weight, workspace.tokens), Linear1, Dispatch),
            (own(workspace.tokens, workspace.intermediate), Linear1, Dispatch),
            (own(workspace.intermediate, workspace.bytes), Linear2, Linear1),
            (linear1, Linear1, Control),
            (linear2, Linear2, Control),
        ];
        if scales > 0 {
            places.push((at(inputs.hidden_scales, 0, scales), Dispatch, Control));
        }
        Ok(places)
    }
}
