"""What decides a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServeSettings:
    """What a process that serves has to know; every replica gets the same.

    Attributes:
        folder: a run folder, or a folder of `save_pretrained` with its tokenizer.
        name: what clients call the model; by default the folder as it was given.
        budget: share of the blocks to run where a request names none, in (0, 1]; None: as trained.
        max_layers: the most blocks of a token where a request names none; None: all of them.
        trust: modules that the folder may import its policy from.
        max_requests: requests that are taken at once, those that run and those that wait.
        max_batch: requests that run at once.
    """

    folder: str
    name: str | None = None
    budget: float | None = None
    max_layers: int | None = None
    trust: tuple[str, ...] = ()
    max_requests: int = 64
    max_batch: int = 8

    @property
    def model_name(self) -> str:
        return self.folder if self.name is None else self.name
