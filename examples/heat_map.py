"""Heat map of depth weights as one PNG, drawn with matplotlib for the demo."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from hf_depthattn.eval.metrics.weights import site_names


def save_heat_map(weights: Tensor, path: str | Path, title: str) -> None:
    """Draw depth weights as heat maps of attention and MLP sites; needs matplotlib.

    Args:
        weights: return value of `mean_depth_weights`.
        path: PNG file to write.
        title: title of the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    num_sites, num_sources = weights.shape
    names = site_names((num_sites - 1) // 2)
    panels = {
        "attention sites": list(range(0, num_sites - 1, 2)),
        "MLP sites and output": [*range(1, num_sites, 2), num_sites - 1],
    }
    size = (2.5 + 1.24 * num_sources, 1.8 + 0.28 * len(panels["attention sites"]))
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained")
    # The colour scale ignores reads of a single source, whose weight is always 1.
    brightest = weights[weights.isfinite().sum(dim=-1) > 1].nan_to_num().max().item()
    for axis, (label, sites) in zip(axes, panels.items(), strict=True):
        image = axis.imshow(weights[sites].numpy(), vmin=0, vmax=brightest, cmap="viridis", aspect="auto")
        axis.set_title(label, fontsize=10)
        axis.set_yticks(range(len(sites)), [names[site] for site in sites], fontsize=7)
        axis.set_xticks(range(num_sources), ["embed", *range(1, num_sources)], fontsize=7)
        axis.set_xlabel("source (blocks, oldest first)", fontsize=8)
        for row, site in enumerate(sites):
            for source in range(num_sources):
                value = weights[site, source].item()
                if not math.isnan(value):
                    style = {
                        "ha": "center",
                        "va": "center",
                        "fontsize": 6,
                        "color": "w" if value < 0.6 * brightest else "k",
                    }
                    axis.text(source, row, f"{value:.2f}", **style)
    figure.suptitle(title, fontsize=11)
    figure.colorbar(image, ax=axes, label="mean depth weight")
    figure.savefig(path, dpi=150)
    plt.close(figure)
