//! A panic on the device is a trap. No path of the kernel panics on input; this is what bounds and division checks compile to.

use core::arch::asm;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: ends the launch with an error.
    unsafe { asm!("trap;", "exit;", options(noreturn)) }
}
