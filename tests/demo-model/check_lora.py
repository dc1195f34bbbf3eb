#!/usr/bin/env python3
"""Runs daemon/demo/demo.toml with PyTorch + PEFT: what `finetuned demo` should come out at.

    check_lora.py [--threads 2] [--steps N] [--learning-rate X] [--quantization nf4|none]

Reads the spec, the model and the data that `finetuned demo` uses and prints the held-out loss during the run, how many
held-out rows are answered exactly (greedy) and the showcase prompts, before and after. Rows are taken in a shuffled
order and put into a sequence until it is full, as packing does; they are computed as a padded batch, which is the same
sum because packed rows do not see each other. NF4 is simulated: each linear weight is rounded to its nearest code with
one float32 absmax per block of 64 (no nested quantisation).
"""

import argparse
import json
import math
import time
import tomllib
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent.parent / "daemon/demo"

# The 16 code points of 4-bit NormalFloat (QLoRA, arXiv 2305.14314, appendix E).
NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip


def nf4_round(weight: torch.Tensor) -> torch.Tensor:
    """The weight after 4-bit quantisation and back."""
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12)
    codes = torch.bucketize(blocks / absmax, (NF4[1:] + NF4[:-1]) / 2)
    return (NF4[codes] * absmax).reshape(weight.shape)


def read_rows(path: Path, tokenizer) -> list[tuple[list[int], int, str, str]]:
    """(tokens, how many of them are the prompt, prompt, answer); the newline after the answer is not learnt."""
    rows = []
    for line in path.read_text().splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"][:-1]
        rows.append((ids, len(prompt), messages[0]["content"], messages[-1]["content"]))
    return rows


def sum_loss(model, rows) -> tuple[torch.Tensor, int]:
    """Sum of the cross-entropy over the answers' tokens, and their number."""
    longest = max(len(r[0]) for r in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), -100)
    for i, (row, prompt, *_) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, prompt : len(row)] = ids[i, prompt : len(row)]
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), int((targets != -100).sum())


@torch.no_grad()
def evaluate(model, rows) -> float:
    model.eval()
    loss, tokens = sum_loss(model, rows)
    model.train()
    return loss.item() / tokens


@torch.no_grad()
def answer(model, tokenizer, prompt: str) -> str:
    model.eval()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=60, do_sample=False)
    model.train()
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def packed(rows, length: int, rng: Random):
    """Sequences of rows, for ever: each epoch in a new order, each sequence filled until the next row does not fit."""
    while True:
        order = rng.sample(rows, len(rows))
        sequence, used = [], 0
        for row in order:
            if used + len(row[0]) > length:
                yield sequence
                sequence, used = [], 0
            sequence.append(row)
            used += len(row[0])
        if sequence:
            yield sequence


def main():
    spec = tomllib.loads((DEMO / "demo.toml").read_text())
    data, lora, train = spec["data"], spec["lora"], spec["train"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=train["max_steps"])
    parser.add_argument("--accumulation", type=int, default=train["micro_batch_size"] * train["gradient_accumulation_steps"])
    parser.add_argument("--learning-rate", type=float, default=train["learning_rate"])
    parser.add_argument("--quantization", default=spec["model"]["quantization"])
    parser.add_argument("--seed", type=int, default=spec["run"]["seed"])
    parser.add_argument("--model", type=Path, default=DEMO / spec["model"]["base"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if args.quantization == "nf4":
        for name, module in base.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.data = nf4_round(module.weight.data)
    train_rows = read_rows(DEMO / data["train"], tokenizer)
    eval_rows = read_rows(DEMO / data["eval"], tokenizer)
    prompts = json.loads((DEMO / "prompts.json").read_text())
    before = [answer(base, tokenizer, p["prompt"]) for p in prompts]
    config = LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], lora_dropout=0.0, target_modules=lora["target_modules"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    sequences = packed(train_rows, data["sequence_length"], Random(args.seed))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, train["warmup_steps"], args.steps)
    print(f"baseline held-out loss {evaluate(model, eval_rows):.4f}", flush=True)
    began, seen, worst, late = time.time(), 0, 0.0, []
    for step in range(1, args.steps + 1):
        rows = [row for _ in range(args.accumulation) for row in next(sequences)]
        seen += sum(len(r[0]) for r in rows)
        loss, tokens = sum_loss(model, rows)
        loss = loss / tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, train["max_grad_norm"])
        worst = max(worst, norm.item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % train["evaluate_every"] == 0 or step == args.steps:
            late.append(evaluate(model, eval_rows))
            print(f"step {step} loss {loss.item():.4f} grad_norm {norm:.2f} held-out {late[-1]:.4f} rows/step {len(rows)} {time.time() - began:.1f} s", flush=True)
        assert math.isfinite(loss.item())
    print(f"{seen} tokens in {time.time() - began:.1f} s on {args.threads} threads, largest gradient norm {worst:.1f}")
    wrong = [(r[2], got) for r in eval_rows if (got := answer(model, tokenizer, r[2])) != r[3]]
    print(f"exact answers: {len(eval_rows) - len(wrong)} of {len(eval_rows)}")
    for prompt, got in wrong:
        print(f"    wrong: {prompt} -> {got}")
    for p, b in zip(prompts, before):
        print(f"{p['prompt']}\n    before {b}\n    after  {answer(model, tokenizer, p['prompt'])}\n    wanted {p['expected']}")


if __name__ == "__main__":
    main()
