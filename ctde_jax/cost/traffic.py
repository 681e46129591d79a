"""Communication of a round: the bytes of the compiled program's collectives.

The Python program does not determine the bytes: the compiler widens small dtypes, merges messages
and moves them out of loops. Bytes are therefore counted in the optimized HLO, which contains the
payload and the groups of every collective and the trip counts of its loops. `benchmarks/sockets.py`
compares the count with the bytes sent through sockets.

The count covers training rounds, including averages of batch statistics. It excludes evaluation and
the sums of metrics, a few numbers per step that are sent separately, once for many rounds.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.filesize import decimal
from rich.table import Table

from ctde_jax.cost.collectives import Collective, read


@dataclass(frozen=True)
class Traffic:
    """The collectives of one round, and the bytes that they send.

    Examples:
        >>> model, data = ctde.models.mlp([64, 10]), ctde.data.digits()
        >>> devices = ctde.devices.start(cpu_devices=2)
        >>> trained = ctde.fit(model, data, optax.sgd(0.1), devices=devices, steps=1, show=False)
        >>> trained.traffic.sent  # 2 (R - 1) / R * 4 (n + 1), for R = 2 and n = 650
        2604.0
    """

    collectives: tuple[Collective, ...]
    round_steps: int

    @property
    def launches(self) -> int:
        """Number of launches of collectives per round, for each device."""
        return sum(one.times for one in self.collectives)

    @property
    def sent(self) -> float:
        """Bytes that each device sends per round; the maximum, if devices differ."""
        return sum(one.sent * one.times for one in self.collectives)

    @property
    def sent_per_step(self) -> float:
        """Bytes that each device sends per optimizer step, on average."""
        return self.sent / self.round_steps

    @property
    def peak(self) -> float:
        """Bytes that each device sends for the last step of a round, the maximum of all steps."""
        # The messages of the last local step, and all outside of the loop of local steps.
        during = sum(one.sent * one.times for one in in_local_steps(self))
        return self.sent - during + during / self.round_steps

    @property
    def total(self) -> float:
        """Bytes that all devices together send per round."""
        return sum(one.total * one.times for one in self.collectives)

    @property
    def across(self) -> float:
        """Part of `total` that is sent to another host."""
        return sum(one.across * one.times for one in self.collectives)

    @property
    def within(self) -> float:
        """Part of `total` that stays within a host."""
        return self.total - self.across

    @property
    def certain(self) -> bool:
        """Whether the counts are exact, and not upper bounds."""
        return all(one.certain for one in self.collectives)


def measure(hlo_text: str, inner_steps: int, hosts: Sequence[int] | None = None) -> Traffic:
    """Counts the bytes that one round of a compiled program sends.

    Args:
        hlo_text: Text of the optimized HLO, `compiled.as_text()`, of rounds made by
            `round.make_rounds`.
        inner_steps: Number of local steps of the strategy, 0 for synchronous training.
        hosts: Process of each device (default: all devices are on one host).

    Raises:
        InputError: The bytes cannot be determined; see `collectives.read`.

    Examples:
        >>> devices = ctde.devices.start(cpu_devices=2)
        >>> add_up = jax.pmap(lambda x: jax.lax.psum(x, "i"), "i", devices=devices)
        >>> hlo_text = add_up.lower(np.ones((2, 5), np.float32)).compile().as_text()
        >>> ctde.cost.measure(hlo_text, inner_steps=0).sent
        20.0
    """
    return Traffic(tuple(read(hlo_text, hosts)), max(1, inner_steps))


def in_local_steps(traffic: Traffic) -> list[Collective]:
    """Lists the collectives in the loop of local steps, in which devices should not communicate.

    This is the loop within a round whose trip count is the number of steps, at least 2. An
    iterative aggregation rule has a separate loop.
    """
    # `loops` starts with the loop over rounds.
    return [one for one in traffic.collectives if one.loops[1:2] == (traffic.round_steps,)]


def synchronous_bytes(params: int, replicas: int) -> float:
    """Returns the bytes that a device sends to average `params` float32 gradients in one step.

    Savings are relative to this: a ring all-reduce over `replicas` devices.
    """
    return 2 * (replicas - 1) / replicas * 4 * params


def table(traffic: Traffic, params: int, replicas: int) -> Table:
    """Returns a table of the bytes sent, with one row for each distinct collective, and totals.

    Args:
        traffic: Collectives of a round.
        params: Number of parameters.
        replicas: Number of replicas.

    Examples:
        >>> model, data = ctde.models.mlp([64, 10]), ctde.data.digits()
        >>> devices = ctde.devices.start(cpu_devices=2)
        >>> trained = ctde.fit(model, data, optax.sgd(0.1), devices=devices, steps=1, show=False)
        >>> table = ctde.cost.table(trained.traffic, params=650, replicas=2)
        >>> table.row_count
        4
    """
    # Columns: text on the left, numbers on the right.
    caption = sentence(traffic, params, replicas)
    shown = Table(title="bytes sent by each device", caption=caption, caption_justify="left")
    for column in ("collective", "dtype"):
        shown.add_column(column)
    for column in ("payload", "devices", "calls", "bytes sent", "across hosts"):
        shown.add_column(column, justify="right")

    # Collectives that are equal in all respects share a row.
    for one, copies in Counter(traffic.collectives).items():
        times = copies * one.times
        shown.add_row(
            one.op,
            " ".join(one.dtypes),
            f"{one.payload:,}",
            f"{one.group_size}",
            f"{times:,}",
            f"{'' if one.certain else 'at most '}{one.sent * times:,.0f}",
            f"{one.across / one.total:.0%}",
        )

    # Totals per round, and per optimizer step.
    shown.add_section()
    across = f"{traffic.across / traffic.total:.0%}" if traffic.total else ""
    shown.add_row("per round", "", "", "", f"{traffic.launches:,}", f"{traffic.sent:,.0f}", across)
    shown.add_row("mean step", "", "", "", "", f"{traffic.sent_per_step:,.0f}")
    shown.add_row("peak step", "", "", "", "", f"{traffic.peak:,.0f}")
    return shown


def sentence(traffic: Traffic, params: int, replicas: int) -> str:
    """Returns a sentence on the bytes that each device sends, relative to float32 gradients.

    Args:
        traffic: Collectives of a round.
        params: Number of parameters.
        replicas: Number of replicas.

    Examples:
        >>> model, data = ctde.models.mlp([64, 10]), ctde.data.digits()
        >>> devices = ctde.devices.start(cpu_devices=2)
        >>> trained = ctde.fit(model, data, optax.sgd(0.1), devices=devices, steps=1, show=False)
        >>> ctde.cost.sentence(trained.traffic, params=650, replicas=2)
        'each device sends 2.6 kB per step in 1 collective'
    """
    if not traffic.sent:
        return "no communication between devices"
    period = f"every {traffic.round_steps} steps" if traffic.round_steps > 1 else "per step"
    collectives = f"{traffic.launches:,} collective{'s' if traffic.launches > 1 else ''}"
    bound = "" if traffic.certain else "at most "
    total = f"each device sends {bound}{decimal(round(traffic.sent))} {period} in {collectives}"

    return total + _compared(traffic.sent_per_step, params, replicas)


def sentence_of_run(sent: float, steps: int, params: int, replicas: int) -> str:
    """Returns a sentence on the bytes that each device sends in a run of several phases.

    Args:
        sent: Bytes that each device sends in the run.
        steps: Number of steps of the run.
        params: Number of parameters.
        replicas: Number of replicas.

    Examples:
        >>> ctde.cost.sentence_of_run(sent=26000.0, steps=1000, params=650, replicas=2)
        'each device sends 26.0 kB in 1,000 steps, 100 times fewer bytes than averaging float32 \
gradients at every step'
    """
    if not sent:
        return "no communication between devices"
    total = f"each device sends {decimal(round(sent))} in {steps:,} steps"
    return total + _compared(sent / steps, params, replicas)


def _compared(sent_per_step: float, params: int, replicas: int) -> str:
    """Compares bytes per step with those of float32 gradients; empty below 5 % of difference."""
    saving = synchronous_bytes(params, replicas) / sent_per_step
    if abs(saving - 1) < 0.05:
        return ""
    ratio = (
        f"{saving:,.3g} times fewer bytes than"
        if saving > 1
        else f"{1 / saving:,.3g} times the bytes of"
    )
    return f", {ratio} averaging float32 gradients at every step"
