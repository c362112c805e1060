"""Tasks, answer format, tokenizer and chat format. A task is one file with three functions."""
from data import countdown, gsm8k, math500, s1k, sudoku

# name -> module with load(split, ...), reward(text, example) and score(text, example)
TASKS = {"countdown": countdown, "gsm8k": gsm8k, "math500": math500, "sudoku": sudoku}
# name -> module whose load("mixed") gives demonstrations: prompts with completions
DEMONSTRATIONS = {"countdown": countdown, "s1k": s1k, "sudoku": sudoku}
