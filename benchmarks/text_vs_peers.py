"""Training of a language model beside TRL's SFTTrainer with PEFT, and beside unsloth: the loss curve and the speed.

    python benchmarks/text_vs_peers.py --trl-python PYTHON [--unsloth-python PYTHON] [--update-docs]

Both sides train the same random Llama on the same dialogues in the same order from the same first LoRA, each a process of its
own under an interpreter that has it installed. For the speed they take their steps in turns, one step each, so that what else
the machine does meets all alike; ratios are paired by step. Whatever is finished is kept under --out, so the same command again
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from style_vs_diffusers import keep_setup
from suite import DOCS, ROOT, STAND_INS  # which makes src importable
from suite.machine import processor
from suite.telling import update_docs
from text_materials import SIZES, make_materials

RATE = 1e-3
ROWS = 240
NAMES = {"ours": "ours", "trl": "TRL + PEFT", "unsloth": "unsloth"}


@dataclass(frozen=True)
class Side:
    """One way of training that takes part.

    Attributes:
        who: "ours", "trl" or "unsloth".
        dtype: "fp32" or "bf16".
        packing: of ours alone.
        checkpointing: of the peers; None for the peer's own default.
    """

    who: str
    dtype: str = "fp32"
    packing: bool = True
    checkpointing: bool | None = None

    @property
    def name(self) -> str:
        how = [self.dtype]
        if self.who == "ours":
            how.append("packed" if self.packing else "padded")
        elif self.checkpointing is None:
            how.append("its defaults")
        else:
            how.append("with checkpointing" if self.checkpointing else "without checkpointing")
        return f"{NAMES[self.who]}, {', '.join(how)}"


@dataclass(frozen=True)
class Order:
    """What is trained in which step.

    Attributes:
        rows: [step][place] the dialogues.
        trained: tokens that each step learns from.
        token_digest, trained_digest: of the ids of all rows in order, and of which of them are learnt.
    """

    rows: list[list[dict[str, str]]]
    trained: list[int]
    token_digest: str
    trained_digest: str


def main() -> None:
    options = parse_options()
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    setup = describe(options)
    keep_setup(out / "setup.json", setup)
    results: dict[str, Any] = {"curves": {}, "contests": {}}
    peers = [who for who, python in (("trl", options.trl_python), ("unsloth", options.unsloth_python)) if python]
    for size in options.size:
        make_materials(out / size, size, rows=ROWS, rank=options.rank, seed=options.seed)
        for peer in peers:
            make = partial(curve, size, peer, options)
            found = kept(out / size / f"curve-{peer}.json", make, options.only_told or options.no_curve)
            results["curves"] |= {f"{size} {peer}": found} if found else {}
        for name, sides in contests(peers).items():
            make, left_out = partial(contest, size, sides, options), options.contest and name not in options.contest
            found = kept(out / size / f"speed-{name}.json", make, bool(options.only_told or left_out))
            results["contests"] |= {f"{size} {name}": found} if found else {}
    text = tables(results, setup)
    (out / "results.md").write_text(text, "utf-8")
    print(f"\n{text}\n{out / 'results.md'}")
    if options.update_docs:
        update_docs(text, "text_vs_peers")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trl-python", help="interpreter that has trl and peft")
    parser.add_argument("--unsloth-python", help="interpreter that has unsloth")
    parser.add_argument("--size", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--contest", nargs="+", help="of the speed only these: ours, trl-fp32, trl-alike, ...")
    parser.add_argument("--no-curve", action="store_true", help="leave the losses out")
    parser.add_argument("--only-told", action="store_true", help="run nothing, tell what an earlier call has found")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--curve-steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each side")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them that are not timed")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "text_vs_peers")
    parser.add_argument("--update-docs", action="store_true", help=f"put the tables into {DOCS.relative_to(ROOT)}")
    options = parser.parse_args()
    if not options.trl_python and not options.unsloth_python:
        parser.error("nobody to compare with: --trl-python or --unsloth-python")
    return options


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that shapes the figures."""
    shaping = ("batch_size", "rank", "curve_steps", "warm_up", "seed", "threads", "device")
    return {
        **{name: getattr(options, name) for name in shaping},
        "rate": RATE,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "machine": f"{processor()}, {os.cpu_count()} cores",
    }


