"""How two sets of settings differ."""

from __future__ import annotations

from pipelines.settings.differences import differences

PHRASE = "{key}: {before} -> {asked}"


def test_every_key_of_both_in_order() -> None:
    assert differences({"b": 1, "a": 1}, {"a": 2, "c": 3, "b": 1}, PHRASE) == ["a: 1 -> 2", "c: None -> 3"]
    assert differences({"a": 1}, {"a": 1}, PHRASE) == []


def test_a_setting_that_is_younger_had_its_default() -> None:
    assert differences({}, {"a": 5}, PHRASE, defaults={"a": 5}) == []
    assert differences({}, {"a": 6}, PHRASE, defaults={"a": 5}) == ["a: 5 -> 6"]


def test_some_keys_only() -> None:
    assert differences({"a": 1, "b": 1}, {"a": 2, "b": 2}, PHRASE, only=["b"]) == ["b: 1 -> 2"]
