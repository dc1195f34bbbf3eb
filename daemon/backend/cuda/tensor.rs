//! Tensors and matrices of the CUDA backend.

use finetuned_cuda::Buffer;
use finetuned_cuda::ops::linear;
use half::bf16;
use std::sync::Arc;

/// A flat array on the GPU.
pub enum CudaTensor {
    /// Activations and their gradients.
    Activation(Buffer<bf16>),
    /// What is never rounded.
    Float(Buffer<f32>),
    /// One tensor of the adapter, its gradient or a moment.
    Parameter(Parameter),
}

/// A part of a [`Flat`].
pub struct Parameter {
    /// Its values.
    pub value: Buffer<f32>,
    /// Their rounded copy, where products read it.
    pub working: Option<Buffer<bf16>>,
    /// What it is part of.
    pub flat: Arc<Flat>,
    /// Its place there.
    pub index: usize,
}

/// All tensors of an adapter, one after the other: the optimizer takes them in one launch. Each begins at a multiple of
/// [`Flat::ALIGNMENT`] elements; what lies between is zero and stays zero.
pub struct Flat {
    /// The values.
    pub value: Buffer<f32>,
    /// Their rounded copy.
    pub working: Option<Buffer<bf16>>,
    /// Number of tensors.
    pub parts: usize,
}

impl Flat {
    /// Elements: 256 bytes of bf16.
    pub const ALIGNMENT: usize = 128;
}

impl CudaTensor {
    /// As an activation. Which tensors are is written in the contract of the operations.
    pub fn activation(&self) -> &Buffer<bf16> {
        match self {
            CudaTensor::Activation(buffer) => buffer,
            _ => wrong_kind(),
        }
    }

    /// As an activation that is written.
    pub fn activation_mut(&mut self) -> &mut Buffer<bf16> {
        match self {
            CudaTensor::Activation(buffer) => buffer,
            _ => wrong_kind(),
        }
    }

    /// As 32-bit floats.
    pub fn float(&self) -> &Buffer<f32> {
        match self {
            CudaTensor::Float(buffer) | CudaTensor::Parameter(Parameter { value: buffer, .. }) => buffer,
            CudaTensor::Activation(_) => wrong_kind(),
        }
    }

    /// As 32-bit floats that are written.
    pub fn float_mut(&mut self) -> &mut Buffer<f32> {
        match self {
            CudaTensor::Float(buffer) | CudaTensor::Parameter(Parameter { value: buffer, .. }) => buffer,
            CudaTensor::Activation(_) => wrong_kind(),
        }
    }

    /// The copy of an adapter's weights that products read.
    pub fn working(&self) -> &Buffer<bf16> {
        match self {
            CudaTensor::Parameter(Parameter { working: Some(buffer), .. }) => buffer,
            _ => wrong_kind(),
        }
    }
}

/// Which kind a tensor is of follows from the contract of the operation that made it (`trait Backend`).
fn wrong_kind() -> ! {
    unreachable!("an operation was given a tensor of another kind")
}

/// A frozen matrix on the GPU.
pub struct CudaMatrix {
    /// As the products take it.
    pub weight: linear::Matrix,
    /// The rows of a dense one, for embedding.
    pub rows: Option<Buffer<bf16>>,
}

/// The flat arrays that `tensors` are all of, in order.
pub fn whole<'a>(tensors: impl IntoIterator<Item = &'a CudaTensor>) -> Option<Arc<Flat>> {
    let mut flat: Option<&Arc<Flat>> = None;
    let mut count = 0;
    for (i, tensor) in tensors.into_iter().enumerate() {
        let CudaTensor::Parameter(part) = tensor else {
            wrong_kind();
        };
        let first = *flat.get_or_insert(&part.flat);
        assert!(Arc::ptr_eq(first, &part.flat) && part.index == i, "parameters that were not made together");
        count += 1;
    }
    assert!(flat.is_none_or(|flat| flat.parts == count), "some of the parameters that were made together");
    flat.cloned()
}
