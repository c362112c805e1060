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
    "tools.benchmark": "", "tools.experiments": "ablations", "tools.fast_table": "", "tools.gpu_8b": "",
    "tools.merge": "BASE ADAPTER OUT", "tools.paper_table": "", "tools.picture": "RUN", "tools.plan": "train_sft",
    "tools.methods": "", "tools.plot": "RUN", "tools.regrade": "PATH", "tools.report": "RUN", "tools.scaling": "",
    "tools.soak": "", "tools.variance": "",
}
BAD = ("-1", "nan", "inf", "1e400", "-0.5", "x")
PLAIN_ZERO = {"seed", "seeds", "index", "count"}  # of which nobody asks what 0 means
REFUSED_LATER = {"temperature", "group_size", "gen_length", "diffusion_steps", "block_length", "max_length"}


class Parsed(Exception):
    """A program without a function of its own for it has read its command line."""


def parse(program, *words):
    """Do with a command line what a program does before it begins to work. Returns the actions of its parser."""
    module, words, actions = importlib.import_module(program), [*PROGRAMS[program].split(), *words], []

    def spy(name):
        read = getattr(argparse.ArgumentParser, name)

        def parse_args(parser, *args):
            actions[:] = parser._actions
            options = read(parser, *args)
            if hasattr(module, "parse_args") or name == "parse_known_args" and not hasattr(options[0], "script"):
                return options
            raise Parsed
        return parse_args

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Parsed):
        for name in ("parse_args", "parse_known_args"):
            patch.setattr(argparse.ArgumentParser, name, spy(name))
        args = getattr(module, "parse_args", module.main)(words)
        if "dtype" in args:
            with processes(args):
                pass
    return actions


def numbers_of(program):
    """Its options that are numbers; of a variant, those that the path's script does not have."""
    numbers = "int", "float", "number"
    actions = [action for action in parse(program) if getattr(action.type, "__name__", "") in numbers]
    return [action for action in actions if not (program.startswith("variants") and action.metavar)]


def test_no_program_is_left_out():
    files = [path for pattern in ("*.py", "variants/*.py", "tools/*.py") for path in ROOT.glob(pattern)]
    have_options = [path.relative_to(ROOT) for path in files if ".add_argument(" in path.read_text(encoding="utf-8")]
    names = {str(path).removesuffix(".py").replace("/", ".") for path in have_options}
    assert names - {"run", "tools.behaviours"} == set(PROGRAMS)  # those two add to the parsers of others


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_number_that_makes_no_sense_is_refused_by_name(program):
    for action in numbers_of(program):
        option = action.option_strings[0]
        for text in BAD:
            stderr = io.StringIO()
            with pytest.raises(SystemExit) as stopped, contextlib.redirect_stderr(stderr):
                parse(program, option, text)
                raise AssertionError(f"{program} takes {option} {text}")
            said = stderr.getvalue() if stopped.value.code == 2 else stopped.value.code
            assert re.search(rf"error: [^\n]*{option}[ :][^\n]*\n?$", said), (option, text, said)


@pytest.mark.parametrize("program", PROGRAMS)
def test_zero_is_refused_or_its_meaning_is_told(program, capsys):
    for action in numbers_of(program):
        try:
            parse(program, action.option_strings[0], "0")
        except SystemExit as stopped:
            assert action.option_strings[0] in f"{stopped.code}{capsys.readouterr().err}"
        else:
            is_told = re.search(r"\b0\b", action.help or "") or action.dest in PLAIN_ZERO | REFUSED_LATER
            assert is_told, f"{program} {action.option_strings[0]}: {action.help}"


@pytest.mark.slow
@pytest.mark.parametrize("script, option", [
    ("sample.py --task countdown", "--temperature"), ("train_sft.py --task countdown", "--microbatch"),
    ("train_grpo.py --task countdown", "--lr"), ("variants/grpo.py --task sudoku", "--upper_weight"),
    ("variants/evaluate.py --task countdown", "--cfg_scale"), ("variants/just_grpo.py --task countdown", "--beta")])
def test_a_script_ends_before_it_works(script, option, tmp_path):
    done = run_script(*script.split(), option, "nan", "--out", tmp_path / "run")
    assert done.returncode and option in done.stderr.splitlines()[-1] and not (tmp_path / "run").exists(), done.stderr
