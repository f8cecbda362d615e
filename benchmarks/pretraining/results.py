"""Results of runs, read from their files, and the check that they can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_depthattn.errors import UserError
from hf_depthattn.utils.result_files import read_object

from .runs import Run

#: Folder of the committed results.
RESULTS = Path(__file__).resolve().parent / "results"
#: Folder of the committed metrics of trained models.
DYNAMICS = RESULTS.with_name("dynamics")

_ADVICE = "give another folder (--results)"


@dataclass(frozen=True)
class Result:
    """The result of a run; the attributes are those of its file.

    Attributes:
        run: what identifies the run.
        fields: fields of `DepthAttnConfig` of its arm.
        setting: what all runs have in common.
        corpus: size and hash of the corpus.
        versions: Python, torch, transformers and the commit.
        parameters, depth_parameters: number of all parameters, and of those that the arm adds to the host.
        tokens: bytes seen.
        cpu_seconds, wall_seconds: time of the training steps.
        is_diverged: whether training ended with a loss that is infinite or NaN.
        heldout_loss: loss at the end in nats per byte; `None` if it diverged.
        train_curve: bytes seen and mean training loss since the point before.
        heldout_curve: bytes seen, CPU seconds and held-out loss.
    """

    run: Run
    fields: dict[str, Any]
    setting: dict[str, Any]
    corpus: dict[str, Any]
    versions: dict[str, str]
    parameters: int
    depth_parameters: int
    tokens: int
    cpu_seconds: float
    wall_seconds: float
    is_diverged: bool
    heldout_loss: float | None
    train_curve: list[tuple[int, float]]
    heldout_curve: list[tuple[int, float, float]]

    @property
    def loss(self) -> float:
        """The held-out loss at the end; infinite if training diverged."""
        return float("inf") if self.heldout_loss is None else self.heldout_loss


#: Run -> its result.
Results = dict[Run, Result]


def read_result(path: Path) -> Result:
    """Read the result of a run.

    Args:
        path: its file.

    Raises:
        UserError: if it is another kind of file.
    """
    content = read_object(path, _ADVICE)
    if content.pop("benchmark", None) != "pretraining":
        raise UserError(f"{path}: is not a result of benchmarks.pretraining; {_ADVICE}.")
    try:
        return Result(**{**content, "run": Run(**content["run"])})
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: has other fields than results have now ({error}); {_ADVICE}.") from error


def read_results(folder: Path = RESULTS) -> Results:
    """Read all results in a folder, and check that they can be compared.

    Args:
        folder: the folder; need not exist.

    Raises:
        UserError: if a file is no result, or two results have different settings, corpora or fields of an arm.
    """
    results = {path: read_result(path) for path in sorted(folder.rglob("*.json"))}
    check_alike((str(path), conditions(result)) for path, result in results.items())
    return {result.run: result for result in results.values()}


#: What two results must have in common, by kind and name.
Conditions = dict[tuple[str, str], Mapping[str, Any]]


def conditions(result: Result) -> Conditions:
    """Return what other results must have in common with this one.

    Args:
        result: the result.
    """
    return {
        ("setting", ""): result.setting,
        ("corpus", result.run.corpus): result.corpus,
        ("fields of arm", result.run.arm): result.fields,
        ("version of", ""): {name: result.versions.get(name) for name in ("torch", "transformers")},
    }


def check_alike(results: Iterable[tuple[str, Conditions]]) -> None:
    """Check that results differ only in what identifies a run.

    Args:
        results: the place of each result, for the message, and its conditions.

    Raises:
        UserError: if two results differ in the setting, in the text of a corpus, in the fields of an arm, or in the
            version of torch or transformers.
    """
    seen: dict[tuple[str, str], tuple[str, Mapping[str, Any]]] = {}
    for place, parts in results:
        for (kind, name), values in parts.items():
            other, before = seen.setdefault((kind, name), (place, values))
            for key in {**before, **values}:
                if before.get(key) != values.get(key):
                    raise UserError(
                        f"{place}: {' '.join(filter(None, (kind, name, key)))} is {values.get(key)!r}, but "
                        f"{before.get(key)!r} in {other}; only runs with the same values can be compared."
                    )


def read_dynamics(folder: Path = DYNAMICS) -> dict[Run, dict[str, Any]]:
    """Read the metrics of trained models, as `dynamics.measure` returns them, by run.

    Args:
        folder: the folder; need not exist.

    Raises:
        UserError: if a file is not JSON.
    """
    contents = [read_object(path) for path in sorted(folder.rglob("*.json"))]
    return {Run(**content["run"]): content["metrics"] for content in contents}
