"""Targets and Markdown tables of a result of the GPU suite, computed from its JSON."""

from __future__ import annotations

from typing import NamedTuple

from gpu_attn_res import READS, STACKS
from gpu_cases import FORWARD, FORWARD_BACKWARD
from gpu_end_to_end import COMPILED, DECODE, EAGER, STOCK, TRAINING
from gpu_moda import name_of
from gpu_moda_official import NAME as OFFICIAL

DEVICE_OF_TARGETS = "H200"
DRY_RUN = (
    "**Dry run on a CPU with tiny shapes: the times below only show that the suite runs. They are not measurements, "
    "and targets are not judged.**"
)


class Target(NamedTuple):
    """A performance target of the project.

    Attributes:
        text: description.
        case, which: case and pass; mode and step for end to end.
        over: `None` for the seconds of our fastest row; otherwise a name or kind of rows, and the value is (their
            fastest) / ours.
        limit: limit of the value.
        at_most: whether the limit is an upper bound.
    """

    text: str
    case: str
    which: str
    over: str | None
    limit: float
    at_most: bool = False


_READ, *_ = READS
_BLOCK, _FULL, *_ = STACKS
TARGETS = (
    Target("read at L=9 d=7168 8192 tokens: at most 320 us", _READ, FORWARD, None, 320e-6, True),
    Target("Block, forward and backward: at most 35 ms", _BLOCK, FORWARD_BACKWARD, None, 35e-3, True),
    Target("Block: at least 2 x the best peer", _BLOCK, FORWARD_BACKWARD, "peer", 2.0),
    Target("Full, forward and backward: at most 24 ms", _FULL, FORWARD_BACKWARD, None, 24e-3, True),
    Target("Full: at least 4 x FLA", _FULL, FORWARD_BACKWARD, "FLA fused_attnres", 4.0),
    *(
        Target(
            f"MoDA T={tokens}: at least {share:.0%} of the fastest vendor attention",
            name_of(tokens, 8, 64, 64),
            FORWARD_BACKWARD,
            "vendor",
            share,
        )
        for tokens, share in ((4096, 0.70), (16384, 0.90), (65536, 0.97))
    ),
    Target(
        "MoDA T=16384: at least 2 x the official kernel", name_of(16384, 8, 64, 64), FORWARD_BACKWARD, OFFICIAL, 2.0
    ),
)
#: (description, step, largest ratio of Block N=8 to stock), in every mode.
RATIOS = (
    ("Block N=8 in training: at most 4 % over stock", TRAINING, 1.04),
    ("Block N=8 in decode: at most 2 % over stock", DECODE, 1.02),
)
_BLOCK_VARIANT = "Block AttnRes, N=8"


def derive(result: dict) -> None:
    """Add floors, bandwidths and targets to a result."""
    copy_bandwidth = result.get("copy_bytes_per_s")
    for case in result["cases"]:
        for row in case["rows"]:
            for which, found in row.get("passes", {}).items():
                floor = case["floors"][which]["bytes"]
                seconds = found["median_s"]
                if case["floor_is_extra"]:
                    first: dict = next((row for row in case["rows"] if row["kind"] == "base"), {})
                    base = first.get("passes", {}).get(which)
                    seconds = None if base is None or row["kind"] == "base" else seconds - base["median_s"]
                if seconds is None:
                    continue
                # The extra time may be zero or negative within noise, which gives no bandwidth.
                found["bytes_per_s"] = floor / seconds if seconds > 0 else None
                if copy_bandwidth:
                    found["floor_s"] = floor / copy_bandwidth
    result["targets"] = [_judge(target, result) for target in TARGETS] + _judge_ratios(result)


def _judge(target: Target, result: dict) -> dict:
    case = next((case for case in result["cases"] if case["name"] == target.case), None)
    value = None
    if case is not None:
        value = _fastest(case, target.which, "ours")
        if target.over is not None:
            other = _fastest(case, target.which, target.over)
            value = None if value is None or other is None else other / value
    return _verdict(result, target.text, value, target.limit, target.at_most)


def _judge_ratios(result: dict) -> list[dict]:
    found = []
    for text, step, limit in RATIOS:
        for mode in (EAGER, COMPILED):
            medians = {
                row["name"]: row["steps"].get(step, {}).get("median_s")
                for row in result["end_to_end"]["rows"]
                if row["mode"] == mode
            }
            ours, stock = medians.get(_BLOCK_VARIANT), medians.get(STOCK)
            value = ours / stock if ours and stock else None
            found.append(_verdict(result, f"{text} ({mode})", value, limit, True))
    return found


