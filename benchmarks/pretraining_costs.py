"""CPU time of a training step of every arm of the pretraining study, relative to PreNorm.

    python benchmarks/pretraining_costs.py --num-layers 8 16 32

The runs of the study share the machine with other programs, so their own times cannot be compared. Here, the arms are
timed in turn in one process, and ratios are taken to PreNorm in the same round. Arms with the same fields cost the
same. Depths that are not named keep their numbers from the output file.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pretraining.arms import ARMS, REFERENCE
from pretraining.corpora import Corpus, read_corpus
from pretraining.costs import COSTS, cost_key, read_costs
from pretraining.runs import Run, Setting
from pretraining.training import build_model, make_optimizer, train_step, windows
from timing import machine, print_rows, time_in_turn

from hf_depthattn.errors import UserError
from hf_depthattn.utils.result_files import json_text, read_object, write_text


def measure(num_layers: int, setting: Setting, corpus: Corpus, rounds: int) -> list[dict[str, Any]]:
    """Time one training step of every arm in turn, in each round.

    Args:
        num_layers: number of decoder layers.
        setting: sizes, batch and optimizer.
        corpus: text of the batches.
        rounds: number of rounds, after one that is not counted; at least two.

    Returns:
        A row for each set of fields, as `timing.time_in_turn` returns them, with the fields.
    """
    names: dict[tuple[int, str], str] = {}
    for name, arm in ARMS.items():
        names.setdefault(cost_key(num_layers, arm.fields), name)
    steps = {name: _step(Run("", 0, name, num_layers, 1e-3), setting, corpus) for name in names.values()}
    assert next(iter(steps)) == REFERENCE, "ratios are taken to the first row"
    for step in steps.values():
        step()
    rows = time_in_turn(steps, rounds, lambda: None)
    return [{**row, "fields": dict(ARMS[row["name"]].fields)} for row in rows]


def _step(run: Run, setting: Setting, corpus: Corpus) -> Callable[[], None]:
    model = build_model(run, setting).train()
    optimizer = make_optimizer(model, run, setting)
    first = torch.arange(setting.batch_size) * setting.sequence_length
    batch = windows(corpus.train, first, setting.sequence_length)

    def step() -> None:
        train_step(model, optimizer, *batch, setting)

    return step


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: command line; that of the process by default.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-layers", type=int, nargs="+", default=[16])
    parser.add_argument("--rounds", type=int, default=30, help="steps of every arm")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of `runs.Setting`")
    parser.add_argument("--output", type=Path, default=COSTS, help="file of the result")
    options = parser.parse_args(arguments)
    try:
        setting = Setting().with_values(options.set)
        read_costs(options.output)
        depths = read_object(options.output, "")["depths"] if options.output.exists() else {}
        torch.set_num_threads(setting.num_threads)
        for num_layers in options.num_layers:
            rows = measure(num_layers, setting, read_corpus("stdlib"), options.rounds)
            print(f"{num_layers} layers")
            print_rows(rows)
            part = {**machine(), "setting": setting.to_dict(), "rounds": options.rounds, "rows": rows}
            depths[str(num_layers)] = part
            write_text(options.output, json_text({"benchmark": "pretraining_costs", "depths": depths}))
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
