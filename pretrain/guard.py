"""What is watched while a run trains, and when it is no longer well: numbers in, decisions out.

Nothing here communicates, logs or keeps time. Steps are counted as the caller counts them. What decides over
the training has a `state`, a list of floats, which a checkpoint keeps so that a resumed run decides as an
uninterrupted one.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from pretrain.errors import CheckpointError
from pretrain.optim import NotNegative, Positive
from pretrain.randomness import bits

Count = Annotated[int, Field(gt=0)]
Verdict = Literal["go on", "rollback", "stop"]

MAD_TO_STD = 1.4826  # standard deviation of a normal distribution, in median absolute deviations
SMALLEST_SPREAD_RATIO = 0.01  # of the median loss: a loss that hardly moves spreads at least so much
SMALLEST_SPREAD = 1e-6  # the same of a loss whose median is 0

PIECE_WORDS = 1 << 18  # of a tensor, that a checksum takes at a time
WORD_STREAM, PIECE_STREAM = 1 << 24, (1 << 24) + 1  # of the generator: factors of words and of pieces


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LossSpikeConfig(_Settings):
    """When a loss is a spike: so many scaled MADs above the median of the last `window` that were none."""

    window: Count = 64
    min_steps: Count = 32  # seen before the first is judged
    threshold: Positive = 12.0
    action: Literal["log", "rollback", "stop"] = "log"

    @model_validator(mode="after")
    def _a_window_holds_enough(self) -> LossSpikeConfig:
        if self.min_steps > self.window:
            raise ValueError(
                f"min_steps: {self.min_steps} losses never fit in a window of {self.window}; lower it to "
                f"{self.window}, or raise window"
            )
        return self


class CollapseConfig(_Settings):
    """When embeddings have collapsed: a standard deviation below `min_feature_std` for so many steps."""

    min_feature_std: NotNegative = 0.02
    patience_steps: Count = 100
    action: Literal["log", "stop"] = "log"


class StragglerConfig(_Settings):
    """When a rank is a straggler: as fast as `below` times the others, for `window` steps."""

    below: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.6
    window: Count = 20


class GuardConfig(_Settings):
    """What ends a run, sends it back to a checkpoint, or is only told."""

    max_nonfinite_steps: Count = 10  # in a row; then the run goes back to the last good checkpoint
    max_rollbacks: Annotated[int, Field(ge=0)] = 2  # then it stops
    loss_spike: LossSpikeConfig = LossSpikeConfig()
    collapse: CollapseConfig = CollapseConfig()
    straggler: StragglerConfig = StragglerConfig()
    checksum_every_steps: Count | None = 500  # compare the weights of all ranks; none: never
    max_idle_attempts: Annotated[int, Field(ge=0)] = 3  # starts in a row without progress; 0: no limit


def rollback_or_stop(num_rollbacks: int, max_rollbacks: int) -> Verdict:
    """What follows when going back is asked for and has been done `num_rollbacks` times."""
    return "rollback" if num_rollbacks < max_rollbacks else "stop"


class LossSpikes:
    """Tells a loss that is far above the recent ones.

    "Far" is measured by median and MAD, which a few outliers do not move, and spikes do not enter them. A new
    level that lasts is taken for normal once `window` more losses were flagged than were not.
    """

    def __init__(self, config: LossSpikeConfig) -> None:
        self.config = config
        self._normal: list[float] = []  # the last `window` losses that were not flagged
        self._flagged: list[float] = []

    def saw(self, loss: float) -> float | None:
        """The score of this step's loss, in scaled MADs above the median, if it is a spike.

        A loss that is not finite says nothing about the level; it is left to NonfiniteRun.
        """
        if not math.isfinite(loss):
            return None
        score = self._score(loss)
        if len(self._normal) < self.config.min_steps or score <= self.config.threshold:
            self._normal = [*self._normal, loss][-self.config.window :]
            del self._flagged[:1]
            return None
        self._flagged.append(loss)
        if len(self._flagged) >= self.config.window:
            self._normal, self._flagged = self._flagged, []
        return score

    def _score(self, loss: float) -> float:
        if not self._normal:
            return 0.0
        median = statistics.median(self._normal)
        spread = MAD_TO_STD * statistics.median(abs(value - median) for value in self._normal)
        return (loss - median) / max(spread, SMALLEST_SPREAD_RATIO * abs(median), SMALLEST_SPREAD)

    def state(self) -> list[float]:
        """How many losses are normal, those, and the flagged ones."""
        return [float(len(self._normal)), *self._normal, *self._flagged]

    def load(self, state: Sequence[float]) -> None:
        """Continue from a state, which may be that of a longer window."""
        num_normal = int(_checked(state, "loss spikes")[0])
        if not 0 <= num_normal < len(state):
            raise _malformed("loss spikes")
        window = self.config.window
        self._normal = [float(value) for value in state[1 : 1 + num_normal]][-window:]
        flagged = [float(value) for value in state[1 + num_normal :]]
        self._flagged = flagged[max(0, len(flagged) - (window - 1)) :]


class Collapse:
    """Tells when embeddings have been nearly the same for all images for a while."""

    def __init__(self, config: CollapseConfig) -> None:
        self.config = config
        self.num_steps = 0  # in a row below the limit

    def saw(self, feature_std: float) -> bool:
        """Whether this step is the one that makes it a collapse; once until embeddings have spread again.

        A number that is not finite is left to NonfiniteRun.
        """
        if math.isfinite(feature_std):
            self.num_steps = self.num_steps + 1 if feature_std < self.config.min_feature_std else 0
            return self.num_steps == self.config.patience_steps
        return False

    @property
    def has_collapsed(self) -> bool:
        return self.num_steps >= self.config.patience_steps

    def state(self) -> list[float]:
        return [float(self.num_steps)]

    def load(self, state: Sequence[float]) -> None:
        self.num_steps = int(_checked(state, "collapse", 1)[0])


class NonfiniteRun:
    """Counts steps in a row that were skipped because a loss or gradient was not finite."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.num_steps = 0
        self.first_step: int | None = None  # a good checkpoint is from before it

    def saw(self, step: int, skipped: bool, num_rollbacks: int) -> Verdict:
        """What to do after this step, in a run that has been sent back `num_rollbacks` times.

        The count of rollbacks is the caller's: it must outlive the checkpoint that a rollback returns to.
        """
        if not skipped:
            self.num_steps, self.first_step = 0, None
            return "go on"
        if self.first_step is None:
            self.first_step = step
        self.num_steps += 1
        if self.num_steps < self.config.max_nonfinite_steps:
            return "go on"
        return rollback_or_stop(num_rollbacks, self.config.max_rollbacks)

    def state(self) -> list[float]:
        return [float(self.num_steps), -1.0 if self.first_step is None else float(self.first_step)]

    def load(self, state: Sequence[float]) -> None:
        num_steps, first_step = _checked(state, "non-finite steps", 2)
        self.num_steps = int(num_steps)
        self.first_step = None if first_step < 0 else int(first_step)


