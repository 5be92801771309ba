"""Captions from tables, sidecars and folder names: decoded and matched, or reported by name."""

import csv
import io
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from lora_scripts.data.caption_files import normalise_caption, read_table
from lora_scripts.data.metadata import CaptionTable, read_captions, write_metadata
from lora_scripts.errors import DataError


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(folder / name)


def table(folder: Path, content: bytes | str, name: str = "metadata.csv") -> CaptionTable:
    """The captions with this table in the folder."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_captions(folder, path)


def kinds(found: CaptionTable) -> dict[str, str]:
    return {problem.name: problem.kind for problem in found.problems}


AWKWARD_NAMES = [
    "猫咪.png",
    "🐈 cat.png",
    "two  blanks.png",
    "50%.png",
    "100%25.png",
    'a "quoted" one.png',
    "it's.png",
    "a,b.png",
    "CON.png",
    "é composed.png",
    unicodedata.normalize("NFD", "é decomposed.png"),
    "很" * 80 + ".png",
    "[x] {y}.png",
    "=1+1.png",
    " leading.png",
    "a.jpg",
    "a.png",
    "a.webp",
    "A2.png",
    "sub/a.png",
    "猫/猫.png",
]


@pytest.mark.fault(18)
def test_row_18_awkward_names_are_written_read_and_kept_apart(tmp_path: Path) -> None:
    pictures(tmp_path, *AWKWARD_NAMES)
    captions = {name: f"caption number {number}, with a comma" for number, name in enumerate(AWKWARD_NAMES)}
    write_metadata(tmp_path / "metadata.csv", captions)
    found = read_captions(tmp_path, tmp_path / "metadata.csv")
    assert found.captions == captions
    assert not found.problems


@pytest.mark.fault(18)
def test_row_18_composed_and_decomposed_names_are_the_same_name(tmp_path: Path) -> None:
    composed = unicodedata.normalize("NFC", "café über.png")
    pictures(tmp_path, unicodedata.normalize("NFD", composed))
    assert list(table(tmp_path, f"filename,prompt\n{composed},a cup\n").captions.values()) == ["a cup"]


@pytest.mark.fault(18)
def test_row_18_two_files_that_differ_in_composition_alone_stay_apart(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")]
    try:
        pictures(tmp_path, *names)
    except OSError:
        pytest.skip("this file system composes names")
    if len(os.listdir(tmp_path)) < 2:
        pytest.skip("this file system composes names")
    found = table(tmp_path, f"filename,prompt\n{names[0]},one\n{names[1]},two\n")
    assert found.captions == {names[0]: "one", names[1]: "two"}


@pytest.mark.fault(18)
def test_row_18_a_name_without_extension_counts_only_where_one_picture_fits(tmp_path: Path) -> None:
    pictures(tmp_path, "a.jpg", "a.png", "b.png")
    found = table(tmp_path, "filename,prompt\na,which one\nb,this one\n")
    assert found.captions == {"b.png": "this one"}
    assert kinds(found)["a"] == "ambiguous name"
    assert "fits several pictures: a.jpg, a.png" in next(p.reason for p in found.problems if p.name == "a")


@pytest.mark.fault(18)
def test_row_18_a_name_too_long_for_the_file_system_is_reported(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    long = "很" * 90 + ".png"
    assert kinds(table(tmp_path, f"filename,prompt\n{long},x\na.png,y\n"))[long] == "no picture"


@pytest.mark.fault(18)
@pytest.mark.skipif(os.name == "nt", reason="Windows names are always Unicode")
def test_row_18_a_name_that_is_no_unicode_is_reported_and_never_written(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    try:
        os.rename(os.fsencode(tmp_path / "a.png"), os.fsencode(tmp_path) + b"/\xff\xfe.png")
    except OSError:
        pytest.skip("this file system wants Unicode names")
    name = os.fsdecode(b"\xff\xfe.png")
    assert kinds(read_captions(tmp_path, None)) == {name: "bad name"}
    with pytest.raises(DataError, match="not valid Unicode"):
        write_metadata(tmp_path / "metadata.csv", {name: "x"})


@pytest.mark.fault(18)
@pytest.mark.parametrize("written", ["./sub/a.png", "sub\\a.png", "SUB/A.PNG", "a.png", "sub/a", " sub/a.png "])
def test_other_spellings_of_a_path_find_the_picture(tmp_path: Path, written: str) -> None:
    pictures(tmp_path, "sub/a.png", "sub/b.png")
    assert table(tmp_path, f"filename,prompt\n{written},hit\n").captions == {"sub/a.png": "hit"}


@pytest.mark.fault(18)
def test_a_row_that_only_resembles_a_picture_does_not_displace_its_own(tmp_path: Path) -> None:
    pictures(tmp_path, "one/a.png")
    found = table(tmp_path, "filename,prompt\none/a.png,right\ntwo/a.png,of a deleted picture\n")
    assert found.captions == {"one/a.png": "right"}
    assert kinds(found) == {"two/a.png": "no picture"}


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("../a.png", "leads out of the folder"),
        ("sub/../../a.png", "leads out of the folder"),
        ("/etc/a.png", "absolute path"),
        ("C:\\pictures\\a.png", "absolute path"),
        ("\\\\server\\a.png", "absolute path"),
        ("https://example.org/a.png", "address on the web"),
    ],
)
def test_rows_that_reach_outside_the_folder_are_refused(tmp_path: Path, written: str, reason: str) -> None:
    pictures(tmp_path / "data", "b.png")
    pictures(tmp_path, "a.png")
    found = table(tmp_path / "data", f"filename,prompt\n{written},x\n")
    assert not found.captions
    problem = next(problem for problem in found.problems if problem.name == written)
    assert problem.kind == "refused name"
    assert reason in problem.reason


@pytest.mark.parametrize("name", ["filename", "file_name", "image", "Filename", " FILE_NAME "])
@pytest.mark.parametrize("text", ["prompt", "caption", "text"])
def test_columns_go_by_their_usual_names(tmp_path: Path, name: str, text: str) -> None:
    pictures(tmp_path, "a.png")
    assert table(tmp_path, f"{name},{text}\na.png,a cat\n").captions == {"a.png": "a cat"}
    assert table(tmp_path, f"{text},{name}\na cat,a.png\n").captions == {"a.png": "a cat"}


TEXT = 'filename,prompt\na.png,"一只猫，坐着, ""红色"""\nb.png,狗在跑\n'


