#!/usr/bin/env python3
"""What can be counted of the CUDA kernels without a GPU: registers, and how the main loop spends its instructions.

    sass.py [--arch 87 --arch 90] [--kernel PATTERN...] [--markdown | --json] [--kernels DIR] [--nvrtc FILE] [--nvdisasm FILE]

Every kernel is compiled with NVRTC, with the options of cuda/src/source.rs, and disassembled. Both tools come without a
CUDA toolkit:

    pip install --no-deps --target TOOLS nvidia-cuda-nvrtc-cu12==12.6.85 nvidia-cuda-nvdisasm==13.5.37
    FINETUNED_NVRTC=$(find TOOLS -name libnvrtc.so.12) FINETUNED_NVDISASM=$(find TOOLS -name nvdisasm -type f) sass.py --markdown

Main loop: of the innermost loops that have tensor-core instructions the one with most of them; where no loop has any, the
longest innermost one that reads memory. Of its ways round, the one with most HMMA, then most asynchronous copies, then most
reads of shared memory and of global memory, then fewest instructions is counted: what happens while a tile is neither the
last one nor masked. Where copies are asked for in a loop around it (`attention_dq_*`), they are not in its figures. In
`attention_dkv_*` a half of the warps does what the other half jumps over: the mean of doing both and neither is counted.

Clocks of an SM of Orin (sm_87) for one trip of one block of W warps, were each resource alone:

    tensor  2 · HMMA.16816 · W   1,024 FMA a clock in bf16
    issue   instructions · W / 4   four schedulers, an instruction a clock each
    shared  bytes / 128          ldmatrix, lds, sts and what cp.async writes, without bank conflicts; a shuffle 1
    alu     ALU · W / 2          64 lanes: integer, logic, compares, conversions to bf16; IMAD has another 64
    mufu    MUFU · 2 · W         16 lanes

Rates: CUDA C++ Programming Guide, "Arithmetic Instructions", column 8.6, which has the same SM. The largest is the binding
resource, and tensor / largest is the share of the tensor rate that no schedule can exceed. Latency, the second-level cache
and what is outside of the loop are not in it: it is an upper bound. For loops that read memory themselves `memory` is what
their loads and stores take at the data sheet's 204.8 GB/s, were none of it in a cache. `latency` is how many clocks of that
rate the bytes in flight cover."""
import argparse
import ctypes
import fnmatch
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent

# Bytes a clock and SM of an Orin's memory: 204.8 GB/s, 16 SMs, 1.3 GHz.
MEMORY_BYTES_A_CLOCK = 204.8e9 / 16 / 1.3e9

CLASSES = {
    "hmma": "HMMA IMMA",
    "ldsm": "LDSM",
    "ldgsts": "LDGSTS",
    "shared": "LDS STS ATOMS",
    "global": "LDG STG LD ST RED ATOM ATOMG",
    "local": "LDL STL",
    "fp32": "FFMA FADD FMUL FFMA32I FADD32I FMUL32I FSWZADD HFMA2 HADD2 HMUL2",
    "imad": "IMAD IMAD32I IMUL",
    "mufu": "MUFU F2I I2F F2F FRND POPC FLO BREV",
    "shuffle": "SHFL",
    "control": "BRA BRX JMP BAR BSSY BSYNC BREAK WARPSYNC DEPBAR LDGDEPBAR NOP EXIT RET CALL S2R CS2R S2UR R2UR BMOV "
               "MEMBAR ERRBAR CCTL YIELD LDC NANOSLEEP VOTE MATCH",
}
# Kernels whose warps have one of two roles, half of them each.
TWO_ROLES = "attention_dkv_*"
CLASS_OF = {name: group for group, names in CLASSES.items() for name in names.split()}


def class_of(name: str) -> str:
    """Of a mnemonic without its modifiers."""
    if name in CLASS_OF:
        return CLASS_OF[name]
    return "uniform" if name.startswith("U") else "alu"


