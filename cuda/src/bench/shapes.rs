//! The models whose shapes are measured. Their weights are random.

/// Sizes of a decoder, as its `config.json` has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Model {
    /// Name.
    pub name: &'static str,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward part.
    pub intermediate: usize,
    /// Blocks.
    pub layers: usize,
    /// Heads of the queries.
    pub heads: usize,
    /// Heads of the keys and values.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Tokens.
    pub vocabulary: usize,
    /// Whether the output projection is the embedding.
    pub tied: bool,
}

const fn model(name: &'static str, sizes: [usize; 7], tied: bool) -> Model {
    let [hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary] = sizes;
    Model { name, hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary, tied }
}

/// All of them, the smallest first.
pub const MODELS: &[Model] = &[
    model("SmolLM2-135M", [576, 1536, 30, 9, 3, 64, 49_152], true),
    model("Qwen2.5-0.5B", [896, 4864, 24, 14, 2, 64, 151_936], true),
    model("Llama-3.2-1B", [2048, 8192, 16, 32, 8, 64, 128_256], true),
    model("Llama-3.2-3B", [3072, 8192, 28, 24, 8, 128, 128_256], true),
    model("Llama-3-8B", [4096, 14_336, 32, 32, 8, 128, 128_256], false),
];

/// Layers that share their input, with what they make of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Which.
    pub name: &'static str,
    /// Columns of the input.
    pub inputs: usize,
    /// Columns of each output.
    pub outputs: Vec<usize>,
}

impl Group {
    /// Weights of all of them.
    pub fn weights(&self) -> usize {
        self.outputs.iter().map(|outputs| outputs * self.inputs).sum()
    }
}

impl Model {
    /// The model of that name, whatever its capitals.
    pub fn named(name: &str) -> Option<Model> {
        MODELS.iter().find(|model| model.name.eq_ignore_ascii_case(name)).copied()
    }

    /// The linear layers of a block.
    pub fn groups(&self) -> [Group; 4] {
        let (h, f) = (self.hidden, self.intermediate);
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let group = |name, inputs, outputs: &[usize]| Group { name, inputs, outputs: outputs.to_vec() };
        [
            group("q,k,v", h, &[q, kv, kv]),
            group("o", q, &[h]),
            group("gate,up", h, &[f, f]),
            group("down", f, &[h]),
        ]
    }

    /// Parameters of an adapter of rank `r` on all linear layers.
    pub fn adapter(&self, r: usize) -> usize {
        let sides = |group: &Group| group.outputs.iter().map(|outputs| outputs + group.inputs).sum::<usize>();
        self.layers * r * self.groups().iter().map(sides).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers that these models are published with.
    #[test]
    fn models_have_their_weights() {
        let weights = |name: &str| {
            let model = Model::named(name).unwrap();
            model.layers * model.groups().iter().map(Group::weights).sum::<usize>()
        };
        assert_eq!(weights("llama-3.2-1b"), 973_078_528);
        assert_eq!(weights("Llama-3-8B"), 6_979_321_856);
        assert_eq!(weights("SmolLM2-135M"), 106_168_320);
        // Unsloth prints 11,272,192 trainable parameters for it.
        assert_eq!(Model::named("Llama-3.2-1B").unwrap().adapter(16), 11_272_192);
        assert_eq!(Model::named("Llama"), None);
    }
}
