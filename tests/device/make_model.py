#!/usr/bin/env python3
"""Writes a model of random weights, a data set and a spec, for a machine that has neither a model nor a network.

    make_model.py SHAPE DIRECTORY [--without-model]

SHAPE is `smollm2`, the shapes of SmolLM2-135M (269 MB), or `tiny`, which the stand-in for a GPU can train. DIRECTORY gets
`model/`, `train.jsonl` and `spec.toml`. Python 3.9 and nothing else; the same bytes every time.

Weights are bf16 whose exponents are drawn so that a row's output has about the size of its input: the loss begins near
the logarithm of the vocabulary and falls. The tokenizer has a token a byte and three control tokens; the rest of the
vocabulary is never met, which costs the arithmetic nothing.
"""

import json
import sys
from pathlib import Path
from random import Random

SHAPES = {
    # hidden, intermediate, layers, heads, key-value heads, vocabulary; sequence length, sequences a step, steps
    "smollm2": (576, 1536, 30, 9, 3, 49152, 512, 8, 16),
    "tiny": (64, 160, 2, 2, 1, 288, 96, 4, 6),
}

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The high byte of a bf16 is its sign and seven bits of its exponent; with 0x3b to 0x3d before any low byte it is between
# 2⁻⁹ and 2⁻³ (root mean square about 0.03).
HIGH = bytes([0x3B, 0x3C, 0x3C, 0x3D, 0xBB, 0xBC, 0xBC, 0xBD] * 32)


def tensors(hidden, intermediate, layers, heads, kv_heads, vocabulary):
    """Name and shape of every tensor; norms have one dimension."""
    head = hidden // heads
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", (hidden, hidden)
        yield prefix + "self_attn.k_proj.weight", (kv_heads * head, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv_heads * head, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
        yield prefix + "mlp.gate_proj.weight", (intermediate, hidden)
        yield prefix + "mlp.up_proj.weight", (intermediate, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, intermediate)
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)


def values(random, shape):
    """bf16, little-endian: ones for a norm, random for a matrix."""
    count = 1
    for size in shape:
        count *= size
    if len(shape) == 1:
        return b"\x80\x3f" * count
    both = bytearray(2 * count)
    both[0::2] = random.getrandbits(8 * count).to_bytes(count, "little")
    both[1::2] = random.getrandbits(8 * count).to_bytes(count, "little").translate(HIGH)
    return bytes(both)


def write_weights(path, shapes):
    """A safetensors file."""
    header, offset = {}, 0
    for name, shape in shapes:
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    random = Random(7)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in shapes:
            file.write(values(random, shape))


def tokenizer():
    """A token a byte, written as GPT-2 writes bytes, and three control tokens."""
    vocabulary, beyond = {}, 0x100
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
            letter = chr(byte)
        else:
            letter = chr(beyond)
            beyond += 1
        vocabulary[letter] = byte
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = [
        {
            "id": 256 + i,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, content in enumerate(control)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": model,
    }


def config(hidden, intermediate, layers, heads, kv_heads, vocabulary):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def conversations(rows):
    random = Random(11)
    for _ in range(rows):
        a, b = random.randrange(1000), random.randrange(1000)
        polite = "please " * random.randrange(4)
        steps = "first the ones, then the tens, then the hundreds; " * random.randrange(4)
        yield {
            "messages": [
                {"role": "user", "content": f"{polite}add {a} and {b}"},
                {"role": "assistant", "content": f"{steps}{a} and {b} are {a + b}."},
            ]
        }


SPEC = """\
[run]
name = "device"
seed = 7

[model]
base = "model"

[data]
train = "train.jsonl"
eval_fraction = 0.05
sequence_length = {length}

[lora]
r = 16
alpha = 32
dropout = 0.05

[train]
backend = "cuda"
max_steps = {steps}
micro_batch_size = {micro_batch}
gradient_accumulation_steps = 2
learning_rate = 1e-3
evaluate_every = {half}
checkpoint_every = {quarter}
"""


def write_model(model, shape):
    model.mkdir(parents=True, exist_ok=True)
    write_weights(model / "model.safetensors", list(tensors(*shape)))
    (model / "config.json").write_text(json.dumps(config(*shape), indent=1))
    (model / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (model / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": TEMPLATE})
    )


def main():
    arguments = [argument for argument in sys.argv[1:] if argument != "--without-model"]
    if len(arguments) != 2 or arguments[0] not in SHAPES:
        sys.exit(__doc__)
    *shape, length, sequences, steps = SHAPES[arguments[0]]
    directory = Path(arguments[1])
    directory.mkdir(parents=True, exist_ok=True)
    if len(arguments) == len(sys.argv) - 1:
        write_model(directory / "model", shape)
    with open(directory / "train.jsonl", "w") as file:
        # About 150 tokens a row; rows are packed.
        for row in conversations(sequences * steps * length // 150):
            file.write(json.dumps(row) + "\n")
    (directory / "spec.toml").write_text(
        SPEC.format(length=length, steps=steps, micro_batch=sequences // 2, half=steps // 2, quarter=steps // 4)
    )


if __name__ == "__main__":
    main()
