"""Rows of a file or of a public dataset: JSONL, JSON, CSV, parquet. Errors name file and row."""
import csv
import io
import json
import re
from pathlib import Path

MAX_ROW = 1_000_000  # characters, many times what a network reads
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def find_file(data, names, hub=None):
    """The path of `data`: a file; a folder with one of `names`; a dataset's id.

    None, or a folder without these names, means the task's public file: hub, (dataset id, name).
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
    raise SystemExit(f"error: dataset {dataset}: {name} is not cached or reachable ({reason}): "
                     f"use --data FILE, or run: hf download {dataset} {name} --repo-type dataset")


def read_rows(path, *layouts):
    """Rows of a file as dicts, with the line (or the place in a list, from 1) as "row".

    layouts: tuples of columns; the first that fits the first row, else the last, is required.
    """
    numbered = parse_file(Path(path))
    if not numbered:
        raise SystemExit(f"error: --data {path}: the file holds no rows")
    first = numbered[0][1]
    present = set(first) if isinstance(first, dict) else set()
    columns = next((names for names in layouts if present.issuperset(names)), layouts[-1])
    for n, row in numbered:
        absent = [name for name in columns if not isinstance(row, dict) or row.get(name) is None]
        if absent:
            raise SystemExit(f"error: --data {path}, row {n}: no {absent[0]!r} of {columns}")
        text = json.dumps(row, ensure_ascii=False, default=str)
        if len(text) > MAX_ROW or re.search("[\ud800-\udfff]", text):
            raise SystemExit(f"error: --data {path}, row {n}: too long, or a lone surrogate in it")
    return [{**row, "row": n} for n, row in numbered]


def parse_file(path):
    """[(number, row)] of a file, by its suffix."""
    suffix = path.suffix.lower()
    n, numbered = 1, []  # n: number of the row that is read
    try:
        if suffix == ".parquet":
            from pyarrow import parquet
            return list(enumerate(parquet.read_table(path).to_pylist(), 1))
        text = path.read_text(encoding="utf-8-sig")  # without the mark that spreadsheets write
        if suffix == ".json":
            rows = json.loads(text)
            return list(enumerate(rows if isinstance(rows, list) else [rows], 1))
        if suffix == ".csv":
            for row in (reader := csv.DictReader(io.StringIO(text))):
                numbered.append((reader.line_num, row))
                n = reader.line_num + 1
            return numbered
        for n, line in enumerate(text.split("\n"), 1):  # a JSON text may hold other line ends
            if line.strip():
                numbered.append((n, json.loads(line)))
        return numbered
    except ImportError:
        raise SystemExit(f"error: --data {path}: parquet needs pip install pyarrow") from None
    except (OSError, ValueError, RecursionError, csv.Error) as error:  # none, or another kind
        reason = str(error).splitlines()[0]
        raise SystemExit(f"error: --data {path}, row {n}: cannot be read ({reason})") from None
