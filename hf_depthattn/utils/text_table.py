"""Plain text for reports: tables, sizes and lists of names."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as aligned columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def size(num_bytes: int) -> str:
    """Format a number of bytes: `1.5 GB`."""
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def weights_summary(num_linked: int, num_copied: int, num_written: int) -> str:
    """Format the numbers of bytes that were linked, copied and written."""
    return f"{size(num_linked)} linked, {size(num_copied)} copied, {size(num_written)} written"


def few(names: Sequence[str]) -> str:
    """Format the number of tensors and the first name: `12 tensors, first visual.patch_embed.weight`."""
    return names[0] if len(names) == 1 else f"{len(names)} tensors, first {names[0]}"
