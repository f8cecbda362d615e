"""Plan the training of a model on many GPUs: axes, bytes per boundary between pipeline stages, memory per rank.

    python -m hf_depthattn.distributed.plan CONFIG --gpus 64

CONFIG is the config of a host or of a model with depth attention: a JSON file, a folder or a model type. Without
--pipeline, the pipeline is the shortest one that fits into 90 % of --gpu-memory; the rest is for what is not counted.
One rank is FSDP2 alone, which is never idle but gathers all parameters for every microbatch: that time is not counted.
Nothing is loaded, and no GPU is needed.

Counted from the plans of the stages and the model's parameters: bytes per boundary, parameters, gradients, optimizer,
depth state. Estimated, marked with ~: gradients of the depth state, the recomputed layer, logits. Layers are
checkpointed, FSDP2 has bfloat16 mixed precision, the optimizer is AdamW; docs/pipeline.md explains every number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from huggingface_hub.errors import StrictDataclassError

from ..checkpoints.config_check import check_counts
from ..cli.depth_arguments import add_depth_flags, add_set, assigned, given_flags
from ..cli.options import Parser
from ..cli.run_command import EXIT_OK, run_command
from ..configuration_depthattn import DepthAttnConfig
from ..depth_connections import connection_class
from ..depth_options import DEPTH_OPTIONS, replace_options
from ..errors import UserError
from ..errors.messages import one_line
from ..pretraining.new_config import read_config
from ..utils.argument_checks import check_at_least
from ..utils.quiet_libraries import quiet_libraries
from ..utils.text_table import table
from .capacity import Axes, Capacity, RankMemory, Workload, plan_capacity
from .parameter_counts import count_parameters
from .schedule_order import CountedSchedule
from .stage_building import routers_of

_GIB, _MIB = 2**30, 2**20
# Share of a GPU's memory that a plan may use: buffers of communication and fragmentation are not counted.
_USABLE = 0.9
# FSDP2 groups beyond this size save little memory and wait longer for each other.
_MAX_FSDP = 64
# Microbatches per rank of the pipeline, if their number is not given.
_MICROBATCHES_PER_RANK = 4


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        arguments: the arguments; by default those of the process.
    """
    parser = Parser(
        prog="hf_depthattn.distributed.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="config.json, its folder, or a model type such as qwen3")
    add("--gpus", type=int, required=True, metavar="N", help="number of GPUs")
    add("--gpu-memory", type=int, default=80, metavar="GIB", help="memory of a GPU in GiB (default: 80)")
    add("--pipeline", type=int, metavar="P", help="ranks of a pipeline (default: as few as fit into memory)")
    add(
        "--virtual", type=int, metavar="V", help="stages per rank (default: 2 if there is a pipeline, and 1 with 1f1b)"
    )
    add("--tensor", type=int, default=1, metavar="T", help="GPUs that split every layer (default: 1)")
    add("--fsdp", type=int, metavar="F", help=f"GPUs that split parameters (default: the others, up to {_MAX_FSDP})")
    add("--schedule", choices=list(CountedSchedule), help="default: interleaved, or 1f1b with one stage per rank")
    add("--sequence-length", type=int, default=4096, metavar="TOKENS", help="tokens per sequence (default: 4096)")
    add("--microbatch-size", type=int, default=1, metavar="B", help="sequences per microbatch (default: 1)")
    add("--microbatches", type=int, metavar="M", help="per pipeline and step (default: 4 P)")
    add_depth_flags(parser)
    add_set(parser, "set any option of depth attention; can be repeated")
    args = parser.parse_args(arguments)
    numbers = ("gpus", "gpu_memory", "pipeline", "virtual", "tensor", "fsdp", "microbatch_size", "microbatches")
    check_at_least({name: getattr(args, name) for name in (*numbers, "sequence_length")}, 1)
    return args


def make_config(args: argparse.Namespace) -> DepthAttnConfig:
    """Return the config of the model with the options that were given.

    Args:
        args: the parsed arguments.

    Raises:
        UserError: if a value is not allowed.
    """
    host, saved = read_config(args.config)
    check_counts("host", host)
    given = {**given_flags(args), **assigned(args.set, DEPTH_OPTIONS)}
    try:
        return DepthAttnConfig(text_config=host, **{**replace_options(saved, given), **given})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(one_line(error)) from error


def choose(config: DepthAttnConfig, args: argparse.Namespace) -> Capacity:
    """Return the plan with the axes that were given.

    Without a length of the pipeline, it is the shortest one of 1, 2, 4, 8, ... ranks that fits, or else the one with
    the least memory.

    Args:
        config: the model's config.
        args: the parsed arguments.

    Raises:
        UserError: if the numbers do not fit each other.
    """
    count, routers = count_parameters(config, args.tensor), routers_of(config)
    num_layers = config.host_config.num_hidden_layers
    if args.pipeline:
        lengths = [args.pipeline]
    else:
        lengths = [2**power for power in range(num_layers.bit_length()) if args.gpus % (args.tensor << power) == 0]
    plans = []
    for length in lengths:
        num_virtual = args.virtual or (2 if 1 < length <= num_layers // 2 and args.schedule != "1f1b" else 1)
        axes = _axes(args, length, num_virtual)
        workload = Workload(
            args.sequence_length,
            args.microbatch_size,
            args.microbatches or _MICROBATCHES_PER_RANK * length,
            args.schedule or (CountedSchedule.INTERLEAVED if num_virtual > 1 else CountedSchedule.ONE_F_ONE_B),
        )
        try:
            plans.append(plan_capacity(config, count, axes, workload, routers))
        except ValueError as error:
            # A longer pipeline may fit the number of layers or microbatches.
            if length == lengths[-1] and not plans:
                raise UserError(one_line(error)) from error
            continue
        if _fits(plans[-1], args.gpu_memory):
            return plans[-1]
    if not plans:
        raise UserError(f"--gpus {args.gpus}: must be a multiple of tensor, {args.tensor}.")
    return min(plans, key=lambda plan: plan.peak)


def _fits(plan: Capacity, gpu_memory: int) -> bool:
    return plan.peak <= _USABLE * gpu_memory * _GIB


def _axes(args: argparse.Namespace, length: int, num_virtual: int) -> Axes:
    num_others, rest = divmod(args.gpus, length * args.tensor)
    fsdp = args.fsdp or max(size for size in range(1, _MAX_FSDP + 1) if num_others % size == 0)
    if rest or num_others % fsdp or not num_others:
        raise UserError(
            f"--gpus {args.gpus}: must be a multiple of pipeline x tensor x fsdp, {length} x {args.tensor} x {fsdp}."
        )
    return Axes(length, num_virtual, args.tensor, fsdp, num_others // fsdp)


def render(config: DepthAttnConfig, plan: Capacity, gpu_memory: int) -> str:
    """Return the plan as text.

    Args:
        config: the model's config.
        plan: the plan.
        gpu_memory: memory of a GPU, GiB.
    """
    return "\n".join(_lines(config, plan, gpu_memory))


def _lines(config: DepthAttnConfig, plan: Capacity, gpu_memory: int) -> Iterator[str]:
    axes, workload = plan.axes, plan.workload
    host = config.host_config
    yield f"{host.model_type}, {host.num_hidden_layers} layers of {config.hidden_size}, {_description(config)}"
    yield (
        f"{axes.num_gpus} GPUs = pipeline {axes.pipeline} (x {axes.num_virtual} stages) x tensor {axes.tensor} "
        f"x fsdp {axes.fsdp} x data {axes.data}"
    )
    replicas = axes.fsdp * axes.data
    sequences = workload.microbatch_size * workload.num_microbatches * replicas
    yield (
        f"schedule {workload.schedule}, {workload.num_microbatches} microbatches of {workload.microbatch_size} x "
        f"{workload.sequence_length} tokens; a step is {sequences * workload.sequence_length:,} tokens, "
        f"{plan.idle_share:.0%} of it idle"
    )
    if plan.boundaries:
        yield ""
        yield "MiB per boundary, microbatch and direction:"
        yield table([_traffic("cached", plan.boundaries), _traffic("whole state", plan.uncached_boundaries)])
    yield ""
    yield "GiB per GPU of each rank (~ estimated):"
    yield table([_HEADER, *(_row(rank) for rank in plan.ranks)])
    verdict = "fits" if _fits(plan, gpu_memory) else "does NOT fit"
    yield f"The fullest rank {verdict} into {_USABLE:.0%} of {gpu_memory} GiB."


def _description(config: DepthAttnConfig) -> str:
    description = connection_class(config).describe(config)
    return description if config.depth_kv is None else f"{description}, MoDA slots of {config.depth_kv}"


def _traffic(name: str, boundaries: Sequence[int]) -> list[str]:
    return [name, *(f"{num_bytes / _MIB:.0f}" for num_bytes in boundaries), f"= {sum(boundaries) / _MIB:.0f}"]


_COLUMNS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "depth_state": "depth state",
    "state_gradients": "~its gradients",
    "layer": "~layer",
    "logits": "~logits",
    "total": "total",
}
_HEADER = ["rank", "layers", "10^9 parameters", *_COLUMNS.values()]


def _row(rank: RankMemory) -> list[str]:
    layers = ", ".join(f"{each.start}-{each.stop - 1}" for each in rank.layers)
    numbers = [f"{getattr(rank, name) / _GIB:.1f}" for name in _COLUMNS]
    return [str(rank.rank), layers, f"{rank.num_parameters / 1e9:.2f}", *numbers]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan, and return the exit code.

    Args:
        arguments: the arguments; by default those of the process.
    """
    args = parse_arguments(arguments)
    with quiet_libraries(progress=None):
        config = make_config(args)
        print(render(config, choose(config, args), args.gpu_memory))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_command(main, "hf_depthattn.distributed.plan"))
