"""`python -m serving.gpu_suite --out DIR [SECTION ...]`: each section in a process of its own, whatever becomes of the others;
full results under DIR, one short table last.

Sections, in this order: `doctor`, `kernels` (correctness of every kernel, by its tests), `tokens` (every system on tiny
checkpoints against the judge), `cards` (the same over two cards), `scarce` (multiplexed engines where KV is scarce and weights come
and go), `memory` (page mapping and crossing), `loop` (what a worker does between two steps, the driver's calls apart), `engine`
(the ablation of control and lanes, real configurations with seeded values), `apart` (the same with FFN halves on a second card),
`steps` (prompts in chunks and decode batches of such configurations, for the simulator), `group_steps` (what one rank of a group
takes of such steps), `side_by_side` (what two such steps in flight on one card cost each other), `serve` (two such models under
open-loop load on one card, system after system). What needs two cards is skipped where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from serving.errors import command

_REPOSITORY = Path(__file__).resolve().parents[2]
_LINES_KEPT = 3
_SKIPPED = "skipped"


@dataclass(frozen=True)
class Section:
    """A command (`{out}` is the result directory), the seconds after which it is ended, and the cards that it needs."""

    command: tuple[str, ...]
    limit_s: float
    cards: int = 1


_PYTEST = ("-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider")
SECTIONS = {
    "doctor": Section(("-m", "serving.doctor"), 60),
    "kernels": Section((*_PYTEST, "tests/kernels/test_gpu.py", "tests/kernels/test_mailbox.py"), 240),
    "tokens": Section((*_PYTEST, "tests/serving/cuda/test_card_systems.py"), 400),
    "cards": Section((*_PYTEST, "tests/serving/cuda/test_several_cards.py"), 400, cards=2),
    "scarce": Section(
        (*_PYTEST, "tests/serving/cuda/test_card_scarce.py", "tests/serving/cuda/test_card_idle.py"), 400
    ),
    "memory": Section(("-m", "serving.gpu_suite.memory", "--out", "{out}/memory.json"), 60),
    "loop": Section(("-m", "serving.bench_loop"), 60),
    "engine": Section(("-m", "serving.gpu_suite.engine", "--out", "{out}/engine.json"), 400),
    "apart": Section(("-m", "serving.gpu_suite.engine", "--apart", "--out", "{out}/apart.json"), 400, cards=2),
    "steps": Section(("-m", "serving.gpu_suite.steps", "--out", "{out}/steps.json"), 300),
    "group_steps": Section(("-m", "serving.gpu_suite.group_steps", "--out", "{out}/group_steps.json"), 300),
    "side_by_side": Section(("-m", "serving.gpu_suite.side_by_side", "--out", "{out}/side_by_side.json"), 240),
    "serve": Section(("-m", "serving.gpu_suite.serve", "--out", "{out}/serve.json"), 400),
}


@dataclass(frozen=True)
class Outcome:
    """How a section ended, and the rows that it printed as `row: ...`, or the last lines of what it said."""

    name: str
    verdict: str
    seconds: float
    rows: tuple[str, ...]


def run_section(name: str, out: Path, limit_s: float) -> Outcome:
    """Run one section; its whole output goes to `out`/NAME.log."""
    section = SECTIONS[name]
    if section.cards > 1 and torch.cuda.device_count() < section.cards:
        return Outcome(name, _SKIPPED, 0.0, (f"needs {section.cards} cards, {torch.cuda.device_count()} are there",))
    arguments = [part.replace("{out}", str(out)) for part in section.command]
    started = time.monotonic()
    environment = {**os.environ, "CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    with (out / f"{name}.log").open("w+") as log:
        try:
            code: int | str = subprocess.run(
                [sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT, cwd=_REPOSITORY,
                env=environment, timeout=min(limit_s, section.limit_s), check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = "ended: too slow"
        log.seek(0)
        lines = [line.rstrip() for line in log if line.strip()]
    rows = [line.removeprefix("row: ") for line in lines if line.startswith("row: ")]
    told = [line for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    if code != 0 or not rows:
        rows += [line[:200] for line in (told[:12] + lines[-_LINES_KEPT:])]
    return Outcome(name, "ok" if code == 0 else f"FAILED ({code})", time.monotonic() - started, tuple(rows))


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.gpu_suite", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for logs and results")
    parser.add_argument("--seconds", type=float, default=1200, help="for all sections together")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all by default")
    args = parser.parse_args(argv)
    unknown = [name for name in args.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown section {unknown[0]!r}; known: {', '.join(SECTIONS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.seconds
    outcomes = []
    for name in args.sections or SECTIONS:
        outcomes.append(run_section(name, args.out, max(1.0, deadline - time.monotonic())))
        print(f"{name}: {outcomes[-1].verdict}, {outcomes[-1].seconds:.0f} s", flush=True)
    (args.out / "sections.json").write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=1))
    print("\n" + "=" * 100)
    for outcome in outcomes:
        print(f"{outcome.name} [{outcome.verdict}, {outcome.seconds:.0f} s]")
        for row in outcome.rows:
            print(f"  {row}")
    return int(any(outcome.verdict not in ("ok", _SKIPPED) for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
