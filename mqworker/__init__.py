"""mqworker, a worker pool for heavy, picky work on RabbitMQ: the floor plan.

A room imports only floors strictly below its own; `lint-imports` checks it.

    5 front door   __main__, cli (commands)
    4 its hall     settings (flags, environment, TOML), screen (tables and progress), doctor (what is wrong here)
    3 residents    client (submit, wait, abort, fetch, follow), scheduler (read, judge, record, publish),
                   worker (hold slots, claim, report, drain), slot (the child: fetch, run, upload, outcome),
                   and over them demo (a private broker, a scheduler, two workers on one machine)
    2 doors        task (the Task API), amqp (pika), ledger (SQL), store (artifact bytes), metrics (Prometheus),
                   debianhost (apt, build chroots), privatenode (a RabbitMQ of our own)
      the ground   processes (Linux processes and clocks)
    1 judgement    lifecycle (states and events), matching (who can run what), dispatch (who gets what now),
                   topology (exchanges, queues, names): pure; told the time, given the facts
    0 words        messages (structs on the wire), errors (one tree, by whose fault it is)

Only Task and the errors are handed on here, so that a task's child process loads no broker and no database.
"""

from mqworker.errors import MqworkerError, TaskConfigError
from mqworker.task import Task

__all__ = ["MqworkerError", "Task", "TaskConfigError"]
__version__ = "0.1.0"
