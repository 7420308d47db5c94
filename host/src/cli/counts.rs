//! What the simulator counted, for people: a table of phases for each number of tokens.

use ferromoe::bench::{Estimate, PhaseCount, RatioLimits, RoleWaits, SimMeasurement};

/// What the tables say.
pub const LEGEND: &str = "\
memory: lines of 128 bytes, each read once and written once (an ideal L2 cache); the least: weights of hit experts and inputs read once, the output
written once, what a phase hands to the next written once and read once. NVLink, the least: a token once for each rank with experts of it, a result
for every choice on another rank. A ratio above its limit is marked !";

/// The tables of one measurement.
pub fn table(found: &SimMeasurement) -> String {
    let SimMeasurement { setting, limits, estimates, waits, .. } = found;
    let [fewest, lower, median, upper, most] = found.tokens_per_expert;
    let mut lines = vec![
        format!(
            "\n{} tokens a rank: {fewest} to {most} an expert (quartiles {lower}, {median}, {upper}), {:.1} experts a rank hit, error {:.1e}",
            setting.tokens, setting.hit_experts, setting.relative_error
        ),
        format!(
            "  {:<9} {:>13} {:>13} {:>8} {:>13} {:>13} {:>8} {:>16} {:>7}",
            "phase", "memory", "least", "ratio", "NVLink", "least", "ratio", "operations", "useful"
        ),
    ];
    lines.extend(found.phases.iter().chain([&found.all]).map(|phase| row(phase, limits)));
    lines.push(format!(
        "  limits: memory {}, NVLink {}; weights, tokens in and out alone are {:.0} bytes; {} bytes of L2, {} warp instructions",
        limits.memory, limits.nvlink, found.compulsory_bytes, found.l2_bytes, found.instructions
    ));
    let waits: Vec<_> =
        waits.iter().map(|&RoleWaits { role, waits, met }| format!("{role} {met} of {waits}")).collect();
    lines.push(format!("  mbarrier waits met at first look: {}", waits.join(", ")));
    lines.extend(estimates.iter().map(estimate));
    lines.join("\n")
}

fn row(phase: &PhaseCount, limits: &RatioLimits) -> String {
    format!(
        "  {:<9} {:>13} {:>13} {:>8} {:>13} {:>13} {:>8} {:>16} {:>7}",
        phase.phase,
        phase.memory_bytes,
        phase.least_memory_bytes,
        ratio(phase.memory_ratio(), limits.memory),
        phase.nvlink_bytes,
        phase.least_nvlink_bytes,
        ratio(phase.nvlink_ratio(), limits.nvlink),
        phase.tensor_ops,
        phase.useful().map_or_else(|| "-".into(), |part| format!("{:.1}%", 100.0 * part)),
    )
}

fn ratio(found: Option<f64>, limit: f64) -> String {
    found.map_or_else(|| "-".into(), |ratio| format!("{ratio:.3}{}", if ratio > limit { "!" } else { " " }))
}

fn estimate(of: &Estimate) -> String {
    format!(
        "  {} estimate {:.1} us: start {:.1} + the largest of memory {:.1}, NVLink {:.1}, tensor cores {:.1}; bottleneck: {}",
        of.machine, of.us, of.start_us, of.memory_us, of.nvlink_us, of.tensor_us, of.bottleneck
    )
}
