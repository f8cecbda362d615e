"""Retrofit a checkpoint, verify it, fine-tune it and a baseline, and inspect the result.

    python examples/demo_retrofit.py                       # the embedded model, a 16-layer Llama on Python source code
    python examples/demo_retrofit.py --model FOLDER_OR_ID  # any checkpoint with a supported host

Runs for Attention Residuals (AttnRes), for Mixture-of-Depths Attention (MoDA), and for both in one model. The text is
the source code of Python's standard library, which is available wherever Python is installed; some of its files are
held out. All models are trained on the same batches in the same order and start as the same function: before training,
the retrofitted models return the logits of the baseline, the stock model.
"""

import argparse
import json
import logging
import math
import os
import shutil
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Let waiting threads sleep: spinning threads slow each other down on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from demo_model.stdlib_corpus import read_texts, split, stdlib_files, token_blocks
from demo_tools import block_losses, command, heading, new_output_folder, sample, write_report
from heat_map import save_heat_map
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers import logging as transformers_logging

from hf_depthattn import DepthAttnForCausalLM
from hf_depthattn.cli.run_command import EXIT_OK, EXIT_USER_ERROR
from hf_depthattn.eval.metrics.weights import mean_depth_weights, mean_slot_mass
from hf_depthattn.integrations.trainer import depth_optimizer_cls_and_kwargs

EMBEDDED_MODEL = Path(__file__).parent / "demo_model" / "checkpoint"
#: Number of held-out files of the standard library, on which all measurements are made.
HELD_OUT_FILES = 12

MODA = ("--depth-kv", "attention+mlp", "--depth-gate", "head")
#: name -> folder, options of `depthattn retrofit`
RETROFITS: dict[str, tuple[str, tuple[str, ...]]] = {
    "AttnRes": ("attn_res", ()),
    "MoDA": ("moda", ("--connection", "residual", *MODA)),
    "AttnRes + MoDA": ("attn_res_moda", MODA),
}


