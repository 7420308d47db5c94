//! Memory and streams of one rank, released when they are dropped.

use std::ffi::c_void;
use std::sync::Arc;

use crate::backend::Backend;
use crate::error::{Error, Result};

/// Memory of one rank. [`crate::DeviceGroup::alloc`] makes it; an engine that has its own needs none of these.
pub struct DeviceBuffer {
    /// Whether it is freed with this; if not, it is a part of another.
    owned: bool,
    backend: Arc<dyn Backend>,
    name: &'static str,
    rank: usize,
    address: u64,
    bytes: u64,
}

impl DeviceBuffer {
    /// Allocates `bytes` (at least 1) on a rank.
    pub(crate) fn new(backend: &Arc<dyn Backend>, rank: usize, bytes: u64, name: &'static str) -> Result<Self> {
        let address = backend.alloc(rank, bytes, name)?;
        Ok(Self { owned: true, backend: backend.clone(), name, rank, address, bytes })
    }

    /// The end of this buffer, from `offset` (at most its size) on, which is not used for longer than the buffer lives.
    pub(crate) fn tail(&self, offset: u64, name: &'static str) -> Self {
        Self {
            owned: false,
            backend: self.backend.clone(),
            name,
            rank: self.rank,
            address: self.address + offset,
            bytes: self.bytes - offset,
        }
    }

    /// Allocates as much as `contents` has, and copies it there.
    pub(crate) fn with(backend: &Arc<dyn Backend>, rank: usize, contents: &[u8], name: &'static str) -> Result<Self> {
        let buffer = Self::new(backend, rank, (contents.len() as u64).max(1), name)?;
        buffer.write(contents)?;
        Ok(buffer)
    }

    /// Device address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Copies `contents` to the buffer's beginning and returns when it is there. Streams are not waited for.
    ///
    /// # Errors
    /// More bytes than the buffer has, or a copy that fails.
    pub fn write(&self, contents: &[u8]) -> Result<()> {
        self.check_size("a copy to", contents.len())?;
        self.backend.write(self.rank, self.address, contents)
    }

    /// Copies the buffer's beginning to `contents`. Streams are not waited for.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn read(&self, contents: &mut [u8]) -> Result<()> {
        self.check_size("a copy from", contents.len())?;
        self.backend.read(self.rank, self.address, contents)
    }

    fn check_size(&self, what: &str, bytes: usize) -> Result<()> {
        if bytes as u64 <= self.bytes {
            return Ok(());
        }
        Err(Error::Size {
            what: format!("{what} the {} of rank {}", self.name, self.rank),
            found: format!("{bytes} bytes"),
            expected: format!("at most {}", self.bytes),
        })
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.owned
            && let Err(error) = self.backend.free(self.rank, self.address)
        {
            tracing::warn!(%error, rank = self.rank, name = self.name, "a buffer could not be freed");
        }
    }
}

/// A stream of one rank. [`crate::DeviceGroup::stream`] makes it; an engine that has its own needs none of these.
pub struct Stream {
    backend: Arc<dyn Backend>,
    rank: usize,
    raw: *mut c_void,
}

// SAFETY: a CUstream belongs to its context, not to a thread.
unsafe impl Send for Stream {}
// SAFETY: the driver's functions on a stream may be called from any thread.
unsafe impl Sync for Stream {}

impl Stream {
    pub(crate) fn new(backend: &Arc<dyn Backend>, rank: usize) -> Result<Self> {
        let raw = backend.create_stream(rank)?;
        Ok(Self { backend: backend.clone(), rank, raw })
    }

    /// The `CUstream`; null in the simulator, which has no streams.
    pub fn raw(&self) -> *mut c_void {
        self.raw
    }

    /// Waits for everything queued on the stream; in the simulator, for the rank's queued launches.
    ///
    /// # Errors
    /// What the queued work ran into.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: it is a stream of this rank until it is dropped.
        unsafe { self.backend.synchronize(self.rank, self.raw) }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        if let Err(error) = unsafe { self.backend.destroy_stream(self.rank, self.raw) } {
            tracing::warn!(%error, rank = self.rank, "a stream could not be destroyed");
        }
    }
}
