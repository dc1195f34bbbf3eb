#!/usr/bin/env python3
"""LoRA training steps with PyTorch + PEFT in float32, the way a user who cares about speed would write them.

    peft_step.py --model DIR --tokens ROWS.json --output DIR [--checkpointing]
    peft_step.py --model DIR --make-model

ROWS.json is a list of rows of token ids; every row is one step (micro-batch 1, all tokens labelled). Appends one JSON
object per step to OUTPUT/metrics.jsonl, as finetuned does, so that `compare.py` can time both from outside in the same
way. With --make-model it writes a model with SmolLM2-135M's shapes and random weights instead.

What is done for PEFT's speed: sdpa attention, the fused AdamW, no cache, no padding and hence no mask, the
non-reentrant checkpointing that PyTorch recommends, and nothing imported that is not used.
"""
import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import AutoModelForCausalLM

SMOLLM2_135M = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
    initializer_range=1 / 24, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0})


def make_model(folder: Path) -> None:
    """Random weights, stored in bfloat16 as the published model is."""
    from transformers import LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2_135M))
    model.to(torch.bfloat16).save_pretrained(folder)


def resident_mib(key: str) -> float:
    """A field of this process's memory status: VmRSS (now) or VmHWM (its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def train(arguments: argparse.Namespace) -> None:
    from peft import LoraConfig, get_peft_model

    after_imports = resident_mib("VmRSS")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(
        r=arguments.r, lora_alpha=arguments.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"))
    if arguments.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0, fused=True)

    arguments.output.mkdir(parents=True, exist_ok=True)
    with open(arguments.output / "metrics.jsonl", "w", buffering=1) as metrics:
        for step, row in enumerate(json.loads(arguments.tokens.read_text()), 1):
            start = time.monotonic()
            tokens = torch.tensor([row])
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            record = {"step": step, "loss": loss.item(), "grad_norm": norm.item(), "tokens": len(row),
                      "tokens_per_second": len(row) / (time.monotonic() - start)}
            metrics.write(json.dumps(record) + "\n")
    trainable, total = model.get_nb_trainable_parameters()
    print(json.dumps({"trainable": trainable, "total": total, "peak_mib": resident_mib("VmHWM"),
                      "mib_after_imports": after_imports, "threads": torch.get_num_threads()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--make-model", action="store_true")
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.make_model:
        make_model(arguments.model)
    elif arguments.tokens is None or arguments.output is None:
        parser.error("--tokens and --output are needed to train")
    else:
        train(arguments)


if __name__ == "__main__":
    main()