@dataclass
class Instruction:
    address: int
    predicate: str  # "@!P0", or nothing
    mnemonic: str  # with its modifiers
    operands: str

    @property
    def name(self) -> str:
        return self.mnemonic.split(".")[0]

    @property
    def group(self) -> str:
        # Three loads that are never executed stand before the first copy of a run: they take a slot and nothing else.
        return "control" if self.predicate == "@!PT" else class_of(self.name)

    def bytes(self) -> int:
        """That a warp moves with it."""
        parts = self.mnemonic.split(".")
        if self.name == "LDSM":
            return 128 * int(parts[-1]) if parts[-1].isdigit() else 128
        wide = next((int(p) for p in parts if p in ("128", "64")), None)
        narrow = {"U8": 1, "S8": 1, "U16": 2, "S16": 2}
        return 32 * (wide // 8 if wide else next((narrow[p] for p in parts if p in narrow), 4))


@dataclass
class Kernel:
    """A row of cuda/src/kernels.rs, with what the cubin says."""

    name: str
    file: str
    threads: int
    dynamic_shared: int
    registers: int = 0
    static_shared: int = 0
    stack: int = 0

    @property
    def warps(self) -> int:
        return -(-self.threads // 32)

    def blocks_sm87(self) -> int:
        """As `occupancy_sm87` of cuda/src/kernels.rs."""
        a_warp = -(-max(self.registers, 1) * 32 // 256) * 256
        shared = -(-(self.static_shared + self.dynamic_shared + 1024) // 128) * 128
        return min(65536 // (a_warp * self.warps), 164 * 1024 // shared, 1536 // self.threads, 16)


@dataclass
class Loop:
    """A trip of the main loop, of a warp."""

    instructions: float
    in_all: int  # with the ways that were not taken
    mix: dict[str, float]
    shared_bytes: float
    async_bytes: float
    global_bytes: float
    waits_for_all_but: int | None  # groups of cp.async that may be in flight behind the wait
    clocks: dict[str, float] = field(default_factory=dict)  # of an SM, for a block

    def bound(self, warps: int) -> None:
        mix = Counter(self.mix)
        self.clocks = {
            "tensor": 2.0 * mix["hmma"] * warps,
            "issue": self.instructions * warps / 4,
            "shared": (self.shared_bytes / 128 + mix["shuffle"]) * warps,
            "alu": max(mix["alu"], mix["imad"]) * warps / 2,
            "mufu": 2.0 * mix["mufu"] * warps,
        }

    @property
    def binding(self) -> str:
        """Ties go to the tensor cores."""
        return max(self.clocks, key=lambda name: (self.clocks[name], name == "tensor"))

    @property
    def ceiling(self) -> float:
        """Share of the tensor rate that cannot be exceeded."""
        return self.clocks["tensor"] / max(max(self.clocks.values()), 1e-9)

    @property
    def hmma_share(self) -> float:
        """Of the issue slots."""
        return self.mix.get("hmma", 0) / max(self.instructions, 1)


# ── compiling ──


def quoted(text: str, name: str) -> list[str]:
    """The strings of a list in Rust."""
    found = re.search(rf"pub const {name}: [^=]*=\s*(?:sources!|&)\[(.*?)\]", text, re.S)
    if not found:
        raise SystemExit(f"cuda/src/source.rs has no list {name}: this script reads it there")
    return re.findall(r'"([^"]+)"', found.group(1))


def table(folder: Path) -> list[Kernel]:
    """The rows of cuda/src/kernels.rs."""
    text = (folder.parent / "src/kernels.rs").read_text()
    kernels, file = [], ""
    for line in text.splitlines():
        if heading := re.match(r'\s+"(\w+\.cu)" \{', line):
            file = heading.group(1)
        elif row := re.match(r"\s+(\w+) (\d+) threads, (\d+) shared, \d+ registers, \d+ blocks;", line):
            kernels.append(Kernel(row.group(1), file, int(row.group(2)), int(row.group(3))))
    if not kernels:
        raise SystemExit("cuda/src/kernels.rs has no row that can be read")
    return kernels


class Nvrtc:
    """The compiler as a library."""

    def __init__(self, path: str) -> None:
        try:
            self.library = ctypes.CDLL(path)
        except OSError as error:
            raise SystemExit(f"no NVRTC: {error}\nhelp: FINETUNED_NVRTC or --nvrtc names the library; "
                             "pip install nvidia-cuda-nvrtc-cu12 brings one") from None

    def call(self, name: str, *arguments) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} says {code}")

    def version(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def text(self, program, what: str) -> bytes:
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def compile(self, folder: Path, file: str, headers: list[str], options: list[str]) -> bytes:
        def array(texts):
            return (ctypes.c_char_p * len(texts))(*texts)

        program = ctypes.c_void_p()
        self.call("nvrtcCreateProgram", ctypes.byref(program), (folder / file).read_bytes(), file.encode(), len(headers),
                  array([(folder / h).read_bytes() for h in headers]), array([h.encode() for h in headers]))
        code = self.library.nvrtcCompileProgram(program, len(options), array([o.encode() for o in options]))
        if code:
            raise SystemExit(f"{file} does not compile:\n{self.text(program, 'ProgramLog').decode(errors='replace')}")
        return self.text(program, "CUBIN")


def read_usage(cubin: bytes, kernels: dict[str, Kernel]) -> None:
    """Registers, static shared memory and stack, as cuda/src/cubin.rs reads them."""
    offset, size, count, names_at = (struct.unpack_from("<Q", cubin, 40)[0], *struct.unpack_from("<HHH", cubin, 58))
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + i * size) for i in range(count)]

    def text(at: int) -> str:
        return cubin[at:cubin.index(b"\0", at)].decode()

    names = [text(headers[names_at][4] + h[0]) for h in headers]
    symbols = next(h for h in headers if h[1] == 2)

    def symbol(index: int) -> str:
        return text(headers[symbols[6]][4] + struct.unpack_from("<I", cubin, symbols[4] + 24 * index)[0])

    for name, header in zip(names, headers):
        if name.startswith(".nv.shared.") and (kernel := kernels.get(name[len(".nv.shared."):])):
            kernel.static_shared = header[5]
        if name != ".nv.info":
            continue
        at, end = header[4], header[4] + header[5]
        while at < end:
            form, attribute, length = struct.unpack_from("<BBH", cubin, at)
            if form == 4 and attribute in (0x11, 0x2f):
                index, value = struct.unpack_from("<II", cubin, at + 4)
                if kernel := kernels.get(symbol(index)):
                    setattr(kernel, "stack" if attribute == 0x11 else "registers", value)
            at += 4 + (length if form == 4 else 0)


# ── loops ──

CODE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")


def functions(listing: str) -> dict[str, tuple[list[Instruction], dict[str, int]]]:
    """By name: instructions, and the number of the one that a label stands before."""
    found, code, labels = {}, [], {}
    for line in listing.splitlines():
        if start := re.match(r"\.text\.(\w+):", line):
            code, labels = [], {}
            found[start.group(1)] = (code, labels)
        elif label := re.match(r"\s*(\.L_\w+):", line):
            labels[label.group(1)] = len(code)
        elif instruction := CODE.match(line):
            address, predicate, mnemonic, operands = instruction.groups()
            code.append(Instruction(int(address, 16), predicate or "", mnemonic, operands))
    return found


def target(instruction: Instruction, labels: dict[str, int]) -> int | None:
    if instruction.name != "BRA":
        return None
    name = re.search(r"\((\.L_\w+)\)", instruction.operands)
    return labels.get(name.group(1)) if name else None


def main_loop(code: list[Instruction], labels: dict[str, int]) -> tuple[int, int] | None:
    """First and last instruction."""
    loops = {}
    for i, instruction in enumerate(code):
        to = target(instruction, labels)
        # The branch to itself behind the end is no loop.
        if to is not None and to < i:
            loops[to] = max(i, loops.get(to, 0))
    spans = list(loops.items())

    def count(span, groups):
        return sum(code[i].group in groups for i in range(span[0], span[1] + 1))

    def innermost(groups):
        of = [s for s in spans if count(s, groups)]
        return [s for s in of if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in of)]

    if tensor := innermost({"hmma"}):
        return max(tensor, key=lambda s: (count(s, {"hmma"}), s[0] - s[1]))
    if memory := innermost({"global", "shared", "ldgsts"}):
        return max(memory, key=lambda s: s[1] - s[0])
    return None


def steady(code: list[Instruction], labels: dict[str, int], first: int, last: int, reads: int = 1) -> list[Instruction]:
    """The way round that the head of this file describes, or with `reads` −1 the one with fewest reads. Branches backwards are
    not followed."""
    def counts(i: Instruction) -> tuple[int, ...]:
        return (i.group == "hmma", i.group == "ldgsts", reads * (i.name in ("LDS", "LDSM") and i.group != "control"),
                reads * (i.name == "LDG"), -1)

    best: dict[int, tuple] = {}  # from an instruction to the end: what is on that way, and the next instruction
    for i in range(last, first - 1, -1):
        here = code[i]
        ways = []
        if i == last:
            ways.append(((0, 0, 0, 0, 0), None))
        else:
            to = target(here, labels)
            always = here.name == "BRA" and not here.predicate and not re.match(r"\s*!?U?P\d", here.operands)
            if to is not None and to > i and to in best:
                ways.append((best[to][0], to))
            if not (always or here.name in ("EXIT", "RET")) and i + 1 in best:
                ways.append((best[i + 1][0], i + 1))
        if not ways:
            continue  # out of the loop
        after, following = max(ways, key=lambda way: way[0])
        best[i] = (tuple(a + b for a, b in zip(after, counts(here))), following)
    way, at = [], first
    while at is not None and at in best:
        way.append(code[at])
        at = best[at][1]
    return way


def look(kernel: Kernel, code: list[Instruction], labels: dict[str, int]) -> Loop | None:
    span = main_loop(code, labels)
    if span is None:
        return None
    ways = [steady(code, labels, *span, reads) for reads in ((1, -1) if fnmatch.fnmatch(kernel.name, TWO_ROLES) else (1,))]
    share = 1 / len(ways)
    all_of = [i for way in ways for i in way]
    waits = [re.findall(r"0x[0-9a-f]+", i.operands) for i in all_of if i.name == "DEPBAR" and "SB0" in i.operands]
    allowed = [int(numbers[0], 16) for numbers in waits if numbers]

    def moved(*of: str) -> float:
        return share * sum(i.bytes() for i in all_of if i.group in of)

    loop = Loop(share * len(all_of), span[1] - span[0] + 1, {k: share * n for k, n in Counter(i.group for i in all_of).items()},
                moved("ldsm", "ldgsts", "shared"), moved("ldgsts"), moved("global"), min(allowed) if allowed else None)
    loop.bound(kernel.warps)
    return loop


# ── what is printed ──


def in_flight(kernel: Kernel, loop: Loop) -> float | None:
    """Bytes of cp.async of a block behind the wait, at least: the groups that may be, and the one that is asked for next."""
    if not loop.async_bytes or loop.waits_for_all_but is None:
        return None
    return (loop.waits_for_all_but + 1) * loop.async_bytes * kernel.warps


def mix_text(loop: Loop) -> str:
    m = Counter(loop.mix)
    parts = [m["hmma"], m["ldsm"], m["ldgsts"], m["shared"], m["global"], m["alu"] + m["imad"], m["fp32"]]
    return " / ".join(f"{part:.0f}" for part in (*parts, loop.instructions - sum(parts)))


def markdown(rows: list[dict]) -> None:
    print("| kernel | registers (" + ", ".join(f"sm_{a}" for a in rows[0]["registers"]) + ") | blocks | HMMA / LDSM / LDGSTS / "
          "LDS, STS / LDG, STG / integer / FP32 / other | HMMA of slots | tensor / issue / shared / ALU / MUFU | binding | "
          "at most | KiB in flight |")
    print("|---|---|--:|---|--:|---|---|--:|--:|")
    for row in rows:
        kernel, loop = row["kernel"], row["loop"]
        if loop is None or not loop.mix.get("hmma"):
            continue
        flight = in_flight(kernel, loop)
        flight = f"{flight * kernel.blocks_sm87() / 1024:.0f}" if flight else "–"
        print(f"| `{kernel.name}` | {', '.join(str(r) for r in row['registers'].values())} | {kernel.blocks_sm87()} | "
              f"{mix_text(loop)} | {100 * loop.hmma_share:.0f} % | "
              f"{' / '.join(f'{loop.clocks[c]:.0f}' for c in ('tensor', 'issue', 'shared', 'alu', 'mufu'))} | {loop.binding} | "
              f"{100 * loop.ceiling:.0f} % | {flight} |")


def plain(rows: list[dict], architecture: int) -> None:
    print(f"\nsm_{architecture}\n{'kernel':<28} {'regs':>4} {'stack':>5} {'blk':>3} {'loop':>5} {'(all)':>6} "
          f"{'HMMA/LDSM/LDGSTS/S/G/int/FP32/other':<46} {'HMMA%':>5} {'tensor':>6} {'issue':>6} {'shared':>6} {'ALU':>6} "
          f"{'MUFU':>5} {'memory':>6} {'binding':>7} {'most%':>5} {'KiB/SM':>6} {'latency':>7}")
    for row in rows:
        kernel, loop = row["kernel"], row["loop"]
        line = f"{kernel.name:<28} {kernel.registers:>4} {kernel.stack:>5} {kernel.blocks_sm87():>3}"
        if loop is None:
            print(line + "  no loop")
            continue
        clocks = " ".join(f"{loop.clocks[c]:>6.0f}" for c in ("tensor", "issue", "shared", "alu")) + f" {loop.clocks['mufu']:>5.0f}"
        clocks += f" {loop.global_bytes * kernel.warps / MEMORY_BYTES_A_CLOCK:>6.0f}"
        flight = (in_flight(kernel, loop) or 0) * kernel.blocks_sm87()
        bound = f"{loop.binding:>7} {100 * loop.ceiling:>5.0f}" if loop.mix.get("hmma") else f"{'':>7} {'':>5}"
        print(f"{line} {loop.instructions:>5.0f} {loop.in_all:>6} {mix_text(loop):<46} {100 * loop.hmma_share:>5.1f} {clocks} "
              f"{bound} {flight / 1024:>6.1f} {flight / MEMORY_BYTES_A_CLOCK:>7.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", help="may be given several times (default: 87 and 90)")
    parser.add_argument("--kernel", nargs="+", default=["*"], help="names, with * and ?")
    parser.add_argument("--kernels", type=Path, default=REPOSITORY / "cuda/kernels", help="the folder with the sources")
    parser.add_argument("--nvrtc", default=os.environ.get("FINETUNED_NVRTC", "libnvrtc.so.12"))
    parser.add_argument("--nvdisasm", default=os.environ.get("FINETUNED_NVDISASM") or shutil.which("nvdisasm"))
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="the table of docs/kernels.md: tensor-core kernels on sm_87")
    form.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.nvdisasm:
        parser.error("no nvdisasm: FINETUNED_NVDISASM or --nvdisasm names it; pip install nvidia-cuda-nvdisasm brings one")
    architectures = options.arch or [87, 90]
    source = (options.kernels.parent / "src/source.rs").read_text()
    headers, flags = quoted(source, "HEADERS"), quoted(source, "OPTIONS")
    compiler = Nvrtc(options.nvrtc)
    wanted = [k for k in table(options.kernels) if any(fnmatch.fnmatch(k.name, p) for p in options.kernel)]
    if not wanted:
        parser.error(f"no kernel is called {' or '.join(options.kernel)}")
    rows: dict[int, list[dict]] = {}
    for architecture in architectures:
        rows[architecture] = []
        for file in dict.fromkeys(k.file for k in wanted):
            cubin = compiler.compile(options.kernels, file, headers, [f"--gpu-architecture=sm_{architecture}", *flags])
            kernels = {k.name: Kernel(k.name, k.file, k.threads, k.dynamic_shared) for k in wanted if k.file == file}
            read_usage(cubin, kernels)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as output:
                output.write(cubin)
                output.flush()
                listing = subprocess.run([options.nvdisasm, "-c", output.name], check=True, capture_output=True, text=True)
            code = functions(listing.stdout)
            for name, kernel in kernels.items():
                if name not in code:
                    raise SystemExit(f"{file} for sm_{architecture} has no {name}")
                rows[architecture].append({"kernel": kernel, "loop": look(kernel, *code[name])})
    for of in rows.values():
        for i, row in enumerate(of):
            row["registers"] = {a: rows[a][i]["kernel"].registers for a in architectures}
    if options.json:
        print(json.dumps({"nvrtc": compiler.version(), "kernels": [
            {"sm": a, **asdict(row["kernel"]), "blocks_sm87": row["kernel"].blocks_sm87(),
             "loop": row["loop"] and asdict(row["loop"]) | {"binding": row["loop"].binding, "ceiling": row["loop"].ceiling}}
            for a in architectures for row in rows[a]]}, indent=1))
        return
    if options.markdown:
        markdown(rows[architectures[0]])
        return
    print(f"NVRTC {compiler.version()}; derived, not measured")
    for architecture in architectures:
        plain(rows[architecture], architecture)


if __name__ == "__main__":
    main()
