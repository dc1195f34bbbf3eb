//! Small models of every family, written by the tests themselves, whole and broken.

use super::*;
use crate::backend::Blob;
use crate::config::spec::Quantization::{Nf4, None as Unquantized};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::fs;

/// A model directory under construction.
struct Model {
    dir: tempfile::TempDir,
    cache: tempfile::TempDir,
    config: Value,
    /// Name, type, shape, bytes.
    tensors: Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)>,
    shards: usize,
}

/// Values that half-precision types hold exactly, and that differ between tensors.
fn values(name: &str, n: usize) -> Vec<f32> {
    let mut state = name.bytes().fold(17u32, |s, b| s.wrapping_mul(31).wrapping_add(u32::from(b)));
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 25) as f32 - 64.0) / 256.0
        })
        .collect()
}

fn encode(dtype: safetensors::Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        safetensors::Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        safetensors::Dtype::F16 => {
            values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect()
        }
        _ => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
    }
}

impl Model {
    /// Two layers, hidden 48, ffn 80 (neither a multiple of the block), four heads of 12 (Qwen3: 16), two of them for keys.
    fn new(class: &str, dtype: safetensors::Dtype, tied: bool) -> Self {
        let head_dim = if class.starts_with("Qwen3") { 16 } else { 12 };
        let config = json!({
            "architectures": [class], "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim, "vocab_size": 32,
            "max_position_embeddings": 64, "tie_word_embeddings": tied, "sliding_window": null
        });
        let mut model = Model {
            dir: tempfile::tempdir().unwrap(),
            cache: tempfile::tempdir().unwrap(),
            config,
            tensors: Vec::new(),
            shards: 1,
        };
        let parsed = model.parsed();
        let mut add = |name: String, shape: Vec<usize>| {
            let bytes = encode(dtype, &values(&name, shape.iter().product()));
            model.tensors.push((name, dtype, shape, bytes));
        };
        add(EMBEDDING.into(), vec![32, 48]);
        for i in 0..2 {
            for linear in linear_shapes(&parsed) {
                add(weight_name(i, linear.name), vec![linear.rows, linear.cols]);
                if linear.bias {
                    add(bias_name(i, linear.name), vec![linear.rows]);
                }
            }
            add(norm_name(i, "input_layernorm"), vec![48]);
            add(norm_name(i, "post_attention_layernorm"), vec![48]);
            if parsed.qk_norm {
                add(norm_name(i, "self_attn.q_norm"), vec![head_dim]);
                add(norm_name(i, "self_attn.k_norm"), vec![head_dim]);
            }
        }
        add(FINAL_NORM.into(), vec![48]);
        if !tied {
            add(LM_HEAD.into(), vec![32, 48]);
        }
        model
    }

    fn llama() -> Self {
        Self::new("LlamaForCausalLM", safetensors::Dtype::BF16, false)
    }

    fn parsed(&self) -> ModelConfig {
        ModelConfig::parse(&self.config.to_string(), Path::new("config.json")).unwrap()
    }

    fn position(&self, name: &str) -> usize {
        self.tensors.iter().position(|t| t.0 == name).unwrap()
    }

