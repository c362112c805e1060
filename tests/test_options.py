"""Every number of every program: what has no meaning is refused in one line that names the option, before any work."""
import argparse
import contextlib
import importlib
import io
import re

import pytest
from helpers import ROOT, run_script

from parallel import processes

PROGRAMS = {  # module: words that it needs besides
    "sample": "--task countdown", "train_sft": "--task countdown", "train_grpo": "--task countdown",
    "variants.evaluate": "--task countdown", "variants.grpo": "--task countdown --estimator trajectory",
    "variants.just_grpo": "--task countdown",
}
BAD = ("-1", "nan", "inf", "1e400", "-0.5", "x", "5000000000")
PLAIN_ZERO = {"seed", "count"}  # of which nobody asks what 0 means
REFUSED_BY_MAIN = {"temperature", "group_size", "gen_length", "diffusion_steps", "block_length", "max_length"}


def parse(program, *words):
    """Do with a command line what a program does before it begins to work."""
    with processes(importlib.import_module(program).parse_args([*PROGRAMS[program].split(), *words])):
        pass


def numbers_of(program):
    """Its options that are numbers; of a variant, those that the path's script does not have."""
    actions, read = [], argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args",
                      lambda parser, *args: actions.extend(parser._actions) or read(parser, *args))
        parse(program)
    actions = [action for action in actions if action.type in (int, float)]
    return [action for action in actions if not (program.startswith("variants") and action.metavar)]


def test_no_program_is_left_out():
    files = [path for pattern in ("*.py", "variants/*.py") for path in ROOT.glob(pattern)]
    names = {str(path.relative_to(ROOT)).removesuffix(".py").replace("/", ".") for path in files
             if "def parse_args(" in path.read_text(encoding="utf-8")}
    assert names == set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_number_that_makes_no_sense_is_refused_by_name(program):
    for action in numbers_of(program):
        option = action.option_strings[0]
        for text in BAD:
            stderr = io.StringIO()
            with pytest.raises(SystemExit) as stopped, contextlib.redirect_stderr(stderr):
                parse(program, option, text)
                print(f"{program} takes {option} {text}")
            said = stderr.getvalue() if stopped.value.code == 2 else stopped.value.code
            assert re.search(rf"error: [^\n]*{option}[ :][^\n]*\n?$", said), (option, text, said)


@pytest.mark.parametrize("program", PROGRAMS)
def test_zero_is_refused_or_its_meaning_is_told(program):
    for action in numbers_of(program):
        try:
            parse(program, action.option_strings[0], "0")
        except SystemExit as stopped:
            assert action.option_strings[0] in str(stopped.code)
        else:
            assert re.search(r"\b0\b", action.help) or action.dest in PLAIN_ZERO | REFUSED_BY_MAIN, action.help


@pytest.mark.slow
@pytest.mark.parametrize("script, option", [
    ("sample.py --task countdown", "--temperature"), ("train_sft.py --task countdown", "--microbatch"),
    ("train_grpo.py --task countdown", "--lr"), ("variants/grpo.py --task sudoku", "--upper_weight"),
    ("variants/evaluate.py --task countdown", "--cfg_scale"), ("variants/just_grpo.py --task countdown", "--beta")])
def test_a_script_ends_before_it_works(script, option, tmp_path):
    done = run_script(*script.split(), option, "nan", "--out", tmp_path / "run")
    assert done.returncode and option in done.stderr.splitlines()[-1] and not (tmp_path / "run").exists(), done.stderr
