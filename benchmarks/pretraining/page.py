"""The page `docs/evidence.md` and the part of the README, from the results."""

from __future__ import annotations

from .arms import ARMS, CONTINUED
from .budget_tables import budget_table, equal_time_by_budget, rates_by_budget
from .dynamics_table import Dynamics, dynamics_sentences, dynamics_table
from .group import Group, groups
from .results import Result, Results
from .tables import arm_sentences, arm_table, best_rates, depth_table, rate_table, settings_table, summary

_README_COLUMNS = ("arm", "held-out loss", "baseline", "difference", "CPU time", "difference to scaled PreNorm")
_COMMAND = "python -m benchmarks.pretraining.evidence"


def page(results: Results, dynamics: Dynamics) -> str:
    """Return the page.

    Args:
        results: all results.
        dynamics: metrics of trained models.
    """
    lines = [
        f"<!-- Written by `{_COMMAND}` from benchmarks/pretraining/results; do not edit. -->",
        "# Evidence",
        "",
        "Does a learned depth dimension help a model that is trained from scratch, and which one? Small models,",
        "trained on a CPU, with the same data in the same order for every arm.",
        "",
    ]
    found = groups(results)
    lines += _settings(found)
    for group in found:
        lines += [
            f"**{group.title[0].upper()}{group.title[1:]}**, baseline {ARMS[group.reference].label}:",
            "",
            *summary(group),
            "",
        ]
    lines += _protocol(results)
    for group in found:
        # The first group of a corpus has most arms; its tables show the other depths and budgets.
        is_first = not any(other.corpus == group.corpus for other in found[: found.index(group)])
        lines += _of_group(group, dynamics, with_others=is_first)
    return "\n".join([*lines, *_limits(results), ""])


def readme_part(results: Results) -> str:
    """Return the part of the README: tables of arms, and what the first one shows.

    Args:
        results: all results.
    """
    found = groups(results)
    if not found:
        return ""
    group = found[0]
    return "\n".join(
        [
            f"Trained from scratch ({group.title}), held-out loss in nats per byte; paired differences over seeds, "
            "with a 95 % interval:",
            "",
            *_columns(arm_table(group), _README_COLUMNS),
            "",
            *summary(group),
            "",
            f"![held-out loss of the arms during training, by bytes and by CPU time](docs/{plot_name(group)})",
            "",
            *_settings(found),
            "All numbers, other settings and limits: [docs/evidence.md](docs/evidence.md).",
        ]
    )


def _settings(found: list[Group]) -> list[str]:
    table = settings_table(found, equal_time=False)
    if not table:
        return []
    return [
        "Held-out loss of scaled PreNorm, and the differences of other arms to it, at equal tokens:",
        "",
        *table,
        "",
        "At equal CPU time, with the CPU time of a byte relative to scaled PreNorm:",
        "",
        *settings_table(found, equal_time=True),
        "",
    ]


