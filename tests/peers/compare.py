#!/usr/bin/env python3
"""finetuned against PyTorch + PEFT on SmolLM2-135M's shapes: tokens/s, peak memory, time to the first step.

    compare.py [--finetuned target/release/finetuned] [--model DIR | --tokenizer DIR] [--lengths 256,1024]
               [--rounds 2] [--steps 6] [--json FILE]

Both train LoRA (r 8, alpha 16, all linears) on the same token sequences, one row a step, every token labelled, on the
same number of threads, without and with recomputing every layer ("checkpointing"). Every measurement is a fresh process;
the trainers take turns (PEFT, finetuned, finetuned nf4, PEFT, ...), so that a machine that slows down slows all of them.
Without --finetuned only PEFT is measured. Without --model a model with random weights is made once in the work folder.

How it is measured, the same for all, from outside:
  tokens/s     tokens of a row / time between the arrivals of two step lines in metrics.jsonl; the median over all
               rounds' steps but each process's first
  peak         largest resident set of the process (ru_maxrss)
  first step   from starting the process to the arrival of the first step's line; the median over the rounds

PEFT runs in float32. finetuned runs with quantization "none", float32 against float32, and with "nf4". Its cache of
quantised bases is a folder of this run, so the first nf4 process quantises and the later ones find it done; the table
has the median, and the cold time beside it. The losses of the first step must agree: they come from the untrained
adapter, so they tell whether both saw the same tokens, labels and weights.

Needs torch, transformers, peft and tokenizers for the Python in --python (tests/golden/requirements.txt).
"""
import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
POLL_SECONDS = 0.004

SPEC = """\
[run]
name = "compare"
seed = 1

[model]
base = {model}
quantization = "{quantization}"
compute_dtype = "float32"

[data]
train = {rows}
eval_fraction = 0.0
format = "text"
sequence_length = {length}
packing = false
shuffle = false
train_on = "all"

[lora]
r = {r}
alpha = {alpha}
target_modules = "all-linear"

[train]
method = "sft"
max_steps = {steps}
micro_batch_size = 1
gradient_accumulation_steps = 1
learning_rate = 2e-4
lr_scheduler = "constant"
warmup_steps = 0
weight_decay = 0.0
max_grad_norm = 1.0
gradient_checkpointing = "{checkpointing}"
evaluate_every = 0
checkpoint_every = 0
backend = "cpu"
"""


@dataclass
class Measurement:
    """One process."""

    first_step: float  # seconds from its start
    step_seconds: list[float]  # of the steps after the first
    peak_mib: float
    losses: list[float]
    claimed: list[float]  # its own tokens_per_second of the steps after the first
    load: float  # the machine's load average when it started


@dataclass
class Row:
    """One line of the table: a trainer in one setting, over all rounds."""

    length: int
    checkpointing: bool
    trainer: str
    tokens_per_second: float
    peak_mib: float
    first_step: float
    first_step_cold: float
    first_loss: float
    speed_ratio: float | None = None  # against PEFT in the same setting
    memory_ratio: float | None = None
    first_step_ratio: float | None = None


