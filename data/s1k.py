"""s1K (arXiv:2501.19393): questions with long reasoning traces, for the first stage of d1."""
from data.files import find_file, read_rows
from data.format import FORMAT, write_completion

FILES = {"train": ("s1k", "simplescaling/s1K", "data/train-00000-of-00001.parquet")}
QUESTION = "Answer the question."


def load(split="mixed", data=None, count=None, seed=0):
    """Demonstrations as dicts with "prompt" and "completion": the trace, then the attempt.

    data: see `find_file`; of a row's thinking_trajectories, a list, the first counts.
    """
    columns = ("question", "thinking_trajectories", "attempt")
    rows = read_rows(find_file(data, "train", FILES), columns)
    return list(map(read_demonstration, rows[:count]))


def read_demonstration(row):
    traces = row["thinking_trajectories"]
    trace = traces[0] if isinstance(traces, list) and traces else traces
    texts = (row["question"], trace, row["attempt"])
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise SystemExit(f"{row['where']} question, the first of thinking_trajectories and "
                         "attempt must be text")
    return {"prompt": f"{FORMAT}\n\n{QUESTION}\n\n{row['question'].strip()}",
            "completion": write_completion(trace.strip(), row["attempt"].strip())}
