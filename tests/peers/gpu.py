#!/usr/bin/env python3
"""finetuned against PyTorch, bitsandbytes and PEFT on one GPU, and against its own ceilings: the table of targets.

    gpu.py --finetuned target/release/finetuned [--python PYTHON] [--what kernels,step] [--rounds 2] [--limit 540] [--json FILE]
    gpu.py --finetuned target/release/finetuned --alone         only what finetuned is measured against itself; needs no torch
    gpu.py --dry-run [--peers]

Shapes are those of Llama-3.2-1B, weights are random (nothing is downloaded), data is random and never zeros. Each turn is a
fresh process: `finetuned bench --json`, then gpu_peer.py, then again, so that a device that slows down slows both. A ratio
is the median of the ratios of the rounds, with the smallest and the largest; a time in it is a median of at least five
samples where finetuned takes so many, else of three, with flushed caches and two input sets (docs/kernels.md, "How figures
are taken").

A block's four groups of layers (q,k,v / o / gate,up / down) are added up before they are compared. Of several kernels of
finetuned's for one product the fastest counts, of the fused ones where the target is theirs. What is like for like and what
is not:

  fused input gradient   ours has the gradient's two LoRA products in it, the peer's has not
  whole step             tokens of a micro-step and an update / their time, both with activations computed again, examples of at
                         most 1,024 tokens, every token labelled, r = 16 on all linear layers; bfloat16 autocast and float32 adapters
                         for PEFT, as its trainers have it
  peak memory            ours is what the device has less of, theirs what PyTorch's tensors take at most, without what its
                         allocator keeps for later (beside it in the JSON); the contexts of CUDA are in neither

--dry-run takes made-up figures in the place of `finetuned bench`, and of the peers too without --peers; with it gpu_peer.py
runs on tiny shapes on the CPU. It tries the script; no figure of it is a speed.

The exit code is 0 when everything was measured, whatever the verdicts; 1 when something was not; 3 when the peers' packages
are missing.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "bitsandbytes", "peft", "transformers")
MISSING = 3

MODEL = "Llama-3.2-1B"
SIZES = {"hidden": 2048, "intermediate": 8192, "layers": 16, "heads": 32, "kv_heads": 8, "head_dim": 64, "vocabulary": 128256}
TINY = {"hidden": 128, "intermediate": 256, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocabulary": 512}
LONGEST = 1024  # of an example; `finetuned bench` has it fixed
RANK = 16
FUSED_TOKENS = (64, 256, 512)
PLAIN_TOKENS = (2048,)
LORA_TOKENS = (512, 2048)
STEP_TOKENS = (512, 2048, 8192)
PLAIN = "linear-bf16-without-lora"
# The group of this model with this many tokens is a product of 4096³.
CUBE, CUBE_MODEL, CUBE_GROUP = 4096, "Llama-3-8B", "o"


def groups(sizes: dict) -> list[dict]:
    """Layers of a block that share their input, as cuda/src/bench/shapes.rs has them."""
    hidden, wide = sizes["hidden"], sizes["intermediate"]
    q, kv = sizes["heads"] * sizes["head_dim"], sizes["kv_heads"] * sizes["head_dim"]
    return [{"name": name, "inputs": inputs, "outputs": outputs} for name, inputs, outputs in (
        ("q,k,v", hidden, [q, kv, kv]), ("o", q, [hidden]), ("gate,up", hidden, [wide, wide]), ("down", wide, [hidden]))]


# ── what was measured ──


class Absent(Exception):
    """Something that a ratio needs was not measured."""


@dataclass
class Ours:
    """A page of `finetuned bench --json`."""

    page: dict

    def rows(self, operation: str, tokens: int, model: str = MODEL, fused: bool | None = None) -> list[dict]:
        found = []
        for row in self.page.get("kernels") or []:
            kernel = row["kernel"]
            # Without a name the program's table has chosen.
            if kernel is not None and fused is not None and kernel.startswith("gemm_nf4_") != fused:
                continue
            if (row["operation"], row["tokens"], row["model"]) == (operation, tokens, model):
                found.append(row)
        if not found:
            raise Absent(f"finetuned has no row of {operation}, {tokens} tokens, {model}")
        return found

    def block(self, operation: str, tokens: int, fused: bool | None = None) -> float:
        """Seconds of a block's groups, each with its fastest kernel."""
        fastest: dict[str, float] = {}
        for row in self.rows(operation, tokens, fused=fused):
            group = row["shape"].split(" ")[0]
            fastest[group] = min(row["seconds"]["median"], fastest.get(group, float("inf")))
        missing = {g["name"] for g in groups(SIZES)} - set(fastest)
        if missing:
            raise Absent(f"finetuned has no row of {operation}, {tokens} tokens for {', '.join(sorted(missing))}")
        return sum(fastest.values())

    def single(self, operation: str, tokens: int) -> dict:
        return min(self.rows(operation, tokens), key=lambda row: row["seconds"]["median"])

    def cube(self) -> float:
        """Share of the probe's rate at 4096³."""
        found = [r for r in self.rows(PLAIN, CUBE, CUBE_MODEL) if r["shape"].split(" ")[0] == CUBE_GROUP]
        if not found:
            raise Absent(f"finetuned has no row of {PLAIN} at {CUBE}³")
        return max(row["flops"] for row in found) / self.page["gpu"]["mma_flops"]

    def step(self, tokens: int) -> dict:
        for line in self.page.get("steps") or []:
            if (line["model"], line["tokens"], line["recompute"]) == (MODEL, tokens, True):
                if "not_measured" in line:
                    raise Absent(f"finetuned's step of {tokens} tokens: {line['not_measured']}")
                return line
        raise Absent(f"finetuned has no step of {tokens} tokens")

    def step_speed(self, tokens: int) -> float:
        line = self.step(tokens)
        return tokens / (line["seconds"]["median"] + line["update_seconds"]["median"])


