//! Float tensors in a safetensors file: a JSON header (8 bytes of length before it), then the data, little-endian, in
//! the order given. Written piece by piece from where the tensors lie, so that no second copy of them exists.
//!
//! Header parsing and its checks (offsets contiguous, sizes equal to shapes, no overflow) are the `safetensors` crate's;
//! writing is ours because the crate's own writer does not fsync.

use super::commit::HashingFile;
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use std::collections::{HashMap, HashSet};
use std::io;

#[cfg(target_endian = "big")]
compile_error!("safetensors data is little-endian and is written from memory as it lies");

/// A tensor, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    /// Its key in the file.
    pub name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// As many elements as the shape says.
    pub data: Vec<f32>,
}

impl NamedTensor {
    /// Borrows it.
    pub fn as_ref(&self) -> TensorRef<'_> {
        TensorRef { name: &self.name, shape: &self.shape, data: &self.data }
    }
}

/// A borrowed tensor, row-major.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorRef<'a> {
    /// Its key in the file.
    pub name: &'a str,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// As many elements as the shape says.
    pub data: &'a [f32],
}

/// A tensor, or a file of tensors, that is not one.
#[derive(Debug, thiserror::Error)]
pub enum TensorError {
    /// The file's header or size is wrong.
    #[error("not a safetensors file: {0}")]
    Format(#[from] safetensors::SafeTensorError),
    /// An element type that is not read here.
    #[error("tensor {name} has the type {dtype:?}; expected F32, F16 or BF16")]
    Dtype {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: Dtype,
    },
    /// Shape and number of elements disagree.
    #[error("tensor {name}: shape {shape:?} does not have {elements} elements")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its number of elements.
        elements: usize,
    },
    /// Two tensors of one name.
    #[error("two tensors are called {0}")]
    Duplicate(String),
}

