"""Train the small causal language model of the demo on the source code of Python's standard library."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
import transformers
from stdlib_corpus import read_texts, relative_name, split, stdlib_files, token_blocks
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_depthattn.pretraining.text_tokenizer import train_tokenizer

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 1024
BLOCK_SIZE = 256
MAX_POSITIONS = 256


def build_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    """Build the untrained model; projections into the residual stream start smaller, as the network is deep."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=args.init_std,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_((2 * args.layers) ** -0.5)
    return model


def build_optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Build Muon (or AdamW) for the matrices inside layers, and AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    embeddings = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" in n]
    norms = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": embeddings, "weight_decay": 0.0}, {"params": norms, "weight_decay": 0.0}]
    adamw = {"lr": args.lr, "betas": (0.9, 0.95), "eps": 1e-10}
    if args.muon_lr > 0:
        muon = torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.1, adjust_lr_fn="original")
        return [torch.optim.AdamW(groups, **adamw), muon]
    return [torch.optim.AdamW([*groups, {"params": matrices, "weight_decay": 0.1}], **adamw)]


def lr_scale(progress: float) -> float:
    """Return the learning rate scale: warmup over the first 2 %, constant up to 40 %, then linear decay to zero."""
    return min(1.0, progress / 0.02, max(0.0, (1.0 - progress) / 0.6))


def train(model: LlamaForCausalLM, stream: torch.Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Train on random windows of the token stream until the step or time budget is used up."""
    optimizers = build_optimizers(model, args)
    base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    generator = torch.Generator().manual_seed(args.seed)
    offsets = torch.arange(BLOCK_SIZE + 1)
    model.train()
    start, step, running = time.monotonic(), 0, math.nan
    while True:
        elapsed = time.monotonic() - start
        progress = elapsed / (60 * args.minutes) if args.minutes else step / args.steps
        if progress >= 1:
            break
        scale = lr_scale(max(progress, 1e-3))
        for optimizer, lrs in zip(optimizers, base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * scale
        first = torch.randint(len(stream) - BLOCK_SIZE, (args.batch_size, 1), generator=generator)
        window = stream[first + offsets]
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        if step % args.log_every == 0:
            print(f"step {step}  progress {progress:.3f}  loss {running:.4f}  {elapsed:.0f} s", flush=True)
    return {"steps": step, "train_seconds": round(time.monotonic() - start, 1), "train_loss": round(running, 4)}


@torch.no_grad()
def evaluate(model: PreTrainedModel, blocks: torch.Tensor) -> float:
    """Return the mean loss in nats per predicted token over blocks (each block's first token is only context)."""
    model.eval()
    total = 0.0
    for batch in blocks.split(16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        total += nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / (blocks.shape[0] * (blocks.shape[1] - 1))


def corpus_summary(files: Sequence[Path]) -> dict[str, object]:
    """Count files and bytes, and hash names and contents."""
    digest, size = hashlib.sha256(), 0
    for path in files:
        data = path.read_bytes()
        digest.update(f"{relative_name(path)}\0{len(data)}\0".encode() + data)
        size += len(data)
    return {"files": len(files), "bytes": size, "sha256": digest.hexdigest()}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "checkpoint", help="output folder of the checkpoint")
    parser.add_argument(
        "--report", type=Path, help="JSON file for the training statistics (default: training.json next to --out)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out after training")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, default=9000, help="optimizer steps")
    budget.add_argument("--minutes", type=float, help="train for this wall time instead of a number of steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order of the data")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--batch-size", type=int, default=4, help=f"sequences of {BLOCK_SIZE} tokens per step")
    parser.add_argument("--lr", type=float, default=0.01, help="peak learning rate of AdamW")
    parser.add_argument("--muon-lr", type=float, default=0.01, help="peak learning rate of Muon; 0: AdamW for all")
    parser.add_argument("--layers", type=int, default=16, help="number of layers")
    parser.add_argument("--hidden-size", type=int, default=64, help="width of the residual stream")
    parser.add_argument("--intermediate-size", type=int, default=208, help="width of the MLP")
    parser.add_argument("--init-std", type=float, default=0.02, help="standard deviation of the initial weights")
    parser.add_argument("--log-every", type=int, default=50, help="steps between log lines")
    return parser.parse_args()


def main() -> None:
    """Collect the corpus, train tokenizer and model, and save the checkpoint and its statistics."""
    args = parse_args()
    args.out = args.out.resolve()
    report_path = args.report or args.out.parent / "training.json"
    if args.out.exists() and not args.overwrite:
        raise SystemExit(f"{args.out} exists; choose another --out or pass --overwrite")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    train_files, heldout_files = split(stdlib_files())
    train_texts, heldout_texts = list(read_texts(train_files)), list(read_texts(heldout_files))
    tokenizer = train_tokenizer(train_texts, VOCAB_SIZE, max_length=MAX_POSITIONS)
    for text in (*train_texts, *heldout_texts):
        if tokenizer.decode(tokenizer(text, verbose=False)["input_ids"]) != text:
            raise RuntimeError("the tokenizer does not decode a training text exactly")
    stream = token_blocks(tokenizer, train_texts, 1).flatten()
    heldout = token_blocks(tokenizer, heldout_texts, 1).flatten()
    model = build_model(tokenizer, args)
    print(
        f"{len(train_files)} files, {len(stream)} tokens; held out: {len(heldout_files)} files, {len(heldout)} tokens"
    )
    print(f"{model.num_parameters()} parameters", flush=True)
    figures = train(model, stream, args)

    partial = args.out.with_name(f"{args.out.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    # transformers wraps the method so that mypy takes it for a function.
    model.to(torch.bfloat16).save_pretrained(partial)  # type: ignore[arg-type]

    saved = AutoModelForCausalLM.from_pretrained(partial, dtype=torch.float32)
    saved_tokenizer = AutoTokenizer.from_pretrained(partial)
    loss = evaluate(saved, token_blocks(saved_tokenizer, heldout_texts, BLOCK_SIZE))
    bytes_per_token = sum(len(text.encode()) for text in heldout_texts) / len(heldout)
    report = {
        "heldout_loss_nats_per_token": round(loss, 4),
        "heldout_bits_per_byte": round(loss / math.log(2) / bytes_per_token, 4),
        "heldout_loss_nats_per_token_512": round(
            evaluate(saved, token_blocks(saved_tokenizer, heldout_texts, 512)), 4
        ),
        "heldout_bytes_per_token": round(bytes_per_token, 4),
        "parameters": saved.num_parameters(),
        **figures,
        "tokens": figures["steps"] * args.batch_size * BLOCK_SIZE,
        "corpus": {
            "train": corpus_summary(train_files) | {"tokens": len(stream)},
            "heldout": corpus_summary(heldout_files) | {"tokens": len(heldout)},
        },
        "settings": {
            k: v for k, v in vars(args).items() if k not in ("out", "report", "overwrite", "log_every", "steps")
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    prompt = saved_tokenizer("import os\nimport sys\n\ndef main(", return_tensors="pt")
    torch.manual_seed(args.seed)
    # transformers 5.23 says of `self` more than its models have.
    sample = saved.generate(  # type: ignore[misc]
        **prompt, max_new_tokens=120, do_sample=True, temperature=0.7, top_k=40
    )[0]
    print(saved_tokenizer.decode(sample, skip_special_tokens=True))

    if args.out.exists():
        shutil.rmtree(args.out)
    partial.rename(args.out)
    report_path.parent.mkdir(parents=True, exist_ok=True)
    report_partial = report_path.with_name(f"{report_path.name}.tmp")
    report_partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    report_partial.replace(report_path)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