    fn write(&self) -> &Self {
        fs::write(self.dir.path().join("config.json"), self.config.to_string()).unwrap();
        let mut map = serde_json::Map::new();
        for shard in 0..self.shards {
            let name = match self.shards {
                1 => SINGLE.to_owned(),
                n => format!("model-{:05}-of-{n:05}.safetensors", shard + 1),
            };
            let mine =
                self.tensors.iter().enumerate().filter(|(i, _)| i % self.shards == shard).map(|(_, t)| t);
            let views: Vec<_> = mine
                .map(|(name, dtype, shape, bytes)| {
                    (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
                })
                .collect();
            map.extend(views.iter().map(|(tensor, _)| ((*tensor).clone(), Value::from(name.clone()))));
            fs::write(self.dir.path().join(&name), safetensors::serialize(views, None).unwrap()).unwrap();
        }
        if self.shards > 1 {
            let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
            fs::write(self.dir.path().join(INDEX), index.to_string()).unwrap();
        }
        self
    }

    fn load(&self, quantization: Quantization, double_quant: bool) -> Result<Base, WeightsError> {
        Base::load(self.dir.path(), quantization, double_quant, self.cache.path(), &mut |_, _| {})
    }

    fn error(&self) -> String {
        self.load(Nf4, true).unwrap_err().to_string()
    }

    /// Turns every linear into bitsandbytes' parts.
    fn quantize(&mut self, double_quant: bool) {
        let quantization =
            json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"});
        self.config["quantization_config"] = quantization;
        let parsed = self.parsed();
        for i in 0..2 {
            for LinearShape { name, rows, cols, .. } in linear_shapes(&parsed) {
                let name = weight_name(i, name);
                let at = self.position(&name);
                self.tensors.remove(at);
                let matrix = nf4::quantize(&values(&name, rows * cols), rows, cols, double_quant).unwrap();
                let mut parts = Vec::new();
                bitsandbytes::parts(&matrix, |bytes| {
                    parts.push(bytes.to_vec());
                    Ok(())
                })
                .unwrap();
                let layout = bitsandbytes::layout(rows, cols, double_quant);
                assert_eq!(layout.len(), parts.len());
                for ((suffix, dtype, shape), bytes) in layout.into_iter().zip(parts) {
                    self.tensors.push((format!("{name}{suffix}"), dtype, shape, bytes));
                }
            }
        }
    }
}

fn dense(matrix: &FrozenMatrix) -> Vec<f32> {
    let (rows, cols) = matrix.shape();
    let mut out = vec![0.0; rows * cols];
    match matrix {
        FrozenMatrix::Nf4(m) => m.dequantize_rows(0..rows, &mut out),
        FrozenMatrix::Dense(m) => {
            let bytes = m.data.as_bytes();
            for (i, v) in out.iter_mut().enumerate() {
                let half = |i: usize| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]);
                *v = match m.dtype {
                    crate::backend::Dtype::F32 => {
                        f32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap())
                    }
                    crate::backend::Dtype::F16 => half::f16::from_bits(half(i)).to_f32(),
                    crate::backend::Dtype::Bf16 => half::bf16::from_bits(half(i)).to_f32(),
                };
            }
        }
    }
    out
}

/// Every number of a base, in order.
fn everything(base: &Base) -> Vec<Vec<f32>> {
    let mut all = vec![dense(&base.embedding), base.final_norm.clone()];
    all.extend(base.lm_head.as_ref().map(dense));
    for layer in &base.layers {
        for linear in layer.linears() {
            all.push(dense(&linear.weight));
            all.extend(linear.bias.clone());
        }
        all.extend([layer.input_norm.clone(), layer.post_attention_norm.clone()]);
        all.extend(layer.q_norm.clone().into_iter().chain(layer.k_norm.clone()));
    }
    all
}

fn codes(matrix: &FrozenMatrix) -> &Blob {
    match matrix {
        FrozenMatrix::Nf4(m) => &m.codes,
        FrozenMatrix::Dense(_) => panic!("not quantised"),
    }
}

#[test]
fn every_family_loads_in_every_type() {
    for class in ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
        for dtype in [safetensors::Dtype::F32, safetensors::Dtype::F16, safetensors::Dtype::BF16] {
            for tied in [false, true] {
                let model = Model::new(class, dtype, tied);
                let base = model.write().load(Unquantized, true).unwrap();
                assert_eq!(base.lm_head.is_none(), tied);
                assert_eq!(base.cache, CacheUse::NotNeeded);
                let down = &base.layers[1].down.weight;
                assert_eq!(down.shape(), (48, 80));
                assert_eq!(dense(down), values("model.layers.1.mlp.down_proj.weight", 48 * 80));
                let q = &base.layers[0].q;
                assert_eq!(q.weight.shape().0, base.config.heads * base.config.head_dim);
                assert_eq!(q.bias.is_some(), class.starts_with("Qwen2"));
                assert_eq!(base.layers[0].q_norm.is_some(), class.starts_with("Qwen3"));
                let elements: usize = model.tensors.iter().map(|t| t.2.iter().product::<usize>()).sum();
                assert_eq!(base.total_parameters(), elements as u64);
                // Quantised, it counts the same.
                let base = model.load(Nf4, true).unwrap();
                assert_eq!(base.total_parameters(), elements as u64);
                assert_eq!(dense(&base.embedding), values(EMBEDDING, 32 * 48));
            }
        }
    }
}

