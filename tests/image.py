"""`make image-test`: builds the Dockerfile without a Docker engine, serves inside, asks, and ends it by SIGTERM.

buildah builds with chroot for isolation, as root on Linux. Where no registry of images can be reached, the base image
that the Dockerfile names is made by debootstrap from Debian's own packages. pip installs from where pip on this
machine does: its settings, and the folders that they name, are mounted for the build and are in no layer.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

ROOT = Path(__file__).parent.parent
IMAGE = "multilora:test"
LARGEST_BYTES = 2_000_000_000
READY_S = 300
DRAIN_S = 120
"""A machine that is busy with other things may take a second a token."""
SOURCES = {"index-url", "extra-index-url", "find-links"}
"""Settings of pip that say where packages are."""
UNNEEDED = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale")
"""Of a debootstrapped system; Debian's slim images are without them too."""


def run(*command: str | Path, **options: Any) -> str:
    """Standard output of a command that must not fail; what else it says is passed on."""
    done = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True, **options)
    return str(done.stdout).strip()


class Buildah:
    """buildah with a storage of its own below `folder`, which may be removed afterwards as it is."""

    def __init__(self, folder: Path) -> None:
        storage = ("--root", folder / "root", "--runroot", folder / "run", "--storage-driver", "vfs")
        self._command = ("buildah", *storage)

    def __call__(self, command: str, *arguments: str | Path) -> str:
        return run(*self._command, command, *arguments)


def make_base(buildah: Buildah, folder: Path, name: str) -> None:
    """An image `name` (`debian:SUITE-slim`) of the suite's smallest system."""
    suite = re.fullmatch(r"debian:(\w+)-slim", name)
    if suite is None:
        raise SystemExit(f"the Dockerfile begins from {name}, which debootstrap cannot make")
    system = folder / "system"
    run("debootstrap", "--variant=minbase", suite[1], system, stderr=subprocess.STDOUT)
    for unneeded in UNNEEDED:
        shutil.rmtree(system / unneeded, ignore_errors=True)
    run("tar", "-C", system, "-cf", folder / "system.tar", ".")
    shutil.rmtree(system)
    container = buildah("from", "scratch")
    buildah("add", "-q", container, folder / "system.tar", "/")
    buildah("commit", "-q", "--rm", container, f"docker.io/library/{name}")
    (folder / "system.tar").unlink()


def pip_settings() -> dict[str, str]:
    """Of this machine, from files and environment."""
    lines = run(sys.executable, "-m", "pip", "config", "list").splitlines()
    pairs = (line.split("=", 1) for line in lines)
    return {name.rpartition(".")[2]: value.strip("'\"") for name, value in pairs}


def pip_mounts(settings: dict[str, str], folder: Path) -> list[str]:
    """Options that give the build these settings, and the local folders and files that they name."""
    settings, mounts = dict(settings), {}
    if "cert" in settings:  # its usual place belongs to a package that the build installs
        mounts[settings["cert"]] = settings["cert"] = "/run/pip/certificates.pem"
    for value in (value for name, value in settings.items() if name != "cert"):
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                mounts[str(path)] = str(path)
                mounts.update({str(p): str(p) for p in [path.parent / "files"] if word.startswith("file:")})
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{n} = {v}\n" for n, v in settings.items()))
    mounts[str(folder / "pip.conf")] = "/etc/pip.conf"
    return [f"--volume={here}:{there}:ro" for here, there in mounts.items() if Path(here).exists()]


