"""How the study was carried out, and what it cannot show, in Markdown."""

from __future__ import annotations

from collections import Counter

from .arms import ARMS, SCALED
from .results import Result, Results


def protocol(results: Results) -> list[str]:
    """Return the section on the protocol.

    Args:
        results: all results, at least one.
    """
    some = next(iter(results.values()))
    setting, versions = some.setting, some.versions
    step = setting["sequence_length"] * setting["batch_size"]
    commits = Counter(_commit(result.versions["commit"]) for result in results.values())
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
        "tried too. The best rate is then used for every seed. Retrofits have the rate of their control, and the "
        "factor of their depth parameters is tried in the same way."
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
    cost = (
        f"CPU time: that of a training step with {setting['num_threads']} thread, measured for all arms in turn in "
        "one process (`python benchmarks/pretraining_costs.py`)."
    )
    equal_time = (
        "Equal CPU time: the baseline is trained with so many times the bytes that both take the same CPU time; its "
        "loss is interpolated between its budgets, per seed. Where its budgets do not cover that, the loss of the "
        "arm is that in the middle of its run (mid-run), when its learning rate has not come down yet. An arm that "
        "takes less time is compared at equal bytes."
    )
    evaluation = f"Held-out loss: nats per byte on {setting['heldout_sequences']} sequences of other files."
    origin = (
        f"{len(results)} runs, Python {versions['python']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, commits "
        f"{', '.join(f'{commit} ({number})' for commit, number in sorted(commits.items()))}."
    )
    points = (host, optimizer, scaled, rates, pairs, evaluation, cost, equal_time, origin)
    return ["## Protocol", "", *(f"- {point}" for point in points), ""]


def _commit(described: str) -> str:
    """Return a short hash, with a note if there were changes that are not committed."""
    commit, _, rest = described.partition(" ")
    return f"{commit[:12]} {rest}".rstrip()


def limits(results: Results) -> list[str]:
    """Return the section on what the study cannot show.

    Args:
        results: all results.
    """
    steps = sorted({_num_steps(result) for result in results.values()})
    return [
        "## Limits",
        "",
        f"- Runs have {' to '.join(map(str, dict.fromkeys((steps[0], steps[-1]))))} steps: short runs show how fast a "
        "model starts to learn, not where it ends.",
        "- The papers' models have 194M to 48B parameters: the sign of a difference may carry over, not its size.",
        "- Few seeds: a difference that is not decided may still exist. Intervals are not corrected for the number of "
        "comparisons: about one in twenty excludes zero by chance.",
        f"- Seeds beyond the third were added when the results of three were known, for all arms that are compared "
        f"with {ARMS[SCALED].label} in the setting with most arms.",
        "- Intervals are over seeds. The held-out sequences are the same for all arms, and few; rates were chosen on "
        "them too.",
        "- CPU time is that of these sizes, where small operations weigh more than in wide models.",
    ]


def _num_steps(result: Result) -> int:
    return -(-result.run.tokens // (result.setting["sequence_length"] * result.setting["batch_size"]))
