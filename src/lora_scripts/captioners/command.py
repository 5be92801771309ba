"""`lora-scripts label` and tools/auto_label.py: what can be asked for, and what is said about it on the terminal."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.captioners import CAPTIONERS
from lora_scripts.errors import ConfigError
from lora_scripts.processes import joined_processes

if TYPE_CHECKING:
    from lora_scripts.captioners.label import LabelOptions, LabelResult

__all__ = ["EXIT_INTERRUPTED", "EXIT_SOME_FAILED", "add_arguments", "run"]

EXIT_OK, EXIT_MISTAKE, EXIT_SOME_FAILED, EXIT_INTERRUPTED = 0, 2, 3, 130

NUM_EXAMPLES = 3
PLAIN_PROGRESS_S = 30.0
"""Without a terminal, a line about the progress comes this often."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the label command; only --input has to be given."""
    parser.description = (
        "Writes a caption for every picture that has none into a table with the columns filename,prompt. "
        "Captions that you wrote or changed are never replaced. Everything runs on this machine."
    )
    parser.epilog = (
        "exit codes: 0 all pictures have a caption; 2 a mistake in the command or its files; 3 some pictures could not be read; "
        "130 interrupted, everything so far is saved."
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input", type=Path, required=True, metavar="DIR", help="folder of pictures; subfolders count too"
    )
    files.add_argument(
        "--output", type=Path, metavar="CSV", help="the table (default: metadata.csv in the input folder)"
    )
    files.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="NAME",
        help="leave out pictures by name; * and ? work; repeatable",
    )
    files.add_argument(
        "--overwrite", action="store_true", help="write the machine's captions anew; yours stay all the same"
    )
    files.add_argument(
        "--spreadsheet-safe",
        action="store_true",
        help="for Excel: cells that begin with = + - @ get an apostrophe in front, and Chinese shows rightly",
    )

    models = parser.add_argument_group("models")
    models.add_argument(
        "--captioner",
        choices=tuple(CAPTIONERS),
        default="blip",
        help="blip: one caption by BLIP (default); clip-blip: five by BLIP, of which CLIP or BLIP's matching head chooses one",
    )
    models.add_argument(
        "--model",
        metavar="MODEL",
        help="BLIP folder, hub id or builtin:mini-blip (default: a full-size BLIP on this machine, else builtin:mini-blip)",
    )
    models.add_argument(
        "--rank-model",
        metavar="MODEL",
        help="for clip-blip: CLIP or BLIP matching model: folder, hub id or built-in name",
    )
    models.add_argument(
        "--download",
        action="store_true",
        help="fetch a hub model that is not on this machine; without this nothing is fetched",
    )
    models.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cuda, cuda:1, mps or cpu (default: auto)"
    )
    models.add_argument(
        "--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto", help="number format (default: auto)"
    )
    models.add_argument(
        "--batch-size", type=_positive, metavar="N", help="pictures at once (default: found by a short trial)"
    )
    models.add_argument(
        "--workers", type=_positive, metavar="N", help="threads that read pictures (default: one per processor)"
    )

    wording = parser.add_argument_group("how captions are written")
    wording.add_argument(
        "--decoding",
        choices=("greedy", "beam", "nucleus"),
        default="greedy",
        help="the likeliest words, beam search, or sampling (default: greedy)",
    )
    wording.add_argument(
        "--candidates",
        type=_positive,
        metavar="N",
        help="captions to choose from (default: 1 for blip, 5 for clip-blip)",
    )
    wording.add_argument(
        "--beams", type=_positive, default=3, metavar="N", help="width of the beam search (default: 3)"
    )
    wording.add_argument(
        "--top-p", type=_share, default=0.9, metavar="P", help="sampling: share of likely words kept (default: 0.9)"
    )
    wording.add_argument(
        "--prompt", default="", metavar="TEXT", help='words that every caption continues, such as "a portrait of"'
    )
    wording.add_argument("--min-tokens", type=_positive, default=5, metavar="N", help="shortest caption (default: 5)")
    wording.add_argument("--max-tokens", type=_positive, default=40, metavar="N", help="longest caption (default: 40)")
    wording.add_argument("--seed", type=int, default=42, metavar="N", help="another seed, other samples (default: 42)")

    rules = parser.add_argument_group("rules that make a prompt of a caption")
    rules.add_argument("--rules", type=Path, metavar="YAML", help="file with rules, see configs/captioner_rules.yaml")
    rules.add_argument("--trigger", metavar="WORD", help="the word that will call your style or subject; comes first")
    rules.add_argument("--prefix", metavar="TEXT", help="put before every caption, behind the trigger")
    rules.add_argument("--suffix", metavar="TEXT", help="put behind every caption")
    rules.add_argument("--ban", action="append", metavar="WORDS", help="take these words out; repeatable")
    rules.add_argument("--replace", action="append", type=_pair, metavar="OLD=NEW", help="replace words; repeatable")
    rules.add_argument("--keep-openers", action="store_true", help='keep "a picture of", "there is" and the like')
    rules.add_argument(
        "--rules-only",
        action="store_true",
        help="apply the rules to the machine's captions that are there, without a model",
    )

    looking = parser.add_argument_group("looking without writing")
    looking.add_argument(
        "--dry-run", action="store_true", help="show what the rules make of the captions there are and of five new ones"
    )
    looking.add_argument("--review", type=_positive, metavar="N", help="show the N most doubtful captions and why")


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for; the exit code."""
    options = make_options(args)
    from lora_scripts.captioners import label as engine

    listener = _Terminal()
    if args.review is not None:
        return _show_review(listener, options, engine.doubtful(options, listener, args.review))
    if args.rules_only or args.dry_run:
        changes = engine.reapply_rules(options, listener, dry_run=args.dry_run)
        _show_changes(listener, changes, dry_run=args.dry_run)
        if args.dry_run and not args.rules_only:
            waiting, shown = engine.preview(options, listener.silent())
            _show_preview(listener, waiting, shown)
        return EXIT_OK
    with joined_processes(options.device) as processes:
        if not processes.is_first:
            engine.label(options, _Silent(), processes)
            return EXIT_OK
        try:
            result = engine.label(options, listener, processes)
        finally:
            listener.close()
    return _show_result(listener, options, result)


def make_options(args: argparse.Namespace) -> LabelOptions:
    """The engine's options from parsed arguments.

    Raises:
        ConfigError: options that contradict each other or would have no effect.
    """
    from lora_scripts.captioners.label import LabelOptions
    from lora_scripts.captioners.protocol import CaptionerSettings
    from lora_scripts.captioners.rules import load_rules

    faults = []
    if args.rank_model and args.captioner != "clip-blip":
        faults.append("--rank-model has no effect with --captioner blip. Add --captioner clip-blip.")
    if args.download and not (args.model or args.rank_model):
        faults.append("--download has no effect without the hub id of a model. Add --model or --rank-model.")
    if args.rules_only and args.overwrite:
        faults.append(
            "--rules-only and --overwrite exclude each other: the one keeps the model's words, the other replaces them."
        )
    if args.min_tokens > args.max_tokens:
        faults.append(f"--min-tokens {args.min_tokens} is above --max-tokens {args.max_tokens}.")
    if args.captioner == "clip-blip" and args.candidates == 1:
        faults.append("--candidates 1 leaves clip-blip nothing to choose from. Take 2 or more, or --captioner blip.")
    if faults:
        raise ConfigError(faults)
    rules = load_rules(
        args.rules,
        {
            "trigger": args.trigger,
            "prefix": args.prefix,
            "suffix": args.suffix,
            "ban": args.ban,
            "replace": dict(args.replace) if args.replace else None,
            "strip_openers": False if args.keep_openers else None,
        },
    )
    settings = CaptionerSettings(
        num_candidates=args.candidates,
        decoding=args.decoding,
        num_beams=args.beams,
        top_p=args.top_p,
        prompt=args.prompt,
        min_tokens=args.min_tokens,
        max_tokens=args.max_tokens,
        seed=args.seed,
        rank_model=args.rank_model,
        download=args.download,
    )
    return LabelOptions(
        folder=args.input,
        output=args.output or args.input / "metadata.csv",
        captioner=args.captioner,
        model=args.model,
        settings=settings,
        rules=rules,
        device=args.device,
        precision=args.precision,
        batch_size=args.batch_size,
        num_workers=args.workers,
        overwrite=args.overwrite,
        exclude=tuple(args.exclude),
        spreadsheet_safe=args.spreadsheet_safe,
    )


class _Silent:
    """Of a process that leaves the telling to the first one."""

    def note(self, text: str) -> None: ...
    def start(self, total: int) -> None: ...
    def advance(self, count: int) -> None: ...


class _Terminal:
    """Lines and a progress bar; without a terminal, lines alone."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, soft_wrap=True)
        self._progress: Any = None
        self._task: Any = None
        self._total = self._done = 0
        self._began = self._told = time.monotonic()
        self._quiet = False

    def silent(self) -> _Terminal:
        """The same terminal without remarks that were made already."""
        self._quiet = True
        return self

    def say(self, text: str = "", style: str | None = None) -> None:
        # No markup: names of pictures may hold brackets.
        self.console.print(text, style=style, markup=False, emoji=False)

    def note(self, text: str) -> None:
        if not self._quiet:
            self.say(text)

    def start(self, total: int) -> None:
        self._total, self._done = total, 0
        self._began = self._told = time.monotonic()
        if not self.console.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
            transient=True,
        )
        self._task = self._progress.add_task("Captions", total=total, rate="")
        self._progress.start()

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        rate = self._done / max(now - self._began, 1e-6)
        if self._progress is not None:
            self._progress.update(self._task, advance=count, rate=f"{rate:.1f} images/s")
        elif now - self._told >= PLAIN_PROGRESS_S and self._total:
            self._told = now
            left = (self._total - self._done) / rate
            self.say(f"{self._done} of {self._total} pictures, {rate:.1f} images/s, {_duration(left)} left")
            sys.stdout.flush()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _show_result(terminal: _Terminal, options: LabelOptions, result: LabelResult) -> int:
    say = terminal.say
    terminal_parts = []
    if result.num_written:
        rate = result.num_written / max(result.seconds, 1e-6)
        copies = f", {result.num_copies} of them copies of other pictures" if result.num_copies else ""
        terminal_parts.append(
            f"{_count(result.num_written, 'caption')} written in {_duration(result.seconds)} ({rate:.1f} images/s){copies}"
        )
    if result.num_kept:
        human = f" ({result.num_human} written or changed by you)" if result.num_human else ""
        terminal_parts.append(f"{result.num_kept} kept{human}")
    say()
    if terminal_parts:
        say(", ".join(terminal_parts) + ".")
        if result.num_written:
            _show_examples(terminal, options)
        say(f"Table:   {options.output}")
    if result.num_written:
        say(f"Scores:  {options.output.with_name(options.output.stem + '.labels.jsonl')}")
    if result.failures:
        say()
        say(f"{_count(len(result.failures), 'picture')} without a caption:", style="bold")
        for failure in result.failures:
            say(f"  {failure.name}: {failure.reason}")
    if result.interrupted:
        left = result.num_pictures - result.num_kept - result.num_written - len(result.failures)
        say()
        say(f"Stopped. Everything above is saved; the same command goes on with the other {left}.", style="bold")
        return EXIT_INTERRUPTED
    if result.num_written:
        say()
        say(f"See the most doubtful ones first: {_this_command(options)} --review {min(20, result.num_written)}")
    if not result.failures:
        return EXIT_OK
    return EXIT_SOME_FAILED if result.num_written or result.num_kept else EXIT_MISTAKE


