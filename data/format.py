"""The answer format shared by all tasks, in prompts, demonstrations, rewards and scores alike; and reading of files."""
import csv
import io
import json
import re
from pathlib import Path

FORMAT = ("Think first, then answer, with each tag on a line of its own:\n"
          "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>")
# Linear: no two parts of the pattern can match the same text in two ways.
STRICT = re.compile(r"<reasoning>\n(?:(?!</?reasoning>|</?answer>).)*\n</reasoning>\n"
                    r"<answer>\n(?:(?!</?reasoning>|</?answer>).)*\n</answer>\s*", re.DOTALL)
COUNTS = {"train": 4096, "test": 512, "worked": 100_000, "mixed": 100_000}  # generated examples, unless told otherwise
MAX_TEXT = 20_000  # characters: longer than any completion; a longer text is cut before it is parsed


def default_count(split):
    """How many examples a split has where they are generated. Raises ValueError for a split that does not exist."""
    if split not in COUNTS:
        raise ValueError(f"--split {split}: choose from {', '.join(COUNTS)}")
    return COUNTS[split]


def write_completion(reasoning, answer):
    """The text of a completion in the shared format."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"


def closed_answer(text):
    """The text inside the last closed <answer>...</answer>, stripped, or None where no answer was closed.

    Of several closed answers the last counts; of nested ones the innermost; an unclosed one after it is ignored, and so
    is a closing tag without an opening one.
    """
    text = text[-MAX_TEXT:]
    last_end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, last_end) if last_end >= 0 else -1
    return text[start + len("<answer>"):text.find("</answer>", start)].strip() if start >= 0 else None


def is_formatted(text):
    """Whether the whole text is <reasoning> and <answer>, once each, closed, every tag on its own line."""
    return len(text) <= MAX_TEXT and STRICT.fullmatch(text.strip()) is not None


def read_rows(path, columns):
    """Rows of a JSONL, JSON (list) or CSV file as dicts holding at least `columns`, each with its "row" number from 1.

    The row is the line (the last one of a CSV row that spans several), or the place in a JSON list. Strings stay
    strings, so leading zeros survive. Raises FileNotFoundError or ValueError naming file, row and column.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")  # tolerates the BOM that spreadsheets write, and CRLF
    except UnicodeDecodeError as error:
        raise ValueError(f"--data {path}: not UTF-8 text ({error})") from None
    if path.suffix.lower() == ".csv":
        numbered = parse_csv(text, path)
    elif path.suffix.lower() == ".json":
        rows = parse_json(text, path, 1)
        if not isinstance(rows, list):
            raise ValueError(f"--data {path}: not a list of rows; one row per line is .jsonl")
        numbered = list(enumerate(rows, 1))
    else:  # split at newlines only: JSON strings may hold the other line ends that splitlines knows
        numbered = [(n, parse_json(line, path, n)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise ValueError(f"--data {path}: the file holds no rows")
    for n, row in numbered:
        absent = [c for c in columns if not isinstance(row, dict) or row.get(c) is None]
        if absent:
            raise ValueError(f"--data {path}, row {n}: no {absent[0]!r}; a row needs {', '.join(columns)}")
    return [{**row, "row": n} for n, row in numbered]


def parse_csv(text, path):
    reader = csv.DictReader(io.StringIO(text))
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"--data {path}, row {reader.line_num + 1}: not CSV ({error})") from None


def parse_json(text, path, row):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--data {path}, row {row}: not JSON ({error})") from None
