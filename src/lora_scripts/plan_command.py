"""`plan`: what a run will take, and what makes it fit, from its config alone and before any weight is read."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lora_scripts.errors import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the plan command."""
    parser.add_argument("config", type=Path, help="the run's settings")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of the config"
    )
    parser.add_argument(
        "--memory-gb", type=float, metavar="N", help="answer for another machine's graphics card of N x 10^9 bytes"
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="answer for each of N processes (docs/several-gpus.md)"
    )
    parser.add_argument("--json", action="store_true", help="write the plan as JSON (docs/memory.md)")


def run(arguments: argparse.Namespace) -> int:
    """Predicts and tells; the exit code: 0, or 2 when the run is predicted not to fit.

    Raises:
        LoraScriptsError: settings, data or base model cannot be used.
    """
    from lora_scripts.config_file import load_config

    if arguments.memory_gb is not None and not 0 < arguments.memory_gb < 10_000:
        raise ConfigError(f"--memory-gb {arguments.memory_gb:g}: write the card's memory in 10^9 bytes, such as 8.")
    if not 0 < arguments.processes < 10_000:
        raise ConfigError(
            f"--processes {arguments.processes}: write how many processes the run is started on, such as 2."
        )
    config, advice = load_config(arguments.config, arguments.set)
    for line in advice:
        print(line, file=sys.stderr)

    from lora_scripts.planning.forecast import make_forecast
    from lora_scripts.planning.forecast_text import forecast_json, forecast_lines

    forecast = make_forecast(config, arguments.memory_gb, lambda what, done, total: None, arguments.processes)
    if arguments.json:
        print(json.dumps(forecast_json(forecast), ensure_ascii=False, indent=1))
    else:
        print("\n".join(forecast_lines(forecast, config)))
    return 0 if forecast.fits else 2