def contests(peers: Sequence[str]) -> dict[str, list[Side]]:
    """Who takes turns with whom; the order of the dialogues is that of the first."""
    found = {"ours": [Side("ours"), Side("ours", packing=False), Side("ours", dtype="bf16")]}
    for peer in peers:
        # The order of a padded run of ours puts dialogues of like length together, so that nobody pads much.
        found[f"{peer}-alike"] = [Side("ours", packing=False), Side(peer, checkpointing=False)]
        found[f"{peer}-fp32"] = [Side("ours"), Side(peer), Side(peer, checkpointing=False)]
        found[f"{peer}-bf16"] = [Side("ours", dtype="bf16"), Side(peer, dtype="bf16", checkpointing=False)]
    return found


def kept(file: Path, make: Callable[[], Any], only_told: bool) -> Any:
    """What the file holds, made first where it is missing; with `only_told` None then."""
    if not file.is_file() and not only_told:
        file.write_text(json.dumps(make(), indent=1) + "\n", "utf-8")
    return json.loads(file.read_text("utf-8")) if file.is_file() else None


# What is trained ------------------------------------------------------------------------------------------------------


@cache
def order_of(folder: Path, batch_size: int, seed: int, packed: bool, steps: int) -> Order:
    """The steps of a run of ours, which the peers are given in the same order."""
    import numpy as np
    from transformers import AutoTokenizer

    from lora_scripts.data.cache import EncodingCache
    from lora_scripts.data.sampler import StepPlan
    from lora_scripts.dialogues.batches import dialogue_batches
    from lora_scripts.dialogues.opening import open_dialogues
    from lora_scripts.dialogues.template import ChatTemplate
    from lora_scripts.dialogues.tokenise import tokenise
    from lora_scripts.going_on import older_digest, seed_of_draws

    opened = open_dialogues(folder / "data", exclude=[], system_prompt=None, repeats=1)
    tokens = tokenise(
        opened.train,
        ChatTemplate(AutoTokenizer.from_pretrained(folder / "model")),
        max_length=2048,
        train_on="assistant",
        cache=EncodingCache(folder / "cache"),
        progress=lambda *_: None,
    )
    examples = dialogue_batches(opened.train, tokens, packed=packed).examples
    assert len(examples) == ROWS, f"{len(examples)} of {ROWS} rows are left"
    plan = StepPlan.of(examples, batch_size, seed_of_draws(seed, older_digest(folder / "first_lora")))
    chosen = [[examples[use.index] for use in plan.step(number)] for number in range(steps)]
    ids, trained = hashlib.sha256(), hashlib.sha256()
    for example in (each for step in chosen for each in step):
        ids.update(json.dumps(example.tokens.tokens.tolist()).encode())
        trained.update(json.dumps(example.tokens.trained.astype(np.int64).tolist()).encode())
    return Order(
        [[{m.role: m.content for m in each.row.messages} for each in step] for step in chosen],
        [sum(each.tokens.num_trained for each in step) for step in chosen],
        ids.hexdigest(),
        trained.hexdigest(),
    )


# Running --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What one process is to train.

    Attributes:
        folder: the materials.
        work: the process's own folder.
        log_every: steps; None for the trainer's own default.
    """

    side: Side
    folder: Path
    work: Path
    order: Order
    steps: int
    log_every: int | None


class Runner:
    """One side at work in a process of its own, which stands still between its steps."""

    def __init__(
        self,
        side: Side,
        size: str,
        steps: int,
        options: argparse.Namespace,
        *,
        packed_order: bool,
        log_every: int | None = None,
    ) -> None:
        self.side = side
        self.facts: dict[str, Any] = {}
        self.losses: list[float] = []
        folder = options.out.resolve() / size
        self.work = folder / "work" / side.name.replace(" ", "_").replace(",", "")
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        order = order_of(folder, options.batch_size, options.seed, packed_order, steps)
        job = Job(side, folder, self.work, order, steps, log_every)
        command = our_command if side.who == "ours" else peer_command
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(options.threads),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.work / "home"),
            "TOKENIZERS_PARALLELISM": "false",
            "UNSLOTH_DISABLE_STATISTICS": "1",
        }
        self._log = self.work / "output.txt"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command(job, options),
                env=environment,
                cwd=self.work,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._wait()
        for what, digest in (("tokens", order.token_digest), ("trained", order.trained_digest)):
            if self.facts.get(what, digest) != digest:
                sys.exit(f"{side.name}: its {what} are not ours; see {self.work}")

    def step(self) -> dict[str, float]:
        """Takes one step: its `cpu_s` and `wall_s`, and the `peak_bytes` of the process up to here."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._wait()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _wait(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if "step" in told:
                return told  # type: ignore[no-any-return]
            self.losses += told.pop("losses", [])
            self.facts.update(told)
        end = self._log.read_text("utf-8", "replace")[-3000:]
        sys.exit(f"{self.side.name}: exit code {self._process.wait()}; the end of {self._log}:\n{end}")


