"""`tron_cli.prepare`: a prepared dataset from every source of `tron prepare`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import tempfile
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tron_cli.api.arguments import check
from tron_cli.errors import InputError, RunError
from tron_cli.files import remove_older

if TYPE_CHECKING:
    from tron_cli.data.dataset import Dataset
    from tron_cli.prepare.sources.table_reader import TableColumns

AnyPath = str | os.PathLike[str]
Words = str | Sequence[str]

# Smallest and largest value of an option.
BOUNDS: dict[str, tuple[float, float | None]] = {
    "val_days": (0, None),
    "test_days": (0, None),
    "max_val_sessions": (1, None),
    "seed": (0, None),
    "max_bad_share": (0, 1),
    "min_session_length": (2, None),
    "max_session_length": (2, None),
    "min_item_count": (1, None),
}


def prepare(
    source: str,
    *,
    data_dir: AnyPath = "datasets",
    name: str | None = None,
    **options: Any,
) -> Dataset:
    """Prepare a dataset: filters, splits, memory-mapped arrays in the folder data_dir/name.

    source: table, sequences, otto, yoochoose, diginetica, ml1m or synthetic. options: those of
    `tron prepare SOURCE`, with underscores: `--session-col` is session_col. name: that of the
    dataset; table and sequences need one, the others are called as their source. Of a table, input,
    train, val and test are files, lists of them, or data frames of polars or pandas, whose rows
    errors number from 1.

    Returns the opened dataset; `dataset.info` is its dataset.json. Raises InputError where an
    option is unknown or wrong, or a file cannot be read.

    >>> import tron_cli
    >>> shop = tron_cli.prepare("synthetic", name="shop", sessions=12_000)
    >>> shop.protocol, shop.num_items
    ('every-step', 5000)

    A data frame of visits that go around in nine items:

    >>> import polars
    >>> events = polars.DataFrame({"visit": range(300)}).join(
    ...     polars.DataFrame({"step": range(3)}), how="cross"
    ... )
    >>> events = events.with_columns(
    ...     sku="sku-" + ((polars.col.visit + polars.col.step) % 9).cast(str),
    ...     time=1_700_000_000 + 3600 * polars.col.visit + polars.col.step,
    ... )
    >>> columns = {"session_col": "visit", "item_col": "sku", "time_col": "time"}
    >>> visits = tron_cli.prepare("table", name="visits", input=events, **columns)
    >>> visits.num_items
    9
    """
    check("source", source, str)
    if source not in SOURCES:
        near = difflib.get_close_matches(str(source), SOURCES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(SOURCES)}"
        raise InputError(f"no source {source!r} of datasets; {hint}")
    check("data_dir", data_dir, AnyPath)
    check("name", name, str | None)
    if name is None and source in ("table", "sequences"):
        raise InputError(f"prepare({source!r}) needs the name of the dataset")
    check_options(f"prepare({source!r})", options_of(source), options)
    return SOURCES[source](Path(data_dir), name or source, **options)


def check_options(
    function: str, known: dict[str, tuple[Any, Any]], options: dict[str, Any]
) -> None:
    """Raise InputError unless the options are known, of their types, and none is missing.

    known: as `options_of` returns them.
    """
    for option, value in options.items():
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}"
            raise InputError(f"{function} has no option {option!r}; {hint}")
        check(option, value, known[option][0], *BOUNDS.get(option, ()))
    missing = [
        option
        for option, (_, default) in known.items()
        if default is inspect.Parameter.empty and option not in options
    ]
    if missing:
        raise InputError(f"{function} needs {' and '.join(missing)}")


def options_of(source: str) -> dict[str, tuple[Any, Any]]:
    """Return type and default of each option of a source; empty for the default of a needed one."""
    own = SOURCES[source]
    name = own.args[0] if isinstance(own, partial) else source
    hidden = {"leave_one_out", "frames", "reader"} if source == "table" else set()
    readers = [table_columns] if source == "table" else []
    found = keyword_options(_prepare_function(name), own, *readers)
    return {option: declared for option, declared in found.items() if option not in hidden}


def keyword_options(*functions: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Return type and default of each keyword-only parameter; of one name, the last one's."""
    found = {}
    for function in functions:
        plain = function
        while isinstance(plain, partial):
            plain = plain.func
        hints = typing.get_type_hints(plain, localns={"Dataset": Any, "TableColumns": Any})
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY:
                found[parameter.name] = hints[parameter.name], parameter.default
    return found


def _prepare_function(source: str) -> Callable[..., Dataset]:
    module = importlib.import_module(f"tron_cli.prepare.sources.{source}")
    function: Callable[..., Dataset] = getattr(module, f"prepare_{source}")
    return function


def _public(
    source: str, data_dir: Path, name: str, *, raw: AnyPath | None = None, **options: Any
) -> Dataset:
    """Prepare one of the public datasets."""
    given = None if raw is None else Path(raw)
    return _prepare_function(source)(given, data_dir, name, **_texts(options))


def _otto(
    data_dir: Path,
    name: str,
    *,
    raw: AnyPath | None = None,
    train: AnyPath | Sequence[AnyPath] | None = None,
    test: AnyPath | Sequence[AnyPath] | None = None,
    **options: Any,
) -> Dataset:
    files = {
        split: [Path(paths)] if isinstance(paths, str | os.PathLike) else [*map(Path, paths or ())]
        for split, paths in (("train", train), ("test", test))
    }
    given = None if raw is None else Path(raw)
    return _prepare_function("otto")(given, data_dir, name, **files, **_texts(options))


