"""The worker: clients take turns, and what is cancelled computes no further step."""

import asyncio

import pytest
import serving  # noqa: F401  (skips where the server's packages are missing)

from minomni.errors import OutOfMemory, UserError
from minomni.serve.errors import ApiError, of_user_error
from minomni.serve.worker import Client, Worker


def run(conversation):
    """Run conversation(worker) with a worker that is not started yet."""

    async def whole():
        worker = Worker()
        try:
            return await conversation(worker)
        finally:
            if worker.thread.is_alive():
                worker.stop()

    return asyncio.run(whole())


async def all_events(task) -> list:
    return [event async for event in task]


def test_clients_take_turns():
    """Two long tasks and a short one: steps alternate, and the short one is done early."""
    order = []

    def steps(name: str, count: int):
        for _ in range(count):
            order.append(name)
            yield name

    async def conversation(worker):
        lengths = {"a": 50, "b": 50, "c": 5}
        tasks = [Client(worker).submit(steps(name, count)) for name, count in lengths.items()]
        worker.start()
        return [await all_events(task) for task in tasks]

    assert run(conversation) == [["a"] * 50, ["b"] * 50, ["c"] * 5]
    assert order[:15] == ["a", "b", "c"] * 5
    assert order[15:] == ["a", "b"] * 45


def test_the_tasks_of_a_client_run_one_after_the_other():
    async def conversation(worker):
        client = Client(worker)
        tasks = [client.submit(iter_steps(range(3))), client.submit(iter_steps(range(3, 6)))]
        worker.start()
        return [await all_events(task) for task in tasks]

    assert run(conversation) == [[0, 1, 2], [3, 4, 5]]


def test_fast_events_leave_the_event_loop_to_others():
    """However many events wait, another coroutine runs between any two of them."""

    async def conversation(worker):
        task = Client(worker).submit(iter_steps(range(100)))
        worker.start()
        turns = 0

        async def other():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        while task.events.qsize() < 101:  # the events and their end
            await asyncio.sleep(0.01)
        others = asyncio.ensure_future(other())
        await all_events(task)
        others.cancel()
        return turns

    assert run(conversation) >= 100


def iter_steps(values):
    yield from values


def test_a_cancelled_task_computes_no_further_step():
    computed = []
    closed = []

    def steps():
        try:
            for number in range(1_000_000):
                computed.append(number)
                yield number
        finally:
            closed.append(True)

    async def conversation(worker):
        worker.start()
        client = Client(worker)
        task = client.submit(steps())
        async for number in task:
            if number == 3:
                break
        client.close()
        seen = len(computed)
        await all_events(task)
        return seen

    seen = run(conversation)
    assert closed == [True]
    assert len(computed) <= seen + 1  # the step that was being computed


def test_a_task_that_is_cancelled_before_it_begins_computes_nothing():
    computed = []

    async def conversation(worker):
        client = Client(worker)
        task = client.call(lambda: computed.append(1))
        client.close()
        worker.start()
        return await all_events(task)

    assert run(conversation) == []
    assert computed == []


def test_a_closed_client_gets_no_further_task():
    """It has left while its request was read."""

    async def conversation(worker):
        worker.start()
        client = Client(worker)
        client.close()
        return await all_events(client.call(lambda: 1)), list(client.tasks)

    assert run(conversation) == ([], [])


def test_errors_of_a_step(caplog):
    """A user's error is told; another one is told as a fault of the server, and its message, which
    may quote the user, is not logged.
    """

    def failing(error):
        yield 1
        raise error

    async def conversation(worker):
        worker.start()
        found = []
        for error in (UserError("too long"), ValueError("what the user wrote")):
            task = Client(worker).submit(failing(error))
            with pytest.raises(ApiError) as raised:
                await all_events(task)
            found.append((raised.value.status, raised.value.message))
        return found + await all_events(Client(worker).call(lambda: "still there"))

    user, internal, after = run(conversation)
    assert user == (400, "too long")
    assert internal[0] == 500
    assert after == "still there"
    assert "ValueError" in caplog.text
    assert "what the user wrote" not in caplog.text


def test_a_stopped_worker_ends_all_tasks():
    async def conversation(worker):
        first = Client(worker).submit(iter_steps(range(10**9)))
        worker.start()
        async for _ in first:
            break
        await asyncio.to_thread(worker.stop)
        await all_events(first)
        late = Client(worker).call(lambda: 1)
        return await all_events(late), worker.turns

    late, turns = run(conversation)
    assert late == []
    assert not turns


def test_memory_that_runs_out_is_said_and_not_tried_again():
    error = of_user_error(OutOfMemory("CUDA out of memory. Tried to allocate 2 GiB; give less"))
    assert error.status == 503
    assert error.body()["error"]["code"] == "out_of_memory"
    assert error.body()["error"]["type"] == "server_error"
    # OpenAI's clients would send the same request again, twice.
    assert error.response().headers["x-should-retry"] == "false"
