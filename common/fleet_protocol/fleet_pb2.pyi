from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_ACTIVATED: _ClassVar[Outcome]
    OUTCOME_SELFTEST_FAILED: _ClassVar[Outcome]
    OUTCOME_ROLLED_BACK: _ClassVar[Outcome]
    OUTCOME_CRASH_LOOP: _ClassVar[Outcome]
    OUTCOME_CONFIRMED: _ClassVar[Outcome]
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_ACTIVATED: Outcome
OUTCOME_SELFTEST_FAILED: Outcome
OUTCOME_ROLLED_BACK: Outcome
OUTCOME_CRASH_LOOP: Outcome
OUTCOME_CONFIRMED: Outcome

class WatchRequest(_message.Message):
    __slots__ = ("device", "agent", "release", "running")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    device: str
    agent: str
    release: str
    running: int
    def __init__(self, device: _Optional[str] = ..., agent: _Optional[str] = ..., release: _Optional[str] = ..., running: _Optional[int] = ...) -> None: ...

class WatchEvent(_message.Message):
    __slots__ = ("welcome", "directive", "keep_alive")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    DIRECTIVE_FIELD_NUMBER: _ClassVar[int]
    KEEP_ALIVE_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    directive: Directive
    keep_alive: KeepAlive
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., directive: _Optional[_Union[Directive, _Mapping]] = ..., keep_alive: _Optional[_Union[KeepAlive, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("device", "keep_alive_seconds")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    KEEP_ALIVE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    device: str
    keep_alive_seconds: int
    def __init__(self, device: _Optional[str] = ..., keep_alive_seconds: _Optional[int] = ...) -> None: ...

class Directive(_message.Message):
    __slots__ = ("serial", "release", "version", "downgrade", "rollout")
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DOWNGRADE_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    serial: int
    release: str
    version: int
    downgrade: bool
    rollout: str
    def __init__(self, serial: _Optional[int] = ..., release: _Optional[str] = ..., version: _Optional[int] = ..., downgrade: bool = ..., rollout: _Optional[str] = ...) -> None: ...

class KeepAlive(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Answer(_message.Message):
    __slots__ = ("serial", "version", "outcome", "detail")
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    serial: int
    version: int
    outcome: Outcome
    detail: str
    def __init__(self, serial: _Optional[int] = ..., version: _Optional[int] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., detail: _Optional[str] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("id", "device", "agent", "running", "answer", "error", "figures", "made")
    class FiguresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FIGURES_FIELD_NUMBER: _ClassVar[int]
    MADE_FIELD_NUMBER: _ClassVar[int]
    id: str
    device: str
    agent: str
    running: int
    answer: Answer
    error: str
    figures: _containers.ScalarMap[str, float]
    made: float
    def __init__(self, id: _Optional[str] = ..., device: _Optional[str] = ..., agent: _Optional[str] = ..., running: _Optional[int] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., error: _Optional[str] = ..., figures: _Optional[_Mapping[str, float]] = ..., made: _Optional[float] = ...) -> None: ...

class ReportReply(_message.Message):
    __slots__ = ("counted", "replayed")
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    counted: bool
    replayed: bool
    def __init__(self, counted: bool = ..., replayed: bool = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("path", "offset")
    PATH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    path: str
    offset: int
    def __init__(self, path: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class FetchChunk(_message.Message):
    __slots__ = ("offset", "length", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    length: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., length: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...