def _show_examples(terminal: _Terminal, options: LabelOptions) -> None:
    from lora_scripts.captioners.side_file import SideFile

    newest = list(SideFile.beside(options.output).records.values())[-NUM_EXAMPLES:]
    for record in newest:
        terminal.say(f"  {record.filename}: {record.text}")


def _show_changes(terminal: _Terminal, changes: Sequence[tuple[str, str, str]], *, dry_run: bool) -> None:
    for name, before, after in changes:
        terminal.say(name)
        terminal.say(f"  - {before}", style="red")
        terminal.say(f"  + {after}", style="green")
    verb = "would change" if dry_run else "changed"
    terminal.say(f"{_count(len(changes), 'caption')} {verb} by the rules.")


def _show_preview(terminal: _Terminal, waiting: int, shown: Sequence[tuple[str, str, str]]) -> None:
    if not waiting:
        terminal.say("Every picture has a caption already.")
        return
    terminal.say(
        f"\n{_count(waiting, 'picture')} would get a caption. The first ones, as the model words them and as the rules leave them:"
    )
    for name, words, prompt in shown:
        terminal.say(name)
        if words != prompt:
            terminal.say(f"  - {words}", style="red")
        terminal.say(f"  + {prompt}", style="green")
    terminal.say("\nNothing was written. Leave out --dry-run to write.")


