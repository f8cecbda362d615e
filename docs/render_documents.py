"""Fill the generated parts of documents, and write docs/evidence.md.

Hosts, options and classes come from the code, costs and losses from benchmark results, traffic and plans from configs.
"""

import json
import re
import sys
from pathlib import Path

from hf_depthattn.depth_connections import CONNECTIONS
from hf_depthattn.depth_options import DEPTH_OPTIONS, option_default, option_type
from hf_depthattn.host_layouts import HOST_LAYOUTS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
KERNELS_README = ROOT / "kernels" / "README.md"
DOCS = ROOT / "docs"
EVIDENCE = DOCS / "evidence.md"
CPU_RESULT = ROOT / "benchmarks" / "results" / "cpu_overhead.json"
MEMORY_RESULT = ROOT / "benchmarks" / "results" / "training_memory.json"
BYTES_RESULT = ROOT / "benchmarks" / "results" / "bytes_moved.json"


def host_table() -> str:
    """Return the Markdown table of the supported hosts."""
    rows = ["| layout | model types |", "|---|---|"]
    for layout in HOST_LAYOUTS:
        types = ", ".join(f"`{model_type}`" for model_type in sorted(layout.model_types))
        rows.append(f"| {layout.name} | {types} |")
    return "\n".join(rows)


def connection_classes() -> str:
    """Return the directives that document the class of every connection."""
    rows = [f".. autoclass:: {kind.__module__}.{kind.__name__}" for kind in CONNECTIONS.values()]
    return "\n".join(["```{eval-rst}", "\n\n".join(rows), "```"])


def moda_table() -> str:
    """Return the Markdown table of MoDA's options."""
    rows = ["| field | values, default first | |", "|---|---|---|"]
    of_moda = [name for name, option in DEPTH_OPTIONS.items() if option.is_moda]
    for name in ("depth_kv", *of_moda, "norm_position"):
        option, default = DEPTH_OPTIONS[name], option_default(name)
        kinds = [str(choice) for choice in option.choices] if option.choices else [option_type(name)]
        values = [default, *(kind for kind in kinds if kind != default)]
        rows.append(f"| `{name}` | {', '.join(map(_value, values))} | {option.help} |")
    return "\n".join(rows)


def _value(value: object) -> str:
    if isinstance(value, type):
        return f"`{value.__name__}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


#: Part of the CPU benchmark -> what distinguishes it from the part "decoder".
CPU_PARTS = {
    "decoder": "float32",
    "bfloat16": "bfloat16",
    "checkpointed": "float32, gradient checkpointing",
    "wide": "float32",
    "narrow": "float32",
}
ATTN_RES_ROWS = ("Block AttnRes, 8 blocks", "Full AttnRes")


def cpu_table() -> str:
    """Return the Markdown tables of the CPU benchmark, or nothing if there is no result."""
    if not CPU_RESULT.exists():
        return ""
    parts = json.loads(CPU_RESULT.read_text())["parts"]
    decoder, attention = parts["decoder"], parts["attention"]
    setting, of_call = decoder["setting"], attention["setting"]
    kinds = [row for size in ATTN_RES_ROWS for row in (size, f"{size}, single reads")]
    return "\n".join(
        [
            f"Forward and backward of a stack on a CPU: {_size(setting)}, float32, {_threads(decoder)}, "
            f"torch {decoder['versions']['torch']} (`benchmarks/cpu_overhead.py`; rows are timed in turn in one run "
            "and given as ratios, since the speed of a machine varies):",
            "",
            "| stack | time over the residual host | spread (quartiles) |",
            "|---|---|---|",
            *_ratios(decoder["rows"]),
            "",
            "AttnRes in other settings, over the residual host in the same setting:",
            "",
            f"| setting | {' | '.join(kinds)} |",
            "|---" * (1 + len(kinds)) + "|",
            *(_of_rows(parts[name], kinds, f", {kind}") for name, kind in CPU_PARTS.items() if name in parts),
            *(_of_rows(part, kinds) for name, part in parts.items() if name.startswith("depth_")),
            "",
            f"One attention call: T = {of_call['sequence_length']}, {of_call['num_attention_heads']} query and "
            f"{of_call['num_key_value_heads']} key-value heads of {of_call['head_dim']}, {of_call['num_slots']} depth "
            "slots:",
            "",
            "| attention | time over SDPA | spread (quartiles) |",
            "|---|---|---|",
            *_ratios(attention["rows"]),
        ]
    )


def _threads(part: dict) -> str:
    return f"{part['num_threads']} thread{'s' if part['num_threads'] > 1 else ''}"


def _size(setting: dict) -> str:
    return f"L = {setting['num_layers']}, D = {setting['hidden_size']}, T = {setting['sequence_length']}"


def _of_rows(part: dict, names: list[str], kind: str = "") -> str:
    ratios = {row["name"]: f"{row['ratio_median']:.2f}" for row in part["rows"]}
    return f"| {_size(part['setting'])}{kind} | {' | '.join(ratios[name] for name in names)} |"


def _ratios(rows: list[dict]) -> list[str]:
    lines = []
    for row in rows:
        low, high = row["ratio_quartiles"]
        lines.append(f"| {row['name']} | {row['ratio_median']:.2f} | {low:.2f} - {high:.2f} |")
    return lines


