"""DPO and ORPO against the papers' formulas, against each text alone in transformers, and against TRL where it is installed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.tiny_causal_lms import save_tiny, tokenizer
from lora_scripts.config import RunConfig
from lora_scripts.data.cache import EncodingCache
from lora_scripts.data.sampler import Sample
from lora_scripts.dialogues.pair_batches import PairBatches
from lora_scripts.dialogues.reading import read_dialogues
from lora_scripts.dialogues.reference import with_reference
from lora_scripts.families.causal_lm import CausalLanguageModel
from lora_scripts.objectives.preference import Preference, dpo_losses, orpo_losses
from lora_scripts.training.draws import Draws

CPU = torch.device("cpu")
ROWS = [
    {"prompt": "1 and 1?", "chosen": "2", "rejected": "11, I think"},
    {"prompt": "2 and 3?", "chosen": "5, my friend", "rejected": "no"},
    {"prompt": "why?", "chosen": "so it is", "rejected": "so it was"},
]


def test_dpo_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    log_probs, reference = -20 * torch.rand(2, 5), -20 * torch.rand(2, 5)
    for pair in range(5):
        (won, lost), (ref_won, ref_lost) = log_probs[:, pair].tolist(), reference[:, pair].tolist()
        expected = -math.log(1 / (1 + math.exp(-(0.3 * (won - ref_won) - 0.3 * (lost - ref_lost)))))
        assert float(dpo_losses(log_probs, reference, 0.3)[pair]) == pytest.approx(expected, rel=1e-5)


def test_orpo_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    means = -3 * torch.rand(2, 5) - 0.01
    for pair in range(5):
        won, lost = (math.exp(mean) for mean in means[:, pair].tolist())
        odds_ratio = (won / (1 - won)) / (lost / (1 - lost))
        expected = -math.log(won) + 0.2 * -math.log(1 / (1 + math.exp(-math.log(odds_ratio))))
        assert float(orpo_losses(means, 0.2)[pair]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("mean", [0.0, -1e-9, -1e-4, -0.69, -0.7, -5.0, -90.0])
def test_orpo_stays_finite_for_certain_and_impossible_answers(mean: float) -> None:
    for means in ([[mean], [-1.0]], [[-1.0], [mean]]):
        x = torch.tensor(means, requires_grad=True)
        loss = orpo_losses(x, 0.1).sum()
        loss.backward()
        assert loss.isfinite()
        assert x.grad is not None
        assert x.grad.isfinite().all()


def pairs_of(folder: Path, packed: bool = True) -> PairBatches:
    data = folder / "data"
    data.mkdir(exist_ok=True)
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    values = {"task_type": "text-generation", "train_data_dir": str(data), "base_model": "b", "output_dir": "o"}
    config = RunConfig.model_validate(values | {"objective": "dpo"})
    batches = read_dialogues(config, tokenizer(), 64).train_batches(packed)
    assert isinstance(batches, PairBatches)
    return batches


def model_of(folder: Path, disturbed: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    save_tiny(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.add_(0.05 * disturbed * torch.randn_like(parameter))
    return model.requires_grad_(False)


def samples(data: PairBatches) -> list[Sample]:
    return [Sample(index, str(index)) for index in range(len(data.examples))]


def one_by_one(model: Any, data: PairBatches) -> tuple[Tensor, Tensor]:
    """[2,B] log probabilities and numbers of tokens of the answers, each text alone through transformers' own forward pass."""
    log_probs, counts = [], []
    for pair in data.pairs:
        for sequence in pair.sequences:
            tokens = torch.tensor(sequence.tokens, dtype=torch.long)
            scores = torch.log_softmax(model(input_ids=tokens[None]).logits[0].double(), dim=-1)
            learnt = [place for place, mark in enumerate(sequence.trained) if mark]
            log_probs.append(sum(scores[place - 1, tokens[place]] for place in learnt))
            counts.append(len(learnt))
    return torch.stack(log_probs).view(-1, 2).T, torch.tensor(counts).view(-1, 2).T  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["dpo", "orpo"])
