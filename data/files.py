"""Rows of a local file or of a public dataset: JSONL, JSON, CSV, parquet. Bad rows are named by file and row number."""
import csv
import io
import json
import re
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def find_file(data, names=(), hub=None):
    """The path of a task's rows. Raises FileNotFoundError in one line.

    data: a file; a folder, of which the first of `names` that is there is taken; the id of a dataset on the hub; or
    None. The last two, and a folder without such a file, lead to `hub`, (dataset id, file), where the task has one.
    """
    path = Path(data) if data is not None else None
    if path is not None and path.is_dir():
        path = next((path / name for name in names if (path / name).is_file()), None)
        if path is None and hub is None:
            raise FileNotFoundError(f"--data {data}: this folder holds none of {', '.join(names)}")
    elif path is not None and not path.exists() and hub and re.fullmatch(r"[\w-]+/[\w-]+", str(data)):
        return fetch(str(data), hub[1])
    return path or fetch(*hub)


def fetch(dataset, name):
    """The path of one file of a dataset of the hub: downloaded once, then read from the cache, also without network."""
    from huggingface_hub import snapshot_download  # comes with tokenizers; only needed for public datasets
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    try:
        path = Path(snapshot_download(dataset, repo_type="dataset", allow_patterns=[name])) / name
        reason = "no such file"
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        path, reason = None, str(error).strip().splitlines()[0]
    if path is None or not path.is_file():
        raise FileNotFoundError(f"dataset {dataset}: {name} is neither cached nor reachable ({reason}); where there "
                                f"is a network run: hf download {dataset} {name} --repo-type dataset; or name a local "
                                "file with --data")
    return path


def read_rows(path, columns, *others):
    """Rows of a JSONL, JSON (list), CSV or parquet file as dicts holding at least `columns`, and "row" from 1.

    others: other columns that the file may have in their stead. The row is the line (the last one of a CSV row that
    spans several), or the place in a list. Strings stay strings, so leading zeros survive. Raises FileNotFoundError or
    ValueError naming file, row and column.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: no such file")
    if path.suffix.lower() == ".parquet":
        numbered = list(enumerate(parse_parquet(path), 1))
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")  # tolerates the BOM that spreadsheets write, and CRLF
        except UnicodeDecodeError as error:
            raise ValueError(f"--data {path}: not UTF-8 text ({error})") from None
        numbered = parse_text(text, path)
    if not numbered:
        raise ValueError(f"--data {path}: the file holds no rows")
    wanted = next((names for names in others if set(names) <= set(numbered[0][1])), columns)
    for n, row in numbered:
        absent = [c for c in wanted if not isinstance(row, dict) or row.get(c) is None]
        if absent:
            raise ValueError(f"--data {path}, row {n}: no {absent[0]!r}; a row needs {', '.join(wanted)}")
    return [{**row, "row": n} for n, row in numbered]


def parse_text(text, path):
    """(number, row) of every row of CSV, JSON or JSONL text."""
    if path.suffix.lower() == ".csv":
        return parse_csv(text, path)
    if path.suffix.lower() == ".json":
        rows = parse_json(text, path, 1)
        if not isinstance(rows, list):
            raise ValueError(f"--data {path}: not a list of rows; one row per line is .jsonl")
        return list(enumerate(rows, 1))
    # split at newlines only: JSON strings may hold the other line ends that splitlines knows
    return [(n, parse_json(line, path, n)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]


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


def parse_parquet(path):
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise ValueError(f"--data {path}: parquet needs pyarrow: pip install pyarrow, or give rows as JSONL") from None
    try:
        return parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"--data {path}: not a parquet file ({str(error).splitlines()[0]})") from None
