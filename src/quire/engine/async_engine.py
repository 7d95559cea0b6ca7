"""AsyncEngine: the Engine for asyncio. A thin driver: one thread steps the Engine, coroutines wait for its outputs.

It adds no behaviour of its own; what a request does is decided in engine.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from quire.config import EngineOptions
from quire.core.params import SamplingParams
from quire.core.stats import Stats
from quire.engine.child import Child, ChildProcess
from quire.engine.engine import Engine, Place, Prepared
from quire.engine.observe import Observer
from quire.engine.outputs import RequestOutput
from quire.engine.prompts import Prompt
from quire.engine.supervised import start_supervised
from quire.engine.supervisor import Patience
from quire.errors import EngineDeadError
from quire.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

LONG_TEXT = 20_000  # characters from which on text is worked on in a thread, so that other streams go on
TOLD_AT_ONCE = 64  # events of a step: the first of many streams need not wait for the text of the last
PATIENCE = 0.05  # seconds that an event loop gets to pass on what it has, before more is made for it
MOST_FAILURES = 3  # steps in a row that raise, until the engine counts as dead

_Answer = TypeVar("_Answer")


@dataclass(slots=True)
class _Taker:
    """Who is handed the outputs of a request: `take` is called in the event loop with each of them.

    `done` is set behind the last output, or with the error that ended the request; one that take() raised is such an error.
    """

    loop: asyncio.AbstractEventLoop
    take: Callable[[RequestOutput], None]
    done: asyncio.Future[None]

    def put(self, item: RequestOutput | Exception) -> None:
        """Hand over an output, unless nobody waits any more. In the event loop alone."""
        if self.done.done():
            return
        try:
            if isinstance(item, Exception):
                raise item
            self.take(item)
            if item.finished:
                self.done.set_result(None)
        except Exception as error:
            self.done.set_exception(error)

    @property
    def has_all(self) -> bool:
        """Whether the last output was taken."""
        return self.done.done() and not self.done.cancelled() and self.done.exception() is None


_Mail = deque[tuple[_Taker, "RequestOutput | Exception"]]  # for one event loop, which empties it from the left


@dataclass(slots=True)
class _Command:
    """Something to do in the engine's thread; `fail` is told when it raised or when the engine died before it."""

    run: Callable[[], None]
    fail: Callable[[Exception], None]


