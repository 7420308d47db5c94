//! Launch after launch on every rank without a wait of the host, timed by events between them.

use super::driver;
use super::error::CudaError;
use super::gpu::Gpu;
use crate::error::Result;
use cust::context::{Context, CurrentContext};
use cust::device::Device;
use cust::event::{Event, EventFlags};
use cust::stream::{Stream, StreamFlags};
use std::ffi::c_void;
use std::time::Duration;

/// Runs `rounds` rounds: in each, `enqueue(rank, round, stream)` queues one launch on every rank. A thread for each rank
/// queues all of its rounds on a stream of its own. Gives `[rank][round]`: the time on the GPU from the end of the rank's
/// launch before to the end of this one, and for the first round from the stream's start.
///
/// # Errors
/// What `enqueue` returns, and [`CudaError::Call`] when the driver fails. No launch is running when this returns.
pub(crate) fn time_rounds(
    gpus: &[Gpu],
    rounds: usize,
    enqueue: impl Fn(usize, usize, *mut c_void) -> Result<()> + Sync,
) -> Result<Vec<Vec<Duration>>> {
    let enqueue = &enqueue;
    let rank = |(rank, gpu): (usize, &Gpu)| {
        let ordinal = gpu.ordinal;
        move || time_rank(ordinal, rounds, |round, stream| enqueue(rank, round, stream))
    };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = gpus.iter().enumerate().map(rank).map(|work| scope.spawn(work)).collect();
        let join = |rank: std::thread::ScopedJoinHandle<'_, Result<Vec<Duration>>>| {
            rank.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        let times: Vec<_> = ranks.into_iter().map(join).collect();
        times.into_iter().collect()
    })
}

fn time_rank(ordinal: u32, rounds: usize, enqueue: impl Fn(usize, *mut c_void) -> Result<()>) -> Result<Vec<Duration>> {
    let (_context, stream) = enter(ordinal)?;
    let events: Vec<Event> = (0..=rounds)
        .map(|_| Event::new(EventFlags::DEFAULT).map_err(driver::failure))
        .collect::<Result<_, CudaError>>()?;
    let queue_all = || -> Result<()> {
        events[0].record(&stream).map_err(driver::failure)?;
        for (round, event) in events[1..].iter().enumerate() {
            enqueue(round, stream.as_inner().cast())?;
            event.record(&stream).map_err(driver::failure)?;
        }
        Ok(())
    };
    let queued = queue_all();
    let finished = stream.synchronize().map_err(driver::failure);
    queued?;
    finished?;
    events.windows(2).map(|pair| Ok(between(&pair[0], &pair[1])?)).collect()
}

/// Makes a GPU's primary context current on this thread, with a stream there. The context is released last.
pub(super) fn enter(ordinal: u32) -> Result<(Context, Stream), CudaError> {
    let context = Context::new(Device::get_device(ordinal).map_err(driver::failure)?).map_err(driver::failure)?;
    CurrentContext::set_current(&context).map_err(driver::failure)?;
    let stream = Stream::new(StreamFlags::NON_BLOCKING, None).map_err(driver::failure)?;
    Ok((context, stream))
}

/// Time on the GPU between two events that have happened.
pub(super) fn between(start: &Event, stop: &Event) -> Result<Duration, CudaError> {
    let milliseconds = stop.elapsed_time_f32(start).map_err(driver::failure)?;
    Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
}
