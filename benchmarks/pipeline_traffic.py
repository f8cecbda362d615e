"""What crosses the boundaries of pipeline stages: a table, a figure, and plans of training on 64 and 1,024 GPUs.

Everything is counted from configs (`hf_depthattn.distributed`). docs/render_documents.py puts the tables into
docs/pipeline.md, and

    python -m benchmarks.pipeline_traffic

draws docs/pipeline_traffic.svg.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from transformers import LlamaConfig

from hf_depthattn import DepthAttnConfig
from hf_depthattn.distributed.plan import choose, make_config, parse_arguments, render
from hf_depthattn.distributed.stage_plan import boundary_channels, loop_ranks, plan_stages, split_layers
from hf_depthattn.utils.result_files import write_text

ROOT = Path(__file__).resolve().parent.parent
FIGURE = ROOT / "docs" / "pipeline_traffic.svg"

FULL = {"sublayers_per_block": 1}
BLOCK = {"sublayers_per_block": 8}
#: Slots are the newest ones, as many as given.
SLOTS_8 = {**BLOCK, "depth_kv": "attention+mlp", "num_depth_slots": 8}


class Case(NamedTuple):
    """A row of the table.

    Attributes:
        name: its name.
        num_ranks: ranks of the pipeline, P.
        num_virtual: stages per rank, V.
        num_layers: decoder layers.
        fields: fields of the config.
    """

    name: str
    num_ranks: int
    num_virtual: int
    num_layers: int
    fields: dict[str, Any]

    def config(self) -> DepthAttnConfig:
        """The config, on a host with 32 query and 8 key-value heads: a slot is half as large as a source."""
        host = LlamaConfig(
            num_hidden_layers=self.num_layers, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8
        )
        return DepthAttnConfig(text_config=host, **self.fields)

    def boundaries(self, *, cross_stage_cache: bool) -> list[Fraction]:
        """The units that cross each boundary, per microbatch and direction."""
        config = self.config()
        layers = split_layers(self.num_layers, self.num_ranks * self.num_virtual)
        ranks = loop_ranks(self.num_ranks, self.num_virtual)
        plans = plan_stages(config, layers, ranks, cross_stage_cache=cross_stage_cache)
        return [Fraction(channels, config.hidden_size) for channels in boundary_channels(config, plans)]

    def of_paper(self) -> Fraction | None:
        """The paper's formula (section 4.1), if stages have whole blocks and there are only sources."""
        blocks, rest = divmod(2 * self.num_layers, self.fields.get("sublayers_per_block", 0) or 1)
        per_stage = Fraction(blocks, self.num_ranks * self.num_virtual)
        if rest or per_stage.denominator > 1 or "sublayers_per_block" not in self.fields or "depth_kv" in self.fields:
            return None
        P, V = self.num_ranks, self.num_virtual
        return (Fraction(P * (P - 1), 2) + (V - 1) * P * P) * per_stage


CASES = (
    Case("Full AttnRes", 2, 2, 8, FULL),
    Case("Full AttnRes", 2, 4, 8, FULL),
    Case("Full AttnRes", 4, 2, 16, FULL),
    Case("Full AttnRes", 4, 4, 16, FULL),
    Case("Block AttnRes, S = 4", 4, 2, 16, {"sublayers_per_block": 4}),
    Case("Block AttnRes, S = 5", 4, 2, 16, {"sublayers_per_block": 5}),
    Case("Block AttnRes, S = 8", 4, 2, 32, BLOCK),
    Case("the same, slots of attention", 4, 2, 32, {**BLOCK, "depth_kv": "attention"}),
    Case("the same, slots of attention and MLP", 4, 2, 32, {**BLOCK, "depth_kv": "attention+mlp"}),
    Case("the same, 16 slots", 4, 2, 32, {**SLOTS_8, "num_depth_slots": 16}),
    Case("the same, 8 slots", 4, 2, 32, SLOTS_8),
    Case("residual stream", 4, 2, 32, {"connection": "residual"}),
)

#: Title of a panel of the figure -> its case.
PANELS = {
    "Full AttnRes": Case("", 4, 4, 32, FULL),
    "Block AttnRes (S = 8) and MoDA (attention and MLP)": Case("", 4, 4, 32, {**BLOCK, "depth_kv": "attention+mlp"}),
}
_KINDS = {"whole state": False, "cross-stage caching": True}


