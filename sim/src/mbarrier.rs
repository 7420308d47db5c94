//! The mbarrier object as a state machine over its 64 bits (PTX ISA 8.6, "Parallel Synchronization and Communication
//! Instructions: mbarrier").
//!
//! Everything a barrier knows is in the word that lives in shared memory, so copying or overwriting that memory does
//! what it would do on the device. From bit 0: pending arrivals (20 bits), expected arrivals of the next phase (20),
//! tx-count (21, two's complement), phase parity (1), and a marker (2) that memory holding anything else, such as
//! zeros, does not have.

use thiserror::Error;

/// Largest arrival count, and largest magnitude of the tx-count: 2^20 - 1.
pub const MAX_COUNT: u32 = (1 << 20) - 1;

const MARKER: u64 = 0b10;

/// Misuse of an mbarrier; on the device its behaviour is undefined.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum MbarrierError {
    /// The word is no mbarrier.
    #[error("the 64 bits are {word:#018x}, which is no mbarrier: mbarrier.init must come first")]
    NotInitialised {
        /// What was found.
        word: u64,
    },
    /// An arrival count of 0 or beyond [`MAX_COUNT`].
    #[error("arrival count {count}; it must be 1 to {MAX_COUNT}")]
    CountOutOfRange {
        /// The operand.
        count: u32,
    },
    /// More arrivals than the phase still waits for.
    #[error("arrival of {count}, but the current phase waits for only {pending} more arrivals")]
    OverArrival {
        /// The operand.
        count: u32,
        /// Arrivals still pending.
        pending: u32,
    },
    /// `.noComplete` on an arrival that completes the phase.
    #[error("arrival of {count} with .noComplete would complete the phase")]
    WouldComplete {
        /// The operand.
        count: u32,
    },
    /// More bytes expected than the tx-count can hold.
    #[error("tx-count overflow: it would become {tx_count}; the most is {MAX_COUNT}")]
    TxCountOverflow {
        /// What the tx-count would have become.
        tx_count: i64,
    },
    /// More bytes have come, and were not expected yet, than the tx-count can hold.
    #[error("tx-count underflow: it would become {tx_count}; the least is -{MAX_COUNT}")]
    TxCountUnderflow {
        /// What the tx-count would have become.
        tx_count: i64,
    },
    /// More bytes than were expected, in a phase whose arrivals are all in: none is left to announce them.
    #[error("{bytes} bytes more than were expected, and all arrivals of the phase, which could announce them, are in")]
    Unannounced {
        /// Bytes too many.
        bytes: u32,
    },
    /// A CTA exits, and bytes that were expected never came, or some came that never were.
    #[error("the CTA exits with a tx-count of {tx_count}: {}", if *tx_count > 0 { "bytes that were expected never came" } else { "bytes came that were never expected" })]
    BytesLeft {
        /// The tx-count.
        tx_count: i32,
    },
    /// `mbarrier.init` of what is an mbarrier.
    #[error("mbarrier.init of an mbarrier in use: mbarrier.inval must come first")]
    InUse,
    /// A wait for a phase that can be neither the current one nor the one before.
    #[error(
        "wrong phase: a wait for parity {parity} by a warp that knows {known} phases to be complete, where {completed} are: \
         it can be for neither the current phase nor the one before"
    )]
    WrongPhase {
        /// The operand.
        parity: u32,
        /// Phases that are complete.
        completed: u32,
        /// Phases that the warp has waited for, or knows from others to be complete.
        known: u32,
    },
    /// Bytes of a copy that nothing orders behind the phase before (see `check/phases.rs`).
    #[error(
        "bytes that may come too early: the copy completes in a phase that comes after {completed} others, and its issuer knew \
         {known} of them to be complete: nothing orders it behind the phase before, for which its bytes could have counted"
    )]
    UnorderedBytes {
        /// Phases that are complete.
        completed: u32,
        /// Phases that the issuer knew to be complete as it issued the copy.
        known: u32,
    },
    /// A phase parity other than 0 or 1.
    #[error("phase parity {parity}; it must be 0 or 1")]
    Parity {
        /// The operand.
        parity: u32,
    },
}

/// A decoded mbarrier. Decode the word, apply one operation, and store [`Mbarrier::encode`] back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mbarrier {
    pending: u32,
    expected: u32,
    tx_count: i32,
    parity: bool,
}

