"""Make checkpoints with model cards from trained models of the study.

They are a baseline and models that differ from it in the connection alone, so that each of them makes a pair with it.

    python -m benchmarks.pretraining.checkpoints --corpus stdlib --tokens 2000000

Needs the weights that `benchmarks.pretraining.grid` left in `--models`. Cards are made from the results alone, also by
`--cards-only`, and are committed in `model_cards/` too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import EvalResult, ModelCard
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_depthattn.errors import UserError
from hf_depthattn.model_card import CARD_NAME, card_data, papers, table
from hf_depthattn.utils.result_files import json_text, write_text

from .arms import ARMS, SCALED
from .comparison import difference, losses
from .corpora import CORPORA
from .grid import HERE
from .group import Group, in_bytes
from .results import RESULTS, Result, read_results
from .runs import Setting
from .training import build_model, copy_weights, weights_file

ROOT = Path(__file__).resolve().parents[2]
#: Folder of the checkpoints.
FOLDER = ROOT / "examples" / "pretrained"
CARDS = ROOT / "model_cards"

#: Training budget in bytes of the committed checkpoints.
COMMITTED_TOKENS = 2_000_000
#: Arm -> name of its checkpoint; the first is the baseline.
NAMES = {
    SCALED: "prenorm",
    "block_attn_res_scaled": "block-attn-res",
    "full_attn_res_scaled": "full-attn-res",
    "dense_former": "dense-former",
}
# Arm -> what its model has beside the Llama.
_CONNECTIONS = {
    SCALED: "",
    "block_attn_res_scaled": " and Block Attention Residuals (8 blocks)",
    "full_attn_res_scaled": " and Full Attention Residuals",
    "dense_former": " and DenseFormer's averages over depth",
}

_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ model }}, trained from scratch on {{ bytes }} of Python's standard library: {{ parameters }} parameters,
a token is a byte. It shows what a connection changes, and is too small to be of other use. The others, trained on the
same data with the same initial weights: {{ others }}.

| | |
|---|---|
| held-out loss | {{ loss }} nats per byte (seed 0, float32) |
{{ comparisons }}
| initial weights | projections into the residual stream start sqrt(2 L) times smaller, as in GPT-2 |
| training | {{ steps }} steps of {{ step_bytes }} bytes, AdamW, peak learning rate {{ rate }}, {{ versions }} |

{{ options }}The weights are rounded to bfloat16{{ except }}. The study, its protocol and its other arms:
[docs/evidence.md]({{ repository }}/blob/main/docs/evidence.md).

```python
{{ loading }}
```
{{ papers }}"""


def results_of(group: Group, tokens: int) -> dict[str, list[Result]]:
    """Return the results of the arms of all checkpoints with a budget, seed 0 first.

    Args:
        group: the group whose best rates are used.
        tokens: budget in bytes.

    Raises:
        UserError: if a model was not trained.
    """
    found = {arm: group.found(group.plan.at_budget(arm, tokens)) for arm in NAMES}
    for arm, results in found.items():
        if not results or results[0].run.seed != 0 or results[0].is_diverged:
            raise UserError(f"{arm}: was not trained on {in_bytes(tokens)}; run `benchmarks.pretraining.grid` first.")
    return found


