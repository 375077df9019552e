"""Every error that mqworker raises, by whose fault it is. Knows nothing of the rest of the house.

MqworkerError
├── SubmitterError           what was asked for cannot be done: change the request
│   ├── TaskConfigError      task data that the task does not accept
│   ├── Rejected             the scheduler did not accept a request
│   ├── Conflict             the id is taken by a request with other content
│   ├── NotFound             no such request or artifact
│   ├── TooLarge             an answer would hold more than one message may
│   ├── Forbidden            the broker's user may not do this
│   ├── TakeInvalid          task data have no place for what is to be taken from another request
│   └── ArtifactInvalid      files or data that do not make an artifact
├── OperatorError            this machine or these settings are not right: change them
│   ├── SettingsError        a setting is missing, unknown or out of range
│   ├── BrokerRefused        the broker answers, but not to these credentials or this vhost
│   ├── LedgerLocked         another scheduler writes this ledger
│   ├── LedgerInvalid        the database is no ledger, or one of another schema
│   ├── StateLocked          another worker uses this state directory
│   ├── StoreMismatch        the worker and the scheduler do not share a store
│   └── HostUnfit            a program or right that is needed is not there
├── OutsideError             the world is unwell: try again
│   ├── BrokerUnavailable    nobody answers at the broker's address
│   ├── NotPublished         a message was returned, refused or cut off before its confirm
│   ├── Unanswered           the scheduler did not answer in time
│   ├── LedgerUnavailable    the database cannot commit now
│   ├── LedgerLost           another scheduler was elected
│   └── StoreUnavailable     the store cannot be read or written now
├── PeerError                somebody's message is not what was agreed
│   ├── Unreadable           not JSON, not a known type, or not its fields
│   ├── Impostor             it speaks in a name that is another's
│   └── NewerVersion         written by a newer mqworker than this one
├── Corrupt                  bytes that are not what their sha256 says
└── IllegalMove              ours: a state was asked to do what it cannot
"""

from collections.abc import Mapping
from typing import ClassVar


class MqworkerError(Exception):
    """Carry a sentence that says what was expected, what was given and what to do."""

    exit_code: ClassVar[int] = 1


class SubmitterError(MqworkerError):
    """Raise when what was asked for cannot be done."""

    exit_code = 2


class TaskConfigError(SubmitterError):
    """Halt the task due to invalid configuration."""

    def __init__(self, message: str, original_exception: Exception | None = None) -> None:
        super().__init__(message)
        self.original_exception = original_exception


class Rejected(SubmitterError):
    """Raise when the scheduler did not accept a request."""


class Conflict(SubmitterError):
    """Raise when an id is taken by a request with other content."""


class NotFound(SubmitterError):
    """Raise when no request or artifact has this id."""


class TooLarge(SubmitterError):
    """Raise when an answer would hold more than one message may."""


class Forbidden(SubmitterError):
    """Raise when the broker's user may not do what it asks for; `refused` says why, by request, of those it may not."""

    def __init__(self, message: str, refused: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.refused = refused or {}


class TakeInvalid(SubmitterError):
    """Raise when task data have no place for what is to be taken from another request."""


class ArtifactInvalid(SubmitterError):
    """Raise when files or data do not make an artifact."""


class OperatorError(MqworkerError):
    """Raise when this machine or its settings are not right."""

    exit_code = 3


class SettingsError(OperatorError):
    """Raise when a setting is missing, unknown or out of range."""


class BrokerRefused(OperatorError):
    """Raise when the broker answers, but not to these credentials or this vhost."""


class LedgerLocked(OperatorError):
    """Raise when another scheduler writes this ledger."""


class LedgerInvalid(OperatorError):
    """Raise when a database is no ledger, or one of another schema."""


class StateLocked(OperatorError):
    """Raise when another worker uses this state directory."""


class StoreMismatch(OperatorError):
    """Raise when a worker and its scheduler do not share a store."""


class HostUnfit(OperatorError):
    """Raise when a program or a right that is needed is not there."""


class OutsideError(MqworkerError):
    """Raise when the world outside is unwell and a later try may succeed."""

    exit_code = 4


class BrokerUnavailable(OutsideError):
    """Raise when nobody answers at the broker's address."""


class NotPublished(OutsideError):
    """Raise when a message was returned, refused or cut off before its confirm."""


class Unanswered(OutsideError):
    """Raise when the scheduler did not answer in time."""


class LedgerUnavailable(OutsideError):
    """Raise when the database cannot commit now."""


class LedgerLost(OutsideError):
    """Raise when another scheduler was elected, and what this one does counts no more."""


class StoreUnavailable(OutsideError):
    """Raise when the store cannot be read or written now."""


class PeerError(MqworkerError):
    """Raise when a message is not what was agreed."""


class Unreadable(PeerError):
    """Raise when a message is not JSON, not of a known type, or lacks its fields."""


class Impostor(PeerError):
    """Raise when a message speaks in a name, or came by a way, that is not its sender's."""


class NewerVersion(PeerError):
    """Raise when a message was written by a newer mqworker than this one."""


class Corrupt(MqworkerError):
    """Raise when bytes are not what their sha256 says."""


class IllegalMove(MqworkerError):
    """Raise when a state was asked to do what it cannot."""
