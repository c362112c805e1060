"""tools/tiny.py: the tokenizer of data/tiny is made again to the byte, and so are the steps to its weights."""
import json

import pytest
from helpers import GOLDEN, ROOT

from tools import tiny


def test_a_trained_tokenizer_keeps_numbers_whole_and_every_byte():
    tokenizer = tiny.train_bpe(["Numbers: 13, 7\nTarget: 345 ", "20 - 13 = 7 345"] * 30, 282)
    assert tokenizer.backend.get_vocab_size() == 282
    assert len(tokenizer.encode("13")) == 1 < len(tokenizer.encode("345"))
    assert tokenizer.decode(tokenizer.encode("é 👍 13")) == "é 👍 13"


def test_the_chat_template_holds_where_tokens_could_join_across_its_header():
    tokenizer = tiny.train_bpe(["\n\nHi", "\n\nline1"] * 30, 300)
    for case in json.loads((GOLDEN / "chat_template" / "cases.json").read_text())["cases"]:
        ids = tokenizer.encode_chat(case["messages"])
        assert ids == tokenizer.backend.encode(case["rendered"], add_special_tokens=False).ids


@pytest.mark.slow
def test_the_tokenizer_of_data_tiny_is_made_again_to_the_byte(tmp_path):
    tiny.main(["tokenizer", str(tmp_path / "made")])
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "made" / name).read_bytes() == (ROOT / "data" / "tiny" / name).read_bytes()
    with pytest.raises(SystemExit, match="^error: [^\n]*made exists[^\n]*name a new folder$"):
        tiny.main(["tokenizer", str(tmp_path / "made")])


def test_both_runs_make_a_model(tmp_path):
    tiny.main(["model", str(tmp_path), "--steps", "2", "--count", "300", "--batch_size", "8", "--device", "cpu"])
    for name in ("skill", "mixed"):
        assert (tmp_path / name / "step_000002" / "model.safetensors").exists()
    options = json.loads((tmp_path / "mixed" / "config.json").read_text())["options"]
    assert (options["split"], options["lr"]) == ("mixed", 3e-4)
    assert options["model"] == str(tmp_path / "skill" / "step_000002")


def test_words_that_say_nothing_get_the_usage():
    with pytest.raises(SystemExit, match="python tools/tiny.py tokenizer FOLDER"):
        tiny.main(["weights"])
