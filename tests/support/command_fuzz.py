"""Random invalid input for every command, and a function to run a command in a fork of this process.

A fork takes milliseconds, while a new process would spend seconds on importing torch. Side effects of a command
(logging, warnings, a crash) end with its fork.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hf_depthattn.checkpoints.checkpoint_files import INDEX_FILE, SINGLE_FILE
from hf_depthattn.cli.main import build_parser, main
from hf_depthattn.depth_options import DEPTH_OPTIONS

#: Time limit of a command, which SIGALRM ends.
SECONDS = 60
#: Memory limit of a command, since a size from an invalid config may be huge.
MEMORY_BYTES = 6 * 2**30


@dataclass(frozen=True)
class Outcome:
    """Exit code (negative for a signal) and output of a command."""

    code: int
    out: str
    err: str


def run_in_fork(arguments: list[str], folder: Path) -> Outcome:
    """Run `depthattn` in a fork.

    Args:
        arguments: arguments of the command.
        folder: working directory of the fork; output is written next to it.
    """
    out, err = (folder.with_name(f"{folder.name}.{stream}") for stream in ("out", "err"))
    pid = os.fork()
    if pid == 0:
        _run_and_exit(arguments, folder, out, err)
    _, status = os.waitpid(pid, 0)
    return Outcome(os.waitstatus_to_exitcode(status), *(path.read_text(errors="replace") for path in (out, err)))


def _run_and_exit(arguments: list[str], folder: Path, out: Path, err: Path) -> None:
    code = 70
    try:
        os.chdir(folder)
        for stream, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        # The streams of the test runner are not files.
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", errors="backslashreplace") for stream in (1, 2))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        signal.alarm(SECONDS)
        # Garbage collection would write to, and thus copy, most memory pages of the parent.
        gc.disable()
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and modification time of every file below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_size if path.is_file() else 0, status.st_mtime_ns)
    return found


# --- inputs ---

#: Invalid values for fields of JSON files.
VALUES = (
    None, True, False, 0, 1, -1, -7, 3, 10**9, 2**31, 2**63, 10**30, 0.5, -1e300, float("nan"), float("inf"), "", "x",
    "8", "../../etc/passwd", "\udcff", "\x1b[2J", [], [1], ["x"], [[]], [None], {}, {"a": 1}, {"a": {"a": []}},
)  # fmt: skip
#: Fields of config.json to change.
FIELDS = (
    "model_type", "architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size", "head_dim", "max_position_embeddings", "rope_parameters", "rope_theta",
    "hidden_act", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias", "dtype", "torch_dtype",
    "initializer_range",
    "pad_token_id", "bos_token_id", "eos_token_id", "auto_map", "quantization_config", "text_config", "layer_types",
    "sliding_window", "num_experts", "num_labels", "id2label", "transformers_version", "attn_implementation",
    "use_cache", "attn_res_block_size", "moda", "hc_mult", "attention_dropout", "pretraining_tp", "_name_or_path",
)  # fmt: skip
DEPTH_FIELDS = (*DEPTH_OPTIONS, "text_config", "model_type", "architectures", "auto_map", "dtype")
JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
OPTION_VALUES = (
    "", "0", "-1", "1", "3", "99999999999999999999", "1e9", "nan", "none", "auto", "x" * 300, "\udcff",
    "~nosuchuser/x", "/dev/null", "/", ".", "..", "meta", "cuda:99", "cpu", "float64", "int8", "{}", "null", "=",
    "a=b", "query=input",
    "num_depth_heads=0", "depth_norm_eps=NaN", "key_norm=[[[]]]", "-", "--", "é", "a b\nc",
)  # fmt: skip

#: No bad input: they print help or progress. `--perplexity` would read whole folders such as `/`.
_LEFT_OUT = {"--help", "--progress", "--perplexity"}


def _options() -> dict[str, dict[str, bool]]:
    """Return, for each command, its options and whether they take a value; an unknown one is added."""
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {
        command: {
            **{
                action.option_strings[-1]: action.nargs != 0
                for action in parser._actions
                if action.option_strings and not _LEFT_OUT & set(action.option_strings)
            },
            "--nonsense": True,
        }
        for command, parser in commands.choices.items()
    }


OPTIONS = _options()


@dataclass
class Workspace:
    """Copies of checkpoints.

    They are the sources `stock`, `sharded` and `moe`, the retrofit `depth`, `foreign` of another project, and
    `imported` from it.
    """

    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / name


IMPORT = ["import", "foreign", "new", "--allow-missing-tokenizer"]
EXPORT = ["export", "imported", "new", "--format", "fla"]


def command_on(rng: random.Random, name: str) -> list[str]:
    """Return a command that reads a checkpoint; rarely a report, since a successful one takes a second."""
    report = ["report", name, "--out", "new", "--text", "text.txt", "--num-sequences", "2", "--sequence-length", "8"]
    if rng.random() < 0.03:
        return report
    if name.startswith("depth"):
        commands = [["restore", name, "new"], ["verify", "stock", name, "--max-new-tokens", "2"]]
    elif name == "foreign":
        return rng.choice([IMPORT, IMPORT, ["retrofit", name, "new"]])
    elif name == "imported":
        return EXPORT
    else:
        commands = [["retrofit", name, "new"], ["retrofit", name, "new", "--depth-kv", "attention+mlp"]]
        commands.append(["verify", name, "depth", "--max-new-tokens", "2"])
    return rng.choice([*commands, ["eval", name, "--perplexity", "text.txt", "--out", "new"]])


def spoil_field(rng: random.Random, work: Workspace) -> list[str]:
    """Set a config field to an invalid value, or delete it."""
    name = rng.choice(["stock", "moe", "depth", "foreign", "imported"])
    file = work.path(name) / "config.json"
    config = json.loads(file.read_text())
    is_depth = name in ("depth", "imported")
    is_inner = is_depth and rng.random() < 0.4
    fields = config["text_config"] if is_inner else config
    known = FIELDS if is_inner or not is_depth else DEPTH_FIELDS
    field = rng.choice(known if rng.random() < 0.7 else sorted(fields))
    if rng.random() < 0.1:
        fields.pop(field, None)
    else:
        fields[field] = rng.choice(VALUES)
    file.write_text(json.dumps(config))
    return command_on(rng, name)


def spoil_header(rng: random.Random, work: Workspace) -> list[str]:
    """Change the header of a weight file, truncate it, or overwrite bytes."""
    name = rng.choice(["stock", "sharded", "depth", "foreign", "imported"])
    file = rng.choice(sorted(work.path(name).glob("*.safetensors")))
    content = file.read_bytes()
    # The workspace links to the templates, which must stay unchanged.
    file.unlink()
    length = int.from_bytes(content[:8], "little")
    way = rng.choice(["field", "field", "field", "rename", "drop", "cut", "flip", "length", "replace"])
    if way == "cut":
        content = content[: rng.choice([0, 5, 8, 20, 8 + length // 2, 8 + length, len(content) - 1])]
    elif way == "flip":
        place = rng.randrange(8 + length)
        content = content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
    elif way == "length":
        content = (
            rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little") + content[8:]
        )
    elif way == "replace":
        content = rng.choice([b"[" * 100_000, b"<html>" * 100, b"\xff" * 64, (2).to_bytes(8, "little") + b"{}"])
    else:
        header = json.loads(content[8 : 8 + length])
        tensor = rng.choice(sorted(set(header) - {"__metadata__"}))
        if way == "drop":
            del header[tensor]
        elif way == "rename":
            header[rng.choice(["x", "", "model.layers.0.lora_A.weight", "model.layers.99.x", "\x1b"])] = header.pop(
                tensor
            )
        else:
            field = rng.choice(["dtype", "shape", "data_offsets", "all"])
            if field == "all":
                header[tensor] = rng.choice(VALUES)
            elif field == "dtype":
                header[tensor][field] = rng.choice(["F64", "I8", "F8_E4M3", "BOOL", "f32", *VALUES[:9]])
            else:
                numbers = [rng.choice([0, -1, 1, 4, 8, 2**40, 2**64]) for _ in range(rng.choice([1, 2, 3]))]
                header[tensor][field] = rng.choice([numbers, numbers, rng.choice(VALUES)])
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + content[8 + length :]
    file.write_bytes(content)
    return command_on(rng, name)


def spoil_json(rng: random.Random, work: Workspace) -> list[str]:
    """Replace a JSON file by invalid JSON or by unexpected types."""
    name = rng.choice(["stock", "sharded", "depth", "foreign"])
    file = work.path(name) / rng.choice([*JSON_FILES, *([INDEX_FILE] * 2 if name in ("sharded", "depth") else [])])
    content = file.read_bytes() if file.is_file() else b"{}"
    way = rng.choice(["whole", "whole", "field", "field", "cut", "flip", "gone"])
    if way == "whole":
        whole = [b"", b"{", b"[]", b"3", b"null", b'"x"', b"{}", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000]
        whole += [b'{"a":' * 50_000, b'{"num_hidden_layers": ' + b"9" * 5000 + b"}", b"NaN", b"\x00" * 10]
        content = rng.choice(whole)
    elif way == "field":
        fields = json.loads(content)
        fields[rng.choice([*sorted(fields), "auto_map", "metadata", "weight_map"])] = rng.choice(VALUES)
        content = json.dumps(fields).encode()
    elif way == "cut":
        content = content[: rng.randrange(len(content) + 1)]
    elif way == "flip":
        place = rng.randrange(len(content))
        content = content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
    file.unlink(missing_ok=True)
    if way != "gone":
        file.write_bytes(content)
    return command_on(rng, name)


def spoil_text(rng: random.Random, work: Workspace) -> list[str]:
    """Replace a text by binary data."""
    contents = [b"", b"a", b"\n", b"\xff\xfe\x00", b"\x00" * 50, b"\xef\xbb\xbf", b"\xef\xbb\xbfabc", b"\xed\xa0\x80"]
    contents += [b"\xc3\xa9" * 300, b"a" * 5000, b'{"text": null}\n', b'{"text": 3}\n{"text": "abc"}\n', b"[1, 2]\n"]
    contents += [b'{"text": "\\ud800"}\n', b'{"text": "abc"}\n{"text', b'{"other": 1}\n', b"[" * 50_000]
    contents += [b'{"text": [1]}', b'{"text": "abc"}\n\n\n']
    file = work.path(rng.choice(["odd.txt", "odd.jsonl", "odd.json", "odd", "lr=0.1.txt", "ODD.TXT"]))
    file.write_bytes(rng.choice(contents))
    if rng.random() < 0.1:
        sizes = ["--num-sequences", "2", "--sequence-length", "8"]
        return ["report", "stock", "--out", "new", "--text", file.name, *sizes]
    if rng.random() < 0.3:
        return ["verify", "stock", "depth", "--max-new-tokens", "1", "--text", file.name]
    return ["eval", "stock", "--perplexity", file.name, "--out", "new"]


def spoil_arguments(rng: random.Random, work: Workspace) -> list[str]:
    """Return commands with invalid values of options, or with paths that are not folders."""
    command = rng.choice([*sorted(OPTIONS), "retrofit", "verify", "eval"])
    arguments = {
        "retrofit": ["retrofit", "stock", "new"],
        "verify": ["verify", "stock", "depth", "--max-new-tokens", "1"],
        "restore": ["restore", "depth", "new"],
        "import": IMPORT,
        "export": EXPORT,
        "select-slots": ["select-slots", "depth", "--text", "short.txt", "--budget", "2"],
        "eval": ["eval", "stock", "--perplexity", "text.txt"],
        "report": ["report", "stock", "--out", "new", "--text", "short.txt"],
    }[command].copy()
    if rng.random() < 0.3:
        place = rng.randrange(1, len(arguments))
        arguments[place] = rng.choice(OPTION_VALUES)
    else:
        option = rng.choice(sorted(OPTIONS[command]))
        arguments.append(option)
        if OPTIONS[command][option]:
            arguments.append(rng.choice(OPTION_VALUES))
    return arguments


SPOILERS: tuple[Callable[[random.Random, Workspace], list[str]], ...] = (
    spoil_field,
    spoil_header,
    spoil_json,
    spoil_text,
    spoil_arguments,
)


def make_workspace(templates: Path, folder: Path) -> Workspace:
    """Copy the templates; weight files are linked."""
    shutil.copytree(templates, folder, copy_function=_link_weights)
    return Workspace(folder)


def _link_weights(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


__all__ = ["SINGLE_FILE", "SPOILERS", "Outcome", "Workspace", "make_workspace", "run_in_fork", "snapshot"]