def _columns(lines: list[str], wanted: tuple[str, ...]) -> list[str]:
    """Return some columns of a table, those it has."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    places = [rows[0].index(name) for name in wanted if name in rows[0]]
    return [f"| {' | '.join(row[place] for place in places)} |" for row in rows]


def rates_part(results: Results) -> str:
    """Return the part of docs/pretraining.md on learning rates.

    Args:
        results: all results.
    """
    found = groups(results)
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


def _protocol(results: Results) -> list[str]:
    some = next(iter(results.values()))
    setting, versions = some.setting, some.versions
    step = setting["sequence_length"] * setting["batch_size"]
    commits = sorted({result.versions["commit"][:12] for result in results.values()})
    host = (
        f"Host: a Llama over bytes of width {setting['hidden_size']}, MLPs of {setting['intermediate_size']}, "
        f"{setting['num_attention_heads']} query and {setting['num_key_value_heads']} key-value heads, tied "
        f"embeddings, initial weights with a standard deviation of {setting['initializer_range']:g}; sequences of "
        f"{setting['sequence_length']} bytes, {step:,} bytes a step, float32."
    )
    optimizer = (
        f"AdamW (0.9, {setting['beta2']:g}), weight decay {setting['weight_decay']:g}, gradients clipped at "
        f"{setting['clip']:g}, warm-up over {100 * setting['warmup']:g} % of the steps, then a cosine down to "
        f"{100 * setting['final_rate']:g} % of the peak."
    )
    rates = (
        "Rates: at least three per arm on seed 0; while the best is the smallest or the largest, its neighbour is "
        "tried too. The best rate is then used for every seed."
    )
    scaled = (
        "Scaled arms: projections into the residual stream start sqrt(2 L) times smaller, as in GPT-2. Without this, "
        "every sublayer of a deep PreNorm model starts by adding as much as the first; a gain over scaled PreNorm is "
        "not an effect of the initial weights. The streams of Hyper-Connections and mHC are four."
    )
    pairs = (
        "Arms of a seed share the initial weights of the host and the data of every step. Differences are arm minus "
        "baseline per seed, so that negative ones are gains; the interval is Student's t, 95 %. It treats seed 0 like "
        "the others, although the rates were chosen on it, those of the baselines too."
    )
    time = (
        "CPU time: median seconds of training steps per byte over all runs of an arm, relative to its baseline, with "
        f"{setting['num_threads']} thread. At equal CPU time: the loss of the arm in the middle of its own run, when "
        "its baseline is done. Its learning rate has not come down by then, so this is pessimistic for arms that cost "
        "more; a comparison with a longer baseline (other budgets) has no such bias. Other programs ran on the "
        "machine; arms that compute the same (scaled and unscaled) show how far the times can be trusted."
    )
    evaluation = f"Held-out loss: nats per byte on {setting['heldout_sequences']} sequences of other files."
    origin = (
        f"{len(results)} runs, Python {versions['python']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, commit {', '.join(commits)}."
    )
    points = (host, optimizer, scaled, rates, pairs, evaluation, time, origin)
    return ["## Protocol", "", *(f"- {point}" for point in points), ""]


def _of_group(group: Group, dynamics: Dynamics, *, with_others: bool) -> list[str]:
    lines = [
        f"## {group.title[0].upper()}{group.title[1:]}",
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
    if with_others and (depths := depth_table(group)):
        lines += [
            "### Other depths",
            "",
            "With the rates that are best at the depth in question where they were tried, else at the one above:",
            "",
            *depths,
            "",
        ]
    if with_others and (budgets := budget_table(group)):
        lines += [
            "### Other budgets",
            "",
            "With the rates that are best at the budget in question where they were tried, else at the one above. A",
            "fit of two parameters through few budgets says how losses fall between them, not beyond; the last column",
            "is interpolated, never extrapolated.",
            "",
            *budgets,
            "",
            "Equal CPU time: the loss of an arm minus that of its baseline, which is trained with so many times its",
            "bytes that both take the same CPU time (interpolated between the budgets of the baseline):",
            "",
            *equal_time_by_budget(group),
            "",
        ]
    if group.arms(is_continued=True):
        start = ARMS[CONTINUED].start
        assert start is not None
        lines += [
            "### Continued training of a trained model",
            "",
            f"The {ARMS[start].label} models above, one per seed, are trained for as many bytes again, with a new "
            "warm-up and the same order of data for all. Retrofitted models start as the model that they continue.",
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
            "useful sublayers are those that no affine map can replace; the causal score is the mean change of later",
            "layers when one is skipped; the entropy is relative to uniform weights ([metrics](report.md)).",
            "",
            *used,
            "",
            "The papers report outputs that grow with depth in PreNorm and stay bounded in Block AttnRes, with",
            "gradients that are spread more evenly:",
            "",
            *dynamics_sentences(group, dynamics),
            "",
        ]
    return lines


def _limits(results: Results) -> list[str]:
    steps = sorted({_num_steps(result) for result in results.values()})
    return [
        "## Limits",
        "",
        f"- Runs have {' to '.join(map(str, dict.fromkeys((steps[0], steps[-1]))))} steps: short runs show how fast a "
        "model starts to learn, not where it ends.",
        "- The papers' models have 194M to 48B parameters: the sign of a difference may carry over, not its size.",
        "- Few seeds: a difference that is not decided may still exist.",
        "- CPU time is that of these sizes, where small operations weigh more than in wide models.",
    ]


def _num_steps(result: Result) -> int:
    return -(-result.run.tokens // (result.setting["sequence_length"] * result.setting["batch_size"]))
