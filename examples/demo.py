"""The main job from start to end: retrofit a checkpoint, verify it, fine-tune it beside its control, look inside.

    python examples/demo.py                       # the embedded demo model, a 16-layer Llama on Python source code
    python examples/demo.py --model FOLDER_OR_ID  # any checkpoint with a supported host

The text is the source code of Python's standard library, which every machine with Python has; a part of its files is
held out. Both models are trained on the same batches in the same order, from the same function: at the start the
retrofitted model gives the control's logits.
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

import torch
from demo_model.stdlib_corpus import read_texts, split, stdlib_files, token_blocks
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers import logging as transformers_logging

from hf_depthattn import DepthAttnForCausalLM, retrofit
from hf_depthattn.conversion.verify import verify
from hf_depthattn.eval.depth_weights import mean_depth_weights, save_heat_map
from hf_depthattn.training_depthattn import depth_optimizer_cls_and_kwargs

EMBEDDED_MODEL = Path(__file__).parent / "demo_model" / "checkpoint"
# The embedded tokenizer joins line breaks with the indentation after them: a prompt ends before one.
PROMPT = "import os\nimport sys\n\ndef main("


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(max(1, os.cpu_count() or 1))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    started = time.perf_counter()
    out = arguments.out
    if out.exists() and any(out.iterdir()) and not (out / "attn_res").is_dir():
        raise SystemExit(f"{out}: exists and is not the output of this script; choose another folder with --out.")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    heading("1. Retrofit to Block AttnRes: weights are linked, the depth parameters go into one small extra shard")
    print(retrofit(arguments.model, out / "attn_res", num_blocks=arguments.num_blocks, progress=False))

    heading("2. Verify: the same function")
    report = verify(arguments.model, out / "attn_res")
    print(report)
    if not report.ok:
        raise SystemExit("The retrofitted checkpoint is not the same function; nothing is trained.")

    heading("3. Fine-tune both on Python's standard library, same batches, same order")
    tokenizer = AutoTokenizer.from_pretrained(out / "attn_res")
    train, held_out = text_blocks(tokenizer, arguments)
    models = {
        "control": AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
        "AttnRes": DepthAttnForCausalLM.from_pretrained(out / "attn_res", dtype=torch.float32),
    }
    steps = arguments.steps or steps_for(models["AttnRes"], train, arguments)
    losses = {"before": block_losses(models["control"], held_out)}
    seconds = {}
    for name, model in models.items():
        seconds[name] = fine_tune(model, train, steps, out / f"trainer_{name}", arguments, depth=name == "AttnRes")
        losses[name] = block_losses(model, held_out)
    print(
        f"{steps} steps of {arguments.batch_size} x {train.shape[1]} tokens, learning rate {arguments.learning_rate:g}"
    )
    print(f"{'':10}{'held-out loss (nats/token)':>28}{'training seconds':>20}")
    for name in ("before", "control", "AttnRes"):
        print(f"{name:10}{losses[name].mean():28.4f}{seconds.get(name, 0.0) or '':>20.5}")
    difference = losses["AttnRes"] - losses["control"]
    error = difference.std().item() / math.sqrt(len(difference))
    print(f"AttnRes - control: {difference.mean():+.4f} +- {error:.4f} nats/token over {len(difference)} blocks.")
    print("One seed and a minute of training: this shows that it trains, not that it is better.")

    heading("4. Samples (temperature 0.7, top-k 40)")
    for name, model in models.items():
        print(f"--- {name}\n{sample(model, tokenizer, arguments.seed)}")

    heading("5. Depth weights after fine-tuning")
    weights = mean_depth_weights(models["AttnRes"], held_out[:16].split(4))
    save_heat_map(weights, out / "depth_weights.png", "Mean depth weights on held-out text")
    models["AttnRes"].save_pretrained(out / "attn_res_finetuned")
    tokenizer.save_pretrained(out / "attn_res_finetuned")
    summary = {
        "model": str(arguments.model),
        "steps": steps,
        "seed": arguments.seed,
        "held_out_loss_nats_per_token": {name: values.mean().item() for name, values in losses.items()},
        "attn_res_minus_control": {"mean": difference.mean().item(), "standard_error": error},
        "training_seconds": seconds,
        "seconds": time.perf_counter() - started,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    largest = (weights.nan_to_num() - uniform_like(weights)).abs().max().item()
    print(f"Largest change of a mean weight from the uniform start: {largest:.3f}")

    heading(f"Done in {time.perf_counter() - started:.0f} s")
    for path, what in {
        "attn_res": "retrofitted checkpoint (loads with trust_remote_code=True)",
        "attn_res_finetuned": "the same after fine-tuning",
        "depth_weights.png": "heat map of the depth weights",
        "summary.json": "the figures above",
    }.items():
        print(f"{out / path}  {what}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED_MODEL), help="checkpoint folder or Hub id (default: embedded)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_output"), help="folder for the results; earlier ones in it are replaced"
    )
    parser.add_argument("--num-blocks", type=int, default=None, help="blocks of AttnRes (default: 8)")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps (default: about --seconds per model)")
    parser.add_argument("--seconds", type=float, default=60, help="training time per model when --steps is not given")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=256, help="tokens per training sequence")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
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
    return train, token_blocks(tokenizer, read_texts(held_out_files[:12]), arguments.block_size)[:64]


def steps_for(model, train: Tensor, arguments: argparse.Namespace) -> int:
    """Steps that take about `--seconds`, from timing a few."""
    model.train()
    times = []
    for _ in range(4):
        started = time.perf_counter()
        batch = train[: arguments.batch_size]
        model(batch, labels=batch, use_cache=False).loss.backward()
        times.append(time.perf_counter() - started)
    model.zero_grad(set_to_none=True)
    steps = int(arguments.seconds / (1.15 * min(times)))
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
    optimizer = {}
    if depth:
        factor = arguments.depth_lr_factor
        optimizer["optimizer_cls_and_kwargs"] = depth_optimizer_cls_and_kwargs(args, depth_lr_factor=factor)
    dataset = [{"input_ids": block, "labels": block} for block in train]
    started = time.perf_counter()
    trainer = Trainer(model, args, train_dataset=dataset, **optimizer)
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


def uniform_like(weights: Tensor) -> Tensor:
    """The weights of zero queries."""
    exists = ~weights.isnan()
    return exists / exists.sum(dim=-1, keepdim=True)


if __name__ == "__main__":
    main()
