"""`metapipe submit`: run `metapipe train` or `metapipe tune` on a Ray cluster."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import cluster_jobs, console

if TYPE_CHECKING:
    from pipeline.experiment import Experiment

COMMANDS = ("train", "tune")
SETTINGS: dict[str, Any] = {"context_settings": {"ignore_unknown_options": True}}  # they are the command's


def submit(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND...",
            help="train or tune with its arguments, e.g. train configs/x.yaml --set KEY=VALUE.",
        ),
    ],
    address: cluster_jobs.Address = None,
    follow: Annotated[
        bool,
        typer.Option("--follow/--no-follow", help="Print the job's logs until it ends, and exit with its exit code."),
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=VALUE]",
            help="Pass an environment variable on, besides MLFLOW_TRACKING_URI and other harmless ones. Not for "
            "secrets: the cluster's own environment should hold them. Repeatable.",
        ),
    ] = None,
    allow_secrets: Annotated[
        bool,
        typer.Option(
            "--allow-secrets", help="Pass secrets on as well; everyone with access to the dashboard can read them."
        ),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Ask the tracking server and the object store from here.")
    ] = True,
    json: console.Json = False,
) -> None:
    """Run train or tune on a Ray cluster, through its job server.

    The current folder travels without data, environments and what git ignores (at most 500 MiB). Data and runs lie
    in an object store or on storage that every node sees.

    The token is the environment's: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH. Secrets are not
    passed on: the environment of the cluster's nodes holds them.
    """
    from pipeline import packing, placement, submission
    from pipeline.job_environment import job_environment

    url = submission.server_address(address)
    config, overrides = _parse(words)
    project = Path.cwd()
    environment = job_environment(env or [], os.environ, allow_secrets=allow_secrets)
    experiment = _experiment(words[0], config, overrides)
    remarks = placement.check_storage(experiment)
    wanted = [config, *placement.network_files(experiment, project), *placement.starting_files(experiment, project)]
    cluster = submission.Cluster(url)
    placement.check_addresses(environment, same_files=cluster.shares_files, same_network=cluster.shares_network)
    placement.check_data_servers(experiment, same_network=cluster.shares_network)
    if check:
        placement.check_answers(environment)
        placement.check_stores(experiment)
    if "MLFLOW_TRACKING_URI" not in environment:
        remarks.append("MLFLOW_TRACKING_URI is not set here: the one in the environment of the cluster's nodes is used")
    command = [packing.packed_name(config, project) if Path(word) == config else word for word in words]
    with tempfile.TemporaryDirectory() as scratch:
        package = packing.pack(project, Path(scratch) / "job.zip", wanted=wanted)
        resources = placement.driver_resources(experiment) if words[0] == "train" else {}  # trials claim their own
        job = cluster.submit(command, package, environment, **resources)

    for remark in remarks:
        console.err.print(remark, markup=False, highlight=False, soft_wrap=True)
    sent = {"address": url, "package": {"files": package.files, "bytes": package.bytes}, "env": sorted(environment)}
    console.err.print(f"{job}: {package} sent to {url}", markup=False, highlight=False, soft_wrap=True)
    if follow:
        cluster_jobs.finish(cluster, job, as_json=json, **sent)
    again = submission.look_again(url, job)
    console.emit(
        {**cluster_jobs.result(cluster.job(job)), **sent, "look": again},
        as_json=json,
        show=lambda: console.out.print(f"look at it: {again}", markup=False, highlight=False, soft_wrap=True),
    )


def _parse(words: list[str]) -> tuple[Path, list[str]]:
    """The configuration file and the overrides of a command line that the command's own parser accepts."""
    from jobs import cli
    from pipeline.errors import ConfigError

    commands = typer.main.get_group(cli.app).commands
    known = [name for name in COMMANDS if name in commands]
    if words[0] not in known:
        raise ConfigError(f"submit {words[0]}: cannot be submitted; choose one of {', '.join(known)}.")
    given = commands[words[0]].make_context(f"metapipe {words[0]}", list(words[1:])).params
    return Path(given["config"]), list(given.get("overrides") or [])


def _experiment(command: str, config: Path, overrides: list[str]) -> Experiment:
    """What the command's file describes (of a sweep, its base experiment). Raises ConfigError."""
    from pipeline import experiment as experiments
    from pipeline import sweep as sweeps
    from pipeline.errors import ConfigError

    if command == "train":
        return experiments.load(config, overrides)
    sweep = sweeps.load(config, overrides)
    base = config.parent / sweep.settings.experiment
    if not all(file.resolve().is_relative_to(Path.cwd()) for file in (config, base)):
        raise ConfigError(f"{config}: it and its experiment, {base}, must lie in the current folder, which travels.")
    return sweep.base


if __name__ == "__main__":
    console.run(console.single_command(submit, **SETTINGS))
