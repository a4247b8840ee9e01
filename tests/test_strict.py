"""Strict JSON against Python's own parser: equal on good input, an InputError where that one is lenient."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.errors import BugError, InputError
from headway.strict import MAX_DEPTH, check_unicode, dump_json, field, strict_json

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=30,
)


@given(json_values)
def test_round_trip_equals_python(value):
    text = dump_json(value)
    assert strict_json(text, "x") == json.loads(text) == value
    assert strict_json(text.encode(), "x") == value
    assert strict_json(json.dumps(value), "x") == value


REFUSED = {
    "nan": ("[NaN]", "NaN"),
    "infinity": ('{"a": -Infinity}', "-Infinity"),
    "overflow": ("[1e400]", "1e400"),
    "negative overflow": ("[-1e400]", "-1e400"),
    "duplicate": ('{"a": 1, "b": {"k": 1, "k": 2}}', "'k' appears twice"),
    "digits": ("1" * 5000, "5000 digits"),
    "deep arrays": ("[" * 100_000, "100000 levels"),
    "deep objects": ('{"a":' * 100_000, "100000 levels"),
    "deep closed": ("[" * 100_000 + "]" * 100_000, "100000 levels"),
    "one too deep": ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "65 levels"),
    "lone surrogate escape": (r'["\ud800"]', "not valid Unicode"),
    "low before high": (r'["\udc00\ud800"]', "not valid Unicode"),
    "surrogate key": (r'{"\uDfFf": 1}', "not valid Unicode"),
    "raw surrogate": ('["\ud800"]', "not valid Unicode"),
    "bom": ("\ufeff[]", "byte order mark"),
    "bom bytes": (b"\xef\xbb\xbf[]", "byte order mark"),
    "utf-16": ("[]".encode("utf-16"), "UTF-16"),
    "utf-16 be": (b"\xfe\xff\x00[\x00]", "UTF-16"),
    "utf-32": ("[]".encode("utf-32"), "UTF-32"),
    "utf-16 without mark": ("[]".encode("utf-16-le"), "not valid JSON"),
    "bad utf-8": (b'["ab\xff"]', "byte 4"),
    "surrogate bytes": (b'["\xed\xa0\x80"]', "invalid UTF-8"),
    "empty": ("", "empty"),
    "blank": (" \n", "empty"),
    "two values": ("1 2", "line 1 column 3"),
    "trailing comma": ("[1,]", "not valid JSON"),
    "control character": ('["a\nb"]', "not valid JSON"),
    "cut": ('{"a": [1, 2', "not valid JSON"),
    "single quotes": ("{'a': 1}", "not valid JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    data, found = REFUSED[name]
    with pytest.raises(InputError) as caught:
        strict_json(data, "file.json")
    assert str(caught.value).startswith("file.json: ")
    assert found in str(caught.value)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nan", "overflow", "duplicate", "lone surrogate escape"])
def test_negative_control_python_takes_them(name):
    """Without the guard these enter: the parser alone raises nothing."""
    json.loads(REFUSED[name][0])


def test_negative_control_python_fails_otherwise():
    with pytest.raises(RecursionError):
        json.loads(REFUSED["deep arrays"][0])
    with pytest.raises(ValueError, match="digits"):
        json.loads(REFUSED["digits"][0])


def test_edges_accepted():
    assert strict_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")
    brackets = "[{" * 1000
    assert strict_json(json.dumps([brackets, '\\"' + brackets]), "x") == [brackets, '\\"' + brackets]
    assert strict_json(r'["\ud83d\ude00"]', "x") == ["😀"]
    assert strict_json("1" * 400, "x") == int("1" * 400)
    assert strict_json(r'["\\ud800"]', "x") == [r"\ud800"]
    assert strict_json("1e-400", "x") == 0.0


def test_depth_scan_is_linear_on_unclosed_strings():
    """A scan that retries at each quote takes 10^11 steps here: minutes instead of a moment."""
    with pytest.raises(InputError):
        strict_json("[" * 65 + '"' + '\\"' * 500_000, "x")


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], "\ud800", {"a": object()}])
def test_dump_refuses(value):
    with pytest.raises(BugError):
        dump_json(value)


def test_dump_is_stable():
    assert dump_json({"b": 1, "a": "é"}, sort_keys=True) == '{"a":"é","b":1}'


def test_field():
    data = {"n": 3, "flag": True, "none": None}
    assert field(data, "n", int, "f") == 3
    assert field(data, "none", (str, type(None)), "f") is None
    assert field(data, "missing", (str, type(None)), "f") is None
    for key, kinds, found in [
        ("flag", int, "key 'flag' is a boolean"),
        ("n", str, "key 'n' is an integer; expected a string"),
        ("x", list, "key 'x' is missing"),
    ]:
        with pytest.raises(InputError, match=found):
            field(data, key, kinds, "f")
    with pytest.raises(InputError, match="an array; expected an object"):
        field([], "n", int, "f")


def test_check_unicode():
    check_unicode("plain é 😀", "x")
    with pytest.raises(InputError, match=r"x: not valid Unicode: lone surrogate U\+D800 at character 3"):
        check_unicode("abc\ud800", "x")
