"""Several trainings on one model, each a Trainer in a thread of its own, with one forward for all.

Only one of them runs at a time. When all of them want the loss of a batch, `SharedForward` works
out all losses at once. What a training finds in its process (random numbers, accelerate's notes on
its step) is exchanged whenever another one runs, so that each is the training that it would be
alone; its data, optimiser, schedule, evaluation and checkpoints are its own, and it may come and go
as it likes.

What is large is computed in one thread for all: on a CPU each thread that computes in parallel
keeps helpers of its own, and where all of them are more than the cores, OpenMP lets them sleep
between any two operations.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy
import torch
from accelerate.state import GradientState
from transformers import PreTrainedModel

from loram_ray.finetuning.frozen import FrozenModel
from loram_ray.finetuning.packing import Inputs
from loram_ray.finetuning.shared_forward import Adapted, Loss, Member, RngState, SharedForward

T = TypeVar("T")


@dataclass
class _Process:
    """What a training finds in its process and that is not to be another's."""

    python: Any
    numbers: Any
    rng_state: RngState
    step: dict[str, Any]

    @classmethod
    def taken(cls) -> _Process:
        step = dict(GradientState._shared_state)
        return cls(random.getstate(), numpy.random.get_state(), RngState(), step)

    def put(self) -> None:
        random.setstate(self.python)
        numpy.random.set_state(self.numbers)
        self.rng_state.put()
        GradientState._shared_state.clear()
        GradientState._shared_state.update(self.step)


class Slot:
    """A training's place among the others, for its own thread."""

    def __init__(self, lockstep: Lockstep) -> None:
        self._lockstep = lockstep
        self._adapted: Adapted | None = None
        self.asked: Member | None = None
        self.answer: Loss | Exception | None = None

    def summed_loss(self, model: PreTrainedModel, inputs: Inputs) -> Loss:
        """As `losses.summed_loss`, with its gradients; others train until all have asked.

        Args:
            model: this training's shell of the frozen model, with its adapter.
            inputs: of `summed_loss`.

        Returns:
            The sum, whose backward pass only hands out what there is, and the number of labels.
        """
        if self._adapted is None or self._adapted.model is not model:
            self._adapted = Adapted.of(model)
        return self._lockstep.answer(self, self._adapted, inputs)

    def compute(self, work: Callable[[], T]) -> T:
        """Do what only this training computes."""
        return self._lockstep.compute(work)


class Lockstep:
    """The trainings on one model.

    Args:
        load: loads the model.
        forward: computes the losses of several trainings on it.

    Attributes:
        frozen: the model.
    """

    def __init__(
        self,
        load: Callable[[], FrozenModel],
        forward: Callable[[FrozenModel], SharedForward] = SharedForward,
    ) -> None:
        self._engine = ThreadPoolExecutor(1, "together")
        self.frozen = self._engine.submit(load).result()
        self._forward = forward(self.frozen)
        self._slots: list[Slot] = []
        self._running: Slot | None = None
        self._changed = threading.Condition()

    @contextmanager
    def slot(self) -> Iterator[Slot]:
        """Run inside the block, in turn with the others."""
        slot = Slot(self)
        with self._changed:
            self._slots.append(slot)  # before its turn: the others wait for it
            self._begin(slot)
            GradientState._shared_state.clear()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of this thread, which computes little
        try:
            yield slot
        finally:
            torch.set_num_threads(threads)
            with self._changed:
                self._slots.remove(slot)
                self._end()

    def compute(self, work: Callable[[], T]) -> T:
        """Do what one that has its turn computes, where there are threads for it."""
        return self._engine.submit(work).result()

    def answer(self, slot: Slot, adapted: Adapted, inputs: Inputs) -> Loss:
        """Let the others run until all have asked and one has worked out all losses."""
        with self._changed:
            process = _Process.taken()
            member = slot.asked = Member(adapted, inputs, process.rng_state)
            self._end()
            while slot.answer is None:
                if self._running is None and all(other.asked for other in self._slots):
                    self._work_out()
                else:
                    self._changed.wait()
            self._begin(slot)
            process.rng_state = member.rng_state
            process.put()
            found, slot.answer = slot.answer, None
        if isinstance(found, Exception):
            raise found
        return found

    def _begin(self, slot: Slot) -> None:
        while self._running is not None:
            self._changed.wait()
        self._running = slot

    def _end(self) -> None:
        self._running = None
        self._changed.notify_all()

    def _work_out(self) -> None:
        members = [slot.asked for slot in self._slots if slot.asked is not None]
        losses = self.compute(lambda: self._forward.losses(members))
        for slot, found in zip(self._slots, losses, strict=True):
            slot.asked, slot.answer = None, found
        self._changed.notify_all()
