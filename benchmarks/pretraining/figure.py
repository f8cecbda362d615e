"""Plot of the study: held-out loss against bytes and against CPU time, one line per arm."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from hf_depthattn.utils.result_files import write_text

from .arms import ARMS
from .group import Group

#: The part of training that is shown; before it, all losses fall steeply and differ little.
_SHOWN_FROM = 0.3


def curve_rows(group: Group) -> list[dict[str, Any]]:
    """Return the points of the plot: means over seeds at every evaluation.

    Args:
        group: the results.
    """
    rows = []
    for name in group.arms(is_continued=False):
        curves = [result.heldout_curve for result in group.of_seeds(name)]
        for points in zip(*curves, strict=True):
            if points[0][0] >= _SHOWN_FROM * group.tokens:
                seen, cpu, loss = (statistics.fmean(values) for values in zip(*points, strict=True))
                rows.append({"arm": ARMS[name].label, "bytes": seen / 1e6, "cpu": cpu, "loss": loss})
    return rows


def write_plot(group: Group, path: Path) -> None:
    """Write the plot as SVG.

    Args:
        group: the results.
        path: the file.
    """
    import altair as alt
    import vl_convert

    from hf_depthattn.eval.report.charts import theme, vega_lite_version

    rows = curve_rows(group)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    panels = []
    for field, title in (("bytes", "million bytes"), ("cpu", "CPU seconds")):
        base = alt.Chart(alt.Data(values=rows)).encode(
            x=alt.X(f"{field}:Q", title=title, scale=alt.Scale(zero=False, nice=False)),
            y=alt.Y("loss:Q", title="held-out loss (nats per byte)", scale=alt.Scale(zero=False)),
            color=alt.Color("arm:N", title=None, sort=arms, scale=alt.Scale(domain=arms, scheme="tableau20")),
        )
        panels.append(base.mark_line(point=True).properties(width=360, height=300))
    spec = alt.hconcat(*panels).properties(title=group.title).to_dict()
    config = {**theme(dark=False), "background": "white", "padding": 12}
    # The legend of the theme is above the chart, in one column.
    config["legend"] = {**config["legend"], "orient": "right"}
    write_text(path, vl_convert.vegalite_to_svg(spec, vl_version=vega_lite_version(), config=config))
