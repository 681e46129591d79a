"""The plainest agreement: everybody gets the average."""

import jax
import optax

from ctde_jax.replica import weighted_mean


def mean() -> optax.GradientTransformationExtraArgs:
    """Averages the messages, weighted by the number of examples behind each.

    For gradients of mean losses this is the gradient of the mean over all examples, also when the last batch is short;
    for outer gradients it is federated averaging (McMahan et al., 2017).
    """

    def update(updates, state, params=None, *, weight: jax.typing.ArrayLike = 1.0, **extra_args):
        return weighted_mean(updates, weight), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
