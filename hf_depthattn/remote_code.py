"""Export of the model code beside a checkpoint: it then loads with `trust_remote_code=True` without this package.

transformers loads remote code from flat folders: only single-dot imports of names from a sibling file survive. The
model files are written that way; kernel files live in a sub-package, so an import of `.kernels.<name>` is rewritten to
`.kernels_<name>` and the file exported under that name. The export follows the imports of the modelling file, so there
is no list to keep.
"""

import os
import re
from pathlib import Path

MODELING_FILE = "modeling_depthattn.py"
CONFIGURATION_FILE = "configuration_depthattn.py"

#: Auto class -> our class, for `config.auto_map`.
AUTO_MAP = {
    "AutoConfig": "configuration_depthattn.DepthAttnConfig",
    "AutoModel": "modeling_depthattn.DepthAttnModel",
    "AutoModelForCausalLM": "modeling_depthattn.DepthAttnForCausalLM",
    "AutoModelForSequenceClassification": "modeling_depthattn.DepthAttnForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_depthattn.DepthAttnForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_depthattn.DepthAttnForQuestionAnswering",
}

_RELATIVE_IMPORT = re.compile(r"^(\s*from )\.(\w+(?:\.\w+)*)( import )", re.MULTILINE)


def export_model_code(folder: str | os.PathLike) -> list[Path]:
    """Write the modelling file and everything it imports from this package into a folder, flat.

    Args:
        folder: an existing checkpoint folder.

    Returns:
        The files written.
    """
    code_folder = Path(__file__).parent
    written, pending, seen = [], [MODELING_FILE, CONFIGURATION_FILE], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        text = _source_file(code_folder, name).read_text(encoding="utf-8")
        inside_kernels = name.startswith("kernels_")

        def flatten(match: re.Match, inside_kernels: bool = inside_kernels) -> str:
            module = match[2].replace(".", "_")
            # A kernel file imports its siblings; flat, they all carry the folder's name.
            if inside_kernels and not module.startswith("kernels_"):
                module = f"kernels_{module}"
            pending.append(f"{module}.py")
            return f"{match[1]}.{module}{match[3]}"

        text = _RELATIVE_IMPORT.sub(flatten, text)
        target = Path(folder) / name
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
        written.append(target)
    return written


def _source_file(code_folder: Path, flat_name: str) -> Path:
    """Where a flat file comes from: beside this file, or in the `kernels` folder of the package or the checkout."""
    candidates = [code_folder / flat_name]
    if flat_name.startswith("kernels_"):
        kernel_name = flat_name.removeprefix("kernels_")
        candidates += [code_folder / "kernels" / kernel_name, code_folder.parent / "kernels" / kernel_name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{flat_name}: not found at {' or '.join(str(candidate) for candidate in candidates)}.")