impl Mbarrier {
    /// `mbarrier.init`: phase 0, waiting for `count` arrivals in every phase.
    ///
    /// # Errors
    /// [`MbarrierError::CountOutOfRange`].
    pub fn init(count: u32) -> Result<Self, MbarrierError> {
        check_count(count)?;
        Ok(Mbarrier { pending: count, expected: count, tx_count: 0, parity: false })
    }

    /// Reads the word of an mbarrier.
    ///
    /// # Errors
    /// [`MbarrierError::NotInitialised`] if no mbarrier encodes to `word`.
    pub fn decode(word: u64) -> Result<Self, MbarrierError> {
        let field = |from: u32, bits: u32| (word >> from & ((1 << bits) - 1)) as u32;
        let tx_count = (field(40, 21) << 11) as i32 >> 11;
        if field(62, 2) != MARKER as u32 || tx_count.unsigned_abs() > MAX_COUNT {
            return Err(MbarrierError::NotInitialised { word });
        }
        Ok(Mbarrier { pending: field(0, 20), expected: field(20, 20), tx_count, parity: field(61, 1) == 1 })
    }

    /// The word to store; it is also the state that `mbarrier.arrive` returns if taken before the arrival.
    pub fn encode(self) -> u64 {
        let tx_count = (self.tx_count as u32 & 0x1F_FFFF) as u64;
        MARKER << 62 | (self.parity as u64) << 61 | tx_count << 40 | (self.expected as u64) << 20 | self.pending as u64
    }

    /// What `mbarrier.inval` leaves: no operation but `init` accepts it.
    pub const INVALID: u64 = 0;

    /// Arrivals that the current phase still waits for (`mbarrier.pending_count`).
    pub fn pending(self) -> u32 {
        self.pending
    }

    /// Bytes still expected in the current phase; negative if more have arrived than were announced so far.
    pub fn tx_count(self) -> i32 {
        self.tx_count
    }

    /// An error if more bytes have come than were expected, and no arrival is pending that could announce them. An `expect_tx` without an
    /// arrival still could, though not in time for a phase whose bytes happen to add up before.
    ///
    /// # Errors
    /// [`MbarrierError::Unannounced`].
    pub fn check_announced(self) -> Result<(), MbarrierError> {
        if self.pending == 0 && self.tx_count < 0 {
            return Err(MbarrierError::Unannounced { bytes: self.tx_count.unsigned_abs() });
        }
        Ok(())
    }

    /// Parity of the current, incomplete phase: 0 after `init`.
    pub fn parity(self) -> u32 {
        self.parity as u32
    }

    /// `mbarrier.arrive` with a count: the state after it. Its phase is complete if [`Mbarrier::parity`] changed.
    ///
    /// # Errors
    /// [`MbarrierError::CountOutOfRange`], [`MbarrierError::OverArrival`].
    pub fn arrive(self, count: u32) -> Result<Self, MbarrierError> {
        check_count(count)?;
        let pending =
            self.pending.checked_sub(count).ok_or(MbarrierError::OverArrival { count, pending: self.pending })?;
        Ok(Mbarrier { pending, ..self }.completed())
    }

    /// `cp.async.mbarrier.arrive` without `.noinc`: the current phase waits for one more arrival.
    ///
    /// # Errors
    /// [`MbarrierError::CountOutOfRange`], beyond [`MAX_COUNT`].
    pub fn add_pending(self) -> Result<Self, MbarrierError> {
        check_count(self.pending + 1)?;
        Ok(Mbarrier { pending: self.pending + 1, ..self })
    }

    /// `mbarrier.arrive.noComplete`.
    ///
    /// # Errors
    /// Those of [`Mbarrier::arrive`], and [`MbarrierError::WouldComplete`].
    pub fn arrive_no_complete(self, count: u32) -> Result<Self, MbarrierError> {
        let after = self.arrive(count)?;
        if after.parity != self.parity { Err(MbarrierError::WouldComplete { count }) } else { Ok(after) }
    }

    /// `mbarrier.arrive_drop`: arrives, and every later phase waits for `count` fewer arrivals.
    ///
    /// # Errors
    /// Those of [`Mbarrier::arrive`].
    pub fn arrive_drop(self, count: u32) -> Result<Self, MbarrierError> {
        let expected =
            self.expected.checked_sub(count).ok_or(MbarrierError::OverArrival { count, pending: self.expected })?;
        Mbarrier { expected, ..self }.arrive(count)
    }

