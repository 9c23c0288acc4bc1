"""What the compiler makes of the decode kernels, for three generations of GPUs; none is needed.

The kernels are compiled in a process of its own: in this one they may be the interpreter's. Run as a program
this file prints what it found as JSON.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}  # that one block may use
REGISTERS = {1: 255, 2: 255, 4: 255, 8: 255, 16: 128}  # that a thread of so many warps may use

POINTERS = {
    "base": "*u8", "arena": "*u8", "slots": "*i32", "ids": "*i32", "table": "*i32", "missed": "*i32",
    "keys": "*fp16", "values": "*fp16", "q": "*fp16", "q_out": "*fp16",
    "positions": "*i32", "pages": "*i32", "most_pages": "i32", "splits": "i32", "window": "i32",
    "eps": "fp32", "clip": "fp32", "rows": "i32", "tokens": "i32", "pairs": "i32", "layer": "i32",
    "stride": "i64", "ram": "*u8", "ram_stride": "i64", "first_in_ram": "i32",
}  # fmt: skip


def kernels(pdl: bool) -> dict[str, tuple[str, dict[str, Any], int]]:
    """Name -> kernel, constants, warps: a Qwen3-30B-A3B layer, in the shapes that are launched."""
    from kernels import triton_decode as module

    # Where weights are read from matters to loads.
    qwen = {"D": 2048, "F": 768, "SHARED": 0, "IN_RAM": True, "PDL": pdl}
    dense = {"COLUMNS": 2048, "PADDED": 2048, "NORM": True, "BIAS": False, "RESIDUAL": False}
    dense |= {"PDL": pdl}
    found: dict[str, tuple[str, dict[str, Any], int]] = {}
    for format, bits in (("int4", 4), ("int8", 8)):
        up, down = (module.guessed_shape(k, format, n) for k, n in (("up", 2048), ("down", 768)))
        shape = module.guessed_shape("linear", format, 2048)
        shared = {**qwen, "BITS": bits, "EXACT": False}
        constants = {**shared, "K": 8, "C": up.columns, "RUN": up.run, "ACTIVATION": "silu"}
        found[f"up {format}"] = ("_up_tiles", constants, up.warps)
        constants = {**shared, "C": down.columns, "RUN": down.run, "R": down.rows, "OFFSET": 4096}
        found[f"down {format}"] = ("_down_tiles", constants, down.warps)
        constants = {**dense, "R": shape.rows, "C": shape.columns, "RUN": shape.run}
        constants |= {"BITS": bits, "EXACT": False}
        found[f"linear {format}"] = ("_linear_tiles", constants, shape.warps)
    for format in ("bf16", "fp8", "mxfp4"):
        up, down = (module.guessed_shape(k, format, n) for k, n in (("up", 2048), ("down", 768)))
        constants = {**qwen, "FORMAT": format, "ACTIVATION": "silu", "K": 8, "C": up.columns, "R": up.rows}
        constants |= {"UP": 4096, "GATE_SCALES": 8192, "UP_SCALES": 8192}
        found[f"up {format}"] = ("_up_rows", constants, up.warps)
        constants = {**qwen, "DOWN": 4096, "DOWN_SCALES": 8192, "FORMAT": format}
        constants |= {"C": down.columns, "R": down.rows}
        found[f"down {format}"] = ("_down_rows", constants, down.warps)
    for name in list(found):
        kernel, constants, warps = found[name]
        if "SHARED" in constants:
            found[f"{name} shared"] = (kernel, {**constants, "SHARED": 64}, warps)
    shape = module.guessed_shape("linear", "bf16", 2048)
    constants = {**dense, "R": shape.rows, "C": shape.columns, "FORMAT": "bf16"}
    found["linear bf16"] = ("_linear_rows", constants, shape.warps)
    constants = {"E": 128, "D": 2048, "C": 2048, "SAVE": True, "PDL": pdl}
    found["logits"] = ("_store_logits", constants, 4)
    constants = {"E": 128, "K": 8, "P": 128, "NORMALISE": True, "PDL": pdl}
    found["choice"] = ("_choose_experts", constants, 4)
    found["combine"] = ("_combine", {"D": 2048, "K": 8, "BLOCK": 256, "PDL": pdl}, 2)
    constants = {"H": 32, "G": 4, "d": 128, "BLOCK": 128, "FULL": 4096, "QK_NORM": "head", "CLIP": False}
    found["rope"] = ("_rope_and_store", {**constants, "PAGE": 64, "PDL": pdl}, 1)
    for d, block in ((64, 64), (128, 128)):
        constants = {"H": 32, "d": d, "BLOCK": block, "SPLIT": 128, "PDL": pdl}
        found[f"join {d}"] = ("_join_rows", {**constants, "JOINED": 32}, 4)
        constants |= {"G": 4, "SCALE": 0.1, "QUERIES": 16, "STEP": 64, "STAGES": 3, "UNSEEN": -1e30}
        found[f"attend {d}"] = ("_attend_splits", {**constants, "PAGE": 64}, 4)
    return found


def compile_all(sm: int) -> dict[str, dict[str, Any]]:
    """Name -> what the PTX and the machine code hold."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels import triton_attention, triton_decode, triton_rope, triton_router

    found = {}
    for name, (kernel_name, constants, warps) in kernels(pdl=sm >= 90).items():
        modules = (triton_attention, triton_decode, triton_rope, triton_router)
        kernel = next(getattr(module, kernel_name) for module in modules if hasattr(module, kernel_name))
        signature = {
            argument: "constexpr" if argument in constants else POINTERS.get(argument, "*fp32")
            for argument in kernel.arg_names
        }
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, argument in enumerate(kernel.arg_names)
            if signature[argument][0] == "*" or argument in ("stride", "ram_stride", "rows")
        }
        values = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps})
        ptx = compiled.asm["ptx"]
        found[name] = {
            "warps": warps,
            "shared": compiled.metadata.shared,
            "loads": {n: len(re.findall(rf"ld\.global[^;]*\.{n}\b", ptx)) for n in ("v4", "v2", "b8", "u8")},
            "dp4a": ptx.count("dp4a"),
            "copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
            **_resources(compiled.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin"),
        }
    return found


def _resources(cubin: bytes, tools: Path) -> dict[str, int]:
    """Registers, and bytes of the stack, which spilled registers would need."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [str(tools / "cuobjdump"), "--dump-resource-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage, text
    return {"registers": int(usage[1]), "stack": int(usage[2])}


@cache
def compiled(sm: int) -> dict[str, dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, str(sm)], env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("sm", SHARED_BYTES)
def test_every_kernel_compiles_within_the_limits_and_spills_nothing(sm: int) -> None:
    for name, found in compiled(sm).items():
        assert found["shared"] <= SHARED_BYTES[sm], name
        spilled = 16 if name == "up int4 shared" else 0  # bytes a thread: its time is PCIe's
        assert found["registers"] <= REGISTERS[found["warps"]] and found["stack"] <= spilled, (name, found)


@pytest.mark.parametrize("sm", SHARED_BYTES)
def test_weights_are_read_128_bits_at_a_time_and_no_byte_alone(sm: int) -> None:
    for name, found in compiled(sm).items():
        if name.split()[0] in ("up", "down", "linear"):
            assert found["loads"]["v4"], (name, found)
            assert not found["loads"]["b8"] + found["loads"]["u8"], (name, found)


@pytest.mark.parametrize("sm", SHARED_BYTES)
def test_packed_weights_meet_activations_four_at_a_time(sm: int) -> None:
    assert all(found["dp4a"] for name, found in compiled(sm).items() if "int" in name)


@pytest.mark.parametrize("sm", SHARED_BYTES)
def test_all_keys_and_values_of_a_split_are_copied_at_once_16_bytes_a_time(sm: int) -> None:
    for d in (64, 128):
        # Of 4 warps; the loop holds each of them once more, for rounds that do not come.
        assert compiled(sm)[f"attend {d}"]["copies"] >= 2 * 128 * d * 2 // (16 * 128)


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
