#!/usr/bin/env python3
"""Holds an adapter written by finetuned against PEFT: the same tokens must give the same logits.

    check_adapter.py MODEL ADAPTER TOKENS.json LOGITS.safetensors [--nf4 [--plain-absmax]] [--tolerance 1e-4]

TOKENS.json is a list of token ids. LOGITS.safetensors has the tensor `logits` [T, vocabulary] in f32, as finetuned
computed it for these tokens with this adapter. Everything is computed in float32; with --nf4 the seven linears of every
layer hold the values of their NF4 form (block 64, double quantisation unless --plain-absmax). Exit code 1 when the
relative error is above the tolerance, when shapes differ, or when PEFT finds keys missing from the adapter.
"""
import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from peft import PeftModel, load_peft_weights
from safetensors.torch import load_file

from make_model_goldens import load_model, lora_parameters, quantise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("logits", type=Path)
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--plain-absmax", action="store_true")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    model = load_model(arguments.model)
    if arguments.nf4:
        quantise(model, double_quant=not arguments.plain_absmax)
    model = PeftModel.from_pretrained(model, arguments.adapter, is_trainable=True).eval()
    expected, stored = set(lora_parameters(model)), set(load_peft_weights(arguments.adapter))
    if expected != stored:
        print(f"keys: missing {sorted(expected - stored)}, not expected {sorted(stored - expected)}")
        return 1
    trainable, total = model.get_nb_trainable_parameters()
    print(f"parameters: {trainable} trainable, {total} total")

    tokens = json.loads(arguments.tokens.read_text())
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].double()
    ours = load_file(arguments.logits)["logits"].double()
    if ours.shape != theirs.shape:
        print(f"shape: {tuple(ours.shape)}, PEFT has {tuple(theirs.shape)}")
        return 1
    relative = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"logits: relative error {relative:.3e}, largest absolute {(ours - theirs).abs().max().item():.3e}")
    return 0 if relative <= arguments.tolerance else 1  # not a number fails


if __name__ == "__main__":
    sys.exit(main())