def main() -> None:
    arguments = parse_arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    started = time.perf_counter()
    out = arguments.out
    new_output_folder(out)

    heading("1. Retrofit and verify: weights are linked, new ones saved in one small shard; the function is unchanged")
    folders = {name: out / folder for name, (folder, _) in RETROFITS.items() if make(name, arguments)}

    heading("2. Fine-tune models and control on Python's standard library, same batches in the same order")
    tokenizer = AutoTokenizer.from_pretrained(out / "attn_res")
    train, held_out = text_blocks(tokenizer, arguments)
    control = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    models: dict[str, PreTrainedModel] = {"control": control}
    for name, folder in folders.items():
        models[name] = DepthAttnForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # The last model has both mechanisms and is the slowest.
    seconds_per_step = time_steps(list(models.values())[-1], train[: arguments.batch_size])
    steps = arguments.steps or steps_for(seconds_per_step, train, arguments)
    losses = {"before": block_losses(models["control"], held_out)}
    seconds = {}
    for name, model in models.items():
        seconds[name] = fine_tune(model, train, steps, out / "trainer", arguments, depth=name != "control")
        losses[name] = block_losses(model, held_out)
        print(f"{name}: {steps} steps in {seconds[name]:.0f} s", flush=True)
    differences = {name: losses[name] - losses["control"] for name in folders}
    minus_control = {
        name: {"mean": blocks.mean().item(), "standard_error": blocks.std().item() / math.sqrt(len(blocks))}
        for name, blocks in differences.items()
    }
    print_losses(losses, seconds, minus_control, steps, train.shape[1], arguments)

    heading("3. Samples (temperature 0.7, top-k 40)")
    for name, model in models.items():
        print(f"--- {name}\n{sample(model, tokenizer, arguments.seed)}")

    heading("4. Trained depth parameters")
    gates = show_what_has_moved({name: models[name] for name in folders}, held_out[:16].split(4), out)
    for name, folder in {**folders, "control": out / "control"}.items():
        models[name].save_pretrained(f"{folder}_finetuned")
        tokenizer.save_pretrained(f"{folder}_finetuned")

    heading("5. Depth report: the last model compared with the control on held-out text")
    held_out_text = read_texts(split(stdlib_files())[1][:HELD_OUT_FILES])
    last = out / f"{list(folders.values())[-1].name}_finetuned"
    report = write_report(last, out / "control_finetuned", held_out_text, 12, out)
    summary = {
        "model": str(arguments.model),
        "steps": steps,
        "seed": arguments.seed,
        "held_out_loss_nats_per_token": {name: values.mean().item() for name, values in losses.items()},
        "minus_control": minus_control,
        "gates": gates,
        "training_seconds": seconds,
        "seconds": time.perf_counter() - started,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    heading(f"Done in {time.perf_counter() - started:.0f} s")
    for path, what in {
        **{folder.name: f"retrofitted checkpoint with {name}, including its code" for name, folder in folders.items()},
        "*_finetuned": "fine-tuned checkpoints",
        "depth_weights.png": "heat map of the depth weights of AttnRes",
        **({str(report.relative_to(out)): "depth report; open it in a browser"} if report else {}),
        "summary.json": "the numbers above",
    }.items():
        print(f"{out / path}  {what}")


def make(name: str, arguments: argparse.Namespace) -> bool:
    """Retrofit and verify one variant; return `False` if the host does not support MoDA (the command prints why)."""
    folder, options = RETROFITS[name]
    output = str(arguments.out / folder)
    if "residual" not in options and arguments.num_blocks is not None:
        options = ("--num-blocks", str(arguments.num_blocks), *options)
    code = command("retrofit", arguments.model, output, *options)
    if code == EXIT_USER_ERROR and MODA[0] in options:
        return False
    if code != EXIT_OK or command("verify", arguments.model, output) != EXIT_OK:
        raise SystemExit(f"{name}: retrofit or verification failed; nothing was trained.")
    return True


def print_losses(losses: dict, seconds: dict, minus_control: dict, steps: int, length: int, arguments) -> None:
    print(f"{steps} steps of {arguments.batch_size} x {length} tokens, learning rate {arguments.learning_rate:g}")
    print(f"{'':16}{'held-out loss':>15}{'minus control (s.e.)':>24}{'training seconds':>20}")
    for name, blocks in losses.items():
        difference = minus_control.get(name)
        cell = f"{difference['mean']:+.4f} ({difference['standard_error']:.4f})" if difference else ""
        print(f"{name:16}{blocks.mean():15.4f}{cell:>24}{seconds.get(name, 0.0) or '':>20.5}")
    print(f"Nats per token: mean and standard error over {len(losses['control'])} blocks of held-out text.")
    print("One seed and a minute of training show that training works and moves new parameters, not which is better.")


def show_what_has_moved(models: dict, probe: tuple[Tensor, ...], out: Path) -> dict:
    """Save the depth weights of AttnRes as a heat map, and print and return a summary of MoDA's gates and slots."""
    weights = mean_depth_weights(models["AttnRes"], probe)
    save_heat_map(weights, out / "depth_weights.png", "Mean depth weights of AttnRes on held-out text")
    largest = (weights.nan_to_num() - uniform_like(weights)).abs().max().item()
    print(f"AttnRes: largest change of a mean depth weight from the uniform start: {largest:.3f}")
    gates = {name: gate_summary(model, probe) for name, model in models.items() if model.config.depth_kv}
    for name, moved in gates.items():
        print(
            f"{name}: {moved['moved']} of {moved['number']} gates are no longer 0, mean |gate| "
            f"{moved['mean_absolute']:.3f}, largest {moved['largest_absolute']:.3f}"
        )
        print("  weight of the depth slots by layer:", *(f"{mass:+.3f}" for mass in moved["slot_mass_by_layer"]))
    return gates


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED_MODEL), help="checkpoint folder or Hub id (default: embedded)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_retrofit_output"), help="output folder; earlier results are replaced"
    )
    parser.add_argument("--num-blocks", type=int, default=None, help="number of AttnRes blocks (default: 8)")
    parser.add_argument(
        "--steps", type=int, default=None, help="optimizer steps (default: as many as fit into --seconds)"
    )
    parser.add_argument(
        "--seconds", type=float, default=60, help="training time of the slowest model if --steps is not given"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=256, help="tokens per training sequence")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument(
        "--depth-lr-factor", type=float, default=1.0, help="factor on the learning rate of depth parameters"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def text_blocks(tokenizer, arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return training and held-out blocks of token ids from a part of the standard library."""
    train_files, held_out_files = split(stdlib_files())
    generator = torch.Generator().manual_seed(arguments.seed)
    order = torch.randperm(len(train_files), generator=generator).tolist()
    train = token_blocks(tokenizer, read_texts(train_files[i] for i in order[:150]), arguments.block_size)
    return train, token_blocks(tokenizer, read_texts(held_out_files[:HELD_OUT_FILES]), arguments.block_size)[:64]


def time_steps(model, batch: Tensor) -> float:
    """Return the seconds per training step, after choosing one or all threads, whichever is faster."""
    model.train()
    fastest = {}
    for num_threads in {1, os.cpu_count() or 1}:
        torch.set_num_threads(num_threads)
        times = []
        for _ in range(4):
            started = time.perf_counter()
            model(batch, labels=batch, use_cache=False).loss.backward()
            times.append(time.perf_counter() - started)
        fastest[num_threads] = min(times)
    model.zero_grad(set_to_none=True)
    num_threads = min(fastest, key=fastest.__getitem__)
    torch.set_num_threads(num_threads)
    return fastest[num_threads]


def steps_for(seconds_per_step: float, train: Tensor, arguments: argparse.Namespace) -> int:
    """Return the number of steps that take about `--seconds`, including optimizer and data loading."""
    steps = int(arguments.seconds / (1.15 * seconds_per_step))
    return max(10, min(steps, 400, len(train) // arguments.batch_size))


def fine_tune(model, train: Tensor, steps: int, folder: Path, arguments: argparse.Namespace, depth: bool) -> float:
    """Train with Trainer; return the seconds it took."""
    set_seed(arguments.seed)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        warmup_steps=max(1, steps // 20),
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=arguments.seed,
        dataloader_pin_memory=False,
    )
    optimizer = depth_optimizer_cls_and_kwargs(args, depth_lr_factor=arguments.depth_lr_factor) if depth else None
    dataset = [{"input_ids": block, "labels": block} for block in train]
    started = time.perf_counter()
    trainer = Trainer(model, args, train_dataset=dataset, optimizer_cls_and_kwargs=optimizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    shutil.rmtree(folder, ignore_errors=True)
    return time.perf_counter() - started


def gate_summary(model, batches) -> dict:
    """Summarise the gates of MoDA and the weight of its depth slots."""
    values = torch.cat([value.detach() for name, value in model.named_parameters() if name.endswith("depth_kv.gate")])
    return {
        "number": values.numel(),
        "moved": int(values.ne(0).sum()),
        "mean_absolute": values.abs().mean().item(),
        "largest_absolute": values.abs().max().item(),
        # The first layer reads no slots (NaN).
        "slot_mass_by_layer": mean_slot_mass(model, batches).nan_to_num().tolist(),
    }


def uniform_like(weights: Tensor) -> Tensor:
    """Return the uniform weights of zero queries."""
    exists = ~weights.isnan()
    return exists / exists.sum(dim=-1, keepdim=True)


if __name__ == "__main__":
    main()
