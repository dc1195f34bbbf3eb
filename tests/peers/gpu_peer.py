#!/usr/bin/env python3
"""The peers on a GPU, timed: PyTorch and bitsandbytes operation by operation, and a whole PEFT + bitsandbytes QLoRA step.

    gpu_peer.py kernels REQUEST.json     prints one JSON object
    gpu_peer.py step REQUEST.json

`gpu.py` writes the request and reads the answer; each turn is a fresh process, as those of finetuned are. A sample of an
operation is timed as `finetuned bench` does it: caches flushed by a write of twice the second-level cache, the device kept
busy until everything is queued, then from event to event, on two input sets of random data that take turns. So the time is
the device's, and Python's is not in it. A step is timed by the wall clock, with Python's share, as it is what a user waits
for.

What is done for the peers' speed: products write to outputs that are there, gradients of a group are summed by
addmm and not by an addition of their own, sdpa gets the grouped heads as they are, the optimizer is the fused AdamW, there
is no cache, no padding and no mask, and recomputing is the non-reentrant one that PyTorch recommends.
"""
import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

SETS = 2
WARM_UP = 2
LEAST = 5
FLUSH = 32 << 20
# Clocks for which the device waits while the host queues what is measured: 2 to 4 ms, more than Python needs.
BUSY = 4_000_000
BLOCK = 64


def quantile(values: list[float], share: float) -> float:
    """Linear between the two nearest, as cuda/src/bench/statistics.rs."""
    values = sorted(values)
    place = share * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)


def statistics(samples: list[float]) -> dict:
    return {"median": quantile(samples, 0.5), "least": min(samples), "lower_quartile": quantile(samples, 0.25),
            "upper_quartile": quantile(samples, 0.75), "samples": len(samples)}


class Bench:
    def __init__(self, request: dict) -> None:
        self.request = request
        self.device = torch.device(request["device"])
        self.gpu = self.device.type == "cuda"
        self.limit = request["seconds"]
        self.samples = max(request["samples"], LEAST)
        size = FLUSH
        if self.gpu:
            size = max(FLUSH, 2 * torch.cuda.get_device_properties(self.device).L2_cache_size)
        self.flushed = torch.empty(size if self.gpu else 1 << 20, dtype=torch.uint8, device=self.device)
        self.rows: list[dict] = []
        torch.manual_seed(1)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=self.device)

    def measure(self, run) -> dict:
        """Seconds of run(set)."""
        samples, began = [], time.monotonic()
        for i in range(WARM_UP + self.samples):
            if i >= WARM_UP + LEAST and time.monotonic() - began > self.limit:
                break
            self.flushed.fill_(i & 0xff)
            if self.gpu:
                torch.cuda._sleep(BUSY)
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run(i % SETS)
                end.record()
                end.synchronize()
                seconds = start.elapsed_time(end) / 1e3
            else:
                start = time.perf_counter()
                run(i % SETS)
                seconds = time.perf_counter() - start
            if i >= WARM_UP:
                samples.append(seconds)
        return statistics(samples)

    def add(self, what: str, group: str, tokens: int, run, **more) -> None:
        print(f"{what} {group} {tokens or ''}", file=sys.stderr)
        self.rows.append({"what": what, "group": group, "tokens": tokens, "seconds": self.measure(run)} | more)


def kernels(request: dict) -> dict:
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    bench = Bench(request)
    sizes = request["model"]

    def quantised(rows: int, columns: int):
        return quantize_4bit(bench.random(rows, columns) / 32, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")

    with torch.no_grad():
        size = request["copied"]
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=bench.device)
        to = torch.empty_like(source)
        bench.add("copy", "", 0, lambda _: to.copy_(source), bytes=2 * size)
        del source, to

        side = request["cube"]
        pairs = [(bench.random(side, side), bench.random(side, side)) for _ in range(SETS)]
        out = torch.empty(side, side, dtype=torch.bfloat16, device=bench.device)
        bench.add("matmul-cube", "", side, lambda s: torch.matmul(pairs[s][0], pairs[s][1].t(), out=out), flop=2 * side**3)
        del pairs, out

        weights = [quantised(sizes["intermediate"], sizes["hidden"]) for _ in range(SETS)]
        bench.add("dequantise", "", 0, lambda s: dequantize_4bit(*weights[s]))
        del weights

        for group in request["groups"]:
            name, inputs, outputs = group["name"], group["inputs"], group["outputs"]
            packed = [[quantised(n, inputs) for n in outputs] for _ in range(SETS)]
            dense = [[bench.random(n, inputs) / 32 for n in outputs] for _ in range(SETS)]
            for tokens in sorted({*request["fused_tokens"], *request["plain_tokens"]}):
                x = [bench.random(tokens, inputs) for _ in range(SETS)]
                y = [torch.empty(tokens, n, dtype=torch.bfloat16, device=bench.device) for n in outputs]
                if tokens in request["plain_tokens"]:
                    def plain(s):
                        for w, into in zip(dense[s], y):
                            torch.matmul(x[s], w.t(), out=into)

                    bench.add("matmul", name, tokens, plain)
                if tokens not in request["fused_tokens"]:
                    continue
                dy = [[bench.random(tokens, n) for n in outputs] for _ in range(SETS)]
                dx = torch.empty(tokens, inputs, dtype=torch.bfloat16, device=bench.device)

                def dequantised(s):
                    for (w, state), into in zip(packed[s], y):
                        torch.matmul(x[s], dequantize_4bit(w, state).t(), out=into)

                def gradient(s):
                    for i, ((w, state), of) in enumerate(zip(packed[s], dy[s])):
                        whole = dequantize_4bit(w, state)
                        if i:
                            torch.addmm(dx, of, whole, out=dx)
                        else:
                            torch.matmul(of, whole, out=dx)

                fused_out = []

                def fused(s):
                    fused_out[:] = [bitsandbytes.matmul_4bit(x[s], w, quant_state=state) for w, state in packed[s]]

                bench.add("dequantise-matmul", name, tokens, dequantised)
                bench.add("dequantise-gradient", name, tokens, gradient)
                bench.add("gemm-4bit", name, tokens, fused)
                # Both have to have computed the same, or neither time means anything.
                dequantised(0), fused(0)
                for a, b in zip(y, fused_out):
                    error = ((a.float() - b.float()).norm() / a.float().norm()).item()
                    if not error < 0.02:
                        raise SystemExit(f"gemm_4bit of {name}, {tokens} tokens is {error} off dequantise and matmul")

    attention(bench, sizes)
    return {"rows": bench.rows} | about(bench.device)


