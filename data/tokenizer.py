"""tokenizer.json and LLaDA's chat format. `python -m data.tokenizer FOLDER` makes the embedded model's tokenizer."""
import re
import sys
from pathlib import Path

from tokenizers import Tokenizer as Backend

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
HEADER, END_HEADER, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
CONTROL = (BOS, EOS, MASK, HEADER, END_HEADER, EOT)


class Tokenizer:
    """LLaDA's tokenizer and chat template. Control tokens are placed by id; text can never turn into one."""

    def __init__(self, backend, source="tokenizer.json"):
        self.backend, self.source = backend, source
        self.ids = {token: backend.token_to_id(token) for token in CONTROL}
        for token in (BOS, EOS, MASK):
            if self.ids[token] is None:
                raise ValueError(f"{source}: no token {token}, is this LLaDA's tokenizer?")
        self.mask_id, self.eos_id, self.eot_id = self.ids[MASK], self.ids[EOS], self.ids[EOT]
        self.inside = re.compile("|".join(f"(?<={re.escape(t[:2])})(?={re.escape(t[2:])})" for t in CONTROL))

    @classmethod
    def from_folder(cls, folder, config=None):
        """Read `folder`/tokenizer.json; with `config` (model.Config), check that its ids fit the network."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: no tokenizer.json here")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a file it cannot parse
            raise ValueError(f"{path}: not a readable tokenizer ({str(error).splitlines()[0]})") from None
        tokenizer = cls(backend, source=str(path))
        if config is not None:
            largest = max(backend.get_vocab().values())
            if largest >= config.embedding_size:
                raise ValueError(f"{path}: token id {largest} lies outside the embedding of "
                                 f"{config.embedding_size} rows")
            for ours, theirs, name in ((tokenizer.mask_id, config.mask_token_id, MASK),
                                       (tokenizer.eos_id, config.eos_token_id, EOS)):
                if ours != theirs:
                    raise ValueError(f"{path}: {name} has id {ours}, config.json says {theirs}")
        return tokenizer

    def encode(self, text):
        """Token ids of plain text. A control token's name in it is cut in two before encoding, so it stays text."""
        pieces = self.inside.split(text)
        return [i for piece in pieces for i in self.backend.encode(piece, add_special_tokens=False).ids]

    def encode_chat(self, messages):
        """Ids of LLaDA's chat template: messages are {"role", "content"}; ends with the assistant header, always."""
        if None in self.ids.values():
            raise ValueError(f"{self.source}: no chat tokens (a Base model?); use an Instruct checkpoint")
        ids = [self.ids[BOS]] if messages else []
        for message in messages:
            ids += self.header(message["role"]) + self.encode("\n\n" + message["content"].strip()) + [self.eot_id]
        return ids + self.header("assistant") + self.encode("\n\n")

    def header(self, role):
        return [self.ids[HEADER], *self.encode(role), self.ids[END_HEADER]]

    def encode_prompt(self, prompt):
        """One user turn."""
        return self.encode_chat([{"role": "user", "content": prompt}])

    def encode_completion(self, text):
        """An assistant's answer as it is trained: text, <|eot_id|>, <|endoftext|>."""
        return [*self.encode(text), self.eot_id, self.eos_id]

    def decode(self, ids):
        """The text before the first EOS, control tokens left out."""
        ids = list(map(int, ids))
        if self.eos_id in ids:
            ids = ids[:ids.index(self.eos_id)]
        return self.backend.decode([i for i in ids if i not in self.ids.values()], skip_special_tokens=False)

    def save(self, folder):
        self.backend.save(str(Path(folder) / "tokenizer.json"))


def train_bpe(texts, vocab_size):
    """A byte-level BPE whose pre-tokenizer splits only around groups of one or two digits.

    So a number up to 99 is one token, the fixed text of a prompt becomes a few tokens, and every byte stays encodable.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d{1,2}"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=20, show_progress=False))
    backend.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    return Tokenizer(backend)


def main(folder):
    """Train a tokenizer like the embedded model's on the prompts and demonstrations of the tasks that generate them."""
    from data import countdown, sudoku
    if (Path(folder) / "tokenizer.json").exists():
        raise SystemExit(f"error: {folder}/tokenizer.json exists; other ids would make its model useless, "
                         "name a new folder")
    texts = ["\n\n", "user", "assistant", "system"] * 50
    for task in (countdown, sudoku):
        for example in task.load("mixed", count=20_000):
            texts += ["\n\n" + example["prompt"], example["completion"]]
    tokenizer = train_bpe(texts, vocab_size=2048)
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    ids = {token: tokenizer.ids[token] for token in CONTROL}
    print(f"{folder}/tokenizer.json: {tokenizer.backend.get_vocab_size()} tokens, {ids}")


if __name__ == "__main__":
    main(*sys.argv[1:])
