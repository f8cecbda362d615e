"""The demo: an exact retrofit, then what a depth dimension gains in training from scratch.

    python examples/demo.py     # make demo

1. Retrofits the embedded checkpoint with Attention Residuals and verifies that the logits are the same.
2. Trains two models over bytes from scratch on the source code of Python's standard library, with
   `examples/pretrain.py`: one with the residual stream and its twin with Block Attention Residuals. Both have the same
   data in the same order, the same initial weights of the host, and a core each. These weights are scaled as in GPT-2:
   otherwise, most of the difference would be an effect of the control's initial weights (docs/evidence.md).
3. Compares them on held-out files, samples from both, and writes a depth report on both.

For a checkpoint of yours, see `examples/demo_retrofit.py` (`make demo MODEL=...`).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from demo_model.stdlib_corpus import read_texts, split, stdlib_files
from demo_tools import block_losses, command, heading, new_output_folder, sample, write_report
from transformers import AutoConfig, AutoTokenizer
from transformers import logging as transformers_logging

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM
from hf_depthattn.cli.run_command import EXIT_OK
from hf_depthattn.eval.paired_difference import paired_difference
from hf_depthattn.pretraining.packing import pack, thin_out
from hf_depthattn.pretraining.text_tokenizer import NUM_BYTE_TOKENS

EXAMPLES = Path(__file__).resolve().parent
EMBEDDED_MODEL = EXAMPLES / "demo_model" / "checkpoint"
HOST = EXAMPLES / "configs" / "deep_narrow"
#: The `connection` of both models; the control is the first.
CONTROL, TWIN = TWINS = ("residual", "attn_res")
TITLES = {CONTROL: "residual stream", TWIN: "Block AttnRes"}
#: The peak learning rate of both, and the standard deviation of their initial weights before some of them are scaled.
#: In docs/evidence.md, with the same weights and nearly the same sizes, the rate is the best one for either.
LEARNING_RATE, INITIALIZER_RANGE = 4e-3, 0.06

#: Held-out files of the standard library, and blocks of them, on which the models are compared.
HELD_OUT_FILES, HELD_OUT_BLOCKS = 24, 256
MEASURED_STEPS, MAX_STEPS = 4, 1000
SAMPLED_TOKENS = 160


def main() -> None:
    arguments = parse_arguments()
    transformers_logging.set_verbosity_error()
    started = time.perf_counter()
    out: Path = arguments.out
    new_output_folder(out)

    heading("1. Retrofit and verify a trained checkpoint: weights are linked, the function is unchanged")
    for words in (("retrofit", EMBEDDED_MODEL, out / "retrofit"), ("verify", EMBEDDED_MODEL, out / "retrofit")):
        if command(*map(str, words)) != EXIT_OK:
            raise SystemExit("The retrofit failed; nothing was trained.")

    heading("2. Train twins from scratch on Python's standard library, on the same data in the same order")
    steps = arguments.steps or steps_for(arguments.seconds, arguments)
    print(f"{steps} steps of {arguments.batch_size} x {arguments.block_size} bytes", flush=True)
    train_twins(out, steps, arguments)
    seconds = {name: training_seconds(out / name) for name in TWINS}
    models = {name: DepthAttnForCausalLM.from_pretrained(out / name / "model") for name in TWINS}
    tokenizer = AutoTokenizer.from_pretrained(out / TWIN / "model")

    heading("3. Compare them on held-out files of the standard library")
    held_out = list(read_texts(split(stdlib_files())[1][:HELD_OUT_FILES]))
    blocks = thin_out(pack(tokenizer, held_out, arguments.block_size), HELD_OUT_BLOCKS, 1, 1).long()
    losses = {name: block_losses(model, blocks).tolist() for name, model in models.items()}
    paired = paired_difference(losses[CONTROL], losses[TWIN])
    num_tokens = steps * arguments.batch_size * arguments.block_size
    print(f"{steps} steps, {num_tokens:,} bytes each, {models[CONTROL].num_parameters():,} parameters")
    print(f"{'':18}{'held-out loss':>15}{'training seconds':>20}")
    for name in TWINS:
        print(f"{TITLES[name]:18}{sum(losses[name]) / len(blocks):15.4f}{seconds[name]:20.0f}")
    print(
        f"{TITLES[TWIN]} minus {TITLES[CONTROL]}: {paired.difference:+.4f} nats per byte, standard error "
        f"{paired.standard_error:.4f} over {len(blocks)} held-out blocks; it took "
        f"{seconds[TWIN] / seconds[CONTROL]:.2f} times the training time."
    )
    print(
        "The error is that of the held-out text; that of the training would take more seeds. docs/evidence.md has\n"
        "several, other connections, and comparisons at equal CPU time. Both models start with outputs of sublayers\n"
        "scaled as in GPT-2; against a control without that, the difference would be larger."
    )

    heading("4. Samples (temperature 0.7, top-k 40)")
    for name, model in models.items():
        print(f"--- {TITLES[name]}\n{sample(model, tokenizer, arguments.seed, SAMPLED_TOKENS)}")

    heading("5. Depth report: how both models use their depth")
    report = write_report(out / TWIN / "model", out / CONTROL / "model", held_out, arguments.report_sequences, out)
    summary = {
        "steps": steps,
        "tokens": num_tokens,
        "seed": arguments.seed,
        "held_out_loss_nats_per_byte": {name: sum(values) / len(values) for name, values in losses.items()},
        "difference": {"mean": paired.difference, "standard_error": paired.standard_error},
        "training_seconds": seconds,
        "seconds": time.perf_counter() - started,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    heading(f"Done in {time.perf_counter() - started:.0f} s")
    for path, what in {
        "retrofit": "the retrofitted checkpoint, including its code",
        f"{CONTROL}/model": "the control, trained from scratch",
        f"{TWIN}/model": "its twin with Block AttnRes",
        **({str(report.relative_to(out)): "depth report; open it in a browser"} if report else {}),
        "summary.json": "the numbers above",
    }.items():
        print(f"{out / path}  {what}")


def train_twins(out: Path, steps: int, arguments: argparse.Namespace) -> None:
    """Train both models at the same time, with one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    runs = {name: subprocess.Popen(pretraining(name, out, steps, arguments), **pipes) for name in TWINS}

    def follow_to_the_end(name: str) -> None:
        try:
            follow(name, runs[name])
        except BaseException:
            # One twin alone is of no use.
            for run in runs.values():
                run.kill()
            raise

    try:
        with ThreadPoolExecutor(len(runs)) as threads:
            list(threads.map(follow_to_the_end, TWINS))
    finally:
        for run in runs.values():
            run.kill()