def attention(bench: Bench, sizes: dict) -> None:
    from torch.nn.functional import scaled_dot_product_attention

    heads, kv_heads, width, longest = sizes["heads"], sizes["kv_heads"], sizes["head_dim"], bench.request["longest"]
    for tokens in bench.request["attention_tokens"]:
        length = min(tokens, longest)
        rows = tokens // length

        def projected(count: int) -> torch.Tensor:
            # [rows, tokens, heads, width] in memory, as projections leave it.
            return bench.random(rows, length, count, width).transpose(1, 2).requires_grad_()

        inputs = [(projected(heads), projected(kv_heads), projected(kv_heads)) for _ in range(SETS)]
        dout = bench.random(rows, length, heads, width).transpose(1, 2)

        def forward(s):
            return scaled_dot_product_attention(*inputs[s], is_causal=True, enable_gqa=True)

        with torch.no_grad():
            bench.add("attention", "", tokens, forward)
        outs = [forward(s) for s in range(SETS)]
        bench.add("attention-backward", "", tokens,
                  lambda s: torch.autograd.grad(outs[s], inputs[s], dout, retain_graph=True))


# ── a whole step ──


def quantise_linears(model, device) -> None:
    """Every linear layer but the head becomes bitsandbytes' NF4 with nested scales, as loading with BitsAndBytesConfig does."""
    import bitsandbytes

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, torch.nn.Linear) or name.endswith("lm_head"):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        new = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16,
                                         compress_statistics=True, quant_type="nf4", device="meta")
        new.weight = bitsandbytes.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, compress_statistics=True,
                                                quant_type="nf4", module=new).to(device)
        setattr(parent, name.rpartition(".")[2], new)


def qlora_model(request: dict, device):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = request["model"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"], intermediate_size=sizes["intermediate"],
        num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"], num_key_value_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"], max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, use_cache=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    quantise_linears(model, device)
    model.to(device)
    # What transformers sets when it loads a quantised model, and PEFT goes by.
    model.is_loaded_in_4bit = True
    model = get_peft_model(model, LoraConfig(r=request["rank"], lora_alpha=request["rank"], lora_dropout=0.0,
                                             target_modules="all-linear", task_type="CAUSAL_LM"))
    wrapped = {type(m).__module__ + "." + type(m).__name__ for n, m in model.named_modules() if n.endswith("q_proj")}
    if wrapped != {"peft.tuners.lora.bnb.Linear4bit"}:
        raise SystemExit(f"PEFT took the quantised layers for {wrapped}")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    return model


def step(request: dict) -> dict:
    device = torch.device(request["device"])
    gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if gpu else lambda: None
    model = qlora_model(request, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0, fused=True)
    length = min(request["tokens"], request["longest"])
    rows = request["tokens"] // length
    batches = [torch.randint(0, request["model"]["vocabulary"], (rows, length), device=device) for _ in range(SETS)]
    gc.collect()
    if gpu:
        # What quantising took is not training's.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    passes, updates, steps, began = [], [], [], 0.0
    for i in range(WARM_UP + max(request["samples"], LEAST)):
        if i == WARM_UP:
            began = time.monotonic()
        if i >= WARM_UP + LEAST and time.monotonic() - began > request["seconds"]:
            break
        wait()
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=batches[i % SETS], labels=batches[i % SETS]).loss
        loss.backward()
        wait()
        middle = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        end = time.perf_counter()
        if i >= WARM_UP:
            passes.append(middle - start)
            updates.append(end - middle)
            steps.append(end - start)
    value = loss.item()
    if not torch.isfinite(loss):
        raise SystemExit(f"the loss is {value}")
    memory = None
    if gpu:
        memory = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {"tokens": rows * length, "seconds": statistics(steps), "pass_seconds": statistics(passes),
            "update_seconds": statistics(updates), "memory": memory, "loss": value,
            "trainable": sum(p.numel() for p in parameters)} | about(device)


def about(device: torch.device) -> dict:
    import importlib.metadata as metadata

    def version(package: str):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    names = ("torch", "bitsandbytes", "peft", "transformers", "accelerate")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "versions": {n: version(n) for n in names} | {"cuda": torch.version.cuda}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kernels", "step"])
    parser.add_argument("request", type=Path)
    arguments = parser.parse_args()
    request = json.loads(arguments.request.read_text())
    print(json.dumps({"kernels": kernels, "step": step}[arguments.what](request)))


if __name__ == "__main__":
    main()
