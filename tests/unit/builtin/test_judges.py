"""The judges read what a picture shows; the built-in weights are found, or their absence is explained."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lora_scripts.builtin.judges import (
    LOOKS,
    Judges,
    attribute_reader,
    load_judges,
    style_reader,
    to_pixel_values,
)
from lora_scripts.builtin.weights import BUILTIN_NAMES, builtin_path, is_builtin
from lora_scripts.builtin.world import ATTRIBUTES, STYLES, draw, random_scene
from lora_scripts.errors import ModelError


@pytest.fixture(scope="module")
def judges() -> Judges:
    return load_judges()


def _fresh_scenes(count, seed):
    rng = np.random.default_rng(seed)
    return [random_scene(rng, "any") for _ in range(count)]


def test_unknown_builtin_name_is_refused_with_the_nearest_one():
    with pytest.raises(ModelError, match=r"builtin:mini-ds: there is no such built-in model\. Did you mean mini-sd\?"):
        builtin_path("builtin:mini-ds")


def test_missing_weights_name_the_folder_and_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_SCRIPTS_BUILTIN_DIR", str(tmp_path))
    with pytest.raises(ModelError, match=r"its weights are not at .*mini-sd.*tools/make_builtin"):
        builtin_path("mini-sd")


def test_environment_variable_names_another_folder_of_weights(tmp_path, monkeypatch):
    (tmp_path / "mini-clip").mkdir()
    monkeypatch.setenv("LORA_SCRIPTS_BUILTIN_DIR", str(tmp_path))
    assert builtin_path("builtin:mini-clip") == builtin_path("mini-clip") == tmp_path / "mini-clip"


def test_only_names_with_the_prefix_are_builtin():
    assert is_builtin("builtin:mini-sd")
    assert not is_builtin("models/mini-sd")
    assert len(set(BUILTIN_NAMES)) == len(BUILTIN_NAMES)


def test_pixel_values_lie_in_minus_one_to_one_whatever_the_mode_and_size():
    pictures = [Image.new("L", (64, 200), 255), Image.new("RGBA", (128, 128), (0, 0, 0, 255))]
    values = to_pixel_values(pictures)
    assert values.shape == (2, 3, 128, 128)
    assert torch.all(values[0] == 1)
    assert torch.all(values[1] == -1)


def test_readers_stay_under_a_million_parameters_with_one_head_per_kind():
    reader = attribute_reader()
    logits = reader.eval()(torch.zeros(2, 3, 128, 128))
    assert {kind: row.shape for kind, row in logits.items()} == {k: (2, len(v)) for k, v in ATTRIBUTES.items()}
    assert sum(p.numel() for r in (reader, style_reader()) for p in r.parameters()) < 1_000_000


def test_weights_made_for_other_styles_are_refused(tmp_path):
    for name, reader in (("attributes", attribute_reader()), ("styles", style_reader())):
        save_file(reader.state_dict(), tmp_path / f"{name}.safetensors")
    config = {"attributes": {k: list(v) for k, v in ATTRIBUTES.items()}, "looks": ["plain", "fresco"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trained for other attributes or styles"):
        load_judges(tmp_path)


def test_no_pictures_give_no_answers(judges):
    assert judges.read_attributes([]) == []
    assert judges.read_style([]) == []


def test_attributes_of_fresh_plain_pictures_are_read_right(judges):
    scenes = _fresh_scenes(60, seed=701)
    read = judges.read_attributes([draw(scene, 50_000_000 + i) for i, scene in enumerate(scenes)])
    for kind in ATTRIBUTES:
        right = np.mean([row[kind] == getattr(scene, kind) for row, scene in zip(read, scenes, strict=True)])
        assert right >= 0.95, f"{kind}: {right:.3f}"


def test_every_look_of_fresh_pictures_is_told_apart(judges):
    scenes = _fresh_scenes(6, seed=702)
    for look in LOOKS:
        style = look if look in STYLES else None
        answers = judges.read_style([draw(scene, 50_100_000 + i, style) for i, scene in enumerate(scenes)])
        assert answers.count(look) >= 5, f"{look} read as {answers}"


def test_style_probabilities_sum_to_one_and_agree_with_the_answer(judges):
    pictures = [draw(scene, 50_200_000 + i, "neon") for i, scene in enumerate(_fresh_scenes(3, seed=703))]
    rows = judges.style_probabilities(pictures)
    assert all(sum(row.values()) == pytest.approx(1, abs=1e-4) for row in rows)
    assert [max(row, key=row.__getitem__) for row in rows] == judges.read_style(pictures)


def test_one_batch_and_many_give_the_same_answers(judges):
    pictures = [draw(scene, 50_300_000 + i) for i, scene in enumerate(_fresh_scenes(5, seed=704))]
    small = Judges(judges.attributes, judges.styles, batch_size=2)
    assert small.read_attributes(pictures) == judges.read_attributes(pictures)
