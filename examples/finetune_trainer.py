"""Fine-tune a retrofitted checkpoint on text with Trainer, and measure the loss on held-out blocks.

Make the checkpoint first: `depthattn retrofit SOURCE CHECKPOINT --num-blocks 8` (`--depth-kv attention+mlp` for MoDA),
    python examples/finetune_trainer.py CHECKPOINT TEXT OUTPUT [--lora-rank 16]
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from hf_depthattn import lora_config
from hf_depthattn.integrations.trainer import depth_optimizer_cls_and_kwargs


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder (or Hub id) of a retrofitted checkpoint")
    parser.add_argument("text", type=Path, help="text file, or folder with .txt and .md files")
    parser.add_argument("output", help="output folder for the checkpoint (with --lora-rank: the adapter)")
    parser.add_argument("--steps", type=int, default=-1, help="optimizer steps (default: one pass over the text)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=512, help="tokens per training example")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--depth-lr-factor", type=float, default=1.0, help="LR factor of queries and gates")
    parser.add_argument("--lora-rank", type=int, default=0, help="train LoRA and depth modules instead of all weights")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in OUTPUT")
    return parser.parse_args()


def token_blocks(path: Path, tokenizer, block_size: int) -> list[dict]:
    """Split the text into examples of `block_size` tokens; drop the remainder."""
    files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md")) if path.is_dir() else [path]
    texts = [file.read_text(encoding="utf-8") + (tokenizer.eos_token or "") for file in files]
    tokens = [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]
    if len(tokens) < 2 * block_size:
        raise SystemExit(f"{path}: {len(tokens)} tokens in {len(files)} files; at least {2 * block_size} are needed.")
    blocks = torch.tensor(tokens[: len(tokens) // block_size * block_size]).view(-1, block_size)
    return [{"input_ids": block, "labels": block} for block in blocks]


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    # Weights are in float32; GPUs that support bfloat16 compute in it.
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    blocks = token_blocks(arguments.text, tokenizer, min(arguments.block_size, model.config.max_position_embeddings))
    num_held_out = max(1, min(len(blocks) // 20, 64))
    if arguments.lora_rank:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(model, r=arguments.lora_rank, lora_alpha=2 * arguments.lora_rank))  # type: ignore[assignment]
    args = TrainingArguments(
        output_dir=arguments.output,
        max_steps=arguments.steps,
        num_train_epochs=1,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        weight_decay=0.01,
        warmup_steps=0.05,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=torch.cuda.is_available(),
        save_total_limit=1,
        report_to="none",
    )
    optimizer = depth_optimizer_cls_and_kwargs(args, depth_lr_factor=arguments.depth_lr_factor)
    data = (default_data_collator, blocks[:-num_held_out], blocks[-num_held_out:])
    trainer = Trainer(model, args, *data, processing_class=tokenizer, optimizer_cls_and_kwargs=optimizer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    print(f"held-out loss {before:.4f} -> {after:.4f} nats per token; saved to {arguments.output}")


if __name__ == "__main__":
    main()
