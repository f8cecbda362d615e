"""Select MoDA's depth slots by their mass on a text, and write a checkpoint that reads only those.

MoDA (arXiv 2603.15619) lets every layer read the slots of all earlier sublayers, and names the selection of the top S
of them as a way to bound memory, without implementing it. Here every layer keeps the slots with most mass in its
softmax. The budget is per layer, since the cost of a layer's attention and the mass that it loses depend on its own
slots only: with a sum over all layers, a few layers with many slots could use it up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoints.devices import check_device
from ...checkpoints.model_loading import check_token_ids, load_model, load_tokenizer
from ...checkpoints.source_folder import find_folder
from ...conversion.output_folder import check_apart, check_target
from ...conversion.slot_choice import config_with_slots, write_slot_choice
from ...conversion.source import DepthSource, read_depth_source
from ...errors import UserError
from ...errors.messages import one_line
from ...moda_slot_plan import DepthSlotPlan
from ...utils.argument_checks import check_at_least, check_dtype
from ...utils.paths import user_path
from ...utils.progress import progress_bar
from ...utils.text_table import table, weights_summary
from ..metrics.probing.interventions import keep_slots, visible_slots
from ..metrics.probing.probe import DepthProbe
from ..metrics.probing.text import TextBatches
from ..metrics.slot_mass import slot_mass

#: Defaults: number of windows of the text, and tokens per window.
NUM_SEQUENCES, SEQUENCE_LENGTH, BATCH_SIZE = 32, 256, 4


@dataclass(frozen=True)
class SlotSelection:
    """The report of `select_slots`.

    Attributes:
        model: folder or Hub id of the source.
        output_dir: the new checkpoint; `None` if none was written.
        budget: maximum number of slots that a layer reads.
        depth_slots: for each layer, the numbers of the slots that it reads.
        num_reads: numbers of reads, over all layers, before and after.
        num_present: largest number of slots in the depth state, before and after.
        num_sequences: number of windows; those with an even index select, the others give the losses.
        sequence_length: tokens per window.
        kept_mass: share of the mass that the selected slots have, over all layers.
        loss_before: loss in nats per token with all slots of the source.
        loss_after: loss with the selected slots.
        loss_newest: loss with the same number of slots in each layer, the newest ones (`num_depth_slots`).
        bytes_linked: size of the weights that are hard links to the source.
        bytes_copied: size of the weights that were copied.
        bytes_written: size of the shards that were rewritten.
    """

    model: str
    output_dir: str | None
    budget: int
    depth_slots: list[list[int]]
    num_reads: tuple[int, int]
    num_present: tuple[int, int]
    num_sequences: int
    sequence_length: int
    kept_mass: float
    loss_before: float
    loss_after: float
    loss_newest: float
    bytes_linked: int = 0
    bytes_copied: int = 0
    bytes_written: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            ("model", self.model),
            ("text", f"{self.num_sequences} windows of {self.sequence_length} tokens; losses are on every second one"),
            ("slots read", "{} -> {}".format(*self.num_reads) + f", at most {self.budget} in a layer"),
            ("slots kept at once", "{} -> {}".format(*self.num_present)),
            ("mass kept", f"{100 * self.kept_mass:.1f} %"),
            ("loss, all slots", f"{self.loss_before:.4f} nats per token"),
            ("loss, selected slots", f"{self.loss_after:.4f} ({self.loss_after - self.loss_before:+.4f})"),
            ("loss, newest slots", f"{self.loss_newest:.4f} ({self.loss_newest - self.loss_before:+.4f})"),
        ]
        if self.output_dir is not None:
            rows.append(("output", self.output_dir))
            rows.append(("weights", weights_summary(self.bytes_linked, self.bytes_copied, self.bytes_written)))
        return table(rows)


def select_slots(
    model: str | Path,
    text: str,
    *,
    budget: int,
    output_dir: str | Path | None = None,
    num_sequences: int | None = None,
    sequence_length: int | None = None,
    batch_size: int = BATCH_SIZE,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    copy: bool = False,
    copy_tokenizer_code: bool = False,
    progress: bool | None = None,
) -> SlotSelection:
    """Keep the slots with most mass in every layer, and write a checkpoint that reads only those.

    The mass of a slot is its mean weight in the joint softmax over tokens, times the gate if there is one, in absolute
    value, averaged over heads. It is measured on one half of the text, and the losses on the other half.

    Args:
        model: folder or Hub id of a causal language model with MoDA.
        text: the text.
        budget: maximum number of slots that a layer reads.
        output_dir: the folder to create; only measure by default.
        num_sequences: number of windows of the text, spread evenly; 32, or as many as it has, by default.
        sequence_length: tokens per window; 256, or the model's context length if that is smaller, by default.
        batch_size: windows per forward pass.
        dtype: one of `utils.argument_checks.DTYPES`.
        device: device of the model.
        revision: branch, tag or commit of a Hub repository.
        trust_remote_code: allow the custom code of a checkpoint.
        overwrite: replace an existing checkpoint at `output_dir`, once the new one is complete.
        copy: copy the weights instead of hard-linking them.
        copy_tokenizer_code: copy the code of a tokenizer with custom code, instead of raising.
        progress: as in `progress_bar`.

    Returns:
        The report; `str` formats it as a table.

    Raises:
        UserError: if the checkpoint has no slots or all its gates are zero, the text is too short, an argument is
            invalid, or the output cannot be written.
    """
    check_at_least({"budget": budget, "batch_size": batch_size}, 1)
    check_at_least({"num_sequences": num_sequences, "sequence_length": sequence_length}, 2)
    check_dtype(dtype)
    check_device(device)
    folder, _ = find_folder(model, revision)
    target = None if output_dir is None else user_path(output_dir).resolve()
    if target is not None:
        check_target(target, overwrite)
        check_apart(target, folder)
    depth = read_depth_source(folder)
    reads = _reads(depth)
    windows = _windows(depth, text, num_sequences, sequence_length, batch_size, trust_remote_code)
    measured, scored = windows.halves()
    loaded = load_model(
        folder,
        name=str(model),
        dtype=getattr(torch, dtype),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    check_token_ids(windows.ids, loaded, str(model))
    with progress_bar(len(measured) + 3 * len(scored), "slots", progress, unit=" passes") as bar:
        probe = DepthProbe(loaded, on_forward=partial(bar.update, 1))
        masses = slot_masses(probe, measured)
        if not any(mass > 0 for of_layer in masses for mass in of_layer.values()):
            raise UserError(f"{model}: all slots have a mass of 0, since its gates are zero; train the model first.")
        chosen = choose_slots(masses, budget)
        newest = [list(slots[-budget:]) for slots in reads]
        losses = [_loss(probe, scored, kept) for kept in (reads, chosen, newest)]
    del probe, loaded
    counts = None
    if target is not None:
        counts = write_slot_choice(
            depth,
            target,
            chosen,
            overwrite=overwrite,
            copy=copy,
            copy_tokenizer_code=copy_tokenizer_code,
            progress=progress,
        )
    after = config_with_slots(depth.config, chosen).depth_slot_plan
    total = sum(sum(of_layer.values()) for of_layer in masses)
    kept_mass = sum(masses[layer][slot] for layer, slots in enumerate(chosen) for slot in slots)
    return SlotSelection(
        model=str(model),
        output_dir=None if output_dir is None else str(output_dir),
        budget=budget,
        depth_slots=chosen,
        num_reads=(sum(map(len, reads)), sum(map(len, chosen))),
        num_present=(_num_present(depth.config.depth_slot_plan), _num_present(after)),
        num_sequences=windows.num_sequences,
        sequence_length=windows.sequence_length,
        kept_mass=kept_mass / total,
        loss_before=losses[0],
        loss_after=losses[1],
        loss_newest=losses[2],
        bytes_linked=counts.linked if counts else 0,
        bytes_copied=counts.copied if counts else 0,
        bytes_written=counts.written if counts else 0,
    )


def slot_masses(probe: DepthProbe, text: TextBatches) -> list[dict[int, float]]:
    """Return the mass of every slot in every layer, by the number of the slot.

    Args:
        probe: a model with MoDA.
        text: the text.
    """
    by_slot = _mean_over_heads(slot_mass(probe, text).by_slot)  # [L, slots]
    reads = probe.depth_config.depth_slot_plan.reads
    known = sorted({slot for slots in reads for slot in slots})
    return [{slot: by_slot[layer, known.index(slot)].item() for slot in slots} for layer, slots in enumerate(reads)]


def _mean_over_heads(by_slot: Tensor) -> Tensor:
    # Gates can be negative, and the layers of some hosts have fewer heads than others.
    return by_slot.abs().nanmean(dim=1)


def choose_slots(masses: Sequence[dict[int, float]], budget: int) -> list[list[int]]:
    """Return the slots with most mass in every layer, in ascending order; of equal ones the newest.

    Args:
        masses: the result of `slot_masses`.
        budget: maximum number of slots in a layer.
    """
    return [
        sorted(sorted(of_layer, key=lambda slot: (of_layer[slot], slot), reverse=True)[:budget]) for of_layer in masses
    ]


def _reads(depth: DepthSource) -> tuple[tuple[int, ...], ...]:
    """Return the slots that each layer reads, after checking that there are some."""
    if depth.architecture.suffix != "ForCausalLM":
        raise UserError(
            f"{depth.folder}: is a {depth.architecture.depth_class}; a causal language model is needed to measure a "
            "loss."
        )
    if depth.config.depth_kv is None:
        raise UserError(f"{depth.folder}: has no depth slots (depth_kv is None); a model with MoDA is needed.")
    reads = depth.config.depth_slot_plan.reads
    if not any(reads):
        raise UserError(f"{depth.folder}: none of its {len(reads)} layers reads a depth slot.")
    return reads


def _windows(
    depth: DepthSource,
    text: str,
    num_sequences: int | None,
    sequence_length: int | None,
    batch_size: int,
    trust_remote_code: bool,
) -> TextBatches:
    limit = getattr(depth.config.host_config, "max_position_embeddings", None)
    length = sequence_length or min(SEQUENCE_LENGTH, limit or SEQUENCE_LENGTH)
    if limit is not None and length > limit:
        raise UserError(f"--sequence-length {length}: exceeds the context length of {depth.folder}, {limit} tokens.")
    tokenizer = load_tokenizer(depth.folder, trust_remote_code=trust_remote_code)
    try:
        windows = TextBatches.from_text(
            tokenizer, text, sequence_length=length, num_sequences=num_sequences, batch_size=batch_size
        )
    except ValueError as error:
        raise UserError(f"--text: {one_line(error)}.") from error
    if windows.num_sequences < 2:
        raise UserError(
            f"--text: one window of {length} tokens; half of the windows select and the others give the loss, so at "
            "least two are needed. Give a longer text, or a smaller --sequence-length."
        )
    if num_sequences is None and windows.num_sequences > NUM_SEQUENCES:
        kept = [i * windows.num_sequences // NUM_SEQUENCES for i in range(NUM_SEQUENCES)]
        windows = TextBatches(windows.ids[kept], batch_size)
    return windows


@torch.no_grad()
def _loss(probe: DepthProbe, text: TextBatches, depth_slots: Sequence[Sequence[int]]) -> float:
    """Return the loss if each layer reads these slots only."""
    config = probe.depth_config
    kept = [
        [name for name, slot in zip(names, slots, strict=True) if slot in chosen]
        for names, slots, chosen in zip(visible_slots(config), config.depth_slot_plan.reads, depth_slots, strict=True)
    ]
    with keep_slots(config, probe.layers, kept):
        return probe.loss(text)


def _num_present(plan: DepthSlotPlan) -> int:
    return max(len(plan.present(layer)) for layer in range(len(plan.reads) + 1))
