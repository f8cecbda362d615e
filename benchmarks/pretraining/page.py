"""The page `docs/evidence.md` and the parts of the README and of docs/pretraining.md, from the results."""

from __future__ import annotations

from collections.abc import Sequence

from .arms import ARMS, CONTINUED, SCALED
from .budget_tables import budget_table, equal_time_by_budget, rates_by_budget, rates_of_budgets
from .conclusions import conclusions, equal_time_sentence, retrofit_sentences, settings_table, summary
from .costs import Costs
from .dynamics_table import Dynamics, dynamics_sentences, dynamics_table
from .group import Group, groups
from .protocol import limits, protocol
from .results import Results
from .tables import arm_sentences, arm_table, best_rates, depth_table, rate_table, unlucky_rates

_COMMAND = "python -m benchmarks.pretraining.evidence"


def page(results: Results, dynamics: Dynamics, costs: Costs) -> str:
    """Return the page.

    Args:
        results: all results.
        dynamics: metrics of trained models.
        costs: CPU time of arms.
    """
    found = groups(results, costs)
    lines = [
        f"<!-- Written by `{_COMMAND}` from benchmarks/pretraining/results; do not edit. -->",
        "# Evidence",
        "",
        "Does a learned depth dimension help a model that is trained from scratch, and which one? Small models,",
        "trained on a CPU, with the same data in the same order for every arm.",
        "",
        "Some of them are in [examples/pretrained](../examples/pretrained), with their",
        "[cards](../model_cards/README.md): a baseline, and models that each make a pair with it.",
        "`depthattn report examples/pretrained/block-attn-res --compare examples/pretrained/prenorm --text FILE",
        "--out report` shows what the connection changes.",
        "",
        *conclusions(found),
        "",
        *_settings(found),
    ]
    for group in found:
        if said := summary(group):
            lines += [f"**{_title(group)}**, baseline {ARMS[group.reference].label}:", "", *said, ""]
    lines += protocol(results)
    for group in found:
        lines += _of_group(group, dynamics)
        # The group with most arms comes first, and its tables have the other depths and budgets of all.
        before = [other for other in found[: found.index(group)] if other.corpus == group.corpus]
        if all(other.tokens != group.tokens for other in before):
            lines += _of_depths(group)
        if all(other.num_layers != group.num_layers for other in before):
            lines += _of_budgets(group)
    return "\n".join([*lines, *limits(results), ""])


def readme_part(results: Results, costs: Costs) -> str:
    """Return the part of the README: the table of differences at equal bytes, and what is not in it, in sentences.

    Args:
        results: all results.
        costs: CPU time of arms.
    """
    found = groups(results, costs)
    if not found:
        return ""
    group = found[0]
    return "\n".join(
        [
            *(_equal_bytes(found) or [*arm_table(group), ""]),
            *equal_time_sentence(found),
            *(line for one in found for line in retrofit_sentences(one)),
            "",
            f"![held-out loss of the arms during training, by bytes and by CPU time](docs/{plot_name(group)})",
            "",
            "All arms and numbers, the protocol and its limits: [docs/evidence.md](docs/evidence.md).",
        ]
    )


def _settings(found: Sequence[Group]) -> list[str]:
    at_equal_bytes = _equal_bytes(found)
    if not at_equal_bytes:
        return []
    return [
        *at_equal_bytes,
        "At equal CPU time:",
        "",
        *settings_table(found, equal_time=True),
        "",
    ]


def _equal_bytes(found: Sequence[Group]) -> list[str]:
    table = settings_table(found, equal_time=False)
    if not table:
        return []
    return [
        f"Held-out loss of {ARMS[SCALED].label}, and the differences of other arms to it at equal bytes, with 95 %",
        "intervals over seeds (negative is better):",
        "",
        *table,
        "",
    ]


def _title(group: Group) -> str:
    return f"{group.title[0].upper()}{group.title[1:]}"


