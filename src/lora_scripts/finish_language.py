"""The files that a run on a language model leaves: the LoRA of each saved step, and at the end the finished folder, proved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_scripts.base_loras import named
from lora_scripts.dialogues.template import ChatTemplate
from lora_scripts.errors import ExportError
from lora_scripts.export.bake import Baked, bake
from lora_scripts.export.card import adapter_card
from lora_scripts.export.language_base import base_title
from lora_scripts.export.names import LANGUAGE_MODEL, layer_shapes
from lora_scripts.export.peft_folder import write_peft_folder
from lora_scripts.export.prompt import prompt_facts
from lora_scripts.export.verify_peft import verify_folder, verify_folder_effect
from lora_scripts.finish import DTYPES, EFFECT_TOLERANCE
from lora_scripts.training.draws import Draws
from lora_scripts.training.optimizers import evaluation_weights

if TYPE_CHECKING:
    from lora_scripts.adapters.weights import LoRATensors
    from lora_scripts.tasks.protocol import Run

__all__ = ["FinishLanguage"]


class FinishLanguage:
    """Writes PEFT folders of one run."""

    def __init__(self, run: Run) -> None:
        self._run, self._config = run, run.config
        self.proofs: list[str] = []
        self._linear_layers = layer_shapes({LANGUAGE_MODEL: run.family.model})  # by their names without the adapter

    def write_step(self, folder: Path, step: int) -> None:
        """Writes `NAME-STEP/`, without the tokenizer, which is the base model's."""
        weights, _ = self._plain_weights()
        write_peft_folder(
            folder / f"{self._config.name}-{step}",
            weights,
            self._config.base_model,
            DTYPES[self._config.save_precision],
            model_layers=self._linear_layers,
        )

    def export(self, step: int) -> list[Path]:
        """The folder `NAME` of the model as it is, with tokenizer, chat template and card, read back and compared."""
        config, run = self._config, self._run
        family = run.family
        folder = config.output_dir / config.name
        with evaluation_weights(run.optimizer), run.adapter.strength(1.0):
            weights, baked = self._plain_weights()
            trained_output = self._probe()
        template = ChatTemplate(family.tokenizer)
        if not template.is_own:  # else nothing beside the LoRA would say how its dialogues were written
            family.tokenizer.chat_template = template.source
        prompt = prompt_facts(family.tokenizer, run.source.path)
        notes = f"Trained for {step} steps on {len(run.prepared.parts.train.examples):,} dialogues."
        if config.objective != "sft":
            notes += f" Of two answers each, by {config.objective.upper()} with beta {config.preference_beta:g}."
        if config.quantization != "none":
            notes += (
                f" The base was held in {config.quantization} meanwhile (bitsandbytes); the adapter fits it in full "
                "precision as well."
            )
        if run.beneath:
            notes += f" Trained on top of other LoRAs, to be used together with them: {named(run.beneath)}."
        if config.system_prompt:
            notes += f" System prompt: {config.system_prompt}"
        write_peft_folder(
            folder,
            weights,
            config.base_model,
            DTYPES[config.save_precision],
            tokenizer=family.tokenizer,
            card=adapter_card(
                config.name,
                base_title(run.source.name, run.source.path),
                baked.rank,
                prompt=prompt.rendered,
                notes=notes,
            ),
            model_layers=self._linear_layers,
            replace=True,
        )
        try:
            read_back = verify_folder(folder, weights)
            run.adapter.detach()
            effect = verify_folder_effect(
                folder,
                family.model,
                self._probe,
                trained_output,
                tolerance=EFFECT_TOLERANCE + 3 * baked.error,
                compute_dtype=family.model.dtype,
            )
        except ExportError:
            failed = folder.with_name(f"{folder.name}.failed")  # nobody shall take it for the finished one
            shutil.rmtree(failed, ignore_errors=True)
            folder.replace(failed)
            raise
        how = [] if baked.exact and not baked.folded and not baked.kind else [f"{folder.name}: {baked}"]
        self.proofs = [*how, str(read_back), str(effect)]
        for line in self.proofs:
            run.events.note(line)
        return [folder, *sorted(path for path in folder.iterdir() if path.is_file())]

    def _plain_weights(self) -> tuple[dict[str, LoRATensors], Baked]:
        """What every reader of a PEFT folder understands, whatever was trained."""
        return bake(self._run.adapter.weights(), self._run.adapter.base_weight)

    @torch.no_grad()
    def _probe(self) -> torch.Tensor:
        """[N,V] the model's scores for the learnt tokens of the first example."""
        run = self._run
        batch = run.prepared.parts.train.batch(run.plan.step(0)[:1], run.device)
        output: torch.Tensor = run.family.predict(batch, Draws(self._config.seed))
        return output
