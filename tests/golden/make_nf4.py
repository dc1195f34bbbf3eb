"""Golden values of NF4 quantisation, from bitsandbytes on a CPU.

    pip install torch==2.15.0 bitsandbytes==0.50.2 numpy safetensors
    python make_nf4.py            # writes nf4.safetensors beside itself

Every case is quantised by `bitsandbytes.functional.quantize_4bit`, plain and with double quantisation. Small cases keep
their input and every output. Large ones, which are there for the sum over many blocks, are made from a formula that the
Rust test repeats (`ramp`), and keep only a hash of their codes.

One PyTorch thread: with more, PyTorch cuts a sum of more than 32,768 absmax values into as many parts as there are
threads, and the last bit of the double quantisation's offset depends on the machine.

Dequantised values are computed from the definition, code[i] * absmax[i / 64]. bitsandbytes' own answer is compared with
them wherever its kernel is right: its AVX-512 kernel takes absmax from the wrong block when the number of columns is a
multiple of 16 but not of 64.
"""

import hashlib
import pathlib

import bitsandbytes
import bitsandbytes.functional as bnb
import numpy as np
import torch
from safetensors.numpy import save_file

torch.set_num_threads(1)
tensors = {}


def digest(array):
    return np.frombuffer(hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest(), np.uint8)


def ramp(rows, cols):
    """Pseudo-random values in [-0.5, 0.5) times a row-dependent power of two; exact in float32."""
    i = np.arange(rows * cols, dtype=np.uint64)
    mixed = (i * np.uint64(2654435761)) % np.uint64(1 << 32)
    mixed = (mixed ^ (mixed >> np.uint64(15))) * np.uint64(2246822519) % np.uint64(1 << 32)
    values = (mixed >> np.uint64(8)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)
    scale = np.exp2(-((i // np.uint64(cols)) % np.uint64(7)).astype(np.float32))
    return (values * scale.astype(np.float32)).reshape(rows, cols)


def case(name, weight, keep_all=True):
    weight = torch.as_tensor(weight)
    n = weight.numel()
    if keep_all:
        tensors[f"{name}/values"] = weight.float().numpy()
    else:
        tensors[f"{name}/ramp"] = np.array(weight.shape, np.int32)
    for kind, nested in (("plain", False), ("nested", True)):
        packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
        packed = packed.numpy().reshape(-1)
        out = {"absmax": state.absmax.numpy()}
        absmax = state.absmax.numpy()
        if nested:
            out["nested_absmax"] = state.state2.absmax.numpy()
            out["offset"] = state.offset.numpy().reshape(1)
            absmax = bnb.dequantize_blockwise(state.absmax, state.state2)
            absmax += state.offset
            absmax = absmax.numpy()
        codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[:n]
        values = (state.code.numpy()[codes] * np.repeat(absmax, 64)[:n]).reshape(weight.shape)
        if weight.shape[1] % 64 == 0 or weight.shape[1] % 16 != 0:
            state.dtype = torch.float32
            theirs = bnb.dequantize_4bit(torch.from_numpy(packed).reshape(-1, 1), state).numpy()
            assert values.tobytes() == theirs.tobytes(), (name, kind)
        out["codes"] = packed
        out["dequantized"] = digest(values)
        for part, array in out.items():
            if part == "codes" and not keep_all:
                part, array = "codes_sha256", digest(array)
            if part == "absmax" and not keep_all:
                part, array = "absmax_sha256", digest(array)
            tensors[f"{name}/{kind}/{part}"] = array


generator = torch.Generator().manual_seed(20)


def normal(*shape):
    return torch.randn(shape, generator=generator) * 0.02


case("one_element", normal(1, 1))
case("one_block", normal(1, 64))
case("odd", normal(3, 33))  # 99 elements: a short last block and an unused nibble
case("short_rows", normal(7, 50))
case("columns_172", normal(5, 172))
case("columns_80", normal(8, 80))
case("many_nested_blocks", normal(260, 66))
bf16 = normal(24, 192).bfloat16()
case("bfloat16", bf16)
f16 = normal(24, 192).half()
case("float16", f16)
# A half-precision weight is quantised from its exact float32 value: the same codes and scales.
for half in (bf16, f16):
    for nested in (False, True):
        a, b = (bnb.quantize_4bit(w, blocksize=64, compress_statistics=nested, quant_type="nf4") for w in (half, half.float()))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1].absmax, b[1].absmax)

zeros = normal(6, 96)
zeros[1:3] = 0  # whole blocks of zeros
zeros[5, 64:] = 0
case("zeros", zeros)
case("all_zero", torch.zeros(2, 64))
case("short_zero_block", torch.zeros(1, 70))
case("equal_absmax", torch.full((4, 64), 0.25))  # nothing is left to nest

# Values on the borders between codes, one step of float32 around them, and extreme magnitudes.
table = bnb.get_4bit_type("nf4", device="cpu").numpy()
borders = ((table[:-1] + table[1:]) / np.float32(2)).astype(np.float32)
around = np.concatenate([np.nextafter(borders, np.float32(-2)), borders, np.nextafter(borders, np.float32(2)), table, table[:2]])
edge = np.zeros((4, 64), np.float32)
edge[0, :63], edge[0, 63] = around, 1
edge[1] = edge[0] * np.float32(0.3)
edge[2] = edge[0] * np.float32(1e-41)  # subnormal
edge[3] = edge[0] * np.float32(3e38)
case("borders", edge[:2])
case("extremes", edge)

case("ramp_576", ramp(576, 576), keep_all=False)
case("ramp_1536", ramp(576, 1536), keep_all=False)
case("ramp_tail", ramp(999, 2051), keep_all=False)
case("ramp_large", ramp(2048, 4096), keep_all=False)

tensors["dynamic_map"] = bnb.create_dynamic_map().numpy()
tensors["nf4_codes"] = table
path = pathlib.Path(__file__).parent / "nf4.safetensors"
save_file(tensors, path, {"torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__})
print(f"{path.name}: {path.stat().st_size} bytes")
