"""Push models, adapters and a config to the Hub of the environment, in every way; run as a script.

The argument is a folder for files and for the logits that the models must give where they are loaded.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import peft
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from tiny_checkpoints import load, logits, save_stock
from tiny_hosts import random_ids
from training_models import rows, small_model, train

from hf_depthattn import DepthAttnForCausalLM, lora_config
from hf_depthattn.cli.main import main
from hf_depthattn.conversion.upload import upload_command

BOTH = {"depth_kv": "attention+mlp", "depth_gate": "head"}


def shift(model: torch.nn.Module) -> None:
    """Change all trainable parameters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


def push_versions(reference: dict) -> None:
    """Tag the first version; the second has other weights and code that fails."""
    model = small_model(**BOTH).eval()
    reference["first"] = logits(model, reference["ids"])
    model.push_to_hub("depth", tags=["mine"])
    HfApi().create_tag("user/depth", tag="v1")
    shift(model)
    reference["second"] = logits(model, reference["ids"])
    model.push_to_hub("depth", commit_message="Second version")
    broken = b"raise ImportError('the code of a later version')\n"
    HfApi().upload_file(path_or_fileobj=broken, path_in_repo="modeling_depthattn.py", repo_id="user/depth")


def push_from_trainer(folder: Path, reference: dict) -> None:
    model = small_model()
    options = {"push_to_hub": True, "hub_model_id": "user/trained", "save_strategy": "steps", "save_steps": 1}
    trainer = train(model, folder / "trained", rows(8), steps=2, **options)
    trainer.push_to_hub()
    reference["trained"] = logits(trainer.model.eval(), reference["ids"])


def push_retrofit(folder: Path, reference: dict) -> None:
    stock = save_stock(folder / "stock")
    (stock / "README.md").write_text("---\nlicense: mit\nlanguage: [de]\ntags: [gguf]\n---\n# Source\n")
    HfApi().create_repo("retrofitted")
    for old in ("model.safetensors", "adapter_config.json", ".eval_results/gsm8k.yaml"):
        HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo=old, repo_id="user/retrofitted")
    arguments = [str(stock), str(folder / "retrofitted"), "--num-blocks", "2", "--push-to", "retrofitted"]
    assert main(["retrofit", *arguments, "--private"]) == 2, "the repository is public"
    assert main(["retrofit", *arguments]) == 0
    # What a failed upload advises.
    command = upload_command(str(folder / "retrofitted"), "again", private=True)
    client = [sys.executable, "-m", "huggingface_hub.cli.hf"]
    subprocess.run([*client, *shlex.split(command)[1:]], check=True, capture_output=True)
    reference["retrofitted"] = logits(load(stock), reference["ids"])


def push_adapters(reference: dict) -> None:
    base = DepthAttnForCausalLM.from_pretrained("user/depth", revision="v1").eval()
    model = peft.get_peft_model(base, lora_config(base, r=2)).eval()
    shift(model)
    reference["adapter"] = logits(model, reference["ids"])
    model.push_to_hub("user/adapter")
    base = DepthAttnForCausalLM.from_pretrained("user/depth", revision="v1").eval()
    try:
        base.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    except (ImportError, ValueError) as error:
        # transformers 5.24 wants PEFT 0.22 here.
        if "version" not in str(error):
            raise
        return
    shift(base)
    base.push_to_hub("user/adapter-of-transformers")


def publish(folder: Path) -> None:
    torch.manual_seed(0)
    reference = {"ids": random_ids(1, 7)}
    push_versions(reference)
    push_from_trainer(folder, reference)
    push_retrofit(folder, reference)
    push_adapters(reference)
    small_model().config.push_to_hub("config")
    save_file({name: tensor.contiguous() for name, tensor in reference.items()}, folder / "reference.safetensors")


if __name__ == "__main__":
    publish(Path(sys.argv[1]))
