"""What is measured on pictures: hashes, sharpness, and how they are kept."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.checked_sets import check, clean_set, spoil
from lora_scripts.builtin.world import draw, random_scene
from lora_scripts.config import RunConfig
from lora_scripts.data.cache import EncodingCache
from lora_scripts.data.dataset import open_dataset
from lora_scripts.preflight import gather
from lora_scripts.preflight.likeness import difference_hash, near_duplicates, small_copy
from lora_scripts.preflight.picture_facts import PictureFacts, measure
from lora_scripts.preflight.sharpness import sharpness


def scenes(number: int, style: str) -> list[Image.Image]:
    rng = np.random.default_rng(7)
    return [draw(random_scene(rng), i, size=128, style=style) for i in range(number)]


def groups(images: list[Image.Image]) -> list[list[int]]:
    return near_duplicates([difference_hash(image) for image in images], [small_copy(image) for image in images])


@pytest.mark.parametrize("style", ["ink wash", "blueprint", "neon"])
def test_different_scenes_of_one_style_are_no_duplicates(style: str) -> None:
    assert groups(scenes(60, style)) == []


def test_every_recompressed_scene_finds_its_original() -> None:
    originals = scenes(20, "ink wash")
    copies = []
    for image in originals:
        file = io.BytesIO()
        image.resize((112, 112), Image.Resampling.LANCZOS).save(file, "JPEG", quality=75)
        copies.append(Image.open(file))
    assert groups([*originals, *copies]) == [[i, i + 20] for i in range(20)]


def test_same_shapes_in_another_colour_are_no_duplicates() -> None:
    from dataclasses import replace

    scene = random_scene(np.random.default_rng(0))
    one, other = (draw(replace(scene, colour=colour), 3, size=128) for colour in ("red", "blue"))
    assert groups([one, other]) == []


def test_copies_are_found_across_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_scripts.preflight.likeness.ROWS", 2)
    images = scenes(5, "neon")
    assert groups([*images, images[0], images[3], images[0]]) == [[0, 5, 7], [3, 6]]


def test_sharpness_does_not_depend_on_contrast_and_falls_with_blur() -> None:
    from PIL import ImageFilter

    image = scenes(1, "woodcut")[0].convert("L").resize((512, 512), Image.Resampling.NEAREST)
    levels = np.asarray(image, np.float32)
    full, half = sharpness(levels), sharpness(levels / 2)
    assert full is not None
    assert half == pytest.approx(full, rel=0.1)
    blurred = [sharpness(np.asarray(image.filter(ImageFilter.GaussianBlur(r)), np.float32)) for r in (1, 2, 4)]
    assert [full, *blurred] == sorted([full, *blurred], reverse=True)
    assert blurred[-1] < 0.015 < full / 10


def test_sharpness_of_what_is_tiny_or_even_is_not_told() -> None:
    assert sharpness(np.random.default_rng(0).uniform(0, 255, (40, 90)).astype(np.float32)) is None
    assert sharpness(np.full((128, 128), 30, np.float32)) is None


def test_facts_survive_being_stored(tmp_path: Path) -> None:
    scenes(1, "neon")[0].save(tmp_path / "a.png")
    facts = measure(tmp_path / "a.png")
    back = PictureFacts.from_tensors(facts.to_tensors())
    assert (back.hash, back.sharpness, back.spread, back.brightest, back.bars) == (
        facts.hash,
        facts.sharpness,
        facts.spread,
        facts.brightest,
        facts.bars,
    )
    assert np.array_equal(back.copy, facts.copy)
    assert np.array_equal(back.patches, facts.patches)


def test_second_check_decodes_only_what_changed_or_was_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pictures"
    clean_set(folder, 6)
    decoded: list[str] = []

    def counting(path: Path) -> PictureFacts:
        decoded.append(path.name)
        return measure(path)

    monkeypatch.setattr(gather, "measure", counting)
    cache = tmp_path / "cache"
    first = check(folder, cache_dir=cache)
    assert len(decoded) == 6
    assert check(folder, cache_dir=cache) == first
    assert len(decoded) == 6
    spoil(folder / "03.png", lambda image: image.rotate(90))
    entry = next(iter(cache.rglob("*.safetensors")))
    entry.write_bytes(entry.read_bytes()[:-1])
    check(folder, cache_dir=cache)
    assert len(decoded) in (7, 8)  # the damaged entry may be the one of the changed picture
    assert "03.png" in decoded[6:]


def test_facts_of_a_file_that_changes_while_it_is_read_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = tmp_path / "pictures", tmp_path / "cache"
    clean_set(folder, 6)

    def meddling(path: Path) -> PictureFacts:
        if path.name == "03.png":
            spoil(path, lambda image: image.rotate(180))
        return measure(path)

    monkeypatch.setattr(gather, "measure", meddling)
    check(folder, cache_dir=cache)
    assert len(list((cache / "facts").rglob("*.safetensors"))) == 5


def test_stopping_does_not_wait_for_the_pictures_in_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "pictures"
    clean_set(folder, 12, size=64)
    begun = []
    plain = gather.measure

    def slow(path: Path) -> PictureFacts:
        begun.append(path)
        time.sleep(0.05)
        return plain(path)

    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gather, "measure", slow)
    config = RunConfig.model_validate(
        {"train_data_dir": folder, "base_model": "-", "output_dir": tmp_path / "run", "num_workers": 1}
    )
    with pytest.raises(KeyboardInterrupt):
        gather.gather(config, open_dataset(config, (64, 64)), EncodingCache(None), stop)
    assert len(begun) < 6
