"""Check that commit subjects have the form `[Part] Imperative`, as in CONTRIBUTING.md; part of `make check`."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Only later commits are checked.
FIRST_CHECKED_AFTER = "70a0797ee6"
MAX_LENGTH = 72


def parts() -> list[str]:
    """Return the parts that CONTRIBUTING.md lists as "`[Model]`, `[Ops]`, ..."."""
    return re.findall(r"`\[(\w+)\]`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def fault_of(subject: str, allowed: list[str]) -> str | None:
    """Return what is wrong with a subject, or `None`."""
    match = re.match(r"\[(\w+)\] (\S+)", subject)
    if match is None or match[1] not in allowed:
        return f"must begin with one of {', '.join(f'[{part}]' for part in allowed)}"
    if not match[2][0].isupper() or subject.endswith("."):
        return "must continue with a capital letter and end without a full stop"
    if len(subject) > MAX_LENGTH:
        return f"has {len(subject)} characters, more than {MAX_LENGTH}"
    return None


def main() -> int:
    log = ["git", "-C", str(ROOT), "log", "--no-merges", "--format=%h %s", f"{FIRST_CHECKED_AFTER}..HEAD"]
    try:
        lines = subprocess.run(log, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        print("commit subjects: not checked, because there is no git history")
        return 0
    allowed = parts()
    faults = [(line, fault_of(line.partition(" ")[2], allowed)) for line in lines]
    for line, fault in faults:
        if fault is not None:
            print(f"{line}: {fault}")
    return int(any(fault is not None for _, fault in faults))


if __name__ == "__main__":
    sys.exit(main())
