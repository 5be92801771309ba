"""Speed, memory and time to the first step beside other trainers: one command for each suite.

    python benchmarks/run.py cpu|gpu|label|scale [--peers PATH ...]
    python benchmarks/run.py gpu --budget-gb 8 16

PATH is a checkout of huggingface/diffusers or kohya-ss/sd-scripts, or `PATH=PYTHON` where another interpreter has what that
project needs. All sides work in processes of their own and take turns, one step each, on the same pictures with the same noise.
Models are full-size with random weights, made on the spot; `--tiny` takes small ones through the same code. A table is printed;
everything measured is kept as JSON under --out, so suites can be run contest by contest.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from suite import DOCS, ROOT
from suite.telling import keep, kept, update_docs

SUITES = ("cpu", "gpu", "label", "scale")


def main() -> None:
    options = parse_options()
    out: Path = options.out.resolve()
    file = out / f"{options.suite}{'-tiny' if options.tiny else ''}.json"
    found = kept(file)

    def keep_one(name: str, result: Mapping[str, Any]) -> None:
        found[name] = result
        keep(file, found)

    text = {"cpu": pictures, "gpu": gpu, "label": label, "scale": scale}[options.suite](options, found, keep_one)
    print(f"\n{text}\n{file}")
    if options.update_docs:
        update_docs(text, f"run_{options.suite}")


def parse_options() -> argparse.Namespace:
    from suite.trainers import find_peer

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--peers", nargs="+", default=[], metavar="PATH[=PYTHON]", help="checkouts of other projects")
    parser.add_argument("--contest", nargs="+", help="only these; the others are told as an earlier call found them")
    parser.add_argument("--only-told", action="store_true", help="run nothing")
    parser.add_argument("--steps", type=int, default=6, help="timed steps, or turns, of each side")
    parser.add_argument(
        "--starts", type=int, default=1, help="starts with caches whose time to the first step is taken"
    )
    parser.add_argument("--pictures", type=int, help="of label: how many in each turn (64)")
    parser.add_argument("--candidates", type=int, default=1, help="of label: captions per picture")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of each process")
    parser.add_argument("--device", default="cuda", help="of gpu")
    parser.add_argument(
        "--budget-gb",
        type=float,
        nargs="+",
        metavar="N",
        help="of gpu: only runs of ours within so much memory, 10^9 bytes",
    )
    parser.add_argument("--tiny", action="store_true", help="small models through the same code")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "benchmarks")
    parser.add_argument("--update-docs", action="store_true", help=f"put the table into {DOCS.relative_to(ROOT)}")
    options = parser.parse_args()
    if options.steps < 1 or options.starts < 1:
        parser.error("--steps, --starts: at least 1")
    if options.budget_gb and (options.suite != "gpu" or min(options.budget_gb) <= 0):
        parser.error("--budget-gb: above 0, and of the suite gpu")
    if options.tiny and options.update_docs:
        parser.error("--update-docs: the page holds no figures of small models, leave --tiny out")
    try:
        options.peers = {peer.kind: peer for peer in map(find_peer, options.peers)}
    except ValueError as error:
        parser.error(str(error))
    return options


def wanted(options: argparse.Namespace, names: list[str]) -> list[str]:
    """The contests that are to be run now."""
    unknown = [name for name in options.contest or [] if name not in names]
    if unknown:
        raise SystemExit(f"--contest {' '.join(unknown)}: there is {', '.join(names)}")
    return [] if options.only_told else [name for name in names if name in (options.contest or names)]


def hold_all(
    options: argparse.Namespace, contests: Mapping[str, Any], device: str, keep_one: Any, hold: Callable[[Any], Any]
) -> str:
    """Holds the contests that are wanted and keeps each result at once; why one that has none has none."""
    if device.startswith("cuda") and not has_gpu():
        return "no GPU"
    for name in wanted(options, list(contests)):
        print(f"{name}: {contests[name].title}", flush=True)
        keep_one(name, hold(contests[name]))
    return "not run"


def pictures(options: argparse.Namespace, found: dict[str, Any], keep_one: Any, device: str = "cpu") -> str:
    from suite.pictures import cpu_contests, gpu_contests, hold, tell

    contests = cpu_contests(options.tiny) if options.suite == "cpu" else gpu_contests(device, options.tiny)
    place = options.out.resolve() / "work"
    reason = hold_all(options, contests, device, keep_one, lambda each: hold(each, options.peers, place, options))
    return tell(contests, found, reason)


def gpu(options: argparse.Namespace, found: dict[str, Any], keep_one: Any) -> str:
    """Training and captions on one GPU, and training within budgets of its memory."""
    from suite.budgets import is_budget
    from suite.captions import is_label_contest

    chosen, only_told = options.contest, options.only_told
    parts = []
    for part, is_part in (
        (pictures, lambda name: not is_label_contest(name) and not is_budget(name)),
        (label, is_label_contest),
        (budgets, is_budget),
    ):
        options.contest = [name for name in chosen if is_part(name)] if chosen else None
        # Budgets are asked for by themselves; the rest is then told as an earlier call has found it.
        options.only_told = only_told or (part is budgets) != bool(options.budget_gb)
        if chosen is None or options.contest:
            parts.append(part(options, found, keep_one, options.device))
    return "\n".join(parts)


def budgets(options: argparse.Namespace, found: dict[str, Any], keep_one: Any, device: str) -> str:
    from suite.budgets import BUDGETS_GB, budget_contests, hold, tell

    contests = budget_contests(device, options.tiny, options.budget_gb or BUDGETS_GB)
    place = options.out.resolve() / "work"
    reason = hold_all(options, contests, device, keep_one, lambda each: hold(each, place, options))
    return tell(contests, found, reason)


def label(options: argparse.Namespace, found: dict[str, Any], keep_one: Any, device: str = "cpu") -> str:
    from suite.captions import caption_contests, hold, tell

    contests = caption_contests(device, options.tiny)
    place = options.out.resolve() / "work"
    reason = hold_all(options, contests, device, keep_one, lambda each: hold(each, place, options))
    return tell(contests, found, reason)


def scale(options: argparse.Namespace, found: dict[str, Any], keep_one: Any) -> str:
    from suite.scale import measure, tell

    for name in wanted(options, ["processes"]):
        keep_one(name, measure(options.out.resolve() / "work" / "scale", options))
    return tell(found)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
