"""README and docs keep their word: links resolve, commands parse, functions and options exist, the README is short."""
import importlib
import re
import shlex

import pytest
from helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
PROGRAM = r"(?:python|torchrun(?: --\w+ \S+)*) +([\w/]+\.py)(.*)"
COMMANDS = sorted({command for text in TEXTS.values() for command in re.findall(PROGRAM, text.replace("\\\n", ""))})
FOLDERS = (ROOT, ROOT / "variants", ROOT / "tools", ROOT / "data")
SOURCES = "".join(path.read_text(encoding="utf-8") for folder in FOLDERS for path in folder.glob("*.py"))
OF_TORCHRUN = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--shutdown-timeout"}
OF_OTHERS = {"--extra-index-url", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--time", "--signal", "--requeue",
             "--open-mode"}  # pip's, Slurm's


def words_of(command):
    """The words behind the program, without what follows in the text or the shell."""
    return shlex.split(re.split(r"  +#|&&|\||`", command)[0].rstrip("\\ "))


def is_option(name):
    """Whether a program has the option: as a word of its own, or as the name of a row in a table of options."""
    return f'"{name}"' in SOURCES or f'"{name.removeprefix("--")}": (' in SOURCES


def test_there_are_pages_and_commands():
    assert len(PAGES) == 9 and len(COMMANDS) > 25


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[page.name]):
        assert "#" not in target and (page.parent / target).exists(), target


@pytest.mark.parametrize("script, words", COMMANDS)
def test_a_command_parses(script, words):
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    words = words_of(words)
    if script == "tools/plan.py":  # the options of a training script, and its own
        module.SCRIPTS[words[0]][0]([word for word in words[1:] if word not in ("--gpus", "8")])
    elif hasattr(module, "parse_args"):
        module.parse_args(words)
    else:
        assert all(is_option(word) for word in words if word.startswith("--"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page):
    named = set(re.findall(r"(?<![\w-])--\w[\w-]*", TEXTS[page.name])) - OF_TORCHRUN - OF_OTHERS
    assert not {name for name in named if not is_option(name)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page):
    for name in re.findall(r"`([\w/]+\.(?:py|md))`", TEXTS[page.name]):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "tools")), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_functions_exist(page):
    modules = "d1|model|lora|sample|train_sft|train_grpo|parallel|run|data\\.\\w+"
    for module, name in re.findall(rf"`({modules})\.(\w+)`", TEXTS[page.name]):
        if name not in ("py", "json", "jsonl"):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_the_line_counts_of_the_readme_hold():
    counts = re.findall(r"\| \[`([\w./]+)`\]\([\w./]+\) \| ([\d,]+) \|", TEXTS["README.md"])
    assert len(counts) == 11
    for name, count in counts:
        files = (ROOT / name).glob("*.py") if name.endswith("/") else [ROOT / name]
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        assert abs(lines - int(count.replace(",", ""))) <= max(15, 0.05 * lines), f"{name} has {lines} lines"


def test_the_pictures_are_small():
    assert all(path.stat().st_size < 200_000 for path in (ROOT / "docs" / "figures").iterdir())


def test_the_readme_is_a_front_page():
    assert TEXTS["README.md"].count("\n") <= 170
    assert len(TEXTS["README.md"].split()) <= 1700


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_a_page_begins_with_its_answer(page):
    """A title, then a sentence in a paragraph of its own."""
    title, answer, *_ = TEXTS[page.name].split("\n\n")
    assert title.startswith("# ") and re.match(r"[A-Z0-9]", answer) and answer.rstrip()[-1] in ".:"
