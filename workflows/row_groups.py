"""Row groups of prepared Parquet files and of the sidecars with embeddings, read patiently and checked.

Imports neither Ray nor torch, so that read processes start fast.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from workflows.files import GONE, insistently

T = TypeVar("T")
PREPARE = "delete it, if it is there, and prepare the data again (`ddiff run` does): it is made anew"
REMAKE = "delete it, if it is there, and run the same command again: it is made anew"


class DataError(RuntimeError):
    """The prepared data cannot be used; the message names the file and what to do."""


def row_group(url: str, group: int, columns: Sequence[str], remedy: str) -> pa.Table:
    """Some columns of a row group, its pages checked.

    Raises:
        DataError: The file is gone, cut or changed; the message ends with the remedy.
        StorageError: The store is away, or denies access.
    """

    def look() -> pa.Table:
        with parquet_of(url) as parquet:
            return parquet.read_row_group(group, columns=list(columns))

    try:
        return patiently(look, url)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{url}, row group {group}: {first_line(error)}; {remedy}") from None


@contextmanager
def parquet_of(url: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file of ours, opened to check the pages that are read and to fetch only the bytes asked for.

    By default fsspec reads ahead: 50 MiB from S3 for a row group of a few.
    """
    fs, path = fsspec.url_to_fs(url)
    with fs.open(path, "rb", cache_type="none") as file:
        yield pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=True)


def patiently(look: Callable[[], T], url: str) -> T:
    """What `look` finds in a file; tried again while it is the store that fails.

    Raises:
        StorageError: The store failed at every attempt, or denies access.
        The errors of `look` that are about the file itself.
    """
    return insistently(look, f"{url} cannot be read", final=tells_of_the_file)


def tells_of_the_file(error: Exception) -> bool:
    """Whether a file is gone, or damaged by pyarrow's error; stores raise other types, or set an errno."""
    if isinstance(error, (*GONE, pa.ArrowException, DataError, KeyError, MemoryError)):
        return True
    return type(error) is OSError and error.errno is None


def first_line(error: Exception) -> str:
    """The first line of an error's message; its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def groups_of(parquet: pq.ParquetFile) -> list[int]:
    """Rows of each row group."""
    return [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
