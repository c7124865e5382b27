"""Several processes: how many there are, which one this is, sums over all of them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def is_initialized() -> bool:
    """Whether `torch.distributed` is, so that other processes may hold a part of the weights: a block then has to be
    called on all of them or none."""
    return dist.is_available() and dist.is_initialized()


def rank_and_world_size() -> tuple[int, int]:
    """The number of this process and how many there are; 0 and 1 if it is alone."""
    return (dist.get_rank(), dist.get_world_size()) if is_initialized() else (0, 1)


def num_launched() -> int:
    """How many processes `torchrun` started; 1 if it did not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sum_over_ranks(tensor: Tensor) -> None:
    """Adds up, in place, what each process has; each then has the sum."""
    if is_initialized():
        dist.all_reduce(tensor)


@contextmanager
def first_goes_first() -> Iterator[None]:
    """The first process goes ahead; where it fails, the others do nothing and raise a ValueError that says the same."""
    failure: list[str | None] = [None]
    rank, world_size = rank_and_world_size()
    if rank > 0:
        dist.broadcast_object_list(failure)
        if failure[0] is not None:
            raise ValueError(failure[0])
    try:
        yield
    except BaseException as error:  # an interrupt too: else the others would go on alone
        failure = [str(error) or type(error).__name__]
        raise
    finally:
        if rank == 0 and world_size > 1:
            dist.broadcast_object_list(failure)


@contextmanager
def joined_ranks() -> Iterator[int]:
    """Joins the other processes that `torchrun` started, if it started this one, and takes a GPU of its own; gives the
    number of this process, 0 if it is alone."""
    if num_launched() == 1 or dist.is_initialized():
        yield rank_and_world_size()[0]
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()
