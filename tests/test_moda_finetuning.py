"""Fine-tuning from closed gates, on real checkpoints: the gates move, and the loss is not worse than the control's."""

import math

import pytest
import torch
from moda_models import COMBINATIONS
from repository import ROOT
from tiny_checkpoints import load
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

from hf_depthattn.conversion.retrofit import retrofit
from hf_depthattn.integrations.trainer import depth_optimizer_cls_and_kwargs

NUM_STEPS, BATCH_SIZE, NUM_TOKENS, NUM_HELD_OUT = 100, 4, 64, 64

#: name -> source folder, training text, held-out text, relative to the data or to the repository. Neither model has
#: seen text of this kind: 260K parameters know short stories, the demo's model Python's standard library.
CHECKPOINTS = {
    "stories260K": ("stories260K/hf", "books/train/*tales*.md", "books/validation/*.md"),
    "demo model": ("examples/demo_model/checkpoint", "hf_depthattn/*.py", "conversion/*.py"),
}


def token_blocks(tokenizer, folder, pattern: str, num_blocks: int) -> torch.Tensor:
    """The first blocks [N, T] of some files."""
    ids: list[int] = []
    for path in sorted(folder.glob(pattern)):
        ids += tokenizer(path.read_text(encoding="utf-8")[:200_000], verbose=False)["input_ids"]
    return torch.tensor(ids[: num_blocks * NUM_TOKENS]).view(num_blocks, NUM_TOKENS)


@torch.no_grad()
def block_losses(model, blocks: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each block, nats per token."""
    logits = model.eval()(blocks, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.mT, blocks[:, 1:], reduction="none").mean(dim=-1).double()


def trained(folder, output, blocks: torch.Tensor, **config):
    """The retrofit of a checkpoint after training; batches, their order and the seed are always the same."""
    retrofit(folder, output, progress=False, **config)
    model = load(output).float()
    set_seed(0)
    args = TrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=NUM_STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=5e-4,
        warmup_steps=10,
        weight_decay=0.01,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    optimizer = depth_optimizer_cls_and_kwargs(args, depth_lr_factor=2.0)
    dataset = [{"input_ids": block, "labels": block} for block in blocks]
    Trainer(model, args, train_dataset=dataset, optimizer_cls_and_kwargs=optimizer).train()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_after_100_steps_gates_have_moved_and_the_loss_is_not_worse_than_the_controls(name, request, tmp_path):
    folder, train_text, held_out_text = CHECKPOINTS[name]
    root = request.getfixturevalue("depthattn_data") if name == "stories260K" else ROOT
    tokenizer = AutoTokenizer.from_pretrained(root / folder)
    train = token_blocks(tokenizer, root, train_text, NUM_STEPS * BATCH_SIZE)
    held_out = token_blocks(tokenizer, root, held_out_text, NUM_HELD_OUT)
    before = block_losses(load(root / folder).float(), held_out)
    control = block_losses(trained(root / folder, tmp_path / "control", train, connection="residual"), held_out)
    assert control.mean() < before.mean() - 0.05
    for label, fields in COMBINATIONS.items():
        model = trained(root / folder, tmp_path / label, train, depth_kv="attention+mlp", **fields)
        gates = torch.cat([p.detach() for key, p in model.named_parameters() if key.endswith(".gate")])
        assert gates.ne(0).all() and gates.abs().mean() > 0.003, label
        difference = block_losses(model, held_out) - control
        standard_error = difference.std().item() / math.sqrt(len(difference))
        print(f"{name}, {label}: {difference.mean():+.4f} +- {standard_error:.4f}, |gate| {gates.abs().mean():.3f}")
        assert difference.mean() <= max(0.01, standard_error), label
