"""`inl serve`: a checkpoint behind an OpenAI-compatible HTTP interface."""

from pathlib import Path
from typing import Annotated

import typer

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.loading import open_model
from inl_cli.options import (
    CheckpointArgument,
    DeviceOption,
    IterationsOption,
    JsonOption,
    NoEarlyStoppingOption,
    PrecisionOption,
    QuietOption,
)

HostOption = Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is all of this machine's.")]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")]
NameOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="What clients call the model; default the run's name.")
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Completions computed side by side, at most.")]
WaitingOption = Annotated[int, typer.Option(min=1, help="Requests that may wait; more are turned away with 429.")]
TimeoutOption = Annotated[
    float, typer.Option(min=0.001, help="Seconds that a request may take, sending it included; then it gets 408.")
]


@errors_to_exit_codes
def serve(
    checkpoint: CheckpointArgument = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    name: NameOption = None,
    batch_size: BatchSizeOption = 32,
    max_waiting: WaitingOption = 512,
    timeout: TimeoutOption = 600.0,
    iterations: IterationsOption = None,
    no_early_stopping: NoEarlyStoppingOption = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Answer /v1/completions and /v1/chat/completions as OpenAI's clients ask for them, until Ctrl-C."""
    console = Console(json=json, quiet=quiet)
    from inl_core.interop.server.serving import bind, build_server, require_server, url_of

    require_server()
    bound = bind(host, port)
    loaded = open_model(console, checkpoint, device, iterations=iterations)

    from inl_core.interop.server.app import ServerSettings, build_app
    from inl_core.interop.server.engine import Engine
    from inl_core.model import Options
    from inl_core.training.precision import is_bf16

    engine = Engine(
        loaded,
        batch_size=batch_size,
        max_waiting=max_waiting,
        options=Options(num_iterations=iterations, early_stopping=not no_early_stopping),
        bf16=is_bf16(precision, loaded.model.embedding.table.weight.device),
    )
    settings = ServerSettings(name or _name(loaded.path), timeout=timeout)
    data = {"url": url_of(bound), "model": settings.name, "checkpoint": loaded.path, "step": loaded.step}
    console.result(data, lambda: console.write(f"{data['url']} serves {settings.name}, {loaded.path}\n"))
    try:
        build_server(build_app(engine, settings), engine, timeout=timeout).run(sockets=[bound])
    except KeyboardInterrupt:  # uvicorn ends in good order, and then passes the signal on
        console.info("stopped")


def _name(checkpoint: Path) -> str:
    """The run's name for one of its checkpoints, else the checkpoint's own."""
    path = checkpoint.resolve()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.name
