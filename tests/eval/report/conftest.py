"""What tests of the report share: the command in a folder with two tiny models and a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from eval_commands import strict_json
from report_checkpoints import SIZES, save_both

from hf_depthattn.cli.main import main


class Outcome(NamedTuple):
    """What `depthattn report` did.

    Attributes:
        code: its exit code.
        stdout: what it printed.
        stderr: lines of stderr.
        content: report.json.
        page: the page.
    """

    code: int
    stdout: str
    stderr: list[str]
    content: dict[str, Any]
    page: Path


@pytest.fixture
def run_report(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Outcome]:
    """Run `depthattn report` without the images, in a folder with `depth`, `stock` and `text.txt`."""
    from hf_depthattn.eval.report import drawing

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawing, "save_images", lambda figures, folder: {})
    depth, stock, _ = save_both(Path())
    models = {"depth": depth, "stock": stock}
    # What saving them printed.
    capfd.readouterr()

    def run(model: str, *more: object, out: str = "out") -> Outcome:
        capfd.readouterr()
        code = main(["report", str(models[model]), "--out", out, "--text", "text.txt", *SIZES, *map(str, more)])
        stdout, stderr = capfd.readouterr()
        content = strict_json(Path(out, "report.json"))
        return Outcome(code, stdout, stderr.splitlines(), content, Path(out, "report.html"))

    return run
