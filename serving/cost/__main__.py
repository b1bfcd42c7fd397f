"""`python -m serving.cost COMMAND`: table1, figures, hardware, fit, check, card, groups, calibrate, join."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from serving.cost.check import check, fit_card, format_cells
from serving.cost.fit import SPLIT_SEED
from serving.cost.fitted_set import FITTED_DIRECTORY
from serving.cost.hardware import NUMBERS, known_hardware, load_hardware
from serving.cost.silicon import CARDS, require_silicon
from serving.cost.table1 import check_figures, format_table, table1
from serving.errors import UserError, command
from serving.interface import ServedModel
from serving.spec import element_bytes, load_spec


@command
def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serving.cost", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, help_text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_text)
        sub.set_defaults(run=run)
        return sub

    add("table1", _table1, "the paper's Table 1 from published configs")
    add("figures", _figures, "the figures that follow from the configs")
    hardware = add("hardware", _hardware, "a card's numbers and their sources")
    hardware.add_argument("name", nargs="?", help="a card; without it, the known ones")
    fit = add("fit", _fit, "fit coefficients to measured rows")
    fit.add_argument("--silicon", metavar="DIR", help="directory of measured rows (default: $SILICON_DIR)")
    fit.add_argument("--out", metavar="DIR", default=str(FITTED_DIRECTORY), help="where CARD.json files go")
    fit.add_argument("--seed", type=int, default=SPLIT_SEED, help="seed of the split into halves")
    judge = add("check", _check, "errors on held-out shapes")
    judge.add_argument("--silicon", metavar="DIR", help="directory of measured rows (default: $SILICON_DIR)")
    judge.add_argument("--seed", type=int, default=SPLIT_SEED, help="another split than the shipped one: fits anew")
    judge.add_argument("--refit", action="store_true", help="fit anew instead of judging the shipped coefficients")
    judge.add_argument("--kernels", action="store_true", help="a line for each measured kernel too")
    judge.add_argument("--json", metavar="FILE", help="write the cells as JSON as well")
    card = add("card", _card, "calibrate a card by measured steps of our engine, and judge that by steps held out")
    card.add_argument("steps", metavar="FILE", help="what python -m serving.gpu_suite.steps wrote")
    card.add_argument("--card", default="h200", help="its name in conf/hardware (default: h200)")
    card.add_argument(
        "--side-by-side",
        metavar="FILE",
        help="what python -m serving.gpu_suite.side_by_side wrote: what steps in flight cost each other",
    )
    card.add_argument("--out", metavar="FILE", help="write the calibration there")
    groups = add("groups", _groups, "the same of models over several cards, by measured steps of one of them")
    groups.add_argument("steps", metavar="FILE", help="what python -m serving.gpu_suite.group_steps wrote")
    groups.add_argument(
        "--exchanges",
        metavar="FILE",
        required=True,
        help="what python -m serving.gpu_suite.memory wrote on several cards",
    )
    groups.add_argument("--card", default="h200", help="its name in conf/hardware (default: h200)")
    groups.add_argument("--out", metavar="FILE", help="write the calibration there")
    measure = add("calibrate", _calibrate, "measure this machine and the stages of models on it")
    measure.add_argument("--out", metavar="FILE", required=True, help="the JSON file to write")
    measure.add_argument(
        "--model", metavar="[NAME=]DIR", action="append", default=[], help="a checkpoint directory; repeatable"
    )
    measure.add_argument("--dtype", default="float32", help="what models compute in")
    measure.add_argument("--dummy", action="store_true", help="seeded weights: only config.json is read")
    measure.add_argument("--core", type=int, help="pin to this core (default: the first allowed one)")
    measure.add_argument("--rounds", type=int, default=3, help="interleaved rounds of points; the mean counts")
    measure.add_argument("--point-ms", type=float, default=40.0, help="time for one point in one round")
    measure.add_argument(
        "--script-rounds",
        type=int,
        default=4,
        help="rounds of the script that a worker serves, whose steps set the level",
    )
    measure.add_argument(
        "--lone-steps",
        type=int,
        default=64,
        help="decode steps of a sequence that the script serves alone: as many as requests have in the mean",
    )
    measure.add_argument(
        "--busy-share",
        type=_share,
        default=1 / 2,
        help="of the time, how long that worker computes; it rests in between",
    )
    joined = add("join", _join, "the mean of several calibrations of the same points, made at different times")
    joined.add_argument("--out", metavar="FILE", required=True, help="the JSON file to write")
    joined.add_argument("files", metavar="CALIBRATION", nargs="+")
    stream = add("stream", _stream, "stream rate of one core, in bytes a second (calibrate runs it)")
    stream.add_argument("--core", type=int, required=True)
    stream.add_argument("--seconds", type=float, default=1.0)
    return parser


def _table1(options: argparse.Namespace) -> int:
    print(format_table(table1()))
    return 0


def _figures(options: argparse.Namespace) -> int:
    for name, value in check_figures().items():
        print(f"{name:<44} {value:10.2f}")
    return 0


def _hardware(options: argparse.Namespace) -> int:
    if not options.name:
        print("\n".join(f"{name:<12} {load_hardware(name).title}" for name in known_hardware()))
        return 0
    card = load_hardware(options.name)
    for name in NUMBERS:
        if name in card.sources:
            print(f"{name:<24} {getattr(card, name):<14.6g} {card.sources[name]}")
    for own, parts in card.interference_of.items():
        for other, part in parts.items():
            print(f"{f'{own} beside {other}':<24} {part:<14.6g} {card.sources['interference_of']}")
    return 0


def _fit(options: argparse.Namespace) -> int:
    directory = require_silicon(options.silicon)
    provenance = {
        "rows_by": "ai-dynamo/aiconfigurator (Apache-2.0, NVIDIA): measured kernel latencies, BF16",
        "date": datetime.date.today().isoformat(),
        "command": f"python -m serving.cost fit --seed {options.seed}",
    }
    for card in CARDS.values():
        path = Path(options.out) / f"{card}.json"
        fit_card(directory, card, options.seed, provenance).write(path)
        print(f"wrote {path}")
    return 0


def _check(options: argparse.Namespace) -> int:
    cells = check(require_silicon(options.silicon), options.seed, options.refit)
    print(format_cells(cells, options.kernels))
    if options.json:
        Path(options.json).write_text(json.dumps([cell.record() for cell in cells], indent=1) + "\n")
    return 0 if all(cell.roofline.within_target for cell in cells if cell.has_target) else 1


def _card(options: argparse.Namespace) -> int:
    from serving.cost.calibrated import write_calibration
    from serving.cost.card_steps import (
        calibrate_card,
        errors_table,
        fitting_half,
        judge,
        read_steps,
    )
    from serving.cost.side_by_side import (
        fitting_pairs,
        judge_pairs,
        measured_interference,
        pairs_table,
        read_side_by_side,
    )

    load_hardware(options.card)
    steps, measured_on = read_steps(options.steps)
    half = fitting_half(steps)
    provenance = {
        "steps": f"{len(half)} of {len(steps)} steps of {Path(options.steps).name}, fused control; the others are held out",
        "measured_on": measured_on,
        "date": datetime.date.today().isoformat(),
        "command": f"python -m serving.cost card {options.steps} --card {options.card}",
    }
    rates, pairs = {}, []
    if options.side_by_side:
        pairs = read_side_by_side(options.side_by_side)
        beside = fitting_pairs(pairs)
        rates["interference_of"] = measured_interference(options.card, beside)
        provenance["side_by_side"] = f"{len(beside)} of {len(pairs)} pairs of {Path(options.side_by_side).name}"
        provenance["command"] += f" --side-by-side {options.side_by_side}"
    found = calibrate_card(options.card, half, provenance, rates)
    print(errors_table(judge(options.card, steps, found), options.card))
    if pairs:
        print(f"\n{pairs_table(judge_pairs(found.hardware, pairs))}")
        for own, other, value in (
            (own, *each) for own, row in rates["interference_of"].items() for each in row.items()
        ):
            print(f"a {own} step waits for {value:.2f} of each kernel of a {other} step beside it")
    if options.out:
        write_calibration(Path(options.out), found, rates)
        print(f"wrote {options.out}")
    return 0


def _groups(options: argparse.Namespace) -> int:
    from serving.cost.calibrated import write_calibration
    from serving.parallel.group_steps import (
        calibrate_ranks,
        errors_table,
        fitting_steps,
        judge,
        read_exchanges,
        read_rank_steps,
    )

    load_hardware(options.card)
    steps, measured_on = read_rank_steps(options.steps)
    exchanges, exchanged_on = read_exchanges(options.exchanges)
    half = fitting_steps(steps)
    provenance = {
        "steps": f"{len(half)} of {len(steps)} steps of {Path(options.steps).name}; the others are held out",
        "measured_on": measured_on,
        "exchanges": f"{len(exchanges)} sums of {Path(options.exchanges).name}",
        "exchanged_on": exchanged_on,
        "date": datetime.date.today().isoformat(),
        "command": f"python -m serving.cost groups {options.steps} --exchanges {options.exchanges} --card {options.card}",
    }
    found = calibrate_ranks(options.card, half, exchanges, provenance)
    print(errors_table(judge(steps, found)))
    if options.out:
        write_calibration(Path(options.out), found, {})
        print(f"wrote {options.out}")
    return 0


def _stream(options: argparse.Namespace) -> int:
    from serving.cost.machine_rates import stream_rate

    _pin(options.core)
    print(stream_rate(options.seconds, started=lambda: print("streaming", flush=True)))
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    from serving.cost import calibrate, machine_rates
    from serving.cost.anchoring import anchored, levels, mean_levels
    from serving.cost.calibrated import calibration, rows_by_operator, write_calibration
    from serving.cost.worker_steps import measure_steps

    served = [_served(model, options.dtype, options.dummy) for model in options.model]
    provenance = {
        "machine": machine_rates.machine_name(),
        "date": datetime.date.today().isoformat(),
        "command": "python -m serving.cost calibrate",
        "busy_share": options.busy_share,
        "lone_steps": options.lone_steps,
    }
    rates, cores = machine_rates.stream_rates() | machine_rates.crossing_rates(), sorted(os.sched_getaffinity(0))
    own = cores[0] if options.core is None else options.core
    _pin(own)
    rates |= machine_rates.product_rates()
    rows, layers, neighbour, spread = [], [], {}, {}
    others = [core for core in cores if core != own] if served else []
    with calibrate.streaming(others[0]) if others else nullcontext() as stream:
        for model in served:
            halves = calibrate.load_halves(model)
            points = list(calibrate.stage_points(model, *halves))
            script = {"busy_share": options.busy_share, "lone_steps": options.lone_steps}
            steps = measure_steps(model, *halves, options.script_rounds, **script)
            rows, layers, spread[model.name] = rows + steps.once, layers + steps.layers, steps.spread
            mine, lost = calibrate.measure(points, options.rounds, options.point_ms / 1e3)
            provenance[f"lost_share/{model.name}"] = round(lost, 3)
            print(f"{model.name}: {len(mine)} points; other processes held the core {lost:.0%} of the time")
            rows += mine
            if stream:
                beside = calibrate.measure_beside_stream(points, stream, options.point_ms / 1e3)
                neighbour[model.name] = beside
                print("  beside a streaming core: " + ", ".join(f"{k} x{v:.2f}" for k, v in beside.items()))
    measured = rows_by_operator(rows)
    ratios = levels(calibration(rates, options.dtype, measured, provenance), layers)
    for (operator, name), level in mean_levels(ratios).items():
        provenance[f"level/{name}/{operator}"] = round(level, 3)
        print(f"{name}: {operator} takes x{level:.2f} on a worker")
    found = calibration(rates, options.dtype, anchored(measured, ratios), provenance, neighbour, spread)
    write_calibration(Path(options.out), found, rates)
    for name, rate in rates.items():
        print(f"{name:<26} {rate:10.4g}")
    print(f"wrote {options.out}")
    return 0


def _share(text: str) -> float:
    share = float(text)
    if not 0.0 < share <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return share


def _join(options: argparse.Namespace) -> int:
    from serving.cost.calibrated import join

    join(options.files, options.out)
    print(f"wrote {options.out}, of {len(options.files)} calibrations")
    return 0


def _served(named: str, dtype: str, dummy: bool) -> ServedModel:
    """The model in a directory, under the directory's name or the one given before it."""
    element_bytes(dtype)
    name, _, directory = named.rpartition("=")
    return ServedModel(load_spec(directory, name or None), Path(directory), dtype, dummy)


def _pin(core: int) -> None:
    """One compute thread on one core, as a worker has."""
    import torch

    try:
        os.sched_setaffinity(0, {core})
    except OSError:
        raise UserError(f"core {core} cannot be used; this machine has {os.cpu_count()} cores, from 0") from None
    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
