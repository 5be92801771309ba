"""SDXL's encodings, loss and previews against diffusers' own pipeline, on a tiny random model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from helpers.library_networks import library_parts
from helpers.reference_training import CAPTIONS, SIZES, encoded, load_family, part_of, reference_loss
from helpers.tiny_diffusion import save_folder, tiny_parts
from lora_scripts.data.buckets import Fit, Framing, fit_into
from lora_scripts.families.protocol import SampleRequest
from lora_scripts.models.stable_diffusion import StableDiffusionParts
from lora_scripts.sampling.conditions import conditioner_of
from lora_scripts.sampling.denoise import SAMPLERS, render_latents
from lora_scripts.sampling.embed import embed_prompts
from lora_scripts.training.draws import Draws


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tiny_parts("sdxl"), tmp_path_factory.mktemp("models") / "tiny-sdxl")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusionXLPipeline:
    made = StableDiffusionXLPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def pixels() -> torch.Tensor:
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1


def text_of(pipeline: Any, captions: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's (embeddings, pooled text)."""
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            list(captions), device="cpu", do_classifier_free_guidance=False, **options
        )
    return embeds, pooled


def test_text_embeddings_and_pooled_text_are_the_pipelines(folder: Path, pipeline: Any) -> None:
    batch = encoded(load_family(folder), pixels())
    embeds, pooled = text_of(pipeline, CAPTIONS)
    torch.testing.assert_close(batch.tensors["prompt_embeds"], embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch.tensors["pooled_prompt_embeds"], pooled, rtol=1e-5, atol=1e-5)


def test_clip_skip_1_and_2_are_the_last_layer_but_one_and_3_the_one_before(folder: Path, pipeline: Any) -> None:
    of = {skip: encoded(load_family(folder, clip_skip=skip), pixels()).tensors for skip in (1, 2, 3)}
    assert torch.equal(of[1]["prompt_embeds"], of[2]["prompt_embeds"])
    embeds, pooled = text_of(pipeline, CAPTIONS, clip_skip=1)  # diffusers counts from the last layer but one
    torch.testing.assert_close(of[3]["prompt_embeds"], embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of[3]["pooled_prompt_embeds"], pooled, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(of[1]["prompt_embeds"], of[3]["prompt_embeds"], atol=1e-2)


def test_time_ids_are_the_pipelines_for_true_size_and_crop(folder: Path, pipeline: Any) -> None:
    ids = encoded(load_family(folder), pixels()).tensors["add_time_ids"]
    for row, size in zip(ids, SIZES, strict=True):
        fit = fit_into(size, [(64, 64)])
        projection = pipeline.text_encoder_2.config.projection_dim
        theirs = pipeline._get_add_time_ids(
            size[::-1], (fit.top, fit.left), (64, 64), torch.float32, text_encoder_projection_dim=projection
        )
        assert torch.equal(row, theirs[0])
    assert ids[0].tolist() == [900, 700, 9, 0, 64, 64]  # 64 x 82 is cut at the top


def test_crop_of_a_mirrored_view_is_counted_in_the_mirrored_picture(folder: Path) -> None:
    (encoder,) = [each for each in load_family(folder).encoders() if each.reads == "fit"]
    fit = Fit(bucket=(64, 64), scaled=(101, 64), left=18, top=0)
    plain, mirrored = encoder.run([Framing((202, 128), fit), Framing((202, 128), fit, mirrored=True)])
    assert plain["add_time_ids"].tolist() == [128, 202, 0, 18, 64, 64]
    assert mirrored["add_time_ids"].tolist() == [128, 202, 0, 19, 64, 64]  # 101 - 64 - 18


@pytest.mark.parametrize("trained", [False, True], ids=["encoded ahead", "text encoders trained"])
@pytest.mark.parametrize(
    ("prediction", "gamma", "zero_snr"),
    [("epsilon", 0.0, False), ("epsilon", 5.0, False), ("v_prediction", 5.0, False), ("v_prediction", 0.0, True)],
)
def test_loss_is_that_of_diffusers_parts(
    folder: Path, pipeline: Any, trained: bool, prediction: str, gamma: float, zero_snr: bool
) -> None:
    family = load_family(
        folder, prediction=prediction, min_snr_gamma=gamma, zero_terminal_snr=zero_snr, train_text_encoder=trained
    )
    batch, draws = encoded(family, pixels()), Draws(42)
    assert ("prompt_embeds" in batch.tensors) is not trained
    embeds, pooled = text_of(pipeline, CAPTIONS)
    added = {"text_embeds": pooled, "time_ids": batch.tensors["add_time_ids"]}
    with torch.no_grad():
        loss = family.loss(batch, draws)
        expected = reference_loss(
            pipeline,
            batch,
            draws,
            {"encoder_hidden_states": embeds, "added_cond_kwargs": added},
            prediction=prediction,
            gamma=gamma,
            zero_snr=zero_snr,
        )
    assert loss.count == 4
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=0)


def test_size_and_crop_reach_the_unet(folder: Path) -> None:
    family = load_family(folder)
    batch = encoded(family, pixels())
    other = replace(batch, tensors={**batch.tensors, "add_time_ids": batch.tensors["add_time_ids"].flip(0)})
    with torch.no_grad():
        assert not torch.allclose(family.predict(batch, Draws(1)), family.predict(other, Draws(1)), atol=1e-4)


