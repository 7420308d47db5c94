//! `mark!`: a role begins to do something else. Records it in a kernel that is compiled with the feature `trace`, and is nothing in any other.

#[cfg(feature = "trace")]
use {
    crate::device::address::SharedAddress,
    crate::device::global::st_weak_v4,
    crate::device::special::{cta, globaltimer, smid, thread},
    crate::launch::Launch,
    crate::trace::{Activity, Argument, COUNTS_OFFSET, ROLES, Record},
    crate::warps::{CONSUMER_WARP, WARP, WARPGROUP},
};

/// `mark!(launch, Activity)` or `mark!(launch, Activity, argument)`: this thread's role begins to do something else. Nothing in a kernel that
/// is not traced.
#[cfg(feature = "trace")]
macro_rules! mark {
    ($launch:expr, $activity:ident) => {
        $crate::record::mark($launch, $crate::trace::Activity::$activity, 0)
    };
    ($launch:expr, $activity:ident, $argument:expr) => {
        $crate::record::mark($launch, $crate::trace::Activity::$activity, $argument)
    };
}
#[cfg(not(feature = "trace"))]
macro_rules! mark {
    ($($any:tt)*) => {};
}

/// The role whose records this thread writes: that of the first lane of a role's first warp.
#[cfg(feature = "trace")]
#[inline(always)]
fn role() -> Option<u32> {
    let thread = thread();
    let consumers = CONSUMER_WARP * WARP;
    if thread < consumers {
        (thread % WARP == 0).then_some(thread / WARP)
    } else {
        let thread = thread - consumers;
        (thread % WARPGROUP == 0).then_some(CONSUMER_WARP + thread / WARPGROUP)
    }
}

/// Records an activity. Any threads may call this; those that stand for no role record nothing. The first one is [`Activity::Start`].
#[cfg(feature = "trace")]
#[inline(always)]
pub fn mark(launch: &Launch, activity: Activity, argument: impl Into<Argument>) {
    let Some(role) = role() else { return };
    let time = globaltimer();
    let count = SharedAddress::dynamic().offset(COUNTS_OFFSET + role * 4);
    let (index, argument) = match activity {
        Activity::Start => (0, smid() as u64),
        // SAFETY: the count is this thread's.
        _ => (unsafe { count.load_u32() }, argument.into().0),
    };
    // SAFETY: as above.
    unsafe { count.store_u32(index + 1) };
    let buffer = &launch.params().trace;
    if index < buffer.capacity {
        let record = (cta() * ROLES + role) as u64 * buffer.capacity as u64 + index as u64;
        let word = argument << 8 | activity as u64;
        let words = [time as u32, (time >> 32) as u32, word as u32, (word >> 32) as u32];
        // SAFETY: the buffer has `capacity` records for every role of every CTA.
        unsafe { st_weak_v4((buffer.address + record * size_of::<Record>() as u64) as *mut u8, words) };
    }
}
