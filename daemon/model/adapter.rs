//! The adapter: which layers have a LoRA, its parameters, and their names in PEFT files.

use super::config::ModelConfig;
use crate::backend::philox::Philox;
use crate::backend::{Backend, Dropout, Lora, Role};

/// One of the seven linear layers of a block, in the order of the forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Module {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention output.
    O,
    /// SwiGLU gate.
    Gate,
    /// SwiGLU input.
    Up,
    /// SwiGLU output.
    Down,
}

impl Module {
    /// All seven, in order.
    pub const ALL: [Module; 7] =
        [Module::Q, Module::K, Module::V, Module::O, Module::Gate, Module::Up, Module::Down];

    /// The name in Hugging Face checkpoints.
    pub fn name(self) -> &'static str {
        match self {
            Module::Q => "q_proj",
            Module::K => "k_proj",
            Module::V => "v_proj",
            Module::O => "o_proj",
            Module::Gate => "gate_proj",
            Module::Up => "up_proj",
            Module::Down => "down_proj",
        }
    }

    /// The part of the block it belongs to.
    pub fn parent(self) -> &'static str {
        if self < Module::Gate { "self_attn" } else { "mlp" }
    }

    /// `(outputs, inputs)` in a model.
    pub fn shape(self, config: &ModelConfig) -> (usize, usize) {
        let (h, f) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        match self {
            Module::Q => (q, h),
            Module::K | Module::V => (kv, h),
            Module::O => (h, q),
            Module::Gate | Module::Up => (f, h),
            Module::Down => (h, f),
        }
    }
}

/// One adapted linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// Block.
    pub layer: usize,
    /// Layer of the block.
    pub module: Module,
    /// Columns of A.
    pub inputs: usize,
    /// Rows of B.
    pub outputs: usize,
}

/// Where the adapter sits and how it is scaled. Tensor `2·s` of an adapter is A of site `s`, `2·s + 1` its B.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterLayout {
    /// r
    pub rank: usize,
    /// alpha/r or alpha/√r
    pub scale: f64,
    /// Dropout on the input of A; 0 is none.
    pub dropout: f64,
    /// Sites, by block and then in the order of the forward pass.
    pub sites: Vec<Site>,
    index: Vec<[Option<usize>; 7]>,
}

impl AdapterLayout {
    /// The sites of `modules` in blocks `layers` (`None`: all).
    pub fn new(
        config: &ModelConfig,
        rank: usize,
        scale: f64,
        dropout: f64,
        modules: &[Module],
        layers: Option<(usize, usize)>,
    ) -> Self {
        let (first, last) = layers.unwrap_or((0, config.layers));
        let mut sites = Vec::new();
        let mut index = vec![[None; 7]; config.layers];
        for layer in first..last.min(config.layers) {
            for module in Module::ALL {
                if modules.contains(&module) {
                    let (outputs, inputs) = module.shape(config);
                    index[layer][module as usize] = Some(sites.len());
                    sites.push(Site { layer, module, inputs, outputs });
                }
            }
        }
        Self { rank, scale, dropout, sites, index }
    }

    /// The site of a linear layer, if it has one.
    pub fn site(&self, layer: usize, module: Module) -> Option<usize> {
        self.index[layer][module as usize]
    }

    /// The lowest adapted block: the backward pass goes no further.
    pub fn lowest_layer(&self) -> Option<usize> {
        self.sites.first().map(|s| s.layer)
    }

    /// Shape of tensor `i`: A is `[r, in]`, B is `[out, r]`.
    pub fn shape(&self, i: usize) -> [usize; 2] {
        let site = &self.sites[i / 2];
        if i.is_multiple_of(2) { [self.rank, site.inputs] } else { [site.outputs, self.rank] }
    }

    /// Number of tensors.
    pub fn tensors(&self) -> usize {
        2 * self.sites.len()
    }

    /// Number of trainable parameters.
    pub fn parameters(&self) -> u64 {
        (0..self.tensors()).map(|i| self.shape(i).iter().product::<usize>() as u64).sum()
    }

    /// Name of tensor `i` in a PEFT checkpoint.
    pub fn name(&self, i: usize) -> String {
        let Site { layer, module, .. } = self.sites[i / 2];
        let side = if i.is_multiple_of(2) { "A" } else { "B" };
        format!(
            "base_model.model.model.layers.{layer}.{}.{}.lora_{side}.weight",
            module.parent(),
            module.name()
        )
    }

    /// Initial values of tensor `i`: A uniform in ±1/√in (Kaiming with a = √5, as PEFT has it), B zero. A function of
    /// (seed, name), so that adding a module does not change the others.
    pub fn initial(&self, seed: u64, i: usize) -> Vec<f32> {
        let [rows, cols] = self.shape(i);
        if i % 2 == 1 {
            return vec![0.0; rows * cols];
        }
        let site = self.sites[i / 2];
        let bound = 1.0 / (site.inputs as f32).sqrt();
        let mut random = Philox::new(seed, module_stream(site.layer, site.module));
        (0..rows * cols).map(|_| (2.0 * random.next_f32() - 1.0) * bound).collect()
    }

    /// The LoRA of a linear layer as the backend takes it.
    pub fn lora<'a, B: Backend>(
        &self,
        adapter: &'a Adapter<B>,
        layer: usize,
        module: Module,
        training: bool,
    ) -> Option<Lora<'a, B>> {
        let site = self.site(layer, module)?;
        let dropout = (training && self.dropout > 0.0)
            .then(|| Dropout { probability: self.dropout, module: module_stream(layer, module) as u32 });
        Some(Lora {
            a: &adapter.tensors[2 * site],
            b: &adapter.tensors[2 * site + 1],
            rank: self.rank,
            scale: self.scale,
            dropout,
        })
    }
}

/// Random stream of a linear layer.
fn module_stream(layer: usize, module: Module) -> u64 {
    (layer * 7 + module as usize) as u64 + 1
}

/// One value per adapter parameter: the weights, a gradient, or a moment.
pub struct Adapter<B: Backend> {
    /// A and B of every site, in the order of the layout.
    pub tensors: Vec<B::Tensor>,
}

impl<B: Backend> Adapter<B> {
    /// All zeros.
    pub fn zeros(backend: &B, layout: &AdapterLayout, role: Role) -> Self {
        let lens: Vec<usize> = (0..layout.tensors()).map(|i| layout.shape(i).iter().product()).collect();
        Self { tensors: backend.parameters(&lens, role) }
    }

    /// Fresh weights.
    pub fn initial(backend: &B, layout: &AdapterLayout, seed: u64) -> Self {
        let mut adapter = Self::zeros(backend, layout, Role::Weights);
        for (i, tensor) in adapter.tensors.iter_mut().enumerate() {
            backend.write(tensor, &layout.initial(seed, i));
        }
        adapter
    }

    /// The values of tensor `i`.
    pub fn read(&self, backend: &B, layout: &AdapterLayout, i: usize) -> Vec<f32> {
        backend.read(&self.tensors[i], layout.shape(i).iter().product())
    }
}
