"""What can go wrong with an artifact."""

from __future__ import annotations


class VerificationError(RuntimeError):
    """An artifact does not compute what its checkpoint does."""
