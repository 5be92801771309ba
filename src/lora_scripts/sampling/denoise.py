"""Pictures from prompts: the denoising loop of epsilon and v models, for previews and for `lora-scripts sample`.

Every picture's noise is drawn on the CPU from its own seed, and no sampler used here draws more on the way, so that a
picture does not depend on the device or on what else is in its batch.

Legend for shapes: B batch, C latent channels, h w latent height and width (pixels / 8), L tokens, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from lora_scripts.errors import ConfigError, did_you_mean
from lora_scripts.families.protocol import SampleRequest
from lora_scripts.sampling.conditions import Conditions, Parts, conditioner_of, unet_arguments

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

__all__ = ["DEFAULT_SAMPLER", "SAMPLERS", "check_sampler", "noise_prediction", "render", "render_latents"]

_DPM_2M = {"algorithm_type": "dpmsolver++", "solver_order": 2, "timestep_spacing": "linspace"}
SAMPLERS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "DPM++ 2M": ("DPMSolverMultistepScheduler", _DPM_2M),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {**_DPM_2M, "use_karras_sigmas": True}),
    "Euler": ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "leading", "steps_offset": 1}),
}
"""WebUI name to diffusers scheduler and settings; only samplers that add no noise on the way.

The steps are spaced as the WebUI spaces them, whatever a model folder says for the sampler it was saved with: one and the
same model must not render differently from a file and from a folder.
"""

DEFAULT_SAMPLER = "DPM++ 2M"

_PIXELS_AT_ONCE = 2 * 512 * 512
"""Pictures are decoded in groups of at most so many pixels: the VAE's decoder takes 1 to 2 GB for each 512x512."""


def render(
    parts: Parts,
    requests: Sequence[SampleRequest],
    device: torch.device | str,
    batch_size: int = 8,
    *,
    sampler: str = DEFAULT_SAMPLER,
    clip_skip: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Image]:
    """The pictures asked for, in that order.

    Requests of one size, number of steps and prompt length run together, at most `batch_size` of them. Parts that lie on
    another device are brought to `device` and back, parts in training mode are switched to evaluation and back. LoRA
    tags in a prompt are left out of the text; applying them is the caller's part.

    Args:
        sampler: a key of `SAMPLERS`.
        progress: called with (denoising steps done, steps in all) over all pictures.
    Raises:
        ConfigError: a size that the VAE cannot make, or an unknown sampler.
    """
    import torch

    latents = render_latents(
        parts, requests, device, batch_size, sampler=sampler, clip_skip=clip_skip, progress=progress
    )
    with torch.no_grad(), _at_work(parts.vae, torch.device(device)):
        return [_to_image(pixels) for pixels in _decode(parts.vae, latents)]


