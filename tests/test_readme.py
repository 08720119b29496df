"""The documents: commands exist, links lead somewhere, generated tables are current."""

import re
import shlex
from pathlib import Path

import pytest
import refresh_readme

from minomni.__main__ import parser

ROOT = Path(__file__).parents[1]
READMES = ["README.md", "README_zh.md"]
DOCUMENTS = [
    *READMES,
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "notebooks/glossary.md",
    "notebooks/lab_log.md",
    "notebooks/results.md",
    "notebooks/serving.md",
    "notebooks/usage.md",
]
README_LINES = 200  # at most
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)
SHELLS = ("bash", "sh", "shell", "console")
LINK = re.compile(r"\]\((?!https?://|mailto:)(?P<path>[^)#\s]*)(?:#(?P<section>[^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """A document without its code blocks."""
    return FENCE.sub("", text)


def commands(text: str) -> list[list[str]]:
    """The commands in a document's shell blocks, as lists of words."""
    blocks = [block["body"] for block in FENCE.finditer(text) if block["language"] in SHELLS]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [words for words in found if words]


def anchors(text: str) -> set[str]:
    """The names by which GitHub links to the sections of a document."""
    headings = [heading.lower() for heading in HEADING.findall(prose(text))]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def test_the_readme_is_one_page():
    assert len(read("README.md").splitlines()) <= README_LINES


@pytest.mark.parametrize("readme", READMES)
def test_the_readme_begins_with_the_main_commands(readme):
    found = commands(read(readme))
    for arguments in ([], ["test"], ["hear"], ["serve"]):
        assert ["python", "run.py", *arguments] in found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist(document):
    for words in commands(read(document)):
        program = Path(words[0]).name
        if program == "minomni":
            parser().parse_args(words[1:])  # raises for options and commands that do not exist
        elif program == "python" and words[1:3] == ["-m", "minomni"]:
            parser().parse_args(words[3:])
        elif program == "python" and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), words
        for option, value in zip(words, words[1:], strict=False):
            if option == "-r":
                assert (ROOT / value).is_file(), words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for link in LINK.finditer(prose(read(document))):
        target = (ROOT / document).parent / link["path"] if link["path"] else ROOT / document
        assert target.exists(), link[0]
        if link["section"]:
            assert link["section"] in anchors(target.read_text(encoding="utf-8")), link[0]


@pytest.mark.parametrize("document", ["lab_log.md", "results.md", "usage.md"])
def test_contents_list_every_section(document):
    text = prose(read(f"notebooks/{document}"))
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    listed = re.findall(r"^- \[([^\]]*)\]\(#[^)]*\)$", text, re.MULTILINE)
    assert listed == [section for section in sections if section not in ("Summary", "Contents")]


def test_marks_of_unusual_files_are_complete():
    """Each has a kind, a file and a result, and no file stands twice."""
    marks = refresh_readme.reads_marks()
    assert len(marks) > 20
    assert all(len(mark) == 3 and all(mark) for mark in marks)
    assert len({file for _, file, _ in marks}) == len(marks)


@pytest.mark.parametrize("document", refresh_readme.DOCUMENTS)
def test_generated_tables_are_current(document):
    """If not: python tests/refresh_readme.py."""
    text = read(document)
    assert refresh_readme.BEGIN.search(text)
    assert refresh_readme.refreshed(text, refresh_readme.DOCUMENTS[document]) == text


def test_every_table_is_in_a_document():
    texts = [read(document) for document in refresh_readme.DOCUMENTS]
    used = {name for text in texts for name in refresh_readme.BEGIN.findall(text)}
    stored = refresh_readme.results()
    missing = {name for name, key in refresh_readme.OPTIONAL.items() if key not in stored}
    assert used == set(refresh_readme.BLOCKS) - missing


def test_no_table_is_empty():
    """What has not been measured is left out, with its section and its links."""
    for document in refresh_readme.DOCUMENTS:
        for name in refresh_readme.BEGIN.findall(read(document)):
            assert f"<!-- {name} -->\n<!-- end of {name} -->" not in read(document)


def test_results_are_stored_as_the_script_writes_them():
    stored = refresh_readme.RESULTS.read_text(encoding="utf-8")
    assert refresh_readme.pretty(refresh_readme.results()) + "\n" == stored


def test_each_row_of_the_report_is_in_one_table():
    found = refresh_readme.report("en")
    for name in refresh_readme.report_rows("tiny"):
        assert found.count(f"| `{name}` |") == 1, name
    tables = re.findall(r"(?:^\|.*\n)+", found, re.MULTILINE)
    assert len(tables) == len(refresh_readme.REPORT_TABLES)
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_a_new_report_replaces_the_old_one():
    stored = {"report": {"tiny": {"rows": {"old": {"value": 1}}}, "small": {}}}
    new = {"rows": {"a": {"value": 0.5, "low": 0.4, "high": 0.6, "items": 100}}}
    refresh_readme.take_report(new, "tiny", stored)
    assert stored == {"report": {"tiny": new, "small": {}}}
    with pytest.raises(SystemExit, match="runs/report.json"):
        refresh_readme.take_report({"a": 0.5, "train_seconds": 10}, "tiny", stored)


