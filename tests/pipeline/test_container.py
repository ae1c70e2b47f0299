"""What a container allows is what this process counts on: memory, processors, folders."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from support.checks import refusal

from lavin_rt import container, devices, process
from lavin_rt.artifact.aoti import _loading
from lavin_rt.compiling import compiling
from lavin_rt.container import folder_fault, memory_left, processors
from lavin_rt.errors import InputError
from lavin_rt.find.model import find_checkpoint

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(cgroup, mounts, files)`: a root with such a /proc and such control groups."""

    def make(cgroup: str, mounts: list[str], files: dict[str, str]) -> None:
        own = tmp_path / "proc" / "self"
        own.mkdir(parents=True, exist_ok=True)
        (own / "cgroup").write_text(cgroup)
        lines = [f"{30 + i} 24 0:{i} {mount}" for i, mount in enumerate(mounts)]
        (own / "mountinfo").write_text("\n".join(["22 1 8:1 / / rw - ext4 /dev/sda rw", *lines]) + "\n")
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n")

    monkeypatch.setattr(container, "ROOT", tmp_path)
    return make


V2 = "/ /sys/fs/cgroup rw - cgroup2 cgroup2 rw"


def v2(folder: str, limit: str, current: int, idle: int = 0) -> dict[str, str]:
    place = f"sys/fs/cgroup{folder}"
    return {
        f"{place}/memory.max": limit,
        f"{place}/memory.current": str(current),
        f"{place}/memory.stat": f"anon 1\ninactive_file {idle}\nactive_file 5",
    }


def v1(folder: str, limit: int, usage: int, idle: int = 0) -> dict[str, str]:
    place = f"sys/fs/cgroup/memory{folder}"
    return {
        f"{place}/memory.limit_in_bytes": str(limit),
        f"{place}/memory.usage_in_bytes": str(usage),
        f"{place}/memory.stat": f"cache 7\ninactive_file 3\ntotal_inactive_file {idle}",
    }


