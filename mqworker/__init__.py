"""mqworker, a worker pool for heavy, picky work on RabbitMQ: the floor plan.

A room imports only floors strictly below its own, where each line that begins with a name is a floor; `lint-imports`
checks it.

    5 front door   __main__ (python -m mqworker)
                   cli (commands)
                   cli_artifact (commands on artifacts), cli_requests (on requests chosen by what they have in common),
                     cli_pool (on the pool), cli_topology (on what is on the broker)
      its hall     shell (settings, client, logging and errors, as every command needs them)
                   settings (flags, environment, TOML), doctor (what is wrong here), rehearsal (one task here and now),
                     demo (a private broker, a scheduler, two workers on one machine)
                   screen_pool (workers, explain, classes, the pool live)
                   screen (tables, progress lines, log lines)
    3 residents    client (submit, wait, command, fetch, follow), scheduler (read, judge, record, publish),
                     worker (hold slots, claim, report, drain), slot (the child: fetch, run, upload, outcome)
      their minds  pool (the scheduler's judgement), agent (the worker's): told what came and what time it is,
                     they answer with writes, messages and acts, and open nothing
                   views (what the scheduler shows of the pool)
                   holdings (what it has in memory), outbox (what it has to say)
      their ears   examiner (what tasks say of requests)
    2 doors        task (the Task API), amqp (pika), ledger (SQL), store (artifact bytes), metrics (Prometheus),
                     state (a worker's spool and lock), limits (what a run may use), watchdog (ends slots that
                       cannot end themselves), debianhost (apt, chroots), privatenode (a RabbitMQ of its own)
      its engines  sqlite (a file and its lock), postgresql (sessions, elections and terms)
                   database (what both are to the ledger), migrations (its schema over time)
      the ground   processes (Linux processes and clocks), cgroup (control groups), schema (the ledger's tables),
                     facts (what goes into them), brokerurl (what a broker's URL says)
    1 judgement    explain (why a request waits), blame (which worker fails what passes elsewhere),
                     rights (what each role may do on the broker), needs (what a request needs of others)
                   lifecycle (states and events), matching (who can run what),
                     requirements (which requests nothing tells apart), requires (what a request asks of a worker),
                     dispatch (who gets what now), topology (exchanges, queues, names), access (who may command what),
                     hearing (whether a queue still gives what is in it): pure; told the time, given facts
      its eyes     tracking (what a predicate reads of two documents), pace (how fast runs follow each other)
    0 words        messages (structs on the wire)
                   errors (one tree, by whose fault it is)

Beside the house: tasks/ (one file a task; noop is the one to copy), which sees only mqworker.task and mqworker.errors.
Only Task and the errors are handed on here, so that a task's child process loads no broker and no database.
"""

from mqworker.errors import MqworkerError, TaskConfigError
from mqworker.task import Task

__all__ = ["MqworkerError", "Task", "TaskConfigError"]
__version__ = "0.1.0"
