"""A backend's calls on a GPU, recorded once and replayed: small networks wait for launches, not for arithmetic."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .comparison import difference, failure
from .memory import release
from .optimisers import Variables
from .problem import Backend, Facts, Problem, Values

log = logging.getLogger(__name__)

WORTH_RECORDING = 20
"""Fewer iterations than this are done sooner than a recording."""
_WARM = 3
"""Calls before a recording, in which libraries choose kernels and take their workspaces."""
_RECORDINGS = 8
"""At most so many are kept: each holds the memory of its temporary tensors."""
_CLOSE = 1e-2
"""What kernels that add in any order may differ by; a wrong answer is off by its own size."""

_Place = tuple[int, torch.Size, tuple[int, ...], torch.dtype]


class Recorded(Backend):
    """Another backend's calls as CUDA graphs, one for each set of tensors that it is called with.

    A graph reads the very memory that was there when it was recorded, so it is looked up by addresses and shapes;
    the loop keeps its slots in place. The same kernels run, so answers are the same but for kernels that add in any
    order. What cannot be recorded, as a loss that waits for the device, goes on without.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self._problem: Problem | None = None
        self._graphs: dict[tuple[_Place, ...], tuple[torch.cuda.CUDAGraph, Values]] = {}
        self._gave_up = False

    def refusal(self, problem: Problem, variables: Variables, facts: Facts) -> str | None:
        """Say what the other backend says."""
        return self.inner.refusal(problem, variables, facts)

    def prepare(self, problem: Problem, facts: Facts) -> Facts:
        """Return facts as the other backend likes them."""
        return self.inner.prepare(problem, facts)

    def __call__(self, problem: Problem, variables: Variables, facts: Facts) -> Values:
        """Losses and gradients of W stacked trials."""
        if self._problem is not problem:
            self._problem = problem
            self._graphs.clear()
        places = tuple(_place(tensor) for tensor in tree_leaves((variables, facts)))
        if places not in self._graphs:
            if self._gave_up or len(self._graphs) == _RECORDINGS:
                return self.inner(problem, variables, facts)
            if (recorded := self._record(problem, variables, facts)) is None:
                return self.inner(problem, variables, facts)
            self._graphs[places] = recorded
        graph, answer = self._graphs[places]
        graph.replay()
        gradients = {name: tensor.clone() for name, tensor in answer.gradients.items()}
        return Values(answer.total.clone(), answer.matching.clone(), gradients)

    def _record(
        self, problem: Problem, variables: Variables, facts: Facts
    ) -> tuple[torch.cuda.CUDAGraph, Values] | None:
        """Record one call, and keep it if it answers what the call itself answers."""
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM):
                    truth = self.inner(problem, variables, facts)
            torch.cuda.current_stream().wait_stream(stream)
            release(truth.total.device)  # a graph has memory of its own
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                answer = self.inner(problem, variables, facts)
            graph.replay()
            if difference(answer, truth) <= _CLOSE:
                return graph, answer
            reason = "it answers something else than without"
        except Exception as error:
            reason = failure(error)
        log.warning("calls cannot be recorded as CUDA graphs here, going on without (%s)", reason)
        self._gave_up = True
        return None


def _place(tensor: Tensor) -> _Place:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
