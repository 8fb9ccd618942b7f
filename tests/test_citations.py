"""Every arXiv number in the project is that of the paper it is said to be: nbs/papers/citations.json is the one table of them."""
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAPERS = json.loads((ROOT / "nbs" / "papers" / "citations.json").read_text(encoding="utf-8"))
NUMBER = r"(?<![\d.])(\d{4}\.\d{4,5})(?![\d.]*\d)"
EXAMPLE = "0000.00000"  # the number of a paper that is made up


def text_of(path: Path) -> str:
    """What a person reads in a file: of a notebook its cells, without what they put out."""
    text = path.read_text(encoding="utf-8")
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"]) if path.suffix == ".ipynb" else text


FILES = [path for kind in ("nbs/**/*.ipynb", "nbs/**/*.py", "nbs/papers/records/*.json", "sparselab/**/*.py", "*.md", "*.cff", "data/*.md")
         for path in sorted(ROOT.glob(kind)) if ".ipynb_checkpoints" not in path.parts]
TEXTS = {path.relative_to(ROOT).as_posix(): text_of(path) for path in FILES}


def cited(text: str) -> set[str]:
    """arXiv numbers of a text: after the word, in brackets, in a table's cell, in quotes, or in a link; a measured number is none."""
    around = rf"(?:arXiv[: ]\s*\[?|abs/|\(|\[|, |\| |\"){NUMBER}(?=[\s\])|,;:.\"'`]|$)"
    return {number for number in re.findall(around, text) if 1 <= int(number[2:4]) <= 12 and 7 <= int(number[:2]) <= 30} - {EXAMPLE}


FOUND = {name: text for name, text in TEXTS.items() if cited(text)}


def letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def titles_before(text: str) -> list[tuple[str, str]]:
    """("title", number) wherever a quoted title stands before its number in brackets."""
    return re.findall(rf'"([^"]{{8,160}})"\s*\((?:arXiv[: ]\s*)?\[?{NUMBER}', text)


def authors_before(text: str) -> list[tuple[str, str]]:
    """("Shi", number) wherever "Shi et al." or "Wong & Kolter" stands before its number."""
    return re.findall(rf"([A-Z][\w-]+) (?:et al\.|(?:&|and) [A-Z][\w-]+)(?: \d{{4}})?,?\s*\(?(?:arXiv[: ]\s*)?\[?{NUMBER}", text)


def test_the_rules_find_what_is_written():
    text = '"A title of a paper" (arXiv 2103.17268), Shi et al., arXiv 2103.17268, Wong & Kolter (1711.00851), (Shi et al. 2021, 2103.17268)'
    linked = " 3179.5271 s, 0.2111, ([1911.11134](https://arxiv.org/abs/1911.11134))"
    assert cited(text + linked) == {"2103.17268", "1711.00851", "1911.11134"}
    assert "3179.5271" not in cited("took 3179.5271 s") and titles_before(text) == [("A title of a paper", "2103.17268")]
    assert authors_before(text) == [("Shi", "2103.17268"), ("Wong", "1711.00851"), ("Shi", "2103.17268")]


@pytest.mark.parametrize("name", FOUND)
def test_every_number_is_in_the_table(name):
    assert cited(FOUND[name]) - set(PAPERS) == set(), "look the paper up and add it to nbs/papers/citations.json"


@pytest.mark.parametrize("name", FOUND)
def test_a_number_belongs_to_the_title_and_the_authors_beside_it(name):
    for title, number in titles_before(FOUND[name]):
        known = [PAPERS[number]["title"], *PAPERS[number].get("earlier", ())]
        assert any(letters(title) in letters(each) for each in known), f"{number} is {known[0]!r}, not {title!r}"
    for author, number in authors_before(FOUND[name]):
        assert author in PAPERS[number]["authors"], f"{number} is by {', '.join(PAPERS[number]['authors'])}, not by {author}"


def test_the_table_is_whole():
    assert len(set().union(*map(cited, FOUND.values()))) > 40
    for number, paper in PAPERS.items():
        assert paper["year"] == 2000 + int(number[:2]) and paper["authors"] and paper["title"], number
