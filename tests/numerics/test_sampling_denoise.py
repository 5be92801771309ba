"""Our rendering against diffusers' pipeline on a tiny random model."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from lora_scripts.errors import ConfigError
from lora_scripts.families.protocol import SampleRequest
from lora_scripts.models.stable_diffusion import StableDiffusionParts
from lora_scripts.sampling.denoise import SAMPLERS, render
from lora_scripts.sampling.embed import embed_prompts
from unit.sampling.tiny_sd import pipeline, tiny_parts

PROMPT = "a red fox in the snow"


def pixels(image: object) -> np.ndarray:
    return np.asarray(image).astype(np.float32)


def request(prompt: str = PROMPT, **changes: object) -> SampleRequest:
    return replace(SampleRequest(prompt, seed=7, steps=6, guidance=5.0, width=32, height=32), **changes)


def by_diffusers(parts: StableDiffusionParts, asked: SampleRequest, scheduler: object, **options: object) -> np.ndarray:
    """The picture of diffusers' own pipeline for the same noise and scheduler."""
    noise = torch.randn(
        (1, 4, asked.height // 8, asked.width // 8), generator=torch.Generator().manual_seed(asked.seed)
    )
    images = pipeline(parts, scheduler)(
        asked.prompt,
        negative_prompt=asked.negative_prompt,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance,
        latents=noise,
        width=asked.width,
        height=asked.height,
        **options,
    ).images
    return pixels(images[0])


def make_scheduler(parts: StableDiffusionParts, sampler: str, **changes: object) -> object:
    name, settings = SAMPLERS[sampler]
    return getattr(diffusers, name)(**{**parts.scheduler_config, **settings, **changes})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_picture_is_that_of_diffusers_pipeline(sampler: str) -> None:
    parts = tiny_parts()
    asked = request(negative_prompt="blurry, dark")
    ours = pixels(render(parts, [asked], "cpu", sampler=sampler)[0])
    theirs = by_diffusers(parts, asked, make_scheduler(parts, sampler))
    assert ours.std() > 5  # not a plain surface
    assert np.abs(ours - theirs).max() <= 1


def test_without_guidance_the_negative_prompt_does_not_matter() -> None:
    parts = tiny_parts()
    asked = request(guidance=1.0)
    ours = pixels(render(parts, [replace(asked, negative_prompt="blurry")], "cpu")[0])
    assert np.abs(ours - by_diffusers(parts, asked, make_scheduler(parts, "DPM++ 2M"))).max() <= 1


def test_wide_picture_of_a_velocity_model_is_that_of_diffusers_pipeline() -> None:
    parts = replace(tiny_parts(), prediction_type="v_prediction")
    asked = request(width=48, height=32)
    ours = pixels(render(parts, [asked], "cpu")[0])
    scheduler = make_scheduler(parts, "DPM++ 2M", prediction_type="v_prediction")
    assert ours.shape == (32, 48, 3)
    assert np.abs(ours - by_diffusers(parts, asked, scheduler)).max() <= 1
    other = pixels(render(tiny_parts(), [asked], "cpu")[0])
    assert np.abs(ours - other).max() > 10


def test_zero_terminal_snr_starts_at_the_last_step_and_stays_finite() -> None:
    parts = tiny_parts()
    config = {**parts.scheduler_config, "rescale_betas_zero_snr": True}
    parts = replace(parts, scheduler_config=config, prediction_type="v_prediction")
    ours = pixels(render(parts, [request()], "cpu")[0])
    scheduler = make_scheduler(parts, "DPM++ 2M", prediction_type="v_prediction", timestep_spacing="trailing")
    assert scheduler.config.rescale_betas_zero_snr
    assert np.abs(ours - by_diffusers(parts, request(), scheduler)).max() <= 1


def test_embeddings_are_those_of_diffusers() -> None:
    parts = tiny_parts()
    theirs = pipeline(parts).encode_prompt(PROMPT, "cpu", 1, False)[0][0]
    torch.testing.assert_close(embeds_of(PROMPT), theirs, rtol=1e-5, atol=1e-5)


def test_clip_skip_leaves_off_the_last_layers_and_keeps_the_final_norm() -> None:
    parts = tiny_parts()
    with torch.no_grad():
        ours = embed_prompts(parts.text_encoder, parts.tokenizer, [PROMPT], clip_skip=2)[0]
        del parts.text_encoder.encoder.layers[-1]
        shorter = embed_prompts(parts.text_encoder, parts.tokenizer, [PROMPT])[0]
    torch.testing.assert_close(ours, shorter, rtol=1e-5, atol=1e-5)


def test_picture_does_not_depend_on_its_batch_mates_or_the_batch_size() -> None:
    parts = tiny_parts()
    requests = [
        request(),
        request("a house", seed=8),
        request("a house", seed=9, guidance=2.0),
        request(width=40),
        request(steps=4),
        request("a long story " * 30),
        request(guidance=1.0),
    ]
    alone = [pixels(render(parts, [asked], "cpu")[0]) for asked in requests]
    for batch_size in (1, 2, 8):
        together = render(parts, requests, "cpu", batch_size=batch_size)
        for ours, theirs in zip(together, alone, strict=True):
            assert np.abs(pixels(ours) - theirs).max() <= 1
    assert np.abs(alone[1] - alone[2]).max() > 5


def test_same_request_gives_the_same_picture_bit_by_bit() -> None:
    parts = tiny_parts()
    first, second = (pixels(render(parts, [request()], "cpu")[0]) for _ in range(2))
    assert np.array_equal(first, second)


def test_lora_tags_are_not_read_as_words() -> None:
    parts = tiny_parts()
    tagged, plain = render(parts, [request(f"{PROMPT} <lora:ink:0.7>"), request()], "cpu")
    assert np.abs(pixels(tagged) - pixels(plain)).max() <= 1


def embeds_of(prompt: str, bias: float = 0.0) -> torch.Tensor:
    parts = tiny_parts()
    with torch.no_grad():
        parts.text_encoder.final_layer_norm.bias.fill_(bias)
        return embed_prompts(parts.text_encoder, parts.tokenizer, [prompt])[0]


def test_emphasis_of_one_changes_nothing() -> None:
    assert torch.equal(embeds_of("a (red:1.0) fox"), embeds_of("a red fox"))


def test_emphasis_scales_its_tokens_and_keeps_the_mean() -> None:
    plain, strong = embeds_of("a red fox", 0.2), embeds_of("a (red:1.5) fox", 0.2)
    ratio = (strong / plain).median(dim=1).values
    # Token 0 is the start mark, 1 "a", 2 "red", 3 "fox".
    assert float(ratio[2] / ratio[3]) == pytest.approx(1.5, rel=1e-4)
    assert float(ratio[1] / ratio[3]) == pytest.approx(1.0, rel=1e-4)
    assert float(strong.mean()) == pytest.approx(float(plain.mean()), rel=1e-4)


def test_emphasis_of_embeddings_without_a_mean_does_not_blow_them_up() -> None:
    plain, strong = embeds_of("a red fox"), embeds_of("a (red:1.5) fox")
    assert abs(float(plain.mean())) < 1e-6
    torch.testing.assert_close(strong[2], 1.5 * plain[2])
    torch.testing.assert_close(strong[3], plain[3])


def test_long_prompts_are_read_to_their_end() -> None:
    story = ", ".join(f"word {number}" for number in range(40))
    assert embeds_of(story).shape[0] > 77
    assert embeds_of(story).shape[0] % 77 == 0
    assert not torch.equal(embeds_of(f"{story}, fox")[77:], embeds_of(f"{story}, cat")[77:])


def test_full_piece_ends_at_a_comma() -> None:
    tokenizer = tiny_parts().tokenizer
    head = "fox " * 70
    from lora_scripts.sampling.embed import _pieces

    comma = tokenizer(",", add_special_tokens=False)["input_ids"][0]
    pieces = _pieces(tokenizer, f"{head.strip()}, a red house by the sea in winter")
    assert [len(piece.ids) for piece in pieces] == [71, 8]
    assert pieces[0].ids[-1] == comma
    # Without a comma near the end it is cut where it is full.
    assert [len(piece.ids) for piece in _pieces(tokenizer, "fox " * 100)] == [75, 25]


def test_break_begins_a_new_piece() -> None:
    assert torch.equal(embeds_of("a fox BREAK a house"), torch.cat([embeds_of("a fox"), embeds_of("a house")]))


def test_parts_are_left_as_they_were() -> None:
    parts = tiny_parts()
    parts.unet.train()
    parts.vae.eval()
    render(parts, [request()], "cpu")
    assert all(module.training for module in parts.unet.modules())
    assert not any(module.training for module in parts.vae.modules())


def test_progress_counts_every_step_of_every_batch() -> None:
    seen: list[tuple[int, int]] = []
    render(tiny_parts(), [request(steps=3), request(steps=4)], "cpu", progress=lambda *numbers: seen.append(numbers))
    assert seen == [(number, 7) for number in range(1, 8)]


def test_half_precision_vae_that_overflows_is_decoded_in_single_precision() -> None:
    parts = tiny_parts()
    good = pixels(render(parts, [request()], "cpu")[0])
    parts.vae.to(torch.float16)
    before = {name: tensor.clone() for name, tensor in parts.vae.state_dict().items()}
    with torch.no_grad():
        # The weights stay within fp16, but what the last layers compute from them does not.
        parts.vae.decoder.conv_in.weight.mul_(3e4)
        before["decoder.conv_in.weight"] = parts.vae.decoder.conv_in.weight.clone()
        parts.vae.decoder.conv_in.bias.mul_(0)
        before["decoder.conv_in.bias"] = parts.vae.decoder.conv_in.bias.clone()
        overflow = parts.vae.decode(torch.full((1, 4, 4, 4), 30.0, dtype=torch.float16)).sample
    assert not torch.isfinite(overflow).all()
    ours = pixels(render(parts, [request()], "cpu")[0])
    assert ours.std() > 1
    assert ours.shape == good.shape
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts.vae.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "text"),
    [({"width": 33}, "size 33x32: both sides must be multiples of 8"), ({"height": 0}, "size 32x0")],
)
def test_sizes_that_cannot_be_made_are_refused(changes: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        render(tiny_parts(), [request(**changes)], "cpu")


def test_unknown_sampler_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"sampler eular: no such sampler\. Did you mean euler\?"):
        render(tiny_parts(), [request()], "cpu", sampler="eular")
