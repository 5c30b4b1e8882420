"""The one interface of all schemes, and what they share: checks, error feedback, container.

A scheme turns tensors into integers and scales (`_quantise`), and those into bytes (`_write`);
the way back is `_read` and `_restore`. What a sender remembers goes in and comes out as a `State`,
and what is random is a function of key and tensor: the same everywhere, as no state is shared.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import (
    CodecError,
    CounterStream,
    LimitExceeded,
    Limits,
    MalformedPayload,
)

from . import BadConfig, StateError, WrongScheme
from .container import CODINGS, Envelope, Reader, seal, unseal
from .layout import Arrays, Layout, State, added, checked

__all__ = ["Draws", "Option", "Quantised", "Scheme"]

_DOMAIN = b"prunecast scheme 1\0"


class Draws:
    """Uniform numbers for each tensor of a payload.

    Args:
        key: 0 to 2**64 - 1. Use another one for every message: two messages with one key share
            their rounding errors, and averaging no longer removes them.
        purpose: other purposes draw other numbers with the same key.

    Raises:
        BadConfig: the key is out of range.
    """

    def __init__(self, key: int, purpose: bytes = b"encode") -> None:
        if isinstance(key, bool) or not 0 <= key < 1 << 64:
            raise BadConfig(f"the key is {key!r}; give an integer from 0 to 2**64 - 1")
        self._label = _DOMAIN + purpose + b"\0" + struct.pack("<Q", key)

    def uniform(self, name: str, count: int) -> NDArray[np.float64]:
        """`count` numbers in [0, 1), multiples of 2**-53; tensors of other names get others."""
        numbers = np.empty(count, np.float64)
        for begin, words in self._stream(name).blocks(count):
            numbers[begin : begin + len(words)] = words >> np.uint64(11)
        numbers *= 2.0**-53
        return numbers

    def coins(self, name: str, count: int) -> NDArray[np.bool_]:
        """`count` fair coins; tensors of other names get others."""
        words = self._stream(name).words(0, count + 63 >> 6).astype("<u8")
        return np.unpackbits(words.view(np.uint8), count=count).view(np.bool_)

    def _stream(self, name: str) -> CounterStream:
        return CounterStream.of(self._label + name.encode("utf-8", "surrogatepass"))


Option = int | float | str | bool
"""Value of a scheme's option: what TOML and JSON can hold."""

# What numpy and Python raise on values that no check foresaw.
_FOREIGN = (ArithmeticError, ValueError, LookupError, TypeError)


