"""Golden rotary frequencies, from transformers.

    pip install torch==2.15.0 transformers==5.24.0
    python make_rope.py           # writes rope.json beside itself

Each case is a config as it stands in a model directory, and the inverse frequencies (bits of float32) and the attention
factor that transformers makes of it.
"""

import json
import pathlib

import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

BASE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 131072,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CASES = [
    {"rope_theta": 10000.0},
    {"rope_theta": 100000},
    {"head_dim": 64, "rope_theta": 1000000.0, "rope_scaling": {"type": "linear", "factor": 2.5}},
    {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    {"head_dim": 64, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", **LLAMA3, "factor": 32.0}},
    {"rope_theta": 1000000.0, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    {
        "head_dim": 80,
        "rope_parameters": {
            "rope_theta": 150000.0,
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    {
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
    },
]

golden = []
for case in CASES:
    config = {**BASE, **case}
    loaded = AutoConfig.for_model(**json.loads(json.dumps(config)))
    rotary = LlamaRotaryEmbedding(loaded)
    golden.append(
        {
            "config": config,
            "inverse_frequencies": rotary.inv_freq.view(torch.int32).tolist(),
            "attention_factor": rotary.attention_scaling,
        }
    )
path = pathlib.Path(__file__).parent / "rope.json"
path.write_text("[\n" + ",\n".join(json.dumps(case) for case in golden) + "\n]\n")
print(f"{path.name}: {path.stat().st_size} bytes")