def _verdict(result: dict, text: str, value: float | None, limit: float, at_most: bool) -> dict:
    if result["dry_run"]:
        status = "not judged: dry run"
    elif value is None:
        status = "not measured"
    else:
        status = "met" if (value <= limit if at_most else value >= limit) else "missed"
        if DEVICE_OF_TARGETS not in result["environment"]["device"]:
            status += f", on another device than the target's {DEVICE_OF_TARGETS}"
    return {"target": text, "limit": limit, "measured": None if result["dry_run"] else value, "status": status}


def _fastest(case: dict, which: str, wanted: str) -> float | None:
    """Return the smallest median of the rows with a given kind, name or prefix of the name."""
    medians = [
        row["passes"][which]["median_s"]
        for row in case["rows"]
        if which in row.get("passes", {}) and (wanted == row["kind"] or row["name"].startswith(wanted))
    ]
    return min(medians, default=None)


def markdown(result: dict) -> str:
    """Return the tables of a result as Markdown."""
    env = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items() if version)
    lines = ["# GPU suite", ""]
    if result["dry_run"]:
        lines += [DRY_RUN, ""]
    if not result["complete"]:
        lines += [f"**Not complete: {result.get('stopped') or 'the run was interrupted'}.**", ""]
    lines += [f"{env['device']}, {env['driver'] or 'no GPU driver'}; {versions}.", ""]
    if result.get("copy_bytes_per_s") and not result["dry_run"]:
        lines += [f"Copy bandwidth in this run: {result['copy_bytes_per_s'] / 1e12:.2f} TB/s.", ""]
    lines += ["## Targets", "", "| target | measured | |", "|---|---|---|"]
    for target in result["targets"]:
        measured = "-" if target["measured"] is None else f"{target['measured']:.4g}"
        lines.append(f"| {target['target']} | {measured} | {target['status']} |")
    for case in result["cases"]:
        lines += ["", f"## {case['name']}", "", *_case_table(case, result["dry_run"])]
    lines += ["", "## End to end", "", *_end_to_end_table(result["end_to_end"])]
    return "\n".join(lines) + "\n"


def _case_table(case: dict, dry_run: bool) -> list[str]:
    shape = ", ".join(f"{name} {value}" for name, value in case["setting"].items())
    what = "of the cost in addition to the first row" if case["floor_is_extra"] else "of the pass"
    floors = "; ".join(
        f"{which} {floor['bytes'] / 1e9:.3g} GB = {floor['formula']}" for which, floor in case["floors"].items()
    )
    lines = [f"{shape}. Floors {what}: {floors}.", ""]
    lines += ["| row | pass | median | quartiles | runs | peak memory | achieved | of copy |", "|---" * 8 + "|"]
    for row in case["rows"]:
        if row["status"] != "ok":
            lines.append(f"| {row['name']} | {row['status']}: {_cell(row.get('reason', ''))} |" + " |" * 6)
            continue
        for which, found in row["passes"].items():
            low, high = found["quartiles_s"]
            peak = "-" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 2**30:.2f} GiB"
            rate, share = found.get("bytes_per_s"), "-"
            if rate and found.get("floor_s"):
                share = f"{found['floor_s'] * rate / case['floors'][which]['bytes']:.0%}"
            rate_text = "-" if not rate or dry_run else f"{rate / 1e12:.2f} TB/s"
            lines.append(
                f"| {row['name']} | {which} | {_time(found['median_s'])} | {_time(low)} - {_time(high)} "
                f"| {found['num_runs']} | {peak} | {rate_text} | {'-' if dry_run else share} |"
            )
    return lines


def _end_to_end_table(part: dict) -> list[str]:
    if not part["rows"]:
        return [f"Not run: {part.get('reason', 'no time left')}."]
    shape = ", ".join(f"{name} {value}" for name, value in part["setting"].items())
    lines = [f"{shape}.", "", "| model | mode | step | median | quartiles | tokens/s | over stock | peak memory |"]
    lines.append("|---" * 8 + "|")
    stock = {
        (row["mode"], name): found.get("median_s")
        for row in part["rows"]
        if row["name"] == STOCK
        for name, found in row["steps"].items()
    }
    for row in part["rows"]:
        for name, found in row["steps"].items():
            head = f"| {row['name']} | {row['mode']} | {name} |"
            if found["status"] != "ok":
                lines.append(f"{head} {found['status']}: {_cell(found.get('reason', ''))} |" + " |" * 4)
                continue
            base = stock.get((row["mode"], name))
            over = "-" if not base else f"{found['median_s'] / base - 1:+.1%}"
            peak = "-" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 2**30:.2f} GiB"
            low, high = found["quartiles_s"]
            lines.append(
                f"{head} {_time(found['median_s'])} | {_time(low)} - {_time(high)} | {found['tokens_per_s']:,.0f} "
                f"| {over} | {peak} |"
            )
    return lines


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:160]
