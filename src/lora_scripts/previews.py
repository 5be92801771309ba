"""The pictures that a run shows of itself: fixed prompts and seeds, so that only the adapter differs between steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_scripts.config import RunConfig, Size
from lora_scripts.families.protocol import SampleRequest
from lora_scripts.training.events import Events, Preview
from lora_scripts.training.optimizers import evaluation_weights

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch.optim import Optimizer

    from lora_scripts.adapters.lora import Adapter
    from lora_scripts.data.dataset import Dataset
    from lora_scripts.families.protocol import PictureFamily

__all__ = ["Previews", "preview_request", "preview_requests"]

MOST_CPU_PARAMETERS = 100_000_000
"""Above this, one preview on a CPU takes minutes, so none is rendered unless prompts are given."""


def preview_requests(
    config: RunConfig, dataset: Dataset, resolution: Size, device: torch.device, num_parameters: int
) -> list[SampleRequest]:
    """What to render: the prompts of the config, else up to four captions spread over the data set; none when off."""
    if config.preview_every == 0:
        return []
    prompts = list(config.sample_prompts)
    if not prompts:
        if device.type == "cpu" and num_parameters > MOST_CPU_PARAMETERS:
            return []
        captions = list(dict.fromkeys(example.caption for example in dataset.learnt if example.caption))
        prompts = [captions[i * len(captions) // min(4, len(captions))] for i in range(min(4, len(captions)))]
        prompts = prompts or [(config.triggers or [""])[0]]
    return [preview_request(config, prompt, number, resolution) for number, prompt in enumerate(prompts)]


def preview_request(config: RunConfig, prompt: str, number: int, resolution: Size) -> SampleRequest:
    """The `number`-th preview (from 0) as the config wants previews."""
    return SampleRequest(
        prompt=prompt,
        negative_prompt=config.sample_negative_prompt,
        seed=config.sample_seed + number,
        steps=config.sample_steps,
        guidance=config.sample_guidance,
        width=resolution[0],
        height=resolution[1],
    )


class Previews:
    """Renders the requests with the model as it is and tells the listeners; keeps the last pictures."""

    def __init__(
        self,
        family: PictureFamily,
        adapter: Adapter,
        requests: Sequence[SampleRequest],
        optimizer: Optimizer,
        events: Events,
    ) -> None:
        self._family, self._adapter, self._optimizer, self._events = family, adapter, optimizer, events
        self.requests = list(requests)
        self.last: Preview | None = None

    def render(self, step: int) -> None:
        if self.requests:
            self.last = self._preview(step)
            self._events.previewed(self.last)

    def repeat(self, step: int) -> None:
        """Renders once more for a saved step whose weights were put back, for the card; the listeners know it already."""
        if self.requests:
            self.last = self._preview(step)

    def _preview(self, step: int) -> Preview:
        return Preview(step, [request.prompt for request in self.requests], self.pictures(self.requests))

    def pictures(self, requests: Sequence[SampleRequest]) -> list[Image]:
        """Any pictures of the model as it is; nobody is told."""
        with evaluation_weights(self._optimizer), self._adapter.strength(1.0):
            return self._family.sample(requests)

    def infotext(self, number: int, base_model: str, tags: Sequence[str] = ()) -> str:
        """One request as the WebUI writes it into a picture; `tags` of LoRAs that were at work beside this one."""
        from lora_scripts.sampling.denoise import DEFAULT_SAMPLER
        from lora_scripts.sampling.infotext import format_infotext

        request = self.requests[number]
        return format_infotext(
            " ".join([request.prompt, *tags]),
            request.negative_prompt,
            steps=request.steps,
            sampler=DEFAULT_SAMPLER,
            guidance=request.guidance,
            seed=request.seed,
            width=request.width,
            height=request.height,
            model=base_model,
        )
