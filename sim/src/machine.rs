//! The public face: devices with memories, and launches.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use crate::ast::InitialValue;
use crate::cost::{Cost, Traffic};
use crate::error::{Fault, SimError, lines};
use crate::execute::LaunchInfo;
use crate::memory::{CODE_WINDOW, GlobalMemory};
use crate::profile::Profile;
use crate::program::{Entry, Module, Reference};
use crate::quanta;
use crate::random::Random;
use crate::schedule::Prepared;
use crate::waiver::{Checks, Policy};
use crate::wgmma::Fp8Sums;

/// A kernel argument.
#[derive(Debug, Clone, PartialEq)]
pub enum Arg {
    /// 32 bits.
    U32(u32),
    /// 64 bits, such as a device pointer.
    U64(u64),
    /// Single precision.
    F32(f32),
    /// A structure, as its bytes.
    Bytes(Vec<u8>),
}

impl Arg {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::U32(value) => value.to_le_bytes().to_vec(),
            Self::U64(value) => value.to_le_bytes().to_vec(),
            Self::F32(value) => value.to_le_bytes().to_vec(),
            Self::Bytes(bytes) => bytes.clone(),
        }
    }
}

/// One kernel launch on one device.
#[derive(Debug, Clone)]
pub struct Launch<'a> {
    /// Device that runs it.
    pub device: usize,
    /// Where the kernel is.
    pub module: &'a Module,
    /// Name of the kernel.
    pub entry: &'a str,
    /// CTAs along x, y, z.
    pub grid: [u32; 3],
    /// CTAs of a cluster along x, y, z, which divide the grid's; at most 8 in all. `[1, 1, 1]` is none: what the entry says
    /// (`.reqnctapercluster`).
    pub cluster: [u32; 3],
    /// Threads of a CTA along x, y, z; at most 1024 in all.
    pub block: [u32; 3],
    /// Dynamic shared memory of a CTA, in bytes.
    pub shared_bytes: u32,
    /// One for each kernel parameter, of its size.
    pub args: Vec<Arg>,
}

/// How a run is made.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// Chooses every interleaving, every moment of an asynchronous operation, and the time at which the run begins. An odd one holds
    /// warps, CTAs or whole devices back for a while.
    pub seed: u64,
    /// Whether the launches of a device run one after the other, in the order given, as those of a stream do, while those of other devices
    /// run at their own pace. If not, all run together.
    pub in_order: bool,
    /// CTAs that can be resident on a device at once, 1 or more, of clusters as many as fit whole. If absent, as many as fit
    /// by their threads and shared memory on the [`Machine::SMS`] SMs of a device; a kernel's registers are not known.
    pub residency: Option<u32>,
    /// Ends the run with an error after so many warp instructions; [`RunOptions::STEP_LIMIT`] by default.
    pub step_limit: Option<u64>,
    /// Whether a matrix product that reads shared memory which nothing has written is an error. Copies carry the
    /// mark along, so a tile with rows that no one needs may have it.
    pub check_matrix_operands: bool,
    /// How `wgmma` adds products of 8-bit numbers: with the few bits that Hopper keeps, unless told otherwise.
    pub fp8_sums: Fp8Sums,
    /// Whether accesses that nothing orders are errors: data races, missing proxy fences, early reuse. By default where
    /// debug assertions are on, as in tests; it takes a few times as long.
    pub checks: bool,
    /// Checks that are waived, one by one.
    pub allow: Checks,
    /// Whether a run goes on after what a check that could be waived has found: [`Machine::take_reports`] has it.
    pub keep_going: bool,
    /// Threads that devices run on, one for each device at most; as many as there are cores if absent. The run does not depend
    /// on it. With checks it is one.
    pub threads: Option<NonZeroUsize>,
    /// Adds up here what runs take, by kind of instruction. Such runs are slower.
    pub profile: Option<Arc<Mutex<Profile>>>,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            seed: 0,
            in_order: false,
            residency: None,
            step_limit: Some(Self::STEP_LIMIT),
            check_matrix_operands: true,
            fp8_sums: Fp8Sums::default(),
            checks: cfg!(debug_assertions),
            allow: Checks::default(),
            keep_going: false,
            threads: None,
            profile: None,
        }
    }
}

