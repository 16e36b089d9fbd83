"""The processes that train one model together, each on a part of every batch, and what they tell one another."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from shared.errors import RankLost, Unavailable, shown

logger = logging.getLogger(__name__)

Tree = dict[str, Any]

# How long a rank waits for the others. MLX's own limit for NCCL is as long.
JOIN_S = 300


class Ranks:
    """This process is rank `rank` of `count`, which all do the same collectives in the same order.

    One that is alone does none. If a peer is lost, MLX raises its own error where it evaluates an array, or waits for
    ever; `guard` translates the error, and a watchdog has to end the wait.
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank = rank
        self.count = count
        self._lost = False

    @classmethod
    def alone(cls) -> "Ranks":
        """Returns the one rank of a run in a single process."""
        return cls(0, 1)

    @classmethod
    def join(cls, limit_s: int = JOIN_S) -> "Ranks":
        """Joins the group that the environment describes, in variables that MLX or MPI reads, and waits until all ranks
        have come. Raises `Unavailable` if the group cannot form.

        After `limit_s` the system ends the process with SIGALRM: MLX waits without leaving the interpreter to any other
        thread, so that nothing in Python could end the wait.
        """
        logger.info("waiting at most %d s for the other ranks", limit_s)
        signal.alarm(limit_s)
        try:
            group = mx.distributed.init(strict=True)
        except (RuntimeError, ValueError) as error:
            raise Unavailable(f"The ranks cannot form a group: {shown(error, 300)}. {_variables()}") from error
        finally:
            signal.alarm(0)
        return cls(group.rank(), group.size())

    def rows(self, batch_size: int) -> tuple[int, int]:
        """Returns the first row of a batch that this rank takes, and the one after its last."""
        first, end = (batch_size * edge // self.count for edge in (self.rank, self.rank + 1))
        return first, end

    def sum(self, loss: mx.array, gradients: Tree, flag: mx.array) -> tuple[mx.array, Tree, mx.array]:
        """Returns the sums over all ranks of two scalars and of a tree of gradients, in fp32, the same bits in all.

        They travel in one buffer, because a small collective costs as much as a large one (80 µs on a GPU), and because
        MLX gives the collectives of one evaluation an order of its own, which may differ between ranks.
        """
        if self.count == 1:
            return loss, gradients, flag
        # A restored tree may have another order.
        names, arrays = zip(*sorted(tree_flatten(gradients), key=itemgetter(0)), strict=True)
        scalars = mx.stack([loss, flag]).astype(mx.float32)
        joined = mx.concatenate([*(array.reshape(-1).astype(mx.float32) for array in arrays), scalars])
        edges = np.cumsum([array.size for array in arrays]).tolist()
        *summed, scalars = mx.split(mx.distributed.all_sum(joined), edges)
        # Copies: a view would keep the whole buffer, and move it to the host when it is read.
        loss, flag = scalars[0] * 1, scalars[1] * 1
        shaped = [part.reshape(array.shape) for part, array in zip(summed, arrays, strict=True)]
        return loss, tree_unflatten(list(zip(names, shaped, strict=True))), flag

    def share(self, text: str = "", source: int = 0) -> str:
        """Returns the text of one rank in all ranks; raises `RankLost`."""
        if self.count == 1:
            return text
        sent = np.frombuffer(text.encode() if self.rank == source else b"", np.uint8)
        with self.guard():
            # MLX's ring adds only arrays with a number for each rank.
            (size,) = set(read(mx.distributed.all_sum(mx.full(self.count, sent.size, mx.int32))).tolist())
            padded = np.zeros(max(size, self.count), np.uint8)
            padded[: sent.size] = sent
            received = read(mx.distributed.all_sum(mx.array(padded)))
        return received[:size].tobytes().decode()

    def share_array(self, array: mx.array) -> mx.array:
        """Returns the numbers of the first rank in all ranks, evaluated; each gives an array of the same shape and
        type. Raises `RankLost`."""
        if self.count == 1:
            return array
        flat = (array if self.rank == 0 else mx.zeros_like(array)).reshape(-1)
        padded = mx.concatenate([flat, mx.zeros(max(self.count - flat.size, 0), flat.dtype)])
        with self.guard():
            shared = mx.distributed.all_sum(padded)[: flat.size].reshape(array.shape)
            mx.eval(shared)
        return shared

    def agree(self, numbers: mx.array) -> bool:
        """Whether all ranks give the same numbers (N,), bit for bit; raises `RankLost`."""
        if self.count == 1:
            return True
        padded = mx.concatenate([numbers, mx.zeros(max(self.count - numbers.size, 0), numbers.dtype)])
        with self.guard():
            least = read(mx.distributed.all_min(padded))
            most = read(mx.distributed.all_max(padded))
        return np.array_equal(least, most, equal_nan=True)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Raises `RankLost` for the error that MLX raises if the connection to another rank is lost, and from then on
        at once, because MLX would wait for ever in the next collective."""
        lost = RankLost(f"Rank {self.rank} of {self.count} has lost the connection to another rank.")
        if self._lost:
            raise lost
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or "[ring]" not in str(error):
                raise
            self._lost = True
            raise lost from error


def read(array: mx.array) -> np.ndarray:
    """Evaluates an array and returns its numbers. NumPy alone would hide the error of a lost peer, and evaluate again,
    for which MLX waits for ever."""
    mx.eval(array)
    return np.array(array)


def _variables() -> str:
    names = ("MLX_RANK", "MLX_WORLD_SIZE", "MLX_HOSTFILE", "NCCL_HOST_IP", "NCCL_PORT")
    found = ", ".join(f"{name}={shown(os.environ[name])}" for name in names if name in os.environ)
    return f"The environment has {found or 'none of the variables that MLX reads'}."
