"""The files that a run leaves: the LoRA of each saved step, and at the end the finished one with its card, proved."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_scripts.adapter_rules import writes_own_kind
from lora_scripts.adapters.weights import LayerChanges, require_plain
from lora_scripts.config import Size
from lora_scripts.errors import ExportError
from lora_scripts.export.bake import Baked, bake_kinds
from lora_scripts.export.metadata import RunFacts, file_metadata
from lora_scripts.export.network_args import network_args, network_module
from lora_scripts.export.objective_texts import objective_texts
from lora_scripts.export.sidecar import write_preview, write_sidecar
from lora_scripts.export.verify import verify_effect, verify_file
from lora_scripts.export.verify_own import verify_own_effect, verify_own_file
from lora_scripts.export.writer import write_lora
from lora_scripts.training.draws import Draws
from lora_scripts.training.lr_schedules import resolve_warmup
from lora_scripts.training.optimizers import evaluation_weights

if TYPE_CHECKING:
    from lora_scripts.data.dataset import Example
    from lora_scripts.previews import Previews
    from lora_scripts.tasks.protocol import Run

__all__ = ["Finish"]

EFFECT_TOLERANCE = 0.02
"""Allowed difference of the file's effect, as a share of it. What is left out of a baked DoRA may weigh more in the output
than in the weights, so three times its share comes on top."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Finish:
    """Writes LoRA files of one run; holds what their headers say."""

    def __init__(self, run: Run, resolution: Size, previews: Previews) -> None:
        self._run, self._config, self._family = run, run.config, run.family
        self._adapter, self._plan = run.adapter, run.plan
        self._data = run.prepared.parts.train
        self._resolution, self._previews = resolution, previews
        self._own_kind = writes_own_kind(run.config)
        self.proofs: list[str] = []
        """Lines that say what was compared, after `export`."""

    def write_step(self, folder: Path, step: int) -> None:
        """Writes `NAME-STEP.safetensors` into a checkpoint's folder."""
        name = f"{self._config.name}-{step}"
        weights, _ = self._weights()
        metadata = file_metadata(self._facts(name, step, weights), self._config.metadata_level)
        dtype, names = DTYPES[self._config.save_precision], self._family.file_names()
        write_lora(folder / f"{name}.safetensors", weights, metadata, dtype, names, own_kind=self._own_kind)

    def _weights(self) -> tuple[LayerChanges, Baked]:
        """What files hold, and what was lost for it."""
        weights = self._adapter.weights()
        if self._own_kind:
            return weights, Baked(max(change.rank for change in weights.values()), len(weights))
        return bake_kinds(weights, self._adapter.base_weight)

    def export(self, step: int) -> list[Path]:
        """`NAME.safetensors` of the model as it is after `step` steps, with its card, read back and compared; the files.

        The trained layers are taken out of the model on the way, so this is the last thing done with it.

        Raises:
            ExportError: the file cannot be written or read back, or does not do what was trained.
        """
        config, family = self._config, self._family
        path = config.output_dir / f"{config.name}.safetensors"
        names = family.file_names()
        with evaluation_weights(self._run.optimizer), self._adapter.strength(1.0):
            weights, baked = self._weights()
            trained_output = self._probe()
        facts = self._facts(config.name, step, weights)
        metadata, dtype = file_metadata(facts, config.metadata_level), DTYPES[config.save_precision]
        write_lora(path, weights, metadata, dtype, names, own_kind=self._own_kind)

        try:
            if self._own_kind:
                read_back = verify_own_file(path, weights, self._adapter.base_weight, names)
            else:
                read_back = verify_file(path, require_plain(weights), names)
            self._adapter.detach()
            compare = verify_own_effect if self._own_kind else verify_effect
            effect = compare(
                path,
                family.components,
                lambda: self._probe(),
                trained_output,
                names,
                tolerance=EFFECT_TOLERANCE + 3 * baked.error,
                compute_dtype=trained_output.dtype,
            )
        except ExportError:
            with contextlib.suppress(OSError):  # nobody shall take it for the finished file
                path.replace(path.with_suffix(".failed.safetensors"))
            raise
        self.proofs = [
            *([] if baked.exact and not baked.kind else [f"{path.name}: {baked}"]),
            str(read_back),
            str(effect),
        ]
        for line in self.proofs:
            self._run.events.note(line)

        card = write_sidecar(
            path,
            base_model_version=family.base_model_version,
            activation_text=", ".join(config.triggers),
            description=config.description,
            preferred_weight=0.8,
            notes=self._notes(step),
        )
        files = [path, card]
        if (last := self._previews.last) is not None:
            infotext = self._previews.infotext(0, self._run.source.title, [lora.tag for lora in self._run.beneath])
            files.append(write_preview(path, last.images[0], infotext))
        return files

    def _notes(self, step: int) -> str:
        run = self._run
        text = (
            f"Trained with lora-scripts on {run.source.title}, {len(self._data.dataset.learnt)} pictures, {step} steps."
        )
        if not run.beneath:
            return text
        tags = " ".join(lora.tag for lora in run.beneath)
        return f"{text} On top of other LoRAs: use it together with {tags}."

    @torch.no_grad()
    def _probe(self) -> torch.Tensor:
        """The model's answer for the first example at a fixed draw."""
        batch = self._data.batch(self._plan.step(0)[:1], self._run.device)
        output: torch.Tensor = self._family.predict(batch, Draws(self._config.seed))
        return output

    def _facts(self, name: str, step: int, weights: LayerChanges) -> RunFacts:
        config, dataset = self._config, self._data.dataset
        rank, alpha = Counter((tensors.rank, tensors.alpha) for tensors in weights.values()).most_common(1)[0][0]
        folders = dataset.by_directory(dataset.learnt)
        others = dataset.by_directory([each for each in dataset.examples if each.is_regularization])
        epochs = -(-step // self._plan.steps_per_epoch)
        return RunFacts(
            output_name=name,
            base_model_version=self._family.base_model_version,
            modelspec_architecture=self._family.modelspec_architecture,
            rank=rank,
            alpha=alpha,
            network_module=network_module(config, self._own_kind),
            network_args=network_args(config, self._own_kind, alpha),
            base_loras={lora.name: (lora.weight, lora.digest) for lora in self._run.beneath},
            base_model=self._run.source.title,
            base_model_hash=self._base_hash(),
            network_dropout=config.lora_dropout,
            steps=step,
            max_steps=self._run.max_steps,
            epochs=epochs,
            num_epochs=-(-self._run.max_steps // self._plan.steps_per_epoch),
            learning_rate=config.learning_rate,
            text_encoder_learning_rate=config.text_encoder_learning_rate,
            optimizer=config.optimizer,
            lr_scheduler=config.lr_scheduler,
            lr_warmup_steps=resolve_warmup(config.warmup_steps, self._run.max_steps),
            batch_size=config.micro_batch,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            gradient_checkpointing=config.gradient_checkpointing is True,
            max_grad_norm=config.max_grad_norm,
            min_snr_gamma=config.snr_gamma or None,
            noise_offset=config.noise_offset,
            objective=objective_texts(config),
            zero_terminal_snr=bool(config.zero_terminal_snr),
            caption_dropout=config.caption_dropout,
            caption_shuffle=config.caption_shuffle,
            flip=config.flip,
            seed=config.seed,
            resolution=self._resolution,
            buckets=dataset.bucket_counts,
            num_images=len(dataset.learnt),
            num_regularization_images=len(dataset.examples) - len(dataset.learnt),
            dataset_dirs=_directories(folders),
            regularization_dirs=_directories(others),
            tag_frequency={name: _tags(examples) for name, examples in folders.items()},
            trigger_word=", ".join(config.triggers),
            description=config.description,
            started_at=self._run.started_at,
            finished_at=time.time(),
            clip_skip=None if config.clip_skip == 1 else config.clip_skip,
            is_v2=self._family.base_model_version.startswith("sd_v2"),
            prediction_type=self._family.prediction,
        )

    def _base_hash(self) -> str:
        """The first ten digits of the base file's sha256, as the WebUI shows it; of a folder, of its fingerprint."""
        from lora_scripts.models.hashes import file_sha256

        if self._run.source.path.is_file():
            return file_sha256(self._run.source.path)[:10]
        return hashlib.sha256(self._run.source.own_fingerprint.encode()).hexdigest()[:10]


def _directories(examples: Mapping[str, Sequence[Example]]) -> dict[str, tuple[int, int]]:
    """Of each directory the repeats and the number of its pictures."""
    return {name: (inside[0].repeats, len(inside)) for name, inside in examples.items()}


def _tags(examples: Sequence[Example]) -> Counter[str]:
    """How often each part of a caption stands in the captions; of several captions of one picture, once."""
    tags: Counter[str] = Counter()
    for example in examples:
        parts = [part.strip() for caption in example.captions for part in caption.split(",") if part.strip()]
        tags.update(list(dict.fromkeys(parts)) if example.more_captions else parts)
    return tags
