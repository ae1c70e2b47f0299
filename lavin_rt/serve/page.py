"""The page: choose a task or make one of pairs, drop a query, watch it, compare. Gradio on the service's own app."""

from __future__ import annotations

import asyncio
import atexit
import html
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from PIL import Image

from lavin_rt.errors import InputError
from lavin_rt.packs import check_name
from lavin_rt.pictures import context as contexts
from lavin_rt.pictures import images
from lavin_rt.sampling.speeds import SPEEDS
from lavin_rt.serve import pictures
from lavin_rt.serve.engine import Ticket
from lavin_rt.serve.library import LibraryEntry
from lavin_rt.serve.limits import Refused, refusal
from lavin_rt.serve.service import PAIRS, Service
from lavin_rt.serve.stubless import gradio as gr

REFRESH_SECONDS = 0.15
STRIP = 8
SHOWN_SIDE = 384
"""Results of few pixels are shown enlarged, pixel by pixel; downloads are as they are."""
EXAMPLES = ("depth_estimation", "object_detection", "negative")
DOWNLOADS = 64
CACHE_SECONDS = (600, 3600)
STYLE = """
.gradio-container {max-width: 1200px !important; width: 100%; margin: auto}
.lavin-status {min-height: 2.6rem; font-size: 1rem}
.lavin-status progress {width: 100%; height: .7rem}
.lavin-error {border-left: 4px solid #d33; padding: .5rem .8rem; background: rgba(221, 51, 51, .12); border-radius: 4px}
#result, .gallery-container {contain: inline-size}
.gallery-container .grid-wrap {padding-top: 2.2rem}
.gallery-container .caption-label {font-size: .7rem; white-space: normal; padding: .1rem .3rem}
#query img {width: 100%; height: 100%; object-fit: contain}
#pair-input .icon-wrap, #pair-target .icon-wrap {display: none}
#pair-input .upload-container .wrap, #pair-target .upload-container .wrap {padding-top: 1.8rem; font-size: .8rem}
@media (max-width: 600px) {
  main.contain, .wrap {min-width: 0}
  .gradio-container main {padding: 0 .4rem !important}
  #pairs {height: 15rem !important}
}
footer .built-with, footer a[href*="gradio"] {display: none !important}
"""

# On a phone what happens next is further down; where it is seen already nothing moves. Pictures get their height first.
SHOW = (
    "() => {setTimeout(() => document.querySelector('%s').scrollIntoView({block: 'nearest', behavior: 'smooth'}), 300)}"
)


def upload(**options: Any) -> gr.Image:
    """A picture as the client sent it; the service's own bounded decoder opens it, and nothing else does."""
    image = gr.Image(type="filepath", image_mode=None, sources=["upload", "webcam", "clipboard"], **options)
    # A subclass would be another component to the browser.
    image.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return image


