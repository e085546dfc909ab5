"""What may be asked for and what may be shown: the operator's own functions, asked each time.

They fail closed: a function that raises, takes too long or answers something else than it should
gives an error and no picture. A sentence would be shown to the client, so it must be fit for that.

Letters: H and W a picture's sides.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.hooks import load_hook
from pipelines.sampling.openai_errors import NO_RETRY, SERVER_ERROR, ApiError

PromptPolicy = Callable[[str], str | None]
PicturePolicy = Callable[[np.ndarray], str | None]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """Dotted names of functions, ``package.module:function``; empty: everything may pass.

    Each gets a prompt, or pixels (H, W, 3) uint8, and answers None, or a sentence that says why
    not. They are called in threads, several at a time.
    """

    prompt: str = ""
    picture: str = ""
    """Sees every picture that would leave the server, unfinished ones too."""
    seconds: float = 10.0
    """What one call may take."""

    def __post_init__(self) -> None:
        if self.seconds <= 0:
            raise ValueError(f"seconds must be positive, got {self.seconds}")


class Policies:
    """The functions that the settings name."""

    def __init__(self, settings: PolicySettings) -> None:
        """Raises ValueError if a function cannot be found: nothing is served without it."""
        self._prompt = load_hook("prompt", settings.prompt)
        self._picture = load_hook("picture", settings.picture)
        self._seconds = settings.seconds

    async def check_prompt(self, prompt: str) -> None:
        """Raises ApiError if it may not be drawn."""
        if self._prompt:
            await self._check("prompt", self._prompt, prompt)

    async def check_pictures(self, pictures: Sequence[np.ndarray]) -> None:
        """Raises ApiError if one of them may not be shown."""
        if self._picture:
            for pixels in pictures:
                await self._check("picture", self._picture, pixels)

    async def _check(self, kind: str, hook: Callable[[Any], Any], value: Any) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                verdict = await asyncio.to_thread(hook, value)
            if verdict is not None and (not isinstance(verdict, str) or not verdict):
                raise TypeError(f"must answer None or a sentence, got {type(verdict).__name__}")
        except Exception as error:  # whatever it is, nothing may pass; the log has it
            log.exception("the %s policy failed", kind)
            raise ApiError(
                f"The {kind} policy could not be asked; no picture was made.",
                status=500,
                type=SERVER_ERROR,
                code="policy_failed",
                headers=NO_RETRY,
            ) from error
        if verdict is not None:
            raise ApiError(
                verdict,
                param="prompt" if kind == "prompt" else None,
                code="content_policy_violation",
            )
