"""Other kinds as plain LoRAs: the same change, at the least rank that the kind needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora_scripts.adapters.loha_weights import LoHaTensors
from lora_scripts.adapters.lora import attach
from lora_scripts.adapters.plain_forms import plain_form
from lora_scripts.adapters.weights import LayerChange
from lora_scripts.export.bake import bake

LAYERS = {"linear": lambda: nn.Linear(24, 40), "conv": lambda: nn.Conv2d(24, 40, 3)}


def changes(layer: str, **settings: object) -> tuple[LayerChange, Tensor]:
    torch.manual_seed(0)
    net = nn.ModuleDict({"x": LAYERS[layer]()})
    adapter = attach({"net": net}, {"net": ["x"]}, **({"rank": 3, "alpha": 5.0} | settings))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return adapter.weights()["net.x"], adapter.base_weight("net.x")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("settings", "rank"),
    [({"kind": "loha"}, 9), ({"kind": "lokr", "lokr_factor": 4}, 12), ({"kind": "lokr", "lokr_factor": 5}, 12)],
)
def test_plain_form_is_the_same_change(layer: str, settings: dict[str, object], rank: int) -> None:
    change, _ = changes(layer, **settings)
    plain = plain_form(change, 100)
    assert plain is not None
    assert plain.rank == rank
    torch.testing.assert_close(plain.delta(), change.delta(), rtol=1e-5, atol=1e-6)
    assert torch.linalg.matrix_rank(change.delta().flatten(1)) == rank
    assert plain_form(change, rank - 1) is None


def test_plain_form_of_a_loha_in_tucker_form_is_the_same_change() -> None:
    torch.manual_seed(0)
    sides = [torch.randn(2, n) for n in (10, 6, 10, 6)]
    change = LoHaTensors(*sides, 3.0, (10, 6, 3, 3), torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3))
    plain = plain_form(change, 4)
    assert plain is not None
    torch.testing.assert_close(plain.delta(), change.delta(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"kind": "oft"}, {"kind": "lokr", "rank": 12}, {"kind": "dora"}], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_bake_comes_nearest_where_there_is_no_plain_form_and_tells_the_error(
    layer: str, settings: dict[str, object]
) -> None:
    change, weight = changes(layer, **settings)
    plain, baked = bake({"net.x": change}, lambda name: weight)
    delta = change.delta(weight)
    missing = (plain["net.x"].delta() - delta).norm() / delta.norm()
    assert baked.error == pytest.approx(float(missing), abs=1e-5)
    assert baked.num_approximated == 1
    assert str(baked).startswith({"oft": "OFT", "lokr": "LoKr", "dora": "DoRA"}[str(settings["kind"])])


def test_bake_of_a_loha_loses_nothing() -> None:
    change, _ = changes("linear", kind="loha")
    plain, baked = bake({"net.x": change})
    assert baked.exact
    torch.testing.assert_close(plain["net.x"].delta(), change.delta(), rtol=1e-5, atol=1e-6)
