"""Whether a file that is being written has been deleted, which no write notices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any


def refuse_deleted(file: IO[Any]) -> None:
    """Raise a FileNotFoundError if an open file was deleted: nobody could read what is written. Moving it is fine."""
    if os.fstat(file.fileno()).st_nlink == 0 and not Path(file.name).exists():
        raise FileNotFoundError(f"{file.name} was deleted while it was written")