impl RunOptions {
    /// Warp instructions that a run has by default: some minutes' worth.
    pub const STEP_LIMIT: u64 = 10_000_000_000;

    pub(crate) fn policy(&self) -> Policy {
        Policy { allow: self.allow, keep_going: self.keep_going }
    }
}

/// One or more devices whose memories form one address space.
#[derive(Debug)]
pub struct Machine {
    memory: GlobalMemory,
    /// Addresses of each module's variables on each device.
    variables: HashMap<(u64, usize), Vec<u64>>,
    printed: String,
    reports: Vec<SimError>,
}

impl Machine {
    /// Most shared memory a CTA can have, in bytes: static, dynamic, and 1 KiB for the system.
    pub const SHARED_BYTES: u32 = 228 * 1024;
    /// SMs of a device: an H100's or H200's.
    pub const SMS: u32 = 132;
    /// Threads and CTAs that an SM takes.
    const SM_THREADS: u32 = 2048;
    const SM_CTAS: u32 = 32;
    /// Most CTAs of a cluster (a kernel can ask for 16, which is not portable and not supported).
    pub const CLUSTER_CTAS: u32 = 8;

    /// A machine with `devices` devices, all peers of each other.
    pub fn new(devices: usize) -> Self {
        Self {
            memory: GlobalMemory::new(devices),
            variables: HashMap::new(),
            printed: String::new(),
            reports: Vec::new(),
        }
    }

    /// How many devices there are.
    pub fn devices(&self) -> usize {
        self.memory.devices()
    }

    /// Allocates `bytes` of a device's memory, aligned to 1024 bytes, uninitialised; `name` is for messages.
    ///
    /// # Errors
    /// No such device, or its 1 TiB is exhausted.
    pub fn alloc(&mut self, device: usize, bytes: u64, name: &str) -> Result<u64, SimError> {
        self.memory.allocate(device, bytes, name)
    }

    /// Frees what [`Machine::alloc`] returned.
    ///
    /// # Errors
    /// An address that is not the start of an allocation.
    pub fn free(&mut self, address: u64) -> Result<(), SimError> {
        self.memory.free(address)
    }

