"""Installs sparselab; what and which versions is read from settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
requirements = {
    key: [line for line in cfg.get(f"{key}_requirements", "").split("\n") if line]
    for key in ("lab", "hub", "dev")
}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8") if (root / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"],
    license="Apache-2.0",
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["sparselab", "sparselab.*"]),
    install_requires=cfg["requirements"].split(),
    extras_require=requirements,
    entry_points={"nbdev": ["sparselab=sparselab._modidx:d"]},
)