def rates_part(results: Results, costs: Costs) -> str:
    """Return the part of docs/pretraining.md on learning rates.

    Args:
        results: all results.
        costs: CPU time of arms.
    """
    found = groups(results, costs)
    if not found:
        return ""
    group = found[0]
    same_model = [one for one in found if (one.corpus, one.num_layers) == (group.corpus, group.num_layers)]
    by_budget = rates_by_budget(same_model)
    return "\n".join(
        [
            f"Tune the peak rate for each connection. In [the study](evidence.md) ({group.title}, AdamW, rates by "
            "factors of two, one seed), the best ones were:",
            "",
            *best_rates(group),
            "",
            "They belong to this width, budget and batch, but they show that a comparison at one rate favours the arm",
            "for which that rate is right.",
            *(["", "The best rates of arms that were tuned with a larger budget too:", ""] if by_budget else []),
            *by_budget,
        ]
    )


def plot_name(group: Group) -> str:
    """Return the name of the file with the plot of a group, beside the page.

    Args:
        group: the results.
    """
    return f"evidence_{group.corpus}_{group.tokens}_{group.num_layers}l.svg"


def _of_depths(group: Group) -> list[str]:
    table = depth_table(group)
    if not table:
        return []
    return [
        f"### {_title(group)}: other depths",
        "",
        f"Differences to {ARMS[group.better_baseline or group.reference].label}, with the rates that are best at the "
        "depth in question where they were tried, else at the one above:",
        "",
        *table,
        "",
    ]


def _of_budgets(group: Group) -> list[str]:
    table = budget_table(group)
    if not table:
        return []
    lines = [
        f"### {_title(group)}: other budgets",
        "",
        "With the rates that are best at the budget in question where all were tried, else at the next smaller",
        "budget where they were; an untuned arm has the latter, but its baseline the former. A fit of two parameters",
        "through few budgets says how losses fall between them, not beyond; the last column is interpolated between",
        "mean losses, never extrapolated.",
        "",
        *table,
        "",
    ]
    if rates := rates_of_budgets(group):
        lines += ["Rates that were tried with other budgets, seed 0:", "", *rates, ""]
    if equal_time := equal_time_by_budget(group):
        lines += [
            "Equal CPU time: the loss of an arm minus that of its baseline, which is trained with so many times its",
            "bytes that both take the same CPU time (interpolated between the budgets of the baseline, per seed):",
            "",
            *equal_time,
            "",
        ]
    return lines


def _of_group(group: Group, dynamics: Dynamics) -> list[str]:
    lines = [
        f"## {_title(group)}",
        "",
        *arm_table(group),
        "",
        *arm_sentences(group),
        "",
        f"![held-out loss of the arms during training]({plot_name(group)})",
        "",
        "Rates that were tried:",
        "",
        *rate_table(group),
        "",
    ]
    if unlucky := unlucky_rates(group):
        lines += ["Another rate than that chosen on seed 0 is better over all seeds of:", "", *unlucky, ""]
    if group.arms(is_continued=True):
        start = ARMS[CONTINUED].start
        assert start is not None
        lines += [
            "### Continued training of a trained model",
            "",
            f"The {ARMS[start].label} models above, one per seed, are trained for as many bytes again, on other "
            "sequences, with a new warm-up and the same order of data for all. Retrofitted models start as the model "
            "that they continue.",
            "",
            *arm_table(group, is_continued=True),
            "",
            *arm_sentences(group, is_continued=True),
            "",
        ]
    if used := dynamics_table(group, dynamics):
        lines += [
            "### How the trained models use their depth",
            "",
            "Means over seeds, on held-out text. Late and early are the last and the first quarter of the layers;",
            "usefulness is the rise of the loss with the best affine map in place of a sublayer; the causal score is",
            "the mean change of later layers when one is skipped; the entropy is relative to uniform weights",
            "([metrics](report.md)).",
            "",
            *used,
            "",
            "The papers report a state that grows with depth in PreNorm and stays bounded in Block AttnRes, with",
            "gradients that are spread more evenly. Here, compared with the baseline of like initial weights:",
            "",
            *dynamics_sentences(group, dynamics),
            "",
        ]
    return lines
