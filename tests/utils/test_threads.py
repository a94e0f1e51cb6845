"""Threads for work in numpy: results in order, few at a time, and errors."""

import threading

import pytest
import torch

from hinge.utils import threads
from hinge.utils.threads import in_threads, in_torch_threads


@pytest.mark.parametrize("number", [1, 3])
def test_results_are_in_order_and_few_at_a_time(monkeypatch, number):
    monkeypatch.setenv("OMP_NUM_THREADS", str(number))
    begun = []
    results = in_threads(lambda item: begun.append(item) or item * item, range(10))
    assert next(results) == 0
    assert len(begun) <= number + 1
    assert list(results) == [item * item for item in range(1, 10)] and sorted(begun) == list(range(10))


def test_an_error_ends_the_work(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = threading.active_count()

    def fail(item):
        if item == 3:
            raise ValueError("item 3")
        return item

    with pytest.raises(ValueError, match="item 3"):
        list(in_threads(fail, range(100)))
    assert threading.active_count() == before


def test_the_number_of_threads(monkeypatch):
    for given, expected in (("3", 3), ("0", None), ("", None), ("many", None)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert threads.num_threads() == expected or (expected is None and threads.num_threads() >= 1)


@pytest.mark.parametrize("number", [1, 4])
def test_torch_threads_are_shared_out_and_given_back(number):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number)
        together = list(in_torch_threads(lambda _: (torch.get_num_threads(), threading.get_ident()), range(2), "cpu"))
        alone = list(in_torch_threads(lambda _: threading.get_ident(), range(2), "cuda"))
        assert torch.get_num_threads() == number
        assert [each for each, _ in together] == ([1, 1] if number == 1 else [2, 2])
        assert (threading.get_ident() in {thread for _, thread in together}) == (number == 1)
        assert set(alone) == {threading.get_ident()}
        with pytest.raises(ZeroDivisionError):
            list(in_torch_threads(lambda item: 1 // item, range(3), "cpu"))
        assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)
