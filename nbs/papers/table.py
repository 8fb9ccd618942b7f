"""Writes the README's tables of papers and claims from the records, the last step of `make claims`: python nbs/papers/table.py"""
import argparse
import json
from pathlib import Path

from sparselab.learn.papers import claims_table, papers_table, with_claims

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"


def tables(records: Path = HERE / "records") -> str:
    """The table of papers, and behind it that of the claims in the folder `records`, folded away."""
    papers = papers_table(json.loads((HERE / "papers.json").read_text(encoding="utf-8")), records)
    return f"{papers}\n<details>\n<summary>Every claim, with its numbers</summary>\n\n{claims_table(records)}\n</details>\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write the tables of papers and claims from the records into the README, between its two claims comments.")
    parser.add_argument("--records", type=Path, default=HERE / "records", help="the folder of the records (default: %(default)s)")
    parser.add_argument("--readme", type=Path, default=README, help="the document that holds the table (default: %(default)s)")
    given = parser.parse_args()
    given.readme.write_text(with_claims(given.readme.read_text(encoding="utf-8"), tables(given.records)), encoding="utf-8")


if __name__ == "__main__":
    main()
