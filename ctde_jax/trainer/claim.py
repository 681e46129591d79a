"""The folder of a run, claimed for as long as the run takes, and the checkpoint from which the run continues."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from ctde_jax.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    Options,
    Position,
    claimed,
    find,
    found_by_the_first,
)
from ctde_jax.devices import hosts
from ctde_jax.trainer.training import Saving, Training


class Found(NamedTuple):
    """Where a run continues."""

    checkpoint: Checkpoint | None
    """None if the run starts from its beginning."""

    is_branch: bool
    """Whether the checkpoint is that of another run."""

    decided: Options
    """What determines the numbers of the run, by name."""

    @property
    def position(self) -> Position:
        """How far the run is."""
        if self.checkpoint is None:
            return Position()
        return Position(**self.checkpoint.facts["position"])

    @property
    def is_new(self) -> bool:
        """Whether the run has no checkpoint yet."""
        return self.checkpoint is None or self.is_branch


@contextmanager
def claim(training: Training, saving: Saving, say: Callable[[str], None]) -> Iterator[Found]:
    """Claims the folder of a run, and finds the checkpoint of this run, or the one to branch from.

    All hosts compare what they are about to train; only host 0 opens the folder.

    Args:
        training: What determines the numbers.
        saving: Where the files are.
        say: Prints a line.

    Raises:
        InputError: The hosts differ, or the folder is in use, cannot be written to, or holds another run.
    """
    saving.check(training)
    folder = saving.folder
    decided, identity = training.deciding(saving), training.identity
    files = {
        "save_every": saving.save_every,
        "keep_best": saving.keep_best,
        "run_dir": None if saving.run_dir is None else str(saving.run_dir),
        "log_every": training.log_every,
    }
    hosts.compare(lambda: {**decided, **files, **hosts.platform()}, identity.digests)
    if folder is None:
        yield Found(None, False, decided)
        return

    with ExitStack() as at_end:

        def find_here() -> Checkpoint | None:
            at_end.enter_context(claimed(folder))
            return find(folder, saving.resume, saving.trunk, decided, identity, say)

        found = found_by_the_first(find_here)
        is_own = saving.resume and found is not None and found.path.parent == folder / CHECKPOINTS
        yield Found(found, found is not None and not is_own, decided)
