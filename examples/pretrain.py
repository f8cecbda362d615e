"""Pretrain a model with depth attention from scratch: any host, any connection, any text.

docs/pretraining.md is the tutorial. Run it in a clone of the repository; `accelerate launch` works too.

    python examples/pretrain.py --host examples/configs/deep_narrow --text stdlib --out my-model --steps 200
    python examples/pretrain.py --host examples/configs/deep_narrow --connection residual --text folder/ --out other

OUT/model appears when training is complete, with code, card and tokenizer, and loads with trust_remote_code=True. OUT
has checkpoints too, from which --resume continues, log.json, and logs for TensorBoard (in the extra `train`).
"""

import argparse
import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from demo_model.stdlib_corpus import read_texts, split, stdlib_files
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed
from transformers.integrations import is_tensorboard_available
from transformers.utils import is_torch_bf16_gpu_available

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM
from hf_depthattn.cli.depth_arguments import add_depth_flags, add_set, assigned, given_flags
from hf_depthattn.cli.options import Parser
from hf_depthattn.cli.run_command import EXIT_OK, advice_after_interrupt, run_command
from hf_depthattn.cli.set_advice import options_as_flags, parse_with_advice
from hf_depthattn.depth_options import DEPTH_OPTIONS
from hf_depthattn.errors import UserError
from hf_depthattn.errors.messages import one_line
from hf_depthattn.integrations.depth_diagnostics import DepthDiagnosticsCallback
from hf_depthattn.integrations.trainer import depth_optimizer_cls_and_kwargs, muon_optimizer_cls_and_kwargs
from hf_depthattn.integrations.training_progress import show_progress
from hf_depthattn.model_card import additions
from hf_depthattn.pretraining.new_config import field_names, new_config, read_config
from hf_depthattn.pretraining.output_scaling import scale_outputs
from hf_depthattn.pretraining.packing import PackedText, pack_and_hold_out, thin_out
from hf_depthattn.pretraining.pretraining_run import PretrainingRun
from hf_depthattn.pretraining.schedule import SCHEDULES, check_schedule, scheduler_arguments
from hf_depthattn.pretraining.sources import read_sources
from hf_depthattn.pretraining.text_tokenizer import make_tokenizer
from hf_depthattn.utils.argument_checks import check_at_least
from hf_depthattn.utils.paths import user_path
from hf_depthattn.utils.quiet_libraries import quiet_libraries

