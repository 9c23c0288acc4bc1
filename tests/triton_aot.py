"""Compile Triton kernels for GPUs that are not here and look at what came out; triton's wheel brings the
assembler.

Run by tests in a process of its own, without the interpreter: `python tests/triton_aot.py SM [FORMAT ...]`
prints one JSON line a kernel. Shows that the kernels compile, what shared memory a block takes, and which
instructions they are made of; not their speed.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    "records": "*i32", "pairs": "*i32", "n_records": "*i32", "arena": "*u8", "weights": "*u8", "ids": "*i32",
    "table": "*i32", "slot_bytes": "i32", "top_k": "i32", "n_pairs": "i32",
}  # fmt: skip


def compile_kernel(
    kernel: Any, sm: int, constants: dict[str, Any], types: dict[str, str], warps: int, stages: int
) -> Any:
    """types: of the arguments that are neither constants nor in POINTERS."""
    types = POINTERS | types
    signature = {a: "constexpr" if a in constants else types[a] for a in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(kernel.arg_names)
        if signature[a][0] == "*" or a == "slot_bytes"
    }
    values = {(kernel.arg_names.index(a),): v for a, v in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps, "num_stages": stages}
    )


def examine(compiled: Any) -> dict[str, Any]:
    """What the assembly is made of. spilled: bytes of registers that went to memory."""
    ptx = compiled.asm["ptx"]

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    return {
        "wgmma": count(r"wgmma\.mma_async"),
        "mma": count(r"mma\.sync"),
        "copies": count(r"cp\.async\.c[ag]"),
        "tma": count(r"cp\.async\.bulk\.tensor"),
        "byte_loads": count(r"ld\.global[^;]*\.[bsu]8"),
        "shared_kib": compiled.metadata.shared / 1024,
        "spilled": _stack_bytes(compiled.asm["cubin"]),
    }


def _stack_bytes(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", usage)[-1])


def prefill_kernels(sm: int, formats: list[str]) -> dict[str, Any]:
    """Each product of a prefill, with the tile shapes that an untuned GPU of this kind gets."""
    from kernels.expert_slots import BITS, FLOATS, FORMATS, slot_layout
    from kernels.triton_grouped import packed_down, packed_up, rows_down, rows_up
    from kernels.triton_moe import fallback

    elements = {"bf16": "bf16", "f16": "fp16", "f32": "fp32"}
    compiled = {}
    for format in formats or FORMATS:
        for rows in (4, 200):
            config = fallback(format, rows, sm)
            shape = {"D": 2048, "F": 768, "LD_H": 768, "BM": config["tile_rows"], "INTERPRET": False}
            at, tiled = slot_layout(format, 2048, 768), format in BITS
            for name in ("up", "down"):
                product = config[name]
                constants = shape | {"BN": product["columns"], "BK": product["depth"]}
                element = elements.get(format, "bf16")
                types = {"x": f"*{element}", "h": f"*{element}", "h_box": f"*{element}", "products": "*fp32"}
                if format in FLOATS:
                    constants |= {"TMA": config["tma"], "SWAP": product["swap"]}
                    kernel = rows_up if name == "up" else rows_down
                    if config["tma"]:
                        box = f"{product['columns']},{product['depth']}]>"
                        box = f"2,{box}" if name == "up" else box
                        types["weights"] = f"tensordesc<{element}[1,{box}"
                        if name == "down":
                            tall = config["tile_rows"]
                            types["h_box"] = f"tensordesc<{element}[{tall},{product['depth']}]>"
                else:
                    constants |= {"FORMAT": format, "WHOLE": product["swap"]}
                    kernel = packed_up if name == "up" else packed_down
                    if name == "up":
                        constants |= {"UP": at.up, "UP_SCALES": at.up if tiled else at.up_scales}
                        constants["GATE_SCALES"] = at.gate if tiled else at.gate_scales
                    else:
                        constants |= {"DOWN": at.down, "DOWN_SCALES": at.down if tiled else at.down_scales}
                if name == "up":
                    constants |= {"LD_X": 2048, "ACTIVATION": "silu"}
                compiled[f"{format} {name} {config['tile_rows']}"] = compile_kernel(
                    kernel, sm, constants, types, product["warps"], product["stages"]
                )
    return compiled


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    for name, compiled in prefill_kernels(int(sys.argv[1]), sys.argv[2:]).items():
        print(json.dumps({"kernel": name} | examine(compiled)), flush=True)
