"""Write evaluation results into the model card of a local checkpoint, as the Hub reads them.

All results are in the metadata of README.md (`model-index`). Those of data sets that the Hub knows as benchmarks are
also in `.eval_results/`, from which the Hub makes leaderboards (https://huggingface.co/docs/hub/eval-results).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from ..checkpoints.carried_files import EVAL_RESULTS_FOLDER
from ..errors import UserError
from ..errors.messages import one_line
from ..model_card import CARD_NAME
from ..utils.paths import user_path

_START, _END = "<!-- evaluation: {} -->", "<!-- end of evaluation: {} -->"


def read_card(model: str) -> ModelCard:
    """Return the model card of a local checkpoint.

    Args:
        model: folder of the checkpoint.

    Raises:
        UserError: if it is not a local folder, or has no card or an unreadable one.
    """
    folder = user_path(model)
    if not folder.is_dir():
        raise UserError(f"--update-card: {model} is not a local folder; evaluate a local copy and upload it again.")
    if not (folder / CARD_NAME).is_file():
        raise UserError(f"--update-card: {folder} has no {CARD_NAME}; `save_pretrained` and `retrofit` write one.")
    try:
        card: ModelCard = ModelCard.load(folder / CARD_NAME, ignore_metadata_errors=False)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"--update-card: {folder / CARD_NAME}: {one_line(error)}") from error
    return card


def update_card(
    model: str,
    results: Sequence[EvalResult],
    *,
    benchmarks: Mapping[str, EvalResultEntry] | None = None,
    section: str,
    table: str,
) -> None:
    """Add results to a card, or replace those of an earlier run of the same tasks.

    Args:
        model: folder of the checkpoint.
        results: results for the metadata; those that are not finite are left out.
        benchmarks: results for `.eval_results/`, by the name of their file.
        section: name of the run, by which its part of the card is found again.
        table: that part, as Markdown.

    Raises:
        UserError: as in `read_card`.
    """
    card = read_card(model)
    new = [result for result in results if math.isfinite(result.metric_value)]
    data = cast(ModelCardData, card.data)
    old = [r for r in data.eval_results or () if not any(r.is_equal_except_value(other) for other in results)]
    data.eval_results = [*old, *new] or None
    if data.eval_results and data.model_name is None:
        # Without a name, `model-index` is not valid.
        data.model_name = user_path(model).resolve().name
    card.text = _with_section(card.text, section, table)
    folder = user_path(model)
    for name, entry in (benchmarks or {}).items():
        if math.isfinite(entry.value):
            text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
            _write(folder / EVAL_RESULTS_FOLDER / f"{name}.yaml", text)
    _write(folder / CARD_NAME, str(card))


def _with_section(text: str, section: str, table: str) -> str:
    """Return the text of a card with a part between two comments, which replaces the one of the same name."""
    start, end = _START.format(section), _END.format(section)
    before, has_start, rest = text.partition(start)
    _, has_end, after = rest.partition(end)
    if not (has_start and has_end):
        before, after = f"{text.rstrip()}\n\n", "\n"
    return f"{before}{start}\n{table.strip()}\n{end}{after}"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
