"""What a user is told when something they gave cannot be used."""


class InputError(ValueError):
    """Something given by the user cannot be used: one line with what was found, what was expected and what to do.

    The command line prints it on stderr and exits with code 2.
    """


class TooLittleMemory(InputError):
    """What was asked for needs more memory than there is; less of it, or the same later, may work."""


class NonFiniteError(RuntimeError):
    """The sampler's latents stopped being finite numbers."""

    def __init__(self, step: int, evaluations: int):
        self.step = step
        super().__init__(
            f"latents became NaN or infinite in step {step} of {evaluations}; "
            "check the weights, or run with --dtype float32 if they are sound"
        )


class Cancelled(RuntimeError):
    """The callback asked a sampling run to stop."""


def missing_extra(package: str, extra: str, purpose: str) -> InputError:
    """The error for an optional package that is not installed."""
    return InputError(f"{purpose} needs the package {package}, which is not installed: pip install 'lavin-rt[{extra}]'")


def one_line(error: BaseException, most: int = 400) -> str:
    """What an error of another library says, in one line of at most so many characters."""
    return " ".join(str(error).split())[:most] or type(error).__name__
