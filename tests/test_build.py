"""The CPU kernels are compiled whole or not at all, under names that tell from what; what is missing is told."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adapters.kernels import build as building
from adapters.kernels import library as loading
from adapters.kernels.build import CannotBuild, build, build_first, built_file, targets
from adapters.kernels.library import load_library, usable_targets
from server.cli import main
from tests.native_support import library_of

FLAGS = {"plain": ("-O0",), "other": ("-O0", "-DOTHER")}
SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A program that is compiled at once, in the place of the kernels; two targets, none of them built."""
    folder = tmp_path / "native"
    folder.mkdir()
    (folder / "api.cpp").write_text('#include "part.h"\n' + SOURCE)
    (folder / "part.h").write_text("// nothing\n")
    monkeypatch.setattr(building, "SOURCES", folder)
    monkeypatch.setattr(building, "targets", lambda: FLAGS)
    return folder


@pytest.fixture
def _compiler() -> None:
    try:
        subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no C++ compiler")


def compiler_that(does: str, folder: Path) -> str:
    """A program called as a compiler is; $output is where the object shall be."""
    script = folder / "compiler"
    script.write_text(f'#!/bin/sh\nfor output; do :; done\necho "$@" >> {folder / "calls"}\n{does}\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("machine", "names"),
    [
        ("x86_64", ["avx512amx", "avx512vnni", "avx512", "avx2vnni", "avx2"]),
        ("AMD64", ["avx512amx", "avx512vnni", "avx512", "avx2vnni", "avx2"]),
        ("aarch64", ["neondot", "neon"]),
        ("arm64", ["neondot", "neon"]),
        ("riscv64", []),
    ],
)
def test_targets_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch, machine: str, names: list[str]) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert [*targets()] == names


def test_a_name_depends_on_target_flags_and_every_source(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [built_file("plain").name, built_file("other").name]
    for change in (
        lambda: (sources / "part.h").write_text("// something\n"),
        lambda: (sources / "api.cpp").write_text(SOURCE),
        (sources / "new.h").touch,
        lambda: (sources / "new.h").rename(sources / "renamed.h"),
        lambda: monkeypatch.setattr(building, "COMMON_FLAGS", (*building.COMMON_FLAGS, "-g")),
        lambda: monkeypatch.setattr(building, "targets", lambda: {"plain": ("-O1",)}),
    ):
        change()
        names.append(built_file("plain").name)
        assert names[-1] == built_file("plain").name
    assert len(set(names)) == len(names)
    assert names[0].startswith("multilora-plain-")
    assert built_file("plain", Path("/elsewhere")).parent == Path("/elsewhere")
    assert built_file("plain").parent == building.BUILT


def test_what_does_not_matter_does_not_change_a_name(sources: Path) -> None:
    before = built_file("plain")
    (sources / "built").mkdir()
    (sources / "notes.txt").touch()
    (sources / "api.cpp").touch()
    assert built_file("plain") == before


@pytest.mark.usefixtures("sources", "_compiler")
def test_all_targets_are_built_and_run(tmp_path: Path) -> None:
    import ctypes

    files = build(tmp_path / "a" / "b")
    assert files == [built_file(target, tmp_path / "a" / "b") for target in FLAGS]
    assert sorted(files) == sorted((tmp_path / "a" / "b").iterdir())
    assert all(ctypes.CDLL(str(file)).answer() == 42 for file in files)
    assert all(file.stat().st_mode & 0o777 == 0o755 for file in files)


@pytest.mark.usefixtures("sources")
def test_what_is_built_already_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler_that('echo whole > "$output"', tmp_path))
    first, second = build(tmp_path / "built")
    second.unlink()
    first.write_text("mine")
    assert build(tmp_path / "built") == [first, second]
    assert (first.read_text(), second.read_text()) == ("mine", "whole\n")
    calls = [call for call in (tmp_path / "calls").read_text().splitlines() if "api.cpp" in call]
    others = ["-DOTHER" in call for call in calls]
    assert (sorted(others[:2]), others[2:]) == ([False, True], [True])  # the first two side by side
    assert all("-std=c++17" in call and "-fsanitize" not in call for call in calls)


@pytest.mark.usefixtures("sources")
def test_sanitizers_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler_that('echo whole > "$output"', tmp_path))
    build(tmp_path / "built", sanitize=True)
    assert all("-fsanitize=address" in call for call in (tmp_path / "calls").read_text().splitlines())


