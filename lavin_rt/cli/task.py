"""`lavin-rt task add` and `task show`: tasks kept in one file."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from lavin_rt.console import Progress, loading_options, print_json
from lavin_rt.errors import InputError
from lavin_rt.find.model import Artifact, find_model, template_roots
from lavin_rt.kept_keys import NO_WEIGHTS
from lavin_rt.packs import TaskPack, check_name, check_words
from lavin_rt.pictures import context as contexts
from lavin_rt.pictures import images

MOST_PAIRS = 8


def add(options: argparse.Namespace) -> None:
    """Encodes pairs into a pack; raises `InputError` for what cannot be used, before weights are read."""
    from lavin_rt.pipeline import Pipeline

    if not options.output.endswith(".safetensors"):
        raise InputError(f"--output {options.output}: expected a name ending in .safetensors")
    images.check_writable(options.output)
    given = re.sub(r"[^a-z0-9_-]+", "-", Path(options.output).stem.lower()).strip("-_")
    name = check_name(given[:64] if options.name is None else options.name)
    size = None if options.size is None else images.parse_size(options.size)
    check_words(options.words)
    checkpoint = find_model(options.checkpoint, options.revision, options.trust)
    if options.keep_keys and isinstance(checkpoint, Artifact):
        raise InputError(NO_WEIGHTS)
    pairs = find_pairs(options, template_roots(checkpoint))
    with Progress(quiet=False).bar("loading", "B") as loading:
        pipe = Pipeline.from_pretrained(checkpoint, **loading_options(options), progress=loading)
    pack = TaskPack.of(pipe.task(pairs, size=size), name, options.words, options.keep_keys)
    pack.save(options.output)
    print(f"{options.output}  {described(pack)}")


def find_pairs(options: argparse.Namespace, roots) -> list[contexts.Pair]:
    """The pairs named on the command line: of a folder or task, or pictures input, target, input, target, ..."""
    named = options.pairs_from
    if len(named) == 1:
        pairs = contexts.read_template(contexts.find_task(named[0], roots))
        count = min(MOST_PAIRS, len(pairs)) if options.pairs is None else options.pairs
        return contexts.choose_pairs(pairs, count, options.seed)
    if options.pairs is not None:
        raise InputError("--pairs chooses from a folder; pictures are used whole, leave it out")
    if len(named) % 2:
        raise InputError(f"{len(named)} pictures; expected pairs: input target input target ...")
    return [contexts.Pair(str(i // 2), *named[i : i + 2]) for i in range(0, len(named), 2)]


def show(options: argparse.Namespace) -> None:
    """Says what is in a pack, and writes its pairs as a sheet where that is asked for."""
    pack = TaskPack.load(options.pack)
    if options.output:
        if pack.thumbnails is None:
            raise InputError(f"{options.pack}: has no pictures of its pairs; make it anew with lavin-rt task add")
        images.save_picture(images.grid([list(pack.thumbnails[0::2]), list(pack.thumbnails[1::2])]), options.output)
    context = pack.context
    if options.json:
        print_json(
            {
                "name": pack.name,
                "words": pack.words,
                "pairs": context.pairs,
                "size": list(context.size),
                "frames": context.frames_per_clip,
                "posterior": context.posterior,
                "vae_fingerprint": context.vae_fingerprint,
                "thumbnails": pack.thumbnails is not None,
                "keys": context.kept is not None,
            }
        )
    else:
        print(f"{options.pack}  {described(pack)}")


def described(pack: TaskPack) -> str:
    """A pack in one line."""
    context = pack.context
    clips = f", clips of {context.frames_per_clip} frames" if context.frames_per_clip > 1 else ""
    pairs = f"{context.pairs} pair{'s' * (context.pairs != 1)} at {context.size[0]}x{context.size[1]}{clips}"
    pairs += ", keys kept" if context.kept is not None else ""
    return f"{pack.name}: {pairs}" + (f"  ({pack.words})" if pack.words else "")
