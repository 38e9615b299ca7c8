"""Engines: where many calls of one function run: here, on Ray or on Dask, all through joblib; imported on use."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from unbatch.errors import MissingExtra, UnbatchError

ENGINES = ("local", "ray", "dask")
ASIDE = 2  # workers from which joblib leaves this process: of one it thinks that it may as well be this one
WORKERS_BACK = 60  # seconds in which Dask's workers must be there, or there again
OBJECT_STORE = 100 * 2**20  # bytes that a Ray started here keeps for results: an audit's JSON is far smaller

Given = TypeVar("Given")
Made = TypeVar("Made")
Spread = Callable[[Callable[[Given], Made], Iterable[Given]], Iterator[Made]]


@contextmanager
def engine(name: str = "local", jobs: int = 1, *, threads: int = 1, address: str = "") -> Iterator[Spread[Any, Any]]:
    """Gives a function that calls another one for each of many things, `jobs` at a time, and yields what comes back.

    Results come as they are finished, in no order. What the called function raises ends the whole, and so does a worker
    that dies: the function is to catch what it can, and the caller is to begin the rest again.

    `name`: "local" (processes of this machine, by joblib's loky; one job at a time is run in this very process), "ray" or
    "dask". `threads`: processors that Ray keeps for each job, and what loky tells numeric libraries. `address`: of a Ray or
    Dask cluster that runs already; without one, a small one is started here and ended again.

    >>> with engine("local") as spread:
    ...     sorted(spread(abs, [-3, 2, -1]))
    [1, 2, 3]

    Raises UnbatchError: no such engine, fewer than one job, or an address for this machine. MissingExtra: not installed.
    """
    check_engine(name, jobs, threads=threads, address=address)
    try:
        import joblib
    except ImportError:
        raise MissingExtra.of("a sweep", "joblib", "sweep") from None
    with ExitStack() as started:
        begun = {"local": _local, "ray": _ray, "dask": _dask}[name]
        started.enter_context(joblib.parallel_config(n_jobs=jobs, **begun(started, jobs, threads, address)))

        def spread(work: Callable[[Given], Made], things: Iterable[Given]) -> Iterator[Made]:
            # As many at once as there are jobs, one by one: what a dead worker may have had in hand is then known.
            together = joblib.Parallel(return_as="generator_unordered", pre_dispatch=jobs, batch_size=1)
            made: Iterator[Made] = together(joblib.delayed(work)(thing) for thing in things)
            return made

        yield spread


def check_engine(name: str, jobs: int = 1, *, threads: int = 1, address: str = "") -> None:
    """Refuse what no engine can do, before anything is started. Raises UnbatchError, as `engine` does."""
    if name not in ENGINES:
        raise UnbatchError(f"unknown engine {name!r}; known: {', '.join(ENGINES)}.")
    if jobs < 1 or threads < 1:
        raise UnbatchError(f"{jobs} jobs of {threads} threads cannot run; give at least 1 of each.")
    if address and name == "local":
        raise UnbatchError(f"--address {address} would not be used: it is of a cluster; add --engine ray or dask.")


def _local(started: ExitStack, jobs: int, threads: int, address: str) -> dict[str, Any]:
    return {"backend": "loky", "inner_max_num_threads": threads} if jobs > 1 else {"backend": "sequential"}


def _ray(started: ExitStack, jobs: int, threads: int, address: str) -> dict[str, Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import joblib
        import ray
        from ray.util.joblib import register_ray
        from ray.util.joblib.ray_backend import RayBackend
    except ImportError:
        raise MissingExtra.of("--engine ray", "ray", "ray") from None
    register_ray()  # type: ignore[no-untyped-call]

    class StreamingRay(RayBackend):
        """Ray's backend, whose results are had one by one: its pool calls back for each, which joblib is not told."""

        supports_retrieve_callback = True
        supports_return_generator = True

        def effective_n_jobs(self, n_jobs: int) -> int:
            return max(int(super().effective_n_jobs(n_jobs)), ASIDE)  # type: ignore[no-untyped-call]

    joblib.register_parallel_backend("unbatch-ray", StreamingRay)
    needed = max(jobs, ASIDE) * threads
    if not ray.is_initialized():
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address:
            ray.init(address=address, **quiet)
        else:
            size: dict[str, Any] = {
                "num_cpus": needed,
                "object_store_memory": OBJECT_STORE,
                "include_dashboard": False,
            }
            ray.init(**size, **quiet)
        started.callback(ray.shutdown)
    held = int(ray.cluster_resources().get("CPU", 0))  # type: ignore[no-untyped-call]
    if held < needed:
        raise UnbatchError(
            f"Ray's cluster has {held} processors, and {max(jobs, ASIDE)} workers of {threads} threads need {needed}; give "
            f"fewer --jobs or --threads (there are {ASIDE} workers at least)."
        )
    return {"backend": "unbatch-ray", "ray_remote_args": {"num_cpus": threads}}


def _dask(started: ExitStack, jobs: int, threads: int, address: str) -> dict[str, Any]:
    try:
        import joblib
        from distributed import Client, LocalCluster
        from joblib._dask import DaskDistributedBackend
    except ImportError:
        raise MissingExtra.of("--engine dask", "dask.distributed", "dask") from None

    class FailingDask(DaskDistributedBackend):  # type: ignore[misc]  # of a package without types
        """Dask's backend, where a job whose workers died is an error: joblib's own waits for it for ever."""

        def effective_n_jobs(self, n_jobs: int) -> int:
            return max(int(super().effective_n_jobs(n_jobs)), ASIDE)

        def submit(self, func: Any, callback: Any = None) -> Any:
            done = super().submit(func, callback)

            def tell(future: Any) -> None:
                if callback and (error := future.exception()):
                    callback(error)

            done.add_done_callback(tell)
            return done

        def retrieve_result_callback(self, out: Any) -> Any:
            if isinstance(out, BaseException):
                raise out
            return super().retrieve_result_callback(out)

    joblib.register_parallel_backend("unbatch-dask", FailingDask)
    if not address:
        size = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None, "silence_logs": logging.ERROR}
        address = started.enter_context(LocalCluster(**size)).scheduler_address  # type: ignore[no-untyped-call]
    client = started.enter_context(Client(address))  # type: ignore[no-untyped-call]
    return {"backend": "unbatch-dask", "client": client, "wait_for_workers_timeout": WORKERS_BACK}
