//! Buffers of device memory, and the arena they come from.
//!
//! All memory of a run is taken before its first step: a [`Plan`] lists what is wanted, [`Plan::take`] makes one
//! allocation of it (few and large ones: on an integrated GPU every allocation is mapped page by page), and the buffers
//! are handed out in the order of the plan. Nothing is given back before the end, nothing is taken in between.

use crate::device::{Allocation, Device};
use crate::error::Error;
use crate::launcher::{Address, Argument};
use half::bf16;
use std::marker::PhantomData;
use std::sync::Arc;

/// Every buffer starts at a multiple of this: the widest access is 16 bytes, and a sector of DRAM 64.
pub const ALIGNMENT: u64 = 256;

/// What a buffer can hold.
pub trait Element: bytemuck::Pod + Send + Sync + std::fmt::Debug {
    /// Its name in messages.
    const NAME: &'static str;
}

macro_rules! elements {
    ($($t:ty: $name:literal)*) => { $(impl Element for $t { const NAME: &'static str = $name; })* };
}
elements! { bf16: "bf16" f32: "f32" f64: "f64" u8: "u8" i32: "i32" u32: "u32" u64: "u64" }

/// A flat array on a device. It keeps the allocation that it is part of alive.
pub struct Buffer<T> {
    allocation: Arc<Allocation>,
    offset: u64,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Element> std::fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}[{}] at {:#x}", T::NAME, self.len, self.address().0)
    }
}

impl<T: Element> Buffer<T> {
    /// An allocation of its own, for tests and for what lives outside of a plan. Its content is arbitrary.
    pub fn new(device: &Device, len: usize) -> Result<Buffer<T>, Error> {
        let bytes = (len * size_of::<T>()) as u64;
        let allocation = Arc::new(device.allocate(bytes.max(1))?);
        Ok(Buffer { allocation, offset: 0, len, element: PhantomData })
    }

    /// A buffer with these values.
    pub fn from_slice(device: &Device, values: &[T]) -> Result<Buffer<T>, Error> {
        let mut buffer = Buffer::new(device, values.len())?;
        buffer.write(values)?;
        Ok(buffer)
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it starts.
    pub fn address(&self) -> Address {
        Address(self.allocation.address.0 + self.offset)
    }

    /// The device it lies on.
    pub fn device(&self) -> &Device {
        self.allocation.device()
    }

    /// Another handle to the same memory.
    pub fn share(&self) -> Buffer<T> {
        Buffer {
            allocation: self.allocation.clone(),
            offset: self.offset,
            len: self.len,
            element: PhantomData,
        }
    }

    /// The same memory as elements of another type, as many as it holds whole.
    pub fn cast<U: Element>(&self) -> Buffer<U> {
        Buffer {
            allocation: self.allocation.clone(),
            offset: self.offset,
            len: self.len * size_of::<T>() / size_of::<U>(),
            element: PhantomData,
        }
    }

    fn bytes(&self) -> u64 {
        (self.len * size_of::<T>()) as u64
    }

    /// Elements `start .. start + len` as a buffer of their own, which shares the memory.
    ///
    /// # Errors
    /// When the buffer has fewer.
    pub fn slice(&self, start: usize, len: usize) -> Result<Buffer<T>, Error> {
        if start.checked_add(len).is_none_or(|end| end > self.len) {
            let what = format!("{len} elements from {start} on of {}", self.len);
            return Err(Error::Shape { operation: "slice of a buffer", what });
        }
        let offset = self.offset + (start * size_of::<T>()) as u64;
        Ok(Buffer { allocation: self.allocation.clone(), offset, len, element: PhantomData })
    }

    /// Copies `values` to the front.
    pub fn write(&mut self, values: &[T]) -> Result<(), Error> {
        fits("write", values.len(), self.len)?;
        // SAFETY: the buffer lies inside its allocation and is at least that long.
        unsafe { self.device().launcher().copy_in(self.address(), bytemuck::cast_slice(values)) }
    }

    /// Copies the first `len` elements to the host, after everything launched before.
    pub fn read(&self, len: usize) -> Result<Vec<T>, Error> {
        fits("read", len, self.len)?;
        let mut values = vec![T::zeroed(); len];
        // SAFETY: as in `write`.
        unsafe { self.device().launcher().copy_out(self.address(), bytemuck::cast_slice_mut(&mut values))? };
        Ok(values)
    }

    /// Sets every byte.
    pub fn fill(&mut self, byte: u8) -> Result<(), Error> {
        // SAFETY: as in `write`.
        unsafe { self.device().launcher().fill(self.address(), byte, self.bytes()) }
    }

    /// Copies the first `len` elements of `source` to `offset ..`.
    pub fn copy_from(&mut self, source: &Buffer<T>, len: usize, offset: usize) -> Result<(), Error> {
        fits("source of a copy", len, source.len)?;
        let to = self.slice(offset, len)?;
        let (from, bytes) = (source.address().0, to.bytes());
        if from < to.address().0 + bytes && to.address().0 < from + bytes && bytes > 0 {
            return Err(Error::Shape { operation: "copy", what: "source and destination overlap".into() });
        }
        // SAFETY: both lie inside their allocations, are long enough and do not overlap.
        unsafe { self.device().launcher().copy(to.address(), source.address(), bytes) }
    }

    /// As an input of a kernel.
    pub(crate) fn input(&self) -> Argument<'static> {
        Argument::In(self.address(), self.bytes())
    }

    /// As something that a kernel writes.
    pub(crate) fn output(&mut self) -> Argument<'static> {
        Argument::Out(self.address(), self.bytes())
    }
}

fn fits(operation: &'static str, wanted: usize, there: usize) -> Result<(), Error> {
    if wanted <= there {
        return Ok(());
    }
    Err(Error::Shape { operation, what: format!("{wanted} elements of a buffer of {there}") })
}

/// A place in a [`Plan`].
#[derive(Debug)]
pub struct Planned<T> {
    offset: u64,
    len: usize,
    element: PhantomData<T>,
}

/// What will be needed, before any of it is taken.
#[derive(Debug, Default)]
pub struct Plan {
    bytes: u64,
}

impl Plan {
    /// Nothing yet.
    pub fn new() -> Plan {
        Plan::default()
    }

    /// Asks for `len` elements.
    pub fn add<T: Element>(&mut self, len: usize) -> Planned<T> {
        let offset = self.bytes;
        self.bytes = (offset + (len * size_of::<T>()) as u64).next_multiple_of(ALIGNMENT);
        Planned { offset, len, element: PhantomData }
    }

    /// Bytes of all of it.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes the memory, if `kept` bytes stay free for the rest of the system.
    ///
    /// # Errors
    /// [`Error::Memory`] when they would not; what CUDA says otherwise.
    pub fn take(self, device: &Device, kept: u64) -> Result<Arena, Error> {
        let available = device.free_memory()?.saturating_sub(kept);
        if self.bytes > available {
            return Err(Error::Memory { wanted: self.bytes, available, kept });
        }
        Ok(Arena { allocation: Arc::new(device.allocate(self.bytes.max(1))?) })
    }
}

/// The memory of a plan.
pub struct Arena {
    allocation: Arc<Allocation>,
}

impl Arena {
    /// The buffer at a place of the plan. Its content is arbitrary.
    ///
    /// # Errors
    /// When the place is not of this plan.
    pub fn buffer<T: Element>(&self, planned: Planned<T>) -> Result<Buffer<T>, Error> {
        let end = planned.offset + (planned.len * size_of::<T>()) as u64;
        if end > self.allocation.bytes {
            let what = format!("{end} bytes of an arena of {}", self.allocation.bytes);
            return Err(Error::Shape { operation: "arena", what });
        }
        Ok(Buffer {
            allocation: self.allocation.clone(),
            offset: planned.offset,
            len: planned.len,
            element: PhantomData,
        })
    }
}

/// Buffers of a size that is not known in advance, cut from few large allocations: those of a model that is loaded layer
/// by layer. An allocation goes back when the last of its buffers does.
pub struct Slabs {
    device: Device,
    kept: u64,
    current: Option<(Arc<Allocation>, u64)>,
}

/// Size of an allocation that several buffers share. A 1B model takes about ten; what is left at the end of one when the
/// next buffer does not fit is lost, a buffer of more than an eighth gets an allocation of its own.
const SLAB: u64 = 64 << 20;

impl Slabs {
    /// Takes memory as long as `kept` bytes stay free for the rest of the system.
    pub fn new(device: &Device, kept: u64) -> Slabs {
        Slabs { device: device.clone(), kept, current: None }
    }

    /// A buffer with arbitrary content.
    ///
    /// # Errors
    /// [`Error::Memory`] when less than what has to stay free would; what CUDA says otherwise.
    pub fn buffer<T: Element>(&mut self, len: usize) -> Result<Buffer<T>, Error> {
        let bytes = (len * size_of::<T>()).max(1) as u64;
        let bytes = bytes.next_multiple_of(ALIGNMENT);
        if bytes > SLAB / 8 {
            return Ok(Buffer { allocation: self.allocate(bytes)?, offset: 0, len, element: PhantomData });
        }
        let (allocation, offset) = match self.current.take() {
            Some((allocation, used)) if used + bytes <= SLAB => (allocation, used),
            _ => (self.allocate(SLAB)?, 0),
        };
        self.current = Some((allocation.clone(), offset + bytes));
        Ok(Buffer { allocation, offset, len, element: PhantomData })
    }

    fn allocate(&self, bytes: u64) -> Result<Arc<Allocation>, Error> {
        let available = self.device.free_memory()?.saturating_sub(self.kept);
        if bytes > available {
            return Err(Error::Memory { wanted: bytes, available, kept: self.kept });
        }
        Ok(Arc::new(self.device.allocate(bytes)?))
    }
}
