"""The claim on the folder of a run, and the checkpoint from which the run continues."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from ctde_jax.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    Mirror,
    Options,
    Position,
    claimed,
    find,
    found_by_the_first,
    open_mirror,
)
from ctde_jax.devices import hosts
from ctde_jax.trainer.training import Saving, Training


class Found(NamedTuple):
    """The checkpoint from which a run continues, and the options that determine its result."""

    checkpoint: Checkpoint | None
    """None if the run starts from its beginning."""

    is_branch: bool
    """Whether the checkpoint belongs to another run."""

    decided: Options
    """Values of the options, by name; a run continues only if its checkpoint has the same."""

    mirror: Mirror | None = None
    """The mirror of the folder; None without one, and on all hosts but host 0."""

    @property
    def position(self) -> Position:
        """The progress of the run: steps, bytes sent and skipped rounds."""
        if self.checkpoint is None:
            return Position()
        return Position(**self.checkpoint.facts["position"])

    @property
    def is_new(self) -> bool:
        """Whether the run has no checkpoint yet."""
        return self.checkpoint is None or self.is_branch


@contextmanager
def claim(training: Training, saving: Saving, say: Callable[[str], None]) -> Iterator[Found]:
    """Locks the folder of a run within the body, and yields the checkpoint to continue from.

    That is the newest intact checkpoint of this run, or else the one to branch from. All hosts
    compare their options, data and programs; only host 0 reads and writes the folder and its
    mirror.

    Args:
        training: Model, data and all options that determine the result of the run.
        saving: Options of the files of the run.
        say: Prints a line.

    Raises:
        InputError: `training` and `saving` conflict, the hosts differ, the folder is in use, cannot
            be written to or holds another run, as may the mirror, or a checkpoint is damaged.
        HostLost: Another host failed.
    """
    # Compare the hosts first: if they differ, a later collective could hang.
    saving.check(training)
    folder = saving.folder
    decided = training.deciding(saving)
    identity = training.identity
    # These do not determine the result, but hosts must agree on when and where to save.
    files = {
        "save_every": saving.save_every,
        "keep_best": saving.keep_best,
        "run_dir": None if saving.run_dir is None else str(saving.run_dir),
        "mirror": saving.mirror,
        "log_every": training.log_every,
    }
    hosts.compare(lambda: {**decided, **files, **hosts.platform()}, identity.digests)
    if folder is None:
        yield Found(None, False, decided)
        return

    # Host 0 claims the folder and reads the checkpoint; the other hosts receive its arrays.
    with ExitStack() as at_end:
        mirrors: list[Mirror] = []  # empty on other hosts, and without a mirror

        def find_here() -> Checkpoint | None:
            if saving.mirror is not None:
                mirrors.append(open_mirror(saving.mirror, folder, saving.choose(training)))
            at_end.enter_context(claimed(folder))
            mirror = mirrors[0] if mirrors else None
            return find(folder, saving.resume, saving.parent, decided, identity, say, mirror)

        found = found_by_the_first(find_here)

        # Any checkpoint outside this folder, or found although `resume` is False, is a branch.
        is_own = saving.resume and found is not None and found.path.parent == folder / CHECKPOINTS
        mirror = mirrors[0] if mirrors else None
        yield Found(found, found is not None and not is_own, decided, mirror)
