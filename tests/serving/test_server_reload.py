"""A server that goes on while its model is replaced, and one that stops."""

from __future__ import annotations

import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.servers import FakeRecommender, RunningServer, ask, held, running_server, wait_for

from tron_cli.errors import InputError
from tron_cli.serving.reload import ServedModel


def load(path: Path) -> FakeRecommender:
    """Return a model whose number of items and name are those of the file."""
    words = path.read_text().split()
    if len(words) != 2:
        raise InputError(f"{path} is damaged")
    return FakeRecommender(num_items=int(words[0]), name=words[1], seconds=0.002)


def write(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def outcomes(server: RunningServer, name: str) -> float | None:
    return server.application.metrics.registry.get_sample_value(
        "tron_reloads_total", {"outcome": name}
    )


def test_reloading_under_load_loses_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each answer is that of one of the models; damaged files change nothing."""
    file = tmp_path / "model.pt"
    file.write_text("100 first.pt")
    models = [FakeRecommender(num_items=count) for count in (100, 150, 200)]
    possible = [model.recommend([[10, 30]], k=30)[0].items for model in models]
    found: Counter[int] = Counter()
    stop = threading.Event()

    def ask_on(port: int) -> None:
        while not stop.is_set():
            status, answer, _ = ask(port, "POST", "/recommend", {"items": [10, 30], "k": 30})
            assert status == 200, answer
            found[possible.index(answer["items"])] += 1

    with (
        caplog.at_level("INFO", "tron"),
        running_server(load, file, reload_every=0.05) as server,
        ThreadPoolExecutor(4) as clients,
    ):
        asking = [clients.submit(ask_on, server.port) for _ in range(4)]
        wait_for(lambda: found[0] > 10)
        write(file, "150 second.pt")
        wait_for(lambda: found[1] > 10)
        before = found[0]
        write(file, "damaged")
        wait_for(lambda: outcomes(server, "failed") == 1)
        file.unlink()
        so_far = found[1]
        wait_for(lambda: found[1] > so_far + 10)
        assert server.get("/ready")[1]["checkpoint"] == "second.pt"
        write(file, "200 third.pt")
        wait_for(lambda: found[2] > 10)
        for _ in range(5):
            server.reload()
        wait_for(lambda: (outcomes(server, "done") or 0) >= 3)
        stop.set()
        for each in asking:
            each.result()
        assert found[0] == before
        page = server.get("/metrics")[1].decode()
        assert 'tron_checkpoint_step{name="third.pt"} 5.0' in page
        assert "first.pt" not in page
        assert server.get("/ready")[1]["items"] == 200
    assert "second.pt is still served" in caplog.text
    assert "is damaged" in caplog.text


def test_a_smaller_model_answers_what_was_accepted_before(tmp_path: Path) -> None:
    """A k that exceeds the new catalogue brings all of its items."""
    file = tmp_path / "model.pt"
    file.write_text("100 first.pt")
    with running_server(load, file) as server, ThreadPoolExecutor(3) as clients:
        first: Any = server.application.model.recommender
        with held(first, server, clients):
            answer = clients.submit(server.post, "/recommend", {"items": [10], "k": 90})
            wait_for(lambda: server.application.batcher.waiting == 1)
            write(file, "40 second.pt")
            server.reload()
            wait_for(lambda: server.application.model.name == "second.pt")
        assert len(answer.result()[1]["items"]) == 40


def test_a_run_folder_between_two_checkpoints_keeps_the_model(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_text("100 a.pt")

    def load_folder(path: Path) -> FakeRecommender:
        from tron_cli.files import best_checkpoint

        return load(best_checkpoint(path))

    with running_server(load_folder, tmp_path, reload_every=0.02) as server:
        (tmp_path / "b.pt").write_text("100 b.pt")  # as a run does before it deletes the older one
        wait_for(lambda: outcomes(server, "failed") == 1)
        assert server.get("/ready")[1]["checkpoint"] == "a.pt"
        (tmp_path / "a.pt").unlink()
        wait_for(lambda: server.get("/ready")[1]["checkpoint"] == "b.pt")
        os.utime(tmp_path / "b.pt", (1, 1))
        wait_for(lambda: outcomes(server, "done") == 2)


def test_models_are_loaded_by_threads_that_end(tmp_path: Path) -> None:
    """A thread that has computed keeps workers, which slow those of the thread that answers."""
    file = tmp_path / "model.pt"
    file.write_text("100 first.pt")
    threads: list[threading.Thread] = []

    def loaded(path: Path) -> FakeRecommender:
        threads.append(threading.current_thread())
        return load(path)

    model = ServedModel(file, loaded)
    assert model.reload()
    assert len(threads) == 2
    assert threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_a_model_that_cannot_recommend_is_not_served(tmp_path: Path) -> None:
    class Broken(FakeRecommender):
        def recommend(self, *args: object, **options: object) -> list:  # type: ignore[override]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), running_server(Broken()):
        pass


def test_stopping_answers_what_was_accepted() -> None:
    """New connections are refused, in bounded time the server ends."""
    model = FakeRecommender()
    with running_server(model) as server, ThreadPoolExecutor(20) as clients:
        with held(model, server, clients):
            answers = [
                clients.submit(server.post, "/recommend", {"items": [10]}) for _ in range(19)
            ]
            wait_for(lambda: server.application.batcher.waiting == 19)
            server.stop()
            wait_for(lambda: not server.server.servers[0].is_serving())
            with pytest.raises(ConnectionError):
                server.get("/health")
            assert not any(answer.done() for answer in answers)
        assert [answer.result()[0] for answer in answers] == [200] * 19
        server.thread.join(10)
        assert not server.thread.is_alive()


def test_stopping_waits_no_longer_than_requests_may_take() -> None:
    model = FakeRecommender()
    with running_server(model, timeout=1.0) as server, ThreadPoolExecutor(2) as clients:
        model.gate.clear()
        answer = clients.submit(server.post, "/recommend", {"items": [10]})
        wait_for(lambda: server.application.batcher._busy)
        server.stop()
        assert answer.result()[0] == 503
        server.thread.join(10)
        assert not server.thread.is_alive()
        model.gate.set()