    /// `mbarrier.arrive.expect_tx`: announces `bytes`, then arrives once.
    ///
    /// # Errors
    /// Those of [`Mbarrier::arrive`] and [`Mbarrier::expect_tx`].
    pub fn arrive_expect_tx(self, bytes: u32) -> Result<Self, MbarrierError> {
        // One operation on the device: the phase can only complete after the arrival.
        self.with_tx_count(self.tx_count as i64 + bytes as i64)?.arrive(1)
    }

    /// `mbarrier.expect_tx`: announces `bytes` of asynchronous transactions in the current phase.
    ///
    /// # Errors
    /// [`MbarrierError::TxCountOverflow`].
    pub fn expect_tx(self, bytes: u32) -> Result<Self, MbarrierError> {
        Ok(self.with_tx_count(self.tx_count as i64 + bytes as i64)?.completed())
    }

    /// `mbarrier.complete_tx`, and what a bulk copy does with the bytes that landed. It may come before their
    /// `expect_tx`.
    ///
    /// # Errors
    /// [`MbarrierError::TxCountUnderflow`].
    pub fn complete_tx(self, bytes: u32) -> Result<Self, MbarrierError> {
        Ok(self.with_tx_count(self.tx_count as i64 - bytes as i64)?.completed())
    }

    /// `mbarrier.{test,try}_wait.parity`: whether the phase of this parity has completed (the phase before the current
    /// one counts as completed, also right after `init`).
    pub fn test_parity(self, parity: u32) -> bool {
        self.parity() != parity & 1
    }

    /// `mbarrier.{test,try}_wait` on the state that an arrival returned: whether its phase has completed.
    ///
    /// # Errors
    /// [`MbarrierError::NotInitialised`] if `state` came from no mbarrier.
    pub fn test_state(self, state: u64) -> Result<bool, MbarrierError> {
        Ok(self.parity != Mbarrier::decode(state)?.parity)
    }

    fn with_tx_count(self, tx_count: i64) -> Result<Self, MbarrierError> {
        if tx_count > i64::from(MAX_COUNT) {
            return Err(MbarrierError::TxCountOverflow { tx_count });
        }
        if tx_count < -i64::from(MAX_COUNT) {
            return Err(MbarrierError::TxCountUnderflow { tx_count });
        }
        Ok(Mbarrier { tx_count: tx_count as i32, ..self })
    }

    fn completed(self) -> Self {
        if self.pending != 0 || self.tx_count != 0 {
            return self;
        }
        Mbarrier { pending: self.expected, parity: !self.parity, ..self }
    }
}