    /// Writes global memory of any device.
    ///
    /// # Errors
    /// A range that is not in one allocation.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), SimError> {
        let (allocation, offset) = self.memory.find(address, bytes.len() as u64).map_err(SimError::Host)?;
        allocation.bytes.write(offset, bytes);
        Ok(())
    }

    /// Reads global memory of any device.
    ///
    /// # Errors
    /// A range that is not in one allocation, or that nothing has written.
    pub fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), SimError> {
        let length = bytes.len();
        let (allocation, offset) = self.memory.find(address, length as u64).map_err(SimError::Host)?;
        if !allocation.bytes.is_written(offset, length) {
            let first = (offset..offset + length).find(|at| !allocation.bytes.is_written(*at, 1)).unwrap_or(offset);
            let address = allocation.base + first as u64;
            return Err(SimError::Host(Fault::Uninitialised {
                place: self.memory.place(address),
                bytes: length as u64,
            }));
        }
        bytes.copy_from_slice(&allocation.bytes.data()[offset..offset + length]);
        Ok(())
    }

    /// What the last run did with a range of one allocation: with the lines of 128 bytes that begin in it.
    ///
    /// # Errors
    /// A range that is not in one allocation.
    pub fn traffic(&mut self, range: Range<u64>) -> Result<Traffic, SimError> {
        let bytes = range.end.saturating_sub(range.start);
        let (allocation, offset) = self.memory.find(range.start, bytes).map_err(SimError::Host)?;
        Ok(allocation.lines.traffic(offset..offset + bytes as usize))
    }

    /// Fills global memory of any device with a byte.
    ///
    /// # Errors
    /// A range that is not in one allocation.
    pub fn fill(&mut self, address: u64, bytes: u64, value: u8) -> Result<(), SimError> {
        let (allocation, offset) = self.memory.find(address, bytes).map_err(SimError::Host)?;
        allocation.bytes.data_mut()[offset..offset + bytes as usize].fill(value);
        allocation.bytes.mark(offset, bytes as usize);
        Ok(())
    }

    /// Runs all launches together until all are done; the costs are in the order of the launches.
    ///
    /// # Errors
    /// A launch that does not fit its kernel or the hardware, and everything that can go wrong in a kernel. Memory
    /// then holds what was written before.
    pub fn run(&mut self, launches: &[Launch<'_>], options: &RunOptions) -> Result<Vec<Cost>, SimError> {
        let prepared =
            launches.iter().map(|launch| self.prepare(launch, launches, options)).collect::<Result<Vec<_>, _>>()?;
        self.memory.start_run();
        let outcome = quanta::run(&mut self.memory, &prepared, options);
        self.printed.push_str(&outcome.printed);
        self.reports.extend(outcome.reports);
        outcome.costs
    }

    /// Takes what was reported so far, in runs that go on ([`RunOptions::keep_going`]): once for each kind and place in the
    /// text.
    pub fn take_reports(&mut self) -> Vec<SimError> {
        std::mem::take(&mut self.reports)
    }

    /// Takes what kernels have printed so far: of each run, what each device did, one after the other.
    pub fn take_printed(&mut self) -> String {
        std::mem::take(&mut self.printed)
    }

    fn prepare<'a>(
        &mut self,
        launch: &Launch<'a>,
        launches: &[Launch<'_>],
        options: &RunOptions,
    ) -> Result<Prepared<'a>, SimError> {
        let devices = self.memory.devices();
        if launch.device >= devices {
            return Err(SimError::NoDevice { device: launch.device, devices });
        }
        let fail = |message: String| SimError::Launch { entry: launch.entry.to_owned(), message };
        let module = launch.module;
        let entry = module.entries.iter().find(|entry| entry.name == launch.entry).ok_or_else(|| {
            let names: Vec<_> = module.entries().collect();
            fail(format!("no such entry; the module has {names:?}"))
        })?;
        if !entry.refused.is_empty() {
            return Err(fail(format!("it has what is not supported:\n{}", lines(&entry.refused))));
        }
        let size = |dimensions: [u32; 3]| {
            dimensions.iter().try_fold(1u32, |product, size| product.checked_mul(*size)).filter(|product| *product > 0)
        };
        let threads = size(launch.block)
            .filter(|threads| *threads <= entry.max_threads.unwrap_or(1024).min(1024))
            .ok_or_else(|| {
                fail(format!(
                    "a block of {:?} threads; it must be 1 to {} in all",
                    launch.block,
                    entry.max_threads.unwrap_or(1024).min(1024)
                ))
            })?;
        if size(launch.grid).is_none() {
            return Err(fail(format!("a grid of {:?} CTAs", launch.grid)));
        }
        let shared = match launch.shared_bytes {
            0 => entry.shared.end,
            bytes => entry.shared.dynamic().saturating_add(bytes),
        };
        if shared > Self::SHARED_BYTES {
            return Err(fail(format!(
                "{shared} bytes of shared memory (1024 of the system, static and dynamic); at most {} exist",
                Self::SHARED_BYTES
            )));
        }
        if options.residency == Some(0) {
            return Err(fail("a residency of 0 CTAs; it must be at least 1".to_owned()));
        }
        let (cluster, is_explicit) = cluster_of(entry, launch).map_err(fail)?;
        let members: u32 = cluster.iter().product();
        let places = launches
            .iter()
            .filter(|other| other.device == launch.device)
            .map(|other| size(other.grid).unwrap_or(0))
            .fold(0, if options.in_order { u32::max } else { u32::saturating_add });
        let by_threads = Self::SM_THREADS / threads.next_multiple_of(32);
        let fitting = Self::SMS * by_threads.min(Self::SHARED_BYTES / shared).clamp(1, Self::SM_CTAS);
        let places = options.residency.unwrap_or(fitting).min(places) / members * members;
        if places == 0 {
            return Err(fail(format!(
                "a residency of {} CTAs, but its clusters have {members}",
                options.residency.unwrap_or(0)
            )));
        }
        Ok(Prepared {
            module,
            entry,
            info: LaunchInfo {
                device: launch.device,
                grid: launch.grid,
                block: launch.block,
                parameters: parameters(entry, &launch.args).map_err(fail)?,
                variables: self.variables(module, launch.device)?,
                cluster,
                is_explicit,
                places,
                timer_start: timer_start(options.seed),
            },
            threads,
            shared_bytes: shared,
            dynamic_bytes: launch.shared_bytes,
        })
    }

    /// Addresses of a module's variables on a device, initialised on first use.
    fn variables(&mut self, module: &Module, device: usize) -> Result<Vec<u64>, SimError> {
        if let Some(known) = self.variables.get(&(module.id, device)) {
            return Ok(known.clone());
        }
        let mut addresses = Vec::new();
        for variable in &module.variables {
            let bytes = variable.bytes.max(1);
            addresses.push(self.memory.allocate(device, bytes, &variable.name)?);
        }
        for (variable, address) in module.variables.iter().zip(&addresses) {
            // Variables without an initialiser are zero (PTX ISA, "Initializers").
            self.memory.zero(*address);
            let mut references = variable.references.iter();
            let element = variable.element_bytes as usize;
            for (index, value) in variable.initial.iter().enumerate() {
                let bits = match value {
                    InitialValue::Bits(bits) => *bits,
                    InitialValue::Address { offset, shift, .. } => {
                        let base = match references.next() {
                            Some(Reference::Variable(other)) => addresses[*other as usize],
                            Some(Reference::Function(function)) => CODE_WINDOW + u64::from(*function),
                            None => 0,
                        };
                        base.wrapping_add_signed(*offset) >> shift
                    }
                };
                let place = address + (index * element) as u64;
                self.write(place, &bits.to_le_bytes()[..element.min(8)])?;
            }
        }
        self.variables.insert((module.id, device), addresses.clone());
        Ok(addresses)
    }
}

