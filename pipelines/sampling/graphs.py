"""One CUDA graph for all steps of a decoding: the host launches once a token, not once a kernel.

Not measured. The step that is recorded runs on CPUs as well, and is tested there.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]  # tokens (B,), position (1,) -> logits (B, K)
WARM_UPS = 2  # libraries choose kernels and take workspace on their first calls


class GraphedStep:
    """A step, recorded once and replayed with other tokens and positions in the same memory."""

    def __init__(self, step: Step, tokens: Tensor, position: int) -> None:
        """Record at the position that comes next.

        Warming up there does no harm: it writes to the caches what the first replay writes again.
        """
        self._tokens = tokens.clone()
        self._position = torch.full((1,), position, dtype=torch.int64, device=tokens.device)
        here, aside = torch.cuda.current_stream(tokens.device), torch.cuda.Stream(tokens.device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                step(self._tokens, self._position)
        here.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads of a server may use the device meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits = step(self._tokens, self._position)

    def __call__(self, tokens: Tensor, position: int) -> Tensor:
        """The step's logits, in memory that the next call overwrites."""
        self._tokens.copy_(tokens)
        self._position.fill_(position)
        self._graph.replay()
        return self._logits
