"""The masked loss against the formulas of kohya's scripts and OneTrainer, and masks against torch's area interpolation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from helpers.reference_training import load_family
from helpers.tiny_diffusion import save_folder, tiny_parts
from lora_scripts.data.buckets import fit_image, fit_into
from lora_scripts.data.images import image_digest
from lora_scripts.data.masks import Mask, fitted_mask
from lora_scripts.families.protocol import Batch
from lora_scripts.objectives.denoising import Noised

KEYS = ("0/0/a", "0/0/b", "0/0/c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tiny_parts("sd15"), tmp_path_factory.mktemp("model"))


def objective(folder: Path, **settings: Any) -> Any:
    return load_family(folder, min_snr_gamma=0, **settings)._objective


def case(weights: tuple[float, ...] | None = None) -> tuple[Tensor, Noised, Batch, Tensor]:
    """A prediction, what was wanted, the batch, and the masks at the pictures' size: soft, small, empty."""
    torch.manual_seed(3)
    pixels = torch.zeros(3, 1, 64, 64)
    pixels[0] = torch.rand(1, 64, 64)
    pixels[1, :, 5:23, 11:30] = 1
    predicted, target = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    mask = F.interpolate(pixels, size=(8, 8), mode="area")
    own = {} if weights is None else {"weight": torch.tensor(weights)}
    batch = Batch({"mask": mask, **own}, [""] * 3, KEYS)
    return predicted, Noised(predicted, target, torch.tensor([10, 500, 900])), batch, pixels


def test_loss_is_kohyas_with_nothing_counted_outside(folder: Path) -> None:
    predicted, noised, batch, pixels = case()
    loss = objective(folder, masked_loss="alpha", masked_weight_outside=0).loss(predicted, noised, batch)
    errors = F.mse_loss(predicted, noised.target, reduction="none")
    expected = (errors * F.interpolate(pixels, size=errors.shape[2:], mode="area")).mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss.total / loss.count, expected.mean())


@pytest.mark.parametrize("normalize", [False, True])
def test_loss_is_onetrainers(folder: Path, normalize: bool) -> None:
    predicted, noised, batch, _ = case()
    loss = objective(folder, masked_loss="alpha", masked_normalize=normalize).loss(predicted, noised, batch)
    clamped = batch.tensors["mask"].clamp(0.1, 1)
    errors = F.mse_loss(predicted, noised.target, reduction="none") * clamped
    if normalize:
        errors = errors / clamped.mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(loss.total / loss.count, errors.mean(dim=(1, 2, 3)).mean())


def test_whole_mask_changes_nothing_and_an_empty_one_gives_zero(folder: Path) -> None:
    predicted, noised, batch, _ = case()
    plain = objective(folder).loss(predicted, noised, Batch({}, [""] * 3, KEYS))
    whole = Batch({"mask": torch.ones(3, 1, 8, 8)}, [""] * 3, KEYS)
    masked = objective(folder, masked_loss="alpha").loss(predicted, noised, whole)
    torch.testing.assert_close(masked.total, plain.total)
    torch.testing.assert_close(masked.per_example, plain.per_example)
    for normalize in (False, True):
        loss = objective(folder, masked_loss="alpha", masked_weight_outside=0, masked_normalize=normalize).loss(
            predicted, noised, batch
        )
        assert loss.total.isfinite()
        assert loss.per_example[2] == 0


def test_measured_loss_of_a_picture_is_the_mean_over_its_mask(folder: Path) -> None:
    predicted, noised, batch, _ = case()
    loss = objective(folder, masked_loss="alpha", masked_weight_outside=0).loss(predicted, noised, batch)
    errors, mask = (predicted - noised.target).square(), batch.tensors["mask"].expand(3, 4, 8, 8)
    expected = (errors[1] * mask[1]).sum() / mask[1].sum()
    torch.testing.assert_close(loss.per_example[1], expected)


def test_weights_of_pictures_multiply_their_losses(folder: Path) -> None:
    weights = (1.0, 0.25, 3.0)
    learner = objective(folder, masked_loss="alpha")
    predicted, noised, batch, _ = case(weights)
    whole = learner.loss(predicted, noised, batch)
    alone = [
        learner.loss(
            predicted[i : i + 1],
            Noised(predicted[i : i + 1], noised.target[i : i + 1], noised.timesteps[i : i + 1]),
            Batch({"mask": batch.tensors["mask"][i : i + 1]}, [""], KEYS[i : i + 1]),
        ).total
        for i in range(3)
    ]
    torch.testing.assert_close(whole.total, sum(w * each for w, each in zip(weights, alone, strict=True)))


@pytest.mark.parametrize("mirrored", [False, True])
def test_mask_goes_the_way_of_its_picture(folder: Path, tmp_path: Path, mirrored: bool) -> None:
    """A mask that equals its picture stays equal to it, up to the two filters that scale them, at another size too."""
    row = Image.linear_gradient("L").resize((180, 120))
    row.save(tmp_path / "a.png")
    fit = fit_into((180, 120), [(64, 64), (80, 48)])
    seen = torch.tensor(list(fit_image(row.convert("RGB"), fit, mirrored).convert("L").tobytes())) / 255
    for size in ((180, 120), (360, 240), (90, 60)):
        row.resize(size).save(tmp_path / "mask.png")
        mask = Mask("file", tmp_path / "mask.png", image_digest(tmp_path / "mask.png"), size)
        fitted = fitted_mask(mask, fit, mirrored)
        assert fitted.shape == (1, fit.bucket[1], fit.bucket[0])
        assert (fitted.flatten() - seen).abs().max() < 0.02
    encoder = next(each for each in load_family(folder, masked_loss="folder").encoders() if each.reads == "mask")
    latent = encoder.run([fitted])[0]["mask"]
    torch.testing.assert_close(latent[None], F.interpolate(fitted[None], scale_factor=1 / 8, mode="area"))
