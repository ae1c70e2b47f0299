"""PyTorch's compiler as a user meets it: folders it cannot work in, and errors in one line."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lavin_rt.container import folder_fault, temporary_folder
from lavin_rt.devices import causes
from lavin_rt.errors import InputError

UNQUOTED = re.compile(r"[\s'\"\\]")
# A space-free place for a link to the cache, where the temporary folder is none.
PLACES = ("/tmp", "/var/tmp", "/dev/shm")
NO_COMPILER = re.compile(r"InvalidCxxCompiler|No working C\+\+ compiler|Failed to find C compiler")


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """While PyTorch may compile `what`.

    Raises:
        InputError: there is no compiler, or no folder in which it can work.
    """
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir, temporary_cache_dir

        folder = cache_dir()
    except OSError as error:
        raise _unusable(what, Path(str(error.filename)), error.strerror or str(error)) from error
    with contextlib.ExitStack() as stack:
        # It writes the compiler's command lines without quotes.
        if UNQUOTED.search(folder):
            stack.enter_context(temporary_cache_dir(stack.enter_context(_link_to(folder, what))))
        if UNQUOTED.search(tempfile.gettempdir()):
            from torch._inductor import config

            # Headers are preprocessed in the temporary folder, everything else in the cache.
            stack.enter_context(
                config.patch({"cpp_cache_precompile_headers": False, "aot_inductor.precompile_headers": False})
            )
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            text = " ".join(f"{type(one).__name__} {one}" for one in causes(error))
            missing = any(isinstance(one, FileNotFoundError) and not one.filename2 for one in causes(error))
            if NO_COMPILER.search(text) or (missing and re.search(r"'(?:\S*/)?(?:g\+\+|gcc|clang|cc|c\+\+)\S*'", text)):
                raise InputError(f"{what} cannot be compiled: no working C++ compiler here; install g++") from error
            fault = folder_fault(folder)
            if fault:
                raise _unusable(what, Path(folder), fault) from error
            raise


@contextlib.contextmanager
def _link_to(folder: str, what: str) -> Iterator[str]:
    """A link to a folder, whose own path needs no quotes."""
    for place in (temporary_folder(), *PLACES):
        if UNQUOTED.search(place) or folder_fault(place):
            continue
        with tempfile.TemporaryDirectory(prefix="lavin-rt-", dir=place) as own:
            link = os.path.join(own, "cache")
            os.symlink(folder, link)
            yield link
            return
    raise _unusable(what, Path(folder), "there is a space or a quote in its path")


def _unusable(what: str, folder: Path, reason: str) -> InputError:
    return InputError(
        f"{what} cannot be compiled in {folder}: {reason}; name another folder in the environment's "
        "TORCHINDUCTOR_CACHE_DIR or TMPDIR"
    )
