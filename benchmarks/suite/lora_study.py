"""What `combine_and_continue.py` compares, and how its figures are told."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from suite.telling import percent

NAME, SUBJECT, COLOUR = "momo", "elephant", "purple"
WEIGHT = 0.7
SCRATCH_STEPS, SHORT_STEPS = 320, 192
"""Of the runs that are compared; the one that goes on gets 60 % of the steps."""
CONDITIONS: Mapping[str, tuple[float, float]] = {
    "base model": (0, 0),
    "style alone, at 1": (1, 0),
    "character alone, at 1": (0, 1),
    "style alone, at 0.7": (WEIGHT, 0),
    "character alone, at 0.7": (0, WEIGHT),
    "both, at 0.7 each": (WEIGHT, WEIGHT),
}
"""Title to the weights of the style's and the character's LoRA."""
Reading = dict[str, list[float]]
"""Per prompt the probability of the style, and the share of the prompted attributes that were read as prompted."""


def difference(values: Sequence[float], goal: Sequence[float]) -> tuple[float, float]:
    """The mean of the paired differences, and its standard error."""
    changes = [a - b for a, b in zip(values, goal, strict=True)]
    return statistics.fmean(changes), statistics.stdev(changes) / math.sqrt(len(changes))


def reached(curve: Mapping[str, Reading], goal: Sequence[float]) -> int | None:
    """The first saved step from which on the style is never below the goal by more than the standard error.

    The difference is paired, prompt by prompt. None: the last step is below.
    """
    first = None
    for step, reading in sorted(curve.items(), key=lambda item: int(item[0])):
        mean, error = difference(reading["style"], goal)
        if mean < -error:
            first = None
        elif first is None:
            first = int(step)
    return first


def tables(
    setup: Mapping[str, Any],
    combined: Mapping[tuple[str, int], Mapping[str, Mapping[str, float]]],
    continued: Mapping[int, Mapping[str, Mapping[str, Reading]]],
) -> str:
    """The figures as Markdown."""
    lines = [*combined_tables(combined), *continued_table(setup, continued)]
    lines += [f"{setup['machine']}, {', '.join(f'{name} {number}' for name, number in setup['versions'].items())}."]
    return "\n".join(lines) + "\n"


def combined_tables(combined: Mapping[tuple[str, int], Mapping[str, Mapping[str, float]]]) -> list[str]:
    """One row per set of LoRAs at work as means over the pairs, then one row per pair."""
    if not combined:
        return []
    columns = ("style", "style probability", "subject", "character", "both")
    lines = [
        f"| LoRAs at work | read as the style | probability of the style | subject read as {SUBJECT} | {COLOUR} {SUBJECT} | both in one picture |",
        "|---|---|---|---|---|---|",
    ]
    for title in CONDITIONS:
        means = [statistics.fmean(each[title][what] for each in combined.values()) for what in columns]
        lines.append(f"| {title} | {' | '.join(percent(mean) for mean in means)} |")
    lines += [
        "",
        f"Means over {len(combined)} pairs of LoRAs, 32 prompts each: `STYLE, {NAME}` in every place at every time of day. Pair by pair, at {WEIGHT} each:",
        "",
        f"| style | seed | read as the style | subject read as {SUBJECT} | {COLOUR} {SUBJECT} | both in one picture | style alone, at {WEIGHT}: read as the style | character alone, at {WEIGHT}: {COLOUR} {SUBJECT} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (style, seed), results in combined.items():
        cells = [percent(results["both, at 0.7 each"][what]) for what in ("style", "subject", "character", "both")]
        cells.append(percent(results["style alone, at 0.7"]["style"]))
        cells.append(percent(results["character alone, at 0.7"]["character"]))
        lines.append(f"| {style} | {seed} | {' | '.join(cells)} |")
    return [*lines, ""]


TITLES = {
    "older": "older LoRA as it is",
    "short": f"from scratch, {SHORT_STEPS} steps",
    "continued": f"continued, {SHORT_STEPS} steps",
    "gently": f"continued at half the rate, {SHORT_STEPS} steps",
}
"""Of what is held against the run from scratch."""


def continued_table(
    setup: Mapping[str, Any], continued: Mapping[int, Mapping[str, Mapping[str, Reading]]]
) -> list[str]:
    """Scores by seed, then differences to the run from scratch by seed and over all seeds."""
    if not continued:
        return []
    scores = {"scratch": f"from scratch, {SCRATCH_STEPS} steps", **TITLES}
    ends = {seed: {name: curve[max(curve, key=int)] for name, curve in c.items()} for seed, c in continued.items()}

    def table(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
        lines = [f"| seed | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
        return [*lines, *(f"| {seed} | {' | '.join(cells)} |" for seed, cells in rows.items()), ""]

    def mean(reading: Reading, what: str) -> str:
        return percent(statistics.fmean(reading[what]))

    lines = table(
        list(scores.values()),
        {str(seed): [mean(end[name], "style") for name in scores] for seed, end in ends.items()},
    )
    lines += [
        f"Probability of {setup['style']} over {setup['prompts']} prompts that were not trained. Less the run from scratch of {SCRATCH_STEPS} "
        "steps, in points, with the standard error of the paired difference; and the step from which on it is never below by more than that:",
        "",
    ]
    rows: dict[str, list[str]] = {}
    for seed, curves in continued.items():
        goal = ends[seed]["scratch"]["style"]
        rows[str(seed)] = []
        for name in TITLES:
            change, error = difference(ends[seed][name]["style"], goal)
            first = reached(curves[name], goal)
            told = "not reached" if first is None else f"reached at {first} ({first / SCRATCH_STEPS:.0%})"
            if name == "older" and first is not None:
                told = "reached before the first step"
            rows[str(seed)].append(f"{100 * change:+.1f} ± {100 * error:.1f}, {told}")
    rows["**all**"] = []
    for name in TITLES:
        changes = [difference(end[name]["style"], end["scratch"]["style"])[0] for end in ends.values()]
        held = sum(reached(c[name], ends[seed]["scratch"]["style"]) is not None for seed, c in continued.items())
        rows["**all**"].append(f"{over_seeds(changes)}, reached in {held} of {len(continued)}")
    lines += table(list(TITLES.values()), rows)
    lines += ["Prompted attributes (subject, colour, place, time, count) read right:", ""]
    lines += table(
        list(scores.values()),
        {str(seed): [mean(end[name], "attributes") for name in scores] for seed, end in ends.items()},
    )
    return lines


def over_seeds(changes: Sequence[float]) -> str:
    """The mean in points, with the standard error over the seeds."""
    mean = f"{100 * statistics.fmean(changes):+.1f}"
    if len(changes) < 2:
        return mean
    return f"{mean} ± {100 * statistics.stdev(changes) / math.sqrt(len(changes)):.1f}"
