"""Tasks, answer format, tokenizer and chat format. A task is one file with three functions."""
from data import countdown, gsm8k, math500, s1k, sudoku
from data.files import read_rows

# name -> module with load(split, ...), reward(text, example) and score(text, example)
TASKS = {"countdown": countdown, "gsm8k": gsm8k, "math500": math500, "sudoku": sudoku}
# name -> module whose load("mixed") gives demonstrations: prompts with completions
DEMONSTRATIONS = {"countdown": countdown, "s1k": s1k, "sudoku": sudoku}


def load_demonstrations(tasks, split, data, count, seed):
    """Dicts with "prompt" and "completion": of the tasks in turn, or else the rows of a file."""
    if not tasks and not data:
        raise SystemExit("error: say what to train on: --task countdown, or --data with your rows")
    if not tasks:
        rows = read_rows(data, ("prompt", "completion"), ("messages",))
        return list(map(read_demonstration, rows))
    if data and len(tasks) > 1:
        raise SystemExit(f"error: --data {data} holds rows for one --task, not for {len(tasks)}")
    lists = [DEMONSTRATIONS[task].load(split, data or None, count // len(tasks), seed)
             for task in tasks]
    if "completion" not in lists[0][0]:
        raise SystemExit("error: no demonstrations there: use --split mixed or worked, not --data")
    return [example for turn in zip(*lists) for example in turn]


def read_demonstration(row):
    """A row's "prompt", a text or all messages but the last, and its "completion"."""
    match row:
        case {"prompt": str(), "completion": str()}:
            return row
        case {"messages": [_, *_, {"role": "assistant"}] as turns} if all(map(is_turn, turns)):
            return {"prompt": turns[:-1], "completion": turns[-1]["content"].strip()}
    raise SystemExit(f"{row['where']} needs prompt and completion as text, or two or more "
                     "messages with role and content, the last of them the assistant's")


def is_turn(message):
    fields = ("role", "content")
    return isinstance(message, dict) and all(isinstance(message.get(x), str) for x in fields)
