"""Rows of a file or of a public dataset: JSONL, JSON, CSV, parquet. Errors name file and row."""
import csv
import io
import json
import re
from pathlib import Path

MAX_ROW = 1_000_000  # characters, many times what a network reads
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def find_file(data, split, files):
    """The path of `data`: a file, a folder, the id of a dataset laid out as the public one.

    files: {split: (the file's name in a folder, without suffix; public dataset, name there)}. The
    public one, where there is one, is meant by None, and by a folder without that name.
    """
    if split not in files:
        raise SystemExit(f"error: --split {split}: choose from {', '.join(files)}")
    stem, *hub = files[split]
    if data is None:
        return fetch(*hub)
    path = Path(data)
    if path.is_dir():
        names = [stem + suffix for suffix in SUFFIXES]
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
    """Rows of a file as dicts, with "where": the beginning of an error about the row.

    layouts: tuples of columns; the first that fits the first row, else the last, is required.
    """
    numbered = [(n, row if isinstance(row, dict) else {}) for n, row in parse_file(Path(path))]
    if not numbered:
        raise SystemExit(f"error: --data {path}: the file holds no rows")
    present = numbered[0][1].keys()
    columns = next((names for names in layouts if present >= set(names)), layouts[-1])
    for n, row in numbered:
        absent = [name for name in columns if row.get(name) is None]
        if absent:
            needed = " or ".join(map(", ".join, layouts))
            raise SystemExit(f"error: --data {path}, row {n}: no {absent[0]!r}, need {needed}")
        text = json.dumps(row, ensure_ascii=False, default=str)
        if len(text) > MAX_ROW or not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise SystemExit(f"error: --data {path}, row {n}: too long, or a lone surrogate in it")
    return [{**row, "where": f"error: --data {path}, row {n}:"} for n, row in numbered]


def parse_file(path):
    """[(line, or from 1 the place in a list, row)] of a file, by its suffix."""
    suffix = path.suffix.lower()
    n, numbered = 1, []  # n: number of the row that is read
    try:
        if suffix == ".parquet":
            from pyarrow import parquet
            table = parquet.read_table(io.BytesIO(path.read_bytes()))
            return list(enumerate(table.to_pylist(), 1))
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
    except OSError as error:
        raise SystemExit(f"error: --data {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError, csv.Error) as error:  # another kind of file
        reason = str(error).splitlines()[0]
        raise SystemExit(f"error: --data {path}, row {n}: cannot be read ({reason})") from None
