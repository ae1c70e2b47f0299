"""Optimisation profiles: for which sizes an engine is built, and for which of them it is tuned."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from lavin_rt.artifact.parts import TensorSpec
from lavin_rt.artifact.sizes import parse_size, shown
from lavin_rt.errors import InputError

Bounds = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

SIZES = ("batch", "pairs", "cond_frames", "target_frames", "height", "width")
_RANGE = re.compile(r"(\d{1,6})(?::(\d{1,6}))?(?::(\d{1,6}))?")


@dataclasses.dataclass(frozen=True)
class Range:
    """A size from `least` to `most`, tuned for `best`."""

    least: int
    best: int
    most: int

    def __post_init__(self):
        if not 1 <= self.least <= self.best <= self.most:
            raise InputError(f"{self.least}:{self.best}:{self.most} is no range; expected LEAST:TUNED:MOST, ascending")

    def over(self, divisor: int) -> Range:
        return Range(self.least // divisor, self.best // divisor, self.most // divisor)


@dataclasses.dataclass(frozen=True)
class Profile:
    """The sizes of one profile, in latents, where eight pixels are one.

    Attributes:
        batch: queries answered together.
        cond_frames: latent frames of the condition.
        target_frames: latent frames to generate.
        height, width: of the latents, even.
    """

    batch: Range
    cond_frames: Range
    target_frames: Range
    height: Range
    width: Range

    def bounds(self, inputs: Sequence[TensorSpec]) -> dict[str, Bounds]:
        """Least, tuned and largest shape of every input of a manifest's part whose shape varies."""
        named = self._named()
        bounds: dict[str, Bounds] = {}
        for tensor in inputs:
            if all(isinstance(size, int) for size in tensor["shape"]):
                continue
            least, best, most = (
                tuple(_number(size, named, which) for size in tensor["shape"]) for which in ("least", "best", "most")
            )
            bounds[tensor["name"]] = least, best, most
        return bounds

    def ranges(self, inputs: Sequence[TensorSpec]) -> dict[str, list[int]]:
        """Least and most of every named size of these inputs, as a manifest has them."""
        names = {parse_size(size)[1] for tensor in inputs for size in tensor["shape"] if isinstance(size, str)}
        named = self._named()
        return {name: [named[name].least, named[name].most] for name in sorted(names)}

    def _named(self) -> dict[str, Range]:
        """The sizes by the names that manifests use; to the VAE's parts, `rows` and `columns` of latents."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**own, "rows": self.height, "columns": self.width}


def _number(size: int | str, named: Mapping[str, Range], which: str) -> int:
    if isinstance(size, int):
        return size
    multiple, name = parse_size(size)
    return multiple * getattr(named[name], which)


def parse(text: str) -> Profile:
    """A profile as the command line gives it: `height=512,width=256:512:1024,pairs=4,batch=1:1:4`.

    Every size is a number, LEAST:MOST, tuned for the most, or LEAST:TUNED:MOST. Height and width are of pictures in
    pixels, multiples of 16 (512 by default); `pairs` (4) counts context pairs of pictures, `cond_frames` instead all
    latent frames of the condition; `target_frames` (1) and `batch` (1) count themselves.

    Raises:
        InputError: an unknown size, no number, or a picture size that is no multiple of 16.
    """
    given: dict[str, Range] = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.strip().partition("=")
        match = _RANGE.fullmatch(value.strip())
        if name not in SIZES or match is None or name in given:
            raise InputError(
                f"the profile has {shown(item)}; expected each of {', '.join(SIZES)} at most once, as NAME=NUMBER, "
                "NAME=LEAST:MOST or NAME=LEAST:TUNED:MOST"
            )
        numbers = [int(number) for number in match.groups() if number is not None]
        least, most = numbers[0], numbers[-1]
        given[name] = Range(least, numbers[1] if len(numbers) == 3 else most, most)
    if "pairs" in given and "cond_frames" in given:
        raise InputError("a profile has either pairs or cond_frames")
    for name in ("height", "width"):
        size = given.setdefault(name, Range(512, 512, 512))
        if any(number % 16 for number in (size.least, size.best, size.most)):
            raise InputError(f"the profile's {name} is {size.least}:{size.best}:{size.most}; expected multiples of 16")
    pairs = given.get("pairs", Range(4, 4, 4))
    one = Range(1, 1, 1)
    return Profile(
        batch=given.get("batch", one),
        cond_frames=given.get("cond_frames", Range(*(2 * count + 1 for count in dataclasses.astuple(pairs)))),
        target_frames=given.get("target_frames", one),
        height=given["height"].over(8),
        width=given["width"].over(8),
    )


def with_null_branches(profiles: Sequence[Profile]) -> list[Profile]:
    """The profiles, and for each one for guidance's null branch, whose condition is a zero frame and the query.

    A profile that covers both would be tuned for neither; what is there already is not added.
    """
    wanted = list(dict.fromkeys(profiles))
    for profile in profiles:
        query = profile.target_frames
        null = dataclasses.replace(profile, cond_frames=Range(1 + query.least, 1 + query.best, 1 + query.most))
        if null not in wanted:
            wanted.append(null)
    return wanted


def for_vae(profiles: Sequence[Profile]) -> list[Profile]:
    """One profile for every set of picture sizes among the profiles; the VAE sees one picture or clip at a time."""
    sizes = dict.fromkeys((profile.height, profile.width) for profile in profiles)
    one = Range(1, 1, 1)
    return [Profile(one, one, one, height, width) for height, width in sizes]
