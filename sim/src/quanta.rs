//! Runs devices side by side, in quanta of simulated time.
//!
//! Within a quantum every device runs by itself, with its own memory, clock and random numbers. What is about another
//! device's memory is parked (see [`Run::meet_peers`]): it is carried out between quanta, device by device, each one's in the
//! order in which it came. That leaves nothing for threads to decide, so a run does not depend on how many there are. Where
//! only one device has launches, nothing is parked, and all of its run is one quantum.

use crate::check::Checker;
use crate::cost::Cost;
use crate::error::{SimError, Stuck};
use crate::execute::NEVER;
use crate::machine::RunOptions;
use crate::memory::GlobalMemory;
use crate::random::Random;
use crate::schedule::{HOPELESS_NS, Prepared, Progress, Run};
use crate::workers::Workers;

/// Quanta take 2^6 to 2^9 ns.
const SHORTEST: u64 = 6;
const LENGTHS: u64 = 4;

/// What comes of a run.
pub(crate) struct Outcome {
    pub costs: Result<Vec<Cost>, SimError>,
    pub printed: String,
    pub reports: Vec<SimError>,
}

/// Runs all launches to their end.
pub(crate) fn run(memory: &mut GlobalMemory, prepared: &[Prepared<'_>], options: &RunOptions) -> Outcome {
    let count = memory.devices();
    let is_used = |device: &usize| prepared.iter().any(|launch| launch.info.device == *device);
    let devices: Vec<_> = (0..count).filter(is_used).map(|device| Run::new(device, count, prepared, options)).collect();
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    // What the checks know is about all devices.
    let threads = if options.checks { 1 } else { options.threads.map_or_else(cores, usize::from) };
    let threads = threads.min(devices.len());
    let workers = Workers::new(devices.len());
    let mut together = Together {
        devices,
        memory,
        checker: options.checks.then(|| Box::new(Checker::new(options.policy(), options.in_order))),
        random: Random::new(options.seed.rotate_left(32)),
        until: 0,
        progress: (0, 0),
        options,
    };
    together.exchange();
    let result = std::thread::scope(|scope| {
        let _end = workers.end_on_drop();
        // Where there can be no thread a run takes longer, and is the same.
        let spawn = |_: &usize| std::thread::Builder::new().spawn_scoped(scope, || workers.help()).is_ok();
        let helped = (1..threads).take_while(spawn).count() > 0;
        together.drive(helped.then_some(&workers))
    });
    together.exchange();
    let (costs, printed, reports) = together.end();
    Outcome { costs: result.map(|()| costs), printed, reports }
}

/// All devices that run, and what they share.
struct Together<'a, 'm> {
    devices: Vec<Run<'a>>,
    /// What is not with a device.
    memory: &'m mut GlobalMemory,
    checker: Option<Box<Checker>>,
    random: Random,
    /// The end of the quantum, in nanoseconds.
    until: u64,
    /// When anything changed last, and how many changes there were until then.
    progress: (u64, u64),
    options: &'a RunOptions,
}

impl<'a> Together<'a, '_> {
    fn drive(&mut self, workers: Option<&Workers<'a>>) -> Result<(), SimError> {
        loop {
            self.until = self.next_quantum();
            let reached = self.quantum(workers)?;
            if let Some(limit) = self.options.step_limit
                && self.devices.iter().map(|run| run.step).sum::<u64>() > limit
            {
                return Err(SimError::StepLimit { limit, warps: self.stuck() });
            }
            if reached.iter().all(|reached| *reached == Progress::Done) {
                return Ok(());
            }
            self.exchange();
            let met = self.meet();
            self.exchange();
            let progress = self.devices.iter().map(|run| run.progress).sum();
            if progress != self.progress.1 {
                self.progress = (self.until, progress);
                self.devices.iter_mut().for_each(Run::note_progress);
            }
            let hopeless = self.until - self.progress.0 >= HOPELESS_NS;
            if !met? && reached.iter().all(|reached| *reached != Progress::Time) || hopeless {
                let polling = self.devices.iter().any(Run::is_polling);
                let stuck = self.stuck();
                return Err(if polling { SimError::Livelock(stuck) } else { SimError::Deadlock(stuck) });
            }
        }
    }

    /// When the next quantum ends. The longer nothing has changed, the longer they are, so that deadlines expire soon.
    fn next_quantum(&mut self) -> u64 {
        if self.devices.len() == 1 {
            return NEVER;
        }
        let idle = self.until - self.progress.0;
        let next = self.devices.iter_mut().filter_map(Run::next_time).min().unwrap_or(0);
        self.until.max(next) + (1 << (SHORTEST + self.random.below(LENGTHS))) + idle / 8
    }

    /// Lets each device run to the end of the quantum. Of several errors the one that came first in simulated time counts.
    fn quantum(&mut self, workers: Option<&Workers<'a>>) -> Result<Vec<Progress>, SimError> {
        let until = self.until;
        let reached = if let Some(workers) = workers {
            workers.drive(&mut self.devices, until)
        } else {
            let mut reached = Vec::with_capacity(self.devices.len());
            for run in &mut self.devices {
                std::mem::swap(&mut run.checker, &mut self.checker);
                reached.push(run.drive(until));
                std::mem::swap(&mut run.checker, &mut self.checker);
                // What the checks have found is the error of whoever runs on.
                if self.checker.is_some() && reached.iter().any(Result::is_err) {
                    break;
                }
            }
            reached
        };
        let first =
            self.devices.iter().zip(&reached).filter(|(_, reached)| reached.is_err()).min_by_key(|(run, _)| run.time);
        match first {
            Some((_, Err(error))) => Err(error.clone()),
            _ => reached.into_iter().collect(),
        }
    }

    /// Carries out what is parked; whether there was anything.
    fn meet(&mut self) -> Result<bool, SimError> {
        let mut any = false;
        for run in &mut self.devices {
            std::mem::swap(&mut run.checker, &mut self.checker);
            run.memory.exchange_all(self.memory);
            let met = run.meet_peers();
            run.memory.exchange_all(self.memory);
            std::mem::swap(&mut run.checker, &mut self.checker);
            any |= met?;
        }
        Ok(any)
    }

    /// Gives each device its own memory, or takes it back; all memory if it is the only one.
    fn exchange(&mut self) {
        if let [run] = &mut self.devices[..] {
            return run.memory.exchange_all(self.memory);
        }
        for run in &mut self.devices {
            run.memory.exchange(run.device, self.memory);
        }
    }

    /// Performs all stores, and gives what the launches have cost, what they have printed and what was reported.
    fn end(self) -> (Vec<Cost>, String, Vec<SimError>) {
        let (mut costs, mut printed, mut reports) = (vec![], String::new(), vec![]);
        for mut run in self.devices {
            run.memory.exchange_all(self.memory);
            run.memory.deliver();
            run.memory.exchange_all(self.memory);
            printed.push_str(&run.printed);
            reports.extend(run.reports);
            costs.resize(run.launches.len(), Cost::default());
            for (cost, launch) in costs.iter_mut().zip(&run.launches) {
                if launch.prepared.info.device == run.device {
                    *cost = launch.cost;
                }
            }
            if let (Some(profiler), Some(profile)) = (run.profiler, &self.options.profile) {
                profiler.finish(profile);
            }
        }
        self.memory.settle();
        (costs, printed, reports)
    }

    /// Where every group of lanes is, and what it waits for.
    fn stuck(&self) -> Vec<Stuck> {
        self.devices.iter().flat_map(Run::stuck).collect()
    }
}
