"""One thread computes for all clients, which take turns step by step.

    client A   step        step
    client B        step        step       a step is a token, a code or a chunk of audio
    client C             step        step

A task is an iterator: each of its steps computes a little and gives an event, or None. The tasks of
one client run one after the other; those of different clients take turns. A cancelled task computes
no further step: in its next turn it is closed, which frees its caches.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import suppress
from typing import Any

import torch

from minomni.errors import UserError
from minomni.serve.errors import INTERNAL, log_unexpected, of_user_error


class Task:
    """The steps of one piece of work, and the queue of its events in the event loop.

    The queue holds at most the events of the task: one answer.
    """

    def __init__(self, steps: Generator, loop: asyncio.AbstractEventLoop):
        self.steps = steps
        self.loop = loop
        self.events: asyncio.Queue = asyncio.Queue()
        self.cancelled = False

    def run_step(self) -> bool:
        """Compute one step -> whether the task has ended."""
        if self.cancelled:
            self.close()
            return True
        try:
            event = next(self.steps)
        except StopIteration:
            self.put(None)
            return True
        except UserError as error:
            self.put(of_user_error(error))
            return True
        except Exception as error:  # one request must not end the work of all others
            log_unexpected("a step of the worker", error)
            self.put(INTERNAL)
            return True
        if event is not None:
            self.put(event)
        return False

    def close(self) -> None:
        """End the task before its next step."""
        self.steps.close()
        self.put(None)

    def put(self, event: Any) -> None:
        """Hand an event to the event loop: None is the end, an ApiError is raised there."""
        with suppress(RuntimeError):  # the loop is closed: the server stops
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    async def __aiter__(self) -> AsyncIterator:
        """The events of the task. Raises ApiError where a step fails."""
        while True:
            event = await self.events.get()
            if event is None:
                return
            if isinstance(event, Exception):
                raise event
            yield event
            await asyncio.sleep(0)  # other clients get the event loop, however fast events come


class Client:
    """The tasks of one request or conversation."""

    def __init__(self, worker: "Worker"):
        self.worker = worker
        self.tasks: deque[Task] = deque()
        self.closed = False

    def submit(self, steps: Generator) -> Task:
        """Queue a task behind the client's other ones."""
        task = Task(steps, asyncio.get_running_loop())
        self.worker.add(self, task)
        return task

    def call(self, function: Callable[[], Any]) -> Task:
        """Queue one call. Its result is an event, unless it is None."""
        return self.submit(one_step(function))

    def close(self) -> None:
        """Cancel all tasks, and those that would follow."""
        with self.worker.changed:
            self.closed = True
            for task in self.tasks:
                task.cancelled = True


def one_step(function: Callable[[], Any]) -> Generator:
    """A task of one step."""
    yield function()


class Worker:
    """The thread that computes."""

    def __init__(self) -> None:
        self.changed = threading.Condition()  # guards all attributes, and the tasks of all clients
        self.turns: deque[Client] = deque()  # clients that have tasks, next one first
        self.stopped = False
        self.steps = 0  # computed so far
        self.thread = threading.Thread(target=self.run, name="minomni-worker", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Stop after the current step and close all tasks."""
        with self.changed:
            self.stopped = True
            self.changed.notify()
        self.thread.join(timeout=10)

    def add(self, client: Client, task: Task) -> None:
        """Queue a task of a client. It ends at once where the client is closed or the worker has
        stopped.
        """
        with self.changed:
            if not self.stopped and not client.closed:
                client.tasks.append(task)
                if len(client.tasks) == 1:
                    self.turns.append(client)
                self.changed.notify()
                return
        task.close()

    def next_client(self) -> Client | None:
        """Wait for a client with a task; None when the worker stops."""
        with self.changed:
            while not self.turns and not self.stopped:
                self.changed.wait()
            if self.stopped:
                return None
            return self.turns.popleft()

    @torch.no_grad()
    def run(self) -> None:
        """Give each client one step in turn."""
        while (client := self.next_client()) is not None:
            ended = client.tasks[0].run_step()
            with self.changed:
                self.steps += 1
                if ended:
                    client.tasks.popleft()
                if client.tasks:
                    self.turns.append(client)
            del client  # it may hold the caches of a conversation that is over
        for client in self.turns:
            for task in client.tasks:
                task.close()
            client.tasks.clear()
        self.turns.clear()
