//! Threads that run devices from one time to the next, again and again.
//!
//! A quantum is over in a fraction of a millisecond, and waking a thread takes a good part of that: who waits looks for work for a
//! while before it sleeps.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::SimError;
use crate::schedule::{Progress, Run};

/// How long a thread looks for work before it sleeps.
const LOOKS: Duration = Duration::from_micros(200);
/// As the number of a quantum: there are no more.
const END: u64 = u64::MAX;

type Reached = Result<Progress, SimError>;

/// A device, and how far it got, or the panic that ended it.
struct Share<'a> {
    run: Run<'a>,
    reached: Option<Result<Reached, Box<dyn Any + Send>>>,
}

/// What the threads share.
pub(crate) struct Workers<'a> {
    shares: Vec<Mutex<Option<Share<'a>>>>,
    /// The next share that no one has taken.
    next: AtomicUsize,
    done: AtomicUsize,
    until: AtomicU64,
    /// The number of the quantum, for those who look and for those who sleep.
    quantum: AtomicU64,
    sleepers: Mutex<()>,
    bell: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Workers<'a> {
    /// For so many devices.
    pub fn new(devices: usize) -> Self {
        Self {
            shares: (0..devices).map(|_| Mutex::new(None)).collect(),
            next: AtomicUsize::new(devices),
            done: AtomicUsize::new(0),
            until: AtomicU64::new(0),
            quantum: AtomicU64::new(0),
            sleepers: Mutex::new(()),
            bell: Condvar::new(),
        }
    }

    /// What each of the other threads does, until the end.
    pub fn help(&self) {
        let mut last = 0;
        loop {
            self.wait(|| self.quantum.load(SeqCst) != last);
            last = self.quantum.load(SeqCst);
            if last == END {
                return;
            }
            self.work();
        }
    }

    /// Lets the other threads return, when what this gives is dropped.
    pub fn end_on_drop(&self) -> impl Drop + use<'_, 'a> {
        End(self)
    }

    /// Runs the devices until a time.
    pub fn drive(&self, devices: &mut Vec<Run<'a>>, until: u64) -> Vec<Reached> {
        for (share, run) in self.shares.iter().zip(devices.drain(..)) {
            *lock(share) = Some(Share { run, reached: None });
        }
        self.until.store(until, SeqCst);
        self.done.store(0, SeqCst);
        self.next.store(0, SeqCst);
        self.quantum.fetch_add(1, SeqCst);
        self.ring();
        self.work();
        self.wait(|| self.done.load(SeqCst) == self.shares.len());
        let mut all = Vec::with_capacity(self.shares.len());
        for Share { run, reached } in self.shares.iter().filter_map(|share| lock(share).take()) {
            devices.push(run);
            match reached {
                Some(Ok(reached)) => all.push(reached),
                Some(Err(panic)) => resume_unwind(panic),
                None => {}
            }
        }
        all
    }

    /// Takes shares while there are any. One who comes late from a quantum takes them of the next, all of which is in place by then.
    fn work(&self) {
        while let Some(share) = self.shares.get(self.next.fetch_add(1, SeqCst)) {
            if let Some(Share { run, reached }) = &mut *lock(share) {
                *reached = Some(catch_unwind(AssertUnwindSafe(|| run.drive(self.until.load(SeqCst)))));
            }
            if self.done.fetch_add(1, SeqCst) + 1 == self.shares.len() {
                self.ring();
            }
        }
    }

    fn wait(&self, ended: impl Fn() -> bool) {
        let began = Instant::now();
        while began.elapsed() < LOOKS {
            for _ in 0..100 {
                if ended() {
                    return;
                }
                std::hint::spin_loop();
            }
        }
        let mut sleeping = lock(&self.sleepers);
        while !ended() {
            sleeping = self.bell.wait(sleeping).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn ring(&self) {
        drop(lock(&self.sleepers));
        self.bell.notify_all();
    }
}

struct End<'w, 'a>(&'w Workers<'a>);

impl Drop for End<'_, '_> {
    fn drop(&mut self) {
        self.0.quantum.store(END, SeqCst);
        self.0.ring();
    }
}