def _show_review(terminal: _Terminal, options: LabelOptions, rows: Sequence[Any]) -> int:
    if not rows:
        terminal.say(f"{options.output}: no captions by the machine to look at.")
        return EXIT_OK
    for record, text in rows:
        terminal.say(record.filename, style="bold")
        terminal.say(f"  {text}")
        if record.runner_up:
            terminal.say(f"  second best: {record.runner_up}", style="dim")
        why = f": {', '.join(record.reasons)}" if record.reasons else ""
        terminal.say(f"  doubt {record.doubt:.2f}{why}", style="yellow")
    terminal.say(f"\nChange them in {options.output}: what you change is never replaced.")
    return EXIT_OK


def _this_command(options: LabelOptions) -> str:
    called_as_script = Path(sys.argv[0]).name == "auto_label.py"
    parts = ["python", sys.argv[0]] if called_as_script else ["lora-scripts", "label"]
    parts += ["--input", str(options.folder)]
    if options.output != options.folder / "metadata.csv":
        parts += ["--output", str(options.output)]
    return shlex.join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return value


def _pair(text: str) -> tuple[str, str]:
    old, sign, new = text.partition("=")
    if not sign or not old.strip():
        raise argparse.ArgumentTypeError(f"{text!r} should be OLD=NEW, such as sumi-e='ink wash'")
    return old.strip(), new.strip()
