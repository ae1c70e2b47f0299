"""Gradio, imported without the stubs that it writes of its components each time, half of what its import takes."""

from __future__ import annotations

import inspect

_file_of = inspect.getfile


def _file_of_no_component(thing):
    if type(thing).__name__ == "ComponentMeta":
        raise OSError  # as for a component that was typed in, of which Gradio writes no stub
    return _file_of(thing)


inspect.getfile = _file_of_no_component
try:
    import gradio
finally:
    inspect.getfile = _file_of

__all__ = ["gradio"]
