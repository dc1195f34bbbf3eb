//! Writes logits for `tests/golden/check_adapter.py`, which holds an adapter that finetuned trained against PEFT:
//!
//! ```text
//! MODEL=… ADAPTER=… TOKENS=tokens.json LOGITS=logits.safetensors [QUANTIZATION=none] \
//!     cargo test --test engine -- --ignored export_logits
//! python tests/golden/check_adapter.py $MODEL $ADAPTER $TOKENS $LOGITS --nf4
//! ```

use super::support::*;
use finetuned::backend::cpu::Cpu;
use finetuned::checkpoint::read_adapter;
use finetuned::config::spec::Quantization;
use finetuned::data::Sequence;
use finetuned::model::adapter::AdapterLayout;
use finetuned::model::decoder::Workspace;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::path::PathBuf;

#[test]
#[ignore = "a tool for check_adapter.py: needs MODEL, ADAPTER, TOKENS and LOGITS"]
fn export_logits() {
    let path =
        |name: &str| PathBuf::from(std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set")));
    let quantization = match std::env::var("QUANTIZATION").as_deref() {
        Ok("none") => Quantization::None,
        _ => Quantization::Nf4,
    };
    let decoder = decoder(Cpu::<f32>::new(), &path("MODEL"), quantization, true);
    let (config, tensors) = read_adapter(&path("ADAPTER")).unwrap();
    let scale = if config.use_rslora { (config.r as f64).sqrt() } else { config.r as f64 };
    let layers = config.layers_to_transform.as_ref().map(|l| (l[0], l[l.len() - 1] + 1));
    let layout = AdapterLayout::new(
        &decoder.config,
        config.r,
        config.alpha / scale,
        0.0,
        &modules(&config.target_modules),
        layers,
    );
    let values = tensors.into_iter().map(|t| (t.name, t.data.into_iter().map(f64::from).collect())).collect();
    let adapter = adapter(&decoder.backend, &layout, &values);
    let tokens: Vec<u32> = serde_json::from_str(&std::fs::read_to_string(path("TOKENS")).unwrap()).unwrap();
    let sequence = Sequence::single(&tokens, &vec![true; tokens.len()]);
    let batch = decoder.batch(batch(&[sequence]));
    let mut work = Workspace::for_evaluation(&decoder, &layout, tokens.len());
    let logits = decoder.all_logits(&batch, tokens.len(), &layout, &adapter, &mut work).concat();
    let bytes: Vec<u8> = logits.iter().flat_map(|v| v.to_le_bytes()).collect();
    let shape = vec![tokens.len(), decoder.config.vocab_size];
    let view = TensorView::new(Dtype::F32, shape, &bytes).unwrap();
    safetensors::serialize_to_file([("logits", view)], None, &path("LOGITS")).unwrap();
}