def traffic_table() -> str:
    """Return the Markdown table of the traffic."""
    lines = ["| | P | V | layers | whole state | paper | cached |", "|---|---|---|---|---|---|---|"]
    for case in CASES:
        paper = case.of_paper()
        cells = [
            case.name,
            *map(str, (case.num_ranks, case.num_virtual, case.num_layers)),
            _number(sum(case.boundaries(cross_stage_cache=False))),
            "-" if paper is None else _number(paper),
            _number(sum(case.boundaries(cross_stage_cache=True))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(units: Fraction | int) -> str:
    return f"{float(units):g}"


#: Host of a plan -> config file, and its shortest pipeline that fits.
PLANNED = {"Qwen3-32B": ("qwen3_32b", 4), "Kimi-Linear-48B": ("kimi_linear_48b_a3b_attn_res", 8)}
PLANNED_DEPTH = {
    "Block AttnRes": [],
    "MoDA, slots of attention": ["--connection", "residual", "--depth-kv", "attention"],
}
PLANNED_GPUS = (64, 1024)


def plan_table() -> str:
    """Return the Markdown table of the plans, and the whole text of the first."""
    lines = [
        "| host | depth | GPUs | pipeline | fsdp x data | largest boundary, MiB | whole state, MiB | "
        "depth state, GiB | fullest rank, GiB | FSDP2 alone, GiB |",
        "|---" * 10 + "|",
    ]
    first = ""
    for host, (folder, length) in PLANNED.items():
        for depth, options in PLANNED_DEPTH.items():
            for num_gpus in PLANNED_GPUS:
                arguments = [f"examples/configs/{folder}", "--gpus", str(num_gpus), *options]
                alone, args = (
                    parse_arguments([str(ROOT / arguments[0]), *arguments[1:], "--pipeline", str(ranks)])
                    for ranks in (1, length)
                )
                config = make_config(args)
                plan = choose(config, args)
                axes = plan.axes
                mib = (f"{max(sizes) / 2**20:.0f}" for sizes in (plan.boundaries, plan.uncached_boundaries))
                of_ranks = [rank.depth_state for rank in plan.ranks]
                of_alone = choose(config, alone).peak
                gib = (f"{size / 2**30:.1f}" for size in (max(of_ranks), plan.peak, of_alone))
                cells = [
                    *(host, depth, f"{num_gpus:,}", f"{axes.pipeline} x {axes.num_virtual} stages"),
                    *(f"{axes.fsdp} x {axes.data}", *mib, *gib),
                ]
                lines.append(f"| {' | '.join(cells)} |")
                command = f"python -m hf_depthattn.distributed.plan {' '.join(arguments)} --pipeline {length}"
                first = first or f"```text\n$ {command}\n{render(config, plan, args.gpu_memory)}\n```"
    return "\n".join([*lines, "", "The text of the first:", "", first])


def figure_rows(case: Case) -> list[dict[str, Any]]:
    """Return the points of a panel.

    Args:
        case: its case.
    """
    return [
        {"boundary": number, "units": float(units), "kind": kind}
        for kind, cached in _KINDS.items()
        for number, units in enumerate(case.boundaries(cross_stage_cache=cached), 1)
    ]


def write_figure(path: Path) -> None:
    """Draw the traffic of every boundary as SVG.

    Args:
        path: the file.
    """
    import altair as alt
    import vl_convert

    from hf_depthattn.eval.report.charts import theme, vega_lite_version

    panels = []
    for title, case in PANELS.items():
        x = alt.X("boundary:O", title="boundary between stages", axis=alt.Axis(labelAngle=0))
        y = alt.Y("units:Q", title="units of B x T x D per microbatch")
        color = alt.Color("kind:N", title=None, sort=list(_KINDS))
        chart = alt.Chart(alt.Data(values=figure_rows(case))).mark_line(point=True).encode(x=x, y=y, color=color)
        panels.append(chart.properties(width=360, height=240, title=title))
    case = next(iter(PANELS.values()))
    title = f"{case.num_layers} layers, {case.num_ranks} ranks with {case.num_virtual} stages each"
    spec = alt.hconcat(*panels).resolve_scale(y="independent").properties(title=title).to_dict()
    config = {**theme(dark=False), "background": "white", "padding": 12}
    write_text(path, vl_convert.vegalite_to_svg(spec, vl_version=vega_lite_version(), config=config))


if __name__ == "__main__":
    write_figure(FIGURE)
