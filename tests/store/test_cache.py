from __future__ import annotations

import numpy as np
import pytest

from temper.store import cache
from temper.store.cache import Cache


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.delenv("TEMPER_NO_CACHE", raising=False)
    monkeypatch.setenv("TEMPER_CACHE", str(tmp_path))
    return Cache("test")


def test_equal_keys_hit_and_others_miss(store):
    store.put({"a": 1, "b": [1, 2]}, {"x": np.arange(3), "y": np.ones((2, 2), np.float32)})
    found = store.get({"b": [1, 2], "a": 1})
    assert found is not None
    assert set(found) == {"x", "y"}
    np.testing.assert_array_equal(found["x"], [0, 1, 2])
    assert found["y"].dtype == np.float32
    assert store.get({"a": 1, "b": [2, 1]}) is None
    assert Cache("other").get({"a": 1, "b": [1, 2]}) is None


def test_hits_are_counted(store):
    store.put({"a": 1}, {"x": np.zeros(1)})
    before = cache.hits()
    store.get({"a": 1})
    store.get({"a": 2})
    assert cache.hits() - before == 1


def test_the_flag_turns_it_off(store, monkeypatch):
    store.put({"a": 1}, {"x": np.zeros(1)})
    monkeypatch.setenv("TEMPER_NO_CACHE", "1")
    assert store.get({"a": 1}) is None
    store.put({"a": 2}, {"x": np.zeros(1)})
    monkeypatch.delenv("TEMPER_NO_CACHE")
    assert store.get({"a": 2}) is None
    assert store.get({"a": 1}) is not None


@pytest.mark.parametrize("keep", [0, 1, 50, -1])
def test_a_damaged_file_is_a_miss_and_goes_away(store, keep):
    store.put({"a": 1}, {"x": np.arange(100)})
    path = store.path({"a": 1})
    path.write_bytes(path.read_bytes()[:keep])
    assert store.get({"a": 1}) is None
    assert not path.exists()


def test_a_file_under_the_wrong_name_is_a_miss(store):
    store.put({"a": 1}, {"x": np.zeros(1)})
    target = store.path({"a": 2})
    target.parent.mkdir(parents=True, exist_ok=True)
    store.path({"a": 1}).rename(target)
    assert store.get({"a": 2}) is None


def test_pickled_arrays_are_not_read(store):
    path = store.path({"a": 1})
    path.parent.mkdir(parents=True)
    np.savez(path, x=np.array([{"no": "objects"}], dtype=object))
    assert store.get({"a": 1}) is None
