//! What a test asks of the fake driver.

use crate::state::{CURRENT, FAIL_OWN, Fake, lock};

/// Forgets everything; from now on there are `gpus` GPUs of compute capability `major`.0.
#[unsafe(no_mangle)]
pub extern "C" fn fake_reset(gpus: i32, major: i32) {
    *lock() = Fake::new(gpus, major);
    CURRENT.set(None);
}

/// Fails the call with this number (from 0, counted since the reset) with `code`; a negative number fails none.
#[unsafe(no_mangle)]
pub extern "C" fn fake_fail(call: i64, code: u32) {
    lock().fail = usize::try_from(call).ok().map(|call| (call, code));
}

/// Fails the call with this number of the calling thread (from 0, counted from now) with `code`.
#[unsafe(no_mangle)]
pub extern "C" fn fake_fail_own(call: u64, code: u32) {
    FAIL_OWN.set(Some((call, code)));
}

/// Forbids GPU `from` to access the memory of GPU `to`.
#[unsafe(no_mangle)]
pub extern "C" fn fake_forbid_peer(from: i32, to: i32) {
    lock().no_peer.insert((from, to));
}

/// Copies the calls since the reset, one a line, and returns how many bytes that takes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fake_calls(text: *mut u8, capacity: usize) -> usize {
    let calls = lock().calls.join("\n");
    // SAFETY: the caller passes a buffer of this capacity.
    unsafe { copy(&calls, text, capacity) }
}

/// Copies the name of the call that was failed, empty if none was yet, and returns how many bytes that takes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fake_failed(text: *mut u8, capacity: usize) -> usize {
    let failed = lock().failed.unwrap_or_default();
    // SAFETY: the caller passes a buffer of this capacity.
    unsafe { copy(failed, text, capacity) }
}

/// Copies what is alive, one item a line, and returns how many bytes that takes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fake_live(text: *mut u8, capacity: usize) -> usize {
    let live = lock().live();
    // SAFETY: the caller passes a buffer of this capacity.
    unsafe { copy(&live, text, capacity) }
}

unsafe fn copy(from: &str, to: *mut u8, capacity: usize) -> usize {
    // SAFETY: the caller's buffer has `capacity` bytes, and no more are written.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len().min(capacity)) };
    from.len()
}
