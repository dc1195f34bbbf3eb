//! What can carry out a launch: a GPU, or the stand-in.

use crate::device::Properties;
use crate::error::Error;
use crate::kernels::Kernel;
use std::time::Instant;

/// An address in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(pub u64);

/// One argument of a kernel, in the order of its parameters.
#[derive(Clone, Copy, Debug)]
pub enum Argument<'a> {
    /// A buffer that is read (`global<const T>`); so many bytes from there belong to it.
    In(Address, u64),
    /// A buffer that is written, and maybe read (`global<T>`).
    Out(Address, u64),
    /// No buffer: an optional one that is not there.
    Null,
    /// `u32`
    U32(u32),
    /// `i32`
    I32(i32),
    /// `u64`
    U64(u64),
    /// `float`
    F32(f32),
    /// `double`
    F64(f64),
    /// A structure, by value, with the layout that the kernel has for it. Buffers whose addresses stand in it are
    /// listed in [`Launch::within`].
    Struct(&'a [u8]),
}

/// A kernel with everything it is launched with. Whoever makes one has checked all shapes.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    /// The kernel.
    pub kernel: &'static Kernel,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub shared: u32,
    /// The arguments.
    pub arguments: &'a [Argument<'a>],
    /// Buffers that are reached through a [`Argument::Struct`].
    pub within: &'a [Argument<'a>],
}

impl Launch<'_> {
    /// Grid, threads and shared memory, for messages.
    pub fn shape(&self) -> String {
        let [x, y, z] = self.grid;
        format!("<<<{x}×{y}×{z}, {}, {}>>>", self.kernel.threads, self.shared)
    }
}

/// A place in the order of calls, for [`Launcher::elapsed`], which uses it up.
#[derive(Debug)]
pub enum Mark {
    /// An event on the stream (`CUevent`).
    Event(usize),
    /// A moment on the host: the stand-in has done everything before it returns.
    Moment(Instant),
}

/// Something that has memory and runs kernels. All calls are in order, as on one stream; kernels and device copies
/// return before they are done.
pub trait Launcher: Send + Sync {
    /// What it is.
    fn properties(&self) -> &Properties;

    /// Takes memory, aligned to 256 bytes. Its content is arbitrary.
    fn allocate(&self, bytes: u64) -> Result<Address, Error>;

    /// Gives memory back.
    ///
    /// # Safety
    /// `address` comes from [`Launcher::allocate`] of this launcher, once, and nothing uses it any more.
    unsafe fn free(&self, address: Address);

    /// Copies from the host; returns when `from` may be reused.
    ///
    /// # Safety
    /// `from.len()` bytes from `to` are allocated.
    unsafe fn copy_in(&self, to: Address, from: &[u8]) -> Result<(), Error>;

    /// Copies to the host, after everything launched before.
    ///
    /// # Safety
    /// `to.len()` bytes from `from` are allocated.
    unsafe fn copy_out(&self, from: Address, to: &mut [u8]) -> Result<(), Error>;

    /// Copies on the device.
    ///
    /// # Safety
    /// `bytes` from both addresses are allocated and do not overlap.
    unsafe fn copy(&self, to: Address, from: Address, bytes: u64) -> Result<(), Error>;

    /// Sets every byte.
    ///
    /// # Safety
    /// `bytes` from `at` are allocated.
    unsafe fn fill(&self, at: Address, byte: u8, bytes: u64) -> Result<(), Error>;

    /// Launches a kernel.
    ///
    /// # Safety
    /// The arguments are those of the kernel, its buffers are allocated, and with this grid it stays inside them.
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Error>;

    /// Waits for everything, and says what went wrong in it.
    fn synchronize(&self) -> Result<(), Error>;

    /// Marks this place: after everything launched before, ahead of everything launched later.
    fn mark(&self) -> Result<Mark, Error>;

    /// Waits for the later mark; the seconds between both. On a GPU they are those of its own clock, with a resolution of
    /// half a microsecond (`cuEventElapsedTime`); those of the stand-in say nothing about any GPU.
    fn elapsed(&self, from: Mark, to: Mark) -> Result<f64, Error>;

    /// Memory that can still be taken, in bytes.
    fn free_memory(&self) -> Result<u64, Error>;
}