@pytest.mark.parametrize("device", ["two cores", "H200"])
def test_a_new_latency_replaces_its_column_or_adds_one(device):
    old = {"model": "tiny", "device": "two cores", **dict.fromkeys(refresh_readme.LATENCY_ROWS, 1)}
    stored = {"first": [old]}
    measured = {**dict.fromkeys(refresh_readme.LATENCY_ROWS, 2), "talker_ms": 3}
    refresh_readme.take_first(measured, "tiny", device, stored)
    assert len(stored["first"]) == (1 if device == "two cores" else 2)
    assert stored["first"][-1]["first_audio_ms"] == 2
    assert "talker_ms" not in stored["first"][-1]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_server_is_described_once_it_was_measured(monkeypatch, language):
    monkeypatch.setattr(refresh_readme, "results", dict)
    assert refresh_readme.served(language) == refresh_readme.serving(language) == ""
    measured = {key: 1000.0 + i for i, key in enumerate(refresh_readme.serving_keys())}
    measured["processor"] = "AVX2"
    monkeypatch.setattr(refresh_readme, "results", lambda: {"serving": measured})
    sentence = refresh_readme.served(language)
    assert str(round(measured["spoken_first_audio_ms"])) in sentence
    assert str(round(measured["open_first_audio_ms"])) in sentence
    assert sentence.count("\n") == 1
    assert "AVX2" in sentence
    rows = refresh_readme.serving(language)
    assert "| 1 client | 4 clients | 16 clients |" in rows
    assert rows.count("\n|") == 2 + len(refresh_readme.SERVING_ROWS)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_first_sound_of_the_page_is_told_once_it_was_measured(monkeypatch, language):
    serving = dict.fromkeys(refresh_readme.serving_keys(), 1.0) | {"processor": "AVX512"}
    times = {"questions": 7, "median_ms": 812.4, "least_ms": 701.2, "most_ms": 955.6}
    times["processor"] = "AVX2"
    sound = {"speech_s": 14.6, "answers_with_gaps": 2, "gaps_ms": 21.3}
    assert {**times, **sound}.keys() == {*refresh_readme.PAGE_KEYS, "processor"}
    monkeypatch.setattr(refresh_readme, "results", lambda: {"serving": serving})
    assert refresh_readme.page(language) == ""
    alone = refresh_readme.served(language)
    monkeypatch.setattr(refresh_readme, "results", lambda: {"serving": serving, "page": times})
    sentence = refresh_readme.served(language)
    assert "812" not in alone
    assert "812" in sentence
    assert re.search("median of 7|7 次的中位数", sentence)
    assert sentence.count("\n") == 1
    assert "two AVX2 cores, without other work, 7 questions" in refresh_readme.page(language)
    assert "701 to 956 ms, median 812.\n" in refresh_readme.page(language)
    assert refresh_readme.gaps(times) == ""
    assert refresh_readme.gaps({**times, **sound}).endswith(
        " 15 s of speech; 2 of the answers had gaps, 21 ms in all."
    )
    assert "without a gap" in refresh_readme.gaps({**times, **sound, "answers_with_gaps": 0})


def test_a_share_of_recordings_has_its_interval(monkeypatch):
    speakers = {"ada": {"before": 0.0, "after": 0.5, "items": 100}}
    monkeypatch.setattr(refresh_readme, "results", lambda: {"held_out_speakers": speakers})
    row = "| ada | 0.0% | 50.0% | 40.4% to 59.6% | 100 |\n"  # Wilson's
    assert refresh_readme.held_out_speakers("en").endswith(row)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_parts_beside_transformers_are_told_once_they_were_measured(monkeypatch, language):
    machine = {"transformers": "5.0.0", "dtype": "float32", "threads": 2, "processor": "AVX2"}
    stored = {"parts": {"float32": {"machine": machine, "rows": {"video": {"minomni": 1.0}}}}}
    monkeypatch.setattr(refresh_readme, "results", lambda: stored)
    assert refresh_readme.beside_transformers(language) == ""
    rows = {name: {"ratio": 1.234} for name in refresh_readme.README_PARTS}
    stored["parts"]["float32"]["rows"] = rows
    sentence = refresh_readme.beside_transformers(language)
    assert sentence.count("1.23") == len(rows)
    stored.clear()
    assert refresh_readme.beside_transformers(language) == ""


def test_an_unknown_table_is_named():
    with pytest.raises(SystemExit, match="unknown_name"):
        refresh_readme.refreshed("<!-- unknown_name -->\n<!-- end of unknown_name -->\n", "en")


def test_anchors_are_those_of_github():
    text = "# Real speakers\n```bash\n# a comment\n```\n## What `x.py` is, and why\n"
    assert anchors(text) == {"real-speakers", "what-xpy-is-and-why"}


def test_parameters_of_the_releases_size():
    """Those of the official checkpoint, counted by transformers on the meta device."""
    assert sum(refresh_readme.parameter_counts("qwen7b").values()) == 10_732_225_408
    assert "| parameters | 6,906,852 | 91,513,141 | 10,732,225,408 |" in read(
        "notebooks/results.md"
    )
