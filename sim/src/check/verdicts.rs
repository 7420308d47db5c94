//! What becomes of the clashes that are found.

use std::collections::HashSet;

use super::CtaChecks;
use super::shadow::{Clash, ClashKind, FastMap, is_shared, shared_owner};
use crate::error::Fault;
use crate::waiver::{Check, Policy, Verdict};

/// The clash that ends a run, or those that it goes on after.
#[derive(Debug, Default)]
pub(crate) struct Verdicts {
    pub policy: Policy,
    /// What the error that is on its way is about.
    pub clash: Option<Clash>,
    /// What is to be reported.
    pub found: Vec<Clash>,
    /// Pairs of instructions that were reported.
    seen: HashSet<(Check, u32, u32)>,
}

impl Verdicts {
    pub(super) fn new(policy: Policy) -> Self {
        Self { policy, ..Self::default() }
    }

    /// Keeps a clash for the scheduler, which knows all modules' lines (see `Run::failed`); an error if it ends the run.
    pub(super) fn judge(&mut self, clash: Clash, ctas: &FastMap<u64, CtaChecks>) -> Result<(), Fault> {
        let on_mbarrier = || {
            let checks = is_shared(clash.key).then(|| ctas.get(&shared_owner(clash.key))).flatten();
            checks.is_some_and(|checks| checks.mbarriers.contains_key(&(clash.key as u32 & 0xff_fff8)))
        };
        let check = match clash.kind {
            ClashKind::Race => Check::DataRace,
            ClashKind::Proxy if on_mbarrier() => Check::InitWithoutProxyFence,
            ClashKind::Proxy => Check::MissingProxyFence,
            ClashKind::ReadOnly => Check::WrittenReadOnly,
            ClashKind::TensorMap => Check::MissingTensorMapFence,
            ClashKind::Phase => Check::PhaseOrder,
        };
        match self.policy.verdict(Some(check)) {
            Verdict::Ignore => Ok(()),
            Verdict::Report => {
                if self.seen.insert((check, clash.before.pc(), clash.now.pc())) {
                    self.found.push(clash);
                }
                Ok(())
            }
            Verdict::Fail => {
                self.clash = Some(clash);
                Err(Fault::Synchronisation("two accesses clash".to_owned()))
            }
        }
    }
}
