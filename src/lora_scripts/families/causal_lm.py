"""Language models that go on with a text: Llama, Qwen, Mistral, Gemma, Phi, GLM and whatever else transformers loads.

One family for all, because what differs between them lies in transformers' modelling code, which runs as it is. Two things
are taken out of its hands, for speed: attention, so that the texts of a batch lie one behind the other without padding, and
the head, which is computed for trained tokens alone. Whether a model allows either is found by trying it when it is loaded.

Legend for shapes: B texts, L longest of them in tokens, M most trained tokens, T all tokens, N all trained tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lora_scripts.adapters.presets import BlockRoles
from lora_scripts.adapters.targets import language_model_targets
from lora_scripts.dialogues.pair_batches import joined
from lora_scripts.export.names import LANGUAGE_MODEL
from lora_scripts.families.protocol import Batch, Loss, PassWork
from lora_scripts.models.block_swap import swap_blocks
from lora_scripts.models.frozen_linear import PLAIN_LINEAR
from lora_scripts.models.language_model import (
    DEFAULT_MOST_TOKENS,
    load_language_model,
    load_tokenizer,
    outline_language_model,
)
from lora_scripts.models.last_layer import KEPT, can_finish_for_some
from lora_scripts.models.outline import fill_with_nothing
from lora_scripts.models.quantised import load_quantised
from lora_scripts.models.same_input import watched_groups
from lora_scripts.models.segment_attention import Segments, segments_at_work
from lora_scripts.models.shards import Shards, shard_language_model
from lora_scripts.objectives.next_token import Head, next_token_losses
from lora_scripts.objectives.preference import Preference
from lora_scripts.speed_rules import swapped_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_scripts.config import RunConfig
    from lora_scripts.dialogues.answers import Answer, AnswerRequest
    from lora_scripts.models.source import BaseModel
    from lora_scripts.training.draws import Draws

__all__ = ["CausalLanguageModel"]

TRIAL_LENGTHS = (5, 9, 3)
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
"""Share of the scores' size that two ways of computing them may differ by."""


