"""A reader of pickles that runs nothing named in them.

A pickle is a program for a small stack machine. The machine here has the few instructions that the published layout
needs; whatever else a file asks for is refused. What a name means is up to the caller (`find`): the machine imports
nothing, and calls only what the caller's names stand for.

Python's own `pickle.Unpickler` with an allow-list of names would run nothing either, but hostile files could still stop
it: it hashes nested tuples that are keys (which crashes the process, or takes forever), allocates a memo of any size
that a file names, and copies every tensor into memory.
"""

import pickle
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dnnlib.errors import DamagedFileError, UserError, one_line
from torch_utils.pickle_records import Record, RefusedError

# Limits against hostile files. The largest published network takes about a hundredth of the steps.
MAX_STEPS = 4_000_000  # instructions, and items that they handle
MAX_NAME = 100  # characters
MAX_KEY = 1 << 31  # integers as keys: larger ones can be chosen to collide


@contextmanager
def naming_source(source: str) -> Iterator[None]:
    """A context in which whatever a damaged or hostile file causes becomes one `UserError` that names the file."""
    try:
        yield
    except UserError:
        raise
    except RefusedError as err:
        raise UserError(f"{source}: {err}; nothing in the file was run") from None
    except EOFError:
        raise DamagedFileError(f"{source}: the file is truncated: copy it again") from None
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as err:
        raise DamagedFileError(f"{source}: damaged ({one_line(err)}): copy it again") from None


@dataclass(frozen=True, eq=False)
class Name:
    """A global name that the layout uses, and the function to call for it (None: it is never called)."""

    name: str
    call: Callable[..., Any] | None


@dataclass
class Budget:
    """The steps that all machines of one file have taken together."""

    steps: int = 0

    def spend(self, items: int) -> None:
        """Count `items` steps.

        Raises:
            RefusedError: they are more than any published file needs.
        """
        self.steps += items
        if self.steps > MAX_STEPS:
            raise RefusedError(f"it takes more than {MAX_STEPS} steps, which no published file needs")


class _Mark:
    pass


