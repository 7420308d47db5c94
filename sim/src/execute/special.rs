//! Special registers.

use super::Context;
use crate::program::Special;
use crate::registers::{LANES, Register};

impl Context<'_> {
    pub(super) fn special(&mut self, destination: Register, which: Special, active: u32) {
        let launch = self.launch;
        if matches!(which, Special::GlobalTimer { .. } | Special::Clock) {
            self.warp.polled = true;
        }
        let [x, y, _] = launch.block.map(u64::from);
        let first = self.warp_index as u64 * LANES as u64;
        let value = |lane: u64| -> u64 {
            let thread = first + lane;
            match which {
                Special::Thread(0) => thread % x,
                Special::Thread(1) => thread / x % y,
                Special::Thread(_) => thread / (x * y),
                Special::CtaThreads(axis) => u64::from(launch.block[axis]),
                Special::Cta(axis) => u64::from(self.state.index[axis]),
                Special::GridCtas(axis) => u64::from(launch.grid[axis]),
                Special::Cluster(axis) => u64::from(self.state.index[axis] / launch.cluster[axis]),
                Special::GridClusters(axis) => u64::from(launch.grid[axis] / launch.cluster[axis]),
                Special::ClusterCta(axis) => u64::from(self.state.index[axis] % launch.cluster[axis]),
                Special::ClusterCtas(axis) => u64::from(launch.cluster[axis]),
                Special::ClusterRank => u64::from(self.state.cluster.rank),
                Special::ClusterSize => self.state.cluster.members.len() as u64,
                Special::IsExplicitCluster => u64::from(launch.is_explicit),
                Special::Lane => lane,
                Special::Warp => self.warp_index as u64,
                Special::Warps => launch.block.map(u64::from).iter().product::<u64>().div_ceil(32),
                Special::Sm => u64::from(self.state.sm),
                Special::Sms => u64::from(launch.places),
                Special::Clock => self.step + self.executed,
                Special::GlobalTimer { high: false } => launch.timer_start + self.time(),
                Special::GlobalTimer { high: true } => (launch.timer_start + self.time()) >> 32,
                Special::LanemaskEq => 1 << lane,
                Special::LanemaskLe => (2u64 << lane) - 1,
                Special::LanemaskLt => (1u64 << lane) - 1,
                Special::LanemaskGe => u64::from(u32::MAX << lane),
                Special::LanemaskGt => u64::from((u32::MAX << lane) & !(1u32 << lane)),
                Special::DynamicSharedBytes => u64::from(self.state.dynamic_bytes),
                Special::TotalSharedBytes => self.state.shared.len() as u64,
                Special::Constant(value) => u64::from(value),
                Special::GridId => self.state.launch as u64,
            }
        };
        let values = std::array::from_fn(|lane| value(lane as u64));
        destination.write(&mut self.warp.registers, active, &values);
    }
}
