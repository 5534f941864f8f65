"""The command line: serve, train, inspect, merge, convert, build-kernels, make-key."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from server import __version__, merging
from server.caller import RIGHTS
from server.config import InvalidConfig, ServerConfig, add_flags, load_config
from server.logs import set_up_logging
from server.training import recipe
from server.training.cli import run_training

SWITCH_INTERVAL_S = 0.0005
"""So long a thread keeps Python's lock from one that waits for it; by default ten times as long, a third of a step."""

SPIN_COUNT = "3000"
"""Turns (about 0.1 ms) that a thread of OpenMP waits before it sleeps. By default some milliseconds: so long waits what
else wants that processor, another thread of the same step among it."""

INSPECT_SETTINGS = (
    "base", "device", "dtype", "lora_dtype", "max_lora_rank", "max_adapter_bytes", "max_labels", "cache_dir",
)  # fmt: skip
"""Of the server, on which it depends what a checkpoint is to a base."""

CUT_OFF_S = 2
"""For what is still being answered when the time to finish is over."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `multilora`. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="multilora", description="Many LoRA adapters on one frozen base model.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve_parser = commands.add_parser("serve", help="serve a base model and its adapters over HTTP")
    add_flags(serve_parser)
    recipe.add_flags(commands.add_parser("train", help="make an adapter for a base model from a file of examples"))
    add_inspect_flags(commands.add_parser("inspect", help="tell what a checkpoint would be to a base"))
    merging.add_flags(commands.add_parser("merge", help="make one adapter of several"))
    convert_parser = commands.add_parser("convert", help="prepare an embedded base, so that serving starts at once")
    convert_parser.add_argument("--base", required=True, help="smollm2 or minilm")
    convert_parser.add_argument("--cache-dir", type=Path, default=None, metavar="…")
    build_parser = commands.add_parser("build-kernels", help="compile the CPU kernels; needs a C++ compiler")
    build_parser.add_argument("--best", action="store_true", help="only what this processor runs best: a minute less")
    add_key_flags(commands.add_parser("make-key", help="print a new API key, and add its hash to a key file"))
    given = parser.parse_args(arguments)
    bound_waiting()
    try:
        return COMMANDS[given.command](given)
    except InvalidConfig as error:
        print(f"multilora: {error}", file=sys.stderr)
        return 2


def bound_waiting() -> None:
    """Threads of OpenMP sleep after SPIN_COUNT turns, unless the environment has its own. Before torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def serve(config: ServerConfig) -> int:
    """Run the server until it is told to stop, or its engine fails. Returns the exit status."""
    import uvicorn  # noqa: PLC0415  -- `--help` shall not wait for torch

    from adapters.memory import give_back  # noqa: PLC0415
    from server.api.app import create_app  # noqa: PLC0415
    from server.api.connections import connection_class  # noqa: PLC0415
    from server.api.drain import DrainingServer  # noqa: PLC0415
    from server.keys import InvalidKeyFile  # noqa: PLC0415
    from server.service import Service  # noqa: PLC0415

    set_up_logging(config.log_level, config.log_format)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    service = Service(config)
    try:
        app = create_app(service)
    except InvalidKeyFile as error:
        raise InvalidConfig(str(error)) from None
    settings = uvicorn.Config(
        app, host=config.host, port=config.port, log_level="warning", timeout_graceful_shutdown=CUT_OFF_S,
        http=connection_class(config.client_timeout),
    )  # fmt: skip
    server = DrainingServer(settings, app.state.traffic, config.drain_timeout)
    listener = settings.bind_socket()
    logging.getLogger("server").info("listening on http://%s:%d", config.host, listener.getsockname()[1])

    def stop() -> None:
        server.should_exit = True

    service.async_engine.on_loaded = settle
    service.async_engine.on_failure = stop
    give_back()  # before the base comes: a process's peak counts
    with suppress(KeyboardInterrupt):  # of a second signal, which uvicorn passes on
        server.run([listener])
    return 1 if service.async_engine.failed else 0