class Page:
    """What the page's buttons do.

    Args:
        service: answers.
    """

    def __init__(self, service: Service):
        self.service = service
        self._tickets: OrderedDict[str, Ticket] = OrderedDict()
        self._downloads_lock = threading.Lock()
        self.downloads = Path(tempfile.mkdtemp(prefix="lavin-rt-page-"))
        atexit.register(shutil.rmtree, self.downloads, ignore_errors=True)

    def names(self) -> list[str]:
        return [entry.name for entry in self.service.library.all()]

    def examples(self) -> list[tuple[str, Path]]:
        """Three tasks with a query each that is none of the pairs shown to the model."""
        entries = {entry.name: entry for entry in self.service.library.all() if isinstance(entry.source, Path)}
        names = [name for name in EXAMPLES if name in entries] or list(entries)[:3]
        found = []
        for entry in (entries[name] for name in names):
            if entry.frames == 1 and isinstance(entry.source, Path):
                count = min(PAIRS + 1, entry.pairs)
                pairs = contexts.choose_pairs(contexts.read_template(entry.source), count, 0)
                found.append((entry.name, Path(pairs[-1].input)))
        return found

    def pairs(self, name: str | None) -> tuple[list[tuple[Image.Image, str]], dict]:
        """A task's pairs for the gallery, and the slider of how many."""
        try:
            entry = self.service.library.find(name or "")
        except Refused:
            return [], gr.update()
        shown = []
        for i, pair in enumerate(self.service.library.thumbnails(entry)):
            shown += [(enlarged(side), f"{role} {i + 1}") for role, side in zip(("in", "out"), pair, strict=True)]
        return shown, pair_slider(entry, self.service.limits.pairs)

    async def run(
        self, name: str, query: str | None, speed: str, steps: float, guidance: float, seed: float, pairs: float,
        strip: list,
    ) -> AsyncIterator[tuple]:  # fmt: skip
        """Answers a query; yields `(status, ticket's id, result, download, strip, strip)` as it goes."""
        keep = gr.update()
        try:
            if not query:
                raise Refused(422, "no query yet; drop a picture first", "input")
            knots = None if SPEEDS[speed].owns_grid else int(steps)
            kind = self.service.kind(name or "", knots, float(guidance), speed, int(pairs))
            content = await asyncio.to_thread(Path(query).read_bytes)
            clip = await asyncio.to_thread(pictures.decode, [content], self.service.limits, "query")
            ticket = self.service.submit(kind, clip, int(seed or 0))
        except (Refused, OverflowError, ValueError, TypeError) as error:
            yield problem(said(error)), "", keep, keep, keep, strip
            return
        name = secrets.token_hex(8)
        self._tickets[name] = ticket
        try:
            while not ticket.future.done():
                yield progress(ticket, kind.evaluations), name, keep, keep, keep, strip
                await asyncio.sleep(REFRESH_SECONDS)
            answer = ticket.future.result()
            frames = answer.result.frames
            shown = (enlarged(ticket.clip[0]), enlarged(frames[0]))
            file = await asyncio.to_thread(self._download, frames, kind.entry.name, ticket.seed)
            strip = [(shown[1], f"{kind.entry.name}, seed {ticket.seed}"), *strip][:STRIP]
            seconds = time.monotonic() - ticket.arrived
            done = f"<p>Done: {answer.evaluations} evaluations in {seconds:.1f} s, seed {ticket.seed}.</p>"
            yield status(done), "", gr.update(value=shown), gr.update(value=file, interactive=True), strip, strip
        except Refused as error:
            yield problem(said(error)), "", keep, keep, keep, strip
        finally:
            ticket.cancel()  # where the page was closed in mid-run
            self._tickets.pop(name, None)

    def cancel(self, name: str) -> None:
        """Cancels a run of this page's."""
        ticket = self._tickets.get(name)
        if ticket is not None:
            ticket.cancel()

    def _download(self, frames: torch.Tensor, task: str, seed: int) -> str:
        kind = "png" if len(frames) == 1 else "webp"
        folder = self.downloads / secrets.token_hex(8)
        with self._downloads_lock:
            for old in sorted(self.downloads.iterdir(), key=lambda path: path.stat().st_mtime)[: 1 - DOWNLOADS]:
                shutil.rmtree(old, ignore_errors=True)
            folder.mkdir()
        path = folder / f"{task}-{seed}.{kind}"
        path.write_bytes(pictures.encode(frames, kind))
        return str(path)

    def add_pair(self, source: str | None, target: str | None, pairs: list) -> tuple:
        """Takes a pair: `(pairs, gallery, input emptied, target emptied, status)`."""
        keep = gr.update()
        try:
            if not source or not target:
                raise Refused(422, "a pair is an input and its target; drop both", "input")
            if len(pairs) >= self.service.limits.pairs:
                raise Refused(413, f"{len(pairs)} pairs already, as many as there may be; make the task", "size")
            sides = (("input", source), ("target", target))
            clips = tuple(pictures.decode([Path(path).read_bytes()], self.service.limits, role) for role, path in sides)
            size = images.parse_size(self.service.pipeline.size)
            pairs = [*pairs, tuple(images.resize(clip, size) for clip in clips)]
        except Refused as error:
            return pairs, keep, keep, keep, problem(said(error))
        shown = [
            (enlarged(clip[0]), f"{role} {i + 1}")
            for i, pair in enumerate(pairs)
            for role, clip in zip(("in", "out"), pair, strict=True)
        ]
        more = f"{len(pairs)} pair{'s' * (len(pairs) > 1)}; add more, or make the task."
        return pairs, shown, None, None, status(f"<p>{more}</p>")

    async def make(self, name: str, pairs: list) -> tuple:
        """Makes a task of pairs: `(status, choice of tasks, pairs)`."""
        try:
            if not pairs:
                raise Refused(422, "no pairs yet; drop an input and its target, then add the pair", "input")
            name = check_name(name.strip().lower()) if name and name.strip() else f"mine-{secrets.token_hex(3)}"
            entry = await self.service.make_task(name, pairs)
        except (Refused, InputError) as error:
            return problem(said(error)), gr.update(), pairs
        done = f"<p>Task <b>{html.escape(entry.name)}</b> is made and chosen; drop a query and run.</p>"
        return status(done), gr.update(choices=self.names(), value=entry.name), []


def mount_page(app: FastAPI, service: Service) -> FastAPI:
    """Mounts the page at `/`."""
    page = Page(service)
    blocks = build(page)
    blocks.queue(default_concurrency_limit=32, max_size=service.limits.queue)
    return gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=["settings"],
        # The examples' own queries, beside what the page's visitors made.
        allowed_paths=[*(str(path) for _, path in page.examples()), str(page.downloads)],
        max_file_size=service.limits.body_bytes,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        # Fonts of the machine that shows it: the theme's own would come from elsewhere.
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
    )