#[test]
fn the_second_load_maps_what_the_first_quantised() {
    for double_quant in [true, false] {
        let model = Model::llama();
        let mut seen = Vec::new();
        let first =
            Base::load(model.write().dir.path(), Nf4, double_quant, model.cache.path(), &mut |done, all| {
                seen.push((done, all))
            })
            .unwrap();
        assert_eq!(seen, [(0, 2), (1, 2), (2, 2)]);
        let CacheUse::Written(path) = &first.cache else { panic!("{:?}", first.cache) };
        let second = model.load(Nf4, double_quant).unwrap();
        assert_eq!(second.cache, CacheUse::Hit(path.clone()));
        assert!(matches!(codes(&second.layers[0].q.weight), Blob::Mapped(..)));
        assert!(everything(&first) == everything(&second));
        assert_eq!((first.hash.as_str(), first.double_quant), (second.hash.as_str(), double_quant));
        let name = weight_name(1, "mlp.up_proj");
        let direct = nf4::quantize(&values(&name, 80 * 48), 80, 48, double_quant).unwrap();
        assert_eq!(dense(&first.layers[1].up.weight), dense(&FrozenMatrix::Nf4(direct)));
    }
}

#[test]
fn shards_and_one_file_are_the_same_model() {
    let mut model = Model::llama();
    let whole = everything(&model.write().load(Nf4, true).unwrap());
    fs::remove_file(model.dir.path().join(SINGLE)).unwrap();
    model.shards = 3;
    assert!(everything(&model.write().load(Nf4, true).unwrap()) == whole);
}

#[test]
fn other_content_or_settings_have_another_cache() {
    let mut model = Model::llama();
    let first = model.write().load(Nf4, true).unwrap();
    let plain = model.load(Nf4, false).unwrap();
    assert_eq!(first.hash, plain.hash);
    assert!(matches!(plain.cache, CacheUse::Written(_)) && plain.cache != first.cache);
    let at = model.position(FINAL_NORM);
    model.tensors[at].3[0] ^= 1;
    let changed = model.write().load(Nf4, true).unwrap();
    assert_ne!(changed.hash, first.hash);
    assert!(matches!(changed.cache, CacheUse::Written(_)) && changed.cache != first.cache);
}

#[test]
fn harmless_extras_are_ignored() {
    let mut model = Model::new("LlamaForCausalLM", safetensors::Dtype::F32, true);
    let inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned();
    model.tensors.push((inv_freq, safetensors::Dtype::F32, vec![6], vec![0; 24]));
    model.tensors.push((LM_HEAD.into(), safetensors::Dtype::F32, vec![32, 48], vec![0; 32 * 48 * 4]));
    assert!(model.write().load(Nf4, true).unwrap().lm_head.is_none());
}

#[test]
fn all_misfits_are_in_one_error() {
    let mut model = Model::llama();
    let at = model.position("model.layers.0.mlp.up_proj.weight");
    model.tensors.remove(at);
    let at = model.position(LM_HEAD);
    model.tensors.remove(at);
    let at = model.position("model.layers.1.self_attn.k_proj.weight");
    model.tensors[at].2 = vec![48, 24];
    let at = model.position(FINAL_NORM);
    model.tensors[at] = (FINAL_NORM.into(), safetensors::Dtype::I16, vec![48], vec![0; 96]);
    let bias = "model.layers.0.self_attn.q_proj.bias";
    model.tensors.push((bias.into(), safetensors::Dtype::F32, vec![1], vec![0; 4]));
    let error = model.write().error();
    for line in [
        "5 of the tensors do not fit",
        "missing    model.layers.0.mlp.up_proj.weight",
        "missing    lm_head.weight",
        "shape      model.layers.1.self_attn.k_proj.weight is [48, 24] instead of [24, 48]",
        "type       model.norm.weight is I16",
        "unexpected model.layers.0.self_attn.q_proj.bias (in model.safetensors)",
    ] {
        assert!(error.contains(line), "{error}\nlacks: {line}");
    }
}

