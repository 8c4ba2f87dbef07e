"""Pieces of text: whole characters, up to a stop string, harmless to a terminal."""

import pytest

from megactx.runtime.text import Answer, Characters, StopStrings, encodable, from_bytes, printable


@pytest.mark.parametrize("text", ["plain words", "naïve 你好 🙂 done", "\n\t  x", ""])
def test_characters_come_whole_and_all_of_them(tiny_tokenizer, text):
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    characters = Characters(tiny_tokenizer)
    parts = [characters.push(token) for token in ids]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + characters.end() == text


def test_a_model_that_never_ends_a_character_is_told_as_it_is(tiny_tokenizer):
    half = tiny_tokenizer("🙂", add_special_tokens=False)["input_ids"][0]
    characters = Characters(tiny_tokenizer)
    told = "".join(characters.push(half) for _ in range(50)) + characters.end()
    assert told.count("\ufffd") == 50


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_text_ends_before_the_first_stop_string_however_it_is_cut(size):
    text, stops = "one two\nUser: three STOP four", StopStrings(["STOP", "\nUser:"])
    told = ""
    for start in range(0, len(text), size):
        told += stops.push(text[start : start + size])
        if stops.found:
            break
    assert told == "one two" and stops.found == "\nUser:"


def test_what_only_begins_like_a_stop_string_is_told_at_last():
    stops = StopStrings(["END"])
    assert stops.push("the E") == "the " and stops.push("N") == "" and stops.push("x") == "ENx"
    assert stops.push("EN") == "" and stops.kept == "EN"
    with pytest.raises(ValueError, match="stop=''"):
        StopStrings(["a", ""])


def test_an_answer_ends_with_the_end_of_the_model(tiny_tokenizer):
    ids = tiny_tokenizer("some words", add_special_tokens=False)["input_ids"]
    answer = Answer(tiny_tokenizer, frozenset({0}), ["words!"])
    told = "".join(answer.push(token) for token in ids)
    assert answer.stopped is None
    told += answer.push(0)
    assert answer.stopped == "end" and told + answer.rest() == "some words"


def test_nothing_that_a_terminal_would_obey_is_left():
    wild = "a\x1b[31mred\x1b[0m\x1b]0;title\x07b\rc\x00\x9b2Jd\u202ee\x1bf\x7f"
    assert printable(wild) == "aredbc2Jde"
    assert printable("tab\tline\nünïcode 你 🙂") == "tab\tline\nünïcode 你 🙂"
    assert "\x1b" not in printable("\x1b") + printable("[31m")


def test_bytes_that_are_no_text_are_refused_with_their_place():
    assert from_bytes("grün".encode(), "x.txt") == "grün"
    with pytest.raises(ValueError, match="x.txt: not UTF-8 text .*at byte 2"):
        from_bytes(b"ab\xff", "x.txt")
    with pytest.raises(ValueError, match="x.txt: binary, not text .*character 1"):
        from_bytes(b"a\x00b", "x.txt")
    with pytest.raises(ValueError, match="text: not valid Unicode .*character 1"):
        encodable("a\ud800")