fn check_count(count: u32) -> Result<(), MbarrierError> {
    if (1..=MAX_COUNT).contains(&count) { Ok(()) } else { Err(MbarrierError::CountOutOfRange { count }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn arrivals_flip_the_phase_and_rearm() {
        let mut barrier = Mbarrier::init(3).unwrap();
        assert!(!barrier.test_parity(0) && barrier.test_parity(1));
        let token = barrier.encode();
        barrier = barrier.arrive(1).unwrap().arrive(1).unwrap();
        assert_eq!((barrier.pending(), barrier.test_parity(0)), (1, false));
        barrier = barrier.arrive(1).unwrap();
        assert_eq!((barrier.pending(), barrier.parity()), (3, 1));
        assert!(barrier.test_parity(0) && !barrier.test_parity(1));
        assert_eq!(barrier.test_state(token), Ok(true));
        barrier = barrier.arrive(3).unwrap();
        assert_eq!(barrier.parity(), 0);
    }

    #[test]
    fn transactions_may_land_before_or_after_they_are_expected() {
        let fresh = Mbarrier::init(1).unwrap();
        let late = fresh.arrive_expect_tx(4096).unwrap();
        assert_eq!((late.pending(), late.tx_count(), late.parity()), (0, 4096, 0));
        let half = late.complete_tx(2048).unwrap();
        assert_eq!(half.parity(), 0);
        assert_eq!(half.complete_tx(2048).unwrap().parity(), 1);

        let early = fresh.complete_tx(4096).unwrap();
        assert_eq!((early.tx_count(), early.parity()), (-4096, 0));
        assert_eq!(early.arrive_expect_tx(4096).unwrap().parity(), 1);
        // The count reaches zero while an arrival is pending: the phase goes on.
        let even = early.expect_tx(4096).unwrap();
        assert_eq!((even.pending(), even.tx_count(), even.parity()), (1, 0, 0));
        // All arrivals are in, bytes landed unannounced: the announcement completes the phase.
        let unannounced = fresh.complete_tx(16).unwrap().arrive(1).unwrap();
        assert_eq!((unannounced.pending(), unannounced.parity()), (0, 0));
        assert_eq!(unannounced.expect_tx(16).unwrap().parity(), 1);
    }

    #[test]
    fn dropped_arrivals_are_not_expected_again() {
        let barrier = Mbarrier::init(3).unwrap().arrive_drop(1).unwrap();
        assert_eq!(barrier.pending(), 2);
        let next = barrier.arrive(2).unwrap();
        assert_eq!((next.pending(), next.parity()), (2, 1));
    }

    #[test]
    fn misuse_is_an_error() {
        let one = Mbarrier::init(1).unwrap();
        assert_eq!(Mbarrier::init(0), Err(MbarrierError::CountOutOfRange { count: 0 }));
        assert_eq!(Mbarrier::init(1 << 20), Err(MbarrierError::CountOutOfRange { count: 1 << 20 }));
        assert!(Mbarrier::init(MAX_COUNT).is_ok());
        assert_eq!(one.arrive(0), Err(MbarrierError::CountOutOfRange { count: 0 }));
        assert_eq!(one.arrive(2), Err(MbarrierError::OverArrival { count: 2, pending: 1 }));
        assert_eq!(one.arrive_no_complete(1), Err(MbarrierError::WouldComplete { count: 1 }));
        let waiting = one.arrive_expect_tx(MAX_COUNT).unwrap();
        assert_eq!(waiting.arrive(1), Err(MbarrierError::OverArrival { count: 1, pending: 0 }));
        assert_eq!(waiting.expect_tx(1), Err(MbarrierError::TxCountOverflow { tx_count: 1 << 20 }));
        let ahead = one.complete_tx(MAX_COUNT).unwrap();
        assert_eq!(ahead.complete_tx(1), Err(MbarrierError::TxCountUnderflow { tx_count: -(1 << 20) }));
        assert_eq!(one.complete_tx(u32::MAX), Err(MbarrierError::TxCountUnderflow { tx_count: -(u32::MAX as i64) }));
        for word in [Mbarrier::INVALID, 1, u64::MAX, 0x3F80_0000_3F80_0000, 0x0101_0101_0101_0101] {
            assert_eq!(Mbarrier::decode(word), Err(MbarrierError::NotInitialised { word }));
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Arrive(u32),
        ArriveExpect(u32),
        Expect(u32),
        Complete(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (1u32..4).prop_map(Step::Arrive),
            (0u32..3).prop_map(|b| Step::ArriveExpect(b * 16)),
            (0u32..3).prop_map(|b| Step::Expect(b * 16)),
            (0u32..3).prop_map(|b| Step::Complete(b * 16)),
        ]
    }

    proptest! {
        /// Against the definition, in wide integers with a full phase number; every state survives its encoding.
        #[test]
        fn follows_the_definition(count in 1u32..6, steps in prop::collection::vec(step(), 0..60)) {
            let mut barrier = Mbarrier::init(count).unwrap();
            let (mut pending, mut tx, mut phase) = (count as i64, 0i64, 0u64);
            for step in steps {
                let (arrivals, bytes) = match step {
                    Step::Arrive(n) => (n, 0),
                    Step::ArriveExpect(b) => (1, b as i64),
                    Step::Expect(b) => (0, b as i64),
                    Step::Complete(b) => (0, -(b as i64)),
                };
                let result = match step {
                    Step::Arrive(n) => barrier.arrive(n),
                    Step::ArriveExpect(b) => barrier.arrive_expect_tx(b),
                    Step::Expect(b) => barrier.expect_tx(b),
                    Step::Complete(b) => barrier.complete_tx(b),
                };
                if arrivals as i64 > pending {
                    let refused = matches!(result, Err(MbarrierError::OverArrival { .. }));
                    prop_assert!(refused);
                    continue;
                }
                pending -= arrivals as i64;
                tx += bytes;
                if pending == 0 && tx == 0 {
                    pending = count as i64;
                    phase += 1;
                }
                barrier = Mbarrier::decode(result.unwrap().encode()).unwrap();
                prop_assert_eq!(barrier.pending() as i64, pending);
                prop_assert_eq!(barrier.tx_count() as i64, tx);
                prop_assert_eq!(barrier.parity() as u64, phase % 2);
            }
        }
    }
}
