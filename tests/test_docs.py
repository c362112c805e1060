"""README and docs keep their word: links resolve, commands parse, functions and options exist, the README is short."""
import importlib
import re
import runpy
import shlex

import pytest
from helpers import ROOT, read_rows, run_script

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
PROGRAM = r"(?<!repository )(?:python|torchrun(?: --\w+ \S+)*) +([\w/]+\.py)(.*)"
COMMANDS = sorted({command for text in TEXTS.values() for command in re.findall(PROGRAM, text.replace("\\\n", ""))})
FOLDERS = (ROOT, ROOT / "variants", ROOT / "tools", ROOT / "data")
SOURCES = "".join(path.read_text(encoding="utf-8") for folder in FOLDERS for path in folder.glob("*.py"))
OF_TORCHRUN = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}
OF_OTHERS = {"--extra-index-url", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--time", "--signal", "--requeue",
             "--open-mode", "--cpus-per-task", "--kill-on-bad-exit"}  # pip's, Slurm's


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


def test_the_objective_of_the_readme_trains(tmp_path, monkeypatch):
    [program] = re.findall("```python\n(import train_grpo\n.*?)```", TEXTS["README.md"], re.DOTALL)
    (tmp_path / "reinforce.py").write_text(program, encoding="utf-8")
    words = "--task countdown --steps 1 --prompts_per_step 4 --num_iterations 1 --eval_count 0 --diffusion_steps 8"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["reinforce.py", *words.split(), "--device", "cpu"])
    runpy.run_path("reinforce.py")
    [row] = read_rows(tmp_path / "runs" / "train_grpo-countdown" / "metrics.jsonl")
    assert row["grad_norm"] > 0 and "kl" not in row  # which d1's objective logs


@pytest.mark.slow
def test_a_task_of_ones_own_lies_in_any_folder(tmp_path):
    """The program of the page, word for word, beside a task outside the repository, started from a third folder."""
    [program] = re.findall("```python\n(import data\n.*?)```", TEXTS["new_task.md"], re.DOTALL)
    programs = {"train_grpo": program, "sample": program.replace("train_grpo", "sample"),
                "train_sft": program.replace("train_grpo", "train_sft").replace("data.TASKS", "data.DEMONSTRATIONS")}
    task, elsewhere = (ROOT / "tests" / "task_sorting.py").read_text(encoding="utf-8"), tmp_path / "elsewhere"
    (tmp_path / "my_task.py").write_text(task, encoding="utf-8")
    elsewhere.mkdir()
    options = {"train_grpo": "--steps 1 --prompts_per_step 2 --num_iterations 1 --eval_count 4",
               "train_sft": "--steps 1 --batch_size 4 --count 20", "sample": "--count 4 --model runs/train_grpo-mine"}
    for name, words in options.items():
        (tmp_path / "mine.py").write_text(programs[name], encoding="utf-8")
        done = run_script(tmp_path / "mine.py", "--task", "mine", *words.split(), cwd=elsewhere, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
    assert "reward_places" in read_rows(elsewhere / "runs" / "train_grpo-mine" / "metrics.jsonl")[1]
    assert (elsewhere / "runs" / "train_sft-mine" / "summary.json").exists()
    assert len(list((elsewhere / "runs").glob("sample-*-mine/mine_32.jsonl"))) == 1


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_a_page_begins_with_its_answer(page):
    """A title, then a sentence in a paragraph of its own."""
    title, answer, *_ = TEXTS[page.name].split("\n\n")
    assert title.startswith("# ") and re.match(r"[A-Z0-9]", answer) and answer.rstrip()[-1] in ".:"