@dataclass
class Peer:
    """A page of gpu_peer.py."""

    page: dict

    def seconds(self, what: str, tokens: int = 0) -> float:
        found = [row["seconds"]["median"] for row in self.page.get("rows") or [] if (row["what"], row["tokens"]) == (what, tokens)]
        if not found:
            raise Absent(f"the peers have no {what}" + (f", {tokens} tokens" if tokens else ""))
        return sum(found)

    def step_speed(self) -> float:
        if "tokens" not in self.page:
            raise Absent("the peers have no such step")
        return self.page["tokens"] / self.page["seconds"]["median"]


@dataclass
class Target:
    """A line of the table. `of` gives ours, theirs and what the first is to the second."""

    name: str
    at: str
    first: float
    then: float
    of: object
    unit: str
    less: bool = False  # a smaller ratio is better
    alone: bool = False  # needs no peer


@dataclass
class Result:
    """A line with its figures: medians over the rounds, and the range of the ratio."""

    name: str
    at: str
    ours: float | None
    theirs: float | None
    unit: str
    ratio: float | None
    least: float | None
    most: float | None
    first: float | None
    then: float | None
    verdict: str


def speed(ours: float, theirs: float) -> tuple[float, float, float]:
    """Of times: theirs / ours."""
    return 1e6 * ours, 1e6 * theirs, theirs / ours