def build(page: Page) -> gr.Blocks:
    """The page's parts and what they do."""
    names, examples = page.names(), page.examples()
    first = examples[0][0] if examples else (names[0] if names else None)
    gallery, _ = page.pairs(first)
    service = page.service
    with gr.Blocks(title="lavin-rt", analytics_enabled=False, delete_cache=CACHE_SECONDS) as blocks:
        ticket, strip_state, pair_state = gr.State(""), gr.State([]), gr.State([])
        gr.Markdown("# lavin-rt\nShow it a few pairs of a task, and it does the task.")
        buttons = []
        if examples:
            gr.Markdown("Try one:")
            with gr.Row():
                for name, _ in examples:
                    buttons.append(gr.Button(name.replace("_", " "), size="sm", min_width=90))
        with gr.Row():
            with gr.Column(min_width=280):
                task = gr.Dropdown(names, value=first, label="Task", elem_id="task")
                shown = gr.Gallery(
                    gallery,
                    label="Its pairs",
                    elem_id="pairs",
                    columns=2,
                    height=360,
                    object_fit="contain",
                    buttons=[],
                    interactive=False,
                )
                with gr.Accordion("Make a task of your own pairs", open=False, elem_id="own"):
                    with gr.Row():
                        source = upload(label="Input", height=170, elem_id="pair-input", min_width=130)
                        target = upload(label="Target", height=170, elem_id="pair-target", min_width=130)
                    add = gr.Button("Add this pair", elem_id="add-pair")
                    chosen = gr.Gallery(
                        label="Pairs so far", columns=4, height=150, fit_columns=False, buttons=[], interactive=False
                    )
                    own_name = gr.Textbox(label="Name", placeholder="small letters, digits, - and _", max_length=64)
                    make = gr.Button("Make the task", elem_id="make-task")
            with gr.Column(min_width=280):
                query = upload(label="Query", height=300, elem_id="query")
                with gr.Row():
                    run = gr.Button("Run", variant="primary", elem_id="run", min_width=90)
                    cancel = gr.Button("Cancel", elem_id="cancel", min_width=90)
                message = gr.HTML(status(""), elem_id="status")
                with gr.Accordion("How", open=False, elem_id="how"):
                    speed = gr.Radio(service.speeds, value=service.speed, label="Speed")
                    steps = gr.Slider(
                        4, service.limits.steps, value=20, step=2, label="Steps", info="of speed exact alone"
                    )
                    guidance = gr.Slider(0, min(10, service.limits.guidance), value=1.5, step=0.1, label="Guidance")
                    seed = gr.Number(0, precision=0, label="Seed", minimum=0, maximum=2**53)
                    pairs = gr.Slider(1, 8, value=4, step=1, label="Pairs")
            with gr.Column(min_width=280):
                result = gr.ImageSlider(
                    label="Query and result", type="pil", format="png", interactive=False, elem_id="result",
                    buttons=["fullscreen"], max_height=400,
                )  # fmt: skip
                download = gr.DownloadButton("Download the result", interactive=False, elem_id="download")
                strip = gr.Gallery(
                    label="Last results",
                    columns=4,
                    height=200,
                    fit_columns=False,
                    buttons=[],
                    interactive=False,
                    elem_id="strip",
                )
        asked = [task, query, speed, steps, guidance, seed, pairs, strip_state]
        answered = [message, ticket, result, download, strip, strip_state]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        task.change(page.pairs, task, [shown, pairs], **private)
        run.click(page.run, asked, answered, **private).then(None, js=SHOW % "#result", **private)
        cancel.click(page.cancel, ticket, None, queue=False, **private)
        add.click(page.add_pair, [source, target, pair_state], [pair_state, chosen, source, target, message], **private)
        make.click(page.make, [own_name, pair_state], [message, task, pair_state], **private)
        blocks.load(lambda: gr.update(choices=page.names()), None, task, **private)
        for button, (name, path) in zip(buttons, examples, strict=True):
            choose = button.click(
                lambda name=name, path=path: (name, str(path)), None, [task, query], js=SHOW % "#status", **private
            )
            choose.then(page.run, asked, answered, **private).then(None, js=SHOW % "#result", **private)
    return blocks


def pair_slider(entry: LibraryEntry, most: int) -> dict:
    most = min(entry.pairs, most)
    value = most if entry.size else min(PAIRS, most)
    return gr.update(minimum=1, maximum=max(2, most), value=value, interactive=most > 1)


def enlarged(frame: torch.Tensor) -> Image.Image:
    """A frame, uint8 `[3, H, W]`, to be looked at."""
    image = images.to_pil(frame)
    factor = SHOWN_SIDE // max(image.size)
    return (
        image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) if factor > 1 else image
    )


def status(inner: str) -> str:
    return f'<div class="lavin-status" role="status">{inner}</div>'


def problem(text: str) -> str:
    return status(f'<div class="lavin-error" role="alert">{html.escape(text)}</div>')


def said(error: Exception) -> str:
    """A problem for a visitor."""
    known = isinstance(error, Refused | InputError)
    return refusal(error).message if known else "expected numbers in the fields under How"


def progress(ticket: Ticket, evaluations: int) -> str:
    """How far a run is."""
    if ticket.state == "waiting":
        return status("<p>Waiting for its turn</p><progress></progress>")
    total = ticket.total or evaluations
    left = "" if ticket.seconds_left is None else f", about {ticket.seconds_left:.0f} s left"
    bar = f'<progress max="{total}" value="{ticket.done}"></progress>'
    return status(f"<p>Evaluation {ticket.done} of {total}{left}</p>{bar}")
