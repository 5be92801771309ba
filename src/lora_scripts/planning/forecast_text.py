"""A forecast as one screen of text, worst news first, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_scripts.planning.memory_plan import describe_split
from lora_scripts.preflight.wording import count, minutes

if TYPE_CHECKING:
    from lora_scripts.config import RunConfig
    from lora_scripts.planning.changes import Change
    from lora_scripts.planning.forecast import Forecast, Work

__all__ = ["forecast_json", "forecast_lines"]

JSON_FORMAT = 1


def forecast_lines(forecast: Forecast, config: RunConfig) -> list[str]:
    """Whether it fits, what would make it fit, what the memory is for, time and disk."""
    plan = forecast.plan
    return [
        _verdict(forecast),
        *_changes(forecast.changes),
        "",
        f"Memory, predicted for {describe_split(plan.micro_batch, plan.accumulation, plan.checkpointing)}:",
        *_table([(term.name, _amount(term.num_bytes), term.note) for term in forecast.terms]),
        *_table([("together", _amount(plan.num_bytes), f"of {_amount(plan.budget_bytes)} that may be used")]),
        "",
        *_pairs([*forecast.facts, *_work(forecast.work, config), ("disk", _disk(forecast))]),
    ]


def forecast_json(forecast: Forecast) -> dict[str, Any]:
    """The forecast as docs/memory.md describes it: plain JSON values, bytes and seconds."""
    plan, work, disk = forecast.plan, forecast.work, forecast.disk
    return {
        "format": JSON_FORMAT,
        "fits": forecast.fits,
        "memory": {
            "peak_bytes": plan.num_bytes,
            "usable_bytes": plan.budget_bytes,
            "device_bytes": forecast.device_bytes,
            "terms": {term.name: term.num_bytes for term in forecast.terms},
        },
        "batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_checkpointing": plan.checkpointing,
        "block_swap": forecast.block_swap,
        "changes": [dict(vars(change)) for change in forecast.changes],
        "work": {
            "steps": work.steps,
            "examples": work.examples,
            work.unit: work.cost,
            "flops": work.flops,
            "flops_per_s": work.flops_per_s,
            "seconds_at_least": work.seconds,
        },
        "disk": {"bytes": disk.num_bytes, "free_bytes": disk.free_bytes},
        "facts": dict(forecast.facts),
    }


def _verdict(forecast: Forecast) -> str:
    plan = forecast.plan
    numbers = f"{_amount(plan.num_bytes)} of {_amount(plan.budget_bytes)} usable"
    card = "" if forecast.device_bytes is None else f" on a card of {_amount(forecast.device_bytes)}"
    if forecast.disk.num_bytes > forecast.disk.free_bytes:
        return f"Does not fit on the disk: {_disk(forecast)}. Memory: {numbers}{card}."
    return f"Fits: {numbers}{card}." if forecast.fits else f"Does not fit: {numbers}{card}."


def _changes(changes: Sequence[Change]) -> list[str]:
    if not changes:
        return []
    head = (
        "The cheapest change that makes it fit"
        if len(changes) == 1
        else "The cheapest changes that make it fit, together"
    )
    head = head if changes[-1].fits else "Not even all of these make it fit"
    rows = [
        (each.setting, f"saves {_amount(each.saves)}, then {_amount(each.num_bytes)}", each.price) for each in changes
    ]
    return [f"{head}:", *_table(rows)]


def _work(work: Work, config: RunConfig) -> list[tuple[str, str]]:
    words = config.words
    seen = f"{work.examples:,} uses of {words.examples}, {work.cost:,} {work.unit}"
    rows = [("steps", f"{count(work.steps, 'step')} of {config.step_size}: {seen}")]
    if work.seconds is None or work.flops_per_s is None:
        return [*rows, ("time", f"not known for another machine; {work.flops:.2g} floating-point operations")]
    speed = f"{work.flops:.2g} floating-point operations at {work.flops_per_s:.2g} a second"
    return [*rows, ("time", f"{minutes(work.seconds)} at least ({speed}, measured in plain matrix products)")]


def _disk(forecast: Forecast) -> str:
    disk = forecast.disk
    return f"{_amount(disk.num_bytes)} for checkpoints and the finished file, {_amount(disk.free_bytes)} free"


def _amount(num_bytes: int) -> str:
    """`3.24 GB` or `654 MB`: parts shall be seen to add up."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.1f} MB"


def _pairs(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    first, second = max(14, *(len(row[0]) for row in rows)), max(len(row[1]) for row in rows)
    return [f"  {name:<{first}}  {number:>{max(second, 8)}}  {note}".rstrip() for name, number, note in rows]
