//! What a layer should take on a GPU that is not there: bytes and operations of each phase from the routing and the kernel's own schedule, the
//! machine's rates, and a time line of tasks on SMs. docs/performance.md says what is assumed.

mod timeline;

use ferromoe_kernel::format::{Format, WEIGHT_SCALES_BYTES};
use ferromoe_kernel::layout::{BF16_BYTES, Shape, WorkspaceLayout};
use ferromoe_kernel::schedule::{Cut, ScheduleShape, TaskCursor, TileRing, group_tiles};
use ferromoe_kernel::task::{Phase, Task};
use ferromoe_kernel::tile::WEIGHT_TILE;
use serde::Serialize;

use crate::bench::{Choice, Plan, draw};
use crate::error::Result;
use crate::fused::clusters_pay;
use crate::router::Routing;
use crate::trace::Trace;
use crate::workspace::layer_shape;
use timeline::{COUNTS_NS, FIRST_ROWS_NS, RankModel};

/// The rates of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Machine {
    /// What it is called.
    pub name: &'static str,
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Device memory as a large copy reaches it, 1e9 bytes a second, reads and writes.
    pub memory_gbs: f64,
    /// NVLink in one direction, 1e9 bytes a second.
    pub nvlink_gbs: f64,
    /// Dense bf16 products, 1e12 operations a second.
    pub tflops: f64,
    /// Dense e4m3 products.
    pub fp8_tflops: f64,
    /// Bytes that stay in the L2 cache while others go through it: half of it, for each half keeps what its SMs read.
    pub l2_bytes: u64,
}

/// The machines that are modelled: an H200 as measured (docs/history.md, its NVLink by the datasheet), an H20 by its datasheet.
pub const MACHINES: [Machine; 2] = [
    Machine {
        name: "H200",
        sms: 132,
        memory_gbs: 4273.0,
        nvlink_gbs: 450.0,
        tflops: 680.0,
        fp8_tflops: 1260.0,
        l2_bytes: 30 << 20,
    },
    Machine {
        name: "H20",
        sms: 78,
        memory_gbs: 4000.0,
        nvlink_gbs: 450.0,
        tflops: 148.0,
        fp8_tflops: 296.0,
        l2_bytes: 30 << 20,
    },
];

impl Machine {
    /// Dense products of a format, 1e12 operations a second.
    pub fn tflops(&self, format: &Format) -> f64 {
        if format.scaled { self.fp8_tflops } else { self.tflops }
    }
}

/// From a launch to the first rows in the pool, in microseconds.
pub(super) const START_US: f64 = (COUNTS_NS + FIRST_ROWS_NS) / 1e3;

/// What one phase moves and computes, on the rank that takes longest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PhaseWork {
    /// Bytes of device memory that the schedule moves.
    pub memory_bytes: f64,
    /// The least: weights once; rows written once and read once where they do not stay in the cache.
    pub least_memory_bytes: f64,
    /// Bytes that come from or go to other ranks, the larger direction.
    pub nvlink_bytes: f64,
    /// Operations that the tensor cores do, padding included.
    pub tensor_ops: f64,
    /// Those for tokens.
    pub useful_ops: f64,
}

/// A layer on a machine.
#[derive(Clone, Debug, Serialize)]
pub struct Modelled {
    /// "model"
    pub implementation: &'static str,
    /// The machine.
    pub device: &'static str,
    /// The shape's name.
    pub shape: &'static str,
    /// The number format of the experts.
    pub format: &'static str,
    /// Tokens of every rank.
    pub tokens: usize,
    /// Number of ranks.
    pub ranks: usize,
    /// How tokens choose experts.
    pub routing: Choice,
    /// The time of the slowest rank's launch on the time line, in microseconds.
    pub us: f64,
    /// Dispatch, linear 1, linear 2, combine; of the slowest rank.
    pub phases: [PhaseWork; 4],
    /// All memory traffic at the machine's rate, in microseconds.
    pub memory_us: f64,
    /// All NVLink traffic.
    pub nvlink_us: f64,
    /// All operations.
    pub tensor_us: f64,
    /// The largest of these three and of what the time line has beyond the largest.
    pub bottleneck: &'static str,
    /// When everything happens.
    #[serde(skip)]
    pub trace: Trace,
    /// H and I.
    #[serde(skip)]
    pub sizes: [usize; 2],
}

/// The names of [`Modelled::phases`].
pub const PHASES: [&str; 4] = ["dispatch", "linear 1", "linear 2", "combine"];

