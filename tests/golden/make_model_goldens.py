#!/usr/bin/env python3
"""Golden values of the model, the loss, the LoRA gradients and ten training steps, for every supported family.

    make_model_goldens.py [--out DIR] [FAMILY ...]

Each family is a tiny random model, small enough to be committed, whose shape makes the family's own features bite
(grouped queries, rope scaling, a window shorter than the sequence, biases, q/k norm). transformers computes the model,
PEFT the adapter, bitsandbytes the 4-bit base and torch the optimizer; nothing of finetuned is used. README.md says what
every file holds.

How exact the values are. Everything runs in float32 on one thread without padding: a row is one forward pass of batch 1.
For some families the same is computed in float64 as well, so that a test can tell its own error from float32's.
"""
import argparse
import json
import math
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, get_linear_schedule_with_warmup

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORE = -100

STEPS, WARMUP, MAX_GRAD_NORM = 10, 3, 0.5
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
# Rows of the ten steps, as indices into the curve's sequences; two or three a step, so that the normaliser changes.
CURVE_ROWS = [[0, 1], [2, 3, 4], [5, 0], [1, 2, 3], [4, 5], [3, 0, 5], [2, 4], [1, 5, 0], [3, 4], [2, 1, 5]]


@dataclass
class Family:
    """One tiny model and its adapter."""

    name: str
    seed: int
    config: dict  # of transformers' AutoConfig.for_model
    dtype: torch.dtype  # in which the weights are stored; computing is in float32
    lora: dict = field(default_factory=dict)
    double_quant: bool = True  # of the nf4 variant
    checkpoint_4bit: bool = False  # store the nf4 base as a bitsandbytes checkpoint as well
    float64: bool = False  # compute the none variant in float64 as well