#[test]
fn an_index_that_lies_is_refused() {
    let mut model = Model::llama();
    model.shards = 2;
    let index = model.write().dir.path().join(INDEX);
    let good: Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
    let with = |name: &str, file: &str| {
        let mut bad = good.clone();
        bad["weight_map"][name] = file.into();
        fs::write(&index, bad.to_string()).unwrap();
        model.error()
    };
    assert!(with(FINAL_NORM, "../other.safetensors").contains("plain file name"));
    assert!(with(FINAL_NORM, "/etc/passwd").contains("plain file name"));
    assert!(with(FINAL_NORM, "absent.safetensors").contains("absent.safetensors"));
    assert!(
        with("ghost", "model-00001-of-00002.safetensors").contains("index      ghost is not in model-00001")
    );
    fs::write(&index, "{\"weight_map\": [1]}").unwrap();
    assert!(model.error().contains("model.safetensors.index.json"));
    fs::remove_file(&index).unwrap();
    assert!(model.error().contains("neither model.safetensors nor"));
    fs::write(model.dir.path().join("pytorch_model.bin"), "").unwrap();
    assert!(model.error().contains("convert"));
}

#[test]
fn a_truncated_file_is_named_at_every_length() {
    let model = Model::llama();
    let path = model.write().dir.path().join(SINGLE);
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let lengths = (0..header).step_by(61).chain([0, 7, 8, 9, header - 1, header, whole.len() - 1]);
    for length in lengths.chain((header..whole.len()).step_by(4099)) {
        fs::write(&path, &whole[..length]).unwrap();
        let error = model.error();
        assert!(error.contains(SINGLE) && error.contains("damaged"), "{length}: {error}");
    }
    let longer = [&whole[..], b"x"].concat();
    fs::write(&path, longer).unwrap();
    assert!(model.error().contains("damaged"));
}

#[test]
fn a_flipped_header_bit_never_panics() {
    let model = Model::llama();
    let path = model.write().dir.path().join(SINGLE);
    let whole = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let (mut refused, mut all) = (0, 0);
    for bit in (0..64).chain((64..header * 8).step_by(13)) {
        let mut bad = whole.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &bad).unwrap();
        all += 1;
        refused += usize::from(model.load(Unquantized, true).is_err());
    }
    // Blanks at the header's end and a change of F16 for BF16 go unnoticed; little else does.
    assert!(refused * 10 > all * 9, "only {refused} of {all} flips were noticed");
}

#[test]
fn a_header_that_lies_about_sizes_is_refused() {
    let model = Model::llama();
    let path = model.write().dir.path().join(SINGLE);
    let with_header = |json: &str| {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        fs::write(&path, bytes).unwrap();
        model.error()
    };
    let big = u64::MAX;
    for json in [
        "{}x".to_owned(),
        "{\"a\":1}".into(),
        "[".repeat(50_000),
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,4],\"data_offsets\":[0,0]}}".into(),
        format!("{{\"a\":{{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[{},{big}]}}}}", big - 4),
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}".into(),
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1000000],\"data_offsets\":[0,4000000]}}".into(),
    ] {
        let error = with_header(&json);
        assert!(error.contains("damaged"), "{error}");
    }
    fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
    assert!(model.error().contains("header of 18446744073709551615 bytes"));
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(model.error().contains("not a regular file"));
}

#[test]
fn non_finite_weights_are_refused_with_their_place() {
    for (name, index, word) in [
        ("model.layers.1.mlp.gate_proj.weight", 48 * 3 + 5, "[3, 5]"),
        (EMBEDDING, 48 * 31 + 47, "[31, 47]"),
        (LM_HEAD, 0, "[0, 0]"),
        (FINAL_NORM, 7, "[7]"),
    ] {
        for bits in [0x7f80u16, 0xff80, 0x7fc0] {
            let mut model = Model::llama();
            let at = model.position(name);
            model.tensors[at].3[index * 2..index * 2 + 2].copy_from_slice(&bits.to_le_bytes());
            model.write();
            // Twice: a failed load must not be remembered as a good one.
            for quantization in [Nf4, Nf4, Unquantized] {
                let error = model.load(quantization, true).unwrap_err().to_string();
                assert!(error.contains(name) && error.contains(word), "{error}");
            }
        }
    }
}

