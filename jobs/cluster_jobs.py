"""`metapipe jobs`: what was submitted to a cluster; its logs; its end."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import console

if TYPE_CHECKING:
    from pipeline.submission import Cluster, Job

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="The cluster's job server, e.g. http://HEAD:8265. Else RAY_API_SERVER_ADDRESS or RAY_ADDRESS.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, as `metapipe jobs list` shows it.")]

app = console.new_app(help="Jobs on a Ray cluster: list them, read their logs, stop one.", no_args_is_help=True)


def connect(address: str | None) -> Cluster:
    from pipeline import submission

    return submission.Cluster(submission.server_address(address))


@app.command("list")
def list_jobs(address: Address = None, json: console.Json = False) -> None:
    """List the jobs that were submitted to a cluster, newest first."""
    cluster = connect(address)
    jobs = cluster.jobs()

    def show() -> None:
        if not jobs:
            console.out.print(f"no jobs at {cluster.address}", soft_wrap=True)
            return
        for job in jobs:
            duration = "not started" if job.seconds is None else str(timedelta(seconds=round(job.seconds)))
            line = f"{job.id}  {job.status:9}  {_started(job)}  {duration}\n    {job.command}"
            console.out.print(line, markup=False, highlight=False, soft_wrap=True)

    console.emit({"address": cluster.address, "jobs": [result(job) for job in jobs]}, as_json=json, show=show)


@app.command()
def logs(
    job: JobId,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Go on until the job ends, and exit with its exit code.")
    ] = False,
    json: console.Json = False,
) -> None:
    """Print what a job has printed."""
    cluster = connect(address)
    if follow:
        finish(cluster, job, as_json=json)
        return
    text = cluster.logs(job)
    console.emit({**result(cluster.job(job)), "logs": text}, as_json=json, show=lambda: print(text, end=""))


@app.command()
def stop(job: JobId, address: Address = None, json: console.Json = False) -> None:
    """End a job. It gets SIGTERM, and a minute to write its last checkpoint."""
    ended = connect(address).stop(job)
    console.emit(result(ended), as_json=json, show=lambda: console.out.print(f"{ended.id}: {ended.status}"))


def finish(cluster: Cluster, job_id: str, *, as_json: bool, **also: Any) -> None:
    """Print a job's logs until it ends, then exit as it did. An interrupt ends the printing only."""
    from pipeline.errors import Interrupted
    from pipeline.submission import look_again

    stream = console.err if as_json else console.out

    def write(text: str) -> None:
        stream.file.write(text)
        stream.file.flush()

    try:
        job = cluster.follow(job_id, write)
    except Interrupted as interruption:
        again = look_again(cluster.address, job_id)
        console.err.print(f"\nThe job goes on. Look again: {again}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(console.INTERRUPTED + interruption.signal_number) from None
    ending = f"{job.id}: {job.status}"
    if job.status == "FAILED":
        reason = "" if job.driver_exit_code else f": {job.message}"  # else the logs have it
        ending += f" with exit code {job.exit_code}{reason}"
    console.err.print(ending, markup=False, highlight=False, soft_wrap=True)
    console.emit({**result(job), **also}, as_json=as_json, show=lambda: None)
    raise typer.Exit(job.exit_code or 0)


def result(job: Job) -> dict[str, Any]:
    return {
        "job": job.id,
        "status": job.status,
        "command": job.command,
        "started": _started(job) or None,
        "seconds": None if job.seconds is None else round(job.seconds, 1),
        "exit_code": job.exit_code,
    }


def _started(job: Job) -> str:
    return "" if job.started is None else datetime.fromtimestamp(job.started).isoformat(" ", "seconds")


if __name__ == "__main__":
    console.run(app)
