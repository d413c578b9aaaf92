"""Files that are never seen half written."""

from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file in one step: an interruption leaves the old one or the new one, never half of one."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    unfinished.replace(path)