#[test]
fn bitsandbytes_checkpoints_are_read_as_they_are() {
    for double_quant in [true, false] {
        let mut model = Model::llama();
        let expected = everything(&model.write().load(Nf4, double_quant).unwrap());
        model.quantize(double_quant);
        let base = model.write().load(Nf4, !double_quant).unwrap();
        assert_eq!(base.cache, CacheUse::NotNeeded);
        assert_eq!(base.double_quant, double_quant);
        assert!(matches!(codes(&base.layers[0].q.weight), Blob::Mapped(..)));
        assert!(everything(&base) == expected);
        let error = model.load(Unquantized, true).unwrap_err().to_string();
        assert!(error.contains("already quantised"), "{error}");
    }
}

#[test]
fn a_linear_left_dense_in_a_4_bit_checkpoint_stays_dense() {
    let mut model = Model::llama();
    let name = weight_name(0, "mlp.down_proj");
    let dense_part = model.tensors[model.position(&name)].clone();
    model.quantize(true);
    model.tensors.retain(|t| !t.0.starts_with(&name));
    model.tensors.push(dense_part);
    let base = model.write().load(Nf4, true).unwrap();
    assert!(matches!(base.layers[0].down.weight, FrozenMatrix::Dense(_)));
    assert_eq!(dense(&base.layers[0].down.weight), values(&name, 48 * 80));
}

#[test]
fn wrong_4_bit_parts_are_named() {
    let name = weight_name(1, "self_attn.o_proj");
    let broken = |change: &dyn Fn(&mut Model)| {
        let mut model = Model::llama();
        model.quantize(true);
        change(&mut model);
        let error = model.write().error();
        assert!(error.contains(&name), "{error}");
        error
    };
    let state = format!("{name}{}", bitsandbytes::STATE);
    let with_state = |key: &str, value: Value| {
        broken(&|model| {
            let at = model.position(&state);
            let mut json: Value = serde_json::from_slice(&model.tensors[at].3).unwrap();
            json[key] = value.clone();
            let mut bytes = json.to_string().into_bytes();
            bytes.resize(256, b' ');
            model.tensors[at].3 = bytes;
        })
    };
    assert!(with_state("quant_type", "fp4".into()).contains("fp4"));
    assert!(with_state("shape", json!([48, 49])).contains("[48, 49] instead of [48, 48]"));
    assert!(with_state("blocksize", json!(0)).contains("block"));
    assert!(with_state("blocksize", json!(63)).contains("block"));
    assert!(with_state("blocksize", json!(128)).contains("codes of absmax"));
    assert!(with_state("nested_blocksize", json!(0)).contains("nested block"));
    assert!(with_state("nested_offset", json!(1e300)).contains("nested_offset"));
    assert!(with_state("nested_offset", Value::Null).contains("without double quantisation"));
    for suffix in bitsandbytes::SUFFIXES {
        let part = format!("{name}{suffix}");
        let error = broken(&|model| model.tensors.retain(|t| t.0 != part));
        let told = suffix == bitsandbytes::STATE || error.contains(&format!("`{part}` is missing"));
        assert!(told, "{error}");
    }
    let error = broken(&|model| {
        let at = model.position(&format!("{name}.quant_map"));
        model.tensors[at].3[0] ^= 1;
    });
    assert!(error.contains("not the table of NF4"));
    let error = broken(&|model| {
        let at = model.position(&state);
        model.tensors[at].0 = format!("{name}{}", bitsandbytes::FP4_STATE);
    });
    assert!(error.contains("`fp4` is not supported"));
}

