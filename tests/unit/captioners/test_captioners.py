"""The captioners of the table, on small random models in the real folder layouts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipForImageTextRetrieval, BlipProcessor, CLIPModel, CLIPProcessor

from helpers.tiny_captioners import write_blip, write_clip
from lora_scripts.captioners import CAPTIONERS, captioner_class
from lora_scripts.captioners.blip import Blip, ordered
from lora_scripts.captioners.clip_rerank import ClipBlip, ClipRanker, MatchingRanker
from lora_scripts.captioners.doubt import assess
from lora_scripts.captioners.folders import ModelFolder
from lora_scripts.captioners.protocol import Candidates, CaptionerSettings
from lora_scripts.errors import ConfigError, ModelError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_blip(root / "blip")
    write_blip(root / "matching", matching=True, seed=1)
    write_clip(root / "clip")
    return root


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (40, 56, 3), dtype=np.uint8)) for _ in range(5)]


def load(name: str, models: Path, **settings) -> Blip | ClipBlip:
    return captioner_class(name).load(str(models / "blip"), CPU, None, CaptionerSettings(max_tokens=10, **settings))


def captions(captioner, images, keys=None) -> list[Candidates]:
    return captioner.caption(
        [captioner.prepare(image) for image in images], keys or [str(i) for i in range(len(images))]
    )


def test_every_captioner_of_the_table_states_its_licence_and_memory() -> None:
    for name in CAPTIONERS:
        found = captioner_class(name)
        assert found.name == name
        assert found.licence
        assert found.memory


def test_an_unknown_captioner_gets_the_nearest_name() -> None:
    with pytest.raises(ModelError, match=r"no such captioner\. Did you mean clip-blip\?"):
        captioner_class("clipblip")


@pytest.mark.parametrize("decoding", ["greedy", "beam", "nucleus"])
def test_candidates_are_different_texts_best_first(models: Path, images, decoding: str) -> None:
    for found in captions(load("blip", models, decoding=decoding, num_candidates=4), images):
        assert 1 <= len(set(found.texts)) == len(found.texts) <= 4
        assert list(found.scores) == sorted(found.scores, reverse=True)
        assert all(0 < likelihood <= 1 for likelihood in found.likelihoods)
        assert len(found.truncated) == len(found.texts)


def test_beam_search_equals_that_of_transformers(models: Path, images) -> None:
    captioner = load("blip", models, decoding="beam")
    processor = BlipProcessor.from_pretrained(models / "blip")
    inputs = processor(images=images, return_tensors="pt")
    reference = captioner.model.generate(**inputs, num_beams=3, min_new_tokens=5, max_new_tokens=10, do_sample=False)
    texts = [text.strip() for text in processor.batch_decode(reference, skip_special_tokens=True)]
    assert [found.texts[0] for found in captions(captioner, images)] == texts


def test_greedy_captions_equal_those_of_transformers_from_the_same_picture(models: Path, images) -> None:
    captioner = load("blip", models)
    processor = BlipProcessor.from_pretrained(models / "blip")
    inputs = processor(images=images, return_tensors="pt")
    reference = captioner.model.generate(**inputs, min_new_tokens=5, max_new_tokens=10, do_sample=False)
    texts = [text.strip() for text in processor.batch_decode(reference, skip_special_tokens=True)]
    assert [found.texts[0] for found in captions(captioner, images)] == texts


def test_a_prompt_is_continued_as_by_transformers(models: Path, images) -> None:
    captioner = load("blip", models, prompt="a picture of")
    processor = BlipProcessor.from_pretrained(models / "blip")
    inputs = processor(images=images, text=["a picture of"] * len(images), return_tensors="pt")
    reference = captioner.model.generate(**inputs, min_new_tokens=5, max_new_tokens=10, do_sample=False)
    texts = [text.strip() for text in processor.batch_decode(reference, skip_special_tokens=True)]
    found = [candidates.texts[0] for candidates in captions(captioner, images)]
    assert found == texts
    assert all(text.startswith("a picture of") for text in found)


def test_a_prompt_that_leaves_no_room_is_refused(models: Path) -> None:
    with pytest.raises(ConfigError, match="leaves no room for a caption"):
        load("blip", models, prompt="cat " * 70)


@pytest.mark.parametrize("name", ["blip", "clip-blip"])
def test_the_same_picture_gets_the_same_captions_in_any_batch(models: Path, images, name: str) -> None:
    captioner = load(name, models, num_candidates=4, rank_model=str(models / "clip"))
    keys = [f"digest {number}" for number in range(len(images))]
    together = captions(captioner, images, keys)
    for order in ([2], [4, 0], [3, 1, 2]):
        part = captions(captioner, [images[i] for i in order], [keys[i] for i in order])
        assert [found.texts for found in part] == [together[i].texts for i in order]


def test_seed_and_key_decide_the_samples(models: Path, images) -> None:
    def texts(seed: int, key: str) -> tuple[str, ...]:
        return captions(load("blip", models, decoding="nucleus", num_candidates=3, seed=seed), images[:1], [key])[
            0
        ].texts

    assert texts(1, "a") == texts(1, "a")
    assert len({texts(1, "a"), texts(2, "a"), texts(1, "b")}) == 3


def test_clip_scores_are_those_of_transformers(models: Path, images) -> None:
    ranker = ClipRanker(ModelFolder(models / "clip", "clip", "folder"), CPU, torch.float32)
    texts = [["a cat", "a very long red dog, sitting"], ["a house"], ["a b", "c d", "e f"]]
    ours = ranker.score([ranker.prepare(image) for image in images[:3]], texts)
    model, processor = CLIPModel.from_pretrained(models / "clip").eval(), CLIPProcessor.from_pretrained(models / "clip")
    for image, group, row in zip(images[:3], texts, ours, strict=True):
        with torch.inference_mode():
            logits = model(**processor(text=group, images=image, return_tensors="pt", padding=True)).logits_per_image[0]
        assert row == pytest.approx(logits.tolist(), abs=1e-3)


def test_matching_scores_are_those_of_transformers(models: Path, images) -> None:
    ranker = MatchingRanker(ModelFolder(models / "matching", "matching", "folder"), CPU, torch.float32)
    texts = [["a cat", "a very long red dog sitting"], ["a house"]]
    ours = ranker.score([ranker.prepare(image) for image in images[:2]], texts)
    model = BlipForImageTextRetrieval.from_pretrained(models / "matching").eval()
    processor = BlipProcessor.from_pretrained(models / "matching")
    for image, group, row in zip(images[:2], texts, ours, strict=True):
        for text, score in zip(group, row, strict=True):
            with torch.inference_mode():
                logits = model(**processor(text=text, images=image, return_tensors="pt")).itm_score[0]
            assert score == pytest.approx(float(logits[1] - logits[0]), abs=1e-3)


def test_texts_longer_than_the_chooser_reads_are_scored_by_their_beginning(models: Path, images) -> None:
    long = "a red cat " * 60
    for ranker_class, folder in ((ClipRanker, "clip"), (MatchingRanker, "matching")):
        ranker = ranker_class(ModelFolder(models / folder, folder, "folder"), CPU, torch.float32)
        assert np.isfinite(ranker.score([ranker.prepare(images[0])], [[long]])[0][0])


@pytest.mark.parametrize("chooser", ["clip", "matching"])
def test_clip_blip_keeps_the_best_of_five_by_score_and_likelihood(models: Path, images, chooser: str) -> None:
    captioner = load("clip-blip", models, rank_model=str(models / chooser))
    assert captioner.models == {"model": str(models / "blip"), "rank_model": str(models / chooser)}
    found = captions(captioner, images)
    assert max(len(candidates.texts) for candidates in found) == 5
    prepared = [captioner.ranker.prepare(image) for image in images]
    for candidates, scores in zip(found, captioner.ranker.score(prepared, [c.texts for c in found]), strict=True):
        combined = np.array(scores) + 4 * np.log(candidates.likelihoods)
        assert candidates.scores == pytest.approx(combined, abs=1e-3)
        assert combined[0] == max(combined)


def test_clip_blip_without_a_second_model_tells_how_to_get_one(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("LORA_SCRIPTS_RANK_MODEL", raising=False)
    with pytest.raises(ModelError, match=r"needs a second model that chooses.*--captioner blip"):
        load("clip-blip", models)
    monkeypatch.setenv("LORA_SCRIPTS_RANK_MODEL", str(models / "matching"))
    assert load("clip-blip", models).models["rank_model"] == str(models / "matching")


def test_equal_texts_are_kept_once_with_their_best_score() -> None:
    found = ordered(["a", "b", "a"], [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [True, False, False])
    assert found == Candidates(("a", "b"), (0.3, 0.2), (0.6, 0.5), (False, False))


def test_doubt_rises_with_disagreement_and_with_faults_of_the_text() -> None:
    sure = Candidates(("a red cat on a beach", "a red cat at the beach"), (9.0, 1.0), (0.9, 0.8), (False, False))
    apart = Candidates(("a red cat on a beach", "two blue boats"), (9.0, 1.0), (0.9, 0.8), (False, False))
    cut = Candidates(("a red red cat on a beach", "two blue boats"), (9.0, 8.9), (0.3, 0.8), (True, False))
    doubts = [assess(candidates)[0] for candidates in (sure, apart, cut)]
    assert doubts == sorted(doubts)
    assert len(set(doubts)) == 3
    assert assess(sure)[1] == []
    assert assess(cut)[1] == [
        "unsure wording",
        "the candidates say different things",
        "cut off at the longest length",
        "repeats itself",
    ]
