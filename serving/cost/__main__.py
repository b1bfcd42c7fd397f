"""`python -m serving.cost COMMAND`: table1, figures, hardware, fit, check, calibrate."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

from serving.cost.check import check, fit_card, format_cells
from serving.cost.fit import SPLIT_SEED
from serving.cost.fitted_set import FITTED_DIRECTORY
from serving.cost.hardware import NUMBERS, known_hardware, load_hardware
from serving.cost.silicon import CARDS, require_silicon
from serving.cost.table1 import check_figures, format_table, table1
from serving.errors import command


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
        print(f"{name:<24} {getattr(card, name):<14.6g} {card.sources[name]}")
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


if __name__ == "__main__":
    sys.exit(main())