@pytest.mark.parametrize("packed", [True, False])
def test_loss_and_gradient_of_pairs_are_those_of_each_text_alone(kind: str, packed: bool, tmp_path: Path) -> None:
    preference = Preference(kind, 0.3)  # type: ignore[arg-type]
    base = CausalLanguageModel(model_of(tmp_path), tokenizer(), packed)
    data = pairs_of(tmp_path, packed)
    data = with_reference(data, base, "", batch_size=2, device=CPU, cache=EncodingCache(None))
    model = model_of(tmp_path, disturbed=True)
    family = CausalLanguageModel(model, tokenizer(), packed, preference)
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    loss = family.loss(data.batch(samples(data), CPU), Draws(0))
    (gradient,) = torch.autograd.grad(loss.total, weight)
    with torch.no_grad():
        reference, _ = one_by_one(base.model, data)
    expected = preference.losses(*one_by_one(model, data), reference)
    assert loss.count == len(ROWS)
    torch.testing.assert_close(loss.per_example.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), weight)[0], atol=1e-5, rtol=1e-4)
    # A step that is cut in two gives the same sum.
    parts = [family.loss(data.batch([sample], CPU), Draws(0)).total for sample in samples(data)]
    torch.testing.assert_close(torch.stack(parts).sum(), loss.total, atol=1e-5, rtol=1e-5)


def test_untrained_model_has_the_loss_of_a_coin(tmp_path: Path) -> None:
    family = CausalLanguageModel(model_of(tmp_path), tokenizer(), True, Preference("dpo", 0.1))
    data = with_reference(pairs_of(tmp_path), family, "", batch_size=3, device=CPU, cache=EncodingCache(None))
    losses = family.loss(data.batch(samples(data), CPU), Draws(0)).per_example
    torch.testing.assert_close(losses, torch.full((3,), math.log(2)), atol=1e-5, rtol=0)


def test_reference_comes_from_the_cache_of_the_same_model_and_pairs(tmp_path: Path) -> None:
    class Counted:
        passes = 0

        def pair_log_probs(self, batch: Any) -> Tensor:
            self.passes += 1
            return family.pair_log_probs(batch)

    family, counted, cache = (
        CausalLanguageModel(model_of(tmp_path), tokenizer()),
        Counted(),
        EncodingCache(tmp_path / "c"),
    )
    data = pairs_of(tmp_path)

    def reference(fingerprint: str, some: PairBatches = data) -> Any:
        return with_reference(some, counted, fingerprint, batch_size=2, device=CPU, cache=cache).reference

    first = reference("a")
    assert counted.passes == 2
    assert reference("a") == first
    assert counted.passes == 2
    reference("b")
    assert counted.passes == 4
    reference("a", data.part([0, 1]))
    assert counted.passes == 5


def trl_batch(trainer: Any, rows: Sequence[dict[str, str]]) -> Any:
    return trainer.data_collator([trainer.train_dataset[index] for index in range(len(rows))])


def test_dpo_is_trls(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="compared with TRL where it is installed")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    base, model = model_of(tmp_path), model_of(tmp_path, disturbed=True)
    family = CausalLanguageModel(base, tokenizer())
    data = with_reference(pairs_of(tmp_path), family, "", batch_size=3, device=CPU, cache=EncodingCache(None))
    ours = CausalLanguageModel(model, tokenizer(), True, Preference("dpo", 0.3))
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    loss = ours.loss(data.batch(samples(data), CPU), Draws(0))
    mean = loss.total / loss.count
    (gradient,) = torch.autograd.grad(mean, weight)

    messages = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in ROWS
    ]
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=0.3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
    )
    trainer = DPOTrainer(
        model=model,
        ref_model=model_of(tmp_path),
        args=arguments,
        train_dataset=Dataset.from_list(messages),
        processing_class=tokenizer(),
    )
    theirs = trainer.compute_loss(trainer.model, trl_batch(trainer, ROWS))
    assert float(mean.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, weight)[0], atol=1e-5, rtol=1e-4)


def test_odds_ratio_is_trls() -> None:
    pytest.importorskip("trl", reason="compared with TRL where it is installed")
    from trl.experimental.orpo import ORPOTrainer

    torch.manual_seed(0)
    means = -3 * torch.rand(2, 7) - 0.001
    trainer = SimpleNamespace(beta=0.2, accelerator=SimpleNamespace(device=CPU))
    weighed = ORPOTrainer.odds_ratio_loss(trainer, means[0], means[1])[0]
    torch.testing.assert_close(orpo_losses(means, 0.2), -means[0] - weighed, atol=1e-6, rtol=1e-6)
