//! CUDA graphs: launches captured from a stream once and replayed with one call.

use super::driver::{Handle, call};
use super::error::CudaError;
use super::gpu::Current;
use std::ffi::c_void;

/// An executable CUDA graph.
#[derive(Debug)]
pub struct CapturedGraph {
    exec: Handle,
}

// SAFETY: an executable graph belongs to its context, not to a thread.
unsafe impl Send for CapturedGraph {}

impl CapturedGraph {
    /// Captures what `work` enqueues on `stream` (a `CUstream`) instead of running it.
    ///
    /// # Errors
    /// What `work` returns, and [`CudaError::Call`] when the driver refuses to capture, for example because `work`
    /// synchronised or allocated. The stream is no longer captured then.
    ///
    /// # Safety
    /// `stream` is a stream that is not being captured. What the captured work uses stays valid as long as the graph
    /// is launched.
    pub unsafe fn capture<E: From<CudaError>>(
        stream: *mut c_void,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<Self, E> {
        // Forbids unsafe calls to this thread only: other threads may serve other ranks.
        const THREAD_LOCAL: u32 = 1;
        // SAFETY: by this function's contract.
        let _current = unsafe { Current::enter_stream(stream) }?;
        // SAFETY: by this function's contract.
        unsafe { call::cuStreamBeginCapture_v2(stream, THREAD_LOCAL) }?;
        let worked = work();
        let mut graph = std::ptr::null_mut();
        // SAFETY: the stream is being captured, and `graph` is a place for a graph.
        let ended = unsafe { call::cuStreamEndCapture(stream, &mut graph) };
        let graph = Graph(graph);
        worked?;
        ended?;
        let mut exec = std::ptr::null_mut();
        // SAFETY: the graph was just captured, and `exec` is a place for an executable one.
        unsafe { call::cuGraphInstantiateWithFlags(&mut exec, graph.0, 0) }?;
        Ok(Self { exec })
    }

    /// Launches the captured work on `stream` (a `CUstream`) and returns.
    ///
    /// # Errors
    /// [`CudaError::Call`] when the driver refuses.
    ///
    /// # Safety
    /// `stream` is a stream of the GPU on which the work was captured, and all that the work uses is still valid.
    pub unsafe fn launch(&self, stream: *mut c_void) -> Result<(), CudaError> {
        // SAFETY: by this function's contract.
        let _current = unsafe { Current::enter_stream(stream) }?;
        // SAFETY: by this function's contract.
        unsafe { call::cuGraphLaunch(self.exec, stream) }
    }
}

impl Drop for CapturedGraph {
    fn drop(&mut self) {
        // SAFETY: instantiated once, destroyed once.
        if let Err(error) = unsafe { call::cuGraphExecDestroy(self.exec) } {
            tracing::warn!(%error, "an executable graph could not be destroyed");
        }
    }
}

/// A captured graph, not executable; null when the capture failed.
struct Graph(Handle);

impl Drop for Graph {
    fn drop(&mut self) {
        if self.0.is_null() {
            return;
        }
        // SAFETY: captured once, destroyed once.
        if let Err(error) = unsafe { call::cuGraphDestroy(self.0) } {
            tracing::warn!(%error, "a graph could not be destroyed");
        }
    }
}
