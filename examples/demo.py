"""The main job from start to end: retrofit a checkpoint, verify it, fine-tune it beside its control, look inside.

    python examples/demo.py                       # the embedded demo model, a 16-layer Llama on Python source code
    python examples/demo.py --model FOLDER_OR_ID  # any checkpoint with a supported host

Three times: with Attention Residuals (AttnRes), with Mixture-of-Depths Attention (MoDA), and with both in one model.
The text is the source code of Python's standard library, which every machine with Python has; a part of its files is
held out. All models are trained on the same batches in the same order, from the same function: at the start the
retrofitted models give the control's logits.
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
# Threads that wait sleep: spinning ones are in each other's way on a machine that does something else as well.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from demo_model.stdlib_corpus import read_texts, split, stdlib_files, token_blocks
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
from hf_depthattn.cli.main import main as depthattn
from hf_depthattn.cli.run_command import EXIT_OK, EXIT_USER_ERROR
from hf_depthattn.eval.metrics.weights import mean_depth_weights, mean_slot_mass
from hf_depthattn.eval.report.heat_map import save_heat_map
from hf_depthattn.integrations.trainer import depth_optimizer_cls_and_kwargs

EMBEDDED_MODEL = Path(__file__).parent / "demo_model" / "checkpoint"
# The embedded tokenizer joins line breaks with the indentation after them: a prompt ends before one.
PROMPT = "import os\nimport sys\n\ndef main("

#: Files of the standard library that no model is trained on, and that everything is measured on.
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
    if out.exists() and any(out.iterdir()) and not (out / "attn_res").is_dir():
        raise SystemExit(f"{out}: exists and is not the output of this script; choose another folder with --out.")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    heading("1. Retrofit and verify: weights are linked, the new ones go into one small shard; the same function")
    folders = {name: out / folder for name, (folder, _) in RETROFITS.items() if make(name, arguments)}

    heading("2. Fine-tune beside the control on Python's standard library, same batches, same order")
    tokenizer = AutoTokenizer.from_pretrained(out / "attn_res")
    train, held_out = text_blocks(tokenizer, arguments)
    control = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    models: dict[str, PreTrainedModel] = {"control": control}
    for name, folder in folders.items():
        models[name] = DepthAttnForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # The last one has everything in it and takes longest.
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

    heading("4. What has moved")
    gates = show_what_has_moved({name: models[name] for name in folders}, held_out[:16].split(4), out)
    for name, folder in {**folders, "control": out / "control"}.items():
        models[name].save_pretrained(f"{folder}_finetuned")
        tokenizer.save_pretrained(f"{folder}_finetuned")

    heading("5. Report: what the layers of the last model do, beside the control, on held-out text")
    report = write_report(list(folders.values())[-1].name, out)
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
        **{folder.name: f"retrofitted to {name}, with its code" for name, folder in folders.items()},
        "*_finetuned": "the same after fine-tuning",
        "depth_weights.png": "heat map of AttnRes's depth weights",
        **({str(report.relative_to(out)): "what every layer does; open it with a browser"} if report else {}),
        "summary.json": "the figures above",
    }.items():
        print(f"{out / path}  {what}")


def make(name: str, arguments: argparse.Namespace) -> bool:
    """Retrofit and verify one variant; `False` where the host cannot have MoDA, which the command has said."""
    folder, options = RETROFITS[name]
    output = str(arguments.out / folder)
    if "residual" not in options and arguments.num_blocks is not None:
        options = ("--num-blocks", str(arguments.num_blocks), *options)
    code = command("retrofit", arguments.model, output, *options)
    if code == EXIT_USER_ERROR and MODA[0] in options:
        return False
    if code != EXIT_OK or command("verify", arguments.model, output) != EXIT_OK:
        raise SystemExit(f"{name}: stopped, nothing is trained.")
    return True


def command(*words: str) -> int:
    print(f"\n$ depthattn {' '.join(words)}", flush=True)
    return depthattn([*words, "--no-progress"])


def write_report(name: str, out: Path) -> Path | None:
    """The page about a fine-tuned model beside the control, `None` where its libraries are not installed."""
    text, report = out / "held_out.txt", out / "report"
    text.write_text("\n".join(read_texts(split(stdlib_files())[1][:HELD_OUT_FILES])), encoding="utf-8")
    model, control = out / f"{name}_finetuned", out / "control_finetuned"
    options = ("--text", str(text), "--num-sequences", "12", "--out", str(report))
    code = command("report", str(model), "--compare", str(control), *options)
    return report / "report.html" if code == EXIT_OK else None


def print_losses(losses: dict, seconds: dict, minus_control: dict, steps: int, length: int, arguments) -> None:
    print(f"{steps} steps of {arguments.batch_size} x {length} tokens, learning rate {arguments.learning_rate:g}")
    print(f"{'':16}{'held-out loss':>15}{'minus control (s.e.)':>24}{'training seconds':>20}")
    for name, blocks in losses.items():
        difference = minus_control.get(name)
        cell = f"{difference['mean']:+.4f} ({difference['standard_error']:.4f})" if difference else ""
        print(f"{name:16}{blocks.mean():15.4f}{cell:>24}{seconds.get(name, 0.0) or '':>20.5}")
    print(f"Nats per token, means and standard errors over {len(losses['control'])} blocks of held-out text.")
    print("One seed and a minute of training: it shows that training runs and moves what is new, not which is better.")


def show_what_has_moved(models: dict, probe: tuple[Tensor, ...], out: Path) -> dict:
    """Depth weights of AttnRes as a heat map, gates and slots of MoDA as a line each; returns the latter."""
    weights = mean_depth_weights(models["AttnRes"], probe)
    save_heat_map(weights, out / "depth_weights.png", "Mean depth weights of AttnRes on held-out text")
    largest = (weights.nan_to_num() - uniform_like(weights)).abs().max().item()
    print(f"AttnRes: largest change of a mean depth weight from the uniform start: {largest:.3f}")
    gates = {name: gate_summary(model, probe) for name, model in models.items() if model.config.depth_kv}
    for name, moved in gates.items():
        print(
            f"{name}: {moved['moved']} of {moved['number']} gates have left 0, mean |gate| "
            f"{moved['mean_absolute']:.3f}, largest {moved['largest_absolute']:.3f}"
        )
        print("  weight of the depth slots by layer:", *(f"{mass:+.3f}" for mass in moved["slot_mass_by_layer"]))
    return gates


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED_MODEL), help="checkpoint folder or Hub id (default: embedded)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_output"), help="folder for the results; earlier ones in it are replaced"
    )
    parser.add_argument("--num-blocks", type=int, default=None, help="blocks of AttnRes (default: 8)")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps (default: what fits into --seconds)")
    parser.add_argument(
        "--seconds", type=float, default=60, help="training time of the slowest model when --steps is not given"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=256, help="tokens per training sequence")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--depth-lr-factor", type=float, default=10.0, help="depth learning rate over the rest's")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def text_blocks(tokenizer, arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Training and held-out blocks of token ids; a part of the library is enough for a minute of training."""
    train_files, held_out_files = split(stdlib_files())
    generator = torch.Generator().manual_seed(arguments.seed)
    order = torch.randperm(len(train_files), generator=generator).tolist()
    train = token_blocks(tokenizer, read_texts(train_files[i] for i in order[:150]), arguments.block_size)
    return train, token_blocks(tokenizer, read_texts(held_out_files[:HELD_OUT_FILES]), arguments.block_size)[:64]


