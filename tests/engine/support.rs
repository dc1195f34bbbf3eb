//! Small helpers that the engine's tests share.

use finetuned::backend::cpu::Cpu;
use finetuned::backend::cpu::real::Real;
use finetuned::backend::cuda::Cuda;
use finetuned::backend::{Backend, Batch, Role};
use finetuned::config::spec::Quantization;
use finetuned::data::Sequence;
use finetuned::model::adapter::{Adapter, AdapterLayout, Module};
use finetuned::model::decoder::Decoder;
use finetuned::model::weights::Base;
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The project's directory.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Tensors of a safetensors file, f32 or f64, by name.
pub fn tensors(path: &Path) -> BTreeMap<String, Vec<f64>> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let read = |view: safetensors::tensor::TensorView<'_>| -> Vec<f64> {
        match view.dtype() {
            safetensors::Dtype::F32 => view
                .data()
                .chunks_exact(4)
                .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
                .collect(),
            safetensors::Dtype::F64 => {
                view.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
            }
            other => panic!("{other:?}"),
        }
    };
    file.tensors().into_iter().map(|(name, view)| (name, read(view))).collect()
}

/// ‖a − b‖ / ‖b‖
pub fn relative_error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum();
    let size: f64 = b.iter().map(|b| b * b).sum();
    if size == 0.0 { difference.sqrt() } else { (difference / size).sqrt() }
}

/// A backend whose results can be looked at.
pub trait Values: Backend {
    /// All values of an adapter's tensor.
    fn values(&self, tensor: &Self::Tensor, len: usize) -> Vec<f64>;
}

impl<T: Real> Values for Cpu<T> {
    fn values(&self, tensor: &Vec<T>, len: usize) -> Vec<f64> {
        assert_eq!(tensor.len(), len);
        tensor.iter().map(|v| v.to_f64()).collect()
    }
}

impl Values for Cuda {
    fn values(&self, tensor: &Self::Tensor, len: usize) -> Vec<f64> {
        self.read(tensor, len).into_iter().map(f64::from).collect()
    }
}

/// A model directory on a backend.
pub fn decoder<B: Backend>(
    backend: B,
    dir: &Path,
    quantization: Quantization,
    double_quant: bool,
) -> Decoder<B> {
    let cache = tempfile::tempdir().unwrap();
    let base = Base::load(dir, quantization, double_quant, cache.path(), &mut |_, _| {})
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    Decoder::new(backend, base)
}

/// The modules with these names.
pub fn modules(names: &[String]) -> Vec<Module> {
    Module::ALL.into_iter().filter(|m| names.iter().any(|n| n == m.name())).collect()
}

/// An adapter with values by PEFT name.
pub fn adapter<B: Backend>(
    backend: &B,
    layout: &AdapterLayout,
    values: &BTreeMap<String, Vec<f64>>,
) -> Adapter<B> {
    let mut adapter = Adapter::zeros(backend, layout, Role::Weights);
    assert_eq!(values.len(), layout.tensors());
    for (i, tensor) in adapter.tensors.iter_mut().enumerate() {
        let values: Vec<f32> = values[&layout.name(i)].iter().map(|&v| v as f32).collect();
        assert_eq!(values.len(), layout.shape(i).iter().product::<usize>());
        backend.write(tensor, &values);
    }
    adapter
}

/// Sequences as one micro-batch.
pub fn batch(sequences: &[Sequence]) -> Batch {
    let mut batch = Batch::default();
    for (i, s) in sequences.iter().enumerate() {
        batch.push(&s.tokens, &s.targets, &s.positions, &s.cu_seqlens, 1000 + i as u64);
    }
    batch
}
