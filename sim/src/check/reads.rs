//! Reads that are over, as lanes that must go on together know of each other.

use super::Checker;
use super::clock::Entry;

impl Checker {
    /// Lanes have passed an `.aligned` wait, which all of their warp pass together: none of them goes on before what each has read before is
    /// there. Formally that says nothing to the others; but kernels (DeepGEMM's among them) have one lane give back, after that, what all have
    /// read, and hardware has it so. Of writes they learn nothing. A wait for an mbarrier, or an arrival, is no such thing: lanes may
    /// come to it apart.
    pub fn end_reads(&mut self, warp: u32, lanes: u32) {
        let Some(state) = self.warps.get(warp as usize) else {
            return;
        };
        let (tick, absent) = (state.tick, state.absent);
        self.learn(warp, lanes, |clock| clock.end_reads(warp, Entry::new(tick, lanes | absent)));
        self.advance(warp);
    }
}