def make_rows(tokenizer_file: Path, length: int, steps: int, folder: Path) -> tuple[Path, Path]:
    """Real text as JSONL with `text`, and the ids of its first `length` tokens as JSON; every row is long enough."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    sources = sorted(p for ending in ("*.md", "*.rs") for p in REPOSITORY.rglob(ending)
                     if not {"target", "models"} & set(p.relative_to(REPOSITORY).parts))
    text = "\n".join(p.read_text() for p in sources)
    rows, ids, start, size = [], [], 0, length * 8  # eight characters a token are more than any text needs
    while len(rows) < steps:
        piece = text[start:start + size]
        encoded = tokenizer.encode(piece).ids
        if len(encoded) <= length:
            raise SystemExit(f"the repository's text is too short for {steps} rows of {length} tokens: use fewer --steps")
        rows.append(json.dumps({"text": piece}))
        ids.append(encoded[:length])
        start += size // 2
    rows_file, ids_file = folder / f"rows-{length}.jsonl", folder / f"tokens-{length}.json"
    rows_file.write_text("\n".join(rows) + "\n")
    ids_file.write_text(json.dumps(ids))
    return rows_file, ids_file


def measure(command: list[str], metrics: Path, steps: int, environment: dict) -> Measurement:
    """Runs the command and watches its metrics.jsonl."""
    load = os.getloadavg()[0]
    log = metrics.parent.with_suffix(".log")
    arrivals, records, pending, stream = [], [], "", None
    with open(log, "wb") as output:
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        status = None
        while status is None:
            pid, ended, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                status = os.waitstatus_to_exitcode(ended)
                process.returncode = status
            if stream is None and metrics.exists():
                stream = open(metrics)
            if stream is not None:
                now = time.monotonic()
                *lines, pending = (pending + stream.read()).split("\n")
                for line in lines:
                    record = json.loads(line)
                    if "loss" in record and "step" in record:  # not an evaluation
                        arrivals.append(now)
                        records.append(record)
            if status is None:
                time.sleep(POLL_SECONDS)
    if stream is not None:
        stream.close()
    if status != 0 or len(records) != steps:
        tail = log.read_text(errors="replace")[-2000:]
        raise SystemExit(f"{' '.join(command)}\nended with {status} after {len(records)} of {steps} steps:\n{tail}")
    intervals = [b - a for a, b in zip(arrivals, arrivals[1:])]
    if min(intervals) < POLL_SECONDS:
        raise SystemExit(f"{metrics}: several steps' lines arrived at once, so steps cannot be timed from outside")
    return Measurement(arrivals[0] - start, intervals, usage.ru_maxrss / 1024, [r["loss"] for r in records],
                       [r["tokens_per_second"] for r in records[1:]], load)


def peft_command(options, tokens: Path, output: Path, checkpointing: bool) -> list[str]:
    flags = ["--checkpointing"] if checkpointing else []
    return [options.python, str(HERE / "peft_step.py"), "--model", str(options.model), "--tokens", str(tokens),
            "--output", str(output), "--threads", str(options.threads), "--r", str(options.r),
            "--alpha", str(options.alpha), *flags]


def finetuned_command(options, rows: Path, length: int, output: Path, checkpointing: bool, quantization: str) -> list[str]:
    spec = output.with_suffix(".toml")
    spec.write_text(SPEC.format(
        model=json.dumps(str(options.model)), rows=json.dumps(str(rows)), length=length, r=options.r,
        alpha=options.alpha, steps=options.steps, quantization=quantization,
        checkpointing="full" if checkpointing else "none"))
    return [str(options.finetuned), "run", str(spec), "--output", str(output)]


def compare(options, work: Path) -> tuple[list[Row], list[dict]]:
    """Every setting, every round, every trainer in turn."""
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "RAYON_NUM_THREADS": str(options.threads),
                                "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(work / "cache")}
    trainers = ["PEFT fp32"] + (["finetuned fp32", "finetuned nf4"] if options.finetuned else [])
    table, raw = [], []
    for length in options.lengths:
        rows, tokens = make_rows(options.model / "tokenizer.json", length, options.steps, work)
        for checkpointing in (False, True):
            results = {t: [] for t in trainers}
            for turn in range(options.rounds):
                for trainer in trainers:
                    output = work / f"{trainer.replace(' ', '-')}-{length}-{'full' if checkpointing else 'none'}-{turn}"
                    if trainer.startswith("PEFT"):
                        command = peft_command(options, tokens, output, checkpointing)
                    else:
                        quantization = "nf4" if trainer.endswith("nf4") else "none"
                        command = finetuned_command(options, rows, length, output, checkpointing, quantization)
                    result = measure(command, output / "metrics.jsonl", options.steps, environment)
                    results[trainer].append(result)
                    raw.append({"trainer": trainer, "length": length, "checkpointing": checkpointing, "round": turn}
                               | asdict(result))
                    print(f"{trainer}, {length} tokens, checkpointing {'on' if checkpointing else 'off'}: "
                          f"{length / statistics.median(result.step_seconds):.0f} tokens/s", file=sys.stderr)
            lines = [summarise(t, length, checkpointing, results[t]) for t in trainers]
            for line in lines[1:]:
                line.speed_ratio = line.tokens_per_second / lines[0].tokens_per_second
                line.memory_ratio = line.peak_mib / lines[0].peak_mib
                line.first_step_ratio = line.first_step / lines[0].first_step
            if len(lines) > 1 and abs(lines[1].first_loss / lines[0].first_loss - 1) > 1e-4:
                raise SystemExit(f"first loss {lines[1].first_loss} is not PEFT's {lines[0].first_loss}: "
                                 "not the same tokens, labels or weights; the comparison would mean nothing")
            table += lines
    return table, raw


def summarise(trainer: str, length: int, checkpointing: bool, results: list[Measurement]) -> Row:
    seconds = statistics.median(s for r in results for s in r.step_seconds)
    return Row(length, checkpointing, trainer, length / seconds, max(r.peak_mib for r in results),
               statistics.median(r.first_step for r in results), results[0].first_step, results[0].losses[0])


def print_table(table: list[Row]) -> None:
    print("| tokens | checkpointing | trainer | tokens/s | peak MiB | first step s | (cold) | first loss "
          "| × tokens/s | × peak | × first step |")
    print("|--:|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for row in table:
        ratios = [f"{r:.2f}" if r is not None else "" for r in (row.speed_ratio, row.memory_ratio, row.first_step_ratio)]
        print(f"| {row.length} | {'on' if row.checkpointing else 'off'} | {row.trainer} | {row.tokens_per_second:.0f} "
              f"| {row.peak_mib:.0f} | {row.first_step:.2f} | {row.first_step_cold:.2f} | {row.first_loss:.4f} "
              f"| {' | '.join(ratios)} |")
    print("\nRatios are finetuned / PEFT. Target: tokens/s at least 1.5, peak at most 0.35, first step at most 0.2.")


def machine() -> dict:
    """What the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((l.split(":", 1)[1].strip() for l in lines if l.startswith(("model name", "Model"))), platform.machine())
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0], "system": platform.platform()}


