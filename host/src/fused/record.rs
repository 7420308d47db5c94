//! What the launches of a traced kernel record.

use bytemuck::Zeroable;
use ferromoe_kernel::trace::{ROLES, Record, TraceBuffer};

use super::FusedMoe;
use crate::error::{Error, Result};
use crate::memory::DeviceBuffer;
use crate::trace::Trace;

impl FusedMoe {
    /// Makes every later launch record up to `capacity` activities of each role of a CTA, over what the launch before recorded.
    ///
    /// # Errors
    /// A group whose kernel records nothing ([`crate::DeviceGroup::open_traced`]), or memory that runs out.
    pub fn record_trace(&mut self, capacity: u32) -> Result<()> {
        let group = self.workspace.group().clone();
        if !group.is_traced() {
            return Err(Error::NotTraced);
        }
        let backend = &group.backend;
        let buffer = |rank: usize| {
            let records = u64::from(backend.sms(rank) * ROLES) * u64::from(capacity);
            let bytes = (records * size_of::<Record>() as u64).max(1);
            let buffer = DeviceBuffer::new(backend, rank, bytes, "trace")?;
            backend.fill(rank, buffer.address(), bytes, 0)?;
            Ok(buffer)
        };
        self.records = self.local_ranks().map(buffer).collect::<Result<_>>()?;
        for (state, buffer) in self.ranks.iter_mut().zip(&self.records) {
            for params in &mut state.params {
                params.trace = TraceBuffer { address: buffer.address(), capacity, reserved: 0 };
            }
        }
        Ok(())
    }

    /// What the last launch of this process's ranks recorded. No launch may be running.
    ///
    /// # Errors
    /// No launch since [`Self::record_trace`], or one that recorded more than its capacity.
    pub fn trace(&self) -> Result<Trace> {
        let capacity = self.ranks.first().map_or(0, |state| state.params[0].trace.capacity) as usize;
        if self.records.is_empty() || capacity == 0 {
            return Err(Error::NotTraced);
        }
        let mut ranks = Vec::new();
        for ((rank, state), buffer) in self.numbered().zip(&self.records) {
            let mut records = vec![Record::zeroed(); buffer.bytes() as usize / size_of::<Record>()];
            buffer.read(bytemuck::cast_slice_mut(&mut records))?;
            // A launch of whole clusters may leave the last SM out.
            let per_cta = capacity * ROLES as usize;
            let ran = records.chunks(per_cta).rposition(|records| records[0].time_ns != 0);
            records.truncate(ran.map_or(records.len(), |last| (last + 1) * per_cta));
            ranks.push((rank, state.params[0].wave_tiles, records));
        }
        Trace::new(*self.config.experts_format.kernel(), ranks, capacity)
    }
}