class Machine:
    """The stack machine.

    Args:
        data: contents of the file, which bytes in the result are views of.
        budget: shared by the machines of one file.
        find: gives the meaning of a global name, 'module.name'.
        find_persistent: gives the meaning of a persistent id; None = there are none.
    """

    def __init__(
        self,
        data: memoryview,
        budget: Budget,
        find: Callable[[str], Name],
        find_persistent: Callable[[Any], Any] | None = None,
    ):
        self.data = data
        self.budget = budget
        self.find = find
        self.find_persistent = find_persistent
        self.position = 0
        self.protocols: set[int] = set()

    def run(self) -> Any:
        """The value of one pickle, read from `position` to its end.

        Raises:
            RefusedError: it uses something that the layout does not.
            EOFError: it is truncated.
            LookupError, TypeError, ValueError: it is damaged.
        """
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        while True:
            code = self.take(1)[0]
            if code == pickle.STOP[0]:
                (value,) = self.stack
                return value
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise RefusedError(
                    f"byte {self.position - 1} is an instruction ({code:#04x}) that such files do not use"
                )
            self.budget.spend(1)
            instruction(self)

    def take(self, count: int) -> memoryview:
        """The next bytes."""
        part = self.data[self.position : self.position + count]
        if len(part) < count:
            raise EOFError
        self.position += count
        return part

    def number(self, form: str) -> Any:
        """The next number, of a format of `struct`."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    # What the instructions below are made of

    def text(self, length: int) -> str:
        return str(self.take(length), "utf-8", "surrogatepass")

    def line(self) -> str:
        text = bytes(self.data[self.position : self.position + MAX_NAME]).partition(b"\n")
        self.take(len(text[0]) + 1)
        return str(text[0], "ascii")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _Mark:
            raise ValueError("a mark where a value is needed")
        return value

    def pop_to_mark(self) -> list[Any]:
        start = len(self.stack)
        while self.stack[start - 1] is not _Mark:
            start -= 1
            if start == 0:
                raise ValueError("no mark")
        items = self.stack[start:]
        del self.stack[start - 1 :]
        self.budget.spend(len(items))
        return items

    def top(self, kind: type) -> Any:
        value = self.stack[-1]
        if type(value) is not kind:
            raise TypeError(f"a {kind.__name__} was expected")
        return value

    def tuple_of(self, count: int) -> None:
        self.push(tuple(self.pop() for _ in range(count))[::-1])

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def add_items(self, items: list[Any]) -> None:
        self.top(set).update(map(checked_key, items))

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def global_name(self, module: Any, name: Any) -> None:
        self.push(self.find(f"{module}.{name}"))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError("a name must be text")
        self.global_name(module, name)

    def call(self) -> None:
        args, name = self.pop(), self.pop()
        if type(name) is not Name or name.call is None or type(args) is not tuple:
            raise TypeError("a call of something that is no function")
        self.budget.spend(sum(len(arg) for arg in args if isinstance(arg, (list, tuple, set, dict))))
        self.push(name.call(*args))

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.build(state)
        elif not (type(target) is dict and (state is None or (type(state) is dict and state.keys() == {"_metadata"}))):
            # Of a state dict, `_metadata` are versions of torch's own modules.
            raise TypeError("attributes for something that has none")

    def persistent(self) -> None:
        if self.find_persistent is None:
            raise RefusedError("it refers to objects outside the file")
        self.push(self.find_persistent(self.pop()))


def checked_key(key: Any) -> str | int:
    """The same key, or member of a set: text or a small integer, whose hash costs nothing and does not collide.

    Raises:
        TypeError: it is something else.
    """
    if type(key) is str or (type(key) is int and abs(key) < MAX_KEY):
        return key
    raise TypeError(f"a {type(key).__name__} as a key")


def _instructions() -> dict[int, Callable[[Machine], None]]:
    """What each instruction of the layout does, by its code."""
    table: dict[bytes, Callable[[Machine], Any]] = {
        pickle.PROTO: lambda self: self.protocols.add(self.take(1)[0]),
        pickle.FRAME: lambda self: self.take(8),
        # Constants
        pickle.NONE: lambda self: self.push(None),
        pickle.NEWTRUE: lambda self: self.push(True),
        pickle.NEWFALSE: lambda self: self.push(False),
        pickle.BININT: lambda self: self.push(self.number("<i")),
        pickle.BININT1: lambda self: self.push(self.number("<B")),
        pickle.BININT2: lambda self: self.push(self.number("<H")),
        pickle.LONG1: lambda self: self.push(int.from_bytes(self.take(self.number("<B")), "little", signed=True)),
        pickle.BINFLOAT: lambda self: self.push(self.number(">d")),
        pickle.SHORT_BINUNICODE: lambda self: self.push(self.text(self.number("<B"))),
        pickle.BINUNICODE: lambda self: self.push(self.text(self.number("<I"))),
        pickle.BINUNICODE8: lambda self: self.push(self.text(self.number("<Q"))),
        # Text and bytes of Python 2, in which CIFAR is published: the short ones are names.
        pickle.SHORT_BINSTRING: lambda self: self.push(str(self.take(self.number("<B")), "latin-1")),
        pickle.BINSTRING: lambda self: self.push(self.take(self.number("<I"))),
        pickle.SHORT_BINBYTES: lambda self: self.push(self.take(self.number("<B"))),
        pickle.BINBYTES: lambda self: self.push(self.take(self.number("<I"))),
        pickle.BINBYTES8: lambda self: self.push(self.take(self.number("<Q"))),
        pickle.BYTEARRAY8: lambda self: self.push(self.take(self.number("<Q"))),
        # Containers
        pickle.EMPTY_DICT: lambda self: self.push({}),
        pickle.EMPTY_LIST: lambda self: self.push([]),
        pickle.EMPTY_SET: lambda self: self.push(set()),
        pickle.EMPTY_TUPLE: lambda self: self.push(()),
        pickle.TUPLE1: lambda self: self.tuple_of(1),
        pickle.TUPLE2: lambda self: self.tuple_of(2),
        pickle.TUPLE3: lambda self: self.tuple_of(3),
        pickle.TUPLE: lambda self: self.push(tuple(self.pop_to_mark())),
        pickle.APPEND: lambda self: self.extend([self.pop()]),
        pickle.APPENDS: lambda self: self.extend(self.pop_to_mark()),
        pickle.SETITEM: lambda self: self.set_items([self.pop(), self.pop()][::-1]),
        pickle.SETITEMS: lambda self: self.set_items(self.pop_to_mark()),
        pickle.ADDITEMS: lambda self: self.add_items(self.pop_to_mark()),
        # Stack and memo
        pickle.MARK: lambda self: self.push(_Mark),
        pickle.POP: lambda self: self.stack.pop(),
        pickle.POP_MARK: lambda self: self.pop_to_mark(),
        pickle.BINPUT: lambda self: self.put(self.number("<B")),
        pickle.LONG_BINPUT: lambda self: self.put(self.number("<I")),
        pickle.MEMOIZE: lambda self: self.put(len(self.memo)),
        pickle.BINGET: lambda self: self.get(self.number("<B")),
        pickle.LONG_BINGET: lambda self: self.get(self.number("<I")),
        # Names and what is done with them
        pickle.GLOBAL: lambda self: self.global_name(self.line(), self.line()),
        pickle.STACK_GLOBAL: Machine.stack_global,
        pickle.REDUCE: Machine.call,
        pickle.NEWOBJ: Machine.call,
        pickle.BUILD: Machine.build,
        pickle.BINPERSID: Machine.persistent,
    }
    return {code[0]: instruction for code, instruction in table.items()}


_INSTRUCTIONS = _instructions()