OPTIMIZERS = {"adamw": depth_optimizer_cls_and_kwargs, "muon": muon_optimizer_cls_and_kwargs}
STDLIB = "stdlib"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="pretrain.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--host", required=True, help="config of the host: a folder, JSON file, Hub id or model type such as llama")
    add("--text", required=True, nargs="+", help="files, folders, hf:ID[@CONFIG]:SPLIT[:COLUMN], or stdlib (Python's)")
    add("--out", required=True, type=user_path, help="folder of the run")
    add("--eval-text", nargs="+", default=[], help="held-out text (default: some files of stdlib, or the last 5 %%)")
    add("--eval-sequences", type=int, default=64, help="held-out sequences, spread evenly (default: at most 64)")
    add("--endings", nargs="+", default=[], metavar=".EXT", help="read these files of folders too (.txt, .md, .jsonl)")
    add("--tokenizer", default="bpe", help="bpe (default; trained on the text), bytes, or a folder or Hub id")
    add("--vocab-size", type=int, default=2048, help="tokens of bpe (default: 2048)")
    add_depth_flags(parser)
    add_set(parser, "set any option of depth attention, or any field of the host's config; can be repeated")
    add("--scale-outputs", action="store_true", help="start with smaller output projections, as GPT-2 does")
    add("--block-size", type=int, default=256, help="tokens per sequence (default: 256)")
    add("--batch-size", type=int, default=8, help="sequences per step and device (default: 8)")
    add("--steps", type=int, help="optimizer steps (default: --epochs)")
    add("--epochs", type=float, default=1.0, help="passes over the text (default: 1)")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="adamw (default), or muon for the layers' matrices")
    add("--learning-rate", type=float, default=4e-3, help="peak (default: 4e-3, for narrow models; wide: less)")
    add("--depth-lr-factor", type=float, default=1.0, help="factor for depth parameters (default: 1)")
    add("--weight-decay", type=float, default=0.1, help="of matrices and embeddings (default: 0.1)")
    add("--schedule", choices=SCHEDULES, default="cosine", help="after warm-up: cosine (default), or constant, decay")
    add("--warmup", type=float, default=0.05, help="steps of warm-up, or their share (default: 0.05)")
    add("--decay", type=float, default=0.2, help="share of the steps in which wsd decays (default: 0.2)")
    add("--min-lr", type=float, default=0.1, help="final learning rate / peak (default: 0.1)")
    for name, default in {"log": 0.02, "eval": 0.1, "save": 0.1, "diagnostics": 0.05}.items():
        add(f"--{name}-every", type=float, default=default, help=f"steps, or share of them (default: {default})")
    add_set(parser, "set any field of TrainingArguments, such as gradient_accumulation_steps=4", flag="--trainer")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="continue the run in OUT from its last checkpoint")
    args = parse_with_advice(parser, lambda args: field_names(read_config(args.host)[0]))
    check_at_least({"block_size": args.block_size}, 2)
    check_at_least({name: getattr(args, name) for name in ("batch_size", "steps", "eval_sequences")}, 1)
    check_schedule(epochs=args.epochs, warmup=args.warmup, decay=args.decay, min_lr=args.min_lr)
    return args


def training_arguments(args: argparse.Namespace, run: PretrainingRun) -> TrainingArguments:
    fields: dict[str, Any] = {"output_dir": str(run.checkpoints), "save_total_limit": 2, "seed": args.seed}
    fields |= {"per_device_train_batch_size": args.batch_size, "per_device_eval_batch_size": args.batch_size}
    fields |= {"learning_rate": args.learning_rate, "weight_decay": args.weight_decay, "adam_beta2": 0.95}
    fields |= {"lr_scheduler_type": SCHEDULES[args.schedule], "warmup_steps": args.warmup}
    fields |= {"logging_steps": args.log_every, "eval_steps": args.eval_every, "save_steps": args.save_every}
    fields |= {"eval_strategy": "steps", "report_to": "tensorboard" if is_tensorboard_available() else "none"}
    fields |= {"bf16": is_torch_bf16_gpu_available(), "disable_tqdm": True, "dataloader_pin_memory": False}
    # Every parameter of our models has a gradient. `use_cpu` lets several processes run without a GPU.
    fields |= {"ddp_find_unused_parameters": False, "use_cpu": not torch.accelerator.is_available()}
    # The others follow from our own arguments.
    own = ("output_dir", "max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs")
    names = [field.name for field in dataclasses.fields(TrainingArguments) if field.name not in own]
    fields |= assigned(args.trainer, names, "--trainer", lambda: "a field of transformers.TrainingArguments")
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.logs))
    try:
        return TrainingArguments(**fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"TrainingArguments: {one_line(error)}") from error


