//! Checks that can be waived one by one, and runs that go on after what they found.

use std::fmt;
use std::str::FromStr;

use crate::error::Fault;
use crate::mbarrier::MbarrierError;

macro_rules! checks {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// A check that can be waived ([`RunOptions::allow`](crate::RunOptions::allow)), by what it finds. What is found and
        /// waived has no effect on values.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Check {
            $($(#[$doc])* $variant,)*
        }

        impl Check {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// What it is called on a command line.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

checks! {
    /// Accesses that nothing orders.
    DataRace = "data-race",
    /// An ordinary write and an asynchronous access, with no proxy fence between.
    MissingProxyFence = "missing-proxy-fence",
    /// The same of the initialisation of an mbarrier.
    InitWithoutProxyFence = "init-without-proxy-fence",
    /// The use of a tensor map that was written, with no fence of its proxy between.
    MissingTensorMapFence = "missing-tensor-map-fence",
    /// A read by `ld.global.nc` of what is written while the kernel runs.
    WrittenReadOnly = "written-read-only",
    /// A phase of an mbarrier that completes, and nothing orders that after a wait for the one before.
    PhaseOrder = "phase-order",
    /// A wait for a phase that can be neither the current one nor the one before.
    WrongPhase = "wrong-phase",
    /// `mbarrier.init` of what is an mbarrier.
    InitInUse = "init-in-use",
    /// Bytes that nothing can announce any more.
    UnannouncedBytes = "unannounced-bytes",
    /// A copy whose bytes could have counted for the phase before of its mbarrier.
    UnorderedBytes = "unordered-bytes",
    /// A read of memory that nothing has written. It reads zeros, or what was there before.
    UninitialisedRead = "uninitialised-read",
    /// A CTA that exits before copies from its shared memory, such as stores to a tensor, have read it. They read it at the exit.
    ExitWithStores = "exit-with-stores",
    /// A CTA that exits with bytes pending on an mbarrier.
    ExitWithBytes = "exit-with-bytes",
    /// A CTA that exits, and nothing orders that after an access to its shared memory by its cluster.
    ExitRace = "exit-race",
    /// Registers of a wgmma that is under way, or that were not fenced.
    WgmmaRegisters = "wgmma-registers",
}

impl Check {
    fn bit(self) -> u32 {
        1 << self as u32
    }

    /// The check that found a fault, if it is one that can be waived.
    pub(crate) fn of(fault: &Fault) -> Option<Self> {
        Some(match fault {
            Fault::Race { .. } => Self::DataRace,
            Fault::ProxyFence { .. } => Self::MissingProxyFence,
            Fault::TensorMapFence { .. } => Self::MissingTensorMapFence,
            Fault::ReadOnly { .. } => Self::WrittenReadOnly,
            Fault::PhaseOrder { .. } => Self::PhaseOrder,
            Fault::Uninitialised { .. } => Self::UninitialisedRead,
            Fault::ExitRace { .. } => Self::ExitRace,
            Fault::WgmmaRegisters(_) => Self::WgmmaRegisters,
            Fault::Mbarrier { error, .. } => match error {
                MbarrierError::WrongPhase { .. } => Self::WrongPhase,
                MbarrierError::InUse => Self::InitInUse,
                MbarrierError::Unannounced { .. } => Self::UnannouncedBytes,
                MbarrierError::UnorderedBytes { .. } => Self::UnorderedBytes,
                MbarrierError::BytesLeft { .. } => Self::ExitWithBytes,
                _ => return None,
            },
            _ => return None,
        })
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// There is no check of this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no check `{name}`; there are {}", Check::ALL.iter().map(|check| check.name()).collect::<Vec<_>>().join(", "))]
pub struct UnknownCheck {
    /// The name.
    name: String,
}

impl FromStr for Check {
    type Err = UnknownCheck;

    fn from_str(name: &str) -> Result<Self, UnknownCheck> {
        let found = Self::ALL.iter().find(|check| check.name() == name);
        found.copied().ok_or_else(|| UnknownCheck { name: name.to_owned() })
    }
}

/// A set of checks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Checks(u32);

impl Checks {
    /// Whether a check is in the set.
    pub fn contains(self, check: Check) -> bool {
        self.0 & check.bit() != 0
    }
}

impl FromIterator<Check> for Checks {
    fn from_iter<I: IntoIterator<Item = Check>>(checks: I) -> Self {
        Self(checks.into_iter().fold(0, |set, check| set | check.bit()))
    }
}

impl<const N: usize> From<[Check; N]> for Checks {
    fn from(checks: [Check; N]) -> Self {
        checks.into_iter().collect()
    }
}

/// What is done about what checks find.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Policy {
    pub allow: Checks,
    pub keep_going: bool,
}

/// What is to become of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Ignore,
    Report,
    Fail,
}

impl Policy {
    pub fn verdict(self, check: Option<Check>) -> Verdict {
        match check {
            Some(check) if self.allow.contains(check) => Verdict::Ignore,
            Some(_) if self.keep_going => Verdict::Report,
            _ => Verdict::Fail,
        }
    }
}

/// What a device's checks have found and the run goes on after: the fault, the instruction and its lanes.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub policy: Policy,
    pub list: Vec<(Fault, u32, u32)>,
}

impl Findings {
    /// An error, or nothing if the fault is waived or only reported.
    pub fn judge(&mut self, fault: Fault, pc: u32, lanes: u32) -> Result<(), Fault> {
        match self.policy.verdict(Check::of(&fault)) {
            Verdict::Ignore => Ok(()),
            Verdict::Report => {
                if !self.list.iter().any(|(_, at, _)| *at == pc) {
                    self.list.push((fault, pc, lanes));
                }
                Ok(())
            }
            Verdict::Fail => Err(fault),
        }
    }

    /// Whether such a finding ends the run.
    pub fn fails(&self, check: Check) -> bool {
        self.policy.verdict(Some(check)) == Verdict::Fail
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_again() {
        for check in Check::ALL {
            assert_eq!(check.name().parse(), Ok(*check));
        }
        assert!("nothing".parse::<Check>().unwrap_err().to_string().contains("there are data-race, "));
    }

    #[test]
    fn a_set_has_what_is_in_it() {
        let set = Checks::from([Check::DataRace, Check::WgmmaRegisters]);
        let members: Vec<_> = Check::ALL.iter().filter(|check| set.contains(**check)).collect();
        assert_eq!(members, [&Check::DataRace, &Check::WgmmaRegisters]);
    }
}