FAMILIES = [
    Family(
        "llama", 11,
        dict(model_type="llama", vocab_size=160, hidden_size=64, intermediate_size=172, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=True,
             max_position_embeddings=256, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        torch.float32, dict(r=4), checkpoint_4bit=True, float64=True,
    ),
    # original_max_position_embeddings 32 puts the wavelengths of a head of 32 into all three of llama3's ranges:
    # 6.3 is kept, 11 and 20 are blended, 35 and more are stretched by the whole factor.
    Family(
        "llama3", 12,
        dict(model_type="llama", vocab_size=176, hidden_size=64, intermediate_size=132, num_hidden_layers=3,
             num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-5, tie_word_embeddings=False,
             max_position_embeddings=256,
             rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
        torch.bfloat16,
        dict(r=4, target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=[1, 2]),
    ),
    Family(
        "mistral", 13,
        dict(model_type="mistral", vocab_size=192, hidden_size=64, intermediate_size=148, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=False,
             max_position_embeddings=256, sliding_window=8,
             rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        torch.float16, dict(r=6, use_rslora=True),
    ),
    # 72 * 90 is not a multiple of 64: the last NF4 block of the MLP's matrices is short.
    Family(
        "qwen2", 14,
        dict(model_type="qwen2", vocab_size=288, hidden_size=72, intermediate_size=90, num_hidden_layers=2,
             num_attention_heads=3, num_key_value_heads=1, rms_norm_eps=1e-6, tie_word_embeddings=True,
             max_position_embeddings=256, use_sliding_window=False,
             rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
        torch.bfloat16, dict(r=5), double_quant=False, checkpoint_4bit=True,
    ),
    Family(
        "qwen3", 15,
        dict(model_type="qwen3", vocab_size=160, hidden_size=64, intermediate_size=172, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6, tie_word_embeddings=False,
             max_position_embeddings=256, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
        torch.bfloat16, dict(r=6), float64=True,
    ),
]


# --- The models ------------------------------------------------------------------------------------------------------


def make_model(family: Family, folder: Path) -> None:
    """Writes config.json, config-v4.json and model.safetensors. Weights are drawn so that logits are of order 1 to 5."""
    generator = torch.Generator().manual_seed(family.seed)
    config = AutoConfig.for_model(**family.config)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.3 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                weight.copy_(0.25 * noise)
            else:
                weight.copy_(noise / math.sqrt(weight.shape[1]))
    save_model(model.to(family.dtype), folder)
    write_json(folder / "config-v4.json", config_v4(json.loads((folder / "config.json").read_text())))


def save_model(model: torch.nn.Module, folder: Path) -> None:
    """config.json and model.safetensors as transformers writes them."""
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def config_v4(config: dict) -> dict:
    """The same config as transformers 4 spelled it, which is how most published models have it."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    for key in ("layer_types", "transformers_version"):
        config.pop(key, None)
    return config


def load_model(folder: Path) -> torch.nn.Module:
    """The model in float32. Eager attention: the one that spells the sliding window out as a mask."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def base_linears(model: torch.nn.Module) -> list[tuple[str, torch.nn.Linear]]:
    """The seven linears of every layer; lm_head and the embedding stay as they are."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.split(".")[-1] in ALL_LINEAR]


def dequantise(codes: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """NF4's definition, as the CUDA kernels compute it: `map[code] * absmax[element / 64]`, elements in row-major order.

    Not `dequantize_4bit`: on a CPU with AVX-512, bitsandbytes 0.50.2 starts a new block at every row, and so answers
    wrongly, where the number of columns is a multiple of 16 but not of the block. The families have no such width, so
    that `check_linear4bit` can hold bitsandbytes itself against this.
    """
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    elements = math.prod(state.shape)
    pairs = codes.flatten()
    indices = torch.stack([pairs >> 4, pairs & 15], 1).flatten()[:elements].long()
    return (state.code[indices] * absmax.repeat_interleave(state.blocksize)[:elements]).reshape(state.shape)


def quantise(model: torch.nn.Module, double_quant: bool) -> None:
    """Replaces every base linear's weight by the float32 values of its NF4 form (block 64, nested block 256)."""
    with torch.no_grad():
        for _, linear in base_linears(model):
            codes, state = bnb.quantize_4bit(
                linear.weight.data, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
            linear.weight.copy_(dequantise(codes, state))


def load_4bit(source: Path, double_quant: bool) -> torch.nn.Module:
    """The base in transformers' own 4-bit form: every base linear a bitsandbytes Linear4bit."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head"], bnb_4bit_use_double_quant=double_quant)
    return AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=config, device_map="cpu", attn_implementation="eager")


def check_linear4bit(model: PeftModel, family: Family, root: Path, rows: list[dict]) -> None:
    """Says how far transformers + bitsandbytes' own 4-bit path is from the dequantised one, and fails beyond 1e-5.

    In training mode: outside of it Linear4bit rounds to bfloat16 on a CPU with AVX512-BF16.
    """
    theirs = add_adapter(load_4bit(root / "model", family.double_quant), family, root / "adapter").train()
    layers = 7 * family.config["num_hidden_layers"]
    assert sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in theirs.modules()) >= layers
    assert theirs.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    a, b = (torch.cat(loss_of(m, rows)[1]) for m in (theirs, model.train()))
    error = ((a - b).norm() / b.norm()).item()
    print(f"{family.name} nf4: Linear4bit's logits against the dequantised base's, relative: {error:.1e}")
    assert error < 1e-5


def add_adapter(model: torch.nn.Module, family: Family, folder: Path) -> PeftModel:
    """Wraps the model with the family's adapter; draws and saves it the first time, loads it afterwards."""
    if folder.exists():
        return PeftModel.from_pretrained(model, folder, is_trainable=True)
    options = {"target_modules": ALL_LINEAR, **family.lora}
    model = get_peft_model(model, LoraConfig(lora_alpha=16, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(family.seed + 1000)
    with torch.no_grad():
        for name, weight in sorted(lora_parameters(model).items()):
            noise = torch.rand(weight.shape, generator=generator) * 2 - 1
            # A as PEFT draws it (Kaiming uniform with a = sqrt 5 is uniform in 1/sqrt(in)); B is not zero, as it is at
            # the start of a real run, because A's gradient would then be zero.
            weight.copy_(noise / math.sqrt(weight.shape[1]) if "lora_A" in name else noise * 0.1)
    model.peft_config["default"].base_model_name_or_path = "model"
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = options["target_modules"]  # PEFT writes a set, in an order of chance
    write_json(folder / "adapter_config.json", config)
    return model


def lora_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters under the names that adapter_model.safetensors gives them."""
    return {n.replace(".default.weight", ".weight"): p for n, p in model.named_parameters() if p.requires_grad}


# --- float64 ---------------------------------------------------------------------------------------------------------


class Float64Torch:
    """`torch` for a modeling module whose explicit casts to float32 (norms, softmax) shall stay in float64."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def to_float64(model: PeftModel) -> PeftModel:
    """The same model in float64 throughout: weights, norms, softmax and rotary angles. Default rope only."""
    inner = model.get_base_model()
    module = __import__(type(inner).__module__, fromlist=["torch"])
    model.double()
    config = inner.config
    assert config.rope_parameters["rope_type"] == "default"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    inv_freq = config.rope_parameters["rope_theta"] ** -exponents

    def rotary(x, position_ids, *_, **__):
        angles = position_ids[..., None].double() * inv_freq
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    inner.model.rotary_emb.forward = rotary
    module.torch = Float64Torch()
    return model


def to_float32_modules() -> None:
    """Undoes what `to_float64` did to the modeling modules."""
    for name in ("llama", "mistral", "qwen2", "qwen3"):
        module = getattr(getattr(transformers.models, name), f"modeling_{name}")
        module.torch = torch


# --- Rows ------------------------------------------------------------------------------------------------------------


def make_row(generator: torch.Generator, length: int, vocab: int) -> dict:
    """A random row; labelled are two spans, as two assistant turns would be, the second up to the end."""
    tokens = torch.randint(3, vocab, (length,), generator=generator).tolist()
    a, b, c = length // 4, length // 2, length - length // 4
    labels = [t if a <= i < b or i >= c else IGNORE for i, t in enumerate(tokens)]
    return {"tokens": tokens, "labels": labels, "targets": labels[1:] + [IGNORE]}


def labelled(row: dict) -> int:
    return sum(t != IGNORE for t in row["targets"])


def forward(model: torch.nn.Module, row: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, V] and the loss summed over the labelled positions."""
    logits = model(input_ids=torch.tensor([row["tokens"]]), use_cache=False).logits[0]
    return logits, F.cross_entropy(logits, torch.tensor(row["targets"]), ignore_index=IGNORE, reduction="sum")


def loss_of(model: torch.nn.Module, rows: list[dict]) -> tuple[torch.Tensor, list[torch.Tensor], list[float]]:
    """The loss over all labelled tokens of the rows, with every row's logits and loss sum."""
    results = [forward(model, row) for row in rows]
    total = sum(loss for _, loss in results) / sum(labelled(row) for row in rows)
    return total, [logits.detach() for logits, _ in results], [loss.item() for _, loss in results]


def norm(tensors) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


# --- The values ------------------------------------------------------------------------------------------------------


def values(model: PeftModel, rows: list[dict], sequences: list[dict]) -> tuple[dict, dict]:
    """Runs the rows and the curve; returns what goes into golden.json and into golden.safetensors."""
    model.train()
    parameters = lora_parameters(model)
    loss, logits, sums = loss_of(model, rows)
    loss.backward()
    tensors = {f"logits.{i}": l for i, l in enumerate(logits)}
    tensors |= {f"grad.{n}": p.grad.clone() for n, p in parameters.items()}
    record = {"loss_sum": sums, "loss": loss.item(), "grad_norm": norm(p.grad for p in parameters.values())}

    optimizer = torch.optim.AdamW(parameters.values(), **ADAMW)
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=WARMUP, num_training_steps=STEPS)
    steps = []
    for indices in CURVE_ROWS:
        optimizer.zero_grad()
        batch = [sequences[i] for i in indices]
        loss, _, _ = loss_of(model, batch)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_GRAD_NORM).item()
        steps.append({"rows": indices, "labelled": sum(map(labelled, batch)), "loss": loss.item(),
                      "grad_norm": grad_norm, "learning_rate": scheduler.get_last_lr()[0]})
        optimizer.step()
        scheduler.step()
    assert sum(s["grad_norm"] > MAX_GRAD_NORM for s in steps) >= 5, "the clipping does not bite"
    tensors |= {f"final.{n}": p.detach().clone() for n, p in parameters.items()}
    return record | {"steps": steps}, tensors


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def write_golden(path: Path, record: dict) -> None:
    """JSON with one line per key, so that a diff is readable and rows of numbers stay on one line."""
    lines = []
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            items = ",\n  ".join(json.dumps(item) for item in value)
            lines.append(f' "{key}": [\n  {items}\n ]')
        else:
            lines.append(f' "{key}": {json.dumps(value)}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def make_family(family: Family, out: Path) -> None:
    root = out / family.name
    shutil.rmtree(root, ignore_errors=True)
    make_model(family, root / "model")
    if family.checkpoint_4bit:
        save_model(load_4bit(root / "model", family.double_quant), root / "model-4bit")

    generator = torch.Generator().manual_seed(family.seed + 2000)
    vocab = family.config["vocab_size"]
    rows = [make_row(generator, n, vocab) for n in (23, 37)]
    sequences = [make_row(generator, n, vocab) for n in (19, 33, 12, 40, 27, 8)]

    for variant in ("none", "nf4"):
        torch.manual_seed(0)
        model = load_model(root / "model")
        if variant == "nf4":
            quantise(model, family.double_quant)
        model = add_adapter(model, family, root / "adapter")
        if variant == "nf4":
            check_linear4bit(model, family, root, rows)
        trainable, total = model.get_nb_trainable_parameters()
        lora = model.peft_config["default"]
        record = {
            "family": family.name,
            "variant": variant,
            "versions": {"torch": torch.__version__.split("+")[0], **{m: __import__(m).__version__ for m in
                                                                     ("transformers", "peft", "bitsandbytes")}},
            "double_quant": family.double_quant if variant == "nf4" else None,
            "lora": {"r": lora.r, "alpha": lora.lora_alpha, "use_rslora": lora.use_rslora,
                     "scale": lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r),
                     "target_modules": family.lora.get("target_modules", ALL_LINEAR),
                     "layers_to_transform": family.lora.get("layers_to_transform")},
            "parameters": {"trainable": trainable, "total": total},
            "adamw": {"lr": ADAMW["lr"], "beta1": ADAMW["betas"][0], "beta2": ADAMW["betas"][1], "eps": ADAMW["eps"],
                      "weight_decay": ADAMW["weight_decay"]},
            "schedule": {"type": "linear", "warmup_steps": WARMUP, "total_steps": STEPS},
            "max_grad_norm": MAX_GRAD_NORM,
        }
        single, tensors = values(model, rows, sequences)
        steps = single.pop("steps")
        folder = root / variant
        folder.mkdir()
        record |= single
        if family.float64 and variant == "none":
            model = to_float64(add_adapter(load_model(root / "model"), family, root / "adapter"))
            double, double_tensors = values(model, rows, sequences)
            to_float32_modules()
            save_file({k: v for k, v in double_tensors.items() if not k.startswith("final.")}, folder / "float64.safetensors")
            for ours, theirs in zip(steps, double.pop("steps")):
                ours |= {"loss_float64": theirs["loss"], "grad_norm_float64": theirs["grad_norm"]}
            record["float64"] = double
            report_float32_error(family.name, tensors, double_tensors, steps)
        record |= {"rows": rows, "sequences": sequences, "steps": steps}
        if variant == "nf4":  # to keep the repository small; the curve's losses are there
            tensors = {k: v for k, v in tensors.items() if not k.startswith("final.")}
        save_file(tensors, folder / "golden.safetensors")
        write_golden(folder / "golden.json", record)
        spread = tensors["logits.1"].std().item()
        print(f"{family.name} {variant}: loss {record['loss']:.4f}, gradient norm {record['grad_norm']:.3f}, logits' deviation "
              f"{spread:.2f}, curve {steps[0]['loss']:.3f} to {steps[-1]['loss']:.3f}, {trainable:,} of {total:,} trained")


def report_float32_error(name: str, single: dict, double: dict, steps: list[dict]) -> None:
    """How far float32 itself is from the truth: what a tolerance on these values has to leave room for."""
    worst = {}
    for key, truth in double.items():
        kind = key.split(".")[0]
        error = (single[key].double() - truth).norm() / truth.norm()
        worst[kind] = max(worst.get(kind, 0), error.item())
    curve = max(abs(s["loss"] / s["loss_float64"] - 1) for s in steps)
    print(f"{name}: float32 against float64, relative: {({k: f'{v:.1e}' for k, v in worst.items()})}, curve's loss {curve:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all of them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")  # PEFT looks for a model called "model" on the hub, and finds none
    for family in FAMILIES:
        if not arguments.families or family.name in arguments.families:
            make_family(family, arguments.out)
    for path in arguments.out.rglob("*.safetensors"):
        path.chmod(0o644)  # transformers writes 0600


if __name__ == "__main__":
    main()
