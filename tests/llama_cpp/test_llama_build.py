"""llama_build.py: which build a processor gets, and that it gets no other's."""

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from orion_triage.errors import OrionError
from orion_triage.llama_cpp import cmake_build
from orion_triage.llama_cpp.toolchain import PINNED_BUILD, built_meanwhile, existing_tools, find_toolchain
from tests.conftest import orion

WAIT_SECONDS = 300
HASWELL = frozenset("fpu sse4_2 avx avx2 bmi1 bmi2 fma f16c".split())
ZEN4 = HASWELL | set("avx512f avx512cd avx512vl avx512dq avx512bw avx512vbmi avx512_vnni avx512_bf16 vaes".split())


def test_a_build_is_named_after_all_that_it_needs() -> None:
    older, newer = cmake_build.target(HASWELL, "x86_64"), cmake_build.target(ZEN4, "x86_64")
    assert older.name == "x86_64-sse42-avx-avx2-bmi2-fma-f16c"
    assert newer.name == older.name + "-avx512-avx512_vbmi-avx512_vnni-avx512_bf16"
    assert older.options["GGML_NATIVE"] == newer.options["GGML_NATIVE"] == "OFF"
    assert (older.options["GGML_AVX2"], older.options["GGML_AVX512"]) == ("ON", "OFF")
    assert newer.options["GGML_AVX512"] == "ON"
    part = cmake_build.target(ZEN4 - {"avx512bw"}, "x86_64")  # ggml's AVX512 means all five
    assert part.options["GGML_AVX512"] == "OFF"


def test_another_architecture_is_looked_at_by_ggml_and_named_by_all_its_features() -> None:
    pi = frozenset("fp asimd fphp asimdhp asimddp crc32".split())
    named, other = cmake_build.target(pi, "aarch64"), cmake_build.target(pi | {"i8mm"}, "aarch64")
    assert named.options == {"GGML_NATIVE": "ON"}
    assert named.name.startswith("aarch64-")
    assert named.name != other.name
    assert named == cmake_build.target(frozenset(sorted(pi, reverse=True)), "aarch64")


def _tools(folder: Path, script: str) -> None:
    folder.mkdir(parents=True)
    for name in cmake_build.TOOLS:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)


def test_a_build_for_another_processor_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that moves from a newer processor to an older one, and the other way round."""
    monkeypatch.setenv("ORION_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    cache = tmp_path / f"llama.cpp-b{PINNED_BUILD}"
    here = cmake_build.target()
    _tools(cache / f"bin-{here.name}-avx1024", "kill -ILL $$")
    assert existing_tools() is None
    _tools(cache / f"bin-{here.name}", "true")
    found = existing_tools()
    assert found is not None
    assert found.llama_server.parent.name == f"bin-{here.name}"
    assert found.origin.endswith(here.name)
    monkeypatch.setenv("ORION_CPU_FEATURES", "fpu")
    assert existing_tools() is None


def test_features_that_the_processor_lacks_are_refused() -> None:
    result = orion("doctor", ORION_CPU_FEATURES="fpu,avx1024")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ORION_CPU_FEATURES names avx1024, which this processor does not have.")


def test_a_users_build_that_dies_here_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tools(tmp_path / "tools", "kill -ILL $$")
    monkeypatch.setenv("ORION_LLAMA_CPP", str(tmp_path / "tools"))
    with pytest.raises(OrionError, match=r"tools/llama-server --version ended with SIGILL: .*another processor"):
        existing_tools()


def test_whoever_waits_for_a_build_sees_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORION_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    cache = tmp_path / f"llama.cpp-b{PINNED_BUILD}"
    (cache / "source").mkdir(parents=True)
    (cache / "source" / ".complete").touch()
    (cache / cmake_build.LOG).write_text("[1/9] Building\n[4/9] Building\n")
    lines: list[tuple[str, int, int]] = []
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=find_toolchain, args=(lambda *line: lines.append(line),), daemon=True)
        waiting.start()
        deadline = time.monotonic() + WAIT_SECONDS
        while not lines and waiting.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        _tools(cache / f"bin-{cmake_build.target().name}", "true")
        fcntl.flock(lock, fcntl.LOCK_UN)
        waiting.join(WAIT_SECONDS)
    assert not waiting.is_alive()
    assert set(lines) == {("waiting for llama.cpp's build", 4, 9)}


def test_a_build_in_the_background_ends_with_the_work_it_accompanies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it is kept from beginning by the lock; what it compiles is what every other test runs."""
    monkeypatch.setenv("ORION_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    cache = tmp_path / f"llama.cpp-b{PINNED_BUILD}"
    cache.mkdir()
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with built_meanwhile() as process:
            assert process is not None
            deadline = time.monotonic() + WAIT_SECONDS
            while os.getpriority(os.PRIO_PROCESS, process.pid) != 10 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert process.poll() is None
    assert process.poll() is not None
    _tools(cache / f"bin-{cmake_build.target().name}", "true")
    with built_meanwhile() as nothing:
        assert nothing is None
