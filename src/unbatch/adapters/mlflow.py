"""MLflow: numbers of runs written to a tracking store, for teams that keep theirs there; imported on use."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from unbatch.errors import MissingExtra, UnbatchError

KEY = "unbatch.key"  # the tag by which a run is known again
LONGEST_VALUE = 500  # letters of a parameter or a tag that every store takes


class Experiment:
    """An experiment of MLflow that takes each run once; its own usage statistics are off.

    `uri`: of the tracking store; MLflow's own choice without one (``MLFLOW_TRACKING_URI``).
    Raises MissingExtra: mlflow-skinny is not installed. UnbatchError: the store cannot be reached or refuses.
    """

    def __init__(self, name: str, uri: str = "") -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            from mlflow.entities import Metric, Param
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise MissingExtra.of("logging to MLflow", "mlflow-skinny", "mlflow") from None
        self._metric, self._param = Metric, Param
        try:
            self._client: Any = MlflowClient(tracking_uri=uri or None)
            found = self._client.get_experiment_by_name(name)
            self.number: str = found.experiment_id if found else self._client.create_experiment(name)
        except MlflowException as error:
            raise UnbatchError(f"MLflow cannot open the experiment {name!r}: {error}") from None

    def holds(self, key: str) -> bool:
        """Whether a run of this key was logged."""
        return bool(self._client.search_runs([self.number], filter_string=f"tags.`{KEY}` = '{key}'", max_results=1))

    def log(
        self,
        key: str,
        *,
        title: str,
        params: Mapping[str, str],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        failed: bool,
    ) -> None:
        """Write a run, finished or failed; nothing where one of this key was logged before."""
        if self.holds(key):
            return
        told = {name: value[:LONGEST_VALUE] for name, value in {**tags, KEY: key}.items()}
        run = self._client.create_run(self.number, tags=told, run_name=title[:LONGEST_VALUE]).info.run_id
        now = int(time.time() * 1000)
        self._client.log_batch(
            run,
            metrics=[self._metric(name, float(value), now, 0) for name, value in metrics.items()],
            params=[self._param(name, value[:LONGEST_VALUE]) for name, value in params.items()],
        )
        self._client.set_terminated(run, "FAILED" if failed else "FINISHED")
