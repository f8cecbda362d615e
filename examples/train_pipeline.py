"""Train a causal LM in pipeline stages on text, from a checkpoint or from scratch.

docs/pipeline.md is the tutorial. Run it in a clone of the repository, on GPUs or on CPU processes:

    torchrun --nproc-per-node 2 examples/train_pipeline.py examples/configs/deep_narrow book.txt --out run
    torchrun --nproc-per-node 8 examples/train_pipeline.py CHECKPOINT texts/ --out run --fsdp 2 --schedule 1F1B

OUT/model appears at the end and loads as any other checkpoint. OUT/state-* are written every --save-every steps;
--resume continues from the last one, also with another schedule or another number of processes.
"""

import argparse
import itertools
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_depthattn import DepthAttnConfig, depth_param_groups
from hf_depthattn.cli.depth_arguments import add_depth_flags, given_flags
from hf_depthattn.cli.options import Parser
from hf_depthattn.cli.run_command import EXIT_OK, run_command
from hf_depthattn.distributed.pipeline import DepthPipeline, build_pipeline
from hf_depthattn.distributed.stage_checkpoint import save_pipeline
from hf_depthattn.distributed.training_state import load_training_state, save_training_state
from hf_depthattn.errors import UserError
from hf_depthattn.pretraining.new_config import new_config, read_config
from hf_depthattn.pretraining.packing import pack
from hf_depthattn.pretraining.sources import read_sources
from hf_depthattn.pretraining.text_tokenizer import make_tokenizer
from hf_depthattn.utils.argument_checks import check_at_least
from hf_depthattn.utils.paths import user_path
from hf_depthattn.utils.quiet_libraries import quiet_libraries


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="train_pipeline.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "source", help="folder of a checkpoint; or config of a host (folder, file, model type): from scratch, on bytes"
    )
    add("text", nargs="+", help="files, folders, or hf:ID[@CONFIG]:SPLIT[:COLUMN]")
    add("--out", required=True, type=user_path, help="folder of the run")
    add("--schedule", default="Interleaved1F1B", help="of torch.distributed.pipelining (default: Interleaved1F1B)")
    add("--stages-per-rank", type=int, metavar="V", help="default: 1 for GPipe and 1F1B, 2 for others")
    add("--fsdp", type=int, default=1, metavar="F", help="processes that share each stage with FSDP2 (default: 1)")
    add("--microbatches", type=int, default=8, help="per step and pipeline (default: 8)")
    add("--microbatch-size", type=int, default=1, help="sequences per microbatch (default: 1)")
    add("--block-size", type=int, default=256, help="tokens per sequence (default: 256)")
    add("--steps", type=int, default=100, help="optimizer steps (default: 100)")
    add("--learning-rate", type=float, default=1e-3, help="constant (default: 1e-3)")
    add("--save-every", type=int, default=50, help="steps (default: 50)")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="continue the run in OUT from its last state")
    add_depth_flags(parser)
    args = parser.parse_args()
    positive = ("fsdp", "microbatches", "microbatch_size", "steps", "save_every", "stages_per_rank")
    check_at_least({name: getattr(args, name) for name in positive}, 1)
    return args


def read_source(args: argparse.Namespace, texts: list[str]) -> tuple[str | DepthAttnConfig, PreTrainedTokenizerBase]:
    """Return the checkpoint, or the config of a new model, and the tokenizer."""
    if any(user_path(args.source).glob("*.safetensors")):
        if given := given_flags(args):
            raise UserError(f"{', '.join(given)}: cannot be changed in a checkpoint; give the config of a host.")
        return args.source, make_tokenizer(args.source, texts, 0, args.block_size)
    tokenizer = make_tokenizer("bytes", texts, 0, args.block_size)
    host, saved = read_config(args.source)
    options: dict[str, Any] = {"saved_options": saved, **given_flags(args)}
    return new_config(host, tokenizer, sequence_length=args.block_size, **options), tokenizer


def make_pipeline(args: argparse.Namespace, source: str | DepthAttnConfig, device: torch.device) -> DepthPipeline:
    """Return the stages of this process, each sharded over `--fsdp` processes."""
    num_ranks, rest = divmod(dist.get_world_size(), args.fsdp)
    if rest:
        raise UserError(f"--fsdp {args.fsdp}: must divide the number of processes, {dist.get_world_size()}.")
    mesh = dist.init_device_mesh(device.type, (num_ranks, args.fsdp), mesh_dim_names=("pipeline", "data"))

    def prepare(model: PreTrainedModel) -> nn.Module:
        model.gradient_checkpointing_enable()
        layers = [layer for layer in model.base_model.layers if any(True for _ in layer.parameters())]
        for module in (*layers, model) if args.fsdp > 1 else ():
            fully_shard(module, mesh=mesh["data"])
        return model

    options = {"num_microbatches": args.microbatches, "stages_per_rank": args.stages_per_rank, "seed": args.seed}
    group = mesh["pipeline"].get_group()
    try:
        return build_pipeline(source, args.schedule, device=device, group=group, parallelize=prepare, **options)
    except ValueError as error:
        raise UserError(str(error)) from error


def train(args: argparse.Namespace, device: torch.device) -> int:
    if not args.resume and args.out.exists() and any(args.out.iterdir()):
        raise UserError(f"--out {args.out}: is not empty; continue its run with --resume, or choose another folder.")
    texts = read_sources(args.text, "TEXT", named={})
    source, tokenizer = read_source(args, texts)
    blocks = pack(tokenizer, texts, args.block_size, name="TEXT")
    pipeline = make_pipeline(args, source, device)
    if dist.get_rank() == 0:
        print(f"{'new model' if isinstance(source, DepthAttnConfig) else 'checkpoint'}: {args.source}", flush=True)
    groups = [depth_param_groups(model, lr=args.learning_rate, weight_decay=0.1) for model in pipeline.models]
    optimizer = torch.optim.AdamW(itertools.chain(*groups), betas=(0.9, 0.95))
    states = sorted(path.parent for path in args.out.glob("state-*/.metadata"))
    step = load_training_state(pipeline, optimizer, states[-1]) if states else 0

    # All ranks of a pipeline get the same rows; processes that share a stage are in different pipelines.
    num_rows, number = args.microbatches * args.microbatch_size, dist.get_rank() % args.fsdp
    while step < args.steps:
        generator = torch.Generator().manual_seed(args.seed + step)
        rows = torch.randint(len(blocks), (args.fsdp, num_rows), generator=generator)[number]
        batch = blocks[rows].long().to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            loss = pipeline.step(batch, labels=batch)
        pipeline.clip_grad_norm(1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if loss is not None and number == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
        if step % args.save_every == 0:
            save_training_state(pipeline, optimizer, args.out / f"state-{step:06d}", step=step)
    save_pipeline(pipeline, args.out / "model", tokenizer=tokenizer, overwrite=args.resume)
    return EXIT_OK


def main() -> int:
    args = parse_arguments()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type != "cpu":
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device.index)
    dist.init_process_group()
    with quiet_libraries(progress=None):
        code = train(args, device)
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(run_command(main, "train_pipeline.py"))
