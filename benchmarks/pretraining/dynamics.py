"""Measure how the trained models of the study use their depth, with the metrics of the depth report.

    python -m benchmarks.pretraining.dynamics --corpus stdlib --tokens 2000000

For every arm that was trained from scratch, the models with the best rate of all seeds are measured on held-out text.
Needs the weights that `benchmarks.pretraining.grid` left in `--models`; models that have a result are skipped.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hf_depthattn import DepthAttnForCausalLM
from hf_depthattn.errors import UserError
from hf_depthattn.eval.metrics.probing.probe import DepthProbe
from hf_depthattn.eval.metrics.probing.text import TextBatches
from hf_depthattn.eval.metrics.registry import DEPTH_METRICS
from hf_depthattn.utils.result_files import json_text, write_text

from .corpora import CORPORA, Corpus, read_corpus
from .grid import HERE
from .group import Group
from .results import DYNAMICS, RESULTS, read_results
from .runs import Run, Setting
from .training import build_model, copy_weights, versions, weights_file, windows

_NUM_SEQUENCES = 32


def measure(model: DepthAttnForCausalLM, corpus: Corpus, sequence_length: int) -> dict[str, Any]:
    """Measure a model on evenly spaced sequences of the held-out text.

    Args:
        model: the model.
        corpus: the corpus.
        sequence_length: bytes per sequence.

    Returns:
        `sublayer_magnitudes` and `state_magnitudes` (root mean squares), `layer_gradients` (L2 norms per layer),
        `usefulness` (loss with an affine map in place of a sublayer over the loss of the model, mean over
        sublayers), `causal_score` (mean over pairs of layers), and
        for models that have them `depth_weights` (mean entropy over log n, mean weights of the embedding and of the
        newest source) and `slot_mass` (mean weight of MoDA's slots, and what uniform attention would give them).
    """
    first = torch.linspace(0, len(corpus.heldout) - sequence_length - 1, _NUM_SEQUENCES).long()
    text = TextBatches(windows(corpus.heldout, first, sequence_length)[0], batch_size=8)
    probe = DepthProbe.of(model.eval())
    found = {
        name: metric.run(probe, text).to_dict()
        for name, metric in DEPTH_METRICS.items()
        if name in _METRICS and metric.applies(probe)
    }
    magnitude = found["output_magnitude"]
    result = {
        "sublayer_magnitudes": magnitude["sublayers"],
        "state_magnitudes": magnitude["states"],
        "layer_gradients": found["gradient_magnitude"]["layer_parameters"],
        "usefulness": found["usefulness_sublayer"]["mean_ratio"],
        "causal_score": found["causal_scores"]["mean"],
    }
    if "depth_weights" in found:
        result["depth_weights"] = _depth_weights(found["depth_weights"])
    if "slot_mass" in found:
        mass = found["slot_mass"]
        result["slot_mass"] = {
            "total": _mean(value for heads in mass["totals"] for value in heads),
            "uniform": _mean(mass["uniform"]),
        }
    return _rounded(result)


_METRICS = (
    *("output_magnitude", "gradient_magnitude", "usefulness_sublayer", "causal_scores"),
    *("depth_weights", "slot_mass"),
)


def _depth_weights(found: dict[str, Any]) -> dict[str, float]:
    # Sites with a single source have no choice.
    read = [[value for value in row if value is not None] for row in found["means"]]
    read = [row for row in read if len(row) > 1]
    return {
        "entropy": _mean(found["entropies"]),
        "embedding": _mean(row[0] for row in read),
        "newest": _mean(row[-1] for row in read),
    }


def _mean(values: Any) -> float:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return value


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: command line; that of the process by default.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", choices=CORPORA, default="stdlib")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="training budget of the runs in bytes")
    parser.add_argument("--num-layers", type=int, default=16)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results of the runs")
    parser.add_argument("--models", type=Path, default=HERE / "runs", help="folder of the trained weights")
    parser.add_argument("--output", type=Path, default=DYNAMICS, help="folder for the results of this command")
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.results)
        group = Group(options.corpus, options.tokens, options.num_layers, results)
        corpus = read_corpus(options.corpus)
        for arm in group.arms(is_continued=False) if results else []:
            for result in group.of_seeds(arm):
                _measure_run(result.run, Setting(**result.setting), corpus, options.models, options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _measure_run(run: Run, setting: Setting, corpus: Corpus, models: Path, output: Path) -> None:
    path, weights = output / f"{run.path}.json", weights_file(run, models)
    if path.exists() or not weights.exists():
        return
    torch.set_num_threads(setting.num_threads)
    model = build_model(run, setting)
    copy_weights(load_file(weights).items(), model)
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics = measure(model, corpus, setting.sequence_length)
    write_text(path, json_text({"run": run.to_dict(), "versions": versions(), "metrics": metrics}, indent=None))
    print(run.path, flush=True)


if __name__ == "__main__":
    sys.exit(main())