V1 = "{} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
NONE = 9223372036854771712
CASES = {
    "v2, a container's own namespace": ("0::/\n", [V2], v2("", str(900 * MIB), 300 * MIB, 50 * MIB), 650),
    "v2, no limit": ("0::/\n", [V2], v2("", "max", 300 * MIB), None),
    "v2, a parent's limit is lower": (
        "0::/a/b\n",
        [V2],
        {**v2("/a/b", str(900 * MIB), 100 * MIB), **v2("/a", str(500 * MIB), 200 * MIB), **v2("", "max", 0)},
        300,
    ),
    "v2, more taken than allowed": ("0::/\n", [V2], v2("", str(100 * MIB), 300 * MIB), 0),
    "v2, the path is not seen from inside": (
        "0::/../../other\n",
        [V2],
        v2("", str(700 * MIB), 100 * MIB),
        600,
    ),
    "v1": ("4:memory:/job\n1:cpu:/\n", [V1.format("/")], v1("/job", 800 * MIB, 200 * MIB, 20 * MIB), 620),
    "v1, no limit": ("4:memory:/\n", [V1.format("/")], v1("", NONE, 200 * MIB), None),
    "v1, docker's mount": (
        "4:memory:/docker/abc\n",
        [V1.format("/docker/abc")],
        v1("", 800 * MIB, 200 * MIB),
        600,
    ),
    "both, as systemd has them": (
        "4:memory:/job\n0::/job\n",
        [V1.format("/"), "/ /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"],
        v1("/job", 800 * MIB, 200 * MIB),
        600,
    ),
    "nothing to be read": ("garbage", [V2], {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_memory_of_a_control_group(machine, monkeypatch, case):
    cgroup, mounts, files, expected = CASES[case]
    if case == "nothing to be read":
        cgroup = "0::/nowhere\n"
    machine(cgroup, mounts, files)
    assert memory_left() == (None if expected is None else expected * MIB)
    system = devices.memory_at_hand(CPU)
    assert system == expected * MIB if expected is not None else system > 0


QUOTAS = {
    "v2": ("0::/\n", [V2], {"sys/fs/cgroup/cpu.max": "100000 100000"}, 1),
    "v2, two and a half": ("0::/\n", [V2], {"sys/fs/cgroup/cpu.max": "260000 100000"}, 3),
    "v2, a half": ("0::/\n", [V2], {"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
    "v2, none": ("0::/\n", [V2], {"sys/fs/cgroup/cpu.max": "max 100000"}, 64),
    "v2, of a parent": ("0::/a\n", [V2], {"sys/fs/cgroup/a/cpu.max": "max 1", "sys/fs/cgroup/cpu.max": "2 1"}, 2),
    "v1": (
        "2:cpu,cpuacct:/\n",
        ["/ /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"],
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        4,
    ),
    "v1, none": (
        "2:cpu:/\n",
        ["/ /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"],
        {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
        64,
    ),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_the_processors_of_a_control_group(machine, monkeypatch, case):
    cgroup, mounts, files, expected = QUOTAS[case]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    machine(cgroup, mounts, files)
    assert processors() == expected
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert processors() == 1


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_command_line_takes_as_many_threads_as_it_may_keep_busy(monkeypatch, threads):
    torch.set_num_threads(2)
    monkeypatch.setattr(container, "processors", lambda: 4)
    process.settle_threads()
    assert torch.get_num_threads() == 2  # what was asked for
    monkeypatch.setattr(container, "processors", lambda: 1)
    process.settle_threads()
    assert torch.get_num_threads() == 1
    process.settle_threads(3)
    assert torch.get_num_threads() == 3
    with pytest.raises(InputError, match="--threads is 0; expected 1 to 4096"):
        process.settle_threads(0)
    with pytest.raises(InputError, match="expected 1 to 4096"):
        process.settle_threads(3_000_000_000)


@pytest.mark.parametrize(("hidden_size", "crowded", "expected"), [(216, True, 1), (216, False, 2), (2304, True, 2)])
def test_a_small_model_has_one_thread_where_processors_are_crowded(
    monkeypatch, threads, hidden_size, crowded, expected
):
    torch.set_num_threads(2)
    monkeypatch.setattr(container, "processors", lambda: 2)
    monkeypatch.setattr(container, "crowded", lambda: crowded)
    process.settle_threads(hidden_size=hidden_size)
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize(
    ("running", "quota", "expected"),
    [
        ("1/300", "max 100000", False),
        ("3/300", "max 100000", False),  # two of four others', two left
        ("4/300", "max 100000", True),
        ("1/300", "150000 100000", True),  # a thread and a half
        ("1/300", "200000 100000", False),
        (None, "max 100000", False),  # nobody says
    ],
)
def test_crowded(machine, monkeypatch, running, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    files = {"sys/fs/cgroup/cpu.max": quota}
    if running is not None:
        files["proc/loadavg"] = f"0.10 0.20 0.30 {running} 4711"
    machine("0::/\n", ["/ /sys/fs/cgroup rw - cgroup2 cgroup2 rw"], files)
    assert container.crowded() == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
@pytest.mark.parametrize("crowded", [True, False])
def test_a_command_keeps_freed_memory_and_waits_as_the_machine_allows(crowded):
    """Seen from outside: no page is taken anew for a buffer as large as one that was freed."""
    code = (
        "import resource, subprocess, sys, lavin_rt.container\n"
        f"lavin_rt.container.crowded = lambda: {crowded}\n"
        "from lavin_rt.process import settle_memory_and_waiting\n"
        "settle_memory_and_waiting()\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    bytearray(2**27)[::4096].count(1)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "first, second = faults(), faults()\n"
        "assert first > 2**14 and second < 2**10, (first, second)\n"
        "from lavin_rt.container import give_back_freed_memory\n"
        "give_back_freed_memory()\n"
        "assert faults() > 2**14\n"
        "print(subprocess.check_output(['sh', '-c', 'echo ${OMP_WAIT_POLICY-none}'], text=True))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for given, expected in (({}, "passive" if crowded else "none"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment | given, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_a_command_has_no_more_threads_than_it_may_keep_busy():
    """From the first: PyTorch comes with the command, and only then can be told."""
    code = (
        "import sys, lavin_rt.container\n"
        "lavin_rt.container.processors = lambda: 1\n"
        "from lavin_rt.cli.main import main\n"
        "assert 'torch' not in sys.modules and main(['info', '--json']) == 0\n"
        "print(sys.modules['torch'].get_num_threads())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1"


def test_the_address_space_that_a_process_may_have(monkeypatch):
    most = 2**46
    monkeypatch.setattr(resource, "getrlimit", lambda _: (most, most))
    monkeypatch.setattr(container, "_groups", lambda _: iter(()))
    left = memory_left()
    assert 0 < left < most and left % resource.getpagesize() == 0


GROUP = Path("/sys/fs/cgroup/memory")


@pytest.mark.slow
@pytest.mark.skipif(
    not os.access(GROUP / "memory.limit_in_bytes", os.R_OK) or os.geteuid() != 0,
    reason="needs root and control groups v1",
)
def test_a_sampling_beyond_the_group_s_limit_is_refused_not_killed(tmp_path):
    group = GROUP / f"lavin-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text("900M")
        code = (
            "import pathlib, os, sys\n"
            f"pathlib.Path('{group}/cgroup.procs').write_text(str(os.getpid()))\n"
            "from lavin_rt.devices import memory_at_hand; import torch\n"
            "assert memory_at_hand(torch.device('cpu')) < 900 * 2**20"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    finally:
        group.rmdir()


def test_folders_in_which_nothing_can_be_made_or_run(tmp_path):
    assert folder_fault(tmp_path) == ""
    assert "No such file" in folder_fault(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "Not a directory" in folder_fault(tmp_path / "file")


def test_a_package_that_cannot_be_unpacked_names_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))

    def load():
        with _loading(Path("art/denoiser.pt2")):
            raise RuntimeError("Error generating temporary directory: No such file or directory")

    message = refusal(load)
    assert str(tmp_path / "nowhere") in message and "TMPDIR" in message and "export it again" not in message
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert "export it again" in refusal(load)


def test_a_compile_cache_with_spaces_is_reached_by_a_link(tmp_path, monkeypatch):
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    place = tmp_path / "a b"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place))
    with compiling("the step"):
        inside = cache_dir()
        assert " " not in inside and os.path.samefile(inside, place)
    assert cache_dir() == str(place) and not os.path.lexists(inside)


def test_a_compile_cache_that_cannot_be_used_is_named_with_its_setting(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))

    def compiled():
        with compiling("the step"):
            raise AssertionError

    message = refusal(compiled)
    assert str(tmp_path / "file" / "cache") in message and "TORCHINDUCTOR_CACHE_DIR" in message


@pytest.mark.parametrize("kind", ["inductor", "triton", "missing"])
def test_a_missing_compiler_is_one_line(tmp_path, monkeypatch, kind):
    from torch._inductor.exc import InvalidCxxCompiler

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    error = {
        "inductor": InvalidCxxCompiler("g++"),
        "triton": RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        "missing": FileNotFoundError(2, "No such file or directory", "g++"),
    }[kind]

    def compiled():
        with compiling("the step"):
            raise RuntimeError("backend='inductor' raised") from error

    assert "install g++" in refusal(compiled)


def test_a_home_that_cannot_be_written_is_not_the_archive_s_fault(tmp_path, monkeypatch):
    import tarfile

    import huggingface_hub.constants as hub

    (tmp_path / "file").touch()
    monkeypatch.setattr(hub, "HF_ASSETS_CACHE", str(tmp_path / "file" / "assets"))
    with tarfile.open(tmp_path / "weights.tar.gz", "w:gz") as archive:
        archive.add(Path(container.__file__), "weights/lavin_dit.safetensors")
    message = refusal(find_checkpoint, tmp_path / "weights.tar.gz")
    assert "HF_HOME" in message and str(tmp_path / "file" / "assets") in message and "cannot read" not in message


def test_the_first_temporary_folder_asked_for_is_told_though_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    assert container.temporary_folder() == str(tmp_path / "nowhere")
    monkeypatch.delenv("TMPDIR")
    assert os.path.isdir(container.temporary_folder()) and os.path.isdir(tempfile.gettempdir())
