"""GPU benchmark suite: check parity, then time our ops next to those of peers, then whole models, in one run.

    python benchmarks/gpu_suite.py --output benchmarks/results/gpu_suite.json [--moda-repo FOLDER]
    python benchmarks/gpu_suite.py --dry-run --output FILE   test without a GPU: tiny shapes, torch's ops
    python benchmarks/gpu_suite.py --render FILE             print the Markdown tables of a result

The Markdown tables are written next to the JSON file. The JSON file is rewritten after every case, with
`"complete": false` until the end. Rows that do not fit into `--budget-seconds` or cannot run are listed with the
reason. A row whose results differ from the float64 reference is not timed.

Files: gpu_cases (cases and rows), gpu_attn_res with gpu_attn_res_problems, gpu_moda and gpu_end_to_end (the parts),
gpu_peers and gpu_moda_official (kernels of other packages), gpu_parity (bounds), gpu_run, gpu_timing, gpu_report
(targets and tables).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import gpu_attn_res
import gpu_end_to_end
import gpu_moda
import gpu_report
import gpu_run
import torch
from gpu_cases import Case
from gpu_moda_official import official_row
from gpu_timing import Budget, Clock, Effort, environment

ATTN_RES, MODA, END_TO_END = "attn_res", "moda", "end_to_end"
#: Share of each part of the time budget; parity covers both parts with ops.
SHARES = {"parity": 0.25, ATTN_RES: 0.2, MODA: 0.2, END_TO_END: 0.35}
#: Part whose parity each variant depends on.
NEEDS = {"AttnRes": ATTN_RES, "MoDA": MODA}
_TINY_EFFORT = Effort(2, 2, 0.0)


class Writer:
    """Writes the result and its tables; the JSON file on disk is always complete."""

    def __init__(self, path: Path | None, result: dict):
        self.path, self.result = path, result

    def write(self) -> None:
        gpu_report.derive(self.result)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        texts = {self.path: json.dumps(self.result, indent=2) + "\n"}
        texts[self.path.with_suffix(".md")] = gpu_report.markdown(self.result)
        for path, text in texts.items():
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)


def all_cases(arguments: argparse.Namespace, device: torch.device) -> list[Case]:
    """Return the selected cases."""
    official = official_row(arguments.moda_repo.resolve(), device) if arguments.moda_repo else None
    cases = gpu_attn_res.cases(arguments.dry_run) + gpu_moda.cases(arguments.dry_run, official)
    wanted = [case for case in cases if case.part in arguments.parts and _is_wanted(case.name, arguments.only)]
    return [
        case._replace(rows=tuple(row for row in case.rows if _is_wanted(row.name, arguments.rows))) for case in wanted
    ]


def _is_wanted(name: str, texts: list[str] | None) -> bool:
    return not texts or any(text in name for text in texts)


def as_json(case: Case, rows: list[dict]) -> dict:
    """Return a case with its rows as JSON values."""
    floors = {which: {"bytes": size, "formula": text} for which, (size, text) in case.floors.items()}
    return {
        "name": case.name,
        "part": case.part,
        "setting": {**case.setting, "dtype": str(gpu_run.PARITY_DTYPES[0])[6:]},
        "floors": floors,
        "floor_is_extra": case.floor_is_extra,
        "in_graph": case.in_graph,
        "rows": rows,
    }


def forbidden_variants(parities: dict[str, dict[str, dict]], cases: Iterable[Case]) -> dict[str, str]:
    """Return the variants that are not timed because one of their ops has wrong results, with the reason."""
    wrong = {}
    for case in cases:
        for row in case.rows:
            if row.kind == "ours" and parities.get(case.name, {}).get(row.name, {}).get("ok") is False:
                wrong[case.part] = f"parity of {case.name!r}, row {row.name!r}, failed: not timed"
    return {
        variant: wrong[part]
        for variant in gpu_end_to_end.VARIANTS
        for text, part in NEEDS.items()
        if text in variant and part in wrong
    }


def warm_up(cases: list[Case], arguments: argparse.Namespace) -> None:
    """Compile the kernels of every row in parallel processes, which fill the cache of binaries."""
    command = [sys.executable, __file__, "--warm-up-only", "--parts", *arguments.parts]
    rows = [
        (case.name, row.name)
        for case in cases
        for row in case.rows
        if row.checks_parity and not row.slow_to_compile and row.elsewhere is None
    ]
    running: list[subprocess.Popen] = []
    try:
        for case, row in rows:
            # Each process mostly uses one core.
            while sum(process.poll() is None for process in running) >= max(1, (os.cpu_count() or 1) - 1):
                time.sleep(0.1)
            words = [*command, "--only", case, "--rows", row]
            running.append(subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        for process in running:
            process.wait()
    finally:
        for process in running:
            process.kill()


def wrong_rows(parities: dict[str, dict[str, dict]], cases: Iterable[Case]) -> dict[str, set[str]]:
    """Return, for each part, the rows with wrong results in any of its cases."""
    found: dict[str, set[str]] = {ATTN_RES: set(), MODA: set()}
    for case in cases:
        found[case.part] |= {name for name, row in parities[case.name].items() if row.get("ok") is False}
    return found


def run(arguments: argparse.Namespace) -> dict:
    """Run the suite and return the result, complete or not."""
    device = torch.device(arguments.device)
    clock, budget = Clock(device), Budget(arguments.budget_seconds, SHARES)
    cases = all_cases(arguments, device)
    result: dict = {
        "benchmark": "gpu_suite",
        "dry_run": arguments.dry_run,
        "complete": False,
        "environment": environment(device),
        "copy_bytes_per_s": None,
        "parity": {},
        "cases": [],
        "end_to_end": {"setting": {}, "rows": []},
    }
    writer = Writer(arguments.output, result)
    writer.write()
    try:
        _run_parts(arguments, cases, clock, budget, writer)
        result["complete"] = not arguments.warm_up_only
    # After an illegal memory access all later launches of the process fail: keep the results so far.
    except RuntimeError as error:
        result["stopped"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    writer.write()
    return result


def _run_parts(arguments: argparse.Namespace, cases: list[Case], clock: Clock, budget: Budget, writer: Writer) -> None:
    device, result = clock.device, writer.result
    if not arguments.warm_up_only:
        result["copy_bytes_per_s"] = clock.copy_bandwidth(*([1 << 16] if arguments.dry_run else []))
    budget.begin("parity")
    if not arguments.dry_run and not arguments.warm_up_only and len(cases) > 1:
        # Kernels that take longer are compiled below.
        with contextlib.suppress(gpu_run.OutOfTime), gpu_run.time_limit(0.6 * max(0.1, budget.left())):
            warm_up(_one_per_kernel(cases), arguments)
    parities: dict[str, dict[str, dict]] = {}
    result["parity"] = parities
    for case in cases:
        parities[case.name] = gpu_run.run_parity(case, device, budget.left)
        _say(f"parity of {case.name}: " + _summary(parities[case.name]))
    writer.write()
    if arguments.warm_up_only:
        return
    wrong = wrong_rows(parities, cases)
    effort = _TINY_EFFORT if arguments.dry_run else Effort()
    for part in (ATTN_RES, MODA):
        budget.begin(part)
        for case in cases:
            if case.part == part:
                rows = gpu_run.run_times(case, parities[case.name], wrong[part], clock, budget.left, effort)
                result["cases"].append(as_json(case, rows))
                writer.write()
                _say(f"{case.name}: {sum(row['status'] == 'ok' for row in rows)} of {len(rows)} rows measured")
                clock.synchronize()
    if END_TO_END in arguments.parts:
        budget.begin(END_TO_END)
        tiny = arguments.dry_run
        part = result["end_to_end"]
        part["setting"] = {
            "host": "tiny Qwen3" if tiny else "Qwen3-0.6B's shape, random weights",
            **(gpu_end_to_end.TINY_SETTING if tiny else gpu_end_to_end.SETTING),
        }

        def done(row: dict) -> None:
            part["rows"].append(row)
            writer.write()
            _say(f"{row['name']}, {row['mode']}: " + ", ".join(step["status"] for step in row["steps"].values()))

        forbidden = forbidden_variants(parities, cases)
        gpu_end_to_end.measure(clock, budget.left, tiny, forbidden, done, compiled=not arguments.no_compile)


def _one_per_kernel(cases: list[Case]) -> list[Case]:
    """Return one case per set of kernels; cases that only differ in tokens use the same kernels."""
    kept: dict[tuple, Case] = {}
    for case in cases:
        kept.setdefault(
            (case.part, *(v for k, v in case.setting.items() if k not in ("num_tokens", "num_slots"))), case
        )
    return list(kept.values())


def _summary(parity: dict[str, dict]) -> str:
    return ", ".join(
        f"{name}: {'wrong' if found.get('ok') is False else found['status']}" for name, found in parity.items()
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the suite, write the result and print its tables.

    The exit code is 1 if one of our rows has wrong results or the device failed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=None, help="JSON file to write; the tables are written next to it"
    )
    parser.add_argument("--device", default=None, help="cuda (including AMD GPUs) by default, cpu in a dry run")
    parser.add_argument("--dry-run", "--tiny", action="store_true", help="test the suite with tiny shapes on the CPU")
    parser.add_argument("--parts", nargs="+", choices=(ATTN_RES, MODA, END_TO_END), default=[*SHARES][1:])
    parser.add_argument("--only", nargs="+", default=None, help="only cases whose names contain one of these strings")
    parser.add_argument("--rows", nargs="+", default=None, help="only rows whose names contain one of these strings")
    parser.add_argument("--budget-seconds", type=float, default=570.0, help="time limit of the whole run")
    parser.add_argument("--moda-repo", type=Path, default=None, help="checkout of hustvl/MoDA")
    parser.add_argument(
        "--flash-impl", default=None, help="FA3 or FA4: torch's flash attention implementation for all rows"
    )
    parser.add_argument("--no-compile", action="store_true", help="do not run whole models with torch.compile")
    parser.add_argument("--render", type=Path, default=None, help="print the tables of this JSON file and exit")
    parser.add_argument("--warm-up-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.render is not None:
        print(gpu_report.markdown(json.loads(arguments.render.read_text(encoding="utf-8"))), end="")
        return 0
    if arguments.device is None:
        arguments.device = "cpu" if arguments.dry_run else "cuda"
    if arguments.device == "cpu" and not arguments.dry_run:
        parser.error("--device cpu runs with --dry-run only: CPU times say nothing about GPU kernels")
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: torch finds no GPU; use --dry-run to test the suite without one")
    if arguments.flash_impl is not None:
        if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
            parser.error(f"--flash-impl {arguments.flash_impl}: not supported by torch {torch.__version__}")
        torch.nn.attention.activate_flash_attention_impl(arguments.flash_impl)
    result = run(arguments)
    if not arguments.warm_up_only:
        print(gpu_report.markdown(result), end="")
    wrong = [
        f"{case}: {row}"
        for case, rows in result["parity"].items()
        for row, found in rows.items()
        if found.get("ok") is False
    ]
    for text in wrong:
        _say(f"parity failed: {text}")
    return 1 if "stopped" in result or any(": ours" in text for text in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
