//! bitsandbytes' layout of a 4-bit weight in a safetensors file. A weight `X` is several tensors:
//!
//! | tensor | content |
//! |---|---|
//! | `X` | two codes a byte, `[n / 2, 1]` |
//! | `X.absmax` | float32, one a block; bytes with double quantisation |
//! | `X.quant_map` | the 16 values of the codes |
//! | `X.nested_absmax`, `X.nested_quant_map` | only with double quantisation |
//! | `X.quant_state.bitsandbytes__nf4` | JSON as bytes: `quant_type`, `blocksize`, `dtype`, `shape`, and with double quantisation `nested_blocksize`, `nested_dtype`, `nested_offset` |
//!
//! Our own cache of a quantised base ([`super::base_cache`]) is written in it too, so there is one reader for both.

use super::tensor_file::Tensor;
use crate::backend::nf4::{self, NESTED_BLOCK, NF4_CODES};
use crate::backend::{Absmax, Nf4Matrix};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Suffix of the JSON part; its presence says that a weight is quantised.
pub const STATE: &str = ".quant_state.bitsandbytes__nf4";

/// Suffix of the JSON part of the other 4-bit type, which we do not read.
pub const FP4_STATE: &str = ".quant_state.bitsandbytes__fp4";

/// All suffixes of the parts beside the codes.
pub const SUFFIXES: [&str; 5] = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE];

/// Bytes we give the JSON part, filled up with blanks, so that the size of a file is known before its content.
const STATE_SIZE: usize = 256;

/// The JSON part.
#[derive(Serialize, Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nested_blocksize: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nested_dtype: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nested_offset: Option<f64>,
}

/// Reads the weight `name`, `[rows, cols]`. `find` looks a tensor up by its full name.
///
/// # Errors
/// What is wrong with the parts, in words; nothing is returned that [`Nf4Matrix::check`] would refuse or that would
/// dequantise to infinity.
pub fn read<'a>(
    find: impl Fn(&str) -> Option<Tensor<'a>>,
    name: &str,
    rows: usize,
    cols: usize,
) -> Result<Nf4Matrix, String> {
    let part = |suffix: &str| find(&format!("{name}{suffix}")).ok_or(format!("`{name}{suffix}` is missing"));
    let floats = |suffix: &str| {
        let tensor = part(suffix)?;
        let found = tensor.stored_dtype();
        if found != Dtype::F32 {
            return Err(format!("`{name}{suffix}` is {found:?} instead of F32"));
        }
        let values = tensor.to_f32();
        if values.iter().all(|v| v.is_finite()) { Ok(values) } else { Err(non_finite(suffix)) }
    };

    let state: State = serde_json::from_slice(part(STATE)?.bytes())
        .map_err(|e| format!("`{name}{STATE}` is not the JSON of a quantisation state: {e}"))?;
    if state.quant_type != "nf4" {
        return Err(format!("quantisation type `{}` is not supported; supported: nf4", state.quant_type));
    }
    if state.shape != [rows, cols] {
        return Err(format!("shape {:?} instead of [{rows}, {cols}]", state.shape));
    }
    if floats(".quant_map")? != NF4_CODES {
        return Err("`quant_map` is not the table of NF4".into());
    }
    let absmax = part(".absmax")?;
    let absmax = match (absmax.stored_dtype(), state.nested_offset) {
        (Dtype::F32, None) => {
            floats(".absmax")?;
            Absmax::Plain(absmax.blob())
        }
        (Dtype::U8, Some(offset)) => {
            let map: [f32; 256] = floats(".nested_quant_map")?
                .try_into()
                .map_err(|m: Vec<f32>| format!("`nested_quant_map` has {} values instead of 256", m.len()))?;
            let offset = offset as f32;
            if !offset.is_finite() {
                return Err(non_finite("nested_offset"));
            }
            let ours = nf4::dynamic_map();
            Absmax::Nested {
                codes: absmax.blob(),
                map: if map == **ours { Arc::clone(ours) } else { Arc::new(map) },
                nested: floats(".nested_absmax")?.into(),
                nested_block: state.nested_blocksize.ok_or("`nested_blocksize` is missing")?,
                offset,
            }
        }
        (dtype, offset) => {
            let nested = if offset.is_some() { "with" } else { "without" };
            return Err(format!("`absmax` is {dtype:?} {nested} double quantisation"));
        }
    };
    let matrix = Nf4Matrix { rows, cols, block: state.blocksize, codes: part("")?.blob(), absmax };
    matrix.check().map_err(|e| e.to_string())?;
    Ok(matrix)
}

fn non_finite(part: &str) -> String {
    format!("`{}` holds infinity or NaN", part.trim_start_matches('.'))
}

/// Suffix, element type and shape of every part of a weight that we quantise, in the order of [`parts`].
pub fn layout(rows: usize, cols: usize, double_quant: bool) -> Vec<(&'static str, Dtype, Vec<usize>)> {
    let blocks = (rows * cols).div_ceil(nf4::BLOCK);
    let codes = ("", Dtype::U8, vec![(rows * cols).div_ceil(2), 1]);
    let map = (".quant_map", Dtype::F32, vec![NF4_CODES.len()]);
    let state = (STATE, Dtype::U8, vec![STATE_SIZE]);
    if double_quant {
        let nested = (".nested_absmax", Dtype::F32, vec![blocks.div_ceil(NESTED_BLOCK)]);
        let nested_map = (".nested_quant_map", Dtype::F32, vec![256]);
        vec![map, nested, nested_map, state, (".absmax", Dtype::U8, vec![blocks]), codes]
    } else {
        vec![map, (".absmax", Dtype::F32, vec![blocks]), state, codes]
    }
}

/// Writes every part of `matrix`, in the order of [`layout`].
///
/// # Errors
/// Those of `write`.
pub fn parts(matrix: &Nf4Matrix, mut write: impl FnMut(&[u8]) -> std::io::Result<()>) -> std::io::Result<()> {
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let mut state = State {
        quant_type: "nf4".into(),
        blocksize: matrix.block,
        dtype: "float32".into(),
        shape: vec![matrix.rows, matrix.cols],
        nested_blocksize: None,
        nested_dtype: None,
        nested_offset: None,
    };
    write(&bytes(&NF4_CODES))?;
    match &matrix.absmax {
        Absmax::Plain(absmax) => {
            write(absmax.as_bytes())?;
            write(&padded(&state)?)?;
        }
        Absmax::Nested { codes, map, nested, nested_block, offset } => {
            state.nested_blocksize = Some(*nested_block);
            state.nested_dtype = Some("float32".into());
            state.nested_offset = Some(f64::from(*offset));
            write(&bytes(nested))?;
            write(&bytes(&map[..]))?;
            write(&padded(&state)?)?;
            write(codes.as_bytes())?;
        }
    }
    write(matrix.codes.as_bytes())
}

/// The JSON part, filled up to [`STATE_SIZE`].
fn padded(state: &State) -> std::io::Result<Vec<u8>> {
    let mut json = serde_json::to_vec(state)?;
    if json.len() > STATE_SIZE {
        return Err(std::io::Error::other(format!("quantisation state of {} bytes", json.len())));
    }
    json.resize(STATE_SIZE, b' ');
    Ok(json)
}
