"""Prompts in a file: lines of text or of JSON."""

import json

import pytest

from fewstep.data.find import Place, find_captions
from fewstep.data.prompts import read_prompts


def test_prompts_are_lines_or_a_key_of_json(tmp_path):
    (tmp_path / "a.txt").write_text("a cat \n\n  a dog\n\u00e9t\u00e9\n", encoding="utf-8")
    assert read_prompts(tmp_path / "a.txt") == (("a cat", "a dog", "\u00e9t\u00e9"), ())
    assert find_captions(Place("prompts", str(tmp_path / "a.txt")), 2) == ("a cat", "a dog")
    lines = [json.dumps({"text": "one"}), "", json.dumps({"caption": "two"}), "{", json.dumps({"text": ""}), "[1]"]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    prompts, skipped = read_prompts(tmp_path / "b.jsonl")
    assert prompts == ("one", "two") == find_captions(Place("", str(tmp_path / "b.jsonl")))
    assert [str(entry).partition(":")[0] for entry in skipped] == [f"line {n} of b.jsonl" for n in (4, 5, 6)]
    assert read_prompts(tmp_path / "b.jsonl", caption_column="caption")[0] == ("two",)


def test_what_is_wrong_with_prompts_is_one_sentence(tmp_path):
    for name in ("none.txt", "a.pkl"):
        (tmp_path / "a.pkl").write_bytes(b"x")
        with pytest.raises(ValueError, match=r"prompts are a file of \.txt or \.jsonl"):
            read_prompts(tmp_path / name)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"holds no prompts that could be used, the first because line 1 of a\.txt"):
        read_prompts(tmp_path / "a.txt")
