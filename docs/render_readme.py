"""Fill the generated parts of README.md: the table of hosts from the code, that of costs from benchmark results."""

import json
import re
import sys
from pathlib import Path

from hf_depthattn.host_layouts import HOST_LAYOUTS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
CPU_RESULT = ROOT / "benchmarks" / "results" / "cpu_overhead.json"


def host_table() -> str:
    """Markdown table of the supported hosts."""
    rows = ["| layout | model types |", "|---|---|"]
    for layout in HOST_LAYOUTS:
        types = ", ".join(f"`{model_type}`" for model_type in sorted(layout.model_types))
        rows.append(f"| {layout.name} | {types} |")
    return "\n".join(rows)


def cpu_table() -> str:
    """Markdown table of the CPU benchmark, or nothing when it was not run."""
    if not CPU_RESULT.exists():
        return ""
    result = json.loads(CPU_RESULT.read_text())
    setting = result["setting"]
    lines = [
        f"Forward and backward of a stack on a CPU: L = {setting['num_layers']}, D = {setting['hidden_size']}, "
        f"T = {setting['sequence_length']}, float32, {result['num_threads']} threads, "
        f"torch {result['versions']['torch']} (`benchmarks/cpu_overhead.py`; rows are timed in turn in one run, and "
        "given as ratios, since machines are noisy):",
        "",
        "| stack | time over the residual host | spread (quartiles) |",
        "|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["ratio_quartiles"]
        lines.append(f"| {row['name']} | {row['ratio_median']:.2f} | {low:.2f} - {high:.2f} |")
    return "\n".join(lines)


def fill(text: str, name: str, content: str) -> str:
    """Replace what stands between the two markers of a part."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)


def rendered() -> str:
    """README.md with its generated parts filled in."""
    return fill(fill(README.read_text(encoding="utf-8"), "hosts", host_table()), "cpu", cpu_table())


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if rendered() == README.read_text(encoding="utf-8") else "README.md is out of date: make format")
    README.write_text(rendered(), encoding="utf-8")
