"""Train one model of the study, and write its result."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM, depth_param_groups
from hf_depthattn.integrations.trainer import is_depth_name
from hf_depthattn.pretraining.output_scaling import scale_outputs
from hf_depthattn.utils.result_files import json_text, write_text

from .arms import ARMS, REFERENCE
from .corpora import Corpus, read_corpus
from .runs import Run, Setting

_ROOT = Path(__file__).resolve().parents[2]
_NUM_BYTES = 256
# Continued models have seeds of their own for the order of the data.
_CONTINUED_SEEDS = 1_000_000


def build_model(run: Run, setting: Setting) -> DepthAttnForCausalLM:
    """Build the untrained model of a run.

    The host's weights depend on the seed and on the sizes only: all arms of a seed start with the same ones.
    Parameters that an arm adds have the initial values of the library; `has_scaled_outputs` scales some of the host's.

    Args:
        run: the run.
        setting: sizes.
    """
    model = _initial_model(run, setting, run.arm)
    if run.arm != REFERENCE:
        copy_weights(_initial_model(run, setting, REFERENCE).named_parameters(), model)
    if ARMS[run.arm].has_scaled_outputs:
        scale_outputs(model)
    return model


def _initial_model(run: Run, setting: Setting, arm: str) -> DepthAttnForCausalLM:
    host = LlamaConfig(
        vocab_size=_NUM_BYTES,
        hidden_size=setting.hidden_size,
        intermediate_size=setting.intermediate_size,
        num_hidden_layers=run.num_layers,
        num_attention_heads=setting.num_attention_heads,
        num_key_value_heads=setting.num_key_value_heads,
        max_position_embeddings=setting.sequence_length,
        initializer_range=setting.initializer_range,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(run.seed)
    return DepthAttnForCausalLM(DepthAttnConfig(text_config=host, **ARMS[arm].fields))


@torch.no_grad()
def copy_weights(source: Iterable[tuple[str, Tensor]], model: nn.Module) -> None:
    """Copy parameters from another model.

    Args:
        source: names and parameters of the other model.
        model: the model; depth parameters that the other model does not have are not changed.

    Raises:
        ValueError: if the models have other parameters of the host.
    """
    values = dict(source)
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.copy_(values.pop(name))
        elif not is_depth_name(name):
            raise ValueError(f"{name}: is missing in the model whose weights are to be copied.")
    if values:
        raise ValueError(f"{', '.join(values)}: not in the model that is to be trained.")


def rate_factor(step: int, num_steps: int, setting: Setting) -> float:
    """Return the learning rate of a step relative to the peak: linear warm-up, then a cosine.

    Args:
        step: number of the step, from 0.
        num_steps: number of all steps.
        setting: warm-up and final rate.
    """
    num_warmup = max(1, round(setting.warmup * num_steps))
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return setting.final_rate + (1 - setting.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))


def windows(data: Tensor, first: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, `[B, length]` each.

    Args:
        data: bytes, `[N]`.
        first: place of the first input of each sequence, `[B]`.
        length: bytes per sequence.
    """
    cut = data[first[:, None] + torch.arange(length + 1)].long()
    return cut[:, :-1], cut[:, 1:]


