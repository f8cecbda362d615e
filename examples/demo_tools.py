"""What both demos use: output folders, commands, losses, samples and the depth report."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import set_seed

from hf_depthattn.cli.main import main as depthattn
from hf_depthattn.cli.run_command import EXIT_OK
from hf_depthattn.eval.metrics.probing.probe import token_losses

# The embedded tokenizer merges line breaks with the following indentation, so a prompt must end before one.
PROMPT = "import os\nimport sys\n\ndef main("
_MARKER = "OUTPUT_OF_THE_DEMO"


def new_output_folder(out: Path) -> None:
    """Create the output folder, in place of that of an earlier run.

    Args:
        out: the folder.

    Raises:
        SystemExit: if a folder exists that is not the output of a demo.
    """
    if out.exists() and any(out.iterdir()) and not (out / _MARKER).is_file():
        raise SystemExit(f"{out}: exists and is not the output of a demo; choose another folder with --out.")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARKER).write_text("The next run replaces this folder.\n", encoding="utf-8")


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def command(*words: str) -> int:
    """Print and run a command of the package; return its exit code."""
    print(f"\n$ depthattn {' '.join(words)}", flush=True)
    return depthattn([*words, "--no-progress"])


@torch.no_grad()
def block_losses(model, blocks: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of each block [n, T] in nats per token, [n] in float64."""
    model.eval()
    losses = [token_losses(model(batch, use_cache=False).logits, batch).mean(dim=-1) for batch in blocks.split(8)]
    return torch.cat(losses).double()


@torch.no_grad()
def sample(model, tokenizer, seed: int, num_tokens: int = 80) -> str:
    """Return the prompt with a continuation of so many tokens."""
    model.eval()
    set_seed(seed)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=True, temperature=0.7, top_k=40)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def write_report(model: Path, control: Path, held_out: Iterable[str], num_sequences: int, out: Path) -> Path | None:
    """Write the report that compares two models; return `None` if its libraries are not installed."""
    text, report = out / "held_out.txt", out / "report"
    text.write_text("\n".join(held_out), encoding="utf-8")
    options = ("--text", str(text), "--num-sequences", str(num_sequences), "--out", str(report))
    code = command("report", str(model), "--compare", str(control), *options)
    return report / "report.html" if code == EXIT_OK else None
