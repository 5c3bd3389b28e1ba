"""Local paths, and remote places with the same interface (`s3://...`, `https://...`) through fsspec."""

from pathlib import Path
from typing import Any

from vlm.errors import UserError


def located(path: Any) -> Path:
    """A path, or where it is a URL, what reads and lists like one.

    Raises:
        UserError: a URL, and the package that reads them is missing.
    """
    text = str(path)
    if "://" not in text or not isinstance(path, str):
        return path if hasattr(path, "open") else Path(path)
    try:
        from upath import UPath

        place = UPath(text)
        place.fs  # noqa: B018  (asks for the package of this protocol)
    except ImportError as error:
        raise UserError(f"{text}: {error}; remote files need pip install 'vlm[remote]' and that package") from error
    except ValueError as error:
        raise UserError(f"{text}: {error}; give a local path or a URL that fsspec knows") from error
    return place  # type: ignore[return-value]


def is_remote(path: Any) -> bool:
    return not isinstance(path, Path)
