"""Pictures with captions, for a denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from lora_scripts.choosing.by_pictures import ByPictures
from lora_scripts.choosing.clip import find_clip
from lora_scripts.config import RunConfig, Size
from lora_scripts.data.cache import EncodingCache, cache_folder
from lora_scripts.data.captions import CaptionSettings
from lora_scripts.data.dataset import Dataset, Example, open_dataset
from lora_scripts.data.encoded import encode_all
from lora_scripts.data.folders import PictureSource, require_folders
from lora_scripts.data.outlined import OutlinedPictures
from lora_scripts.data.sampler import total_uses
from lora_scripts.data.split import split
from lora_scripts.families import num_parameters
from lora_scripts.finish import Finish
from lora_scripts.preflight.before_run import check_before_run
from lora_scripts.preflight.model_step import LoadedModel
from lora_scripts.preflight.wording import count
from lora_scripts.previews import Previews, preview_requests
from lora_scripts.tasks.protocol import DataOutline, Finishing, Prepared, Previewing, Progress, Run

if TYPE_CHECKING:
    import torch

    from lora_scripts.families.protocol import PictureFamily
    from lora_scripts.training.events import Events
    from lora_scripts.training.resume import Resumable

__all__ = ["TextToImage"]


SIDES = (1024, 768, 640, 512, 448, 384, 320, 256, 192, 128)
"""Resolutions to go down by."""


class TextToImage:
    """A run on pictures."""

    @staticmethod
    def require_inputs(config: RunConfig) -> None:
        require_folders(config)
        find_clip(config)  # which judges the pictures when all is done

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._resolution: Size = (0, 0)
        self._dataset = Dataset(())

    def prepare(
        self, family: PictureFamily, device: torch.device, events: Events, progress: Progress, force: bool
    ) -> Prepared:
        """Pictures and captions: checked, then each encoded once."""
        config = self._config
        side = family.default_resolution
        self._resolution = config.resolution or (side, side)
        dataset = open_dataset(config, self._resolution)
        for line in dataset.notes:  # a row that fits no picture may be the reason for what the check finds
            events.note(line)
        cache = EncodingCache(cache_folder(config))
        model = LoadedModel(family, device)
        check = check_before_run(config, dataset, self._resolution, cache, model, events, progress, force)
        data = encode_all(
            dataset,
            family.encoders(),
            CaptionSettings.of(config),
            cache,
            flip=config.flip,
            num_workers=4 if config.num_workers == "auto" else config.num_workers,
            progress=progress,
            empty_masks=config.masked_weight_outside > 0,
        )
        for line in [*data.dataset.notes[len(dataset.notes) :], *data.dataset.summary()]:
            events.note(line)
        family.release_encoders()
        parts = split(data, config.validation_pictures)
        self._dataset = parts.train.dataset
        return Prepared(data.dataset, parts, check)

    def outline(self, family: PictureFamily, device: torch.device, progress: Progress) -> DataOutline:
        """Pictures by their sizes; none is decoded."""
        config, side = self._config, family.default_resolution
        resolution = config.resolution or (side, side)
        dataset = open_dataset(config, resolution)
        parts = split(OutlinedPictures(dataset, family), config.validation_pictures)
        self._dataset = parts.train.dataset

        def smaller() -> Iterator[tuple[str, OutlinedPictures]]:
            for side in SIDES:
                if side * side < resolution[0] * resolution[1]:
                    other = open_dataset(config, (side, side))
                    yield f"resolution: {side}", OutlinedPictures(other, family)

        previews = len(preview_requests(config, dataset, resolution, device, num_parameters(family)))
        measured = parts.held_out is not None
        return DataOutline(parts.train, self.facts(), "pixels", measured, smaller, previews, resolution)

    def facts(self) -> Sequence[tuple[str, str]]:
        buckets = ", ".join(f"{w}x{h}: {n}" for (w, h), n in self._dataset.bucket_counts.items())
        learnt = [(source, found) for source, found in self._dataset.by_folder() if not source.regularization]
        others = [(source, found) for source, found in self._dataset.by_folder() if source.regularization]
        facts = [("pictures", f"{len(self._dataset.examples)} ({buckets})")]
        if len(learnt) > 1:
            facts.append(("folders", "; ".join(_described(*folder) for folder in learnt)))
        if others:
            uses = total_uses(self._dataset.learnt)
            told = "; ".join(_described(*folder) for folder in others)
            facts.append(("regularization", f"{told}: {uses} uses an epoch, as many as of the others"))
        if self._config.masked_loss != "none":
            masked = sum(example.mask is not None for example in self._dataset.examples)
            outside = f"what they leave out counts {self._config.masked_weight_outside:g}"
            facts.append(("masks", f"of {masked} of {count(len(self._dataset.learnt), 'picture')}, {outside}"))
        return facts

    def settings(self) -> dict[str, Any]:
        return {"resolution": f"{self._resolution[0]}x{self._resolution[1]}"}

    def previews(self, run: Run) -> Previews:
        requests = preview_requests(
            self._config, self._dataset, self._resolution, run.device, num_parameters(run.family)
        )
        return Previews(run.family, run.adapter, requests, run.optimizer, run.events)

    def finishing(self, run: Run, previews: Previewing) -> Finishing:
        return Finish(run, self._resolution, cast("Previews", previews))

    def comparison(self, run: Run, run_state: Resumable, previews: Previewing) -> ByPictures | None:
        clip = find_clip(self._config)
        if clip is None:
            return None
        return ByPictures(run, clip, run_state, cast("Previews", previews), self._resolution)


def _described(source: PictureSource, examples: Sequence[Example]) -> str:
    """A folder in the head of the log."""
    uses = sum(each.repeats for each in examples)
    parts = [
        f"{source.name}: {count(len(examples), 'picture')}",
        f"{uses} uses an epoch" if uses != len(examples) and not source.regularization else "",
        f"trigger word {source.trigger_word}" if source.trigger_word else "",
        f"weight {source.weight:g}" if source.weight != 1 or source.regularization else "",
    ]
    return ", ".join(filter(None, parts))
