"""Calls that are ended where they compute for too long, and chat templates among them."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from helpers import tiny
from loram_ray.errors import LoramError
from loram_ray.models import tokenizer as loading
from loram_ray.models.tokenizer import load_tokenizer, render_chat
from loram_ray.utils.bounded_call import TooLong, within


def for_ever() -> None:
    while True:
        with suppress(Exception):
            sum(range(1000))


def test_a_call_that_does_not_end_is_ended_in_any_thread() -> None:
    seen: list[type[BaseException] | None] = []

    def work(index: int) -> None:
        try:
            if index == 2:
                seen.append(within(0.1, lambda: None))
            else:
                within(0.1, for_ever)
        except TooLong:
            seen.append(TooLong)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    work(0)
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    assert sorted(map(str, seen)) == sorted(map(str, [None, TooLong, TooLong, TooLong]))


def test_what_a_call_returns_and_raises_comes_through_and_waiting_is_not_counted() -> None:
    assert within(0.05, lambda: time.sleep(0.4) or 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(1.0, lambda: 1 // 0)


def test_calls_that_end_at_about_their_limit_are_ended_or_not_and_nothing_is_raised_later() -> None:
    def for_about(seconds: float) -> bool:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass
        return True

    for extra in range(6):
        with suppress(TooLong):
            assert within(0.05, lambda extra=extra: for_about(0.05 + 0.02 * extra))
        for_about(0.01)


def test_a_template_that_loops_for_some_contents_only_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "RENDER_SECONDS", 0.2)
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content }}{% if 'loop' in m.content %}"
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        "{% endif %}{% endfor %}"
    )
    tokenizer = load_tokenizer(tiny.write_base(tmp_path / "base"), template)
    assert render_chat(tokenizer, [{"role": "user", "content": "plain"}]) == "plain"
    with pytest.raises(LoramError, match=r"within 0.2 s, but takes longer .* begin with 'loop'"):
        render_chat(tokenizer, [{"role": "user", "content": "loop"}])
