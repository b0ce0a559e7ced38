"""Gathers concurrent requests into one batch: a thread that runs a `BatchedGenerator` and resolves futures."""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

from verl_sspo.cpu.generation import BatchedGenerator, Completion, Request

T = TypeVar("T")

# An idle generator waits for the companions of the first request until none has come for QUIET seconds, for
# LONGEST seconds at most. A busy one takes new requests in between two tokens.
QUIET = 0.005
LONGEST = 0.05


class GenerationThread:
    """Runs the generator; every method may be called from any thread.

    An exception of the generator goes to the futures of all requests that it concerns, and the thread goes on.
    """

    def __init__(self, generator: BatchedGenerator) -> None:
        self._generator = generator
        self._futures: dict[str, Future[Completion]] = {}
        self._inbox: list[Callable[[], None]] = []
        self._arrival = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> "Future[Completion]":
        """The request's completion, or the exception that it failed with."""
        future: Future[Completion] = Future()

        def enter() -> None:
            # From here on it cannot be cancelled: a result for a cancelled future would be an error for all requests.
            if not future.set_running_or_notify_cancel():
                return
            if request.request_id in self._futures:
                future.set_exception(ValueError(f"a request {request.request_id} is running already"))
                return
            try:
                self._generator.submit(request)
            except Exception as error:
                future.set_exception(error)
            else:
                self._futures[request.request_id] = future

        self._post(enter)
        return future

    def abort(self, request_ids: Iterable[str] | None = None) -> "Future[list[str]]":
        """Ends requests, all of them by default, with what they have; the future holds the ids of those it ended."""
        ending = None if request_ids is None else list(request_ids)

        def abort() -> list[str]:
            aborted = self._generator.abort(ending)
            self._resolve(aborted)
            return [completion.request_id for completion in aborted]

        return self.run_between_steps(abort)

    def run_between_steps(self, function: Callable[[], T]) -> "Future[T]":
        """Runs `function` in the thread, when no forward pass is under way; to change the weights, for example."""
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._post(run)
        return future

    def close(self) -> None:
        """Ends the thread after the step under way; what is unfinished is aborted."""
        self.abort()
        with self._arrival:
            self._closed = True
            self._arrival.notify()
        self._thread.join()

    def _post(self, action: Callable[[], None]) -> None:
        with self._arrival:
            if self._closed:
                raise RuntimeError("the generation thread is closed")
            self._inbox.append(action)
            self._arrival.notify()

    def _run(self) -> None:
        while True:
            self._gather()
            with self._arrival:
                actions, self._inbox = self._inbox, []
                if not actions and self._closed:
                    return
            for action in actions:
                action()
            if self._generator.unfinished:
                self._step()

    def _gather(self) -> None:
        """Returns at once while the generator is busy, else when there is something to do."""
        if self._generator.unfinished:
            return
        with self._arrival:
            self._arrival.wait_for(lambda: self._inbox or self._closed)
            deadline = time.monotonic() + LONGEST
            while (left := deadline - time.monotonic()) > 0 and self._arrival.wait(min(QUIET, left)):
                pass

    def _step(self) -> None:
        try:
            self._resolve(self._generator.step())
        except Exception as error:
            self._generator.abort()
            for future in self._futures.values():
                future.set_exception(error)
            self._futures.clear()

    def _resolve(self, completions: Iterable[Completion]) -> None:
        for completion in completions:
            future = self._futures.pop(completion.request_id)
            if completion.error is not None:
                future.set_exception(completion.error)
            else:
                future.set_result(completion)
