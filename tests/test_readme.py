"""The README keeps its word: links point at what they name, and every command parses."""
import re
import shlex

import pytest
from conftest import ROOT

import model
import plot
import sample
import train_grpo
import train_sft

README = (ROOT / "README.md").read_text()
SCRIPTS = {f"{script.__name__}.py": script for script in (model, plot, sample, train_sft, train_grpo)}
LINKS = re.findall(r"\[([^\]]+)\]\((?!https?:)([^)#]+)(?:#L(\d+))?\)", README)
COMMANDS = re.findall(r"(?:python|torchrun(?: --\w+ \S+)*) +(\w+\.py)(.*)", README.replace("\\\n", ""))


def test_the_readme_has_links_and_commands():
    assert sum(bool(line) for _, _, line in LINKS) > 10 and len(COMMANDS) > 8


@pytest.mark.parametrize("text, file, line", LINKS)
def test_a_link_points_at_what_it_names(text, file, line):
    assert (ROOT / file).exists()
    if line:
        name = text.strip("`").split(".")[-1]
        lines = (ROOT / file).read_text().splitlines()
        found = [i for i, code in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name}\b|{name} = ", code)]
        assert int(line) in found, f"{name} stands in {file} at line {found}, the README says {line}"


@pytest.mark.parametrize("script, words", COMMANDS)
def test_a_command_parses(script, words):
    words = re.split(r"  +#|&&|\||`", words)[0].rstrip("\\ ")
    SCRIPTS[script].parse_args(shlex.split(words))


def test_lines_are_at_most_120_characters():
    long = [f"{path.name}:{number}" for folder in (ROOT, ROOT / "data", ROOT / "tests") for path in folder.glob("*.py")
            for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1) if len(line) > 120]
    assert not long