def kernel_targets() -> list[Target]:
    def cube(ours, peers):
        return ours.cube() * ours.page["gpu"]["mma_flops"] / 1e12, ours.page["gpu"]["mma_flops"] / 1e12, ours.cube()

    def dequantise_share(ours, peers):
        row, copy = ours.single("nf4-dequantise", 0), ours.page["gpu"]["copy_bytes_per_second"]
        return row["bytes_per_second"] / 1e9, copy / 1e9, row["bytes_per_second"] / copy

    def lora(tokens):
        def of(ours, peers):
            with_lora, without = ours.block("linear", tokens), ours.block("linear-without-lora", tokens)
            return 1e6 * with_lora, 1e6 * without, with_lora / without
        return of

    def fused(operation, what, tokens):
        return lambda ours, peers: speed(ours.block(operation, tokens, fused=True), peers.seconds(what, tokens))

    def single(operation, what, tokens):
        return lambda ours, peers: speed(ours.single(operation, tokens)["seconds"]["median"], peers.seconds(what, tokens))

    targets = [Target("product / own mma.sync probe", f"{CUBE}³", 0.55, 0.75, cube, "TFLOP/s", alone=True)]
    targets += [Target("plain product / torch.matmul", f"M {m}", 0.45, 0.65,
                       lambda ours, peers, m=m: speed(ours.block(PLAIN, m), peers.seconds("matmul", m)), "µs a block")
                for m in PLAIN_TOKENS]
    bounds = dict(zip(FUSED_TOKENS, ((1.5, 3.0), (1.2, 1.5), (1.0, 1.2))))
    targets += [Target("fused forward / dequantise + matmul", f"M {m}", *bounds[m],
                       fused("linear-without-lora", "dequantise-matmul", m), "µs a block") for m in FUSED_TOKENS]
    bounds[64] = (1.5, 2.0)
    targets += [Target("fused input gradient / dequantise + matmul", f"M {m}", *bounds[m],
                       fused("input-gradient", "dequantise-gradient", m), "µs a block") for m in FUSED_TOKENS]
    targets += [Target("fused forward / gemm_4bit", f"M {m}", 0.9, 1.2, fused("linear-without-lora", "gemm-4bit", m),
                       "µs a block") for m in FUSED_TOKENS]
    targets += [Target("dequantise / own copy", "", 0.75, 0.9, dequantise_share, "GB/s", alone=True),
                Target("dequantise / bitsandbytes'", "", 1.2, 1.8, single("nf4-dequantise", "dequantise", 0), "µs")]
    targets += [Target("product with LoRA / without, time", f"M {m}", 1.15, 1.06, lora(m), "µs a block", less=True, alone=True)
                for m in LORA_TOKENS]
    targets += [Target(f"{name} / sdpa's", f"{m} tokens", 0.4, 0.6, single(operation, operation, m), "µs")
                for m in PLAIN_TOKENS
                for name, operation in (("attention forward", "attention"), ("attention backward", "attention-backward"))]
    return targets


def step_targets() -> list[Target]:
    def tokens_per_second(tokens):
        def of(ours, peers):
            mine, theirs = ours.step_speed(tokens), peers.step_speed()
            return mine, theirs, mine / theirs
        return of

    def memory(tokens):
        def of(ours, peers):
            mine, theirs = ours.step(tokens)["memory_bytes"], (peers.page.get("memory") or {}).get("allocated")
            if not mine or not theirs:
                raise Absent(f"nobody knows the memory of a step of {tokens} tokens")
            return mine / 2**20, theirs / 2**20, mine / theirs
        return of

    bounds = ((1.3, 2.0), (1.0, 1.4), (0.8, 1.0))
    targets = [Target("whole step / PEFT + bitsandbytes", f"{m} tokens", *of, tokens_per_second(m), "tokens/s")
               for m, of in zip(STEP_TOKENS, bounds)]
    return targets + [Target("peak memory / PEFT + bitsandbytes", "2048 tokens", 0.6, 0.4, memory(2048), "MiB", less=True)]


def verdict(target: Target, ratio: float) -> str:
    def reached(bound: float) -> bool:
        return ratio <= bound if target.less else ratio >= bound

    return "then" if reached(target.then) else "first" if reached(target.first) else "missed"


