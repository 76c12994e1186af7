"""The commands of ddiff that submit to a cluster and follow what was submitted; jobs/cli.py adds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.shell import CHANGES, CONFIG, RECIPE, Group, answer, importing, say

if TYPE_CHECKING:
    from jobs.following import Cluster, JobFacts

submitted = Group("submitted")


@submitted.command(short_help="Run a command on a cluster, or resume it.")
@click.argument("words", nargs=-1, required=True, metavar="RECIPE | run | train STAGE | prepare | ...")
@RECIPE
@CONFIG
@CHANGES
@click.option("--address", help="Of the cluster's dashboard, http://head:8265; else RAY_ADDRESS.")
@click.option("--dry-run", is_flag=True, help="Show the plan of a run, and submit nothing.")
@click.option("--follow", is_flag=True, help="Stay, show what it says, and end as it ends.")
@click.option("--insecure", is_flag=True, help="Even to a cluster that asks for no token.")
def submit(
    words: tuple[str, ...],
    recipe: str | None,
    file: Path | None,
    changes: tuple[str, ...],
    address: str | None,
    dry_run: bool,
    follow: bool,
    insecure: bool,
) -> None:
    """Run a command on a cluster; the same submission again resumes it.

    RECIPE, or run, train STAGE, prepare with --config, doctor, evaluate URL, deploy NAME@ALIAS.
    What only the nodes may do, since they hold the keys, is done there.  Prints the id of the job.
    """
    with importing():
        from jobs.dashboard import refuse_open
        from jobs.dry_run import planned, show_plan
        from jobs.following import Cluster
        from jobs.submit import as_facts, order_of, told
        from jobs.submit import submit as hand_over

        cluster = Cluster(address)
        if not insecure:
            refuse_open(cluster.address)
        order = order_of(words, recipe, file, changes)
        if dry_run:
            show_plan(planned(order, cluster.address))
            return
        done = hand_over(order, cluster)
    manner = click.get_current_context().obj
    if not (manner.quiet or manner.as_json):  # JSON has the pack among its facts
        click.echo(told(done), err=True)
    answer(as_facts(done), done.id)
    if follow:
        show_log(cluster, cluster.job(done.id), to_the_end=True, err=True)


@submitted.command()
@click.argument("job")
@click.option("--address", help="Of the cluster's dashboard; else RAY_ADDRESS.")
def status(job: str, address: str | None) -> None:
    """How a JOB, or the newest job of a run, stands."""
    from jobs.following import Cluster, since

    found = Cluster(address).job(job)
    text = f"{found.id}: {found.status}, run {found.run}, since {since(found.started)}"
    answer(found._asdict(), f"{text}\n{found.message}".rstrip())


@submitted.command(short_help="What a JOB says; of one that failed, the first error.")
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Until the job is over; then end as it ended.")
@click.option("--address", help="Of the cluster's dashboard; else RAY_ADDRESS.")
def logs(job: str, follow: bool, address: str | None) -> None:
    """What a JOB says, all its processes in one; of one that failed, the first error at the end."""
    from jobs.following import Cluster

    cluster = Cluster(address)
    show_log(cluster, cluster.job(job), to_the_end=follow)


def show_log(cluster: Cluster, job: JobFacts, *, to_the_end: bool, err: bool = False) -> None:
    """Print a log and, if the job failed, the first error of our code; end as the job did."""
    from jobs.failures import StoppedError
    from jobs.following import end_as
    from jobs.job_log import first_error, merged

    as_json = click.get_current_context().obj.as_json
    try:
        for line in merged(cluster.follow(job) if to_the_end else iter(cluster.log(job).splitlines())):
            say(json.dumps({"line": line}) if as_json else line, err=err)
    except (KeyboardInterrupt, StoppedError):
        raise StoppedError(
            f"{job.id} goes on, only its log is left; ddiff logs -f {job.id} follows it again, ddiff stop "
            f"{job.id} stops it"
        ) from None
    job = cluster.job(job.id)
    if job.status == "FAILED":
        found = first_error(cluster.log(job))
        if as_json:
            say(json.dumps({"first_error": found}), err=err)
        elif found:  # not of a doctor's report
            click.echo("\n".join(["", "the first error:", *found]), err=True)
    if job.over or to_the_end:
        end_as(job)


@submitted.command("list")
@click.option("--address", help="Of the cluster's dashboard; else RAY_ADDRESS.")
def list_jobs(address: str | None) -> None:
    """The jobs of a cluster, the newest first."""
    from jobs.following import Cluster, table

    found = Cluster(address).jobs()
    answer({"jobs": [job._asdict() for job in found]}, table(found))


@submitted.command()
@click.argument("job")
@click.option("--address", help="Of the cluster's dashboard; else RAY_ADDRESS.")
def delete(job: str, address: str | None) -> None:
    """Forget a JOB that is over, with its log.  The run itself stays where it is."""
    from jobs.following import Cluster

    found = Cluster(address).delete(job)
    answer({"deleted": found.id}, f"deleted {found.id}")


@submitted.command(short_help="Stop a JOB of a cluster, or an endpoint left running.")
@click.argument("job", required=False)
@click.option("--run", help="The run whose local endpoint to stop: its directory, or its address.")
@click.option("--address", help="Of the cluster's dashboard; else RAY_ADDRESS.")
def stop(job: str | None, run: str | None, address: str | None) -> None:
    """Stop a JOB of a cluster, which saves itself first, or the endpoint that `ddiff run --serve` left."""
    if (job is None) == (run is None):
        raise click.UsageError("name either a job of a cluster, or with --run the run of a local endpoint")
    if job is not None:
        from jobs.following import Cluster

        found = Cluster(address).stop(job)
        answer({"stopped": found.id, "status": found.status}, f"{found.id}: {found.status}")
        return
    from jobs.endpoint import stop_endpoint
    from workflows.storage import Home

    here = Home.of(str(run)).here
    if not here.is_dir():
        raise click.UsageError(f"this machine has no run {run}; name its directory, such as runs/demo")
    was = stop_endpoint(here)
    answer({"stopped": was}, f"stopped {was}" if was else f"{run} has no endpoint running")