/// `%globaltimer` when a run begins: some time since 1970 in nanoseconds, with half of the seeds shortly before its lower half wraps.
fn timer_start(seed: u64) -> u64 {
    let mut random = Random::new(seed ^ 0x7469_6d65);
    let start = (1 << 60) + random.below(1 << 59);
    if random.below(2) == 0 { start } else { (start | 0xffff_ffff) - random.below(1 << 16) }
}

/// The cluster of a launch, and whether it or the entry names one.
fn cluster_of(entry: &Entry, launch: &Launch<'_>) -> Result<([u32; 3], bool), String> {
    let directives = &entry.cluster;
    let named = (launch.cluster != [1; 3]).then_some(launch.cluster);
    let cluster = match (named, directives.required) {
        (Some(named), Some(required)) if named != required => {
            return Err(format!("clusters of {named:?} CTAs, but the kernel's .reqnctapercluster is {required:?}"));
        }
        (None, None) if directives.explicit => {
            return Err("the kernel is .explicitcluster, and the launch names no cluster".to_owned());
        }
        (named, required) => named.or(required).unwrap_or([1; 3]),
    };
    let most = directives.most.unwrap_or(Machine::CLUSTER_CTAS).min(Machine::CLUSTER_CTAS);
    let members = cluster.iter().fold(1u64, |product, size| product.saturating_mul(u64::from(*size)));
    if !(1..=u64::from(most)).contains(&members) {
        return Err(format!("clusters of {cluster:?} CTAs; they must have 1 to {most} in all"));
    }
    if launch.grid.iter().zip(cluster).any(|(grid, cluster)| !grid.is_multiple_of(cluster)) {
        return Err(format!("a grid of {:?} CTAs, which clusters of {cluster:?} do not divide", launch.grid));
    }
    Ok((cluster, named.is_some() || directives.required.is_some()))
}

/// The parameter space of a launch.
fn parameters(entry: &Entry, args: &[Arg]) -> Result<Vec<u8>, String> {
    if args.len() != entry.parameters.len() {
        return Err(format!("{} arguments; the kernel takes {}", args.len(), entry.parameters.len()));
    }
    let mut space = Vec::new();
    for (arg, parameter) in args.iter().zip(&entry.parameters) {
        let bytes = arg.bytes();
        if bytes.len() != parameter.bytes as usize {
            return Err(format!(
                "argument for `{}` has {} bytes; it must have {}",
                parameter.name,
                bytes.len(),
                parameter.bytes
            ));
        }
        space.resize(parameter.offset as usize, 0);
        space.extend(bytes);
    }
    Ok(space)
}
