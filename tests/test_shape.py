"""The budget: how much there is to read, and that the path stands alone."""
import ast
import io
import re
import sys
import tokenize

import pytest
import train_grpo
from helpers import PROBLEMS, ROOT, train

NAMES = "d1 lora model parallel run sample train_grpo train_sft"
PATH = [ROOT / f"{name}.py" for name in NAMES.split()]
DATA = sorted((ROOT / "data").glob("*.py"))
AROUND = [path for folder in ("variants", "tools", "tests") for path in sorted((ROOT / folder).glob("*.py"))]
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def functions(path):
    """Every function and method of a file, inner ones too, as syntax trees."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def first_line(node):
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def code_tokens(path):
    """The tokens of a file that are neither a comment, nor layout, nor a docstring."""
    docstrings = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstrings.add(node.body[0].lineno)
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return [token for token in tokens if token.type not in NO_CODE
            and not (token.type == tokenize.STRING and token.start[0] in docstrings)]


def code_lines(path):
    return len({number for t in code_tokens(path) for number in range(t.start[0], t.end[0] + 1)})


# ---------------------------------------------------------------- the whole

def test_the_path_is_short():
    assert sorted(ROOT.glob("*.py")) == PATH  # what else there is lies in a folder
    assert sum(len(lines_of(path)) for path in PATH) <= 1650
    assert sum(map(code_lines, PATH)) <= 1205  # the design asks for 1,150


def test_the_data_folder_is_short():
    assert sum(len(lines_of(path)) for path in DATA) <= 850


@pytest.mark.parametrize("path", PATH + DATA, ids=lambda path: path.name)
def test_files_and_functions_are_short(path):
    assert len(lines_of(path)) <= 300
    sizes = {node.name: node.end_lineno - first_line(node) + 1 for node in functions(path)}
    assert not {name: size for name, size in sizes.items() if size > (60 if name == "main" else 45)}


@pytest.mark.parametrize("path", PATH + DATA, ids=lambda path: path.name)
def test_lines_are_narrow(path):
    """Below 100 characters, but for a shape at the end of a line such as `# (N, G, L)`."""
    for number, line in enumerate(lines_of(path), 1):
        has_shape = re.search(r"# .*\(\w+(, \w+)*,?\)", line)
        assert len(line) < (120 if has_shape else 100), f"{path.name}:{number}"


def test_lines_around_the_path_are_narrow():
    wide = [f"{path.name}:{number}" for path in AROUND for number, line in enumerate(lines_of(path), 1)
            if len(line) >= 120]
    assert not wide


@pytest.mark.parametrize("path", PATH + DATA, ids=lambda path: path.name)
def test_the_path_imports_nothing_from_around_it(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        assert not {module.split(".")[0] for module in modules} & {"variants", "tools", "tests"}


def test_the_options_of_rl_are_few():
    for words in (["--task", "countdown"], ["--task", "gsm8k", "--preset", "8b"]):
        options = [action for action in train_grpo.new_parser(words)._actions if action.dest != "help"]
        assert len(options) <= 36


# ---------------------------------------------------------------- one step of RL

def trace_a_step(out, monkeypatch):
    """{path: first lines of the functions that ran} of one default step, without the network."""
    ran, original = {}, train_grpo.train_step

    def tracer(frame, event, argument):
        path = ROOT / frame.f_code.co_filename
        if path in PATH and path.name not in ("model.py", "lora.py"):
            ran.setdefault(path, set()).add(frame.f_code.co_firstlineno)

    def traced_step(*args, **options):
        before = sys.gettrace()
        sys.settrace(tracer)
        try:
            return original(*args, **options)
        finally:
            sys.settrace(before)

    monkeypatch.setattr(train_grpo, "train_step", traced_step)
    train(train_grpo, out, f"--steps 1 --data {PROBLEMS}")
    return ran


def test_one_step_of_rl_is_short(tmp_path, monkeypatch):
    """What a reader follows: every function that ran, whole, and the plain dataclasses that these name."""
    lines, tokens, names = 0, 0, set()
    for path, ran in trace_a_step(tmp_path / "run", monkeypatch).items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        methods = [node for item in tree.body if isinstance(item, ast.ClassDef) for node in item.body]
        outermost = [node for node in tree.body + methods if isinstance(node, ast.FunctionDef)]
        read = {range(first_line(node), node.end_lineno + 1) for node in outermost
                if any(first_line(node) <= line <= node.end_lineno for line in ran)}
        names |= {node.name for node in outermost if first_line(node) in ran}
        text = "\n".join("\n".join(lines_of(path)[span.start - 1:span.stop - 1]) for span in read)
        for item in tree.body:
            is_named = isinstance(item, ast.ClassDef) and item.decorator_list and re.search(rf"\b{item.name}\b", text)
            if is_named and not any(item.lineno <= span.start <= item.end_lineno for span in read):
                read.add(range(first_line(item), item.end_lineno + 1))
        lines += sum(map(len, read))
        tokens += sum(any(t.start[0] in span for span in read) for t in code_tokens(path))
    assert {"train_step", "roll_out", "generate", "choose", "one_step_logps", "diffu_grpo_loss"} <= names
    assert lines <= 300 and tokens <= 3200, (lines, tokens)
