"""Saving a run so that it can go on, and going on: what is equal, what is restored, what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_scripts.config import RunConfig
from lora_scripts.run_lock import require_own_folder
from lora_scripts.speed_rules import swapped_blocks
from lora_scripts.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    refuse_differences,
    save_checkpoint,
)
from lora_scripts.training.events import Events
from lora_scripts.training.loop import LoopState
from lora_scripts.training.optimizers import evaluation_weights, load_optimizer_state, optimizer_state
from lora_scripts.training.snapshot import Snapshot

if TYPE_CHECKING:
    import torch

    from lora_scripts.adapters.lora import Adapter
    from lora_scripts.base_loras import LoRABeneath
    from lora_scripts.data.training_data import Listing
    from lora_scripts.models.source import BaseModel

__all__ = ["FREE_TO_CHANGE", "Resumable", "identity"]

FREE_TO_CHANGE = frozenset(
    {
        "train_data_dir", "folders", "mask_dir", "metadata_path", "caption_per_line", "exclude", "cache_dir", "base_model", "base_loras", "allow_download", "device", "num_workers",
        "gradient_checkpointing", "output_dir", "output_name", "save_steps", "keep_checkpoints", "log_steps",
        "save_precision", "metadata_level", "description", "sample_prompts", "sample_every", "sample_negative_prompt",
        "sample_steps", "sample_guidance", "sample_seed", "sample_tokens", "epochs", "max_steps", "keep", "clip_model", "effective_batch",
        "memory_limit_gb", "compile", "cuda_graphs", "record_passes", "block_swap", "fuse_layers", "shard_model",
    }
)  # fmt: skip
"""Settings that do not shape the weights by themselves: data, base model and base LoRAs are compared by content, steps by number."""


class Writer(Protocol):
    """Writes the loadable LoRA of a step into a checkpoint's folder."""

    def write_step(self, folder: Path, step: int) -> None: ...


def identity(
    config: RunConfig,
    source: BaseModel,
    dataset: Listing,
    max_steps: int,
    dtype: torch.dtype,
    beneath: Sequence[LoRABeneath] = (),
    older_digest: str | None = None,
) -> dict[str, Any]:
    """All that must be equal for a resumed run to be the unbroken one."""
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in FREE_TO_CHANGE}
    return {
        **settings,
        "lora_alpha": config.alpha,
        "mixed_precision": str(dtype).removeprefix("torch."),
        "steps in all": max_steps,
        "base model": source.own_fingerprint,
        **{f"base LoRA {lora.entry}": f"weight {lora.weight:g}, sha256 {lora.digest[:16]}" for lora in beneath},
        **({"LoRA to go on from": f"sha256 {older_digest[:16]}"} if older_digest else {}),
        config.words.data: dict(dataset.identity()),
    }


def _settings_by_default() -> dict[str, Any]:
    """Settings that change what is trained, as they are where nobody writes them.

    A checkpoint of an older version lacks those that are newer; by default they leave a run as it was.
    """
    settings = RunConfig.model_construct().model_dump(mode="json")
    return {key: value for key, value in settings.items() if key not in FREE_TO_CHANGE}


class Resumable:
    """A run's moving parts, and how they go to disk and come back."""

    def __init__(
        self,
        config: RunConfig,
        source: BaseModel,
        dataset: Listing,
        adapter: Adapter,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        max_steps: int,
        dtype: torch.dtype,
        writer: Writer,
        beneath: Sequence[LoRABeneath] = (),
        older_digest: str | None = None,
    ) -> None:
        self._config, self._adapter, self._optimizer = config, adapter, optimizer
        self._scaler, self._writer = scaler, writer
        self._identity = identity(config, source, dataset, max_steps, dtype, beneath, older_digest)

    def restore(self, events: Events) -> LoopState:
        """The state to go on from: the newest whole checkpoint's, or a fresh one.

        Raises:
            ResumeError: the folder holds a run with other settings or data.
        """
        output_dir = self._config.output_dir
        checkpoint, notes = newest_checkpoint(output_dir)
        for line in notes:
            events.note(line, "warning")
        now: dict[str, Any] = {
            "checkpointing": self._config.gradient_checkpointing is True,
            "block_swap": swapped_blocks(self._config),
        }
        if checkpoint is None:
            return LoopState(**now)
        folder = output_dir / f"checkpoint-{checkpoint.step}"
        loras = [path for path in folder.iterdir() if path.stem.endswith(f"-{checkpoint.step}")]
        saved = {**_settings_by_default(), **checkpoint.identity}
        refuse_differences(saved, self._identity, output_dir, loras[0] if loras else None)
        self._adapter.load_state_dict(checkpoint.adapter)
        load_optimizer_state(self._optimizer, checkpoint.optimizer_tensors, checkpoint.optimizer_state)
        state = LoopState(**{**checkpoint.loop, **now})
        if state.scaler:
            self._scaler.load_state_dict(state.scaler)
        events.note(f"Resuming after step {state.step}, from {folder}.")
        return state

    def put_back(self, step: int) -> bool:
        """Loads weights and moments of a saved step; false, and nothing is changed, when its checkpoint is damaged."""
        checkpoint = load_checkpoint(self._config.output_dir / f"checkpoint-{step}")
        if checkpoint is None:
            return False
        self._adapter.load_state_dict(checkpoint.adapter)
        load_optimizer_state(self._optimizer, checkpoint.optimizer_tensors, checkpoint.optimizer_state)
        return True

    @contextmanager
    def visit(self, step: int) -> Iterator[bool]:
        """The model as it was after a saved step, for a while; false, and nothing is changed, when that is damaged."""
        before = Snapshot.take(self._adapter, self._optimizer, self._scaler, {})
        try:
            yield self.put_back(step)
        finally:
            before.restore(self._adapter, self._optimizer, self._scaler)

    def save(self, state: LoopState, events: Events) -> None:
        """Writes `checkpoint-N` with the loadable LoRA of that step in it, and removes the oldest if asked to.

        Raises:
            TrainingError: no room, no permission, or the output folder was removed or taken by another run.
        """
        require_own_folder(self._config.output_dir)
        state.scaler = self._scaler.state_dict()
        tensors, numbers = optimizer_state(self._optimizer)
        checkpoint = Checkpoint(
            step=state.step,
            adapter=self._adapter.state_dict(),
            optimizer_tensors=tensors,
            optimizer_state=numbers,
            identity=self._identity,
            loop=vars(state),
        )

        def write_lora(folder: Path) -> None:
            with evaluation_weights(self._optimizer):
                self._writer.write_step(folder, state.step)

        folder = self._config.output_dir / f"checkpoint-{state.step}"
        if folder in list_checkpoints(self._config.output_dir):
            same, _ = newest_checkpoint(self._config.output_dir)
            if same is not None and same.step == state.step:
                return  # resumed at the last step: it is already there, whole
        folder = save_checkpoint(self._config.output_dir, checkpoint, write_lora)
        if self._config.keep_checkpoints is not None:
            prune_checkpoints(self._config.output_dir, self._config.keep_checkpoints, protect=state.best_step)
        events.saved(state.step, folder)