/// Models every number of tokens of a plan on `ranks` GPUs.
///
/// # Errors
/// A configuration that the kernel cannot run.
pub fn modelled(plan: &Plan, machine: &Machine, ranks: usize) -> Result<Vec<Modelled>> {
    let config = plan.config();
    let shape = layer_shape(&config, ranks)?;
    let format = config.experts_format.kernel();
    let tflops = machine.tflops(format);
    let of_tokens = |&tokens: &usize| {
        let routings: Vec<Routing> =
            (0..ranks).map(|rank| draw::routing(&config, tokens, plan.choice, rank as u64)).collect::<Result<_>>()?;
        let loads: Vec<Load> = (0..ranks).map(|rank| Load::new(&shape, format, machine, &routings, rank)).collect();
        let mut models: Vec<RankModel> = loads.iter().map(|load| RankModel::new(load, machine)).collect();
        let results = models.iter().map(|model| model.products_end).fold(0.0, f64::max);
        models.iter_mut().zip(&loads).for_each(|(model, load)| model.combine(load, machine, results));
        let slowest = (0..ranks).max_by(|&a, &b| models[a].end.total_cmp(&models[b].end)).unwrap_or(0);
        let us = models[slowest].end / 1e3;
        let phases = loads[slowest].phases();
        let sum = |part: fn(&PhaseWork) -> f64| phases.iter().map(part).sum::<f64>();
        let memory_us = sum(|phase| phase.memory_bytes) / machine.memory_gbs / 1e3;
        let nvlink_us = sum(|phase| phase.nvlink_bytes) / machine.nvlink_gbs / 1e3;
        let tensor_us = sum(|phase| phase.tensor_ops) / tflops / 1e6;
        let largest = memory_us.max(nvlink_us).max(tensor_us);
        let terms = [
            ("memory", memory_us),
            ("NVLink", nvlink_us),
            ("tensor cores", tensor_us),
            ("latency and order", us - largest),
        ];
        let bottleneck = terms.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).map_or("", |term| term.0);
        Ok(Modelled {
            implementation: "model",
            device: machine.name,
            shape: plan.shape.name,
            format: plan.format.name(),
            tokens,
            ranks,
            routing: plan.choice,
            us,
            phases,
            memory_us,
            nvlink_us,
            tensor_us,
            bottleneck,
            trace: Trace::modelled(
                *format,
                models.into_iter().zip(&loads).map(|(model, load)| (model.ctas, load.cut.wave_tiles)),
            ),
            sizes: [config.hidden, config.intermediate],
        })
    };
    plan.tokens.iter().map(of_tokens).collect()
}

/// What one rank has to do.
pub(super) struct Load {
    shape: Shape,
    format: Format,
    /// Tokens of the rank.
    tokens: u32,
    /// Rows of each local expert, shared ones first.
    rows: Vec<u32>,
    /// The part of the rows of each local expert that come from other ranks.
    remote: Vec<f64>,
    /// The part of them that a token crosses NVLink for: its other experts here get copies.
    crossing: Vec<f64>,
    /// Results of own tokens that other ranks send.
    received: u32,
    cluster: u32,
    ctas: u32,
    cut: Cut,
    /// Whether the weights of one expert stay in the cache from one group of token tiles to the next, in linear 1 and in linear 2.
    kept: [bool; 2],
}

impl Load {
    fn new(shape: &Shape, format: &Format, machine: &Machine, routings: &[Routing], rank: usize) -> Self {
        let (shared, routed) = (shape.shared_experts as usize, shape.routed_experts() as usize);
        let own = rank * routed..(rank + 1) * routed;
        let mut rows = vec![0u32; shape.local_experts() as usize];
        let (mut from_others, mut leading) = (vec![0u32; rows.len()], vec![0u32; rows.len()]);
        let mut received = 0;
        for (source, routing) in routings.iter().enumerate() {
            for ids in routing.topk_idx().chunks(routing.top_k()) {
                let chosen = || ids.iter().filter_map(|&id| usize::try_from(id).ok());
                let here = || chosen().filter(|expert| own.contains(expert)).map(|expert| shared + expert - own.start);
                here().for_each(|expert| rows[expert] += 1);
                if source == rank {
                    received += (chosen().count() - here().count()) as u32;
                } else {
                    here().for_each(|expert| from_others[expert] += 1);
                    here().min().into_iter().for_each(|expert| leading[expert] += 1);
                }
            }
        }
        let tokens = routings[rank].tokens() as u32;
        rows[..shared].fill(tokens);
        let part_of_rows = |parts: &[u32]| {
            rows.iter().zip(parts).map(|(&all, &part)| f64::from(part) / f64::from(all.max(1))).collect::<Vec<_>>()
        };
        let cut = WorkspaceLayout::new(shape, &[*format]).cut(shape, format, machine.sms);
        let tiles: u32 = rows[shared..].iter().map(|&rows| format.tiles.tiles(rows)).sum();
        // Rows follow others where all have a place in the ring at once.
        let crossing = part_of_rows(if tiles <= cut.ring_tiles { &leading } else { &from_others });
        let remote = part_of_rows(&from_others);
        let cluster = if clusters_pay(shape, shape.max_tokens) { format.max_cluster } else { 1 };
        let kept = [2, 1].map(|times| {
            times * u64::from(shape.intermediate) * u64::from(format.row_bytes(shape.hidden)) <= machine.l2_bytes
        });
        Self {
            shape: *shape,
            format: *format,
            tokens,
            rows,
            remote,
            crossing,
            received,
            cluster,
            ctas: machine.sms / cluster * cluster,
            cut,
            kept,
        }
    }

