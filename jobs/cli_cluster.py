"""The commands of ddiff that concern a cluster; jobs/cli.py adds them to the rest."""

from __future__ import annotations

from pathlib import Path

import click

from jobs.shell import CHANGES, CONFIG, FILE, HOST, PORT, RECIPE, Group, answer

cluster = Group("cluster")


@cluster.command(short_help="Serve a registered cascade on a cluster.")
@click.argument("cascade", metavar="NAME@ALIAS", required=False)
@click.option("--config", "file", help="Deploy this config instead: a file or address written before.")
@click.option("--set", "changes", multiple=True, metavar="A.B=C", help="Such as hops.base.num_gpus=1.")
@click.option("--address", help="Of the cluster's dashboard, http://HEAD:8265; RAY_ADDRESS unless given.")
@click.option("--dry-run", is_flag=True, help="Print the Serve config, change nothing anywhere.")
@click.option("--publish", is_flag=True, help="Put what the config names into the storage and print it.")
@click.option("--insecure", is_flag=True, help="Even on a cluster that asks for no token.")
def deploy(
    cascade: str | None,
    file: str | None,
    changes: tuple[str, ...],
    address: str | None,
    dry_run: bool,
    publish: bool,
    insecure: bool,
) -> None:
    """Serve a registered cascade on a cluster, such as demo@production.

    MLflow is asked once what the alias means; what is deployed is an address and a digest.  The cascade is
    put there, this code beside it, and the config is kept: to go back, deploy the former one with --config.
    --publish does this much without a cluster: `ddiff manifest service` takes what it prints.
    """
    from jobs.dashboard import refuse_open
    from jobs.deploy import deploy as put_on_air
    from jobs.deploy import publish as put_in_place
    from jobs.deploy import resolved, written_before
    from jobs.environment import cluster_address, in_a_job

    if (cascade is None) == (file is None) or (file and changes):
        raise click.UsageError("name a cascade (demo@production, with --set) or a config (--config FILE)")
    if publish and (dry_run or address):
        raise click.UsageError("--publish goes without --dry-run and without a cluster's --address")
    where = "" if dry_run or publish else address or cluster_address()
    if where and not insecure and not in_a_job():  # a job was checked when it was submitted
        refuse_open(where)
    config = written_before(file) if file else resolved(str(cascade), changes, where)
    if publish:
        put_in_place(config)
    if dry_run or publish:
        return answer(config.fields, config.text().rstrip())
    return answer(put_on_air(config, where))


@cluster.command(short_help="Move an alias to a cascade that paints better.")
@click.argument("cascade", metavar="NAME@ALIAS")
@click.option("--to", "alias", default="production", show_default=True, help="The alias to move.")
@click.option("--url", default="", help="Judge the candidate first, at this endpoint that serves it.")
@click.option("--force", is_flag=True, help="Move it whatever the scores say.")
def promote(cascade: str, alias: str, url: str, force: bool) -> None:
    """Move an alias to a cascade that paints better than the one that holds it."""
    from jobs.promotion import promote as move

    answer(move(cascade, alias, force=force, url=url))


@cluster.command(short_help="Try what a run needs, before there is one.")
@RECIPE
@CONFIG
@CHANGES
@HOST
@click.option("--port", default=8000, show_default=True, type=PORT)
def doctor(recipe: str | None, file: Path | None, changes: tuple[str, ...], host: str, port: int) -> None:
    """Try what a run needs: versions, cluster, resources, storage, MLflow, disk, GPU, clocks, port.

    With --recipe or --config the resources, nodes and disks are compared with what that run takes.
    Ends with 2 if a line says fail.
    """
    from jobs.config import run_spec
    from jobs.doctor import examine, facts_of, failed, told
    from jobs.endpoint import Address

    spec = run_spec(recipe, file, changes) if recipe or file else None
    found = examine(spec, Address(host, port))
    answer(facts_of(found), told(found))
    click.get_current_context().exit(2 if failed(found) else 0)


@cluster.command(short_help="Print manifests for KubeRay.")
@click.argument("kind", type=click.Choice(["job", "cluster", "service", "claim", "settings"]))
@RECIPE
@click.option(
    "--config", "file", type=FILE, help="A run; for a service, what `ddiff deploy --publish` prints."
)
@CHANGES
@click.option("--cluster", "settings", type=FILE, help="YAML as `ddiff manifest settings` prints it.")
def manifest(
    kind: str, recipe: str | None, file: Path | None, changes: tuple[str, ...], settings: Path | None
) -> None:
    """Print manifests for KubeRay: a RayJob, a RayCluster, a RayService, or the settings they follow.

    The claim, a volume for a storage that is a path, is for all runs: apply it once; who deletes it deletes
    them.
    Groups of nodes and their sizes come from the resources of the stages, or the replicas of a service.
    """
    from jobs.cluster.manifests import claim, job, read_cluster, service, standing, text_of
    from jobs.config import run_spec, shown
    from jobs.deploy import written_before

    where = read_cluster(settings)
    match kind:
        case "settings":
            if recipe or file or changes:
                raise click.UsageError(
                    "settings follow --cluster FILE alone; leave out --recipe, --config, --set"
                )
            return answer(where.model_dump(mode="json"), shown(where).rstrip())
        case "claim":
            if recipe or file or changes:
                raise click.UsageError(
                    "a claim follows --cluster FILE alone; leave out --recipe, --config, --set"
                )
            found = claim(where)
        case "service":
            if not file or recipe or changes:
                raise click.UsageError(
                    "a service needs --config FILE, as `ddiff deploy NAME --publish` prints it"
                )
            found = service(written_before(str(file)), where)
        case "job":
            found = job(run_spec(recipe, file, changes), where)
        case _:
            found = standing(run_spec(recipe, file, changes), where)
    return answer({"manifests": found}, text_of(found).rstrip())