class AsyncEngine:
    """Concurrent generate() calls over one Engine.

    Use it as `async with AsyncEngine(engine) as running`, or call start() and close(). A request that fails while it
    runs brings a last output with finish_reason "error" and its `error` text, like any other ending; a request that is
    wrong raises ValidationError (and its siblings of errors.py) from generate() before anything was started.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._wake = threading.Condition()
        self._commands: list[_Command] = []  # guarded by _wake; run by the engine's thread between steps
        self._takers: dict[str, _Taker] = {}  # the engine's thread alone
        # What is on its way out, kept here so that nothing is lost when a step raises in its middle.
        self._outputs: deque[RequestOutput] = deque()
        self._mail: defaultdict[asyncio.AbstractEventLoop, _Mail] = defaultdict(deque)  # filled by the engine's thread
        self._closing = False
        self._dead: BaseException | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def from_options(
        cls,
        options: EngineOptions,
        observer: Observer | None = None,
        on_phase: Callable[[str, float | None], None] | None = None,
    ) -> AsyncEngine:
        """Load a model and start its thread; `on_phase` is told each phase of the start and its seconds."""
        running = cls(Engine.from_options(options, observer, on_phase))
        running.start()
        return running

    @classmethod
    def supervised(
        cls,
        options: EngineOptions,
        observer: Observer | None = None,
        on_phase: Callable[[str, float | None], None] | None = None,
        patience: Patience | None = None,
        new_process: Callable[[], Child] = ChildProcess,
    ) -> AsyncEngine:
        """The same with the model in a process of its own, which is replaced when it dies; see start_supervised."""
        running = cls(start_supervised(options, observer, on_phase, patience, new_process))
        running.start()
        return running

    @property
    def engine(self) -> Engine:
        """The Engine behind; only its settings, tokenizer and prepare() may be used while the thread runs."""
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, None when it was skipped."""
        return self._engine.tokenizer

    def start(self) -> None:
        """Start the thread that steps the engine. A second call changes nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="quire-engine", daemon=True)
            self._thread.start()

    async def close(self) -> None:
        """End all requests with finish_reason "abort", stop the thread and close the engine."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._engine.interrupt()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._engine.close)

    async def __aenter__(self) -> AsyncEngine:
        """Start."""
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.close()

    # ---------------------------------------------------------------- requests

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str,
        priority: int = 0,
        add_special_tokens: bool = True,
        tenant: str = "",
        timeout: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request as they come; the last one has `finished` set. Leaving the iterator aborts it.

        `tenant` and `timeout` are as in Engine.prepare. A request that is not done in time ends like one that failed.
        """
        prepared = await self.prepare(prompt, params, request_id, priority, add_special_tokens, tenant, timeout)
        outputs: deque[RequestOutput] = deque()
        news = asyncio.Event()

        def take(output: RequestOutput) -> None:
            outputs.append(output)
            news.set()

        with self._asked(prepared, take) as done:
            done.add_done_callback(lambda _: news.set())
            while not done.done() or outputs:
                await news.wait()
                news.clear()
                while outputs:
                    yield outputs.popleft()
            done.result()

    async def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str,
        priority: int = 0,
        add_special_tokens: bool = True,
        tenant: str = "",
        timeout: float | None = None,
    ) -> Prepared:
        """As Engine.prepare, in a thread where it takes long."""
        arguments = (request_id, prompt, params, priority, add_special_tokens, tenant, timeout)
        compiles = isinstance(params, SamplingParams) and params.structured_outputs is not None
        if compiles or (isinstance(prompt, str) and len(prompt) > LONG_TEXT):
            return await asyncio.to_thread(self._engine.prepare, *arguments)
        return self._engine.prepare(*arguments)

    async def deliver(self, prepared: Prepared, take: Callable[[RequestOutput], None]) -> None:
        """Call take() with each output of a request in the event loop, as soon as it is there, and return behind the last.

        This is what generate() does without waking a coroutine for each token. Cancelling it ends the request, and so does
        a take() that raises; what it raised is raised here.
        """
        with self._asked(prepared, take) as done:
            await done

    @contextlib.contextmanager
    def _asked(self, prepared: Prepared, take: Callable[[RequestOutput], None]) -> Iterator[asyncio.Future[None]]:
        """Give the engine a request, and end it there when the block is left before its end."""
        loop = asyncio.get_running_loop()
        taker = _Taker(loop, take, loop.create_future())
        self._command(lambda: self._admit(prepared, taker), lambda error: self._put([(taker, error)]))
        try:
            yield taker.done
        finally:
            if not taker.has_all:
                taker.done.cancel()
                with contextlib.suppress(EngineDeadError):  # then it has ended already
                    self._command(lambda: self._abandon(prepared.request_id, taker), _ignore)

    async def abort(self, request_ids: str | Iterable[str]) -> None:
        """End requests; whoever iterates them gets a last output with finish_reason "abort". Unknown ids pass."""
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        self._command(lambda: self._engine.abort(ids), _ignore)

    async def stats(self) -> Stats:
        """Counters of the scheduler, taken between two steps."""
        return await self.call(self._engine.stats)

    async def place(self, request_ids: Iterable[str]) -> Place | None:
        """The foremost place in the queue of these requests; None when none of them waits."""
        ids = list(request_ids)
        places = await self.call(lambda: [self._engine.place(request_id) for request_id in ids])
        return min((place for place in places if place is not None), key=_number, default=None)

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached pages. False when requests still hold some."""
        return await self.call(self._engine.reset_prefix_cache)

    async def call(self, function: Callable[[], _Answer]) -> _Answer:
        """Run a function in the engine's thread, between two steps, and return what it returned."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Answer] = loop.create_future()
        self._command(
            lambda: _call_in(loop, _settle, future, function()), lambda error: _call_in(loop, _fail, future, error)
        )
        return await future

    async def check_health(self) -> None:
        """Raise EngineDeadError unless the engine can serve."""
        self._check_alive()

    @property
    def is_running(self) -> bool:
        """Whether the thread is there and the engine not dead."""
        return self._thread is not None and self._thread.is_alive() and self._dead is None

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(f"The engine has stopped: {type(self._dead).__name__}: {self._dead}")
        if self._closing or self._thread is None:
            raise EngineDeadError("The engine is closed, or was never started")

    def _command(self, run: Callable[[], None], fail: Callable[[Exception], None]) -> None:
        with self._wake:
            self._check_alive()
            self._commands.append(_Command(run, fail))
            self._wake.notify()
        self._engine.interrupt()

    # ---------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            failures = 0
            while failures <= MOST_FAILURES:
                try:
                    if not self._wait():
                        break
                    self._outputs.extend(self._engine.step(TOLD_AT_ONCE))
                    self._deliver()
                    failures = 0
                    if self._engine.has_more:
                        self._give_way()
                except EngineDeadError:
                    raise
                except Exception:
                    failures += 1
                    if not self._engine.resumable or failures > MOST_FAILURES:
                        raise
                    logger.exception("a step failed; the engine goes on")
            self._engine.abort(list(self._takers))
            self._outputs.extend(self._engine.step())
            self._deliver()
        except BaseException as error:
            logger.exception("the engine stopped")
            self._die(error)

    def _wait(self) -> bool:
        """Run what was asked for; sleep when there is nothing to do. False when the engine shall close."""
        with self._wake:
            while not self._commands and not self._closing and not self._engine.has_work():
                self._wake.wait()
            commands, self._commands = self._commands, []
        for command in commands:
            try:
                command.run()
            except Exception as error:  # the asker's problem, not the engine's
                command.fail(error)
        return not self._closing

    def _admit(self, prepared: Prepared, taker: _Taker) -> None:
        self._engine.submit(prepared)
        self._takers[prepared.request_id] = taker

    def _abandon(self, request_id: str, taker: _Taker) -> None:
        """Nobody listens any more. The id may belong to somebody else by now."""
        if self._takers.get(request_id) is taker:
            del self._takers[request_id]
            self._engine.abort(request_id)

    def _deliver(self) -> None:
        """Send outputs on their way to their coroutines. What could not be handed over goes next time."""
        while self._outputs:
            output = self._outputs[0]
            taker = self._takers.get(output.request_id)
            if taker is not None:
                self._mail[taker.loop].append((taker, output))
                if output.finished:
                    del self._takers[output.request_id]
            self._outputs.popleft()
        self._send()

    def _put(self, items: list[tuple[_Taker, RequestOutput | Exception]]) -> None:
        for item in items:
            self._mail[item[0].loop].append(item)
        self._send()

    def _send(self) -> None:
        """Wake each event loop that has mail once."""
        for loop, mail in list(self._mail.items()):
            if not mail:
                continue
            try:
                loop.call_soon_threadsafe(_fill, mail)
            except RuntimeError:  # that event loop is closed: nobody waits there
                del self._mail[loop]
                for taker, _ in mail:
                    self._forget(taker)

    def _give_way(self) -> None:
        """Wait until the event loops have sent what they were told: two threads at work take turns at the interpreter's
        lock, and whoever sends loses it with each packet."""
        for loop in list(self._mail):
            sent = threading.Event()
            with contextlib.suppress(RuntimeError):  # that event loop is closed
                loop.call_soon_threadsafe(loop.call_soon, sent.set)  # behind what _fill() has begun
                sent.wait(PATIENCE)

    def _forget(self, taker: _Taker) -> None:
        gone = [request_id for request_id, known in self._takers.items() if known is taker]
        for request_id in gone:
            del self._takers[request_id]
        self._engine.abort(gone)

    def _die(self, error: BaseException) -> None:
        """Tell everybody who waits, and everybody who comes later."""
        with self._wake:
            self._dead = error
            commands, self._commands = self._commands, []
        reason = EngineDeadError(f"The engine has stopped: {type(error).__name__}: {error}")
        self._put([(taker, reason) for taker in self._takers.values()])
        self._takers.clear()
        for command in commands:
            command.fail(reason)


async def together(works: Iterable[Coroutine[Any, Any, _Answer]]) -> list[_Answer]:
    """The results of all, in their order. Where one raises, the others are cancelled, and have ended before this does."""
    found = list(works)
    if len(found) == 1:  # needs no task of its own
        return [await found[0]]
    tasks = [asyncio.ensure_future(work) for work in found]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await cancel(*tasks)


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """End tasks, and wait until they have ended. Those that are done stay as they are."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _fill(mail: _Mail) -> None:
    while mail:
        taker, item = mail[0]
        taker.put(item)
        mail.popleft()


def _number(place: Place) -> int:
    return place.number


def _settle(future: asyncio.Future[_Answer], answer: _Answer) -> None:
    if not future.cancelled():
        future.set_result(answer)


def _fail(future: asyncio.Future[_Answer], error: Exception) -> None:
    if not future.cancelled():
        future.set_exception(error)


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    """Have an event loop call a function; nothing when that loop is closed, for nobody waits there."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)


def _ignore(error: Exception) -> None:
    """Nobody waits for this command."""
    logger.debug("a command failed", exc_info=error)