def build(buildah: Buildah, folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Build the image from this checkout; its configuration."""
    settings = pip_settings()
    if SOURCES & settings.keys() and not any(argument.startswith("TORCH_INDEX=") for argument in arguments):
        arguments = [*arguments, "TORCH_INDEX="]  # torch comes from where this machine's packages do
    given = [f"--build-arg={argument}" for argument in arguments]
    options = ("--isolation=chroot", "--network=host", "--pull-never", "--format=docker")
    print(buildah("bud", *options, *pip_mounts(settings, folder), *given, "--tag", IMAGE, ROOT))
    inspected = json.loads(buildah("inspect", "--type", "image", IMAGE))
    config: dict[str, Any] = inspected["Docker"]["config"]
    return config


@dataclass
class Container:
    """A running server, and how it is asked."""

    process: subprocess.Popen[bytes]
    url: str
    started: float

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def wait(self) -> float:
        """Seconds from the start to /ready."""
        while time.monotonic() - self.started < READY_S:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with {self.process.returncode}")
            try:
                with urllib.request.urlopen(self.url + "/ready", timeout=5):
                    return time.monotonic() - self.started
            except (OSError, urllib.error.HTTPError):
                time.sleep(0.05)
        raise SystemExit(f"the server was not ready after {READY_S} s")

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        return self.process.wait(DRAIN_S + 30)


@contextmanager
def container(root: Path, config: dict[str, Any], binds: dict[Path, str], *flags: str) -> Iterator[Container]:
    """What `docker run --read-only --tmpfs /tmp` does: the image's user, environment, entry point, all volumes its own.

    root: its root file system, which is mounted read-only. binds: host directory -> path inside.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    user = config["User"]
    mounts = [f"mount --bind {root} {root}", f"mount -o remount,bind,ro {root}", f"mount -t proc proc {root}/proc"]
    mounts += [f"mount --rbind /dev {root}/dev", f"mount -t tmpfs tmpfs {root}/tmp"]
    mounts += [f"mount -t tmpfs -o uid={user} tmpfs {root}{volume}" for volume in config["Volumes"]]
    mounts += [f"mount --bind {here} {root}{there}" for here, there in binds.items()]
    enter = f'exec chroot --userspec={user}:{user} {root} env -i "$@"'
    command = [*config["Env"], *config["Entrypoint"], *(config.get("Cmd") or ()), "--port", str(port), *flags]
    script = " && ".join([*mounts, enter])
    process = subprocess.Popen(["unshare", "--mount", "sh", "-c", script, "sh", *command])
    try:
        yield Container(process, f"http://127.0.0.1:{port}", time.monotonic())
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def check_contents(root: Path, config: dict[str, Any], size_bytes: int) -> None:
    """No compiler, no root, a health check, and not too large."""
    compilers = [name for name in ("cc", "c++", "gcc", "g++", "clang") if (root / "usr/bin" / name).is_symlink()]
    assert not compilers, compilers
    assert config["User"] not in {"", "root", "0"}
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert config["ExposedPorts"] == {"8000/tcp": {}}
    assert size_bytes < LARGEST_BYTES, f"{size_bytes:,} bytes"
    mounted = [root / "etc/pip.conf", root / "run/pip/certificates.pem"]
    left = [file for file in mounted if file.exists() and file.stat().st_size]
    assert not left, left


def check_tasks(server: Container) -> None:
    """One request of each task."""
    items = [
        {"task": "question-type", "input": "Who wrote the first dictionary?"},
        {"task": "address-tags", "input": "2334 E. 75th St. Chicago, IL 60649"},
        {"task": "translate-fr", "input": "Open the file", "parameters": {"temperature": 0, "max_tokens": 16}},
        {"task": "smollm2", "input": "2 + 2 =", "parameters": {"temperature": 0, "max_tokens": 8}},
    ]
    kind, tags, french, base = server.ask("/v1/predict", {"items": items})["results"]
    assert kind["label"] == "HUM", kind
    found = {entity["label"]: entity["text"] for entity in tags["entities"]}
    assert (found["PlaceName"], found["ZipCode"]) == ("Chicago,", "60649"), tags
    assert french["text"] == "Ouvrez le fichier", french
    assert base["text"].strip(), base
    chat = {"model": "support-chat", "temperature": 0, "max_tokens": 24}
    said = server.ask("/v1/chat/completions", {**chat, "messages": [{"role": "user", "content": "What does Save do?"}]})
    assert said["choices"][0]["message"]["content"].strip(), said
    completion = server.ask("/v1/completions", {"model": "smollm2", "prompt": "The sky is", "max_tokens": 4})
    assert completion["usage"]["completion_tokens"] == 4, completion
    vector = server.ask("/v1/embeddings", {"model": "smollm2", "input": "a text"})["data"][0]["embedding"]
    assert abs(sum(x * x for x in vector) - 1) < 1e-4


def check_drain(server: Container) -> None:
    """SIGTERM while an answer is being written: it is finished, then the process ends with 0."""
    body = {"model": "smollm2", "prompt": "Once", "max_tokens": 24, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.ask, "/v1/completions", body)
        while "multilora:num_requests_running 1.0" not in metrics(server):
            assert not answer.done()
        status = server.stop()
        assert answer.result()["usage"]["completion_tokens"] == 24
    assert status == 0, f"exit status {status}"


def metrics(server: Container) -> str:
    with urllib.request.urlopen(server.url + "/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def check_own_volume(root: Path, config: dict[str, Any], folder: Path) -> None:
    """What lies in a volume over /adapters is served, and nothing else; what is uploaded goes into the other one."""
    shutil.copytree(ROOT / "examples/minilm/sentiment", folder / "adapters/mine")
    with container(root, config, {folder / "adapters": "/adapters"}, "--base", "minilm") as server:
        server.wait()
        assert [model["id"] for model in server.ask("/v1/models")["data"]] == ["minilm", "mine"]
        assert server.ask("/v1/predict", {"task": "mine", "inputs": "A joy."})["results"][0]["label"] == "positive"
        assert server.ask("/v1/adapters/kept", {"source": "mine"}, "PUT")["name"] == "kept"
        health = [part.replace("8000", server.url.rpartition(":")[2]) for part in config["Healthcheck"]["Test"][1:]]
        run("chroot", root, "env", "-i", *config["Env"], *health)
        assert server.stop() == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker build has it")
    parser.add_argument("--keep", action="store_true", help="leave the storage of buildah where it is, and tell where")
    given = parser.parse_args()
    folder = Path(mkdtemp(prefix="multilora-image-"))
    buildah = Buildah(folder)
    try:
        make_base(buildah, folder, re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.M)[0])
        begun = time.monotonic()
        config = build(buildah, folder, given.build_arg)
        built_s = time.monotonic() - begun
        root = Path(buildah("mount", buildah("from", "--pull-never", IMAGE)))
        size_bytes = int(run("du", "--summarize", "--bytes", "--one-file-system", root).split()[0])
        check_contents(root, config, size_bytes)
        with container(root, config, {}, "--drain-timeout", str(DRAIN_S)) as server:
            ready_s = server.wait()
            check_tasks(server)
            check_drain(server)
        check_own_volume(root, config, folder)
        print(f"image {size_bytes / 1e6:,.0f} MB, built in {built_s:.0f} s; ready {ready_s:.1f} s after its start")
    finally:
        if given.keep:
            print(f"buildah --root {folder}/root --runroot {folder}/run --storage-driver vfs")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
