"""Tasks, answer format, tokenizer and chat format. A task is one file with three functions, and one line here."""
from data import countdown, sudoku

# name -> module with load(split, ...), reward(text, example), score(text, example)
TASKS = {"countdown": countdown, "sudoku": sudoku}