def write_card(trained: dict[str, list[Result]], arm: str, path: Path) -> None:
    """Write the card of a checkpoint.

    Args:
        trained: what `results_of` returns.
        arm: the arm of the checkpoint.
        path: the file.
    """
    result = trained[arm][0]
    config = build_model(result.run, Setting(**result.setting)).config
    is_baseline = arm == SCALED
    others = [other for other in NAMES if other != arm]
    data = card_data(
        config,
        depth_class="DepthAttnForCausalLM",
        base_model=None,
        source_card=path.with_name("no-source"),
        tags=("byte-level",),
    )
    data.license, data.language = "apache-2.0", ["code"]
    if is_baseline:
        data.tags = ["byte-level"]
    data.model_name = f"stdlib-{NAMES[arm]}"
    data.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="python-standard-library",
            dataset_name=f"held-out files of the standard library of Python {result.versions['python']}",
            metric_type="loss",
            metric_name="nats per byte",
            metric_value=result.heldout_loss,
        )
    ]
    setting, versions = result.setting, result.versions
    step_bytes = setting["batch_size"] * setting["sequence_length"]
    name = "LlamaForCausalLM" if is_baseline else "AutoModelForCausalLM"
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=f"stdlib-{NAMES[arm]}",
        model=f"A Llama with {result.run.num_layers} layers of width {setting['hidden_size']}" + _CONNECTIONS[arm],
        bytes=in_bytes(result.run.tokens),
        parameters=f"{result.parameters:,}",
        others=", ".join(f"`stdlib-{NAMES[other]}`" for other in others),
        loss=f"{result.loss:.3f}",
        comparisons="\n".join(
            f"| {ARMS[other].label} against {ARMS[SCALED].label} | {_interval(trained, other)} |"
            for other in (others if is_baseline else [arm])
        ),
        steps=f"{-(-result.run.tokens // step_bytes):,}",
        step_bytes=step_bytes,
        rate=f"{result.run.learning_rate:g}",
        versions=f"torch {versions['torch']}, transformers {versions['transformers']}",
        options="" if is_baseline else f"{table(config)}\n\n",
        **{"except": "" if is_baseline else ", those of the connection are float32"},
        repository="https://github.com/hf-depthattn/hf-depthattn",
        loading="\n".join(
            [
                *(() if is_baseline else ("import hf_depthattn",)),
                f"from transformers import {', '.join(sorted((name, 'AutoTokenizer')))}",
                "",
                f'model = {name}.from_pretrained("examples/pretrained/{NAMES[arm]}", dtype="float32")',
                f'tokenizer = AutoTokenizer.from_pretrained("examples/pretrained/{NAMES[arm]}")',
            ]
        ),
        papers="" if is_baseline else papers(config),
    )
    card.save(path)


def _interval(trained: dict[str, list[Result]], arm: str) -> str:
    found = difference(losses(trained[arm]), losses(trained[SCALED]))
    assert found is not None
    return (
        f"{found.paired.difference:+.3f} ± {found.half_width:.3f} nats per byte "
        f"({found.num_seeds} seeds, 95 % interval)"
    )


def save_checkpoint(result: Result, weights: Path, folder: Path) -> None:
    """Save a trained model of the study as a checkpoint in bfloat16, without code.

    Args:
        result: its result.
        weights: the file with its trained weights.
        folder: the folder, which is replaced.
    """
    model = build_model(result.run, Setting(**result.setting))
    copy_weights(load_file(weights).items(), model)
    config = model.config
    saved: PreTrainedModel = model
    if result.run.arm == SCALED:
        saved = AutoModelForCausalLM.from_config(config.host_config)
        saved.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory() as parent:
        # A folder with the usual permissions.
        temporary = Path(parent, "checkpoint")
        cast(nn.Module, saved).to(torch.bfloat16)
        saved.save_pretrained(temporary)
        tokenizer(result.setting["sequence_length"]).save_pretrained(temporary)
        # The code is that of this repository.
        for path in temporary.iterdir():
            if path.suffix == ".py" or path.is_dir() or path.name == CARD_NAME:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(temporary, folder)
    _remove_code_reference(folder / "config.json")


def _remove_code_reference(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    content.pop("auto_map", None)
    write_text(path, json_text(content))


def tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the study: a token is a byte, and its number is the byte's.

    Args:
        max_length: length of sequences.
    """
    bpe = Tokenizer(models.BPE(vocab={char: byte for byte, char in bytes_to_unicode().items()}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, model_max_length=max_length, clean_up_tokenization_spaces=False
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: command line; that of the process by default.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", choices=CORPORA, default="stdlib", help="text")
    parser.add_argument("--tokens", type=int, default=COMMITTED_TOKENS, help="training budget of the models in bytes")
    parser.add_argument("--rates-of", type=int, default=100_000, help="budget at which learning rates were chosen")
    parser.add_argument("--num-layers", type=int, default=16)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--models", type=Path, default=HERE / "runs", help="folder of the trained weights")
    parser.add_argument("--cards-only", action="store_true", help="only write the cards")
    options = parser.parse_args(arguments)
    try:
        group = Group(options.corpus, options.rates_of, options.num_layers, read_results(options.results))
        trained = results_of(group, options.tokens)
        for arm, name in NAMES.items():
            if not options.cards_only:
                save_checkpoint(trained[arm][0], weights_file(trained[arm][0].run, options.models), FOLDER / name)
            write_card(trained, arm, FOLDER / name / CARD_NAME)
            write_card(trained, arm, CARDS / f"stdlib-{name}.md")
            print(f"{FOLDER / name}: {ARMS[arm].label}, {trained[arm][0].loss:.4f} nats per byte")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