def test_loss_of_a_batch_is_the_sum_of_its_parts(folder: Path) -> None:
    family = load_family(folder, noise_offset=0.1)
    batch = encoded(family, pixels())
    with torch.no_grad():
        whole = family.loss(batch, Draws(1)).total
        halves = sum(family.loss(part_of(batch, start, start + 2), Draws(1)).total for start in (0, 2))
    torch.testing.assert_close(whole, halves, rtol=1e-5, atol=0)


def test_checkpointing_changes_memory_and_not_the_gradient(folder: Path) -> None:
    gradients = []
    for on in (False, True):
        family = load_family(folder, train_text_encoder=True)
        layer = family.components["text_encoder_2"].encoder.layers[0].self_attn.q_proj
        layer.weight.requires_grad_(True)
        family.set_checkpointing(on)
        family.loss(encoded(family, pixels()), Draws(2)).total.backward()
        gradients.append(layer.weight.grad)
        assert family.components["text_encoder"].encoder.layers[0].gradient_checkpointing is on
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    assert float(gradients[0].abs().max()) > 0


# Previews -----------------------------------------------------------------------------------------------------------------


def asked(**changes: Any) -> SampleRequest:
    plain = SampleRequest("a red fox in the snow", seed=7, steps=6, guidance=5.0, width=64, height=64)
    return replace(plain, **changes)


def latents_of(parts: StableDiffusionParts, request: SampleRequest, sampler: str, **schedule: Any) -> torch.Tensor:
    """The finished latents of diffusers' pipeline with the same weights, for the same noise."""
    name, settings = SAMPLERS[sampler]
    parts = library_parts(parts)
    made = StableDiffusionXLPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        text_encoder_2=parts.text_encoder_2,
        tokenizer=parts.tokenizer,
        tokenizer_2=parts.tokenizer_2,
        unet=parts.unet,
        scheduler=getattr(diffusers, name).from_config({**parts.scheduler_config, **settings, **schedule}),
    )
    made.set_progress_bar_config(disable=True)
    shape = (1, 4, request.height // 8, request.width // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed))
    return made(
        request.prompt,
        negative_prompt=request.negative_prompt or None,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        width=request.width,
        height=request.height,
        latents=noise,
        output_type="latent",
    ).images[0]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"negative_prompt": "blurry, dark"}, {"guidance": 1.0}, {"width": 96, "height": 48}],
    ids=["no negative prompt", "negative prompt", "no guidance", "wide"],
)
def test_preview_is_that_of_diffusers_pipeline(folder: Path, sampler: str, changes: Any) -> None:
    parts, request = load_family(folder)._parts, asked(**changes)
    ours = render_latents(parts, [request], "cpu", sampler=sampler)[0]
    theirs = latents_of(parts, request, sampler)
    assert float(theirs.std()) > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_preview_of_a_velocity_model_starts_at_pure_noise(folder: Path, sampler: str) -> None:
    family = load_family(folder, prediction="v_prediction", zero_terminal_snr=True)
    ours = render_latents(family._parts, [asked()], "cpu", sampler=sampler)[0]
    schedule = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    theirs = latents_of(family._parts, asked(), sampler, **schedule)
    assert bool(ours.isfinite().all())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_emphasis_works_in_both_text_encoders_and_leaves_the_pooled_text(folder: Path) -> None:
    parts = load_family(folder)._parts
    with torch.no_grad():
        (plain, _), (strong, _) = conditioner_of(parts)([asked(prompt="a red fox"), asked(prompt="a (red:1.5) fox")])
    width = parts.text_encoder.config.hidden_size
    for embeds, other in (
        (plain.embeds[:, :width], strong.embeds[:, :width]),
        (plain.embeds[:, width:], strong.embeds[:, width:]),
    ):
        # Token 2 is "red", 3 is "fox"; the mean is put back to what it was.
        ratio = (other / embeds).median(dim=1).values
        assert float(ratio[2] / ratio[3]) == pytest.approx(1.5, rel=1e-3)
    assert torch.equal(plain.added["text_embeds"], strong.added["text_embeds"])


def test_long_prompts_and_their_mates_are_of_one_length(folder: Path) -> None:
    parts = load_family(folder)._parts
    requests = [asked(prompt="a long story " * 40, negative_prompt="blurry"), asked(prompt="a cat", negative_prompt="")]
    with torch.no_grad():
        (long, negative), (short, zeros) = conditioner_of(parts)(requests)
    assert long.embeds.shape == negative.embeds.shape == (154, short.embeds.shape[1])
    assert not zeros.embeds.any()
    assert not zeros.added["text_embeds"].any()
    assert embed_prompts(parts.text_encoder, parts.tokenizer, ["a cat"])[0].shape[0] == len(short.embeds)


def test_family_says_what_readers_sort_by(folder: Path) -> None:
    family = load_family(folder)
    assert (family.name, family.base_model_version) == ("sdxl", "sdxl_base_v1-0")
    assert family.modelspec_architecture == "stable-diffusion-xl-v1-base/lora"
    assert set(family.components) == {"unet", "text_encoder", "text_encoder_2"}
    assert not any("text_projection" in name for name, _ in family.components["text_encoder_2"].named_modules())


def test_caption_over_the_limit_is_cut_where_the_encoders_stop_reading(folder: Path) -> None:
    family = load_family(folder)
    kept = family.cut_caption("red cat " * 100)
    assert len(kept.split()) == 75