#[test]
fn a_damaged_cache_is_made_anew() {
    let model = Model::llama();
    let first = model.write().load(Nf4, true).unwrap();
    let CacheUse::Written(path) = &first.cache else { panic!() };
    let good = fs::read(path).unwrap();
    let damage: [fn(&mut Vec<u8>); 5] = [
        |b| b.truncate(b.len() - 1),
        |b| b.clear(),
        |b| *b.last_mut().unwrap() ^= 0x40, // a code: only the checksum knows
        |b| b[100] ^= 1,
        |b| b.extend_from_slice(b"tail"),
    ];
    for change in damage {
        let mut bad = good.clone();
        change(&mut bad);
        fs::remove_file(path).unwrap(); // `first` has the old file mapped
        fs::write(path, bad).unwrap();
        let again = model.load(Nf4, true).unwrap();
        assert_eq!(again.cache, CacheUse::Written(path.clone()));
        assert!(everything(&again) == everything(&first));
        assert_eq!(fs::read(path).unwrap(), good, "the cache file is a function of the base");
    }
    assert_eq!(model.load(Nf4, true).unwrap().cache, CacheUse::Hit(path.clone()));
    // Without its memory the checksum is computed again and fits.
    fs::remove_file(model.cache.path().join("digests.json")).unwrap();
    assert_eq!(model.load(Nf4, true).unwrap().cache, CacheUse::Hit(path.clone()));
}

#[test]
fn without_a_cache_directory_the_base_is_held_in_memory() {
    let model = Model::llama();
    let expected = everything(&model.write().load(Nf4, true).unwrap());
    // A path through a regular file cannot be created by anybody, not even by root.
    let nowhere = model.dir.path().join("config.json").join("cache");
    let base = Base::load(model.dir.path(), Nf4, true, &nowhere, &mut |_, _| {}).unwrap();
    assert!(
        matches!(&base.cache, CacheUse::Unusable(reason) if reason.contains("cache")),
        "{:?}",
        base.cache
    );
    assert!(matches!(codes(&base.layers[0].q.weight), Blob::Owned(_)));
    assert!(everything(&base) == expected);
}

#[test]
fn concurrent_first_starts_agree() {
    let model = Model::llama();
    model.write();
    let (dir, cache) = (model.dir.path(), model.cache.path());
    let all: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6)
            .map(|_| scope.spawn(|| everything(&Base::load(dir, Nf4, true, cache, &mut |_, _| {}).unwrap())))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(all.iter().all(|a| *a == all[0]));
    let mut names: Vec<_> = fs::read_dir(cache).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names.len(), 2, "{names:?}"); // the base and digests.json
    assert!(matches!(model.load(Nf4, true).unwrap().cache, CacheUse::Hit(_)));
}

#[test]
fn incomplete_cache_files_of_dead_writers_are_removed() {
    let model = Model::llama();
    let old = |name: &str| {
        let path = model.cache.path().join(name);
        let file = fs::File::create(&path).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        (path, file)
    };
    let (dead, _) = old(".base.1-0.tmp");
    let (living, file) = old(".base.2-0.tmp");
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let (foreign, _) = old("base.txt");
    model.write().load(Nf4, true).unwrap();
    assert!(!dead.exists());
    assert!(living.exists() && foreign.exists());
}

#[test]
fn a_real_model_loads_where_it_is_at_hand() {
    let data = std::env::var("FINETUNED_TEST_DATA").unwrap_or_else(|_| "../shared/data".into());
    let dir = Path::new(&data).join("models/stories260K");
    if !dir.exists() {
        eprintln!("skipped: {} is not there", dir.display());
        return;
    }
    let cache = tempfile::tempdir().unwrap();
    let base = Base::load(&dir, Nf4, true, cache.path(), &mut |_, _| {}).unwrap();
    assert_eq!(base.total_parameters(), 260_032);
    assert!(base.lm_head.is_none());
    let dense_base = Base::load(&dir, Unquantized, true, cache.path(), &mut |_, _| {}).unwrap();
    // Normal weights lose about a tenth of their size to 4 bits.
    for (a, b) in base.layers.iter().zip(&dense_base.layers) {
        for (a, b) in a.linears().iter().zip(b.linears()) {
            let (a, b) = (dense(&a.weight), dense(&b.weight));
            let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|x| x * x).sum::<f32>().sqrt();
            let error = norm(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied());
            assert!((0.05..0.15).contains(&error), "relative error {error}");
        }
    }
}