def our_command(job: Job, options: argparse.Namespace) -> list[str]:
    import yaml

    settings = {
        "task_type": "text-generation",
        "train_data_dir": str(job.folder / "data"),
        "cache_dir": str(job.folder / "cache"),
        "base_model": str(job.folder / "model"),
        "device": options.device,
        "mixed_precision": job.side.dtype,
        "packing": job.side.packing,
        "lora_rank": options.rank,
        "init_lora_weights": str(job.folder / "first_lora"),
        "batch_size": options.batch_size,
        "max_steps": job.steps,
        "learning_rate": RATE,
        "lr_scheduler": "constant",
        "weight_decay": 0.0,
        "seed": options.seed,
        "validation_dialogues": 0,  # all dialogues train, as on the other side
        "output_dir": str(job.work / "run"),
        "save_steps": job.steps,
        "sample_every": 0,
    }
    if job.log_every:
        settings["log_steps"] = job.log_every
    config = job.work / "config.yaml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
    return [sys.executable, str(STAND_INS / "train_ours.py"), str(config)]


def peer_command(job: Job, options: argparse.Namespace) -> list[str]:
    rows = [
        {
            "prompt": [{"role": "user", "content": row["user"]}],
            "completion": [{"role": "assistant", "content": row["assistant"]}],
        }
        for step in job.order.rows
        for row in step
    ]
    (job.work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    arguments = {
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "bf16": job.side.dtype == "bf16",
        "seed": options.seed,
    }
    if job.log_every:
        arguments["logging_steps"] = job.log_every
    if job.side.checkpointing is not None:
        arguments["gradient_checkpointing"] = job.side.checkpointing
    said = {
        "unsloth": job.side.who == "unsloth",
        "unsloth_checkpointing": "unsloth" if job.side.checkpointing is None else job.side.checkpointing,
        "model": str(job.folder / "model"),
        "rows": str(job.work / "rows.jsonl"),
        "first_lora": str(job.folder / "first_lora"),
        "cache": str(job.work / "datasets"),
        "output": str(job.work / "run"),
        "rank": options.rank,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[job.side.dtype],
        "batch_size": options.batch_size,
        "steps": job.steps,
        "threads": options.threads,
        "device": options.device,
        "arguments": arguments,
    }
    (job.work / "job.json").write_text(json.dumps(said, indent=1) + "\n", "utf-8")
    python = {"trl": options.trl_python, "unsloth": options.unsloth_python}[job.side.who]
    return [python, str(STAND_INS / "train_trl.py"), str(job.work / "job.json")]


def curve(size: str, peer: str, options: argparse.Namespace) -> dict[str, Any]:
    """The losses of both sides, step by step, padded and in float32."""
    sides = [
        Side("ours", packing=False),
        Side(peer, checkpointing=False),
    ]  # which changes no loss, only the time it takes
    steps = options.curve_steps + 1  # because a step's loss is told while the next one goes on
    print(f"{size}: losses, {' and '.join(side.name for side in sides)} ...", flush=True)
    runners = [Runner(side, size, steps, options, packed_order=False, log_every=1) for side in sides]
    with ThreadPoolExecutor() as pool:
        for _ in range(steps):
            list(pool.map(Runner.step, runners))
    for runner in runners:
        runner.close()
        assert len(runner.losses) >= options.curve_steps, f"{runner.side.name}: {len(runner.losses)} losses"
    losses = {runner.side.who: runner.losses[: options.curve_steps] for runner in runners}
    return {"losses": losses, "facts": runners[1].facts}


def contest(size: str, sides: Sequence[Side], options: argparse.Namespace) -> list[dict[str, Any]]:
    """What every timed step cost each side."""
    steps = options.warm_up + options.rounds
    runners = []
    for side in sides:
        print(f"{size}: loading {side.name} ...", flush=True)
        runners.append(Runner(side, size, steps + 1, options, packed_order=sides[0].packing))
    costs: list[list[dict[str, float]]] = [[] for _ in sides]
    loads = []
    for number in range(steps):
        turn = number % len(sides)  # who goes first changes from round to round
        for place in [*range(turn, len(sides)), *range(turn)]:
            costs[place].append(runners[place].step())
        loads.append(os.getloadavg()[0])
        print(f"{size}: step {number + 1}: " + ", ".join(f"{cost[-1]['cpu_s']:.2f} s" for cost in costs), flush=True)
    found = []
    for runner, cost in zip(runners, costs, strict=True):
        packed = runner.side.packing if runner.side.who == "ours" else sides[0].packing
        order = order_of(options.out.resolve() / size, options.batch_size, options.seed, packed, steps + 1)
        found.append(
            {
                "side": asdict(runner.side) | {"name": runner.side.name},
                "facts": runner.facts,
                "cpu_s": [each["cpu_s"] for each in cost[options.warm_up :]],
                "wall_s": [each["wall_s"] for each in cost[options.warm_up :]],
                "trained": order.trained[options.warm_up : steps],
                "peak_bytes": cost[-1].get("peak_cuda_bytes") or cost[-1]["peak_bytes"],
                "clock": "cpu_s" if options.device == "cpu" else "wall_s",
                "load": statistics.median(loads[options.warm_up :]),
            }
        )
        runner.close()
    return found


# Telling --------------------------------------------------------------------------------------------------------------


def tables(results: Mapping[str, Any], setup: Mapping[str, Any]) -> str:
    """The figures as Markdown: the losses, the speed, and what they were taken with."""
    lines = []
    if results["curves"]:
        lines += ["| model | beside | loss of step 1: ours | theirs | of the last step: ours | theirs | most apart |"]
        lines += ["|---|---|---|---|---|---|---|"]
    for name, found in results["curves"].items():
        size, peer = name.split()
        ours, theirs = found["losses"]["ours"], found["losses"][peer]
        apart = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
        cells = [f"{value:.5f}" for value in (ours[0], theirs[0], ours[-1], theirs[-1])]
        lines.append(f"| {size} | {NAMES[peer]} | {' | '.join(cells)} | {100 * apart:.4f} % |")
    if results["contests"]:
        lines += [
            "",
            f"| model | A | B | trained tokens per {'CPU ' if setup['device'] == 'cpu' else ''}second: A | B | A / B, paired by step | steps | peak memory, MB: A | B |",
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
    versions: dict[str, dict[str, str]] = {}
    for name, sides in results["contests"].items():
        first, *others = sides
        for other in others:
            ratios = [a / b for a, b in zip(speeds(first), speeds(other), strict=True)]
            cells = [name.split()[0], first["side"]["name"], other["side"]["name"]]
            cells += [f"{sum(side['trained']) / sum(side[clock_of(side)]):.0f}" for side in (first, other)]
            cells += [f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", str(len(ratios))]
            cells += [f"{side['peak_bytes'] / 1e6:.0f}" for side in (first, other)]
            lines.append(f"| {' | '.join(cells)} |")
            versions |= {other["side"]["who"]: found} if (found := other["facts"].get("versions")) else {}
    loads = [side["load"] for sides in results["contests"].values() for side in sides]
    said = {"ours": setup["versions"], **versions}
    lines += [
        "",
        f"{setup['warm_up']} steps of each side before the timed ones, batch {setup['batch_size']}, rank "
        f"{setup['rank']}, rate {setup['rate']:g}, seed {setup['seed']}; curves over {setup['curve_steps']} steps. "
        f"{setup['machine']}, threads per process: {setup['threads']}"
        + (f", load of the machine {min(loads):.1f} to {max(loads):.1f}. " if loads else ". ")
        + " ".join(f"{who}: {', '.join(f'{n} {v}' for n, v in names.items())}." for who, names in said.items()),
    ]
    return "\n".join(lines) + "\n"


def speeds(side: Mapping[str, Any]) -> list[float]:
    """Trained tokens per second, step by step: on a CPU of the process's own time, else by the wall clock."""
    return [tokens / seconds for tokens, seconds in zip(side["trained"], side[clock_of(side)], strict=True)]


def clock_of(side: Mapping[str, Any]) -> str:
    return str(side.get("clock", "cpu_s"))


if __name__ == "__main__":
    main()