def judge(target: Target, rounds: list[tuple[Ours, Peer]]) -> Result:
    """Of rounds that were measured in pairs."""
    found, why = [], "no round"
    for ours, peers in rounds:
        try:
            found.append(target.of(ours, peers))
        except Absent as absent:
            why = str(absent)
    if not found:
        return Result(target.name, target.at, None, None, target.unit, None, None, None, target.first, target.then,
                      f"not measured: {why}")
    ratios = [ratio for *_, ratio in found]
    ratio = statistics.median(ratios)
    return Result(target.name, target.at, statistics.median(f[0] for f in found), statistics.median(f[1] for f in found),
                  target.unit, ratio, min(ratios), max(ratios), target.first, target.then, verdict(target, ratio))


# ── measuring ──


class Failed(Exception):
    """A turn that gave no figures."""


class Runner:
    """Takes the turns, within a limit."""

    def __init__(self, options, work: Path) -> None:
        self.options, self.work = options, work
        self.until = time.monotonic() + options.limit
        self.turns = 0

    def left(self) -> float:
        return self.until - time.monotonic()

    def run(self, command: list[str], environment: dict, what: str) -> dict:
        self.turns += 1
        left = self.left()
        if left < 1:
            raise Failed(f"{what}: out of time")
        print(f"── {what}, {left:.0f} s left", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            raise Failed(f"{what}: not done in the {left:.0f} s that were left") from None
        if done.returncode:
            raise Failed(f"{what}: exit {done.returncode}: {done.stderr.strip()[-1500:]}")
        try:
            return json.loads(done.stdout)
        except json.JSONDecodeError as error:
            raise Failed(f"{what}: no JSON ({error}): {done.stdout[:200]!r}") from None

    def ours(self, what: str, arguments: list[str]) -> Ours:
        if self.options.dry_run:
            return Ours(made_up(what))
        # Without the tables of tiles of an earlier turn, which knows other numbers of tokens.
        cache = self.work / f"cache-{self.turns}"
        cache.mkdir()
        if self.options.cubins:
            shutil.copytree(self.options.cubins, cache / "kernels")
        page = self.run([str(self.options.finetuned), "bench", "--json", *arguments],
                        os.environ | {"FINETUNED_CACHE_DIR": str(cache)}, f"finetuned, {what}")
        if page["schema"] != 1:
            raise Failed(f"finetuned bench has schema {page['schema']}; this script knows 1")
        if page["stand_in"]:
            raise Failed(f"finetuned ran on the stand-in: {page['stand_in']}")
        return Ours(page)

    def peer(self, what: str, tokens: int = 0) -> Peer:
        if self.options.dry_run and not self.options.peers:
            return Peer(made_up_peer(what, tokens))
        tiny = self.options.dry_run
        sizes = TINY if tiny else SIZES
        request = {"device": "cpu" if tiny else "cuda", "seconds": 10.0 if what == "step" else 0.5, "samples": 15, "rank": RANK,
                   "model": sizes, "groups": groups(sizes), "copied": (1 << 20) if tiny else 256 << 20,
                   "cube": 64 if tiny else CUBE, "longest": LONGEST,
                   "tokens": tokens // 16 if tiny else tokens, "fused_tokens": FUSED_TOKENS,
                   "plain_tokens": PLAIN_TOKENS, "attention_tokens": PLAIN_TOKENS}
        file = self.work / f"request-{self.turns}.json"
        file.write_text(json.dumps(request))
        title = f"peers, {what}" + (f" of {tokens} tokens" if tokens else "")
        return Peer(self.run([self.options.python, str(HERE / "gpu_peer.py"), what, str(file)], dict(os.environ), title))


def same_device(ours: Ours, peer: Peer) -> None:
    a, b = (ours.page["gpu"] or {}).get("name"), peer.page["device"]
    if a != b:
        raise Failed(f"finetuned was on {a} and the peers on {b}: this is no comparison")


def measure(runner: Runner) -> tuple[list[Result], dict, list[str]]:
    options, problems, raw = runner.options, [], {"kernels": [], "steps": {}}
    kernels: list[tuple[Ours, Peer]] = []
    steps: dict[int, list[tuple[Ours, Peer]]] = {tokens: [] for tokens in STEP_TOKENS}

    def turn(pairs: list, ours, peer) -> None:
        """Ours, then theirs. Where theirs fails, what needs no peer is still judged."""
        try:
            mine = ours()
            pairs.append((mine, Peer({})))
            if options.alone:
                return
            theirs = peer()
            if not options.dry_run:
                same_device(mine, theirs)
            pairs[-1] = (mine, theirs)
        except Failed as failed:
            problems.append(str(failed))
            print(f"warning: {failed}", file=sys.stderr)

    tokens = sorted({*FUSED_TOKENS, *PLAIN_TOKENS, *LORA_TOKENS})
    operations = ["nf4-dequantise", "linear", "linear-without-lora", PLAIN, "input-gradient", "attention", "attention-backward"]

    def our_kernels() -> Ours:
        page = runner.ours("kernels", ["--kernel", *operations, "--model", MODEL, "--tokens", *map(str, tokens)]).page
        cube = runner.ours("cube", ["--kernel", PLAIN, "--model", CUBE_MODEL, "--tokens", str(CUBE)]).page
        return Ours(page | {"kernels": page["kernels"] + cube["kernels"]})

    for _ in range(options.rounds):
        if "kernels" in options.what:
            turn(kernels, our_kernels, lambda: runner.peer("kernels"))
        if "step" not in options.what:
            continue
        for m in STEP_TOKENS:
            turn(steps[m], lambda: runner.ours(f"step of {m} tokens", ["--kernel", "step", "--model", MODEL, "--tokens", str(m)]),
                 lambda: runner.peer("step", m))
    results = []
    if "kernels" in options.what:
        results += [judge(t, kernels) for t in kernel_targets() if t.alone or not options.alone]
    if "step" in options.what:
        results += [judge(target, steps[int(target.at.split(" ")[0])]) for target in step_targets()]
    raw["kernels"] = [{"ours": o.page, "peers": p.page} for o, p in kernels]
    raw["steps"] = {m: [{"ours": o.page, "peers": p.page} for o, p in pairs] for m, pairs in steps.items()}
    return results, raw, problems


# ── made-up figures ──


def made_up_seconds(seconds: float) -> dict:
    return {"median": seconds, "least": seconds, "lower_quartile": seconds, "upper_quartile": seconds, "samples": 5}


def made_up(what: str) -> dict:
    """A page with the keys of schema 1, in which every time is a millisecond."""
    rows = []

    def add(operation, kernel, tokens, shape, model=MODEL, flop=1e9, moved=1e6):
        rows.append({"operation": operation, "kernel": kernel, "model": model, "tokens": tokens, "shape": shape,
                     "seconds": made_up_seconds(1e-3), "flop": flop, "bytes": moved, "flops": flop / 1e-3,
                     "bytes_per_second": moved / 1e-3})

    if what == "kernels":
        add("nf4-dequantise", None, 0, "8192×2048")
        for m in sorted({*FUSED_TOKENS, *PLAIN_TOKENS, *LORA_TOKENS}):
            for group in groups(SIZES):
                shape = f"{group['name']} [{m}×{group['inputs']}]·[{'+'.join(map(str, group['outputs']))}]"
                add("linear-without-lora", None, m, shape)
                add(PLAIN, None, m, shape)
                add("linear", "gemm_nf4_nt_64x64", m, shape)
                add("input-gradient", "gemm_nf4_nn_64x64", m, shape)
            add("attention", None, m, f"1 × {m}, 32 heads of 64, 8 of keys")
            add("attention-backward", None, m, f"1 × {m}, 32 heads of 64, 8 of keys")
    elif what == "cube":
        add(PLAIN, None, CUBE, f"{CUBE_GROUP} [{CUBE}×{CUBE}]·[{CUBE}]", model=CUBE_MODEL)
    steps = [{"model": MODEL, "tokens": m, "recompute": again, "seconds": made_up_seconds(0.9), "memory_bytes": 1 << 30,
              "update_seconds": made_up_seconds(0.1)} for m in STEP_TOKENS for again in (True, False)] if "step" in what else []
    return {"schema": 1, "stand_in": None, "gpu": {"name": "made up", "mma_flops": 2e12, "copy_bytes_per_second": 2e9},
            "kernels": rows, "steps": steps}


def made_up_peer(what: str, tokens: int) -> dict:
    about = {"device": "made up", "versions": {}}
    if what == "step":
        return about | {"tokens": tokens, "seconds": made_up_seconds(1.0), "memory": {"allocated": 2 << 30, "reserved": 3 << 30}}
    names = [("dequantise", 0)] + [(n, m) for m in FUSED_TOKENS for n in ("dequantise-matmul", "dequantise-gradient", "gemm-4bit")]
    names += [(n, m) for m in PLAIN_TOKENS for n in ("matmul", "attention", "attention-backward")]
    return about | {"rows": [{"what": n, "group": "", "tokens": m, "seconds": made_up_seconds(1e-3)} for n, m in names]}


# ── what is printed ──


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def print_table(results: list[Result]) -> None:
    print("| target | at | ours | theirs | unit | ratio | (range) | first | then | verdict |")
    print("|---|---|--:|--:|---|--:|---|--:|--:|---|")
    for r in results:
        ratio = f"{r.ratio:.2f} | {r.least:.2f} – {r.most:.2f}" if r.ratio is not None else "– | "
        sign = "≤" if r.then < r.first else "≥"
        print(f"| {r.name} | {r.at} | {figure(r.ours)} | {figure(r.theirs)} | {r.unit} | {ratio} | {sign} {r.first:g} | "
              f"{sign} {r.then:g} | {r.verdict} |")


def missing_packages(python: str) -> list[str]:
    code = f"import importlib.util as u; print(*[p for p in {PACKAGES!r} if u.find_spec(p) is None])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.split() if done.returncode == 0 else list(PACKAGES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finetuned", type=Path, help="the release binary")
    parser.add_argument("--cubins", type=Path, help="folder of cubins, where NVRTC is not at hand")
    parser.add_argument("--python", default=sys.executable, help="Python that has torch, bitsandbytes, peft and transformers")
    parser.add_argument("--what", type=lambda s: s.split(","), default=["kernels", "step"])
    parser.add_argument("--alone", action="store_true", help="no peers: only the targets that need none")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=float, default=540, help="seconds; what does not fit is not measured")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--peers", action="store_true", help="with --dry-run: run the peers, tiny, on the CPU")
    options = parser.parse_args()
    if wrong := set(options.what) - {"kernels", "step"}:
        parser.error(f"--what {','.join(sorted(wrong))}: kernels and step are what there is")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not options.dry_run and options.finetuned is None:
        parser.error("--finetuned names the program, --dry-run does without")
    if options.alone:
        options.what = ["kernels"]
    elif not options.dry_run or options.peers:
        if missing := missing_packages(options.python):
            print(f"SKIPPED: {options.python} has no {', '.join(missing)}", file=sys.stderr)
            return MISSING
    with tempfile.TemporaryDirectory() as temporary:
        results, raw, problems = measure(Runner(options, Path(temporary)))
    if options.dry_run:
        print("DRY RUN: no figure is a speed\n")
    pairs = raw["kernels"] + [pair for of in raw["steps"].values() for pair in of]
    device = next((pair["ours"]["gpu"]["name"] for pair in pairs), "no device")
    versions = next((pair["peers"]["versions"] for pair in pairs if pair["peers"]), {})
    print(", ".join([device, f"rounds: {options.rounds}", *(f"{k} {v}" for k, v in versions.items())]) + "\n")
    print_table(results)
    for problem in problems:
        print(f"\nnot measured: {problem}")
    if options.json:
        options.json.write_text(json.dumps({"dry_run": options.dry_run, "results": [asdict(r) for r in results],
                                            "problems": problems, "measurements": raw}, indent=1) + "\n")
    return 1 if problems or any(r.ratio is None for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