@dataclass(frozen=True, eq=False)
class Quantised:
    """What travels: an array per tensor, and the scales that its integers are multiples of.

    Attributes:
        values: by tensor; integers, or floats where the scheme sends floats.
        scales: float32, one per tensor, group, bucket or channel as the scheme has it.
        parameters: whole numbers that travel too, as the scheme has them.
    """

    values: Mapping[str, NDArray[Any]]
    scales: NDArray[np.float32]
    parameters: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scheme(ABC):
    """A compression scheme; its fields are its options.

    Attributes:
        coding: "paper" writes the integers as the paper does, "prunecast" writes the same
            integers with `prunecast.compression.codec`.
    """

    name: ClassVar[str]
    """What `scheme` calls it; its place in `container.NAMES` is its number on the wire."""
    choices: ClassVar[Mapping[str, tuple[Option, ...]]] = {}
    """Options that have only a few values, and these."""

    coding: str = dataclasses.field(default="paper", kw_only=True)

    def __post_init__(self) -> None:
        """Check the types of all options, then what the scheme says of their values."""
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            kind = type(option.default)
            if kind is float and type(value) is int:
                object.__setattr__(self, option.name, float(value))
            elif type(value) is not kind or (
                kind is float and not math.isfinite(cast(float, value))
            ):
                raise self._bad(option.name, f"a {kind.__name__}")
        for name, values in {"coding": CODINGS, **self.choices}.items():
            if getattr(self, name) not in values:
                raise self._bad(name, " or ".join(map(repr, values)))
        self._check()

    def config(self) -> dict[str, Option]:
        """All options; ``scheme(s.name, **s.config())`` is an equal scheme."""
        return {option.name: getattr(self, option.name) for option in dataclasses.fields(self)}

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Names and defaults of the options."""
        return {option.name: cast(Option, option.default) for option in dataclasses.fields(cls)}

    @classmethod
    def from_config(cls, config: Mapping[str, Option]) -> Self:
        """A scheme with these options, the others at their defaults.

        Raises:
            BadConfig: an option does not exist, or is out of range.
        """
        known = cls.options()
        for option in config:
            if option not in known:
                raise BadConfig(
                    f"scheme {cls.name!r} has no option {option!r}; it has {', '.join(known)}"
                )
        return cls(**config)  # type: ignore[arg-type]

    def init(self, layout: Layout) -> State:
        """State of a sender that has sent nothing yet.

        Args:
            layout: names and shapes of the tensors, see `layout_of`.
        """
        shapes = {name: tuple(int(d) for d in shape) for name, shape in layout.items()}
        zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        return State(shapes, 0, dict.fromkeys(self._buffers(), zeros))

    def encode(
        self, tensors: Mapping[str, NDArray[Any]], state: State, *, key: int
    ) -> tuple[bytes, State]:
        """One payload, and the state to give next time; `state` itself does not change.

        Args:
            tensors: float16 to float64 arrays of the state's names and shapes; coded as float32.
            state: what the last `encode` returned, or `init`.
            key: 0 to 2**64 - 1, decides everything that is random. Same tensors, state and key,
                same bytes. Schemes without randomness do not use it.

        Raises:
            LayoutMismatch: the tensors are not those of the state.
            UnsupportedTensor: a tensor is not of floating point.
            NonFiniteError: a tensor holds NaN or an infinity.
            OutOfRange: a value does not fit the scheme's number format.
            StateError: another scheme, or other options, made the state.
            BadConfig: the key is out of range.
        """
        draws = Draws(key)
        if set(state.buffers) != set(self._buffers()):
            raise StateError(f"the state was not made by this {self.name!r} scheme; use its init()")
        wanted = self._accumulate(checked(tensors, state.layout), state)
        values = wanted.get("residual", wanted["input"])
        quantised = self._quantise(values, state, draws)
        body = self._write(quantised, state.layout)
        buffers: dict[str, Arrays] = {}
        if self._buffers():
            sent = self._restore(quantised, state.layout)
            buffers = self._remember(wanted, sent)
        return (
            seal(self.name, self.coding, state.layout, body),
            State(state.layout, state.step + 1, buffers),
        )

    def decode(self, payload: bytes, *, limits: Limits | None = None) -> Arrays:
        """The tensors of a payload of this scheme, whatever its sender's options.

        Raises:
            WrongScheme: another scheme made it.
            CodecError: a subclass for each other way in which the bytes may be wrong.
        """
        limits = limits or Limits()
        envelope = unseal(bytes(payload), limits)
        if envelope.scheme != self.name:
            raise WrongScheme(
                f"the payload is of scheme {envelope.scheme!r}, not {self.name!r}; use "
                "decode_payload() where any scheme will do"
            )
        return self.open(envelope, limits)

    @classmethod
    def open(cls, envelope: Envelope, limits: Limits) -> Arrays:
        """The tensors of a payload of this scheme whose container was checked.

        Raises:
            CodecError: a subclass for each way in which the bytes may be wrong.
        """
        return cls._restore(cls.parse(envelope, limits), envelope.layout)

    @classmethod
    def parse(cls, envelope: Envelope, limits: Limits) -> Quantised:
        """What travelled: the integers and scales, before they are multiplied.

        Raises:
            CodecError: a subclass for each way in which the bytes may be wrong.
        """
        reader = Reader(envelope.body)
        try:
            quantised = cls._read(reader, envelope.layout, envelope.coding, limits)
            reader.end()
        except CodecError:
            raise
        except MemoryError as error:
            raise LimitExceeded(
                "the payload needs more memory than there is; lower Limits.decoded_bytes"
            ) from error
        except _FOREIGN as error:
            raise MalformedPayload(f"the payload cannot be decoded: {error}") from error
        return quantised

    # --- what a scheme says ------------------------------------------------------------------

    def _check(self) -> None:  # noqa: B027 - some schemes have no such options
        """BadConfig when an option is out of range."""

    def _buffers(self) -> tuple[str, ...]:
        """Names of the state's buffers; "residual" alone is plain error feedback."""
        return ("residual",) if getattr(self, "error_feedback", False) else ()

    def _accumulate(self, tensors: Arrays, state: State) -> dict[str, Arrays]:
        """The buffers with the new tensors added, or these alone under "input"."""
        if "residual" not in state.buffers:
            return {"input": tensors}
        return {"residual": added(tensors, state.buffers["residual"]), "input": tensors}

    def _remember(self, wanted: Mapping[str, Arrays], sent: Arrays) -> dict[str, Arrays]:
        """The buffers of the next state, of what was to be sent and what was."""
        left = {name: array - sent[name] for name, array in wanted["residual"].items()}
        return {"residual": left}

    @abstractmethod
    def _quantise(self, tensors: Arrays, state: State, draws: Draws) -> Quantised:
        """What travels of these tensors."""

    @abstractmethod
    def _write(self, quantised: Quantised, layout: Layout) -> bytes:
        """The body of the payload."""

    @classmethod
    @abstractmethod
    def _read(cls, reader: Reader, layout: Layout, coding: str, limits: Limits) -> Quantised:
        """Inverse of `_write`; reads to the body's end."""

    @classmethod
    @abstractmethod
    def _restore(cls, quantised: Quantised, layout: Layout) -> Arrays:
        """The float32 tensors that the receiver gets."""

    def _bad(self, option: str, expected: str) -> BadConfig:
        value = getattr(self, option)
        return BadConfig(f"option {option!r} of scheme {self.name!r} is {value!r}, not {expected}")
