//! What a launch cost.

/// Counters of one launch.
///
/// Global memory is counted by a simple rule: the first touch of a 128-byte line in a run is one line of device-memory
/// traffic (reads and writes apart), and every byte that an instruction or copy moves is L2 traffic. Bytes in another
/// device's memory are NVLink traffic instead, and count in neither. A multicast to several CTAs of a cluster reads its
/// source once, and counts once; shared memory, of a peer CTA too, counts in none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Warp instructions executed.
    pub instructions: u64,
    /// The same, times the lanes active in each.
    pub thread_instructions: u64,
    /// Bytes read from this device's memory.
    pub hbm_read: u64,
    /// Bytes written to this device's memory.
    pub hbm_write: u64,
    /// Bytes moved between this device's SMs and its L2.
    pub l2_bytes: u64,
    /// Bytes read from other devices.
    pub nvlink_read: u64,
    /// Bytes written to other devices.
    pub nvlink_write: u64,
    /// Floating-point operations of tensor-core instructions.
    pub tensor_ops: u64,
    /// Times that a warp had to wait.
    pub waits: u64,
    /// Waits for an mbarrier's phase that ended with the phase complete.
    pub mbarrier_waits: u64,
    /// Times that such a wait suspended its warp before.
    pub mbarrier_suspensions: u64,
    /// Waits that were tried again without success, and repeated reads of an unchanged word.
    pub polls: u64,
    /// Simulated time from the start of the run to the launch's end, in nanoseconds.
    pub simulated_ns: u64,
}

/// Which way bytes of global memory go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    Write,
}
