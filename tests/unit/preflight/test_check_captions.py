from __future__ import annotations

from pathlib import Path

import pytest

from helpers.checked_sets import captions_of, check, clean_set, found, write_captions
from lora_scripts.preflight.synonyms import find_spellings, find_synonyms


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    clean_set(tmp_path / "pictures", 10)
    return tmp_path / "pictures"


def test_missing_and_empty_captions_are_named(folder: Path) -> None:
    captions = clean_set(folder, 10)
    del captions["02.png"]
    captions["03.png"] = ""
    write_captions(folder, captions)
    finding = found(check(folder), "captions-missing")
    assert (finding.level, sorted(finding.names)) == ("amber", ["02.png", "03.png"])
    assert "2 of 10 pictures have no caption; 2 of them would not train." in finding.text


def test_more_than_half_without_a_caption_blocks(folder: Path) -> None:
    write_captions(folder, {f"{i:02d}.png": f"number {i}" for i in range(4)})
    finding = found(check(folder), "captions-missing")
    assert finding.level == "red"
    assert "lora-scripts label" in finding.remedy


def test_no_captions_at_all_block_unless_a_trigger_word_stands_for_them(folder: Path) -> None:
    (folder / "metadata.csv").unlink()
    assert found(check(folder), "captions-missing").level == "red"
    report = check(folder, trigger_word="ohwx")
    assert not report.blocked
    assert found(report, "captions-all-same").level == "amber"


def test_some_shared_captions_are_a_note_and_many_are_amber(folder: Path) -> None:
    captions_of(folder, lambda i, text: "a red cat" if i < 3 else text)
    finding = found(check(folder), "captions-duplicate")
    assert finding.level == "note"
    assert finding.text == "3 pictures share a caption with another one, most often 'a red cat' (3 times)."
    captions_of(folder, lambda i, text: "a red cat" if i < 6 else text)
    assert found(check(folder), "captions-duplicate").level == "amber"


def test_text_that_is_not_read_is_shown(folder: Path) -> None:
    captions_of(folder, lambda i, text: text + ", and a very small blue bird" if i == 4 else text)
    finding = found(check(folder, cut=lambda caption: caption.partition(" very")[0]), "captions-too-long")
    assert finding.details == {"04.png": "not read: 'very small blue bird'"}


def test_missing_trigger_word_is_told_by_the_other_captions(folder: Path) -> None:
    captions_of(folder, lambda i, text: text if i == 4 else f"ohwx style, {text}")
    finding = found(check(folder), "trigger-missing")
    assert (finding.level, finding.names) == ("amber", ["04.png"])
    assert "trigger_word: ohwx style" in finding.remedy


def test_trigger_word_of_the_config_is_added_and_wanted_in_previews(folder: Path) -> None:
    report = check(folder, trigger_word="ohwx", sample_prompts=["ohwx, a cat", "a dog"])
    assert found(report, "trigger-added").text == "The trigger word 'ohwx' is put in front of 10 captions."
    assert found(report, "trigger-not-in-previews").text.startswith("1 sample prompt ")
    assert not any(f.code.startswith("trigger-not") for f in check(folder, trigger_word="ohwx").findings)


def test_synonyms_side_by_side_are_found_with_the_rarer_ones_named(folder: Path) -> None:
    captions_of(folder, lambda i, text: f"{'woman' if i < 5 else 'lady'}, {text}")
    finding = found(check(folder), "synonyms")
    assert "lady (5) / woman (5)" in finding.text
    assert len(finding.names) == 5


@pytest.mark.parametrize(
    "captions",
    [
        ["a man and a boy", "a man", "a man", "a boy with a man"],  # two people
        ["a woman", "a woman", "one lady"],  # a single odd wording
        ["two cats", "a cat", "three cats", "a cat"],  # number, not wording
        ["a picturesque village", "a picturesque town", "a photo", "a photo"],  # within another word
    ],
)
def test_different_things_are_not_called_synonyms(captions: list[str]) -> None:
    assert find_synonyms(captions) == []
    assert find_spellings(captions, ",") == []


@pytest.mark.parametrize(
    ("captions", "ways"),
    [
        (["a white t-shirt", "red t-shirt here", "a white tshirt", "tshirt"], ["t-shirt", "tshirt"]),
        (["long hair, t-shirt", "t-shirt, smile", "a t shirt in red", "grey t shirt"], ["t shirt", "t-shirt"]),
        (
            ["long sleeves, cat", "dog, long sleeves", "long sleeve", "long sleeve, sun"],
            ["long sleeve", "long sleeves"],
        ),
    ],
)
def test_spellings_of_one_word_are_found(captions: list[str], ways: list[str]) -> None:
    (spelling,) = find_spellings(captions, ",")
    assert sorted(spelling.captions) == sorted(ways)


def test_upper_case_is_no_other_spelling() -> None:
    assert find_spellings(["Red Hat, cat", "red hat, dog"] * 3, ",") == []
