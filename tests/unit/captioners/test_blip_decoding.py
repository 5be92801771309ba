"""The captioner's own passes through BLIP against transformers' generation, on small random models."""

import random
import threading
from pathlib import Path

import pytest
import torch
from transformers import BlipForConditionalGeneration

from helpers.tiny_captioners import write_blip
from lora_scripts.captioners import blip_decoding
from lora_scripts.captioners.blip_decoding import ENCODED_AT_ONCE, _nucleus, decode, encode_images
from lora_scripts.captioners.picture_attention import KeysAndValues, States

END, START = 3, 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BlipForConditionalGeneration:
    folder = write_blip(tmp_path_factory.mktemp("models") / "blip")
    return BlipForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def greedy(count: int, candidates: int = 1, length: int = 12) -> torch.Tensor:
    return torch.full((count, candidates, length), torch.nan)


def run(model, states, draws, prompt=(START,), min_tokens=2):
    return decode(
        model.text_decoder,
        states,
        list(prompt),
        draws,
        end_id=END,
        min_tokens=min_tokens,
        max_tokens=draws.shape[-1],
        top_p=0.9,
    )


def test_vision_states_equal_those_of_transformers(model, pixels) -> None:
    assert len(pixels) > ENCODED_AT_ONCE
    with torch.inference_mode():
        ours, theirs = encode_images(model.vision_model, pixels), model.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_pictures", [2, 3, 6])
def test_each_core_takes_its_own_pictures_where_they_are_large(model, pixels, num_pictures, monkeypatch) -> None:
    monkeypatch.setattr(blip_decoding, "LARGE_PICTURE", 0)
    passes: list[tuple[bool, int]] = []
    encode = blip_decoding._encode

    def noted(vision_model, part):
        passes.append((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        return encode(vision_model, part)

    monkeypatch.setattr(blip_decoding, "_encode", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            ours = encode_images(model.vision_model, pixels[:num_pictures])
            assert torch.get_num_threads() == 2
            theirs = model.vision_model(pixels[:num_pictures]).last_hidden_state
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert ours.is_inference()
    assert {each for each in passes if not each[0]} == {(False, 1)}
    assert [each for each in passes if each[0]] == [(True, 2)] * (num_pictures % 2)


@pytest.mark.parametrize("kind", [States, KeysAndValues])
@pytest.mark.parametrize("prompt", [[START], [START, 8, 30, 31]], ids=["no prompt", "prompt of three words"])
def test_greedy_captions_equal_those_of_transformers(model, pixels, prompt, kind, monkeypatch) -> None:
    monkeypatch.setattr(blip_decoding, "picture_attention", lambda layers, states, num_queries: kind(layers, states))
    with torch.inference_mode():
        states = encode_images(model.vision_model, pixels)
        ours = run(model, states, greedy(len(pixels)), prompt)
        theirs = model.text_decoder.generate(
            input_ids=torch.tensor([prompt] * len(pixels)),
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long),
            eos_token_id=END,
            pad_token_id=0,
            min_new_tokens=2,
            max_new_tokens=12,
            do_sample=False,
        )
    for mine, reference in zip(ours.tokens[:, 0].tolist(), theirs[:, len(prompt) :].tolist(), strict=True):
        until_end = reference[: reference.index(END)] if END in reference else reference
        assert [token for token in mine if token >= 0] == until_end


def test_log_probability_is_that_of_the_caption_under_the_model(model, pixels) -> None:
    states = encode_images(model.vision_model, pixels[:1]).detach()
    decoded = run(model, states, greedy(1))
    tokens = [token for token in decoded.tokens[0, 0].tolist() if token >= 0]
    tokens += [END] if decoded.finished[0, 0] else []
    with torch.no_grad():
        logits = model.text_decoder(torch.tensor([[START, *tokens[:-1]]]), encoder_hidden_states=states).logits
    logits[0, :2, END] = -torch.inf  # the first two tokens may not end the caption
    scores = logits[0].log_softmax(-1)
    expected = torch.stack([scores[at, token] for at, token in enumerate(tokens)]).mean()
    torch.testing.assert_close(decoded.log_probs[0, 0], expected, atol=1e-4, rtol=1e-4)


def test_a_caption_does_not_depend_on_its_neighbours_in_the_batch(model, pixels) -> None:
    draws = torch.rand(6, 4, 12, generator=torch.Generator().manual_seed(7))
    draws[:, 0] = torch.nan
    with torch.inference_mode():
        states = encode_images(model.vision_model, pixels)
        together = run(model, states, draws)
        for order in ([3], [5, 0], [4, 2, 1]):
            part = run(model, encode_images(model.vision_model, pixels[order]), draws[order])
            assert torch.equal(part.tokens, together.tokens[order])


def test_captions_end_at_different_lengths_within_one_batch(model, pixels) -> None:
    draws = torch.rand(6, 4, 30, generator=torch.Generator().manual_seed(8))
    decoded = run(model, encode_images(model.vision_model, pixels).detach(), draws)
    lengths = (decoded.tokens >= 0).sum(-1)
    assert len(set(lengths.flatten().tolist())) > 2
    assert (lengths[decoded.finished] < 30).all()
    assert (lengths >= 2).all()


def test_sampling_follows_the_distribution_cut_at_top_p() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01])
    draws = torch.linspace(0, 0.9999, 1000).view(1, -1)
    tokens = _nucleus(probabilities.log().expand(1, 1000, 5), draws, 0.9)
    shares = torch.bincount(tokens.flatten(), minlength=5) / 1000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.0, 0.0]) / 0.95, atol=2e-3, rtol=0)


def test_draws_decide_what_is_sampled(model, pixels) -> None:
    states = encode_images(model.vision_model, pixels[:2]).detach()
    stream = random.Random(3)
    draws = torch.tensor([[[stream.random() for _ in range(12)] for _ in range(3)] for _ in range(2)])
    first, again = run(model, states, draws), run(model, states, draws)
    other = run(model, states, 1 - draws)
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)


def test_bf16_states_decode(model, pixels, tmp_path: Path) -> None:
    half = BlipForConditionalGeneration.from_pretrained(write_blip(tmp_path / "blip")).eval().to(torch.bfloat16)
    with torch.inference_mode():
        decoded = run(half, encode_images(half.vision_model, pixels.bfloat16()), greedy(6, 2))
    assert decoded.log_probs.isfinite().all()