    /// The GEMM tasks of clusters, in ticket order.
    fn tasks(&self) -> impl Iterator<Item = Task> {
        let shape = ScheduleShape {
            format: self.format,
            wave_tiles: self.cut.wave_tiles,
            part_tiles: self.cut.part_tiles,
            // The rows' places do not matter.
            ring: TileRing { first_tile: 0, first_row: 0, place_rows: 0, tiles: 1 },
            linear1_rows: 2 * self.shape.intermediate,
            linear2_rows: self.shape.hidden,
            combine_chunks: 0,
            cluster: self.cluster,
            most_rows: self.rows.iter().copied().max().unwrap_or(0),
        };
        let mut cursor = TaskCursor::new(shape, &self.rows[..]);
        (0..)
            .map(move |ticket| cursor.seek(ticket, &self.rows[..]))
            .take_while(|task| task.phase <= Phase::Linear2 as u32)
    }

    /// Columns that a task's products sum over.
    fn depth(&self, task: &Task) -> f64 {
        f64::from(task.columns(&self.shape))
    }

    /// The CTAs' tasks of a cluster's.
    fn cta_tasks(&self, task: &Task) -> impl Iterator<Item = Task> {
        let (task, format) = (*task, self.format);
        (0..self.cluster).map(move |cta| task.of(cta, &format))
    }

    /// The part of a task's stages after which the next is claimed.
    fn claimed_after(&self, task: &Task) -> f64 {
        let blocks = task.weight_tiles(&self.format, &self.shape) * self.format.k_blocks(task.columns(&self.shape));
        let stages = (self.format.packed_stages() >> (4 * task.widest)) as u32 & 0xf;
        f64::from(blocks.saturating_sub(self.format.claim_stages * stages)) / f64::from(blocks)
    }

    /// The number of each expert's first tile.
    fn first_tiles(&self) -> Vec<u32> {
        let mut next = 0;
        let first = |&rows: &u32| {
            next += self.format.tiles.tiles(rows);
            next - self.format.tiles.tiles(rows)
        };
        self.rows.iter().map(first).collect()
    }

    /// Bytes of weights that a cluster's task reads from device memory: all of its block, but for tiles that take turns at it behind another one.
    fn weight_bytes(&self, task: &Task, first_tiles: &[u32]) -> f64 {
        let tile = task.tile - first_tiles[task.expert as usize];
        let group = group_tiles(self.format.tiles, self.format.row_bytes(task.columns(&self.shape)));
        let read = if self.kept[task.phase as usize] { tile == 0 } else { tile.is_multiple_of(group) };
        if read { self.block_bytes(task) } else { 0.0 }
    }

    /// Operations of one CTA's task: whole weight tiles, k-blocks and token tiles. Where tokens are A, only the warpgroups that have some of them multiply.
    fn operations(&self, task: &Task) -> f64 {
        let rows = task.weight_tiles(&self.format, &self.shape) * WEIGHT_TILE;
        let depth = self.format.k_blocks(task.columns(&self.shape)) * self.format.k_block();
        2.0 * f64::from(rows * self.format.tiles.width(task.width)) * f64::from(depth)
    }

    /// Those for tokens.
    fn useful_operations(&self, task: &Task) -> f64 {
        2.0 * f64::from(self.weight_rows(task) * task.rows) * self.depth(task)
    }

    /// Weight rows of one CTA's task that there are: behind the last there is nothing.
    fn weight_rows(&self, task: &Task) -> u32 {
        let all = if task.is_linear1() { 2 * self.shape.intermediate } else { self.shape.hidden };
        task.weight_rows(&self.format).min(all.saturating_sub(task.weight_row))
    }

    /// Bytes of the weights of a cluster's task, with their scales.
    fn block_bytes(&self, task: &Task) -> f64 {
        let rows: u32 = self.cta_tasks(task).map(|task| self.weight_rows(&task)).sum();
        let scales = if self.format.scaled {
            let tiles: u32 = self.cta_tasks(task).map(|task| task.weight_tiles(&self.format, &self.shape)).sum();
            tiles * self.format.k_blocks(task.columns(&self.shape)) * WEIGHT_SCALES_BYTES
        } else {
            0
        };
        f64::from(rows * self.format.element_bytes) * self.depth(task) + f64::from(scales)
    }

