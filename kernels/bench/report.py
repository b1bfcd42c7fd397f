"""The bench's results: rows with units, a table, a JSON record and a roofline."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from kernels.bench.cases import Target
from kernels.bench.measure import Ceilings

SPEED_OF_LIGHT_MARGIN = 1.05  # above this fraction of a ceiling, data came from a cache


@dataclass(frozen=True)
class Row:
    """One measured case; `seconds` is None where the case was refused or failed, and `note` says why."""

    op: str
    shape: str
    dtype: str
    seconds: float | None
    bytes: float = 0.0
    flops: float = 0.0
    error: float | None = None  # relative, against the reference
    peers_s: dict[str, float] = field(default_factory=dict)
    target: Target | None = None
    note: str = ""

    def bandwidth_fraction(self, ceilings: Ceilings) -> float:
        return self.bytes / self.seconds / ceilings.bytes_per_s

    def compute_fraction(self, ceilings: Ceilings) -> float:
        return self.flops / self.seconds / ceilings.flops

    def floor_seconds(self, ceilings: Ceilings) -> float:
        """The least time that this machine's measured bandwidth and compute leave for the row's bytes and operations."""
        return max(self.bytes / ceilings.bytes_per_s, self.flops / ceilings.flops)

    def goal(self, ceilings: Ceilings) -> tuple[str, bool | None]:
        """(target against measured, in words; whether it is met), by the datasheet's bandwidth as targets are."""
        if self.target is None or self.seconds is None:
            return "", None
        if self.target.microseconds:
            return f"<= {self.target.microseconds:.0f} us", self.seconds * 1e6 <= self.target.microseconds
        if self.target.tflops:
            return f">= {self.target.tflops:.0f} TFLOP/s", self.flops / self.seconds / 1e12 >= self.target.tflops
        if not ceilings.datasheet_bytes_per_s:
            return "", None
        reached = self.bytes / self.seconds / ceilings.datasheet_bytes_per_s
        return f"{reached:.0%} of >= {self.target.bandwidth:.0%}", reached >= self.target.bandwidth


def table(rows: list[Row], ceilings: Ceilings) -> str:
    """The rows as text; fractions are of what this machine was measured to do, targets of its datasheet."""
    head = (
        f"{'op':12} {'shape':34} {'dtype':9} {'us':>9} {'floor':>8} {'GB/s':>7} {'% bw':>6} {'TFLOP/s':>8} {'% fl':>6} "
        f"{'peer':>12} {'x peer':>7} {'target':>20} {'met':>4}"
    )
    return "\n".join([head, *(_line(row, ceilings) for row in rows)])


def _line(row: Row, ceilings: Ceilings) -> str:
    start = f"{row.op:12} {row.shape:34} {row.dtype:9}"
    if row.seconds is None:
        return f"{start} {row.note}"
    peer, faster = "", ""
    if row.peers_s:
        peer = min(row.peers_s, key=row.peers_s.get)
        faster = f"{row.peers_s[peer] / row.seconds:.2f}"
    goal, met = row.goal(ceilings)
    return (
        f"{start} {row.seconds * 1e6:9.1f} {row.floor_seconds(ceilings) * 1e6:8.1f} {row.bytes / row.seconds / 1e9:7.0f} {row.bandwidth_fraction(ceilings):6.1%} "
        f"{row.flops / row.seconds / 1e12:8.1f} {row.compute_fraction(ceilings):6.1%} {peer:>12} {faster:>7} "
        f"{goal:>20} {'' if met is None else 'yes' if met else 'NO':>4} {row.note}"
    )


def save(rows: list[Row], ceilings: Ceilings, device: torch.device, directory: Path) -> Path:
    """Write `kernels.json` (rows, ceilings, machine, versions) and, with matplotlib, `roofline.png`."""
    directory.mkdir(parents=True, exist_ok=True)
    cuda = device.type == "cuda"
    record = {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "ceilings": asdict(ceilings),
        "rows": [asdict(row) for row in rows],
    }
    path = directory / "kernels.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    plot_roofline(rows, ceilings, directory / "roofline.png")
    return path


def plot_roofline(rows: list[Row], ceilings: Ceilings, path: Path) -> None:
    """Each row under the measured roof: operations a byte against operations a second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    intensities = [10 ** (exponent / 20) for exponent in range(-40, 81)]
    roof = [min(ceilings.flops, i * ceilings.bytes_per_s) / 1e12 for i in intensities]
    axes.loglog(intensities, roof, color="black", linewidth=1)
    measured = [row for row in rows if row.seconds is not None and row.flops and row.bytes]
    for op in dict.fromkeys(row.op for row in measured):
        mine = [row for row in measured if row.op == op]
        axes.loglog(
            [row.flops / row.bytes for row in mine], [row.flops / row.seconds / 1e12 for row in mine], "o", label=op
        )
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("TFLOP/s")
    axes.legend(fontsize=7, ncol=2)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
