"""Laws of the cancel token: one for each piece of work, from any thread and signal handler."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest

from kadr.cancellation import (
    CancelToken,
    cancellable,
    check_cancelled,
    current_token,
    remove_if_ended,
    uninterruptible_wait,
    use_token,
)
from kadr.errors import Cancelled


def test_work_without_a_token_is_never_cancelled() -> None:
    assert current_token() is None
    check_cancelled()


def test_first_reason_is_the_message() -> None:
    token = CancelToken()
    token.check()
    token.cancel("the client left")
    token.cancel("again")
    with pytest.raises(Cancelled, match=r"^the client left$"):
        token.check()


def test_cancelled_work_raises_at_its_next_check() -> None:
    with cancellable() as token:
        check_cancelled()
        token.cancel()
        with pytest.raises(Cancelled):
            check_cancelled()
    assert current_token() is None


def test_cancelled_token_refuses_to_begin() -> None:
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled), cancellable(token):
        raise AssertionError("the work began")
    assert not token.is_in_use


def test_inner_work_takes_the_outer_token_unless_it_has_one() -> None:
    outer, inner = CancelToken(), CancelToken()
    with use_token(outer), cancellable() as taken:
        assert taken is outer
        with cancellable(inner) as own:
            assert own is inner is current_token()
        assert current_token() is outer
        outer.cancel()
        with use_token(None):
            check_cancelled()


def test_token_is_in_use_only_while_work_looks_at_it() -> None:
    token = CancelToken()
    with use_token(token):
        assert not token.is_in_use
        with cancellable():
            with cancellable():
                assert token.is_in_use
            assert token.is_in_use
            with uninterruptible_wait():
                assert not token.is_in_use
            assert token.is_in_use
        assert not token.is_in_use


def test_signal_handler_cancels() -> None:
    token = CancelToken()
    previous = signal.signal(signal.SIGUSR1, lambda *_: token.cancel())
    try:
        with cancellable(token):
            signal.raise_signal(signal.SIGUSR1)
            with pytest.raises(Cancelled):
                check_cancelled()
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_threads_cancel_only_their_own_work() -> None:
    tokens, stopped = [CancelToken() for _ in range(8)], [threading.Event() for _ in range(8)]

    def work(index: int) -> None:
        with cancellable(tokens[index]):
            while True:
                try:
                    check_cancelled()
                except Cancelled:
                    stopped[index].set()
                    raise

    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(work, index) for index in range(8)]
        for index in (3, 5, 0, 1, 7, 2, 6, 4):
            assert not stopped[index].is_set()
            tokens[index].cancel()
            with pytest.raises(Cancelled):
                running[index].result(10)


def test_new_thread_has_the_token_only_in_a_copy_of_the_context() -> None:
    token = CancelToken()
    with cancellable(token), ThreadPoolExecutor(1) as thread:
        assert thread.submit(current_token).result() is None
        assert thread.submit(copy_context().run, current_token).result() is token


def test_leftovers_are_removed_last_first_and_only_inside_their_block() -> None:
    token, removed = CancelToken(), list[str]()

    def fail() -> None:
        raise FileNotFoundError

    with use_token(token):
        with remove_if_ended(lambda: removed.append("folder")), remove_if_ended(fail):
            with remove_if_ended(lambda: removed.append("file")):
                token.remove_leftovers()
            assert removed == ["file", "folder"]
            token.remove_leftovers()
        token.remove_leftovers()
    assert removed == ["file", "folder", "folder"]