def versions(python: str) -> dict:
    """Of the peer's packages, without importing them."""
    code = ("import importlib.metadata as m, json, platform; print(json.dumps({'python': platform.python_version()} | "
            "{p: m.version(p) for p in ('torch', 'transformers', 'peft', 'tokenizers')}))")
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)


def prepare_model(options, work: Path) -> None:
    """Makes the random model where none is given, and reads the weights once so that no trainer pays for the disk."""
    if options.model is None:
        options.model = work / "model"
        if not (options.model / "model.safetensors").exists():
            subprocess.run([options.python, str(HERE / "peft_step.py"), "--model", str(options.model), "--make-model"],
                           check=True, stderr=subprocess.DEVNULL)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(options.tokenizer / name, options.model)
    options.model = options.model.resolve()
    for shard in options.model.glob("*.safetensors"):
        with open(shard, "rb") as file:
            while file.read(1 << 24):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finetuned", type=Path, help="the release binary; without it only PEFT is measured")
    parser.add_argument("--model", type=Path, help="Hugging Face model directory with tokenizer.json")
    parser.add_argument("--tokenizer", type=Path, default=REPOSITORY.parent / "shared/data/tokenizers/smollm2",
                        help="directory with SmolLM2's tokenizer, for the random model")
    parser.add_argument("--python", default=sys.executable, help="Python that has torch and peft")
    parser.add_argument("--lengths", type=lambda s: [int(n) for n in s.split(",")], default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="per process; the first is not timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--work", type=Path, help="folder to keep (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first is not timed")
    if options.model is None and not (options.tokenizer / "tokenizer.json").exists():
        parser.error(f"{options.tokenizer} has no tokenizer.json: give --tokenizer or --model")
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        where, peers = machine(), versions(options.python)
        print(f"{where['cpu']}, {where['cores']} cores, {options.threads} threads, load {where['load']:.1f} at the start; "
              + ", ".join(f"{k} {v}" for k, v in peers.items()) + "\n", flush=True)
        prepare_model(options, work)
        table, raw = compare(options, work)
    print_table(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": where, "versions": peers, "threads": options.threads,
                                            "table": [asdict(r) for r in table], "measurements": raw}, indent=1) + "\n")


if __name__ == "__main__":
    main()
