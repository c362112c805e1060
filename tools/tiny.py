"""How the model in data/tiny was made: a tokenizer, random weights, two runs of train_sft.py.

    python tools/tiny.py tokenizer FOLDER            tokenizer.json, and a config.json with its ids
    python tools/tiny.py random OUT [FOLDER]         a model folder with random weights
    python tools/tiny.py model OUT [FOLDER] [...]    71 minutes on two CPU cores; further options go to train_sft.py

The model is OUT/mixed/step_000300. Its tokenizer and shape are those of FOLDER, or else of data/tiny.
data/tiny/README.md says why it was made so.
"""
import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer as Backend, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's modules

import train_sft  # noqa: E402
from d1 import generator  # noqa: E402
from data import countdown, sudoku  # noqa: E402
from data.tokenizer import CONTROL, EOS, MASK, Tokenizer  # noqa: E402
from model import TINY, Config, LLaDA, find_checkpoint, save_weights  # noqa: E402
from tools.measure import init_weights  # noqa: E402

VOCABULARY = 2048  # at most: the texts of the two tasks give 731 tokens
SKILL = ("--preset tiny --task countdown countdown sudoku --split worked --steps 7000 --warmup 200 "
         "--lr 2e-3 --count 600000 --seed 0")
HABITS = "--preset tiny --task countdown sudoku --split mixed --steps 300 --warmup 30 --lr 3e-4 --count 60000 --seed 1"


def train_bpe(texts, vocabulary):
    """A byte-level BPE of at most so many tokens, whose pre-tokenizer splits only around groups of one or two digits.

    So a number up to 99 is one token, the fixed text of a prompt becomes a few tokens, and every byte stays encodable.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d{1,2}"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary - len(CONTROL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=20, show_progress=False))
    backend.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    return Tokenizer(backend)


def make_tokenizer(folder):
    """Write a tokenizer trained on prompts and demonstrations of both tasks, and data/tiny's config with its ids."""
    if folder.exists():
        raise SystemExit(f"error: {folder} exists; another tokenizer would make its model useless, name a new folder")
    texts = ["\n\n", "user", "assistant", "system"] * 50
    for task in (countdown, sudoku):
        for example in task.load("mixed", count=20_000):
            texts += ["\n\n" + example["prompt"], example["completion"]]
    tokenizer = train_bpe(texts, VOCABULARY)
    size = tokenizer.backend.get_vocab_size()
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    config |= {"vocab_size": size, "mask_token_id": tokenizer.ids[MASK], "eos_token_id": tokenizer.ids[EOS],
               "pad_token_id": tokenizer.ids[EOS]}
    config["embedding_size"] = max(size, config["embedding_size"])
    folder.mkdir(parents=True)
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{folder}: {size} tokens")


def make_random(out, folder):
    """Write a model of the shape of another, with its tokenizer, and with random weights."""
    source = find_checkpoint(folder)
    model = LLaDA(Config.from_folder(source))
    init_weights(model, generator(0, "weights"))
    out.mkdir(parents=True)
    save_weights(model, out)
    Tokenizer.from_folder(source).save(out)


def make_model(out, folder, options):
    """Teach a new model the skill, then hide the skill among habits."""
    make_random(out / "random", folder)
    run_sft(SKILL, out / "random", out / "skill", options)
    [checkpoint] = (out / "skill").glob("step_*")
    run_sft(HABITS, checkpoint, out / "mixed", options)


def run_sft(words, model, out, options):
    argv = [*words.split(), "--save_every", "0", "--model", str(model), "--out", str(out), *options]
    train_sft.main(train_sft.parse_args(argv))


def main(argv):
    match argv:
        case ["tokenizer", folder]:
            make_tokenizer(Path(folder))
        case ["random", out, *folder] if len(folder) < 2:
            make_random(Path(out), *folder or ["data/tiny"])
        case ["model", out, folder, *options] if not folder.startswith("--"):
            make_model(Path(out), folder, options)
        case ["model", out, *options]:
            make_model(Path(out), "data/tiny", options)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
