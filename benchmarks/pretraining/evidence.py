"""Write docs/evidence.md, its plots and the part of the README from the results of the study.

python -m benchmarks.pretraining.evidence
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from hf_depthattn.errors import UserError

from .costs import read_costs
from .figure import write_plot
from .group import groups
from .page import plot_name
from .results import RESULTS, read_results
from .tables import arm_table

_ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: command line; that of the process by default.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--print", action="store_true", help="only print the tables of arms")
    options = parser.parse_args(arguments)
    try:
        found = groups(read_results(options.results), read_costs())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for group in found:
        print(f"{group.title}\n")
        print("\n".join(arm_table(group)), "\n")
        if not options.print:
            write_plot(group, _ROOT / "docs" / plot_name(group))
    if options.print:
        return 0
    return subprocess.run([sys.executable, str(_ROOT / "docs" / "render_documents.py")], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
