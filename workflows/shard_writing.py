"""One WebDataset tar, whole or not there: made under another name, on the disk, and renamed."""

import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path


def write_tar(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write samples, each a key and its members by suffix; the same samples give the same bytes.

    Raises:
        OSError: There is no room; nothing stays.
    """
    import webdataset  # noqa: PLC0415 it takes seconds to import, and most who import this write nothing

    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with draft.open("wb") as file:
            with webdataset.TarWriter(file, mtime=0) as tar:
                for key, members in samples:
                    tar.write({"__key__": key} | dict(members))
            file.flush()
            os.fsync(file.fileno())  # else a machine that loses power may keep the name and not the bytes
        draft.rename(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails does not say where
        raise
    finally:
        draft.unlink(missing_ok=True)