@torch.no_grad()
def heldout_loss(model: nn.Module, corpus: Corpus, setting: Setting) -> float:
    """Return the mean loss in nats per byte on evenly spaced sequences of the held-out text.

    Args:
        model: the model.
        corpus: the corpus.
        setting: number and length of sequences.
    """
    length = setting.sequence_length
    first = torch.linspace(0, len(corpus.heldout) - length - 1, setting.heldout_sequences).long()
    total = sum(
        _loss(model, *windows(corpus.heldout, part, length)).item() * len(part)
        for part in first.split(4 * setting.batch_size)
    )
    return total / len(first)


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = model(input_ids=inputs, use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@dataclass
class Record:
    """What is measured during training.

    Attributes:
        heldout_curve: bytes seen, CPU seconds of training, held-out loss.
        train_curve: bytes seen, mean loss of the steps since the point before.
        cpu_seconds, wall_seconds: time of the training steps, without evaluations.
        is_diverged: whether the loss became infinite or NaN.
    """

    heldout_curve: list[tuple[int, float, float]] = field(default_factory=list)
    train_curve: list[tuple[int, float]] = field(default_factory=list)
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    is_diverged: bool = False


def train(model: DepthAttnForCausalLM, run: Run, setting: Setting, corpus: Corpus) -> Record:
    """Train a model.

    The sequences of every step depend on the seed, the corpus and the setting only, not on the arm; models that are
    continued see others than in the training before.

    Args:
        model: the model.
        run: the run.
        setting: batches, optimizer and schedule.
        corpus: the corpus.
    """
    length = setting.sequence_length
    num_steps = -(-run.tokens // (length * setting.batch_size))
    order = torch.Generator().manual_seed(run.seed if run.start is None else _CONTINUED_SEEDS + run.seed)
    first = torch.randint(len(corpus.train) - length, (num_steps, setting.batch_size), generator=order)
    optimizer = make_optimizer(model, run, setting)
    peaks = [group["lr"] for group in optimizer.param_groups]
    evaluations, points = _stops(num_steps, setting.num_evaluations), _stops(num_steps, setting.num_train_points)
    record, losses = Record(), []
    record.heldout_curve.append((0, 0.0, heldout_loss(model.eval(), corpus, setting)))
    model.train()
    started, cpu_started = time.perf_counter(), time.process_time()
    for step in range(num_steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate_factor(step, num_steps, setting)
        losses.append(train_step(model, optimizer, *windows(corpus.train, first[step], length), setting))
        record.is_diverged = not math.isfinite(losses[-1])
        seen = (step + 1) * setting.batch_size * length
        if step + 1 in points:
            record.train_curve.append((seen, sum(losses) / len(losses)))
            losses = []
        if step + 1 in evaluations or record.is_diverged:
            record.cpu_seconds += time.process_time() - cpu_started
            record.wall_seconds += time.perf_counter() - started
            evaluated = heldout_loss(model.eval(), corpus, setting)
            record.heldout_curve.append((seen, record.cpu_seconds, evaluated))
            record.is_diverged |= not math.isfinite(evaluated)
            if record.is_diverged:
                break
            model.train()
            started, cpu_started = time.perf_counter(), time.process_time()
    return record


def make_optimizer(model: DepthAttnForCausalLM, run: Run, setting: Setting) -> torch.optim.Optimizer:
    """Return AdamW with the groups of the library, at the peak rates.

    Args:
        model: the model.
        run: learning rates.
        setting: weight decay and coefficients.
    """
    groups = depth_param_groups(
        model, lr=run.learning_rate, weight_decay=setting.weight_decay, depth_lr_factor=run.depth_lr_factor
    )
    return torch.optim.AdamW(groups, betas=(0.9, setting.beta2), fused=True)


def train_step(
    model: DepthAttnForCausalLM, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor, setting: Setting
) -> float:
    """Do one step of training and return the loss before it, in nats per byte.

    Args:
        model: the model.
        optimizer: its optimizer.
        inputs, targets: bytes, `[B, T]` each.
        setting: largest norm of the gradient.
    """
    loss = _loss(model, inputs, targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _stops(num_steps: int, number: int) -> set[int]:
    return {round(num_steps * (i + 1) / number) for i in range(number)} - {0}


def carry_out(run: Run, setting: Setting, results: Path, models: Path) -> None:
    """Train the model of a run from its start, save its weights, and then write its result.

    If the weights of the start were not kept, it is trained again first; its result is not changed.

    Args:
        run: the run.
        setting: what all runs have in common.
        results: folder of all results.
        models: folder of all trained weights.
    """
    torch.set_num_threads(setting.num_threads)
    model, record = _trained(run, setting, models)
    path = result_file(run, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json_text(_result(run, setting, model, record), indent=None))


def _trained(run: Run, setting: Setting, models: Path) -> tuple[DepthAttnForCausalLM, Record]:
    model = build_model(run, setting)
    if run.start is not None:
        start = weights_file(run.start, models)
        if not start.is_file():
            _trained(run.start, setting, models)
        copy_weights(load_file(start).items(), model)
    record = train(model, run, setting, read_corpus(run.corpus))
    if not record.is_diverged:
        save_weights(model, weights_file(run, models))
    return model, record


def weights_file(run: Run, models: Path) -> Path:
    """Return the file with the trained weights of a run.

    Args:
        run: the run.
        models: folder of all trained weights.
    """
    return models / f"{run.path}.safetensors"


def result_file(run: Run, results: Path) -> Path:
    """Return the file with the result of a run.

    Args:
        run: the run.
        results: folder of all results.
    """
    return results / f"{run.path}.json"


def save_weights(model: nn.Module, path: Path) -> None:
    """Save all parameters, tied ones once.

    Args:
        model: the model.
        path: the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file({name: parameter.detach() for name, parameter in model.named_parameters()}, partial)
    os.replace(partial, path)


def _result(run: Run, setting: Setting, model: nn.Module, record: Record) -> dict[str, Any]:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return {
        "benchmark": "pretraining",
        "run": run.to_dict(),
        "fields": dict(ARMS[run.arm].fields),
        "setting": setting.to_dict(),
        "corpus": read_corpus(run.corpus).facts(),
        "versions": versions(),
        "parameters": sum(sizes.values()),
        "depth_parameters": sum(size for name, size in sizes.items() if is_depth_name(name)),
        "tokens": record.heldout_curve[-1][0],
        "cpu_seconds": round(record.cpu_seconds, 2),
        "wall_seconds": round(record.wall_seconds, 2),
        "is_diverged": record.is_diverged,
        "heldout_loss": None if record.is_diverged else round(record.heldout_curve[-1][2], 5),
        "train_curve": [[seen, round(loss, 5)] for seen, loss in record.train_curve],
        "heldout_curve": [[seen, round(cpu, 2), round(loss, 5)] for seen, cpu, loss in record.heldout_curve],
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, torch, transformers and this repository."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
    }


def _commit() -> str:
    git = ["git", "-C", str(_ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head} with changes" if changed.stdout.strip() else head