    /// Bytes of a row of results, and of the output.
    fn row_bytes(&self) -> f64 {
        f64::from(self.shape.hidden) * BF16_BYTES as f64
    }

    /// Bytes of a token as it is pulled.
    fn record_bytes(&self) -> f64 {
        f64::from(self.format.record_bytes(self.shape.hidden))
    }

    /// Bytes that combine reads and writes.
    fn combine_bytes(&self) -> f64 {
        let results: f64 = f64::from(self.tokens) * f64::from(self.shape.slots() + 1);
        results * self.row_bytes()
    }

    fn phases(&self) -> [PhaseWork; 4] {
        let mut phases = [PhaseWork::default(); 4];
        let row = self.row_bytes();
        let all: f64 = self.rows.iter().map(|&rows| f64::from(rows)).sum();
        let sum = |parts: &[f64]| self.rows.iter().zip(parts).map(|(&rows, part)| f64::from(rows) * part).sum::<f64>();
        // Own tokens are read once; every row is written to the pool.
        let record = self.record_bytes();
        let quantised = if self.format.scaled { f64::from(self.tokens) * record } else { 0.0 };
        phases[0].memory_bytes = f64::from(self.tokens) * row + quantised + all * record;
        phases[0].least_memory_bytes = f64::from(self.tokens) * row;
        phases[0].nvlink_bytes = sum(&self.crossing) * record;
        let first_tiles = self.first_tiles();
        for task in self.tasks() {
            let work = &mut phases[1 + task.phase as usize];
            work.memory_bytes += self.weight_bytes(&task, &first_tiles);
            if first_tiles[task.expert as usize] == task.tile {
                work.least_memory_bytes += self.block_bytes(&task);
            }
            work.tensor_ops += self.cta_tasks(&task).map(|task| self.operations(&task)).sum::<f64>();
            work.useful_ops += self.cta_tasks(&task).map(|task| self.useful_operations(&task)).sum::<f64>();
        }
        phases[2].nvlink_bytes = (sum(&self.remote) * row).max(f64::from(self.received) * row);
        phases[3].memory_bytes = self.combine_bytes();
        phases[3].least_memory_bytes = self.combine_bytes();
        phases
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{BenchShape, simulated};
    use crate::config::ExpertFormat;
    use crate::fused::Part;
    use crate::group::{Device, DeviceGroup, SimOptions};

    /// The sums over all ranks of a simulated group.
    fn scheduled(plan: &Plan, sms: u32, ranks: usize, tokens: usize) -> [PhaseWork; 4] {
        let config = plan.config();
        let shape = layer_shape(&config, ranks).unwrap();
        let routing = |rank| draw::routing(&config, tokens, plan.choice, rank as u64).unwrap();
        let routings: Vec<_> = (0..ranks).map(routing).collect();
        let machine = Machine { sms, l2_bytes: u64::MAX, ..MACHINES[0] };
        let mut sum = [PhaseWork::default(); 4];
        for rank in 0..ranks {
            for (sum, phase) in sum
                .iter_mut()
                .zip(Load::new(&shape, config.experts_format.kernel(), &machine, &routings, rank).phases())
            {
                sum.memory_bytes += phase.memory_bytes;
                sum.tensor_ops += phase.tensor_ops;
                sum.useful_ops += phase.useful_ops;
            }
        }
        sum
    }

    /// Shapes with whole k-blocks and weight tiles, and with partial ones; tiles of all widths.
    #[test]
    fn the_schedule_s_operations_are_those_that_the_simulator_counts() {
        let options = SimOptions::default();
        let group = DeviceGroup::open(Device::Sim(options), 2).unwrap();
        let formats = [ExpertFormat::Bf16, ExpertFormat::Fp8];
        for (name, format) in
            ["flash", "gpt-oss-120b"].into_iter().flat_map(|name| formats.map(|format| (name, format)))
        {
            let shape = BenchShape::find(name).unwrap().scaled_down(2);
            let plan = Plan { shape, experts: 16, format, choice: Choice::Skewed, tokens: vec![3, 90] };
            simulated(&plan, &group, |found| {
                let tokens = found.setting.tokens;
                let phases = scheduled(&plan, options.sms, 2, tokens);
                for part in [Part::Linear1, Part::Linear2] {
                    let (counted, scheduled) = (found.phases[part as usize], phases[part as usize]);
                    assert_eq!(counted.tensor_ops as f64, scheduled.tensor_ops, "{name} in {format:?}: {counted:?}");
                    assert_eq!(counted.least_ops as f64, scheduled.useful_ops, "{name} in {format:?}: {counted:?}");
                }
            })
            .unwrap();
        }
    }
}
