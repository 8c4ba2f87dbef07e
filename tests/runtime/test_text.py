"""Pieces of text: whole characters, up to a stop string, harmless to a terminal."""

import copy
import random

import pytest
from byte_fallback import KINDS, random_text

from megactx.data.tokenizer import TextEncoder
from megactx.runtime.text import (
    Answer,
    Characters,
    StopStrings,
    decode,
    encodable,
    from_bytes,
    printable,
    text_of,
)


def streamed(tokenizer, ids, before=()):
    characters = Characters(tokenizer, before)
    return "".join(characters.push(token) for token in ids) + characters.end()


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        pytest.param("prepend", 2000, marks=pytest.mark.slow),
        *((kind, 400) for kind in ("prepend", "first", "none", "byte level")),
    ],
)
def test_2000_random_texts_stream_to_exactly_what_decode_gives(byte_tokenizers, tiny_tokenizer, kind, count):
    tokenizer, rng = byte_tokenizers.get(kind, tiny_tokenizer), random.Random(0)
    for _ in range(count):
        text = random_text(rng)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert streamed(tokenizer, ids) == decode(tokenizer, ids), (text, ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_streams_behind_any_beginning_as_the_whole_decodes(byte_tokenizers, kind):
    tokenizer, rng = byte_tokenizers[kind], random.Random(1)
    for _ in range(500):
        ids = tokenizer(random_text(rng), add_special_tokens=False)["input_ids"]
        cut = rng.randrange(len(ids) + 1)
        known = decode(tokenizer, ids[:cut])
        if not known.endswith("\ufffd"):
            assert known + streamed(tokenizer, ids[cut:], ids[:cut]) == decode(tokenizer, ids)
            assert known + text_of(tokenizer, ids[cut:], ids[:cut]) == decode(tokenizer, ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rare_character_before_a_line_break_and_the_first_space_of_an_answer_are_told(byte_tokenizers, kind):
    tokenizer = byte_tokenizers[kind]
    asked = tokenizer("say", add_special_tokens=False)["input_ids"]
    answer = tokenizer("say voilà\n", add_special_tokens=False)["input_ids"][len(asked) :]
    assert streamed(tokenizer, answer, asked) == " voilà\n"
    told = Characters(tokenizer, asked)
    assert "".join(map(told.push, answer)) == " voilà\n"  # at once, not at the end


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_behind_a_character_of_single_bytes_stops(byte_tokenizers, kind):
    tokenizer = byte_tokenizers[kind]
    ids = tokenizer("say voilà\nmore", add_special_tokens=False)["input_ids"]
    answer, told = Answer(tokenizer, frozenset(), ["à\n"]), ""
    for token in ids:
        told += answer.push(token)
        if answer.stopped:
            break
    assert answer.stopped == "à\n" and told + answer.rest() == "say voil"


def test_any_ids_of_a_byte_level_tokenizer_stream_to_what_decode_gives(tiny_tokenizer):
    rng = random.Random(2)
    for _ in range(500):
        ids = [rng.randrange(len(tiny_tokenizer)) for _ in range(rng.randrange(40))]
        assert streamed(tiny_tokenizer, ids) == decode(tiny_tokenizer, ids)


def test_stray_bytes_before_a_character_do_not_lose_it(tiny_tokenizer):
    (stray,) = [i for token, i in tiny_tokenizer.get_vocab().items() if token == "Ģ"]  # byte 0x80
    for count in range(20):
        ids = [stray] * count + tiny_tokenizer("你!", add_special_tokens=False)["input_ids"]
        assert streamed(tiny_tokenizer, ids) == "\ufffd" * count + "你!"


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_that_are_appended_gain_no_space(byte_tokenizers, kind):
    tokenizer, rng = byte_tokenizers[kind], random.Random(3)
    encoder = TextEncoder(tokenizer)
    for _ in range(300):
        parts = [random_text(rng) or "a" for _ in range(3)]
        ids = [i for n, part in enumerate(parts) for i in encoder(part, begins=n == 0)]
        assert decode(tokenizer, ids) == decode(
            tokenizer, tokenizer("".join(parts), add_special_tokens=False)["input_ids"]
        )
    assert encoder("<|end|>", begins=False) != [3] == encoder("<|end|>", begins=False, plain=False)


def test_pieces_around_words_that_somebody_has_added_gain_no_space(byte_tokenizers):
    tokenizer, rng = copy.deepcopy(byte_tokenizers["prepend"]), random.Random(4)
    tokenizer.add_tokens(["<tool>", "  "])
    encoder = TextEncoder(tokenizer)
    for _ in range(300):
        parts = ["".join(rng.choice(["a", " ", "  ", "<tool>", "b", "\n"]) for _ in range(6)) for _ in range(3)]
        ids = [i for n, part in enumerate(parts) for i in encoder(part, begins=n == 0)]
        whole = tokenizer("".join(parts), add_special_tokens=False)["input_ids"]
        assert decode(tokenizer, ids) == decode(tokenizer, whole), parts


@pytest.mark.parametrize("stop", ["<|end|>", "x<|end|>", "<|end|></s>"])
def test_a_special_token_stops_as_a_stop_string_and_is_not_told(byte_tokenizers, stop):
    tokenizer = byte_tokenizers["none"]
    ids = tokenizer("ab", add_special_tokens=False)["input_ids"]
    end = tokenizer(stop, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    answer = Answer(tokenizer, frozenset(), ["nothing", stop])
    told = "".join(answer.push(token) for token in [*ids, 2, *end[:-1]])
    assert answer.stopped is None
    told += answer.push(end[-1])
    assert answer.stopped == stop and told + answer.rest() == "ab"


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
    told = "".join(characters.push(half) for _ in range(50))
    assert told.count("\ufffd") == 49 and told + characters.end() == "\ufffd" * 50


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