def _checked(state: Sequence[float], of: str, length: int | None = None) -> Sequence[float]:
    if not state or length not in (None, len(state)) or not all(math.isfinite(value) for value in state):
        raise _malformed(of)
    return state


def _malformed(of: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint's state of the guard over {of} is malformed; use another one")


@dataclass(frozen=True)
class StragglerNews:
    """Ranks that have just become stragglers, and those that have just ceased to be."""

    slow: tuple[int, ...] = ()
    recovered: tuple[int, ...] = ()


class Stragglers:
    """Compares the ranks by their own work time, in which waiting for the others does not count.

    A rank's time is its median over the last `window` steps, so that one long step, such as that of a
    checkpoint, leaves no trace. It is slow when it has been below the limit at every one of `window` steps,
    and recovered when it has been above at every one of as many.
    """

    def __init__(self, world_size: int, config: StragglerConfig) -> None:
        self.world_size = world_size
        self.config = config
        self._seconds = torch.zeros(config.window, world_size, dtype=torch.float64)
        self._num_steps = 0
        self._is_slow = torch.zeros(world_size, dtype=torch.bool)
        self._num_other = torch.zeros(world_size, dtype=torch.int64)  # steps in a row that say the opposite

    def saw(self, seconds: Sequence[float]) -> StragglerNews:
        """Take in one step: the work time of each rank, in rank order."""
        assert len(seconds) == self.world_size
        self._seconds[self._num_steps % self.config.window] = torch.tensor(seconds, dtype=torch.float64)
        self._num_steps += 1
        if self.world_size == 1 or self._num_steps < self.config.window:
            return StragglerNews()
        opposite = (self._scores() < self.config.below) != self._is_slow
        self._num_other = torch.where(opposite, self._num_other + 1, 0)
        turned = self._num_other >= self.config.window
        self._is_slow ^= turned
        self._num_other[turned] = 0
        return StragglerNews(_places(turned & self._is_slow), _places(turned & ~self._is_slow))

    def slow(self) -> list[int]:
        """The ranks that are stragglers now."""
        return list(_places(self._is_slow))

    def scores(self) -> list[float]:
        """Of each rank, median time of the others / its own: 1 is as fast, 0.5 twice as slow."""
        if self.world_size == 1 or not self._num_steps:
            return [1.0] * self.world_size
        return [float(score) for score in self._scores().tolist()]

    def _scores(self) -> Tensor:
        """(R,) float64 for R ranks"""
        own = _median(self._seconds[: self._num_steps].sort(dim=0).values)  # (R,)
        ordered, order = own.sort()
        places = torch.empty_like(order)  # of each rank in `ordered`
        places[order] = torch.arange(self.world_size)
        # the i-th of the others is the i-th of all, or the one after it from the rank's own place on
        low, high = (self.world_size - 2) // 2, (self.world_size - 1) // 2
        others = (ordered[low + (places <= low).long()] + ordered[high + (places <= high).long()]) / 2
        return others.clamp(min=1e-9) / own.clamp(min=1e-9)


def _median(ordered: Tensor) -> Tensor:
    """(n, R), each column in rising order -> (R,)"""
    num = len(ordered)
    return (ordered[(num - 1) // 2] + ordered[num // 2]) / 2


def _places(chosen: Tensor) -> tuple[int, ...]:
    return tuple(int(place) for place in chosen.nonzero().flatten().tolist())


@torch.no_grad()
def checksum(tensors: Iterable[tuple[str, Tensor]]) -> int:
    """A number in [0, 2^63) that follows from the exact bits of named tensors, in whatever order they come.

    A sum, modulo 2^64, of each tensor's 32-bit words times odd random factors, one of the word's place in its
    piece and one of the piece. One changed bit always changes it, since a power of two times an odd number
    is not 0; any other difference goes unseen with a chance of about 2^-32 or less (where all that differs
    are highest bits, 33 bits of the factors count). Tensors are taken one at a time, and the device is waited
    for once.
    """
    sums: dict[tuple[str, int], Tensor] = {}  # int64 (), by tensor and piece
    factors: Tensor | None = None  # as many as the longest piece has needed
    for name, tensor in tensors:
        for place, piece in enumerate(torch.split(_words(tensor), PIECE_WORDS)):
            assert (name, place) not in sums, f"two tensors are named {name}"
            if factors is None or len(factors) < len(piece):
                factors = _odd_factors(len(piece), WORD_STREAM, piece.device)
            sums[name, place] = (piece * factors[: len(piece)]).sum()  # wraps around
    if factors is None:
        return 0
    in_order = torch.stack([sums[key] for key in sorted(sums)])
    total = int((in_order * _odd_factors(len(in_order), PIECE_STREAM, factors.device)).sum().item())
    return (total % (1 << 64)) >> 1


def _words(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers: int32 (n,), or int16 or uint8 where its elements are that short."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view({1: torch.uint8, 2: torch.int16}.get(flat.element_size(), torch.int32))


def _odd_factors(num: int, stream: int, device: torch.device) -> Tensor:
    """int64 (num,), the first of the same endless row whatever `num` is"""
    zero = torch.zeros((), dtype=torch.int64, device=device)  # which tells the device
    return bits(0, zero, 0, stream, num) | 1


def deviants(sums: Sequence[int]) -> list[int]:
    """The ranks whose checksum is not that of more than half of them; all, if there is no such majority."""
    common, num_common = Counter(sums).most_common(1)[0]
    has_majority = 2 * num_common > len(sums)
    return [rank for rank, value in enumerate(sums) if not has_majority or value != common]