def memory_table() -> str:
    """Return the Markdown table of the memory kept for backward, or nothing if there is no result."""
    if not MEMORY_RESULT.exists():
        return ""
    result = json.loads(MEMORY_RESULT.read_text())
    setting = result["setting"]
    numbers = " | ".join(f"L = {num_layers}" for num_layers in setting["num_layers"])
    lines = [
        f"Memory that a training step keeps for backward, in KiB per layer: D = {setting['hidden_size']}, "
        f"T = {setting['sequence_length']}, float32 unless noted (`benchmarks/training_memory.py`, exact counts). "
        "A constant row means linear growth with the number of layers:",
        "",
        f"| stack | {numbers} |",
        "|---" * (1 + len(setting["num_layers"])) + "|",
    ]
    for row in result["rows"]:
        per_layer = " | ".join(f"{count / 1024:.1f}" for count in row["bytes_per_layer"])
        lines.append(f"| {row['name']} | {per_layer} |")
    return "\n".join(lines)


def fill(text: str, name: str, content: str) -> str:
    """Replace the text between the two markers of a part; a text without markers is returned unchanged."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)


#: Direction -> name of its column, and which numbers.
BYTES_COLUMNS = {"forward": "forward, mean / last group", "backward": "backward, mean / last group"}
DIVIDED_ROW = "Block AttnRes, grouped reads"


def bytes_table() -> str:
    """Return the Markdown tables of the bytes that mechanisms move."""
    result = json.loads(BYTES_RESULT.read_text())
    num_sublayers, block_size = result["setting"]["num_sublayers"], result["setting"]["block_size"]
    columns = " | ".join(f"{path}: {name}" for path in ("Triton", "torch") for name in BYTES_COLUMNS.values())
    lines = [f"| L = {num_sublayers}, S = {block_size} | {columns} |", "|---" * (1 + 2 * len(BYTES_COLUMNS)) + "|"]
    by_name: dict[str, dict[str, dict]] = {}
    for row in result["rows"]:
        by_name.setdefault(row["name"], {})[row["path"]] = row
    for name, paths in by_name.items():
        found = [_moved(paths.get(path), way, num_sublayers) for path in ("triton", "torch") for way in BYTES_COLUMNS]
        lines.append(f"| {name} | {' | '.join(found)} |")
    lines += ["", f"{DIVIDED_ROW}, Triton:", "", "| part | loads | stores |", "|---|---|---|"]
    for direction in BYTES_COLUMNS:
        for part, moved in by_name[DIVIDED_ROW]["triton"][direction]["parts"].items():
            loads, stores = (f"{moved[way] / num_sublayers:.2f}" for way in ("loads", "stores"))
            lines.append(f"| {direction}, `{part}` | {loads} | {stores} |")
    return "\n".join(lines)


def _moved(row: dict | None, direction: str, num_sublayers: int) -> str:
    if row is None:
        return "-"
    moved, last = row[direction], row[direction]["last_group"]
    mean = (moved["loads"] + moved["stores"]) / num_sublayers
    return f"{mean:.2f} / {(last['loads'] + last['stores']) / row['group_size']:.2f}"


def study(part: str) -> str:
    """Return the page of the study of pretraining, or its part in another document.

    Args:
        part: name of the function in `benchmarks/pretraining/page.py`.
    """
    # `benchmarks/` is not installed.
    sys.path.append(str(ROOT))
    from benchmarks.pretraining import page
    from benchmarks.pretraining.costs import read_costs
    from benchmarks.pretraining.results import read_dynamics, read_results

    results = read_results()
    if part == "page":
        return page.page(results, read_dynamics(), read_costs())
    return getattr(page, part)(results, read_costs())


def pipeline_part(part: str) -> str:
    """Return a part of the page on pipelines.

    Args:
        part: name of the function in `benchmarks/pipeline_traffic.py`.
    """
    # `benchmarks/` is not installed.
    sys.path.append(str(ROOT))
    from benchmarks import pipeline_traffic

    return getattr(pipeline_traffic, part)()


#: Document -> name of each generated part -> function that returns its content.
DOCUMENTS = {
    README: {"study": lambda: study("readme_part")},
    KERNELS_README: {"bytes": bytes_table},
    DOCS / "api_connections.md": {"classes": connection_classes},
    DOCS / "costs.md": {"cpu": cpu_table, "memory": memory_table},
    DOCS / "hosts.md": {"hosts": host_table},
    DOCS / "moda.md": {"moda": moda_table},
    DOCS / "pipeline.md": {
        "traffic": lambda: pipeline_part("traffic_table"),
        "plans": lambda: pipeline_part("plan_table"),
    },
    DOCS / "pretraining.md": {"rates": lambda: study("rates_part")},
}


def rendered(document: Path) -> str:
    """Return a document with its generated parts filled in."""
    if document == EVIDENCE:
        return study("page")
    text = document.read_text(encoding="utf-8")
    for name, table in DOCUMENTS[document].items():
        text = fill(text, name, table())
    return text


if __name__ == "__main__":
    documents = [*DOCUMENTS, EVIDENCE]
    if sys.argv[1:] == ["--check"]:
        stale = [str(path) for path in documents if rendered(path) != path.read_text(encoding="utf-8")]
        sys.exit(f"out of date: {', '.join(stale)}; run make format" if stale else 0)
    for path in documents:
        path.write_text(rendered(path), encoding="utf-8")