@pytest.mark.parametrize("does", ['echo half > "$output"; echo "no such flag" >&2; exit 1', "kill -9 $$"])
@pytest.mark.usefixtures("sources")
def test_a_compiler_that_fails_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str
) -> None:
    monkeypatch.setenv("CXX", compiler_that(does, tmp_path))
    with pytest.raises(CannotBuild, match="failed on the CPU kernels") as caught:
        build(tmp_path / "built")
    assert ("no such flag" in str(caught.value)) == ("flag" in does)
    assert [*(tmp_path / "built").iterdir()] == []


@pytest.mark.usefixtures("sources", "_compiler")
def test_sources_that_are_wrong_are_told(sources: Path, tmp_path: Path) -> None:
    (sources / "api.cpp").write_text("int answer() { return forty_two; }")
    with pytest.raises(CannotBuild, match="forty_two"):
        build(tmp_path / "built")
    assert [*(tmp_path / "built").iterdir()] == []


@pytest.mark.usefixtures("sources")
def test_the_second_target_failing_keeps_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler_that('case "$*" in *OTHER*) exit 1;; esac; echo whole > "$output"', tmp_path))
    with pytest.raises(CannotBuild):
        build(tmp_path / "built")
    assert [*(tmp_path / "built").iterdir()] == [built_file("plain", tmp_path / "built")]


@pytest.mark.usefixtures("sources")
def test_the_first_target_failing_keeps_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    does = 'case "$*" in *OTHER*) ;; *api.cpp*) echo "no such flag" >&2; exit 1;; esac; echo whole > "$output"'
    monkeypatch.setenv("CXX", compiler_that(does, tmp_path))
    with pytest.raises(CannotBuild, match="no such flag"):
        build(tmp_path / "built")
    assert [*(tmp_path / "built").iterdir()] == [built_file("other", tmp_path / "built")]


@pytest.mark.usefixtures("sources")
def test_without_a_compiler_nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    with pytest.raises(CannotBuild, match=r"no C\+\+ compiler: .*absent.* cannot be run \(set \$CXX\)"):
        build(tmp_path / "built")
    assert [*(tmp_path / "built").iterdir()] == []