def time_steps(model, batch: Tensor) -> float:
    """Seconds per training step on one thread or on all, whichever is faster for this model, and stays chosen."""
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
    """Steps that take about `--seconds`; optimizer and data take their part too."""
    steps = int(arguments.seconds / (1.15 * seconds_per_step))
    return max(10, min(steps, 400, len(train) // arguments.batch_size))


def fine_tune(model, train: Tensor, steps: int, folder: Path, arguments: argparse.Namespace, depth: bool) -> float:
    """Train with Trainer; returns the seconds it took."""
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


@torch.no_grad()
def block_losses(model, blocks: Tensor) -> Tensor:
    """Mean negative log-likelihood of each block, nats per token."""
    model.eval()
    losses = []
    for batch in blocks.split(8):
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits.mT, batch[:, 1:], reduction="none").mean(dim=-1))
    return torch.cat(losses).double()


@torch.no_grad()
def sample(model, tokenizer, seed: int) -> str:
    model.eval()
    set_seed(seed)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=80, do_sample=True, temperature=0.7, top_k=40)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def gate_summary(model, batches) -> dict:
    """How far the gates of MoDA have moved from zero, and what weight the depth slots have."""
    values = torch.cat([value.detach() for name, value in model.named_parameters() if name.endswith("depth_kv.gate")])
    return {
        "number": values.numel(),
        "moved": int(values.ne(0).sum()),
        "mean_absolute": values.abs().mean().item(),
        "largest_absolute": values.abs().max().item(),
        # The first layer reads no slots.
        "slot_mass_by_layer": mean_slot_mass(model, batches).nan_to_num().tolist(),
    }


def uniform_like(weights: Tensor) -> Tensor:
    """The weights of zero queries."""
    exists = ~weights.isnan()
    return exists / exists.sum(dim=-1, keepdim=True)


if __name__ == "__main__":
    main()
