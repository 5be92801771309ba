"""The header texts of a LoRA file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.export.metadata import MAX_HEADER_BYTES, RunFacts, file_metadata, fit_metadata, metadata_bytes
from lora_scripts.export.writer import write_lora

FACTS = RunFacts(
    output_name="ink",
    base_model_version="sd_v1",
    modelspec_architecture="stable-diffusion-v1/lora",
    rank=8,
    alpha=4.0,
    base_model="C:\\Users\\mei\\models\\v1-5-pruned.safetensors",
    base_model_hash="cc6cb27103",
    steps=120,
    epochs=10,
    learning_rate=2e-4,
    optimizer="adamw",
    lr_scheduler="cosine",
    seed=42,
    resolution=(512, 768),
    buckets={(512, 768): 20, (768, 512): 4},
    num_images=24,
    dataset_dirs={"/home/mei/secret project/style_train": (1, 24)},
    tag_frequency={"style_train": {"ink wash": 24, "狐狸": 3, "house": 5}},
    trigger_word="inkwash style",
    started_at=1_700_000_000.5,
    finished_at=1_700_000_900.0,
)

ALL = [
    "ss_base_model_version",
    "ss_v2",
    "ss_output_name",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "ss_sd_model_name",
    "ss_sd_model_hash",
    "ss_clip_skip",
    "ss_resolution",
    "ss_num_train_images",
    "ss_num_reg_images",
    "ss_bucket_info",
    "ss_dataset_dirs",
    "ss_tag_frequency",
    "ss_training_started_at",
    "ss_seed",
    "ss_steps",
    "ss_epoch",
    "ss_learning_rate",
    "ss_optimizer",
    "ss_lr_scheduler",
    "modelspec.sai_model_spec",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.title",
    "modelspec.resolution",
    "modelspec.date",
    "modelspec.trigger_phrase",
]


def test_every_expected_entry_is_there_and_is_a_text() -> None:
    texts = file_metadata(replace(FACTS, thumbnail="data:image/jpeg;base64,AAAA"))
    assert not [key for key in (*ALL, "modelspec.thumbnail") if not texts.get(key)]
    assert all(isinstance(value, str) for value in texts.values())


def test_values_are_spelt_as_the_readers_expect() -> None:
    texts = file_metadata(FACTS)
    assert texts["ss_v2"] == "False"  # the WebUI compares with the text "True"
    assert (texts["ss_network_dim"], texts["ss_network_alpha"]) == ("8", "4")
    assert texts["ss_resolution"] == "(512, 768)"
    assert texts["ss_clip_skip"] == "None"
    assert float(texts["ss_training_started_at"]) == 1_700_000_000.5
    assert texts["modelspec.date"] == "2023-11-14T22:28:20Z"
    assert texts["modelspec.resolution"] == "512x768"
    buckets = json.loads(texts["ss_bucket_info"])["buckets"]
    assert buckets["0"] == {"resolution": [512, 768], "count": 20}
    assert json.loads(texts["ss_tag_frequency"]) == {"style_train": {"ink wash": 24, "house": 5, "狐狸": 3}}
    assert json.loads(texts["ss_dataset_dirs"]) == {"style_train": {"n_repeats": 1, "img_count": 24}}
    assert file_metadata(replace(FACTS, is_v2=True))["ss_v2"] == "True"
    assert file_metadata(replace(FACTS, prediction_type="v_prediction"))["modelspec.prediction_type"] == "v"


def test_folders_of_the_user_do_not_appear() -> None:
    text = json.dumps(file_metadata(FACTS))
    assert "v1-5-pruned.safetensors" in text
    assert "mei" not in text
    assert "secret project" not in text


def test_public_level_leaves_out_tags_and_folders_but_keeps_what_the_webui_needs() -> None:
    texts = file_metadata(FACTS, "public")
    shown = json.dumps(texts, ensure_ascii=False)
    assert "style_train" not in shown
    assert "狐狸" not in shown
    for key in (
        "ss_base_model_version",
        "ss_v2",
        "ss_output_name",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
    ):
        assert texts[key]
    assert set(file_metadata(FACTS)) - set(texts) == {
        "ss_tag_frequency",
        "ss_dataset_dirs",
        "ss_reg_dataset_dirs",
    }


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcdefghijklmnopqrstuvwx",
        "sk-proj-abcdefghijklmnop1234",
        "ghp_abcdefghijklmnopqrstuvwxyz0123",
        "AKIAABCDEFGHIJKLMNOP",
        "https://mei:passw0rd@example.org/model",
        "https://example.org/model?token=geheim123",
    ],
)
def test_keys_and_tokens_never_reach_the_header(secret: str) -> None:
    facts = replace(FACTS, description=f"made with {secret} at home", base_model=secret, network_args={"note": secret})
    text = json.dumps(file_metadata(facts))
    for part in ("abcdefghijklmnop", "ABCDEFGHIJKLMNOP", "passw0rd", "geheim123"):
        assert part not in text
    assert "made with" in text


def test_long_tag_lists_lose_the_rarest_tags_first() -> None:
    tags = {f"tag {index} 汉字": 20_000 - index for index in range(20_000)}
    texts = file_metadata(replace(FACTS, tag_frequency={"a": tags, "b": {"one": 1}}))
    kept = json.loads(texts["ss_tag_frequency"])["a"]
    assert metadata_bytes(texts) <= 100_000
    assert list(kept) == list(tags)[: len(kept)]
    assert len(kept) > 500


def test_an_overlong_thumbnail_goes_before_the_tags() -> None:
    texts = fit_metadata(
        {"modelspec.thumbnail": "x" * 5000, "ss_tag_frequency": '{"a": {"t": 1}}', "ss_v2": "False"}, 1000
    )
    assert texts == {"ss_tag_frequency": '{"a": {"t": 1}}', "ss_v2": "False"}


def layer(rank: int = 4, width: int = 64) -> LoRATensors:
    return LoRATensors(torch.randn(rank, width), torch.randn(width, rank), 2.0)


def test_header_stays_under_its_limit_with_as_many_layers_as_sd15_has(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.{}"
    weights = {name.format(index): layer() for index in range(330)}
    tags = {f"tag {index}": 20_000 - index for index in range(20_000)}
    path = tmp_path / "a.safetensors"
    texts = write_lora(path, weights, file_metadata(replace(FACTS, tag_frequency={"a": tags})), torch.float16)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length < MAX_HEADER_BYTES
    assert json.loads(texts["ss_tag_frequency"])["a"]["tag 0"] == 20_000


def test_hashes_are_those_of_the_tensor_part(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {f"unet.layer{index}.to_q": layer(16, 1024) for index in range(40)}
    path = tmp_path / "a.safetensors"
    texts = write_lora(path, weights, file_metadata(FACTS), torch.float16)
    data = path.read_bytes()
    tensor_part = data[8 + int.from_bytes(data[:8], "little") :]
    assert texts["sshs_model_hash"] == hashlib.sha256(tensor_part).hexdigest()
    assert texts["modelspec.hash_sha256"] == "0x" + texts["sshs_model_hash"]
    assert len(data) > 0x110000
    assert len(texts["sshs_legacy_hash"]) == 8
    # Another title in the header leaves both hashes: they name the tensors and the training.
    renamed = {**file_metadata(FACTS), "modelspec.title": "another"}
    again = write_lora(tmp_path / "b.safetensors", weights, renamed, torch.float16)
    assert again["sshs_model_hash"] == texts["sshs_model_hash"]
    assert again["sshs_legacy_hash"] == texts["sshs_legacy_hash"]