@pytest.mark.usefixtures("sources")
def test_the_command_builds_prints_the_files_and_fails_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "built"
    monkeypatch.setattr("adapters.kernels.build.build", lambda: build(folder))
    monkeypatch.setattr("server.cli.set_up_logging", lambda _: None)
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    assert main(["build-kernels"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("multilora: no C++ compiler")
    monkeypatch.setenv("CXX", compiler_that('echo whole > "$output"', tmp_path))
    assert main(["build-kernels"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(built_file(target, folder)) for target in FLAGS]
    monkeypatch.setattr(building, "targets", dict)
    assert main(["build-kernels"]) == 0
    assert "there are no CPU kernels for this machine" in capsys.readouterr().err
    monkeypatch.setattr("adapters.kernels.build.build", lambda: build(tmp_path / "compiler"))  # a file
    assert main(["build-kernels"]) == 1
    assert capsys.readouterr().err.startswith("multilora: ")


@pytest.mark.usefixtures("sources")
def test_what_runs_best_is_built_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next best where the compiler cannot; `plain` is built without flags, `other` with -DOTHER."""
    folder = tmp_path / "built"
    monkeypatch.setattr("adapters.kernels.build.build_first", lambda names: build_first(names, folder))
    monkeypatch.setattr("server.cli.set_up_logging", lambda _: None)
    for usable, refused, built in (
        (["other", "plain"], "nothing", ["other"]),
        (["other", "plain"], "-DOTHER", ["plain"]),
        (["other"], "-DOTHER", None),
        ([], "nothing", []),
    ):
        for file in folder.glob("*"):
            file.unlink()
        does = f'case "$*" in *{refused}*) exit 1;; esac; echo whole > "$output"'
        monkeypatch.setenv("CXX", compiler_that(does, tmp_path))
        monkeypatch.setattr(loading, "usable_targets", lambda usable=usable: usable)
        assert main(["build-kernels", "--best"]) == (1 if built is None else 0)
        assert [*folder.glob("*")] == [built_file(target, folder) for target in built or []]
        captured = capsys.readouterr()
        assert captured.out.splitlines() == [str(built_file(target, folder)) for target in built or []]
        assert bool(captured.err) == (not built)


@pytest.fixture
def _nothing_loaded() -> Iterator[None]:
    load_library.cache_clear()
    yield
    load_library.cache_clear()


@pytest.mark.usefixtures("_nothing_loaded")
def test_kernels_that_are_not_built_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "built_file", lambda target: tmp_path / target)
    monkeypatch.setattr(loading, "targets", lambda: FLAGS)
    with caplog.at_level(logging.WARNING):
        assert load_library() is None
        assert load_library() is None
    assert [record.getMessage() for record in caplog.records] == [
        "the CPU kernels are not built (multilora build-kernels): the slower torch path is used"
    ]


@pytest.mark.usefixtures("_nothing_loaded")
def test_a_machine_without_kernels_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(loading, "targets", dict)
    assert load_library() is None
    assert "the CPU kernels do not exist for this machine" in caplog.text


@pytest.mark.usefixtures("_nothing_loaded")
def test_an_object_that_cannot_be_loaded_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken").write_text("no object")
    monkeypatch.setattr(loading, "built_file", lambda target: tmp_path / "broken")
    assert load_library() is None
    assert "the CPU kernels cannot be loaded (" in caplog.text


VNNI = {"avx512_vnni": True}
AMX = VNNI | {"amx_tile": True, "amx_bf16": True, "amx_int8": True}
ALL = ["avx512amx", "avx512vnni", "avx512", "avx2vnni", "avx2"]
ARM = ["neondot", "neon"]


@pytest.mark.parametrize(
    ("capability", "found", "built", "loaded"),
    [
        ("AVX512", AMX, ALL, "avx512amx"),
        ("AVX512", AMX, ALL[1:], "avx512vnni"),
        ("AVX512", VNNI, ALL, "avx512vnni"),
        ("AVX512", VNNI | {"amx_tile": True}, ALL, "avx512vnni"),
        ("AVX512", AMX | {"amx_int8": False}, ALL, "avx512vnni"),
        ("AVX512", {}, ALL, "avx512"),
        ("AVX512", VNNI, ["avx512", "avx2"], "avx512"),
        ("AVX512", AMX, ["avx2"], "avx2"),
        ("AVX2", AMX, ALL, "avx2"),
        ("AVX2", VNNI | {"avx_vnni": True}, ALL, "avx2vnni"),
        ("AVX512", VNNI | {"avx_vnni": True}, ["avx2vnni", "avx2"], "avx2vnni"),
        ("AVX2", {}, ["avx512"], None),
        ("DEFAULT", AMX, ALL, None),
        ("NO AVX", {}, ["avx2"], None),
        ("DEFAULT", {"dot": True}, ARM, "neondot"),
        ("SVE256", {"dot": True}, ["neon"], "neon"),
        ("DEFAULT", {"dot": False}, ARM, "neon"),
    ],
)
@pytest.mark.usefixtures("_nothing_loaded")
def test_the_best_object_that_the_processor_runs_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capability: str,
    found: dict[str, bool],
    built: list[str],
    loaded: str | None,
) -> None:
    """torch's finding is bounded by $ATEN_CPU_CAPABILITY."""
    for target in built:
        (tmp_path / target).touch()
    monkeypatch.setattr(loading, "built_file", lambda target: tmp_path / target)
    monkeypatch.setattr(loading, "targets", lambda: building.TARGETS["aarch64" if {*built} & {*ARM} else "x86_64"])
    monkeypatch.setattr(loading, "Library", lambda file: SimpleNamespace(file=file, has_tiles=True))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    library = load_library()
    assert (library and library.file.name) == loaded


@pytest.mark.usefixtures("_nothing_loaded")
def test_tiles_that_the_system_refuses_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The object is used all the same: test_amx.py."""
    (tmp_path / "avx512amx").touch()
    monkeypatch.setattr(loading, "built_file", lambda target: tmp_path / target)
    monkeypatch.setattr(loading, "targets", lambda: building.TARGETS["x86_64"])
    monkeypatch.setattr(loading, "Library", lambda file: SimpleNamespace(file=file, has_tiles=False))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMX)
    library = load_library()
    assert library is not None
    assert library.file.name == "avx512amx"
    assert "the system does not let this process use AMX" in caplog.text


OPENMP = """
import sys
from adapters.kernels.library import Library
from pathlib import Path
assert Library(Path(sys.argv[1])).lanes in (4, 8, 16)
mapped = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line}
print(*(name for name in mapped if "gomp" in name or "iomp" in name or "libomp" in name), sep="\\n")
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
@pytest.mark.parametrize("target", usable_targets())
def test_the_kernels_use_torchs_own_threads(target: str) -> None:
    """One OpenMP runtime in the server: with two, `num_threads` would be torch's alone, and they would compete.

    In a process of its own: what trains in this one may have brought another.
    """
    library_of(target)
    code = [sys.executable, "-c", OPENMP, str(built_file(target))]
    found = subprocess.run(code, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    assert len(found.stdout.split()) == 1, found.stdout
