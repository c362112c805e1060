"""Rows of a file or of a public dataset: JSONL, JSON, CSV, parquet. Errors name file and row."""
import csv
import io
import json
import re
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def find_file(data, names, hub=None):
    """The path of a task's rows. hub: its public file, (dataset id, name), where it has one.

    data: a file; a folder that holds one of `names`; the id of a dataset with a file as in `hub`.
    None, or a folder without these names, leads to `hub`.
    """
    if data is None:
        return fetch(*hub)
    path = Path(data)
    if path.is_dir():
        present = [path / name for name in names if (path / name).is_file()]
        if not present and not hub:
            raise SystemExit(f"error: --data {data}: this folder holds none of {', '.join(names)}")
        return present[0] if present else fetch(*hub)
    if hub and not path.exists() and re.fullmatch(r"[\w-]+/[\w-]+", str(data)):
        return fetch(str(data), hub[1])
    return path


def fetch(dataset, name):
    """The path of a file of a public dataset: downloaded once, then read from the cache."""
    from huggingface_hub import hf_hub_download  # only needed for public datasets
    from huggingface_hub.errors import HfHubHTTPError
    try:
        return Path(hf_hub_download(dataset, name, repo_type="dataset"))
    except (HfHubHTTPError, OSError) as error:  # no such file, or neither cached nor a network
        reason = str(error).strip().splitlines()[0]
    raise SystemExit(f"error: dataset {dataset}: {name} is neither cached nor reachable ({reason}); "
                     "name a file with --data, or where there is a network run: "
                     f"hf download {dataset} {name} --repo-type dataset")


def read_rows(path, *layouts):
    """Rows of a file as dicts, each with its number as "row". Strings keep their leading zeros.

    layouts: tuples of columns; the first that fits the first row, else the last, is required. row:
    the line (of a CSV row the last) or the place in a list, from 1.
    """
    path = Path(path)
    if not path.is_file():
        raise SystemExit(f"error: --data {path}: no such file")
    numbered = parse_file(path)
    if not numbered:
        raise SystemExit(f"error: --data {path}: the file holds no rows")
    first = numbered[0][1]
    present = set(first) if isinstance(first, dict) else set()
    columns = next((names for names in layouts if present.issuperset(names)), layouts[-1])
    for n, row in numbered:
        absent = [name for name in columns if not isinstance(row, dict) or row.get(name) is None]
        if absent:
            raise SystemExit(f"error: --data {path}, row {n}: no {absent[0]!r}; a row needs "
                             f"{', '.join(columns)}")
    return [{**row, "row": n} for n, row in numbered]


def parse_file(path):
    """[(number, row)] of a file, by its suffix."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return list(enumerate(parse_parquet(path), 1))
    try:
        text = path.read_text(encoding="utf-8-sig")  # without the mark that spreadsheets write
    except UnicodeDecodeError as error:
        raise SystemExit(f"error: --data {path}: not UTF-8 text ({error})") from None
    if suffix == ".csv":
        return parse_csv(text, path)
    if suffix == ".json":
        rows = parse_json(text, path, 1)
        if not isinstance(rows, list):
            raise SystemExit(f"error: --data {path}: not a list of rows; a row per line is .jsonl")
        return list(enumerate(rows, 1))
    lines = text.split("\n")  # splitlines would split at characters that JSON allows in a text
    return [(n, parse_json(line, path, n)) for n, line in enumerate(lines, 1) if line.strip()]


def parse_json(text, path, row):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"error: --data {path}, row {row}: not JSON ({error})") from None


def parse_csv(text, path):
    reader = csv.DictReader(io.StringIO(text))
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        row = reader.line_num + 1
        raise SystemExit(f"error: --data {path}, row {row}: not CSV ({error})") from None


def parse_parquet(path):
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise SystemExit(f"error: --data {path}: parquet needs pyarrow: pip install pyarrow") from None
    try:
        return parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"error: --data {path}: not a parquet file ({reason})") from None
