//! What a forward pass must do at least, counted from its routing.

use crate::config::MoeConfig;
use crate::router::Routing;

/// Bytes of a bf16.
const BF16: f64 = 2.0;

/// The least that one rank has to do in one forward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RankWork {
    /// Floating-point operations: 2 x 3 x H x I for every (token, expert), shared experts included.
    pub operations: f64,
    /// Bytes of device memory: the weights of every expert that a token goes to, once, and the rank's own tokens, in and
    /// out.
    pub memory_bytes: f64,
    /// Bytes that come in from other ranks: the hidden state of every token from elsewhere that goes to an expert here, once, and a
    /// result for every choice of an own token that lies elsewhere. As many go out, over all ranks.
    pub nvlink_bytes: f64,
    /// Experts of this rank that a token goes to, shared ones included.
    pub hit_experts: f64,
}

/// The work of every rank when rank r brings the tokens of `routings[r]`.
pub fn of_ranks(config: &MoeConfig, routings: &[Routing]) -> Vec<RankWork> {
    let ranks = routings.len();
    let per_rank = config.experts / ranks;
    let matrices = 3.0 * (config.hidden * config.intermediate) as f64;
    let element = f64::from(config.experts_format.kernel().element_bytes);
    let record = f64::from(config.experts_format.kernel().record_bytes(config.hidden as u32));
    let row = config.hidden as f64 * BF16;
    let mut pairs = vec![0.0; ranks];
    let mut crossing = vec![0.0; ranks];
    let mut hit = vec![false; config.experts];
    for (from, routing) in routings.iter().enumerate() {
        for token in routing.topk_idx().chunks(config.top_k) {
            let mut reached = vec![false; ranks];
            for expert in token.iter().filter_map(|&id| usize::try_from(id).ok()) {
                let to = expert / per_rank;
                hit[expert] = true;
                pairs[to] += 1.0;
                if to != from {
                    crossing[from] += row;
                    if !std::mem::replace(&mut reached[to], true) {
                        crossing[to] += record;
                    }
                }
            }
        }
    }
    (0..ranks)
        .map(|rank| {
            let tokens = routings[rank].tokens() as f64;
            let shared = if tokens > 0.0 { config.shared_experts as f64 } else { 0.0 };
            let routed = hit[config.experts_of(rank, ranks)].iter().filter(|&&hit| hit).count() as f64;
            RankWork {
                operations: 2.0 * matrices * (pairs[rank] + shared * tokens),
                memory_bytes: (routed + shared) * matrices * element + 2.0 * tokens * row,
                nvlink_bytes: crossing[rank],
                hit_experts: routed + shared,
            }
        })
        .collect()
}

/// The tokens of every routed expert.
pub fn loads(config: &MoeConfig, routings: &[Routing]) -> Vec<usize> {
    let mut loads = vec![0; config.experts];
    for expert in routings.iter().flat_map(Routing::topk_idx).filter_map(|&id| usize::try_from(id).ok()) {
        loads[expert] += 1;
    }
    loads
}

/// The tokens of the busiest routed expert, as a multiple of the mean.
pub fn imbalance(config: &MoeConfig, routings: &[Routing]) -> f64 {
    let loads = loads(config, routings);
    let (most, all) = (loads.iter().max().copied().unwrap_or(0), loads.iter().sum::<usize>());
    if all == 0 { 1.0 } else { (most * config.experts) as f64 / all as f64 }
}

/// The mean over several forward passes, rank by rank.
pub fn mean(passes: &[Vec<RankWork>]) -> Vec<RankWork> {
    let ranks = passes.first().map_or(0, Vec::len);
    let mean = |rank: usize, part: fn(&RankWork) -> f64| {
        passes.iter().map(|pass| part(&pass[rank])).sum::<f64>() / passes.len() as f64
    };
    (0..ranks)
        .map(|rank| RankWork {
            operations: mean(rank, |work| work.operations),
            memory_bytes: mean(rank, |work| work.memory_bytes),
            nvlink_bytes: mean(rank, |work| work.nvlink_bytes),
            hit_experts: mean(rank, |work| work.hit_experts),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::small_config;

    #[test]
    fn the_minimum_is_counted_by_hand() {
        // H = I = 64, four experts on two ranks, top-2, one shared.
        let config = small_config();
        let routing = |ids: &[i32]| Routing::new(2, ids.to_vec(), vec![0.5; ids.len()]).unwrap();
        let routings = [routing(&[2, 3, 0, -1]), routing(&[3, 2])];
        let works = of_ranks(&config, &routings);
        let (pair, expert, row) = (2.0 * 3.0 * 4096.0, 3.0 * 4096.0 * 2.0, 128.0);
        assert_eq!(
            works[0],
            RankWork {
                operations: (1.0 + 2.0) * pair,
                memory_bytes: 2.0 * expert + 4.0 * row,
                nvlink_bytes: 2.0 * row,
                hit_experts: 2.0,
            }
        );
        assert_eq!(
            works[1],
            RankWork {
                operations: (4.0 + 1.0) * pair,
                memory_bytes: 3.0 * expert + 2.0 * row,
                nvlink_bytes: row,
                hit_experts: 3.0,
            }
        );
        assert_eq!(imbalance(&config, &routings), 2.0 * 4.0 / 5.0);
        assert_eq!(mean(&[works.clone(), works.clone()]), works);
    }
}