def render_latents(
    parts: Parts,
    requests: Sequence[SampleRequest],
    device: torch.device | str,
    batch_size: int = 8,
    *,
    sampler: str = DEFAULT_SAMPLER,
    clip_skip: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """[C, h, w] for each picture of `render`, as the U-Net leaves it: in float32 and still scaled."""
    import torch

    device = torch.device(device)
    factor = 2 ** (len(parts.vae.config.block_out_channels) - 1)
    for request in requests:
        if request.width % factor or request.height % factor or min(request.width, request.height) < factor:
            raise ConfigError(
                f"size {request.width}x{request.height}: both sides must be multiples of {factor} pixels."
            )
    with torch.no_grad():
        conditioner = conditioner_of(parts, clip_skip)
        with ExitStack() as reading:
            for module in conditioner.modules:
                reading.enter_context(_at_work(module, device))
            conditions = conditioner(requests)
        groups: dict[tuple[int, int, int, bool, int], list[int]] = {}
        for index, request in enumerate(requests):
            length = conditions[index][0].embeds.shape[0]
            key = (request.width, request.height, request.steps, request.guidance > 1, length)
            groups.setdefault(key, []).append(index)
        batches = [
            indices[start : start + batch_size]
            for indices in groups.values()
            for start in range(0, len(indices), batch_size)
        ]
        total = sum(requests[batch[0]].steps for batch in batches)
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        latents: dict[int, Tensor] = {}
        with _at_work(parts.unet, device):
            for batch in batches:
                chosen = [requests[index] for index in batch]
                scheduler = _scheduler(parts, sampler)
                result = _denoise(
                    parts, chosen, [conditions[index] for index in batch], scheduler, device, factor, tick
                )
                latents.update(zip(batch, result, strict=True))
        return [latents[index] for index in range(len(requests))]


def noise_prediction(
    parts: Parts,
    prompt: str,
    device: torch.device | str,
    *,
    width: int,
    height: int,
    seed: int = 0,
    timestep: int = 500,
) -> Tensor:
    """[1, C, h, w]: the denoiser's output for a prompt, the noise of a seed and one time step; a probe for comparisons."""
    import torch

    device = torch.device(device)
    factor = 2 ** (len(parts.vae.config.block_out_channels) - 1)
    conditioner = conditioner_of(parts)
    with torch.no_grad(), ExitStack() as stack:
        for module in (*conditioner.modules, parts.unet):
            stack.enter_context(_at_work(module, device))
        positive, _ = conditioner([SampleRequest(prompt, width=width, height=height)])[0]
        latents = _noise(parts.unet, seed, height // factor, width // factor)[None].to(device)
        dtype = _dtype(parts.unet)
        arguments = unet_arguments([positive], device, dtype)
        output: Tensor = parts.unet(
            latents.to(dtype), torch.tensor(timestep, device=device), return_dict=False, **arguments
        )[0]
        return output


def _denoise(
    parts: Parts,
    requests: Sequence[SampleRequest],
    conditions: Sequence[tuple[Conditions, Conditions]],
    scheduler: Any,
    device: torch.device,
    factor: int,
    tick: Callable[[], None],
) -> Tensor:
    """[B, C, h, w] finished latents in float32, still scaled."""
    import torch

    unet, dtype, first = parts.unet, _dtype(parts.unet), requests[0]
    guided = first.guidance > 1
    given = [positive for positive, _ in conditions]
    if guided:
        # Both halves in one pass: the denoiser runs once a step, on twice the batch.
        given = [*(negative for _, negative in conditions), *given]
    arguments = unet_arguments(given, device, dtype)
    guidance = torch.tensor([request.guidance for request in requests], device=device).view(-1, 1, 1, 1)
    scheduler.set_timesteps(first.steps, device=device)
    size = (first.height // factor, first.width // factor)
    noise = torch.stack([_noise(unet, request.seed, *size) for request in requests]).to(device)
    latents: Tensor = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        model_input = torch.cat([latents, latents]) if guided else latents
        model_input = scheduler.scale_model_input(model_input, timestep)
        model_pred = unet(model_input.to(dtype), timestep, return_dict=False, **arguments)[0].float()
        if guided:
            negative, positive = model_pred.chunk(2)
            model_pred = negative + guidance * (positive - negative)
        latents = scheduler.step(model_pred, timestep, latents, return_dict=False)[0]
        tick()
    return latents


def _noise(unet: Any, seed: int, height: int, width: int) -> Tensor:
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((unet.config.in_channels, height, width), generator=generator, dtype=torch.float32)


def check_sampler(name: str) -> str:
    """The sampler's name as `SAMPLERS` spells it, whatever the case it was written in.

    Raises:
        ConfigError: no such sampler.
    """
    lower = {known.lower(): known for known in SAMPLERS}
    if name.lower() not in lower:
        near = did_you_mean(name.lower(), lower)
        raise ConfigError(f"sampler {name}: no such sampler.{near} There are: {', '.join(SAMPLERS)}.")
    return lower[name.lower()]


def _scheduler(parts: Parts, sampler: str) -> Any:
    """The sampler on the model's own noise schedule."""
    import diffusers

    name, settings = SAMPLERS[check_sampler(sampler)]
    cls = getattr(diffusers, name)
    known = inspect.signature(cls.__init__).parameters
    config = {**parts.scheduler_config, "prediction_type": parts.prediction_type, **settings}
    if config.get("rescale_betas_zero_snr"):
        # With a last step of pure noise, sampling has to start at exactly that step (arXiv 2305.08891, section 3.3).
        config["timestep_spacing"] = "trailing"
    return cls(**{key: value for key, value in config.items() if key in known})


def _decode(vae: Any, latents: Sequence[Tensor]) -> Iterator[Tensor]:
    """[3, height, width] in [-1, 1] for each, several at once where they are small and of one size."""
    import torch

    start = 0
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    while start < len(latents):
        shape = latents[start].shape
        room = max(1, _PIXELS_AT_ONCE // (shape[1] * shape[2] * factor**2))
        end = start + 1
        while end < len(latents) and end - start < room and latents[end].shape == shape:
            end += 1
        scaled = torch.stack(list(latents[start:end])) / vae.config.scaling_factor
        shift = getattr(vae.config, "shift_factor", None)
        scaled = scaled + shift if shift else scaled
        dtype = _dtype(vae)
        pixels = vae.decode(scaled.to(dtype), return_dict=False)[0]
        if dtype == torch.float16 and not torch.isfinite(pixels).all():
            # Some VAEs overflow in half precision; casting up and back leaves the weights exactly as they were.
            pixels = vae.to(torch.float32).decode(scaled.float(), return_dict=False)[0]
            vae.to(dtype)
        yield from pixels.float()
        start = end


def _to_image(pixels: Tensor) -> Image:
    from PIL import Image

    values = (pixels / 2 + 0.5).nan_to_num(0.0).clamp(0, 1) * 255
    return Image.fromarray(values.round().byte().permute(1, 2, 0).cpu().numpy())


def _dtype(module: nn.Module) -> torch.dtype:
    """What the module was loaded in; its first parameter, since adapters may be kept in another dtype."""
    return next(module.parameters()).dtype


@contextmanager
def _at_work(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module on `device` and in evaluation mode; afterwards where and as it was."""
    home = next(module.parameters()).device
    training = [child for child in module.modules() if child.training]
    if home != device:
        module.to(device)
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True
        if home != device:
            module.to(home)