@pytest.mark.fault(19)
@pytest.mark.parametrize(
    ("data", "note"),
    [
        (TEXT.encode(), ""),
        (TEXT.encode("utf-8-sig"), ""),
        (TEXT.replace("\n", "\r\n").encode(), ""),
        (TEXT.replace("\n", "\r").encode(), ""),
        (TEXT.encode("gbk"), "GBK"),
        (TEXT.encode("utf-16"), "UTF-16"),
        (TEXT.encode("utf-16-be"), "UTF-16"),
        (TEXT.encode("utf-16-le"), "UTF-16"),
    ],
    ids=["utf-8", "bom", "crlf", "cr", "gbk", "utf-16 bom", "utf-16-be", "utf-16-le"],
)
def test_row_19_encodings_are_decoded_and_said(tmp_path: Path, data: bytes, note: str) -> None:
    pictures(tmp_path, "a.png", "b.png")
    found = table(tmp_path, data)
    assert found.captions == {"a.png": '一只猫，坐着, "红色"', "b.png": "狗在跑"}
    assert [note in text for text in found.notes] == ([True] if note else [])
    assert found.raw.plain is not bool(note)


@pytest.mark.fault(19)
def test_row_19_western_text_is_not_taken_for_chinese(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    found = table(tmp_path, "filename,prompt\na.png,naïve café für zwei\n".encode("cp1252"))
    assert found.captions == {"a.png": "naïve café für zwei"}
    assert "Windows-1252" in found.notes[0]


@pytest.mark.fault(19)
def test_row_19_bytes_of_no_known_encoding_are_refused_with_their_line(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    with pytest.raises(DataError, match=r"metadata\.csv line 2: the text is neither UTF-8, UTF-16 nor GBK"):
        table(tmp_path, b"filename,prompt\na.png,\x81\x01\xff\n")


@pytest.mark.fault(19)
def test_row_19_nul_and_control_characters_are_removed_and_said(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    found = table(tmp_path, b"filename,prompt\na.png,a\x00 cat\x07\x1b[31m\n")
    assert found.captions == {"a.png": "a cat[31m"}
    assert "3 NUL and other control characters were removed (first in line 2)" in found.notes[0]


@pytest.mark.fault(19)
def test_row_19_empty_and_missing_captions_are_reported_by_name(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png", "c.png", "d.png")
    found = table(tmp_path, 'filename,prompt\na.png,\nb.png,"  "\nc.png\nz.png,who is this\n')
    assert not found.captions
    assert kinds(found) == {
        "z.png": "no picture",
        "a.png": "no caption",
        "b.png": "no caption",
        "c.png": "no caption",
        "d.png": "no caption",
    }


@pytest.mark.fault(19)
def test_row_19_ten_thousand_words_are_read_whole(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    text = " ".join(f"word{number}" for number in range(30_000))
    assert table(tmp_path, f'filename,prompt\na.png,"{text}"\n').captions["a.png"] == text


@pytest.mark.fault(19)
def test_row_19_unquoted_commas_are_joined_and_said_once(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png", "c.png")
    found = table(tmp_path, 'filename,prompt\na.png,a cat, sitting, red\nb.png,a dog, running\nc.png,"one, quoted"\n')
    assert found.captions == {"a.png": "a cat, sitting, red", "b.png": "a dog, running", "c.png": "one, quoted"}
    assert len(found.notes) == 1
    assert "the captions of 2 rows hold commas without quotes (first in line 2)" in found.notes[0]


@pytest.mark.fault(19)
def test_unquoted_commas_before_a_further_column_leave_that_column_alone(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    found = table(tmp_path, "filename,prompt,rating\na.png,a cat, sitting,5\n")
    assert found.captions == {"a.png": "a cat, sitting"}
    assert found.extra["a.png"] == {"rating": "5"}


def test_empty_cells_that_a_spreadsheet_leaves_behind_mean_nothing(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    found = table(tmp_path, "filename,prompt,,\na.png,a cat,,\n,,,\n")
    assert found.captions == {"a.png": "a cat"}
    assert not found.notes
    found = table(tmp_path, "filename,prompt\na.png,a cat,,\n")
    assert found.captions == {"a.png": "a cat"}
    assert not found.notes


@pytest.mark.fault(19)
def test_quoted_line_breaks_belong_to_the_caption(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    found = table(tmp_path, 'filename,prompt\na.png,"first line\r\nsecond line"\nb.png,"say ""hi"""\n')
    assert found.captions == {"a.png": "first line second line", "b.png": 'say "hi"'}


@pytest.mark.fault(19)
@pytest.mark.parametrize(
    "rows", ['a.png,"a cat\nb.png,"a dog"\n', 'a.png,"a cat\nb.png,a dog"\n', 'a.png,"red" cat\nb.png,a dog\n']
)
def test_quotes_that_do_not_pair_up_swallow_no_rows(tmp_path: Path, rows: str) -> None:
    pictures(tmp_path, "a.png", "b.png")
    found = table(tmp_path, "filename,prompt\n" + rows)
    assert list(found.captions) == ["a.png", "b.png"]
    assert "cat" in found.captions["a.png"]
    assert "dog" not in found.captions["a.png"]
    assert any("quotation marks do not pair up" in note for note in found.notes)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_semicolons_and_tabs_are_read_as_separators(tmp_path: Path, mark: str) -> None:
    pictures(tmp_path, "a.png")
    found = table(tmp_path, f"filename{mark}prompt\na.png{mark}a cat, sitting\n")
    assert found.captions == {"a.png": "a cat, sitting"}
    assert not found.raw.plain


def test_the_separator_line_of_excel_is_skipped(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    assert table(tmp_path, "sep=;\nfilename;prompt\na.png;a cat\n").captions == {"a.png": "a cat"}


def test_a_table_without_header_is_read_and_said(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    found = table(tmp_path, "a.png,a cat\nb.png,a dog\n")
    assert found.captions == {"a.png": "a cat", "b.png": "a dog"}
    assert "has no header" in found.notes[0]


def test_unknown_columns_are_refused_with_the_nearest_name(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    with pytest.raises(
        DataError, match=r"no column prompt \(or caption, text\).*Did you mean prompt\?.*filename,prompt"
    ):
        table(tmp_path, "filename,promt\na.png,x\n")
    with pytest.raises(DataError, match=r"no column filename"):
        table(tmp_path, "id,prompt\n1,x\n")


def test_of_several_rows_for_one_picture_the_last_counts_and_is_said(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    found = table(tmp_path, "filename,prompt\na.png,first\na.png,second\na.png,\n")
    assert found.captions == {"a.png": "second"}
    assert "a.png (lines 2, 3, 4)" in found.notes[0]


def test_jsonl_is_read_and_broken_lines_are_named(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png", "c.png")
    lines = '{"file_name": "a.png", "text": "a cat"}\n{"image": "b.png", "caption": "a dog"}\n{"file_name": "c.p\n{"x": 1}\n[1]\n'
    found = table(tmp_path, lines, "metadata.jsonl")
    assert found.captions == {"a.png": "a cat", "b.png": "a dog"}
    assert [problem.name for problem in found.problems if problem.kind == "bad row"] == ["line 3", "line 4", "line 5"]


def test_without_a_path_the_table_in_the_folder_is_found(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "from jsonl"}\n', "utf-8")
    assert read_captions(tmp_path, None).captions == {"a.png": "from jsonl"}
    (tmp_path / "metadata.csv").write_text("filename,prompt\na.png,from csv\n", "utf-8")
    found = read_captions(tmp_path, None)
    assert found.captions == {"a.png": "from csv"}
    assert "metadata.jsonl lies beside it and is ignored" in found.notes[0]


def test_a_missing_table_tells_how_to_make_it(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "captions.csv").touch()
    with pytest.raises(
        DataError, match=r"no such caption table\. There is captions\.csv.*(auto_label\.py|lora-scripts label) --input"
    ):
        read_captions(tmp_path, tmp_path / "metadata.csv")
    with pytest.raises(DataError, match="is a folder"):
        read_captions(tmp_path, tmp_path)


def test_sidecars_fill_what_the_table_lacks(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png", "c.png", "d.png", "e.jpg", "e.png")
    for name, text in {
        "a.txt": "ignored",
        "b.txt": "from txt",
        "c.caption": "from caption",
        "d.txt": "",
        "d.caption": "second choice",
        "e.jpg.txt": "the jpg",
        "e.png.txt": "the png",
    }.items():
        (tmp_path / name).write_text(text, "utf-8")
    found = table(tmp_path, "filename,prompt\na.png,from table\n")
    assert found.captions == {
        "a.png": "from table",
        "b.png": "from txt",
        "c.png": "from caption",
        "d.png": "second choice",
        "e.jpg": "the jpg",
        "e.png": "the png",
    }
    assert found.origins["a.png"] == "table"
    assert found.origins["b.png"] == "sidecar"
    assert "5 captions come from .txt or .caption files" in found.notes[0]


@pytest.mark.fault(19)
def test_row_19_sidecars_are_decoded_like_tables(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "a.txt").write_bytes("一只坐着的猫".encode("gbk"))
    (tmp_path / "b.txt").write_bytes("a dog\r\nrunning\r\n".encode("utf-16"))
    (tmp_path / "c.txt").write_bytes(b"\x81\x01\xff")
    found = read_captions(tmp_path, None)
    assert found.captions == {"a.png": "一只坐着的猫", "b.png": "a dog running"}
    assert kinds(found)["c.png"] in ("bad sidecar", "no caption")
    assert any(problem.kind == "bad sidecar" and "c.txt" in problem.reason for problem in found.problems)


@pytest.mark.fault(18)
def test_one_sidecar_for_two_pictures_is_said(tmp_path: Path) -> None:
    pictures(tmp_path, "a.jpg", "a.png")
    (tmp_path / "a.txt").write_text("a cat", "utf-8")
    found = read_captions(tmp_path, None)
    assert found.captions == {"a.jpg": "a cat", "a.png": "a cat"}
    assert "a.txt (a.jpg, a.png)" in found.notes[0]


def test_kohya_folders_give_repeats_and_captions_of_last_resort(tmp_path: Path) -> None:
    pictures(tmp_path, "10_red cat/a.png", "10_red cat/b.png", "3_dog/c.png", "2024_holiday/d.png", "e.png")
    (tmp_path / "10_red cat" / "b.txt").write_text("its own", "utf-8")
    found = read_captions(tmp_path, None)
    assert found.repeats == {"10_red cat/a.png": 10, "10_red cat/b.png": 10, "3_dog/c.png": 3}
    assert found.captions == {"10_red cat/a.png": "red cat", "10_red cat/b.png": "its own", "3_dog/c.png": "dog"}
    assert found.origins["10_red cat/a.png"] == "folder"
    with_table = table(tmp_path, "filename,prompt\ne.png,x\n")
    assert with_table.captions == {"10_red cat/b.png": "its own", "e.png": "x"}
    assert with_table.repeats == found.repeats


def test_written_tables_are_plain_rfc_4180(tmp_path: Path) -> None:
    rows = {"a,b.png": 'a "red" cat, sitting', "b.png": "line\nbreak", "c.png": "plain", "猫.png": "一只猫"}
    write_metadata(tmp_path / "metadata.csv", rows)
    data = (tmp_path / "metadata.csv").read_bytes()
    assert data.startswith(b"filename,prompt\n")
    assert b'"a,b.png","a ""red"" cat, sitting"\n' in data
    assert list(csv.reader(io.StringIO(data.decode("utf-8"))))[2] == ["b.png", "line break"]
    assert not [name for name in os.listdir(tmp_path) if name != "metadata.csv"]


@pytest.mark.fault(18)
@pytest.mark.fault(19)
def test_cells_that_a_spreadsheet_would_compute_are_defused_on_request_and_read_back(tmp_path: Path) -> None:
    rows = {"=cmd.png": "=1+1", "a.png": "+1 cat", "b.png": "-red", "c.png": "@SUM(A1)", "d.png": "'quoted'"}
    pictures(tmp_path, *rows)
    write_metadata(tmp_path / "metadata.csv", rows, spreadsheet_safe=True, bom=True)
    data = (tmp_path / "metadata.csv").read_bytes()
    assert data.startswith(b"\xef\xbb\xbffilename,prompt\n")
    cells = [cell for row in csv.reader(io.StringIO(data.decode("utf-8-sig"))) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    found = read_captions(tmp_path, tmp_path / "metadata.csv")
    assert found.captions == rows
    assert found.raw.bom
    write_metadata(tmp_path / "metadata.csv", rows)
    assert "\n=cmd.png,=1+1\n" in (tmp_path / "metadata.csv").read_text("utf-8")


def test_further_columns_survive(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    found = table(tmp_path, "filename,prompt,rating,by\na.png,a cat,5,me\n")
    write_metadata(tmp_path / "b.csv", found.captions, extra_columns=found.raw.extra_columns, extra=found.extra)
    assert (tmp_path / "b.csv").read_text("utf-8") == "filename,prompt,rating,by\na.png,a cat,5,me\n"


def test_a_link_is_never_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious", "utf-8")
    os.symlink(tmp_path / "precious", tmp_path / "metadata.csv")
    with pytest.raises(DataError, match="symbolic link"):
        write_metadata(tmp_path / "metadata.csv", {"a.png": "x"})
    assert (tmp_path / "precious").read_text("utf-8") == "precious"


def test_an_empty_table_has_no_rows(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    assert kinds(table(tmp_path, "")) == {"a.png": "no caption"}
    assert kinds(table(tmp_path, "filename,prompt\n")) == {"a.png": "no caption"}
    assert not read_table(tmp_path / "metadata.csv").rows


@pytest.mark.fault(19)
def test_captions_are_normalised_to_one_line() -> None:
    assert normalise_caption("  a\tcat \r\n sitting\u2028\u00a0here \x00") == "a cat sitting here"
    assert normalise_caption("全角　空格") == "全角　空格"
