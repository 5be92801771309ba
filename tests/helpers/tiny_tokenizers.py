"""Small tokenizers of the kinds that models come with, made in a second."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from helpers.chat_templates import SPECIAL_TOKENS

CORPUS = [
    "Where is my parcel? It arrives today, between two and four.",
    "user assistant system model The quick brown fox jumps over the lazy dog.",
    "User: hello\nAssistant: hello to you, and good morning.\n\nTool: 42",
    "你好，请问我的包裹在哪里？今天下午到。",
] * 3

KINDS = ("byte_level", "byte_level_trimmed", "metaspace", "prepended")


def tiny_tokenizer(
    kind: str = "byte_level", template: str | dict[str, str] | None = None, *, marks: bool = True
) -> Any:
    """A transformers tokenizer.

    Args:
        kind: `byte_level` (GPT-2, Llama 3, Qwen), `byte_level_trimmed` (the same, with places in the text that leave out a
            word's blank), `metaspace` (T5, XLM: Unigram), `prepended` (Llama 2: a blank is put before every piece of text).
        marks: whether the special tokens of the chat templates are in the vocabulary.
    """
    from transformers import PreTrainedTokenizerFast

    make = {
        "byte_level": lambda: _byte_level(trim=False),
        "byte_level_trimmed": lambda: _byte_level(trim=True),
        "metaspace": _metaspace,
        "prepended": _prepended,
    }
    backend = make[kind]()
    if marks:
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def _byte_level(*, trim: bool) -> Tokenizer:
    from tokenizers import processors

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _pieces() -> list[str]:
    words = sorted({"▁" + word for line in CORPUS for word in line.replace("\n", " ").split(" ")})
    letters = sorted({letter for line in CORPUS for letter in line} - {" "})
    return ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, *words]


def _metaspace() -> Tokenizer:
    pieces = list(dict.fromkeys(_pieces()))
    vocabulary = [(piece, -20.0 if piece.startswith("<0x") else -1.0 - 1.0 / len(piece)) for piece in pieces]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _prepended() -> Tokenizer:
    pieces = list(dict.fromkeys(_pieces()))
    merges, known = [], set(pieces)
    for word in [piece for piece in pieces if len(piece) > 1 and not piece.startswith("<")]:
        for end in range(2, len(word) + 1):  # letter after letter, so that every word can be reached
            if word[:end] not in known:
                known.add(word[:end])
                pieces.append(word[:end])
            merges.append((word[: end - 1], word[end - 1]))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend
