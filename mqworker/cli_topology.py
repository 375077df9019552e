"""The commands `mqworker topology ...`: what the pool has on the broker, made, shown, and who may do what with it."""

import asyncio
from enum import StrEnum
from typing import Annotated, Any

import typer

from mqworker.amqp import declare
from mqworker.brokerurl import read_url
from mqworker.errors import SubmitterError
from mqworker.rights import ROLES, commands, definitions
from mqworker.screen import make_table
from mqworker.shell import AsJson, Shell, print_json, show, silence_logging
from mqworker.topology import Topology

application = typer.Typer(help="Make and show what is on the broker, and print the rights of each role.")


class RoleName(StrEnum):
    """What a user of the broker is here."""

    SCHEDULER = "scheduler"
    WORKER = "worker"
    CLIENT = "client"
    OBSERVER = "observer"


class Form(StrEnum):
    """How rights are printed."""

    COMMANDS = "commands"
    DEFINITIONS = "definitions"


@application.command("declare")
def declare_(context: typer.Context) -> None:
    """Make the exchanges and lasting queues, as a user who may: so that no other needs to be allowed to.

    A scheduler who may does the same whenever it starts.
    """
    silence_logging()
    shell: Shell = context.obj
    settings = shell.load().settings
    topology = Topology(settings.prefix)
    asyncio.run(declare(settings.amqp_url, topology))
    typer.echo(f"{len(topology.exchanges())} exchanges and {len(topology.queues())} queues are there")


@application.command("show")
def show_(context: typer.Context, *, as_json: AsJson = False) -> None:
    """List the names on the broker, with all arguments and bindings; nothing is asked of it."""
    silence_logging()
    shell: Shell = context.obj
    topology = Topology(shell.load().settings.prefix)
    queues = (
        *topology.queues(),
        topology.class_queue("<class>"),
        topology.report_queue("<epoch>"),
        topology.worker_queue("<name>", "<epoch>"),
        topology.follower_queue("<epoch>", ((topology.events, "#"), (topology.logs, "#"))),
    )
    if as_json:
        print_json({"exchanges": topology.exchanges(), "queues": queues})
        return
    exchanges = make_table("exchange", "kind")
    for exchange in topology.exchanges():
        exchanges.add_row(exchange.name, exchange.kind)
    show(exchanges)
    typer.echo()
    table = make_table("queue", "for", "bound to", "arguments", wrap=("bound to", "arguments"))
    for queue in queues:
        bindings = ", ".join(f"{exchange} ({key})" if exchange != key else exchange for exchange, key in queue.bindings)
        arguments = ", ".join(f"{key}={value}" for key, value in queue.arguments.items())
        scope = "one connection" if queue.exclusive else "all" if queue.lasting else "its workers"
        table.add_row(queue.name, scope, bindings, arguments)
    show(table)


@application.command()
def permissions(
    context: typer.Context,
    *,
    form: Annotated[Form, typer.Option("--format", help="Lines for a shell, or JSON for import_definitions.")] = (
        Form.COMMANDS
    ),
    role: Annotated[list[RoleName] | None, typer.Option(help="Only this one; may be repeated; default: all.")] = None,
    user: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Users of the one --role; default: PREFIX-ROLE.")
    ] = None,
    vhost: Annotated[str | None, typer.Option(help="Default: that of the broker's URL.")] = None,
    new: Annotated[
        bool,
        typer.Option("--new/--known", help="In definitions: make the users; known ones would lose their password."),
    ] = True,
) -> None:
    """Print what gives users of the broker the rights of their role, and no other; nothing is asked of it.

    Roles: scheduler; worker (takes tickets, reports, sends outcomes and logs); client (submits, asks, commands,
    follows); observer (asks and follows).
    """
    silence_logging()
    shell: Shell = context.obj
    settings = shell.load().settings
    roles = [one.value for one in role or ()] or [*ROLES]
    if user and len(roles) != 1:
        raise SubmitterError("expected one --role beside --user: whose role is it?")
    names: list[tuple[str, Any]] = (
        [(one, roles[0]) for one in user] if user else [(f"{settings.prefix}-{one}", one) for one in roles]
    )
    topology = Topology(settings.prefix)
    where = read_url(settings.amqp_url).vhost if vhost is None else vhost
    if form is Form.DEFINITIONS:
        print_json(definitions(topology, where, names, with_users=new))
    else:
        typer.echo("\n".join(commands(topology, where, names)))
