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
        "overwritten": overwritten_operands(compiled.asm["cubin"]) if "wgmma" in ptx else 0,
        "spilled": _stack_bytes(compiled.asm["cubin"]),
    }


def _stack_bytes(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", usage)[-1])


def _disassembled(cubin: bytes) -> list[str]:
    """The machine code, an instruction or a label a line."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*(\.L_x_\d+:)|/\*[0-9a-f]{4,}\*/\s+(.*?) ?;", text, re.MULTILINE)
    return [label or instruction for label, instruction in found]


def overwritten_operands(cubin: bytes) -> int:
    """Of innermost loops with asynchronous products (HGMMA): how many instructions write a register that such
    a product still reads, as far as the waits before it say. Looks at two rounds of a loop.
    """
    code = _disassembled(cubin)
    at = {line[:-1]: i for i, line in enumerate(code) if line.endswith(":")}
    loops = []
    for i, line in enumerate(code):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and at[jump[1]] <= i and any("HGMMA" in one for one in code[at[jump[1]] : i]):
            loops.append((at[jump[1]], i))
    innermost = [o for o in loops if not any(o != p and o[0] <= p[0] and p[1] <= o[1] for p in loops)]
    return sum(_overwritten(code[begin : end + 1] * 2) for begin, end in innermost)


def _overwritten(code: list[str]) -> int:
    groups: list[set[int]] = []  # registers of A, of products not waited for
    open_group: set[int] = set()
    found = 0
    for line in code:
        line = re.sub(r"^@!?U?P\w+\s+", "", line)
        if line.startswith("HGMMA"):
            a = re.match(r"HGMMA\S*\s+R\d+,\s*R(\d+),", line)
            open_group |= set(range(int(a[1]), int(a[1]) + 4)) if a else set()
            if "gsb0" in line:
                groups.append(open_group)
                open_group = set()
        elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)", line):
            groups = groups[len(groups) - min(len(groups), int(wait[1], 16)) :]
        elif written := re.match(r"(?!ST|LDGSTS|RED|BAR|R2UR)(\S+)\s+(?:P\d+,\s*)?R(\d+)", line):
            width = 4 if ".128" in written[1] else 2 if ".64" in written[1] or "WIDE" in written[1] else 1
            registers = set(range(int(written[2]), int(written[2]) + width))
            found += any(registers & group for group in [*groups, open_group])
    return found


def prefill_kernels(sm: int, formats: list[str]) -> dict[str, Any]:
    """Each product of a prefill, with the tile shapes that an untuned GPU of this kind gets; of Hopper's int4
    also gate and up, or down, as one product.
    """
    from kernels.expert_slots import FORMATS
    from kernels.triton_moe import fallback

    cases = [
        (f"{format} {name} {config['tile_rows']}", format, name, config)
        for format in formats or FORMATS
        for rows in (4, 200)
        for name in ("up", "down")
        for config in [fallback(format, rows, sm)]
    ]
    if sm == 90:
        whole = {"columns": 64, "depth": 64, "warps": 8, "stages": 3}
        for swap in (1, 2):
            config = {"tile_rows": 256, "tma": True}
            config |= {"up": whole | {"swap": swap}, "down": whole | {"swap": swap, "columns": 128}}
            cases += [(f"int4 {name} 256 {swap}", "int4", name, config) for name in ("up", "down")]
    return {title: _product(sm, *case) for title, *case in cases}


def _product(sm: int, format: str, name: str, config: dict[str, Any]) -> Any:
    from kernels.expert_slots import BITS, FLOATS, slot_layout
    from kernels.triton_grouped import packed_down, packed_up, rows_down, rows_up

    elements = {"bf16": "bf16", "f16": "fp16", "f32": "fp32"}
    at, tiled, product = slot_layout(format, 2048, 768), format in BITS, config[name]
    constants: dict[str, Any] = {"D": 2048, "F": 768, "LD_H": 768, "BM": config["tile_rows"]}
    constants |= {"BN": product["columns"], "BK": product["depth"], "INTERPRET": False}
    if name == "up":
        constants |= {"LD_X": 2048, "ACTIVATION": "silu"}
    element = elements.get(format, "bf16")
    types = dict.fromkeys(("x", "h", "h_box"), f"*{element}") | {"products": "*fp32"}
    if format in FLOATS:
        constants |= {"TMA": config["tma"], "SWAP": product["swap"]}
        kernel = rows_up if name == "up" else rows_down
        if config["tma"]:
            box = f"{product['columns']},{product['depth']}]>"
            types["weights"] = f"tensordesc<{element}[1,{'2,' if name == 'up' else ''}{box}"
            if name == "down":
                types["h_box"] = f"tensordesc<{element}[{config['tile_rows']},{product['depth']}]>"
    else:
        constants |= {"FORMAT": format, "WHOLE": product["swap"], "ASYNC": sm == 90}
        kernel = packed_up if name == "up" else packed_down
        if name == "up":
            constants |= {"UP": at.up, "UP_SCALES": at.up if tiled else at.up_scales}
            constants["GATE_SCALES"] = at.gate if tiled else at.gate_scales
        else:
            constants |= {"DOWN": at.down, "DOWN_SCALES": at.down if tiled else at.down_scales}
    return compile_kernel(kernel, sm, constants, types, product["warps"], product["stages"])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    for name, compiled in prefill_kernels(int(sys.argv[1]), sys.argv[2:]).items():
        print(json.dumps({"kernel": name} | examine(compiled)), flush=True)
