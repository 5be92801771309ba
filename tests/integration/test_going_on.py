"""`init_lora_weights` with files of every kind: what is taken over to the letter, what by SVD, what is left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.seen import StopAfter, train
from helpers.tiny_causal_lms import probe, tiny_model
from lora_scripts.adapters.loha_weights import LoHaTensors
from lora_scripts.adapters.lora import Adapter, attach
from lora_scripts.adapters.weights import FullTensors, LayerChange, LoRATensors
from lora_scripts.attaching import go_on_from, open_for_init
from lora_scripts.errors import ModelError, ResumeError
from lora_scripts.export.names import kohya_file_names, layer_shapes
from lora_scripts.export.writer import write_lora
from lora_scripts.training.events import Listener
from unit.sampling.tiny_sd import random_lora, tiny_parts

Settings = Callable[..., dict[str, Any]]
QUERY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "unet.down_blocks.0.resnets.0.conv1"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def on(target: str = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", **form: Any) -> Adapter:
    """An adapter on one layer of the tiny model."""
    return attach({"unet": tiny_parts().unet}, {"unet": [target]}, **{"rank": 3, "alpha": 5.0, **form})


def file_of(path: Path, changes: Mapping[str, LayerChange]) -> Path:
    names = kohya_file_names(tiny_parts().components, "sd15")
    parts = {f"{names[layer]}.{part}": t for layer, change in changes.items() for part, t in change.parts().items()}
    save_file({name: tensor.contiguous() for name, tensor in parts.items()}, path)
    return path


def started(adapter: Adapter, path: Path) -> list[str]:
    return go_on_from(adapter, open_for_init(path, layer_shapes(tiny_parts().components)))


def plain(layer: str, rank: int = 3, alpha: float = 5.0) -> LoRATensors:
    out, *inside = layer_shapes(tiny_parts().components)[layer]
    return LoRATensors(draw(rank, *inside), draw(out, rank, *[1] * (len(inside) - 1)), alpha)


def loha(layer: str, rank: int = 2) -> LoHaTensors:
    shape = out, inside = layer_shapes(tiny_parts().components)[layer]
    factors = [draw(*size, seed=n) for n, size in enumerate([(out, rank), (rank, inside)] * 2)]
    return LoHaTensors(*factors, 4.0, shape)


def test_lora_of_the_same_rank_and_alpha_is_taken_over_to_the_bit(tmp_path: Path) -> None:
    adapter, older = on(), plain(QUERY)
    assert started(adapter, file_of(tmp_path / "a.safetensors", {QUERY: older})) == []
    assert torch.equal(adapter.layers[QUERY].lora_A, older.lora_A)
    assert torch.equal(adapter.layers[QUERY].lora_B, older.lora_B)


@pytest.mark.parametrize("rank", [3, 5])
def test_dora_goes_on_with_its_lengths(tmp_path: Path, rank: int) -> None:
    lengths = draw(16).abs() + 0.5
    older = LoRATensors(plain(QUERY).lora_A, plain(QUERY).lora_B, 5.0, lengths)
    adapter = on(kind="dora", rank=rank)
    started(adapter, file_of(tmp_path / "a.safetensors", {QUERY: older}))
    weight = adapter.base_weight(QUERY)
    assert torch.equal(adapter.layers[QUERY].magnitude, lengths)
    torch.testing.assert_close(adapter.weights()[QUERY].delta(weight), older.delta(weight))


def test_dora_that_is_cut_keeps_its_lengths(tmp_path: Path) -> None:
    lengths = draw(16).abs() + 0.5
    older = LoRATensors(plain(QUERY).lora_A, plain(QUERY).lora_B, 5.0, lengths)
    adapter = on(kind="dora", rank=2)
    (told,) = started(adapter, file_of(tmp_path / "a.safetensors", {QUERY: older}))
    assert "cut to rank 2 by SVD" in told
    assert torch.equal(adapter.layers[QUERY].magnitude, lengths)


def dora_of_a_lora(weight: torch.Tensor) -> LoRATensors:
    lora = plain(QUERY)
    return LoRATensors(lora.lora_A, lora.lora_B, 5.0, (weight + lora.delta()).norm(dim=1) * 1.5)


@pytest.mark.parametrize("kind", ["DoRA", "LoHa", "full difference"])
@pytest.mark.parametrize("rank", [2, 4])
def test_other_kind_becomes_its_best_low_rank_change(tmp_path: Path, kind: str, rank: int) -> None:
    adapter = on(rank=rank)
    weight = adapter.base_weight(QUERY)
    changes: dict[str, LayerChange] = {
        "DoRA": dora_of_a_lora(weight),
        "LoHa": loha(QUERY),
        "full difference": FullTensors(draw(*weight.shape)),
    }
    (told,) = started(adapter, file_of(tmp_path / "a.safetensors", {QUERY: changes[kind]}))
    delta = changes[kind].delta(weight).double()
    left, values, right = torch.linalg.svd(delta)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    torch.testing.assert_close(adapter.weights()[QUERY].delta().double(), best, rtol=1e-4, atol=1e-4)
    kept = 100 * float(values[:rank].square().sum() / values.square().sum())
    found = re.fullmatch(
        rf"init_lora_weights: 1 layer of a {kind} brought to rank {rank} by SVD, ([\d.]+) % of their change kept .*",
        told,
    )
    assert found is not None, told
    assert float(found[1]) == pytest.approx(kept, abs=0.06)
    assert ("base_loras" in told) is (kept < 50)


def test_loha_of_rank_two_is_whole_in_rank_four(tmp_path: Path) -> None:
    adapter, older = on(rank=4), loha(QUERY)
    (told,) = started(adapter, file_of(tmp_path / "a.safetensors", {QUERY: older}))
    torch.testing.assert_close(adapter.weights()[QUERY].delta(), older.delta(), rtol=1e-4, atol=1e-4)
    assert "100.0 % of their change kept" in told


def test_convolution_of_another_kind_keeps_its_kernel(tmp_path: Path) -> None:
    adapter = on("down_blocks.0.resnets.0.conv1", rank=8)
    older = plain(CONVOLUTION, rank=4)
    whole = FullTensors(older.delta())
    started(adapter, file_of(tmp_path / "a.safetensors", {CONVOLUTION: whole}))
    torch.testing.assert_close(adapter.weights()[CONVOLUTION].delta(), older.delta(), rtol=1e-4, atol=1e-4)


def test_layers_that_do_not_train_are_named_with_the_ways_to_keep_them(tmp_path: Path) -> None:
    text = "text_encoder.encoder.layers.0.self_attn.q_proj"
    text = text if text in layer_shapes(tiny_parts().components) else text.replace("encoder.", "text_model.encoder.", 1)
    path = file_of(tmp_path / "a.safetensors", {name: plain(name) for name in (QUERY, CONVOLUTION, text)})
    told = "\n".join(started(on(), path))
    assert f"2 layers that do not train here left out: {CONVOLUTION}, " in told or text in told
    assert "train_text_encoder: true trains those of the text encoder" in told
    assert "adapter: locon trains convolutions" in told
    assert "base_loras" in told


def test_file_for_another_model_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "wide.safetensors"
    write_lora(path, random_lora(tiny_parts(context=24)), {}, torch.float32)
    with pytest.raises(ModelError, match=r"init_lora_weights: .*wide\.safetensors: .*another base"):
        started(on("attn2.to_k"), path)


def test_damaged_layer_is_refused(tmp_path: Path) -> None:
    parts = plain(QUERY).parts()
    name = kohya_file_names(tiny_parts().components, "sd15")[QUERY]
    save_file({f"{name}.lora_down.weight": parts["lora_down.weight"]}, tmp_path / "half.safetensors")
    with pytest.raises(ModelError, match=r"init_lora_weights: .*half\.safetensors: .*lacks its up matrix"):
        started(on(), tmp_path / "half.safetensors")


def test_run_goes_on_from_a_loha(settings: Settings, tmp_path: Path) -> None:
    older = file_of(tmp_path / "loha.safetensors", {QUERY: loha(QUERY)})
    seen = train(settings(init_lora_weights=str(older), max_steps=1))
    assert any("1 layer of a LoHa brought to rank 2 by SVD" in note for note in seen.notes)
    assert any("not in it, so starting new, 31 layers" in note for note in seen.notes)


@pytest.mark.parametrize("mine", ["lora", "dora"])
def test_language_run_goes_on_from_a_dora_of_peft(tmp_path: Path, mine: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama").requires_grad_(False)
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_dora=True)
    torch.manual_seed(5)
    theirs = get_peft_model(tiny_model("llama"), settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
        wanted = theirs(probe()).logits
    theirs.save_pretrained(tmp_path / "dora")
    components = {"language_model": model}
    older = open_for_init(tmp_path / "dora", layer_shapes(components))
    adapter = attach(components, {"language_model": ["q_proj", "down_proj"]}, rank=4, alpha=4.0, kind=mine)
    with torch.no_grad():
        plain_logits = model(probe()).logits
        told = go_on_from(adapter, older)
        logits = model(probe()).logits
    if mine == "dora":
        assert told == []
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    else:
        assert "4 layers of a DoRA brought to rank 4 by SVD" in told[0]
        assert (logits - wanted).norm() < 0.7 * (plain_logits - wanted).norm()


def losses_of(values: dict[str, Any], *more: Listener) -> list[float]:
    return [loss for report in train(values, *more).reports for loss in report.losses]


def test_run_that_goes_on_does_not_replay_the_noise_of_the_older_run(settings: Settings, tmp_path: Path) -> None:
    # At this rate hardly any weight moves, so the losses tell the noise and the order alone.
    still = settings(learning_rate=1e-7, log_steps=1, save_precision="fp32")

    def into(folder: str, **more: Any) -> dict[str, Any]:
        return still | {"output_dir": str(tmp_path / folder / "run")} | more

    first, again = losses_of(into("first")), losses_of(into("again"))
    older = tmp_path / "first" / "run" / "run.safetensors"
    second = losses_of(into("second", init_lora_weights=str(older)))
    assert first == again
    assert len(first) == len(second) == 6
    assert all(abs(a - b) > 1e-5 for a, b in zip(first, second, strict=True))


def test_run_that_goes_on_and_was_stopped_resumes_to_the_same_bits(settings: Settings, tmp_path: Path) -> None:
    older = file_of(tmp_path / "older.safetensors", {QUERY: plain(QUERY)})
    changes = {"init_lora_weights": str(older), "lora_dropout": 0.1, "save_precision": "fp32"}
    whole, broken = (settings(output_dir=str(tmp_path / name / "run"), **changes) for name in "ab")
    train(whole)
    assert len(losses_of(broken, StopAfter(3))) == 3
    train(broken)
    left, right = (load_file(Path(values["output_dir"]) / "run.safetensors") for values in (whole, broken))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_changed_file_to_go_on_from_is_refused_on_resume(settings: Settings, tmp_path: Path) -> None:
    older = file_of(tmp_path / "older.safetensors", {QUERY: plain(QUERY)})
    values = settings(init_lora_weights=str(older), max_steps=2)
    train(values)
    file_of(older, {QUERY: plain(QUERY, alpha=4.0)})
    with pytest.raises(ResumeError, match=r'LoRA to go on from: was "sha256 .*is now "sha256'):
        train(values)
