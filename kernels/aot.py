"""Compiles every Triton kernel for real cards without one: `python -m kernels.aot [--arch 80,90,100] [name ...]`.

The operators are called on meta tensors with the shapes of real models while :mod:`kernels.launch` notes the launches; each
is then lowered to a cubin by the assembler in Triton's wheel, which catches what the interpreter does not: types, layouts,
shared memory over the card's limit, spilled registers. Prints a table; exits with 1 if a kernel does not compile, does not
fit, or is a decode kernel that spills.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kernels.aot_cases import CASES
from kernels.launch import Launch, recording

ARCHITECTURES = (80, 90, 100)
REGISTERS_PER_SM = 65536
WARPS_PER_SM = 64
BLOCKS_PER_SM = 32
SHARED_BYTES_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
RESERVED_SHARED_BYTES = 1024  # the driver keeps this much of every block's
NO_SPILLS = ("decode", "resident", "mailbox")  # cases whose kernels must keep everything in registers

TYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Cubin:
    """One kernel lowered for one architecture."""

    case: str
    kernel: str
    arch: int
    registers: int
    spill_bytes: int  # of stack a thread, which is where spilled registers go
    shared_bytes: int
    warps: int
    ptx: str

    @property
    def fits(self) -> bool:
        return self.shared_bytes + RESERVED_SHARED_BYTES <= SHARED_BYTES_PER_SM[self.arch]

    @property
    def blocks_per_sm(self) -> int:
        registers_per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = REGISTERS_PER_SM // (registers_per_warp * self.warps)
        by_shared = SHARED_BYTES_PER_SM[self.arch] // (self.shared_bytes + RESERVED_SHARED_BYTES)
        return min(by_registers, by_shared, WARPS_PER_SM // self.warps, BLOCKS_PER_SM)

    @property
    def occupancy(self) -> float:
        return self.blocks_per_sm * self.warps / WARPS_PER_SM

    @property
    def faults(self) -> list[str]:
        faults = [] if self.fits else [f"{self.shared_bytes} bytes of shared memory do not fit"]
        if self.spill_bytes and self.case.startswith(NO_SPILLS):
            faults.append(f"spills {self.spill_bytes} bytes")
        return faults


def _type_of(value: Any) -> str:
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPE_NAMES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, torch.Tensor):
        return "*" + TYPE_NAMES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def lower(case: str, call: Launch, arch: int) -> Cubin:
    """The cubin that running `call` on a card of `arch` would build, specialised as a run would specialise it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = call.kernel.arg_names
    meta = dict(call.meta)
    signature, constants, attributes = {}, {}, {}
    for index, (name, value) in enumerate(zip(names, call.args, strict=False)):
        parameter = call.kernel.params[index]
        if isinstance(value, int) and value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
            continue
        signature[name] = _type_of(value)
        aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned and not parameter.do_not_specialize and not parameter.do_not_specialize_on_alignment:
            attributes[(index,)] = [["tt.divisibility", 16]]
    for name in names[len(call.args) :]:
        signature[name], constants[name] = "constexpr", meta.pop(name)
    source = ASTSource(call.kernel, signature, constants, attributes)
    with contextlib.redirect_stdout(io.StringIO()):  # on failure Triton prints the whole program
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=meta)
    usage = _resource_usage(compiled.asm["cubin"])
    return Cubin(
        case,
        call.kernel.__name__.strip("_"),
        arch,
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        compiled.asm["ptx"],
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    line = next(line for line in text.stdout.splitlines() if "REG:" in line and "REG:0 " not in line)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}


def launches(names: Iterable[str]) -> Iterator[tuple[str, Launch]]:
    """The distinct launches that the named cases make."""
    for name in names:
        with recording() as calls:
            CASES[name]()
        seen = set()
        for call in calls:
            if call.kernel.__name__ not in seen:
                seen.add(call.kernel.__name__)
                yield name, call


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("cases", nargs="*", help=f"any of: {', '.join(CASES)} (default: all)")
    parser.add_argument("--arch", default=",".join(map(str, ARCHITECTURES)), help="compute capabilities, e.g. 80,90")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; known: {', '.join(CASES)}")
    faults = []
    print(
        f"{'case':24} {'kernel':22} {'arch':>5} {'regs':>5} {'spill B':>8} {'shared B':>9} {'warps':>6} {'occupancy':>10}"
    )
    for case, call in launches(options.cases or CASES):
        for arch in map(int, options.arch.split(",")):
            try:
                cubin = lower(case, call, arch)
            except Exception as error:  # noqa: BLE001  Triton raises a kind of its own for every stage; any is a finding
                while error.__cause__ is not None:  # the first of the chain says what, the others only where
                    error = error.__cause__
                reason = " ".join(str(error).split())[:300]
                faults.append(f"{case}/{call.kernel.__name__} sm_{arch}: {type(error).__name__}: {reason}")
                print(f"{case:24} {call.kernel.__name__.strip('_'):22} {arch:>5} does not compile")
                continue
            faults += [f"{case}/{cubin.kernel} sm_{arch}: {fault}" for fault in cubin.faults]
            print(
                f"{case:24} {cubin.kernel:22} {arch:>5} {cubin.registers:>5} {cubin.spill_bytes:>8} "
                f"{cubin.shared_bytes:>9} {cubin.warps:>6} {cubin.occupancy:>9.0%}",
                flush=True,
            )
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
