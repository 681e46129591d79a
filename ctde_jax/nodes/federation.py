"""The agreement of a server and its nodes: model, optimizer, strategy and length of the run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import optax

from ctde_jax.aggregate import Strategy, as_transformation
from ctde_jax.data import Dataset
from ctde_jax.errors import InputError, check_at_least, check_whole
from ctde_jax.models import Model, Task, as_model, tasks
from ctde_jax.trainer import Training

_OF_THE_SERVER = ("init_from", "init_only", "patience", "ema_decay")
"""Options of `Training` that only the server needs."""


@dataclass(frozen=True)
class Federation:
    """The agreement of a server and its nodes: model, optimizer, strategy and length of the run.

    Args:
        model: A model or module, as for `fit`.
        optimizer: Any optax transformation, the optimizer of a node's local steps.
        strategy: A strategy with inner steps, whose reducer can run between nodes.
        nodes: Number of nodes among which a batch is divided. The strategy is set up for it; fewer
            or more nodes may take part in a round.
        rounds: Number of rounds.
        task: As for `fit`.
        batch_size: Global batch size, of which each node has an equal part.
        seed: Random seed for initialization, data order, augmentation and dropout.
        eval_every: Steps between evaluations by the server, rounded up to whole rounds; by default
            every round.
        epoch_steps: Number of steps in which a node goes through its examples. By default, each
            node needs as many as it has examples for; if it is given, nodes with fewer examples
            pause, as replicas do in `fit`.
        options: Other fields of `Training`: `augment`, `class_weights`, `accumulation_steps`,
            `ema_decay`, `freeze`, `lora_rank`, `init_from` or `patience`.

    Raises:
        InputError: An argument is invalid.

    Examples:
        >>> strategy = ctde.Strategy(inner_steps=16)
        >>> network, adam = ctde.models.mlp([64, 10]), optax.adam(0.01)
        >>> federation = ctde.nodes.Federation(network, adam, strategy, nodes=4, rounds=20)
        >>> federation.steps
        320
    """

    model: Model | Callable[..., Any]
    optimizer: optax.GradientTransformation | optax.MultiSteps
    strategy: Strategy
    nodes: int
    rounds: int
    task: Task | tasks.Name = "auto"
    batch_size: int = 64
    seed: int = 0
    eval_every: int | None = None
    epoch_steps: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_whole(nodes=self.nodes, rounds=self.rounds, epoch_steps=self.epoch_steps)
        check_at_least(1, nodes=self.nodes, rounds=self.rounds, epoch_steps=self.epoch_steps)
        if self.options.get("class_weights") == "balanced":
            raise InputError(
                "class_weights",
                "must be a number for each class between nodes, as balanced weights would differ "
                "from node to node.",
            )
        if self.batch_size < self.nodes or self.batch_size % self.nodes:
            nearest = max(1, round(self.batch_size / self.nodes)) * self.nodes
            raise InputError(
                "batch_size",
                f"must be a multiple of the {self.nodes} nodes, got {self.batch_size}; use "
                f"{nearest}.",
            )

    @property
    def round_steps(self) -> int:
        """Number of local steps in a round."""
        return max(1, self.strategy.inner_steps)

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the whole run."""
        return self.rounds * self.round_steps

    def of_server(self, data: Dataset) -> Training:
        """Returns the training of the server, whose replicas are the nodes.

        The server does not train. Its training checks all options, and defines initialization,
        evaluation and the identity of the run.

        Args:
            data: Data set with the test split; of its training split, only shapes matter, unless
                the initialization depends on data.

        Raises:
            InputError: An option is invalid, alone or in combination with others.
        """
        # The first batch may be used for initialization, so it is as large as the data allow.
        most = len(data.train.inputs) // self.nodes * self.nodes
        cpu = jax.local_devices(backend="cpu")[0]
        batch_size = min(self.batch_size, most)
        return self._training(
            data, [cpu] * self.nodes, self.strategy, batch_size, None, self.options
        )

    def of_node(
        self, data: Dataset, devices: Sequence[jax.Device], units: tasks.Units | None = None
    ) -> Training:
        """Returns the training of a node: its local steps, on all of its devices.

        Args:
            data: Data set of the node.
            devices: Devices of the node.
            units: Units of regression targets, which are those of the server.

        Raises:
            InputError: An option is invalid, alone or in combination with others.
        """
        local = Strategy(inner_steps=self.strategy.inner_steps, inner=self.strategy.inner)
        share = self.batch_size // self.nodes
        if share % len(devices):
            raise InputError(
                "devices",
                f"must divide the {share} examples of a node's batch, got {len(devices)}.",
            )
        # A node may have fewer examples than a batch, which is then padded.
        most = len(data.train.inputs) // len(devices) * len(devices)
        # The server sends the initial parameters if they are not random, and evaluates.
        options = {
            name: value for name, value in self.options.items() if name not in _OF_THE_SERVER
        }
        return self._training(data, devices, local, min(share, most), units, options)

    def _training(
        self,
        data: Dataset,
        devices: Sequence[jax.Device],
        strategy: Strategy,
        batch_size: int,
        units: tasks.Units | None,
        options: Mapping[str, Any],
    ) -> Training:
        task = tasks.for_data(data, self.task) if isinstance(self.task, str) else self.task
        if units is not None and task.units is not None:
            task = tasks.regression_in(units)
        return Training(
            model=as_model(self.model),
            data=data,
            optimizer=as_transformation(self.optimizer),
            strategy=strategy,
            task=task,
            devices=devices,
            batch_size=batch_size,
            steps=self.steps,
            seed=self.seed,
            eval_every=self.eval_every or self.round_steps,
            **options,
        )
