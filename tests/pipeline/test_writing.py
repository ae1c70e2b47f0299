"""Whole or not at all, wherever the place: mounts, the current folder, folders that cannot be written, kills."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support.checks import refusal

from lavin_rt import files
from lavin_rt.files import check_writable, is_vacant, written_whole
from lavin_rt.pictures.images import check_output, save_picture

FRAME = torch.arange(3 * 4 * 4, dtype=torch.uint8).reshape(3, 4, 4)
ROOT = os.geteuid() == 0 and shutil.which("unshare") is not None
needs_mounts = pytest.mark.skipif(
    not ROOT or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="needs root and mount namespaces",
)


def in_namespace(script: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs a script whose mounts nobody else sees."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["unshare", "-m", "bash", "-ec", script.replace("PYTHON", sys.executable)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


WRITE = "import sys; from lavin_rt.files import check_writable, written_whole; p = sys.argv[1]; check_writable(p); "
FILE = f"PYTHON -c \"{WRITE}w = written_whole(p); w.__enter__().write_text('new content'); w.__exit__(*[None] * 3)\""
FOLDER = (
    'PYTHON -c "import sys; from lavin_rt.files import check_writable, written_whole; p = sys.argv[1]; '
    "check_writable(p, True); w = written_whole(p, True); f = w.__enter__(); (f / 'a').write_text('1'); "
    "(f / 'sub').mkdir(); (f / 'sub' / 'b').write_text('2'); w.__exit__(None, None, None)\""
)


def modes(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o666])
def test_a_file_keeps_its_mode_and_owner(tmp_path, mode):
    path = tmp_path / "o.png"
    path.write_bytes(b"old")
    path.chmod(mode)
    if ROOT:
        os.chown(path, 1234, 5678)
    before = modes(path)
    save_picture(FRAME, path)
    assert modes(path) == before and path.stat().st_size > 3
    assert os.listdir(tmp_path) == ["o.png"]


def test_new_files_and_folders_have_the_mode_that_the_process_gives(tmp_path):
    before = os.umask(0o027)
    try:
        with written_whole(tmp_path / "new" / "file") as partial:
            partial.write_bytes(b"1")
        with written_whole(tmp_path / "folder", folder=True) as partial:
            (partial / "x").touch()
    finally:
        os.umask(before)
    assert modes(tmp_path / "new" / "file")[0] == 0o640 and modes(tmp_path / "folder")[0] == 0o750


def test_an_empty_folder_that_is_there_is_filled_and_stays_the_same(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o2775)
    folder.chmod(0o2775)
    identity = folder.stat().st_ino, modes(folder)
    monkeypatch.chdir(folder)
    for place in (".", folder):
        check_writable(place, folder=True)
        with written_whole(place, folder=True) as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / "one").write_text("1")
            (partial / "manifest.json").write_text("last")
        assert (folder.stat().st_ino, modes(folder)) == identity
        assert sorted(os.listdir(".")) == ["manifest.json", "sub"] and Path("sub/one").read_text() == "1"
        assert not is_vacant(folder) and "not empty" in refusal(check_writable, folder, True)
        shutil.rmtree("sub")
        os.remove("manifest.json")


def test_a_volume_s_lost_found_is_no_content(tmp_path):
    (tmp_path / "lost+found").mkdir()
    check_output(tmp_path, 2)
    save_picture(torch.stack([FRAME, FRAME]), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["0000.png", "0001.png", "lost+found"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_nothing_is_left_of_what_fails(tmp_path, folder, there):
    path = tmp_path / "out"
    if there:
        path.mkdir() if folder else path.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(path, folder=folder) as partial:
        (partial / "a").write_text("new") if folder else partial.write_text("new")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["out"] * there
    if there:
        assert os.listdir(path) == [] if folder else path.read_text() == "old"


def test_a_folder_s_content_moves_back_where_it_cannot_all_move(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    rename, moved = os.rename, []

    def second_fails(source, target):
        moved.append(target)
        if len(moved) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(files.InputError, match="Input/output error"), written_whole(tmp_path / "out", True) as partial:
        (partial / "a").touch()
        (partial / "b").touch()
    assert os.listdir(tmp_path / "out") == []


def test_devices_and_pipes_are_written_into_and_never_replaced(tmp_path):
    null = os.stat("/dev/null")
    (tmp_path / "link.png").symlink_to("/dev/null")
    save_picture(FRAME, tmp_path / "link.png")
    assert os.stat("/dev/null").st_ino == null.st_ino and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.mkfifo(tmp_path / "pipe.png")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe.png").read_bytes()))
    reader.start()
    save_picture(FRAME, tmp_path / "pipe.png")
    reader.join(30)
    assert got[0].startswith(b"\x89PNG") and stat.S_ISFIFO((tmp_path / "pipe.png").stat().st_mode)
    (tmp_path / "full.png").symlink_to("/dev/full")
    assert "No space left" in refusal(save_picture, FRAME, tmp_path / "full.png")


@pytest.mark.parametrize(
    ("name", "folder", "expected"),
    [
        ("n" * 256 + ".png", False, "longer than the 255 bytes"),
        ("n" * 256, True, "longer than the 255 bytes"),
        ("ä" * 130 + ".png", False, "longer than the 255 bytes"),
        (f"{'n' * 256}/o.png", False, "longer than the 255 bytes"),
        ("/".join(["n" * 200] * 21), False, "longer than 4095 bytes"),
        ("file/o.png", False, "Not a directory"),
        ("file", True, "Not a directory"),
        ("folder", False, "Is a directory"),
        ("folder", True, "not empty"),
        ("loop", False, "symbolic links"),
    ],
)
def test_what_can_never_be_written_is_refused_before_work(tmp_path, name, folder, expected):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "content").mkdir(parents=True)
    (tmp_path / "loop").symlink_to("loop")
    assert expected in refusal(check_writable, tmp_path / name, folder)
    with pytest.raises(files.InputError), written_whole(tmp_path / name, folder=folder):
        pass
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "loop"]


def test_the_check_makes_nothing(tmp_path):
    check_output(tmp_path / "a" / "b" / "o.png")
    check_output(tmp_path / "a" / "b" / "frames", 5)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_is_reclaimed_and_what_another_writes_is_not(tmp_path):
    code = (
        "import sys, time; from lavin_rt.files import written_whole\n"
        "with written_whole(sys.argv[1], True) as a, written_whole(sys.argv[2]) as b:\n"
        "    (a / 'half').write_text('1'); print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, tmp_path / "folder", tmp_path / "file"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        files._reclaimed.clear()
        save_picture(FRAME, tmp_path / "one.png")
        assert len(list(tmp_path.glob(files.PARTIAL))) == 2  # under way
        other.kill()
    files._reclaimed.clear()
    save_picture(FRAME, tmp_path / "two.png")
    assert sorted(os.listdir(tmp_path)) == ["one.png", "two.png"]


def test_leavings_in_an_empty_folder_do_not_fill_it(tmp_path):
    partial = tmp_path / files.PARTIAL.replace("*", "0123456789ab")
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert is_vacant(tmp_path) and partial.exists()  # another process writes
    os.close(descriptor)
    assert is_vacant(tmp_path) and not partial.exists()


def test_without_locks_leavings_go_after_a_day(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    old, new = (tmp_path / files.PARTIAL.replace("*", name) for name in ("old", "new"))
    for partial in (old, new):
        partial.mkdir()
    then = time.time() - files.ABANDONED_SECONDS - 60
    os.utime(old, (then, then))
    assert is_vacant(tmp_path) and not old.exists() and new.exists()


@needs_mounts
@pytest.mark.parametrize("before", ["", "a longer content than the new one"])
def test_a_bind_mounted_file_is_written_over(tmp_path, before):
    for name in ("source", "o"):
        (tmp_path / name).write_text(before)
    done = in_namespace(f"mount --bind source o; {FILE} o; cat o", tmp_path)
    assert (done.returncode, done.stdout) == (0, "new content"), done.stderr
    assert (tmp_path / "source").read_text() == "new content" and sorted(os.listdir(tmp_path)) == ["o", "source"]


@needs_mounts
def test_a_file_in_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "o").write_text("old")
    (tmp_path / "source").write_text("old")
    script = (
        "mount --bind folder folder; mount -o remount,ro,bind folder; mount --bind source folder/o; "
        f"{FILE} folder/o; cat folder/o; {FILE} folder/new"
    )
    done = in_namespace(script, tmp_path)
    assert done.stdout == "new content" and "Read-only file system" in done.stderr and done.returncode != 0
    assert os.listdir(tmp_path / "folder") == ["o"]


@needs_mounts
def test_an_empty_mount_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    script = f"mount -t tmpfs none out; {FOLDER} out; ls -A out; cat out/a out/sub/b; mkdir -p w; cd w; {FOLDER} ."
    done = in_namespace(script, tmp_path)
    assert done.stdout.split() == ["a", "sub", "12"], done.stderr
    assert sorted(os.listdir(tmp_path / "w")) == ["a", "sub"]


@pytest.mark.parametrize("there", [True, False])
def test_what_cannot_be_written_elsewhere_is_not_the_outputs_fault(tmp_path, there):
    output, elsewhere = tmp_path / "link" / "artifact", tmp_path / "elsewhere" / "lost"
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    if there:
        output.mkdir()

    def write(place):
        with written_whole(output, folder=True) as partial:
            place(partial).write_text("")

    said = refusal(write, lambda partial: elsewhere)
    assert said == f"{elsewhere}: No such file or directory; {output} was not written for it"
    for place in (lambda partial: partial / "a" / "b", lambda partial: partial.parent / ".lavin-rt-0.part" / "b"):
        assert refusal(write, place).startswith(f"{output}: cannot be written (No such file or directory)")


@needs_mounts
def test_a_full_disk_loses_nothing_of_a_file_that_is_written_over(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "o").touch()
    script = (
        "mount -t tmpfs -o size=64k none disk; printf old > disk/o; mount --bind disk/o o; "
        "head -c 49152 /dev/zero > disk/ballast; "
        "PYTHON -c \"from lavin_rt.files import written_whole; w = written_whole('o'); "
        'w.__enter__().write_bytes(bytes(60000)); w.__exit__(None, None, None)" || true; cat disk/o'
    )
    done = in_namespace(script, tmp_path)
    assert done.stdout == "old" and "No space left" in done.stderr, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_undo_what_is_under_way(tmp_path, number):
    code = (
        "import signal, sys, time, lavin_rt.cli.demo, lavin_rt.cli.main as cli\n"
        # A test that runs behind nohup, or in a shell's background, would hand on what is ignored there.
        "signal.signal(signal.SIGINT, signal.default_int_handler); signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "from lavin_rt.files import written_whole\n"
        "import lavin_rt.cli.info\n"
        "def work(options):\n"
        "    with written_whole(sys.argv[1], True) as folder:\n"
        "        (folder / 'half').write_text('1'); print('ready', flush=True); time.sleep(60)\n"
        "lavin_rt.cli.info.info = work\n"
        "sys.exit(cli.main(['info']))"
    )
    command = [sys.executable, "-c", code, tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, message = process.communicate(timeout=30)
    assert process.returncode == 128 + number and message.count("\n") == 1 and "Traceback" not in message
    assert os.listdir(tmp_path) == []


def test_nohup_stays_nohup():
    from lavin_rt.process import Terminated, terminating

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminating():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(Terminated, match="SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
