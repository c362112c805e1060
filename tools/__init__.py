"""Programs around the path. Each runs by itself, from any working directory."""
import argparse
import math


def number(kind=int, least=0):
    """An argparse type: a finite int or float, `least` or above."""
    def number(text):  # argparse gives this name where the text is no number
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: must be {least} or above")
        return value
    return number
