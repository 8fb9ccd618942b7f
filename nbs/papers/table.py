"""Writes the README's table of claims from the records, the last step of `make claims`: python nbs/papers/table.py"""
import argparse
from pathlib import Path

from sparselab.learn.papers import claims_table, with_claims

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the table of claims from the records into the README, between its two claims comments.")
    parser.add_argument("--records", type=Path, default=HERE / "records", help="the folder of the records (default: %(default)s)")
    parser.add_argument("--readme", type=Path, default=README, help="the document that holds the table (default: %(default)s)")
    given = parser.parse_args()
    given.readme.write_text(with_claims(given.readme.read_text(encoding="utf-8"), claims_table(given.records)), encoding="utf-8")


if __name__ == "__main__":
    main()
