"""PEFT adapters saved when every site had a query and a key-norm weight of its own.

Now they are rows of the module `depth_reads`, which such an adapter does not have in its `modules_to_save`:

    convert_adapter("old_adapter", "adapter")
    model = PeftModel.from_pretrained(model, "adapter")

Adapters without AttnRes and adapters of models with `static_mix` need no conversion.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..attn_res_reads import DEPTH_READS
from ..checkpoint_keys import stacked_name
from ..depth_connections import DEPTH_MODULES
from ..errors import UserError
from ..utils.paths import user_path
from .adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .checkpoint_files import read_json
from .old_sites import in_old_layout, stack_old_sites


def convert_adapter(adapter: str | Path, output_dir: str | Path) -> None:
    """Convert an adapter to the present layout; its other files are copied.

    Args:
        adapter: folder of the adapter.
        output_dir: the folder to create.

    Raises:
        UserError: if the adapter has no queries in sites, or only those of some sites, or the output exists.
    """
    folder, output = user_path(adapter), user_path(output_dir)
    if not all((folder / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)):
        raise UserError(f"{adapter}: has no {ADAPTER_CONFIG} or no {ADAPTER_WEIGHTS}.")
    if output.exists():
        raise UserError(f"{output_dir}: exists already.")
    old = load_file(folder / ADAPTER_WEIGHTS)
    tensors = stack_old_sites(old)
    if tensors.keys() == old.keys():
        raise UserError(f"{adapter}: has no queries in sites; it needs no conversion.")
    _check_has_all_sites(adapter, old, tensors)
    config = read_json(folder / ADAPTER_CONFIG)
    parts = {part for name in tensors for part in name.split(".")}
    kept = [name for name in config.get("modules_to_save") or () if name not in DEPTH_MODULES or name in parts]
    config["modules_to_save"] = [DEPTH_READS, *kept]
    shutil.copytree(folder, output)
    (output / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    save_file(tensors, output / ADAPTER_WEIGHTS, metadata={"format": "pt"})


@contextmanager
def in_present_layout(folder: Path) -> Iterator[Path]:
    """Yield the folder of an adapter, or a temporary one with the converted adapter if it is in the old layout.

    Args:
        folder: the adapter.
    """
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        is_old = any(stacked_name(name) is not None for name in file.keys())  # noqa: SIM118
    if not is_old:
        yield folder
        return
    with TemporaryDirectory() as parent:
        convert_adapter(folder, Path(parent) / "adapter")
        yield Path(parent) / "adapter"


def _check_has_all_sites(adapter: str | Path, old: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for name in tensors.keys() - old.keys():
        # The output site is the only one beside the two of each layer.
        num_layers, num_others = divmod(len(tensors[name]), 2)
        if num_others != 1 or not in_old_layout({name: tuple(tensors[name].shape)}, num_layers).keys() <= old.keys():
            raise UserError(
                f"{adapter}: has {len(tensors[name])} sites, which are not all sites of a model; merge it into its "
                "base model with the version that saved it."
            )
