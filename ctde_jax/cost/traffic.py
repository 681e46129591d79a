"""What a round sends: the collectives of the compiled program, added up.

What is written is not what travels: a compiler widens small types, merges messages, moves them out of loops. So bytes
are counted in the optimized program alone, in which every collective says what each device puts in and who takes part,
and its loops say how often. `benchmarks/sockets.py` holds the count against what sockets have sent. Training rounds are
counted, with the averages of batch statistics that they take; evaluation is not, nor are the sums of metrics, a few
numbers a step, which go out apart, once for many rounds.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.filesize import decimal
from rich.table import Table

from ctde_jax.cost.collectives import Collective, read


@dataclass(frozen=True)
class Traffic:
    """What a round sends."""

    collectives: tuple[Collective, ...]
    round_steps: int

    @property
    def launches(self) -> int:
        """Collectives that a device takes part in, a round."""
        return sum(one.times for one in self.collectives)

    @property
    def sent(self) -> float:
        """Bytes that leave a device, a round."""
        return sum(one.sent * one.times for one in self.collectives)

    @property
    def sent_a_step(self) -> float:
        """Bytes that leave a device, an optimizer step on average."""
        return self.sent / self.round_steps

    @property
    def peak(self) -> float:
        """Bytes that leave a device between two optimizer steps, where they are most: at the end of a round."""
        during = sum(one.sent * one.times for one in in_local_steps(self))
        return self.sent - during + during / self.round_steps

    @property
    def total(self) -> float:
        """Bytes that leave all devices together, a round."""
        return sum(one.total * one.times for one in self.collectives)

    @property
    def across(self) -> float:
        """Those of the total that leave a host."""
        return sum(one.across * one.times for one in self.collectives)

    @property
    def within(self) -> float:
        """Those of the total that stay inside a host."""
        return self.total - self.across

    @property
    def certain(self) -> bool:
        """Whether this is what is sent, and not the most that may be sent."""
        return all(one.certain for one in self.collectives)


def measure(hlo_text: str, inner_steps: int, hosts: Sequence[int] | None = None) -> Traffic:
    """Counts what a round of a compiled program sends.

    Args:
        hlo_text: `compiled.as_text()` of rounds that `round.make_rounds` has put together.
        inner_steps: Of the strategy.
        hosts: The process of each device; by default all are on one host.
    """
    return Traffic(tuple(read(hlo_text, hosts)), max(1, inner_steps))


def in_local_steps(traffic: Traffic) -> list[Collective]:
    """Lists the collectives in the loop of a round's local steps, where each device should be alone.

    That is the loop within a round that turns as often as there are steps, at least two; a rule that asks again and
    again has another.
    """
    return [one for one in traffic.collectives if one.loops[1:2] == (traffic.round_steps,)]


def synchronous_bytes(params: int, replicas: int) -> float:
    """Returns what a device sends in each step to average as many gradients in float32: the measure of all savings."""
    return 2 * (replicas - 1) / replicas * 4 * params


def table(traffic: Traffic, params: int, replicas: int) -> Table:
    """Shows one row for each kind of collective, and what they come to."""
    caption = summary(traffic, params, replicas)
    shown = Table(title="what a device sends in a round", caption=caption, caption_justify="left")
    for column in ("collective", "type"):
        shown.add_column(column)
    for column in ("payload", "devices", "times", "bytes sent", "across hosts"):
        shown.add_column(column, justify="right")
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
    shown.add_section()
    across = f"{traffic.across / traffic.total:.0%}" if traffic.total else ""
    shown.add_row("a round", "", "", "", f"{traffic.launches:,}", f"{traffic.sent:,.0f}", across)
    shown.add_row("a step, on average", "", "", "", "", f"{traffic.sent_a_step:,.0f}")
    shown.add_row("a step, at most", "", "", "", "", f"{traffic.peak:,.0f}")
    return shown


def summary(traffic: Traffic, params: int, replicas: int) -> str:
    """Says in a line what each device sends, and how much less that is than synchronous float32 gradients."""
    if not traffic.sent:
        return "one device sends nothing"
    fewer = synchronous_bytes(params, replicas) / traffic.sent_a_step
    often = f"every {traffic.round_steps} steps" if traffic.round_steps > 1 else "at every step"
    launches = f"{traffic.launches:,} launch{'es' if traffic.launches > 1 else ''}"
    most = "" if traffic.certain else "at most "
    says = f"each device sends {most}{decimal(round(traffic.sent))} {often} in {launches}"
    if abs(fewer - 1) < 0.05:
        return says
    share = (
        f"{fewer:,.3g} times fewer bytes than"
        if fewer > 1
        else f"{1 / fewer:,.3g} times the bytes of"
    )
    return f"{says}, {share} float32 gradients at every step"
