"""Hot SQL, compiled once from the metadata, so that the schema exists once (DESIGN 13).

An ORM session per request costs four times as much; the text that SQLAlchemy would send
is the same.
"""

from __future__ import annotations

from types import NoneType
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Table
    from sqlalchemy.sql import ClauseElement
    from sqlmodel import SQLModel

_SQLITE = SQLiteDialect_pysqlite(paramstyle="named")


def compiled(statement: ClauseElement) -> str:
    """Return the SQLite text of a statement; its parameters are named."""
    return str(statement.compile(dialect=_SQLITE))


def table_of(model: type[SQLModel]) -> Table:
    """Return a model's table, which SQLModel types as a class attribute of unknown type."""
    table: Table = model.__table__  # type: ignore[attr-defined]  # SQLModel sets it, its stubs do not say so
    return table


def insert_sql(model: type[SQLModel]) -> str:
    """Return ``INSERT INTO t (all columns) VALUES (:each)``."""
    return compiled(table_of(model).insert())


def positional_insert_sql(model: type[SQLModel]) -> str:
    """Return ``INSERT INTO t VALUES (?, …)`` for rows that are tuples in column order."""
    table = table_of(model)
    marks = ", ".join("?" for _ in table.columns)
    return f"INSERT INTO {table.name} ({', '.join(column_names(model))}) VALUES ({marks})"  # noqa: S608  constants of ours


_PLAIN: Final = frozenset({int, str, bytes, NoneType})


def plain(values: Iterable[Any]) -> list[Any]:
    """Return values as the types SQLite knows, so that the driver need not ask each how it adapts.

    Our ids and enumerations are subclasses of str and int; asking costs more than binding.
    """
    return [value if type(value) in _PLAIN else _as_plain(value) for value in values]


def _as_plain(value: Any) -> Any:
    if isinstance(value, str):
        return str(value)
    return int(value) if isinstance(value, int) else value


def column_names(model: type[SQLModel]) -> tuple[str, ...]:
    """Return column names in table order, the order of ``SELECT`` made by `select_sql`."""
    return tuple(column.name for column in table_of(model).columns)


def select_sql(model: type[SQLModel], tail: str = "") -> str:
    """Return ``SELECT all columns FROM t`` followed by `tail`, which is ours, never a caller's."""
    table = table_of(model)
    return f"SELECT {', '.join(column_names(model))} FROM {table.name} {tail}"  # noqa: S608  constants of ours
