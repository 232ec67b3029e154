"""Compile a kernel for an H100 without one, and read what the assembler says of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attention.kernels import plan
from attention.kernels.configurations import Configuration

NAMES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
MOST_SHARED_MEMORY = 232448
"""Bytes that a program may have on an H100; Triton compiles beyond it without a word."""


@dataclass(frozen=True)
class Build:
    """Registers and stack (spills) per thread in bytes, shared memory per program in bytes, and the PTX."""

    registers: int
    stack: int
    shared_memory: int
    ptx: str

    @property
    def narrow_loads(self) -> list[str]:
        """Loads of single 16-bit elements: what unaligned addresses would become."""
        return re.findall(r"ld\.global\S*\.[bu]16\b", self.ptx)

    @property
    def copy_widths(self) -> set[str]:
        """Bytes of the asynchronous copies to shared memory."""
        return set(
            re.findall(r"cp\.async\.c[ag]\.shared\.global[^\[]*\[[^\]]*\], \[[^\]]*\], (\w+)", self.ptx)
        )

    @property
    def tensor_cores(self) -> bool:
        """Whether products run there."""
        return "mma.sync" in self.ptx or "wgmma" in self.ptx


def build(
    function: Any, types: dict[str, str], constants: dict[str, Any], num_warps: int, num_stages: int
) -> Build:
    """Compile for sm_90 with all pointers aligned to 16 bytes, as torch's allocator gives them."""
    import triton
    import triton.backends.nvidia as nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    places = [place for place, name in enumerate(function.arg_names) if types.get(name, "").startswith("*")]
    aligned = {(place,): [["tt.divisibility", 16]] for place in places}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        done = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    assert found is not None, done.stdout
    return Build(int(found[1]), int(found[2]), kernel.metadata.shared, kernel.asm["ptx"])


def build_attention(
    kind: str,
    value: Configuration,
    dtype: str,
    *,
    head_dim: int,
    group: int,
    block_size: int,
    **flags: Any,
) -> Build:
    """`decode_kernel` or `prefill_kernel` as `launch` would have it compiled for dense caches."""
    from attention.kernels.decode import decode_kernel
    from attention.kernels.prefill import prefill_kernel

    function = decode_kernel if kind == "decode" else prefill_kernel
    element = NAMES[dtype]
    pointers = dict.fromkeys(("q", "k_cache", "v_cache", "out"), f"*{element}")
    pointers |= dict.fromkeys(("lse", "part_out", "part_lse"), "*fp32")
    pointers |= dict.fromkeys(("block_tables", "seq_lens", "query_start_loc"), "*i32")
    types = dict.fromkeys(function.arg_names, "i32") | {"scale": "fp32", "soft_cap": "fp32"} | pointers
    constants = plan.constants(kind, value, head_dim=head_dim, group=group, block_size=block_size)
    constants |= {
        "STEP": 4 if dtype == "float32" else 8, "WIDE": False, "K_DIM_STRIDE": 1, "V_DIM_STRIDE": 1,
        "WINDOWED": False, "CAPPED": False, "LSE": True, "UPCAST": False,
    }  # fmt: skip
    constants |= {"RAGGED": False, "DIRECT": False} if kind == "decode" else {"MIXED": True, "SEQS": 128}
    return build(function, types, constants | flags, value.num_warps, value.num_stages)
