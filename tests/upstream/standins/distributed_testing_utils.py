"""Stands in for functions of transformers' tests that its source distribution lacks: ranks as processes, on a CPU.

Names and signatures are those that `test_tensor_parallel_mixin.py` and `test_fsdp_mixin.py` import.
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_device_type():
    return "cpu"


def _get_distributed_backend():
    return "gloo"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank, backend=None):
    pass


def _start_rank_processes(function, args, nprocs):
    mp.spawn(function, args=args, nprocs=nprocs)


def _run_rank(rank, function, world_size, rendezvous_file, args, kwargs):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", init_method=f"file://{rendezvous_file}", rank=rank, world_size=world_size)
    try:
        function(rank, *args, **kwargs)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_distributed(world_size):
    """Decorator: a call of the function runs it once per rank, with the rank as its first argument."""

    def decorate(function):
        def run(*args, **kwargs):
            with tempfile.TemporaryDirectory() as folder:
                rendezvous_file = os.path.join(folder, "rendezvous")
                _start_rank_processes(_run_rank, (function, world_size, rendezvous_file, args, kwargs), world_size)

        return run

    return decorate