/// The head of a file with these tensors: length and JSON, padded to 8 bytes. Each tensor comes with a prefix for its name..
pub(super) fn header(tensors: &[(&str, TensorRef<'_>)]) -> Result<Vec<u8>, TensorError> {
    let mut names = HashSet::new();
    let mut infos = Vec::with_capacity(tensors.len());
    let mut offset = 0usize;
    for (prefix, tensor) in tensors {
        let name = format!("{prefix}{}", tensor.name);
        let elements = tensor.shape.iter().try_fold(1usize, |product, n| product.checked_mul(*n));
        if elements != Some(tensor.data.len()) {
            let (shape, elements) = (tensor.shape.to_vec(), tensor.data.len());
            return Err(TensorError::Shape { name, shape, elements });
        }
        if !names.insert(name.clone()) {
            return Err(TensorError::Duplicate(name));
        }
        let end = offset + size_of_val(tensor.data);
        infos.push((
            name,
            TensorInfo { dtype: Dtype::F32, shape: tensor.shape.to_vec(), data_offsets: (offset, end) },
        ));
        offset = end;
    }
    // One entry: a map of several would be written in a different order each time.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let metadata = Metadata::new(Some(metadata), infos)?;
    let mut json = serde_json::to_vec(&metadata).map_err(safetensors::SafeTensorError::from)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}

/// Writes a file: `header` must come from the same tensors.
pub(super) fn write(
    file: &mut HashingFile,
    header: &[u8],
    tensors: &[(&str, TensorRef<'_>)],
) -> io::Result<()> {
    file.write_all(header)?;
    for (_, tensor) in tensors {
        file.write_all(bytemuck::cast_slice(tensor.data))?;
    }
    Ok(())
}

/// Reads a whole file; tensors come in the order in which they lie in it. f16 and bf16 become f32 (exactly).
pub(super) fn parse(bytes: &[u8]) -> Result<Vec<NamedTensor>, TensorError> {
    let file = SafeTensors::deserialize(bytes)?;
    let (_, metadata) = SafeTensors::read_metadata(bytes)?;
    metadata
        .offset_keys()
        .into_iter()
        .map(|name| {
            let view = file.tensor(&name)?;
            let data = match view.dtype() {
                Dtype::F32 => floats(view.data(), f32::from_le_bytes),
                Dtype::F16 => floats(view.data(), |bytes| f16::from_le_bytes(bytes).to_f32()),
                Dtype::BF16 => floats(view.data(), |bytes| bf16::from_le_bytes(bytes).to_f32()),
                dtype => return Err(TensorError::Dtype { name, dtype }),
            };
            Ok(NamedTensor { name, shape: view.shape().to_vec(), data })
        })
        .collect()
}

fn floats<const N: usize>(bytes: &[u8], convert: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks::<N>().0.iter().map(|chunk| convert(*chunk)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, shape: &[usize], data: Vec<f32>) -> NamedTensor {
        NamedTensor { name: name.into(), shape: shape.into(), data }
    }

    fn file(tensors: &[(&str, TensorRef<'_>)]) -> Vec<u8> {
        let mut bytes = header(tensors).unwrap();
        for (_, tensor) in tensors {
            bytes.extend_from_slice(bytemuck::cast_slice(tensor.data));
        }
        bytes
    }

    #[test]
    fn tensors_come_back_in_their_order_with_every_bit() {
        let tensors = [
            tensor("z", &[2, 2], vec![f32::NAN, -0.0, f32::MIN_POSITIVE / 2.0, f32::INFINITY]),
            tensor("a", &[3], vec![1.0, 2.0, 3.0]),
            tensor("m", &[], vec![4.0]),
        ];
        let refs: Vec<_> = tensors.iter().map(|tensor| ("p.", tensor.as_ref())).collect();
        let bytes = file(&refs);
        assert_eq!(bytes.len() % 4, 0);
        let back = parse(&bytes).unwrap();
        assert_eq!(back.len(), 3);
        for (before, after) in tensors.iter().zip(&back) {
            assert_eq!(after.name, format!("p.{}", before.name));
            assert_eq!(after.shape, before.shape);
            let bits = |tensor: &NamedTensor| tensor.data.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(after), bits(before));
        }
        assert_eq!(file(&refs), bytes, "the same tensors give the same bytes");
        assert!(parse(&file(&[])).unwrap().is_empty());
    }

    #[test]
    fn half_precision_widens_exactly() {
        let values = [f16::MIN_POSITIVE_SUBNORMAL, f16::MAX, f16::from_f32(-1.5)];
        let wide = [bf16::MAX, bf16::from_f32(3.0), bf16::NEG_ZERO];
        let views = [
            ("h", Dtype::F16, bytemuck::cast_slice::<_, u8>(&values)),
            ("b", Dtype::BF16, bytemuck::cast_slice::<_, u8>(&wide)),
        ];
        let views = views.map(|(name, dtype, data)| {
            (name, safetensors::tensor::TensorView::new(dtype, vec![3], data).unwrap())
        });
        let back = parse(&safetensors::serialize(views, None).unwrap()).unwrap();
        let find = |name: &str| back.iter().find(|tensor| tensor.name == name).unwrap().data.clone();
        assert_eq!(find("h"), values.map(f16::to_f32));
        assert_eq!(find("b"), wide.map(bf16::to_f32));
    }

    #[test]
    fn what_is_not_a_tensor_is_refused() {
        let wrong = tensor("w", &[2, 3], vec![0.0; 5]);
        assert!(matches!(header(&[("", wrong.as_ref())]), Err(TensorError::Shape { elements: 5, .. })));
        let huge = tensor("w", &[usize::MAX, 2], vec![]);
        assert!(matches!(header(&[("", huge.as_ref())]), Err(TensorError::Shape { .. })));
        let one = tensor("w", &[1], vec![0.0]);
        let twice = [("", one.as_ref()), ("", one.as_ref())];
        assert!(matches!(header(&twice), Err(TensorError::Duplicate(name)) if name == "w"));
        let ints = safetensors::tensor::TensorView::new(Dtype::I64, vec![1], &[0; 8]).unwrap();
        let bytes = safetensors::serialize([("i", ints)], None).unwrap();
        assert!(matches!(parse(&bytes), Err(TensorError::Dtype { dtype: Dtype::I64, .. })));
        assert!(matches!(parse(b"short"), Err(TensorError::Format(_))));
    }
}
