"""Several trainings on one model: one Trainer per thread, one shared forward pass.

Only one training runs at a time. When all of them have asked for the loss of a batch,
`SharedForward` computes all losses at once. Process-wide state (random number generators,
accelerate's gradient state) is swapped whenever another training runs, so each training gives the
result that it would give alone. Data, optimiser, schedule, evaluation and checkpoints are separate,
and trainings may join and leave at any time.

Large computations run in one thread on behalf of all trainings. On a CPU, each thread that computes
in parallel keeps its own pool of OpenMP threads; if the pools together exceed the number of cores,
OpenMP puts its threads to sleep between operations.
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
    """Process-wide state that belongs to one training."""

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
    """One training's place in the lockstep, used by its own thread."""

    def __init__(self, lockstep: Lockstep) -> None:
        self._lockstep = lockstep
        self._adapted: Adapted | None = None
        self.asked: Member | None = None
        self.answer: Loss | Exception | None = None

    def summed_loss(self, model: PreTrainedModel, inputs: Inputs) -> Loss:
        """Return `losses.summed_loss`, with gradients; blocks until all trainings have asked.

        Args:
            model: This training's shell of the frozen model, with its adapter.
            inputs: Inputs of `losses.summed_loss`.

        Returns:
            The summed loss and the number of labels. The loss's backward pass returns gradients
            that are already computed.
        """
        if self._adapted is None or self._adapted.model is not model:
            self._adapted = Adapted.of(model)
        return self._lockstep.answer(self, self._adapted, inputs)

    def compute(self, work: Callable[[], T]) -> T:
        """Run a computation of this training alone in the shared compute thread."""
        return self._lockstep.compute(work)


class Lockstep:
    """The trainings on one model.

    Args:
        load: Loads the model.
        forward: Class that computes the losses of several trainings on the model.

    Attributes:
        frozen: The loaded model.
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
        """Return a context in which a training runs, in turn with the others."""
        slot = Slot(self)
        with self._changed:
            self._slots.append(slot)  # added before its turn, so that the others wait for it
            self._begin(slot)
            GradientState._shared_state.clear()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # this thread does little work
        try:
            yield slot
        finally:
            torch.set_num_threads(threads)
            with self._changed:
                self._slots.remove(slot)
                self._end()

    def compute(self, work: Callable[[], T]) -> T:
        """Run a computation in the shared compute thread, during the caller's turn."""
        return self._engine.submit(work).result()

    def answer(self, slot: Slot, adapted: Adapted, inputs: Inputs) -> Loss:
        """Let the other trainings run until all have asked and all losses are computed."""
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
