"""Tracking with MLflow: a run in an experiment, on a server or in a local database."""

from collections.abc import Mapping

from ctde_jax.trainer.trackers.base import PROJECT, Tracker, required

_LONGEST_VALUE = 6000  # characters of a parameter, a limit of MLflow


class MLflow(Tracker):
    """Writes a run to MLflow; `mlflow ui` shows it.

    Args:
        experiment: Name of the experiment.
        name: Name of the run; by default MLflow chooses one.
        uri: Address of the tracking server or database; by default that of `MLFLOW_TRACKING_URI`,
            or else `sqlite:///mlflow.db` in the working folder.

    Raises:
        InputError: mlflow is not installed.
    """

    def __init__(self, experiment: str = PROJECT, name: str | None = None, uri: str | None = None):
        self._mlflow = required("mlflow", "mlflow")
        self._experiment = experiment
        self._name = name
        is_set = self._mlflow.is_tracking_uri_set()
        self._client = self._mlflow.MlflowClient(uri or (None if is_set else "sqlite:///mlflow.db"))
        self._run: str | None = None

    def start(self, options: Mapping[str, str]) -> None:
        """Creates a run with the options as parameters, and the experiment if it does not exist."""
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = (
            self._client.create_experiment(self._experiment)
            if found is None
            else found.experiment_id
        )
        self._run = self._client.create_run(experiment, run_name=self._name).info.run_id
        # One request takes at most 100 parameters; a run has about 70.
        params = [
            self._mlflow.entities.Param(option, value[:_LONGEST_VALUE])
            for option, value in options.items()
        ]
        self._client.log_batch(self._run, params=params)

    def write(self, metrics: Mapping[str, float], step: int, seconds: float) -> None:
        """Sends the metrics of a step in one request."""
        entities = [
            self._mlflow.entities.Metric(name, value, round(1000 * seconds), step)
            for name, value in metrics.items()
        ]
        self._client.log_batch(self._run, metrics=entities)

    def finish(self, failed: bool) -> None:
        """Ends the run as FINISHED or FAILED."""
        if self._run is not None:
            self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")
