"""Writes the README's table of claims from the records: python nbs/papers/table.py (the last step of `make claims`)."""
from pathlib import Path

from sparselab.learn.papers import claims_table, with_claims

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"

if __name__ == "__main__":
    README.write_text(with_claims(README.read_text(encoding="utf-8"), claims_table(HERE / "records")), encoding="utf-8")