class CausalLanguageModel:
    """A frozen model of transformers and its training objective."""

    name: ClassVar[str] = "causal_lm"
    task: ClassVar[str] = "text-generation"
    num_levels: ClassVar[int] = 1
    few_shapes: ClassVar[bool] = False
    # Measured, one product is no faster here, and the values would hold the queries and keys beside them until the backward pass.
    joins_weights: ClassVar[bool] = False
    conv_targets: ClassVar[Mapping[str, Sequence[str]]] = {}
    block_roles: ClassVar[BlockRoles] = {}

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        packing: bool = True,
        preference: Preference | None = None,
        fingerprint: str = "",
        *,
        shards: Shards | None = None,
        tried: bool = True,
    ) -> None:
        """Args:
        packing: put the texts of a batch one behind the other, where the model allows it.
        preference: what is learnt of pairs of answers; None for single ones.
        fingerprint: changes whenever the same tokens would get other probabilities.
        shards: of the weights, where each process holds a part of them.
        tried: find out what the model allows; without weights it is taken for granted.
        """
        self.model, self.tokenizer = model, tokenizer
        self.fingerprint, self._preference = fingerprint, preference
        self.shards = shards
        self.notes = list(language_model_targets(model).notes)
        """Lines for people on how the model is run."""
        self._own_head = True
        self._same_input: Sequence[Sequence[str]] = ()
        self._finishes_for_some = can_finish_for_some(model)
        self.packs = packing
        if tried:
            self._try_out()

    @classmethod
    def load(cls, source: BaseModel, config: RunConfig, device: torch.device, dtype: torch.dtype) -> Self:
        tokenizer = load_tokenizer(source.path, source.name)
        shards = None
        if config.shard_model:
            model = load_language_model(source.path, source.name, dtype)
            shards = shard_language_model(model, _layers(model), source.name, device)
        elif config.quantization == "none":
            model = load_language_model(source.path, source.name, dtype)
            swap_blocks(_layers(model), swapped_blocks(config), device)  # so that the device never holds them all
            model = model.to(device)
        else:
            model = load_quantised(source.path, source.name, dtype, device, config.quantization)
        fingerprint = f"{source.fingerprint} {dtype} {config.quantization} {device.type}"
        return cls(model, tokenizer, config.packing, _preference(config), fingerprint, shards=shards)

    @classmethod
    def outline(cls, source: BaseModel, config: RunConfig, device: torch.device, dtype: torch.dtype) -> Self:
        tokenizer = load_tokenizer(source.path, source.name)
        model = outline_language_model(source.path, source.name, dtype).eval()
        fill_with_nothing(model, device)
        family = cls(model, tokenizer, config.packing, _preference(config), tried=False)
        with contextlib.suppress(Exception):  # what cannot run with fake tensors is told by whoever asks what it takes
            family._watch(torch.zeros(TRIAL_LENGTHS[0], dtype=torch.long, device=device))
        return family

    @property
    def components(self) -> Mapping[str, nn.Module]:
        return {LANGUAGE_MODEL: self.model}

    @property
    def default_targets(self) -> Mapping[str, Sequence[str]]:
        """All linear layers but the head."""
        return {LANGUAGE_MODEL: language_model_targets(self.model).names}

    @property
    def most_tokens(self) -> int:
        return int(getattr(self.model.config, "max_position_embeddings", None) or DEFAULT_MOST_TOKENS)

    def set_checkpointing(self, on: bool) -> None:
        """Layers are computed again in the backward pass; their dropout, if any, stays off."""
        from torch.utils.checkpoint import checkpoint
        from transformers.modeling_layers import GradientCheckpointingLayer

        # What is computed again, in the backward pass, must attend as it did the first time.
        again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), self._attention()))
        for layer in self.model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer._gradient_checkpointing_func = again
                layer.gradient_checkpointing = on
                layer.training = on  # transformers asks for it; the modules below it stay in evaluation mode

    def drawn(self, batch: Batch, draws: Draws) -> Batch:
        return batch  # nothing is random

    def blocks(self) -> Sequence[nn.Module]:
        return _layers(self.model)

    def same_input(self) -> Sequence[Sequence[str]]:
        return self._same_input

    def fusable_parts(self) -> Sequence[nn.Module]:
        """Norms, attention and feed-forward halves: a layer as a whole is what checkpointing repeats, so it stays as it is."""
        return [part for layer in self.blocks() for part in layer.children()]

    def wide_parts(self) -> Sequence[nn.Module]:
        return self.blocks()

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        """Minus the log probability of the trained tokens, summed; `per_example` is each text's mean. Of pairs, their losses.

        Args:
            batch: tensors "tokens" [B,L] and "targets" [B,M], the places of the trained tokens in their row; `filled` says
                how far each row of both is filled. Pairs have more, see `dialogues.pair_batches`.
        """
        if self._preference is not None:
            return self._preference_loss(batch, self._preference)
        losses, counts = self._token_losses(batch)
        means = torch.stack([part.mean() for part in torch.split(losses.detach(), counts)])
        return Loss(losses.sum(), len(losses), means)

    def pair_log_probs(self, batch: Batch) -> Tensor:
        """[2,B] log probability of each pair's preferred answer, and of its other one."""
        losses, counts = self._token_losses(joined(batch))
        return -torch.stack([part.sum() for part in torch.split(losses, counts)]).view(2, -1)

    def _preference_loss(self, batch: Batch, preference: Preference) -> Loss:
        log_probs, reference = self.pair_log_probs(batch), batch.tensors.get("reference")
        counts = torch.tensor([batch.filled["targets"], batch.filled["rejected_targets"]], device=log_probs.device)
        losses = preference.losses(log_probs, counts, None if reference is None else reference.T)
        return Loss(losses.sum(), len(losses), losses.detach())

    def _token_losses(self, batch: Batch) -> tuple[Tensor, list[int]]:
        """[N] minus the log probability of each trained token, and how many of them each text has."""
        places, targets, counts = self._trained(batch)
        if self._has_head:
            hidden = self._hidden(batch, places)
            with self._head() as head:
                return next_token_losses(hidden, head, targets), counts
        scores = self._model_scores(batch)[places]
        return torch.nn.functional.cross_entropy(scores, targets, reduction="none"), counts

    def work(self, batch: Batch) -> PassWork:
        """Each frozen weight takes four operations for a token, a trained one six; the head counts for learnt tokens alone."""
        if self._preference is not None:
            batch = joined(batch)
        lengths = batch.filled["tokens"]
        real, rows = sum(lengths), batch.tensors["tokens"].numel()
        places, texts = (real, lengths) if self.packs else (rows, [batch.tensors["tokens"].shape[1]] * len(lengths))
        of_token, of_score = self._operations
        scores = of_score * (sum(batch.filled["targets"]) if self._has_head else places)
        settings = self.model.config.get_text_config()
        # Two products forward and five backward, of every token with those before it.
        attention = 7 * settings.num_hidden_layers * settings.hidden_size * sum(length**2 for length in texts)
        flops = float(of_token * places + scores + attention)
        return PassWork(flops, places, places - real, self.model.dtype)

    def predict(self, batch: Batch, draws: Draws) -> Tensor:
        """[N,V] float32: the scores of what comes next, at the trained tokens."""
        places, _, _ = self._trained(batch)
        if self._has_head:
            hidden = self._hidden(batch, places)
            with self._head() as head:
                return head.scores(hidden)
        return self._model_scores(batch)[places]

    def answer(self, requests: Sequence[AnswerRequest]) -> list[Answer]:
        from lora_scripts.answering.generate import Answerer

        answerer = Answerer(self.model, self.tokenizer)
        return [answerer.answer(request) for request in requests]

    # Running the model -------------------------------------------------------------------------------------------------

    @cached_property
    def _operations(self) -> tuple[int, int]:
        """Of a token in the layers, adapter included, and in the head; counted once, because it takes a walk over the model."""
        head = self.model.get_output_embeddings()
        frozen = sum(4 * m.in_features * m.out_features for m in self._linear_layers() if m is not head)
        trained = sum(6 * p.numel() for p in self.model.parameters() if p.requires_grad)
        return frozen + trained, 4 * head.in_features * head.out_features

    def _linear_layers(self) -> list[nn.Linear]:
        return [layer for layer in self.model.modules() if isinstance(layer, nn.Linear)]

    @property
    def _has_head(self) -> bool:
        """Whether the head is a plain frozen layer, whose scores we can compute for some tokens alone."""
        layer = self.model.get_output_embeddings()
        return self._own_head and (type(layer) in PLAIN_LINEAR or (self.shards is not None and layer in self.shards))

    @contextmanager
    def _head(self) -> Iterator[Head]:
        """That head, usable within the block."""
        layer = self.model.get_output_embeddings()
        cut = self.shards is not None and layer in self.shards
        with self.shards.whole(layer) if self.shards is not None and cut else nullcontext():
            yield Head.of(layer, self.model.config)

    def _trained(self, batch: Batch) -> tuple[Tensor, Tensor, list[int]]:
        """[N] places (see `_hidden`) that the trained tokens are predicted from, [N] these tokens, and how many each text has."""
        tokens, targets = batch.tensors["tokens"], batch.tensors["targets"]
        counts = list(batch.filled["targets"])
        begin, places, wanted = 0, [], []
        for row, (length, count) in enumerate(zip(batch.filled["tokens"], counts, strict=True)):
            own = targets[row, :count]
            places.append(own + (begin - 1))  # a token is predicted from the one before it
            wanted.append(tokens[row].index_select(0, own))
            begin += length if self.packs else tokens.shape[1]
        return torch.cat(places), torch.cat(wanted), counts

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        tokens, lengths = batch.tensors["tokens"], batch.filled["tokens"]
        if not self.packs:
            # Padding stands at the end, where causal attention never looks from a real token: no mask is needed.
            return {"input_ids": tokens, "use_cache": False}
        packed = torch.cat([tokens[row, :length] for row, length in enumerate(lengths)])
        position = torch.cat([torch.arange(length, device=tokens.device) for length in lengths])
        return {
            "input_ids": packed[None],
            "position_ids": position[None],
            "segment_lengths": Segments(lengths),
            "use_cache": False,
        }

    def _hidden(self, batch: Batch, places: Tensor) -> Tensor:
        """[N,D] last hidden states at places of the texts, counted one text behind the other (without packing over [B*L])."""
        kept = {KEPT: places} if self._finishes_for_some else {}
        hidden: Tensor = self._run(self.model.base_model, batch, **kept).last_hidden_state
        return hidden[0] if kept else hidden.flatten(0, 1)[places]

    def _model_scores(self, batch: Batch) -> Tensor:
        """[T,V] float32 from the model's own head."""
        scores: Tensor = self._run(self.model, batch).logits
        return scores.reshape(-1, scores.shape[-1]).float()

    def _run(self, module: nn.Module, batch: Batch, **more: Tensor) -> Any:
        with self._attention():
            return module(**self._inputs(batch), **more)

    def _attention(self) -> AbstractContextManager[None]:
        return segments_at_work(self.model) if self.packs else nullcontext()

    # Finding out what it allows ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _watch(self, text: Tensor) -> None:
        """Sees which layers read the same tensor."""
        with watched_groups(LANGUAGE_MODEL, self.model) as groups:
            self.model(input_ids=text[None], use_cache=False)
        self._same_input = groups

    @torch.no_grad()
    def _try_out(self) -> None:
        """Compares our way of running the model with its own, on a few tokens; what differs is left to the model."""
        texts = _trial_texts(self.model.get_input_embeddings().num_embeddings, self.model.device)
        self._watch(texts[0])
        own = torch.cat([self.model(input_ids=text[None], use_cache=False).logits[0].float() for text in texts])
        batch = _trial_batch(texts)
        if self._finishes_for_some and not self._agrees(batch, own):
            self._finishes_for_some = False
        if not self._agrees(batch, own):
            packs, self.packs = self.packs, False
            if self._own_head and not self._agrees(batch, own):
                self._own_head = False
                self.notes.append(
                    "This model has a head of its own kind: scores are computed for all tokens, which is slower."
                )
            self.packs = packs
        if self.packs and not self._agrees(batch, own):
            self.packs = False
            self.notes.append("This model's attention cannot be packed: the texts of a batch are padded to one length.")

    def _agrees(self, batch: Batch, own: Tensor) -> bool:
        try:
            scores = self.predict(batch, None)  # type: ignore[arg-type]  # nothing is drawn
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError):
            if self.shards is not None:
                self.shards.recover()
            return False
        first = 0
        wanted = []
        for length in batch.filled["tokens"]:
            wanted.append(own[first : first + length - 1])
            first += length
        reference = torch.cat(wanted)
        return bool((scores - reference).abs().max() <= TOLERANCES[self.model.dtype] * reference.abs().max())


def _layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The decoder's layers, first to last."""
    return list(getattr(model.base_model, "layers", ()))


def _preference(config: RunConfig) -> Preference | None:
    return None if config.objective == "sft" else Preference(config.objective, config.preference_beta)


def _trial_texts(num_tokens: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(num_tokens, (length,), generator=generator).to(device) for length in TRIAL_LENGTHS]


def _trial_batch(texts: Sequence[Tensor]) -> Batch:
    """All tokens but the first of each text as targets."""
    lengths = [len(text) for text in texts]
    tokens = nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    targets = nn.utils.rnn.pad_sequence([torch.arange(1, n, device=tokens.device) for n in lengths], batch_first=True)
    keys = [str(i) for i in range(len(texts))]
    return Batch(
        {"tokens": tokens, "targets": targets},
        [],
        keys,
        filled={"tokens": lengths, "targets": [n - 1 for n in lengths]},
    )
