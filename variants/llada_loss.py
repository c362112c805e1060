"""SFT in which every row counts the same, as in LLaDA's own fine-tuning (its GUIDELINES.md) and the d1 authors' runs.

    python variants/llada_loss.py --task countdown sudoku
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_sft  # noqa: E402


def llada_weights(t, answer):
    """1 / t, divided by the answer tokens of the row, and by the rows: every row counts the same.

    t (B,); answer (B, T) bool. Returns (B, T), see d1.sft_weights.
    """
    lengths = answer.sum(dim=1).clamp(min=1)  # (B,)
    return (1 / t / lengths / len(t))[:, None].expand(answer.shape)


if __name__ == "__main__":
    train_sft.main(train_sft.parse_args(), weigh=llada_weights)