def settle() -> None:
    """What lies there by now stays, so that Python's collector need not walk through it while requests run; what only
    the start needed goes."""
    from adapters.memory import give_back  # noqa: PLC0415

    gc.collect()
    gc.freeze()
    give_back()


def add_inspect_flags(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, and the settings of the server on which the answer depends."""
    parser.add_argument("path", type=Path, metavar="PATH", help="directory of a PEFT checkpoint")
    parser.add_argument("--json", action="store_true", help="as GET /v1/adapters/{name} has it")
    add_flags(parser, INSPECT_SETTINGS)


def inspect(path: Path, config: ServerConfig, as_json: bool) -> int:
    """Print what is to be said of a checkpoint. Returns 1 when it is refused."""
    from server.bases import BaseNotFound  # noqa: PLC0415
    from server.engine.device import DeviceNotAvailable  # noqa: PLC0415
    from server.inspection import inspect as examine  # noqa: PLC0415

    try:
        found = examine(path, config)
    except (BaseNotFound, DeviceNotAvailable, OSError) as error:
        print(f"multilora: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.as_json(), indent=2) if as_json else found.as_text())
    return 1 if found.report is None else 0


def convert(base: str, cache_dir: Path | None) -> int:
    """Write the safetensors form of an embedded base into the cache."""
    from server.bases import BaseNotFound, resolve_base  # noqa: PLC0415

    set_up_logging("info")
    try:
        source = resolve_base(base, cache_dir)
    except BaseNotFound as error:
        print(f"multilora: {error}", file=sys.stderr)
        return 2
    print(source.location)
    return 0


def build_kernels(best: bool) -> int:
    """Compile the CPU kernels, where there are none yet from these sources."""
    from adapters.kernels.build import CannotBuild, build, build_first  # noqa: PLC0415
    from adapters.kernels.library import usable_targets  # noqa: PLC0415

    set_up_logging("info")
    try:
        files = build_first(usable_targets()) if best else build()
    except (CannotBuild, OSError) as error:
        print(f"multilora: {error}", file=sys.stderr)
        return 1
    for file in files:
        print(file)
    if not files:
        print("multilora: there are no CPU kernels for this machine; the torch path serves it", file=sys.stderr)
    return 0


def add_key_flags(parser: argparse.ArgumentParser) -> None:
    """The fields of a key; those not given stay unset."""
    parser.add_argument("--file", type=Path, required=True, metavar="…", help="the key file; made when there is none")
    parser.add_argument("--name", required=True, metavar="…", help="whose key it is")
    parser.add_argument("--right", dest="rights", action="append", choices=RIGHTS, help="may be repeated ['infer']")
    parser.add_argument(
        "--adapters", action="append", metavar="…", help="pattern of names of models, may be repeated ['*']"
    )
    parser.add_argument("--requests-per-minute", type=int, metavar="…", help="more are refused with 429 [no limit]")
    parser.add_argument("--queue-share", type=float, metavar="…", help="of the waiting queue, at most 1 [1.0]")


def add_key(given: argparse.Namespace) -> int:
    """Print a new key, the only time that it can be read."""
    from server.keys import InvalidKeyFile, make_key  # noqa: PLC0415

    fields = ("rights", "adapters", "requests_per_minute", "queue_share")
    settings = {name: value for name in fields if (value := getattr(given, name)) is not None}
    try:
        key = make_key(given.file, given.name, **settings)
    except (InvalidKeyFile, OSError) as error:
        print(f"multilora: {error}", file=sys.stderr)
        return 2
    print(key)
    print(f"multilora: this is shown once; {given.file} has its hash, as {given.name}", file=sys.stderr)
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "serve": lambda given: serve(load_config(vars(given))),
    "train": run_training,
    "inspect": lambda given: inspect(given.path, load_config(vars(given)), given.json),
    "merge": merging.run_merge,
    "convert": lambda given: convert(given.base, given.cache_dir),
    "build-kernels": lambda given: build_kernels(given.best),
    "make-key": add_key,
}

if __name__ == "__main__":
    sys.exit(main())
