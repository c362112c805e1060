"""tokenizer.json, and LLaDA's chat format."""
import re
from pathlib import Path

from tokenizers import Tokenizer as Backend

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
HEADER, END_HEADER, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
CONTROL = (BOS, EOS, MASK, HEADER, END_HEADER, EOT)
# the place behind the first two characters of a control token's name
INSIDE = "|".join(f"(?<={re.escape(name[:2])})(?={re.escape(name[2:])})" for name in CONTROL)


class Tokenizer:
    """LLaDA's tokenizer and chat template. Control tokens are placed by id, never by a text."""

    def __init__(self, backend, source="tokenizer.json"):
        self.backend, self.source = backend, source
        self.ids = {name: backend.token_to_id(name) for name in CONTROL}
        for name in (BOS, EOS, MASK):
            if self.ids[name] is None:
                raise SystemExit(f"error: {source}: no token {name}, is this LLaDA's tokenizer?")
        self.mask_id, self.eos_id, self.eot_id = self.ids[MASK], self.ids[EOS], self.ids[EOT]

    @classmethod
    def from_folder(cls, folder, config=None):
        """Read `folder`/tokenizer.json. config (model.Config): check that it fits the network."""
        path = Path(folder) / "tokenizer.json"
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library's only type, also for a missing file
            reason = str(error).splitlines()[0]
            raise SystemExit(f"error: {path}: not a readable tokenizer ({reason})") from None
        backend.no_truncation()  # as other libraries leave it behind: it would cut prompts
        backend.no_padding()
        tokenizer = cls(backend, source=path)
        if config is None:
            return tokenizer
        largest = max(backend.get_vocab().values())
        if largest >= config.embedding_size:
            raise SystemExit(f"error: {path}: token id {largest} lies outside the embedding")
        for name, expected in ((MASK, config.mask_token_id), (EOS, config.eos_token_id)):
            if tokenizer.ids[name] != expected:
                raise SystemExit(f"error: {path}: {name}: {tokenizer.ids[name]} is not {expected}")
        return tokenizer

    def encode(self, text):
        """Ids of plain text. A control token's name is cut in two first, so it stays text."""
        encode = self.backend.encode
        pieces = [encode(x, add_special_tokens=False).ids for x in re.split(INSIDE, text)]
        return [i for piece in pieces for i in piece]

    def encode_chat(self, messages):
        """Ids of messages, {"role", "content"}, and of the header of the assistant's answer."""
        if None in self.ids.values():
            raise SystemExit(f"error: {self.source}: no chat tokens, use an Instruct checkpoint")
        ids = [self.ids[BOS]] if messages else []
        for message in [*messages, {"role": "assistant", "content": ""}]:
            ids += [self.ids[HEADER], *self.encode(message["role"]), self.ids[END_HEADER]]
            ids += [*self.encode("\n\n" + message["content"].strip()), self.eot_id]
        return ids[:-1]  # the answer goes there

    def encode_prompt(self, prompt):
        """Ids of a chat: of the messages of a list, or of a text as the user's only message."""
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return self.encode_chat(prompt)

    def encode_completion(self, text):
        """Ids of an assistant's answer as SFT trains it: text, <|eot_id|>, <|endoftext|>."""
        return [*self.encode(text), self.eot_id, self.eos_id]

    def decode(self, ids):
        """The text before the first EOS, without control tokens."""
        ids = list(map(int, ids))
        if self.eos_id in ids:
            ids = ids[:ids.index(self.eos_id)]
        plain = [i for i in ids if i not in self.ids.values()]
        return self.backend.decode(plain, skip_special_tokens=False)

    def save(self, folder):
        self.backend.save(str(Path(folder) / "tokenizer.json"))