def _sequences(
    data_dir: Path,
    name: str,
    *,
    input: AnyPath | None = None,
    train: AnyPath | None = None,
    test: AnyPath | None = None,
    val: AnyPath | None = None,
    **options: Any,
) -> Dataset:
    given = {"input": input, "train": train, "test": test, "val": val}
    files = {option: None if path is None else Path(path) for option, path in given.items()}
    places = files.pop("train"), files.pop("test")
    return _prepare_function("sequences")(*places, data_dir, name, **files, **_texts(options))


def _synthetic(data_dir: Path, name: str, **options: Any) -> Dataset:
    from tron_cli.evaluation.reference import reference_figures

    return _prepare_function("synthetic")(data_dir, name, reference_figures, **options)


def _table(
    data_dir: Path,
    name: str,
    *,
    input: Any = (),
    train: Any = (),
    val: Any = (),
    test: Any = (),
    split: Literal["time", "leave-one-out"] = "time",
    **options: Any,
) -> Dataset:
    from tron_cli.prepare.sources.table import prepare_table

    names = keyword_options(table_columns)
    columns = table_columns(**{each: options.pop(each) for each in names if each in options})
    with frames_folder() as folder:
        given = {"input": input, "train": train, "val": val, "test": test}
        files = {
            each: files_of(each, tables, folder, columns.wanted) for each, tables in given.items()
        }
        if bool(files["input"]) == bool(files["train"]) or (
            bool(files["train"]) != bool(files["test"])
        ):
            raise InputError("expected --input, or --train and --test for tables already split")
        return prepare_table(
            files["input"] or files["train"],
            columns,
            data_dir,
            name,
            leave_one_out=split == "leave-one-out",
            val=files["val"],
            test=files["test"],
            frames=folder,
            **_texts(options),
        )


def table_columns(
    *,
    item_col: str,
    time_col: str,
    time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto",
    time_format: str | None = None,
    session_col: str | None = None,
    user_col: str | None = None,
    session_gap: str | None = None,
    event_col: str | None = None,
    keep_events: Words | None = None,
    null_tokens: Words | None = None,
) -> TableColumns:
    """Return the columns of a table by the options of `tron prepare table`."""
    from tron_cli.prepare.sources.table_reader import NULL_TOKENS, TableColumns

    return TableColumns(
        item=item_col,
        time=time_col,
        session=session_col,
        user=user_col,
        time_unit=time_unit,
        time_format=time_format,
        session_gap=session_gap,
        event=event_col,
        keep_events=_words(keep_events or ()),
        null_tokens=NULL_TOKENS if null_tokens is None else _words(null_tokens),
    )


SOURCES: dict[str, Callable[..., Dataset]] = {
    "table": _table,
    "sequences": _sequences,
    "otto": _otto,
    **{name: partial(_public, name) for name in ("yoochoose", "diginetica", "ml1m")},
    "synthetic": _synthetic,
}


def _words(listing: Words) -> tuple[str, ...]:
    words = listing.split(",") if isinstance(listing, str) else listing
    return tuple(word.strip() for word in words if word.strip())


def _texts(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with the paths among them as text."""
    return {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in options.items()
    }


@contextmanager
def frames_folder() -> Iterator[Path]:
    """Yield a temporary folder for data frames, which errors then name without it."""
    try:
        remove_older(Path(tempfile.gettempdir()), "tron-frames-*")
        temporary = tempfile.TemporaryDirectory(prefix="tron-frames-")
    except OSError as error:
        raise RunError(
            f"cannot write data frames to {tempfile.tempdir or 'a temporary folder'} "
            f"({error.strerror or error}); name a folder in the variable TMPDIR"
        ) from error
    with temporary as folder:
        try:
            yield Path(folder)
        except InputError as error:
            if folder not in str(error):
                raise
            raise InputError(str(error).replace(folder + os.sep, "")) from error


def files_of(name: str, tables: Any, folder: Path, wanted: list[str]) -> list[Path]:
    """Return the files of a table; the wanted columns of data frames are written first."""
    if tables is None:
        return []
    is_one = isinstance(tables, str | os.PathLike) or is_frame(tables)
    if not is_one and not isinstance(tables, Iterable):
        raise InputError(f"{name} must be a path, a list of them or a data frame, got {tables!r}")
    files = []
    for number, table in enumerate([tables] if is_one else tables, start=1):
        if is_frame(table):
            files.append(folder / f"the data frame {name}{'' if is_one else f' {number}'}")
            _write_frame(table, files[-1], wanted)
        else:
            check(name, table, AnyPath)
            files.append(Path(table))
    return files


def is_frame(table: Any) -> bool:
    """Return True for a data frame of polars or pandas."""
    package = type(table).__module__.split(".")[0]
    return package in ("polars", "pandas") and type(table).__name__ == "DataFrame"


def _write_frame(frame: Any, file: Path, wanted: list[str]) -> None:
    """Write columns of a data frame of polars, or of pandas without its index, as Parquet."""
    import polars as pl

    from tron_cli.prepare.reading.columns import find_columns, first_line

    names = [str(name) for name in frame.columns]
    columns = {}
    for at in find_columns(file, names, wanted):
        try:
            is_polars = isinstance(frame, pl.DataFrame)
            column: Any = frame.to_series(at) if is_polars else pl.from_pandas(frame.iloc[:, at])
            if column.dtype == pl.Object:
                raise TypeError("its values are Python objects")
        except (TypeError, ValueError, pl.exceptions.PolarsError) as error:
            raise InputError(
                f"{file}, column {names[at]}: {first_line(error)}; convert it to one type"
            ) from error
        columns[names[at]] = column
    try:
        pl.DataFrame(columns).write_parquet(file)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise RunError(
            f"cannot write {file} ({first_line(error)}); make room in {file.parent.parent}, or "
            "name another folder in the variable TMPDIR"
        ) from error
