"""What crosses the line between evaluator and attacker, as bytes.

An observation goes over as it is, without the memory around it: a tensor that is part of a larger one would take the
rest along. What comes back is read as numbers and words only, for it is written by an attacker.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import torch
from torch import Tensor

from ..attack import Reconstruction
from ..dataset import Images
from ..errors import GradleakError
from ..seeds import Generators
from ..threat import Observation

ANSWER, WRONG, ERROR, FAULT, MEMORY, SAID, PROGRESS = b"a", b"w", b"e", b"f", b"m", b"s", b"p"
"""First byte of what an attack's process says."""

Job = tuple[Observation, Generators]
Tensors = Mapping[str, Tensor]
Guesses = Mapping[str, Tensor]
"""Images [N, B, C, H, W] whose loss is wanted, by a name."""
Losses = Mapping[str, Tensor | None]
"""Losses [N] by the name of a guess; None of an attack that has none."""


class _Sent(cloudpickle.Pickler):  # type: ignore[misc]
    """Writes what an attacker is given; public images by reference."""

    def __init__(self, file: io.BytesIO, public: Callable[[Images], object]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._public = public

    def persistent_id(self, obj: object) -> object:
        return self._public(obj) if isinstance(obj, Images) else None

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and obj.layout is torch.strided and not obj.requires_grad:
            if obj.untyped_storage().nbytes() > obj.numel() * obj.element_size():
                return obj.clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return super().reducer_override(obj)


class _Received(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, public: Callable[[Any], Images]) -> None:
        super().__init__(file)
        self._public = public

    def persistent_load(self, pid: Any) -> Images:
        return self._public(pid)


def write_job(observation: Observation, streams: Generators, public: Callable[[Images], object]) -> bytes:
    """Return an attacker's observation and streams as bytes.

    Args:
        observation: without its `progress`, which stays here.
        streams: its names alone are sent.
        public: returns what public images are called, None to send them.
    """
    return _written(observation, (streams.names, streams.device, streams.dtype, streams.context), public)


def read_job(content: bytes, public: Callable[[Any], Images]) -> Job:
    """Return what `write_job` wrote; it comes from the evaluator and is trusted."""
    seen, given = _Received(io.BytesIO(content), public).load()
    return seen, Generators(*given)


def write_guesses(
    observation: Observation, guesses: Guesses, targets: Tensor, buffers: Tensors, public: Callable[[Images], object]
) -> bytes:
    """Return an attacker's observation, and images whose loss is wanted, as bytes."""
    return _written(observation, (dict(guesses), targets, dict(buffers)), public)


def read_guesses(
    content: bytes, public: Callable[[Any], Images]
) -> tuple[Observation, tuple[Guesses, Tensor, Tensors]]:
    """Return what `write_guesses` wrote; it comes from the evaluator and is trusted."""
    found: tuple[Observation, tuple[Guesses, Tensor, Tensors]] = _Received(io.BytesIO(content), public).load()
    return found


def _written(observation: Observation, given: object, public: Callable[[Images], object]) -> bytes:
    file = io.BytesIO()
    seen = replace(observation, compute=replace(observation.compute, progress=None))
    _Sent(file, public).dump((seen, given))
    return file.getvalue()


def write_losses(losses: Losses) -> bytes:
    """Return losses by name as bytes."""
    file = io.BytesIO()
    torch.save(dict(losses), file)
    return file.getvalue()


def read_losses(content: bytes, names: Iterable[str], victims: int) -> Losses:
    """Return an attacker's losses [N] by name; nothing in them is executed.

    Raises:
        GradleakError: they are none.
    """
    try:
        found = torch.load(io.BytesIO(content), weights_only=True)
        losses = {name: found[name] for name in names}
        if not all(each is None or (isinstance(each, Tensor) and each.shape == (victims,)) for each in losses.values()):
            raise TypeError("no losses of victims")
    except Exception as error:
        raise GradleakError(f"the attack's losses cannot be read ({type(error).__name__})") from error
    return losses


def write_answer(answer: Reconstruction, width: int | None) -> bytes:
    """Return an answer as bytes, and the width that memory held if it is not the one that was asked for."""
    plain = {item.name: getattr(answer, item.name) for item in fields(answer)}
    plain["status"] = [str(state) for state in answer.status]
    file = io.BytesIO()
    torch.save({"answer": plain, "width": width}, file)
    return file.getvalue()


def read_answer(content: bytes) -> tuple[Reconstruction, int | None]:
    """Return what an attacker answers; nothing in it is executed.

    Raises:
        GradleakError: it is no answer.
    """
    try:
        found = torch.load(io.BytesIO(content), weights_only=True)
        answer = Reconstruction(**found["answer"])
        width = found["width"]
        if not (width is None or type(width) is int) or not all(type(state) is str for state in answer.status):
            raise TypeError("no width, or no status")
        if not all(isinstance(part, dict) for part in (answer.guessed, answer.details)):
            raise TypeError("details are no dict")
    except Exception as error:
        raise GradleakError(f"the attack's answer cannot be read ({type(error).__name__})") from error
    return answer, width
