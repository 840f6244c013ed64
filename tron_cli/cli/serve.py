"""`tron serve`: recommendations over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tron_cli.cli.options import CheckpointPath, Device, Plugins
from tron_cli.errors import InputError
from tron_cli.ops.device import chosen_device


def serve(
    checkpoint: CheckpointPath,
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default answers this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.")] = 8000,
    reload_every: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Look for a new checkpoint this often; 0: only on SIGHUP.",
        ),
    ] = 0,
    timeout: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="Longest time until an answer.")
    ] = 5,
    max_batch: Annotated[int, typer.Option(min=1, help="Histories computed together.")] = 64,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Histories that may wait; more are refused with 503.")
    ] = 1024,
    max_k: Annotated[int, typer.Option(min=1, help="Largest k.")] = 1000,
    max_histories: Annotated[int, typer.Option(min=1, help="Histories per request.")] = 64,
    max_history: Annotated[int, typer.Option(min=1, help="Events per history.")] = 10_000,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request's body.")] = 1 << 20,
    access_log: Annotated[
        bool, typer.Option(help="Write each request to stderr, a JSON object per line.")
    ] = True,
    plugin: Plugins = None,
    device: Device = "cpu",
) -> None:
    """Answer requests for recommendations over HTTP."""
    try:
        from tron_cli.serving.server import serve as run_server
        from tron_cli.serving.settings import ServerSettings
    except ModuleNotFoundError as error:
        raise InputError(
            f"tron serve needs {error.name}; install it with pip install 'tron-recsys[serve]'"
        ) from error
    from tron_cli.serving.recommender import Recommender

    settings = ServerSettings(
        max_k=max_k,
        max_history=max_history,
        max_histories=max_histories,
        max_body=max_body,
        max_batch=max_batch,
        max_waiting=max_waiting,
        timeout=timeout,
        reload_every=reload_every,
        access_log=access_log,
    )
    chosen = chosen_device(device)

    def load(path: Path) -> Recommender:
        recommender = Recommender.load(path, device=chosen)
        recommender.expect_many()
        return recommender

    run_server(
        checkpoint,
        load,
        host=host,
        port=port,
        settings=settings,
    )
