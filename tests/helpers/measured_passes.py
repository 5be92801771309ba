"""Started by torch's launcher: a run in which every process writes down which passes it makes to measure the validation loss.

Arguments: file with the settings, folder for the results.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any


def main(settings: dict[str, Any], out: Path) -> None:
    from helpers.seen import Seen
    from lora_scripts.config import RunConfig
    from lora_scripts.families import family_class
    from lora_scripts.pipeline import run
    from lora_scripts.processes import joined_processes
    from lora_scripts.training.events import Events

    family: Any = family_class("causal_lm" if settings.get("task_type") == "text-generation" else "sd15")
    plain_loss, passes, seen = family.loss, [], Seen()

    def loss(self: Any, batch: Any, draws: Any) -> Any:
        if batch.levels is not None:  # which only measurements prescribe
            passes.append(list(batch.keys))
        return plain_loss(self, batch, draws)

    family.loss = loss
    with joined_processes("cpu") as processes:
        run(RunConfig.model_validate(settings), Events([seen]), processes=processes)
        result = {"passes": passes, "validations": [asdict(each) for each in seen.validations]}
        (out / f"measured-{processes.index}.json").write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2]))