def read_documents(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the documents to train on, and held-out ones if there are any."""
    endings = tuple(ending.lower() for ending in args.endings)
    eval_text = args.eval_text or [source for source in args.text if source == STDLIB]
    files = split(stdlib_files()) if STDLIB in (*args.text, *eval_text) else ([], [])
    train, held_out = ({STDLIB: list(read_texts(of_part))} for of_part in files)
    documents = read_sources(args.text, "--text", endings=endings, named=train)
    return documents, read_sources(eval_text, "--eval-text", endings=endings, named=held_out)


def make_config(args: argparse.Namespace, tokenizer) -> DepthAttnConfig:
    host, depth = read_config(args.host)
    words = f"an option of depth attention ({', '.join(DEPTH_OPTIONS)}) or a field of {host['model_type']}"
    values = assigned(args.set, [*DEPTH_OPTIONS, *field_names(host)], describe=lambda: words)
    changes = {name: values.pop(name) for name in list(values) if name not in DEPTH_OPTIONS}
    options: dict[str, Any] = {"changes": changes, "saved_options": depth, **given_flags(args), **values}
    with options_as_flags():
        return new_config(host, tokenizer, sequence_length=args.block_size, **options)


def pretrain(args: argparse.Namespace) -> int:
    run = PretrainingRun(args.out)
    training = training_arguments(args, run)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "resume")}
    # The data of a step depend on it.
    settings["world_size"] = training.world_size
    is_main = training.process_index == 0
    progress = None if is_main else False
    checkpoint = run.resume(settings) if args.resume else None
    if is_main and not args.resume:
        run.check_new()
    texts = read_documents(args)
    if args.resume:
        tokenizer = run.tokenizer()
    else:
        made = [make_tokenizer(args.tokenizer, texts[0], args.vocab_size, args.block_size) if is_main else None]
        tokenizer = broadcast_object_list(made)[0]
    config = make_config(args, tokenizer)
    train, held_out = pack_and_hold_out(tokenizer, *texts, args.block_size, name="--text", progress=progress)
    held_out = thin_out(held_out, args.eval_sequences, training.eval_batch_size, training.world_size)
    per_step = training.train_batch_size * training.world_size * training.gradient_accumulation_steps
    steps = training.max_steps = args.steps or math.ceil(args.epochs * len(train) / per_step)
    training.lr_scheduler_kwargs = scheduler_arguments(
        args.schedule, steps, training.get_warmup_steps(steps), decay=args.decay, min_lr=args.min_lr
    )
    set_seed(args.seed)
    model = DepthAttnForCausalLM(config)
    if args.scale_outputs:
        scale_outputs(model)
    if is_main and not args.resume:
        run.start(tokenizer, settings)
    optimizer = OPTIMIZERS[args.optimizer](training, depth_lr_factor=args.depth_lr_factor)
    data = (default_data_collator, PackedText(train), PackedText(held_out))
    trainer = Trainer(model, training, *data, processing_class=tokenizer, optimizer_cls_and_kwargs=optimizer)
    show_progress(trainer, progress)
    if every := args.diagnostics_every:
        every = max(1, round(every * steps if every < 1 else every))
        trainer.add_callback(DepthDiagnosticsCallback(trainer.log, held_out[:2].long(), every=every))
    num_tokens = steps * per_step * args.block_size
    if is_main:
        print(f"model: {config.text_config.model_type}, {model.num_parameters():,} parameters, {additions(config)}")
        print(f"text: {train.numel():,} tokens and {held_out.numel():,} held out, vocabulary {len(tokenizer):,}")
        print(f"training: {steps:,} steps, {num_tokens:,} tokens, {training.world_size} process(es)", flush=True)
    with advice_after_interrupt("the same command with --resume continues the run"):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        loss = trainer.evaluate()["eval_loss"]
    facts = {
        "text": ", ".join(source if source.startswith("hf:") else Path(source).name for source in args.text),
        "tokens": f"{num_tokens:,} in {steps:,} steps; sequences of {args.block_size}",
        **({"initial weights": "outputs of sublayers scaled as in GPT-2"} if args.scale_outputs else {}),
        "optimizer": f"{args.optimizer}, learning rate {args.learning_rate:g}, {args.schedule}, seed {args.seed}",
        "held-out loss": f"{loss:.4f} nats per token, on {held_out.numel():,} tokens",
    }
    run.finish(trainer, tokenizer, facts)
    if is_main:
        print(f"held-out loss {loss:.4f} nats per token; the model is in {run.model}")
    return EXIT_OK


def main() -> int:
    args = parse_arguments()
    with quiet_libraries(progress=None):
        return pretrain(args)


if __name__ == "__main__":
    sys.exit(run_command(main, "pretrain.py"))
