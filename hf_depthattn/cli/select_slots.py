"""The subcommand `depthattn select-slots`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..utils.argument_checks import check_at_least
from ..utils.paths import read_text
from .options import (
    Commands,
    add_batch_size,
    add_command,
    add_device,
    add_dtype,
    add_output_options,
    add_remote_code,
    print_report,
)
from .run_command import EXIT_OK


def add_select_slots(commands: Commands) -> None:
    """Add the subcommand to the parser of `depthattn`."""
    parser = add_command(
        commands,
        "select-slots",
        _run_select_slots,
        help="let each layer of a model with MoDA read only the depth slots with most mass",
        description="Measure the mass of every depth slot in every layer on one half of a text, keep the K slots with "
        "most mass in each layer, and print the loss on the other half with all slots, with the selected ones and "
        "with the K newest. With --output, write a checkpoint that reads only the selected slots; its weights are "
        "hard links where possible.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a causal language model with MoDA")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="UTF-8 text to measure on")
    parser.add_argument(
        "--budget", metavar="K", type=int, required=True, help="maximum number of slots that a layer reads"
    )
    parser.add_argument("--output", metavar="OUT", help="folder to create (default: only measure)")
    parser.add_argument(
        "--num-sequences",
        type=int,
        metavar="N",
        help="number of windows, spread evenly over the text (default: 32, or as many as the text has)",
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="T",
        help="tokens per window (default: 256, or the context length if that is smaller)",
    )
    add_batch_size(parser, "windows", 4)
    add_dtype(parser, "float32")
    add_device(parser, of="the model")
    add_remote_code(parser)
    add_output_options(parser)


def _run_select_slots(args: argparse.Namespace) -> int:
    from ..checkpoints.source_folder import find_checkpoint
    from ..conversion.early_checks import check_conversion

    # Before torch is imported, so that most mistakes are reported without delay.
    check_at_least({"budget": args.budget, "batch_size": args.batch_size}, 1)
    text = read_text(args.text)
    if args.output is None:
        find_checkpoint(args.model, args.revision)
    else:
        check_conversion(args.model, args.output, overwrite=args.overwrite, revision=args.revision)
    from ..eval.slot_selection.select_slots import select_slots

    report = select_slots(
        args.model,
        text,
        budget=args.budget,
        output_dir=args.output,
        num_sequences=args.num_sequences,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        overwrite=args.overwrite,
        copy=args.copy,
        copy_tokenizer_code=args.copy_tokenizer_code,
        progress=args.progress,
    )
    print_report(report, args)
    return EXIT_OK