def follow(name: str, run: subprocess.Popen) -> None:
    """Print the losses of a run until it ends."""
    lines = []
    for line in run.stdout or ():
        lines.append(line)
        if "loss" in line or line.startswith("model:"):
            print(f"{TITLES[name]:16} {line.rstrip()}", flush=True)
    if run.wait() != 0:
        raise SystemExit(f"Training failed ({TITLES[name]}):\n{''.join(lines[-20:])}")


def training_seconds(run: Path) -> float:
    """Return the time of all steps of a run as Trainer measured it: without imports, tokenizer and evaluation."""
    log = json.loads((run / "log.json").read_text())
    return next(entry["train_runtime"] for entry in log if "train_runtime" in entry)


def pretraining(name: str, out: Path, steps: int, arguments: argparse.Namespace) -> list[str]:
    """Return the command that trains one model."""
    options = {
        "host": HOST,
        "text": "stdlib",
        "out": out / name,
        "connection": name,
        "steps": steps,
        "block-size": arguments.block_size,
        "batch-size": arguments.batch_size,
        "tokenizer": "bytes",
        "learning-rate": LEARNING_RATE,
        "set": f"initializer_range={INITIALIZER_RANGE}",
        "seed": arguments.seed,
        "log-every": max(1, steps // 5),
        "diagnostics-every": 0,
    }
    words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    # The time of training is that of its steps; the models are evaluated when both are trained.
    words += ["--scale-outputs", "--trainer", "eval_strategy=no", "--trainer", "save_strategy=no"]
    return [sys.executable, str(EXAMPLES / "pretrain.py"), *words]


def steps_for(seconds: float, arguments: argparse.Namespace) -> int:
    """Return the number of steps that take about so many seconds, from the time of some steps of the slower twin."""
    fields = json.loads((HOST / "config.json").read_text())
    host = AutoConfig.for_model(**fields, vocab_size=NUM_BYTE_TOKENS)
    model = DepthAttnForCausalLM(DepthAttnConfig.attn_res(host)).train()
    batch = torch.randint(NUM_BYTE_TOKENS, (arguments.batch_size, arguments.block_size))
    times = []
    torch.set_num_threads(1)
    for _ in range(MEASURED_STEPS):
        step_started = time.perf_counter()
        model(batch, labels=batch, use_cache=False).loss.backward()
        times.append(time.perf_counter() - step_started)
    # Two processes share caches and memory, and a step has an optimizer and a data loader.
    return max(20, min(int(seconds / (1.3 * min(times))), MAX_STEPS))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo_output"), help="output folder; earlier results are replaced")
    add("--steps", type=int, default=None, help="training steps (default: as many as fit into --seconds)")
    add("--seconds", type=float, default=120, help="training time of the twins if --steps is not given")
    add("--batch-size", type=int, default=4, help="sequences per step")
    add("--block-size", type=int, default=128, help="bytes per sequence")
    add("--report-sequences", type=int, default=4, help="sequences of held-out text for the depth report")
    add("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
