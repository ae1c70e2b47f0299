"""What a user is told when something they gave cannot be used."""

from collections.abc import Iterable


class InputError(ValueError):
    """Something given by the user cannot be used: one line with what was found, what was expected and what to do.

    The command line prints it on stderr and exits with code 2.
    """


class TooLittleMemory(InputError):
    """What was asked for needs more memory than there is; less of it, or the same later, may work."""


class NonFiniteError(RuntimeError):
    """The sampler's latents, or what the decoder makes of them, stopped being finite numbers.

    Attributes:
        step: after which the latents were not; None where they were and the pixels are not.
        evaluations: of the sampler.
    """

    def __init__(self, step: int | None = None, evaluations: int = 0):
        self.step, self.evaluations = step, evaluations
        what = f"latents became NaN or infinite in step {step} of {evaluations}"
        if step is None:
            what = "the decoder's pixels are NaN or infinite"
        super().__init__(f"{what}; check the weights, or run with --dtype float32 if they are sound")

    def __reduce__(self) -> tuple:
        """Pickled by what it was made of, not by its message."""
        return type(self), (self.step, self.evaluations)


class Cancelled(RuntimeError):
    """The callback asked a sampling run to stop."""


def missing_extra(package: str, extra: str, purpose: str) -> InputError:
    """The error for an optional package that is not installed."""
    return InputError(f"{purpose} needs the package {package}, which is not installed: pip install 'lavin-rt[{extra}]'")


def one_line(value: object, most: int | None = None) -> str:
    """A text on one line, at most its first so many characters; of an error that says nothing, its class."""
    text = " ".join(str(value).split())[:most]
    return text or (type(value).__name__ if isinstance(value, BaseException) else "")


def listed(names: Iterable[str], most: int = 6) -> str:
    """Names on one line, those beyond the first so many counted."""
    names = [name if name.isprintable() else repr(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
